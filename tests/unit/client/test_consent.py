"""A yes to a federation's terms: by hash, or at a prompt that takes nothing else for one."""

from __future__ import annotations

import io
import sys

import pytest

from client_model.consent import Consent
from splitfl.config import parse_federation
from splitfl.errors import PrivacyError
from splitfl.federation.agreement import SHORT, Terms

TERMS = Terms(parse_federation({}, "the test"), "ab" * 32)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


class Interrupted(Terminal):
    """Somebody who presses Ctrl-C."""

    def readline(self, _size: int | None = -1, /) -> str:
        raise KeyboardInterrupt


@pytest.mark.parametrize("given", [TERMS.sha256, TERMS.sha256[:SHORT], TERMS.sha256.upper()])
def test_hash_of_the_terms_is_a_yes(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert Consent(given, as_json=True)(TERMS)
    assert TERMS.sha256 in capsys.readouterr().err


@pytest.mark.parametrize("given", ["deadbeef", "0" * 64, TERMS.sha256[: SHORT - 1]])
def test_hash_of_other_terms_is_told_apart_from_none(given: str) -> None:
    with pytest.raises(PrivacyError) as caught:
        Consent(given, as_json=False)(TERMS)
    assert f"--accept {given} is not the hash of these terms ({TERMS.sha256[:SHORT]}...)" in caught.value.message
    assert f"--accept {TERMS.sha256[:SHORT]}" in caught.value.remedy


@pytest.mark.parametrize(
    ("typed", "yes"), [("y\n", True), ("Yes\n", True), ("n\n", False), ("\n", False), ("what?\n", False), ("", False)]
)
def test_answer_on_a_terminal(typed: str, yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(typed))
    assert Consent("", as_json=False)(TERMS) is yes
    assert Consent("", as_json=True)(TERMS) is False  # a program is not asked


def test_ctrl_c_at_the_question_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        Consent("", as_json=False)(TERMS)


def test_nobody_is_asked_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert not Consent("", as_json=False)(TERMS)
