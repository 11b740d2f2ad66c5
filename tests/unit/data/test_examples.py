"""A row means the same in every format, and no error shows what it says."""

from __future__ import annotations

import pytest

from splitfl.data.examples import BadRowError, Example, example_from_row

TURNS = [{"role": "user", "content": "Ask"}, {"role": "assistant", "content": "Answer"}]


def test_row_reads_messages_before_prompt_and_prompt_before_text() -> None:
    row: dict[str, object] = {"messages": TURNS, "prompt": "P", "response": "R", "text": "T"}
    assert example_from_row(row) == Example(messages=tuple(TURNS))
    assert example_from_row({**row, "messages": None}) == Example(prompt="P", response="R")
    assert example_from_row({**row, "messages": None, "response": None}) == Example(text="T")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "has neither text"),
        ({"diagnosis": "SECRET"}, "has neither text"),
        ({"prompt": "SECRET"}, "has neither text"),
        ({"text": None}, "has neither text"),
        ({"text": ""}, "has an empty text"),
        ({"text": " \n\t\u00a0"}, "has an empty text"),
        ({"prompt": "SECRET", "response": " "}, "has an empty response"),
        ({"prompt": "", "response": "SECRET"}, "has an empty prompt"),
        ({"text": 3}, "has a text of type int"),
        ({"text": ["SECRET"]}, "has a text of type list"),
        ({"text": b"SECRET"}, "has a text of type bytes"),
        ({"text": "SECRET \ud800"}, "not valid Unicode"),
        ({"messages": "SECRET"}, "not a non-empty list"),
        ({"messages": []}, "not a non-empty list"),
        ({"messages": ["SECRET"]}, "not an object"),
        ({"messages": [{"role": "user"}]}, "without role or content"),
        ({"messages": [{"role": "", "content": "SECRET"}]}, "without role or content"),
        ({"messages": [{"role": "user", "content": " "}]}, "without content"),
        ({"messages": [{"role": "user", "content": ["SECRET"]}]}, "message field of type list"),
    ],
)
def test_row_is_refused_without_being_quoted(row: dict[str, object], says: str) -> None:
    with pytest.raises(BadRowError, match=says) as caught:
        example_from_row(row)
    assert "SECRET" not in str(caught.value)


def test_message_drops_null_fields_as_parquet_writes_them() -> None:
    example = example_from_row({"messages": [{"role": "user", "content": "Ask", "name": None}]})
    assert example.messages == ({"role": "user", "content": "Ask"},)


@pytest.mark.parametrize(
    "example",
    [Example(text="SECRET"), Example(prompt="SECRET", response="SECRET"), Example(messages=({"SECRET": "SECRET"},))],
)
def test_example_hides_its_text_when_shown(example: Example) -> None:
    assert "SECRET" not in repr(example)


def test_content_differs_between_kinds_that_hold_the_same_words() -> None:
    kinds = [Example(text="ab"), Example(prompt="a", response="b"), Example(prompt="ab", response="b")]
    assert len({example.content() for example in kinds}) == 3
    assert Example(text="ab").content() == Example(text="ab").content()


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (Example(text="one\ntwo"), "one\ntwo"),
        (Example(prompt="Why?", response="So."), "Why?\nSo."),
        (Example(messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})), "Hi\nHo"),
    ],
)
def test_example_gives_its_text_as_it_was_written(example: Example, text: str) -> None:
    assert example.plain_text() == text


@pytest.mark.parametrize(
    "example", [Example(text="T"), Example(prompt="P", response="R"), Example(messages=tuple(TURNS))]
)
def test_example_written_as_a_row_is_read_as_the_same_example(example: Example) -> None:
    assert example_from_row(example.as_row()) == example
