"""The tree of errors is a contract: its exit codes are documented, and every message ends with what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitfl import errors
from splitfl.errors import INTERRUPTED_EXIT_CODE, ProtocolError, RefusedError, SplitFLError

PAGE = Path(__file__).parents[2] / "docs/errors.md"


def kinds() -> dict[str, type[SplitFLError]]:
    found = [SplitFLError, *SplitFLError.__subclasses__()]
    return {kind.__name__: kind for kind in found if kind.__module__ == errors.__name__}


def test_page_lists_every_kind_of_error_with_its_exit_code() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: int(code) for code, name in rows} == {name: kind.exit_code for name, kind in kinds().items()}


def test_page_lists_the_exit_code_of_ctrl_c() -> None:
    assert re.search(rf"^\| {INTERRUPTED_EXIT_CODE} \| \| Ctrl-C", PAGE.read_text(), re.MULTILINE)


def test_page_gives_examples_with_codes_that_exist() -> None:
    examples = PAGE.read_text().partition("| code | the line |")[2].partition("\n\n")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| `", examples, re.MULTILINE)}
    assert codes <= {kind.exit_code for kind in kinds().values()}
    assert len(codes) >= 7


def test_docstring_lists_every_kind_with_its_exit_code() -> None:
    assert errors.__doc__ is not None
    listed = dict(re.findall(r"(\w+Error) +(\d+)", errors.__doc__))
    assert {name: int(code) for name, code in listed.items()} == {n: kind.exit_code for n, kind in kinds().items()}


def test_exit_codes_are_all_different() -> None:
    codes = [kind.exit_code for kind in kinds().values()] + [0, INTERRUPTED_EXIT_CODE]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("name", kinds())
def test_error_reads_as_message_and_remedy(name: str) -> None:
    error = kinds()[name]("the disk is full", "Free some space.")
    assert str(error) == "the disk is full. Free some space."
    assert str(kinds()[name]("the disk is full")) == "the disk is full"
    assert (error.message, error.remedy) == ("the disk is full", "Free some space.")


def test_errors_of_the_wire_say_field_and_code() -> None:
    assert ProtocolError("wrong", field="shape").field == "shape"
    assert RefusedError("no", code="name_taken").code == "name_taken"
