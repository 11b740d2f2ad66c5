"""docs/protocol.md says what the code does: each message, field, answer, error code and limit, and its example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitfl.pipe import FRAGMENT_BYTES, SILENCE_LIMIT_S
from splitfl.wire import frames
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import (
    ELEMENT_BYTES,
    ERROR_CODES,
    MESSAGE_TYPES,
    PROTOCOL_VERSIONS,
    REQUESTS,
    TYPE_NAMES,
    Hidden,
    TensorBytes,
)
from splitfl.wire.session import CREDIT_WINDOW

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """What stands between a heading and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"no section {heading!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    """The names in the first column of a table."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def test_page_describes_every_message_and_no_other() -> None:
    described = re.findall(r"^### `(\w+)`$", section_of_messages(), flags=re.MULTILINE)
    assert described == list(MESSAGE_TYPES)


def section_of_messages() -> str:
    return PAGE[PAGE.index("\n## Messages\n") : PAGE.index("\n## Error codes\n")]


@pytest.mark.parametrize("name", MESSAGE_TYPES)
def test_page_describes_every_field_and_no_other(name: str) -> None:
    assert first_column(section(f"`{name}`")) == list(MESSAGE_TYPES[name].__dataclass_fields__)


@pytest.mark.parametrize("cls", REQUESTS, ids=lambda cls: cls.__name__)
def test_page_names_the_answers_that_the_request_names(cls: type) -> None:
    said = re.search(r"Answered by ([^.]*)\.", section(f"`{TYPE_NAMES[cls]}`"))
    assert said
    promised = re.search(r"Answered by ([^.]*)\.", cls.__doc__ or "")
    if promised is None:  # of Bye, Farewell's docstring says it
        assert said[1] == "`farewell`"
        return
    wanted = {TYPE_NAMES[other] for other in TYPE_NAMES if re.search(rf"\b{other.__name__}\b", promised[1])}
    assert wanted == set(re.findall(r"`(\w+)`", said[1]))


def test_page_lists_every_error_code_and_no_other() -> None:
    assert first_column(section("Error codes")) == list(ERROR_CODES)


def test_page_states_the_limits_of_the_code() -> None:
    stated = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+)[^|]*\|$", section("Limits"), flags=re.MULTILINE))
    numbers = {name: int(value.replace(",", "")) for name, value in stated.items()}
    assert numbers["header"] == frames.MAX_HEADER_BYTES
    assert numbers["items in one list of the header"] == frames.MAX_ARRAY_ITEMS
    assert numbers["tensors in a message"] == frames.MAX_TENSORS
    assert numbers["dimensions of a tensor"] == frames.MAX_DIMENSIONS
    assert numbers["frame"] == frames.MAX_FRAME_BYTES
    assert numbers["unanswered requests"] == CREDIT_WINDOW
    assert numbers["`seq` beyond `ack`"] == 2 * CREDIT_WINDOW - 1
    assert numbers["silence before a side gives up"] == SILENCE_LIMIT_S
    assert f"1 MiB ({FRAGMENT_BYTES:,} bytes)" in section("A connection")


def test_page_names_every_dtype() -> None:
    assert set(ELEMENT_BYTES) <= set(re.findall(r"`(\w+)`", section("A frame")))


def test_page_is_about_the_version_that_the_code_speaks() -> None:
    assert PAGE.startswith(f"# The SplitFL protocol, version {max(PROTOCOL_VERSIONS)}\n")


def test_worked_example_is_the_frame_that_it_says() -> None:
    block = re.search(r"```hex\n(.*?)```", PAGE, flags=re.DOTALL)
    assert block
    data = bytes.fromhex("".join(line.partition("#")[0] for line in block[1].splitlines()))
    message = Hidden(2, 0, 0, 0, TensorBytes("bf16", (1, 1, 2), bytes.fromhex("803f00c0")))
    assert decode(data) == message
    assert b"".join(encode(message)) == data
