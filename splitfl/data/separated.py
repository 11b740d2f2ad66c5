"""Comma-separated files (.csv): quoted fields may hold line breaks, so a row may be several lines."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from splitfl.data.examples import BadRowError, is_usable
from splitfl.data.rowfile import (
    MAX_ROW_BYTES,
    NOT_UTF8,
    SAVE_AS_UTF8,
    TOO_LONG,
    RawRow,
    RowFile,
    Scanned,
    columns_shown,
    known_column,
    lines_of,
)
from splitfl.errors import DataError


class CommaSeparated(RowFile):
    """A header, then rows as in RFC 4180: quoted fields may hold line breaks. ``;`` and tab work as well.

    Raises ``DataError`` when the header names no usable column.
    """

    def __init__(self, path: Path, extra: str = "") -> None:
        super().__init__(path, extra)
        # The standard library's limit of 128 KiB a field is process-wide; long notes go over it.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
        self._delimiter, self.header = self._find_header()

    def scan(self) -> Iterator[Scanned]:
        with self._open() as handle:
            lines = _CsvLines(handle)
            next(self._rows(lines))
            yield from self._rows(lines)

    def read(self, first: int, second: int) -> RawRow:
        text = self._slice(first, second).decode()
        return self._named(next(csv.reader(io.StringIO(text, newline=""), **self._dialect())))

    def _dialect(self) -> dict[str, Any]:
        return {"delimiter": self._delimiter, "strict": True}

    def _rows(self, lines: _CsvLines) -> Iterator[Scanned]:
        reader = csv.reader(lines, **self._dialect())
        while True:
            lines.start_row()
            values: RawRow = {}
            fault, lost = "", 1
            try:
                fields = next(reader)
                values = self._named(fields)
            except StopIteration:
                return
            except csv.Error as error:
                fault = lines.fault or f"is not valid CSV: {str(error).split(' - ')[0]}"
                fields, lost = [""], lines.in_row
            except BadRowError as error:
                fault = error.message
            if fields:  # a blank line is no row
                yield Scanned(lines.place, f"line {lines.first_line}", values, lines.fault or fault, lost)

    def _find_header(self) -> tuple[str, list[str]]:
        header: list[str] = []
        for delimiter in (",", ";", "\t"):
            columns = self._read_header(delimiter)
            header = max(header, columns, key=len)  # the delimiter that parts most, for the message
            if is_usable(frozenset(columns) - {"messages"}):
                return delimiter, columns
        raise DataError(
            f"{self.path} has no text column, only {columns_shown(header)}",
            "Name a column text, or two columns prompt and response, in the first line",
        )

    def _read_header(self, delimiter: str) -> list[str]:
        with self._open() as handle:
            lines = _CsvLines(handle)
            try:
                names = next(filter(None, csv.reader(lines, delimiter=delimiter, strict=True)), [])
            except csv.Error:
                names = []
        if lines.fault == NOT_UTF8:
            raise DataError(f"{self.path} {NOT_UTF8} in its first line", SAVE_AS_UTF8)
        return [known_column(name.strip()) for name in names]

    def _named(self, fields: Sequence[str]) -> RawRow:
        if len(fields) > len(self.header):
            # Most often a comma in text without quotes: taking the first part would train on half a sentence.
            raise BadRowError(f"has {len(fields)} fields where the header has {len(self.header)}")
        # An empty cell is an absent one; a CSV cannot say which was meant. Its messages column is not read.
        return {
            name: field
            for name, field in zip(self.header, fields, strict=False)
            if field and name in self.columns and name != "messages"
        }


class _CsvLines:
    """Feeds lines to ``csv.reader``, which asks for none before it needs it, and notes which a row took."""

    def __init__(self, handle: BinaryIO) -> None:
        self._lines = lines_of(handle)
        self._line = 0
        self._start = self._end = 0
        self.fault = ""
        self.first_line = 1

    @property
    def place(self) -> tuple[int, int]:
        return self._start, self._end - self._start

    @property
    def in_row(self) -> int:
        return self._line - self.first_line + 1

    def start_row(self) -> None:
        self.fault = ""
        self.first_line = self._line + 1

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        (offset, length), raw = next(self._lines)
        self._line += 1
        self._start = offset if self._line == self.first_line else self._start
        self._end = offset + length
        if raw is None or self._end - self._start > MAX_ROW_BYTES:
            self.fault = TOO_LONG
            raise csv.Error(TOO_LONG)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fault = NOT_UTF8  # the row is bad, yet its quotes still tell where it ends
            return raw.decode(errors="replace")
