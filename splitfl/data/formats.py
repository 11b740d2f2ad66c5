"""The file formats by their suffix, and those whose rows are lines or paragraphs: .jsonl and .txt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from splitfl.data.examples import BadRowError
from splitfl.data.parquet import Parquet
from splitfl.data.rowfile import MAX_ROW_BYTES, Line, RawRow, RowFile, Scanned, decoded, lines_of, scanned
from splitfl.data.separated import CommaSeparated


class JsonLines(RowFile):
    """One JSON object a line; blank lines are passed over."""

    def scan(self) -> Iterator[Scanned]:
        with self._open() as handle:
            for number, line in enumerate(lines_of(handle), start=1):
                if line.raw is None or line.raw.strip():
                    yield scanned(line.place, f"line {number}", line.raw, _json_row)

    def read(self, first: int, second: int) -> RawRow:
        return _json_row(self._slice(first, second))


class PlainText(RowFile):
    """Documents are paragraphs: what stands between blank lines. Line ends are given as ``\\n``."""

    def scan(self) -> Iterator[Scanned]:
        with self._open() as handle:
            for number, paragraph in _paragraphs(handle):
                yield scanned(paragraph.place, f"line {number}", paragraph.raw, _text_row)

    def read(self, first: int, second: int) -> RawRow:
        return _text_row(self._slice(first, second))


FORMATS: dict[str, type[RowFile]] = {
    ".jsonl": JsonLines,
    ".csv": CommaSeparated,
    ".parquet": Parquet,
    ".txt": PlainText,
}
"""File suffix, in lower case, to its format."""


def _paragraphs(handle: BinaryIO) -> Iterator[tuple[int, Line]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    first = start = length = 0
    parts: list[bytes] | None = []
    for number, ((offset, size), raw) in enumerate(lines_of(handle), start=1):
        if raw is not None and not raw.strip():
            if length:
                yield first, Line((start, length), None if parts is None else b"".join(parts))
            length, parts = 0, []
            continue
        if not length:
            first, start = number, offset
        length += size
        if raw is None or length > MAX_ROW_BYTES:
            parts = None
        if parts is not None and raw is not None:
            parts.append(raw)
    if length:
        yield first, Line((start, length), None if parts is None else b"".join(parts))


def _json_row(raw: bytes) -> RawRow:
    try:
        row = json.loads(decoded(raw))
    except json.JSONDecodeError as error:  # its str() is safe, yet its .doc is the row: do not chain it
        raise BadRowError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise BadRowError("is not JSON that can be read: a number too long, or too deep") from None
    if not isinstance(row, dict):
        raise BadRowError("is JSON, but not an object")
    return row


def _text_row(raw: bytes) -> RawRow:
    return {"text": decoded(raw).replace("\r\n", "\n").rstrip("\n")}
