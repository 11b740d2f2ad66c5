"""The join string: one line, safe in any shell, read back whole or refused without repeating its secret."""

from __future__ import annotations

import shlex
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.channel.joining import JoinString
from splitfl.errors import ConfigError

TOKEN = "tHe-secret_token-0123456789-tHe-secret_toke"
AUTHORITY = "0123456789abcdef" * 4
LINE = f"splitfl://ward-a:{TOKEN}@trunk.example:7000/{AUTHORITY}"


def test_line_says_where_who_and_whom_to_trust() -> None:
    join = JoinString.parse(LINE)
    assert join == JoinString("trunk.example", 7000, "ward-a", AUTHORITY, TOKEN)
    assert str(join) == LINE
    assert join.url == "wss://trunk.example:7000"


names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
tokens = st.one_of(st.just(""), st.from_regex(r"\A[A-Za-z0-9_-]{43}\Z"))
hosts = st.sampled_from(["127.0.0.1", "trunk.example", "::1", "fe80::1", "localhost"])


@given(hosts, st.integers(1, 65535), names, tokens)
def test_line_is_read_back_as_it_was_and_needs_no_quotes(host: str, port: int, name: str, token: str) -> None:
    join = JoinString(host, port, name, AUTHORITY, token)
    assert JoinString.parse(f" {join}\n") == join
    if ":" not in host:  # brackets of IPv6 are a pattern to a shell, if one that matches nothing
        assert shlex.quote(str(join)) == str(join)
    assert urlsplit(join.url).port == port


def test_secret_is_in_neither_repr_nor_url() -> None:
    join = JoinString.parse(LINE)
    assert TOKEN not in repr(join) + join.url + join.netloc


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "does not begin"),
        (LINE.replace("splitfl", "https"), "does not begin"),
        (LINE.replace(":7000", ""), "HOST:PORT"),
        (LINE.replace("7000", "0"), "HOST:PORT"),
        (LINE.replace("7000", "70000"), "HOST:PORT"),
        (LINE.replace("trunk.example", ""), "HOST:PORT"),
        (LINE.replace("ward-a", ""), "client name"),
        (LINE.replace("ward-a", "-x"), "client name"),
        (LINE.replace("ward-a", "%2e%2e"), "client name"),
        (LINE.replace(TOKEN, TOKEN[:-1]), "token"),
        (LINE.replace(TOKEN, TOKEN + "~"), "token"),
        (LINE[:-1], "fingerprint"),
        (LINE.upper().replace("SPLITFL", "splitfl"), "fingerprint"),
        (LINE + "?x=1", "fingerprint"),
        (LINE + "#x", "fingerprint"),
        (LINE.replace("trunk.example", "[::1"), "no address"),
    ],
)
def test_line_that_is_damaged_is_refused_without_repeating_it(line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        JoinString.parse(line)
    assert TOKEN not in str(caught.value)
    assert "splitfl invite" in caught.value.remedy
