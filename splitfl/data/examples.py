"""What one row of a hospital's file means: plain text, a prompt with its response, or a conversation.

A row becomes an ``Example`` here and nowhere else, so that every file format accepts and refuses the same
rows. Two habits, because the text may be a patient's: no error quotes a row, and the ``repr`` of an example
shows its size alone, so that neither a log nor a traceback carries the text. This module opens no file (see
``formats.py``) and knows no tokens (see ``records.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from splitfl.errors import DataError

COLUMNS = ("messages", "prompt", "response", "text")
"""Every column that is read; all others are ignored."""


class BadRowError(DataError):
    """One row that cannot be used; ``message`` says why without quoting it, ``readers.py`` adds the place."""


@dataclass(frozen=True, repr=False)
class Example:
    """One usable row. Exactly one of ``text``, ``prompt`` with ``response``, or ``messages`` is set."""

    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    def __repr__(self) -> str:
        if self.messages:
            return f"Example({len(self.messages)} messages)"
        if self.response is not None:
            return f"Example(prompt of {len(self.prompt or '')}, response of {len(self.response)} characters)"
        return f"Example(text of {len(self.text or '')} characters)"

    def content(self) -> bytes:
        """The row as canonical UTF-8 bytes: equal examples give equal bytes, whatever their file format."""
        fields = [self.text, self.prompt, self.response, self.messages]
        return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()

    def as_row(self) -> dict[str, object]:
        """The row as ``example_from_row`` takes it."""
        given = {"text": self.text, "prompt": self.prompt, "response": self.response, "messages": list(self.messages)}
        return {name: value for name, value in given.items() if value}

    def plain_text(self) -> str:
        """All that a person wrote in the row, a line a part: what a tokenizer is trained on."""
        parts = [self.text, self.prompt, self.response, *(message["content"] for message in self.messages)]
        return "\n".join(part for part in parts if part)


def is_usable(columns: frozenset[str]) -> bool:
    """Whether a table with these columns can hold examples at all."""
    return bool(columns & {"text", "messages"}) or {"prompt", "response"} <= columns


def example_from_row(row: Mapping[str, object]) -> Example:
    """Read one row: ``messages`` first, then ``prompt`` with ``response``, then ``text``; null is absent.

    Raises ``BadRowError`` for a row with none of them, a value of the wrong type, blank text, or broken
    Unicode.
    """
    given = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    if "messages" in given:
        return Example(messages=_messages(given["messages"]))
    if "prompt" in given and "response" in given:
        return Example(prompt=_filled("prompt", given["prompt"]), response=_filled("response", given["response"]))
    if "text" in given:
        return Example(text=_filled("text", given["text"]))
    raise BadRowError("has neither text, nor prompt with response, nor messages")


def _filled(name: str, value: object) -> str:
    text = _string(name, value)
    if not text.strip():
        raise BadRowError(f"has an empty {name}")
    return text


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"has a {name} of type {type(value).__name__} where a string must be")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may escape half of a surrogate pair; no tokenizer takes it
        raise BadRowError(f"has a {name} that is not valid Unicode") from None
    return value


def _messages(value: object) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise BadRowError("has messages that are not a non-empty list")
    messages = tuple(_message(item) for item in value)
    if not any(message["content"].strip() for message in messages):
        raise BadRowError("has messages without content")
    return messages


def _message(item: object) -> dict[str, str]:
    if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
        raise BadRowError("has a message that is not an object")
    # Parquet fills the fields that a message lacks with nulls.
    message = {key: _string("message field", value) for key, value in item.items() if value is not None}
    if "content" not in message or not message.get("role"):
        raise BadRowError("has a message without role or content")
    return message
