"""The file formats: where each row of a .jsonl, .csv, .txt or .parquet file is, and how to read it alone.

Each format does two things. ``scan`` walks the file once, in bounded memory, and says where every row is;
``read`` fetches one row from its place later. Files are opened in binary and closed again at each read:
places are byte offsets, which text mode cannot give, and nothing is held open or shared between threads. A
file that changed since it was scanned is refused, since its places would point into the wrong rows. Errors
never quote a row.

A place is two integers: (byte offset, byte length), or for Parquet (row group, row within it).
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from splitfl.data.examples import COLUMNS, BadRowError, is_usable
from splitfl.errors import DataError

MAX_ROW_BYTES = 64 << 20
"""A longer row is a bad row: this keeps a file without line breaks, or with an open quote, out of memory."""

MAX_ROW_GROUP_BYTES = 1 << 30
"""Parquet is read a row group at a time; a larger one (uncompressed bytes of the columns read) is refused."""

_CACHED_ROW_GROUPS = 2
_PARQUET_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"
_TOO_LONG = f"is longer than {MAX_ROW_BYTES >> 20} MiB"
NOT_UTF8 = "is not UTF-8"
SAVE_AS_UTF8 = "Save the file as UTF-8; for one out of Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"

_UTF_16 = (
    "is UTF-16, which Excel calls Unicode text",
    "Save the file as UTF-8, or: iconv -f UTF-16 -t UTF-8 OLD > NEW",
)
_ZIP = ("is a zip archive, as .xlsx and .docx files are", "Save the file as CSV UTF-8 with the program that wrote it")
_FOREIGN = {b"\xff\xfe": _UTF_16, b"\xfe\xff": _UTF_16, b"PK\x03\x04": _ZIP}
"""First bytes of what is none of our formats, whatever its name; what it is, and the remedy."""

RawRow = dict[str, object]
T = TypeVar("T")


class Scanned(NamedTuple):
    """One row met by ``scan``: its place, its name for a person (``line 7``), its values or what is wrong.

    ``lines`` is how many are lost with it where nobody can say where it ends: each may have been a row.
    """

    place: tuple[int, int]
    name: str
    values: RawRow
    fault: str = ""
    lines: int = 1


class RowFile(ABC):
    """One data file; its rows hold the columns of ``COLUMNS``, and ``extra`` where one is named. ``header`` are all
    columns of the file, empty in a format where each row names its own.

    Raises ``DataError`` when it cannot be opened, is empty, or is of another kind than its name says.
    """

    def __init__(self, path: Path, extra: str = "") -> None:
        self.path = path
        self.columns = (*COLUMNS, extra) if extra else COLUMNS
        self.header: Sequence[str] = ()
        self._stat = _stat(path)
        with self._open() as handle:
            start = handle.read(len(_BOM) + 1)
        if start in (b"", _BOM):
            raise DataError(f"{path} is empty", "Name a file with at least one row")
        for mark, (what, remedy) in _FOREIGN.items():
            if start.startswith(mark):
                raise DataError(f"{path} {what}", remedy)

    @property
    def size(self) -> int:
        """Bytes on disk when the file was first looked at."""
        return self._stat.st_size

    @property
    def mtime_ns(self) -> int:
        """Time of the last change when the file was first looked at, in nanoseconds."""
        return self._stat.st_mtime_ns

    @abstractmethod
    def scan(self) -> Iterator[Scanned]:
        """Walk the whole file in order. Bad rows are given too, with their ``fault``."""

    @abstractmethod
    def read(self, first: int, second: int) -> RawRow:
        """Read the row at a place that ``scan`` gave."""

    def _open(self) -> BinaryIO:
        now = _stat(self.path)
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise DataError(f"{self.path} changed while it was in use", "Leave it alone and start again")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def _slice(self, offset: int, length: int) -> bytes:
        with self._open() as handle:
            handle.seek(offset)
            return handle.read(length)


class JsonLines(RowFile):
    """One JSON object a line; blank lines are passed over."""

    def scan(self) -> Iterator[Scanned]:
        with self._open() as handle:
            for number, line in enumerate(_lines(handle), start=1):
                if line.raw is None or line.raw.strip():
                    yield _scanned(line.place, f"line {number}", line.raw, _json_row)

    def read(self, first: int, second: int) -> RawRow:
        return _json_row(self._slice(first, second))


class PlainText(RowFile):
    """Documents are paragraphs: what stands between blank lines. Line ends are given as ``\\n``."""

    def scan(self) -> Iterator[Scanned]:
        with self._open() as handle:
            for number, paragraph in _paragraphs(handle):
                yield _scanned(paragraph.place, f"line {number}", paragraph.raw, _text_row)

    def read(self, first: int, second: int) -> RawRow:
        return _text_row(self._slice(first, second))


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


class Parquet(RowFile):
    """A Parquet file, through pyarrow (``splitfl[parquet]``); the two row groups used last are kept.

    Raises ``DataError`` when pyarrow is missing, the file is not Parquet, no column is usable, or a row group
    is too large to read at once.
    """

    def __init__(self, path: Path, extra: str = "") -> None:
        super().__init__(path, extra)
        self._columns = self._find_columns()
        self._group = lru_cache(maxsize=_CACHED_ROW_GROUPS)(self._read_group)

    def scan(self) -> Iterator[Scanned]:
        number = 0
        with self._open() as handle, _parquet_file(self.path, handle) as file:
            for group in range(file.metadata.num_row_groups):
                row = 0
                for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group], columns=self._columns):
                    for index in range(batch.num_rows):
                        number += 1
                        yield _scanned((group, row), f"row {number}", (batch, index), _arrow_row)
                        row += 1

    def read(self, first: int, second: int) -> RawRow:
        return _arrow_row((self._group(first), second))

    def _read_group(self, group: int) -> Any:
        with self._open() as handle, _parquet_file(self.path, handle) as file:
            return file.read_row_group(group, columns=self._columns)

    def _find_columns(self) -> list[str]:
        with self._open() as handle, _parquet_file(self.path, handle) as file:
            names = list(file.schema_arrow.names)
            self.header = names
            columns = [name for name in self.columns if name in names]
            largest = max(_group_sizes(file.metadata, columns), default=0)
        if not is_usable(frozenset(columns)):
            raise DataError(
                f"{self.path} has no text column, only {columns_shown(names)}",
                "Name a column text, or two columns prompt and response, or one messages",
            )
        if largest > MAX_ROW_GROUP_BYTES:
            raise DataError(
                f"{self.path} has a row group of {largest >> 20} MiB, over the limit of"
                f" {MAX_ROW_GROUP_BYTES >> 20} MiB",
                "Write it again with a smaller row_group_size (10000 rows, say), or as .jsonl",
            )
        return columns


FORMATS: dict[str, type[RowFile]] = {
    ".jsonl": JsonLines,
    ".csv": CommaSeparated,
    ".parquet": Parquet,
    ".txt": PlainText,
}
"""File suffix, in lower case, to its format."""


class _Line(NamedTuple):
    """A line, or a paragraph, of a file. ``raw`` is None when it is longer than ``MAX_ROW_BYTES``."""

    place: tuple[int, int]
    raw: bytes | None


class _CsvLines:
    """Feeds lines to ``csv.reader``, which asks for none before it needs it, and notes which a row took."""

    def __init__(self, handle: BinaryIO) -> None:
        self._lines = _lines(handle)
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
            self.fault = _TOO_LONG
            raise csv.Error(_TOO_LONG)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fault = NOT_UTF8  # the row is bad, yet its quotes still tell where it ends
            return raw.decode(errors="replace")


def _lines(handle: BinaryIO) -> Iterator[_Line]:
    """Lines with their line ends, a byte order mark passed over. Never more than 2 ``MAX_ROW_BYTES`` are held."""
    offset = len(_BOM) if handle.read(len(_BOM)) == _BOM else 0
    handle.seek(offset)
    while raw := handle.readline(MAX_ROW_BYTES):
        length, rest = len(raw), raw
        while not rest.endswith(b"\n") and (rest := handle.readline(MAX_ROW_BYTES)):
            length += len(rest)
        yield _Line((offset, length), raw if length == len(raw) else None)
        offset += length


def _paragraphs(handle: BinaryIO) -> Iterator[tuple[int, _Line]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    first = start = length = 0
    parts: list[bytes] | None = []
    for number, ((offset, size), raw) in enumerate(_lines(handle), start=1):
        if raw is not None and not raw.strip():
            if length:
                yield first, _Line((start, length), None if parts is None else b"".join(parts))
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
        yield first, _Line((start, length), None if parts is None else b"".join(parts))


def _scanned(place: tuple[int, int], name: str, raw: T | None, parse: Callable[[T], RawRow]) -> Scanned:
    if raw is None:
        return Scanned(place, name, {}, _TOO_LONG)
    try:
        return Scanned(place, name, parse(raw))
    except BadRowError as error:
        return Scanned(place, name, {}, error.message)


def _json_row(raw: bytes) -> RawRow:
    try:
        row = json.loads(_decoded(raw))
    except json.JSONDecodeError as error:  # its str() is safe, yet its .doc is the row: do not chain it
        raise BadRowError(f"is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except (ValueError, RecursionError):
        raise BadRowError("is not JSON that can be read: a number too long, or too deep") from None
    if not isinstance(row, dict):
        raise BadRowError("is JSON, but not an object")
    return row


def _text_row(raw: bytes) -> RawRow:
    return {"text": _decoded(raw).replace("\r\n", "\n").rstrip("\n")}


def _arrow_row(place: tuple[Any, int]) -> RawRow:
    table, index = place
    try:
        row: RawRow = table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise BadRowError(NOT_UTF8) from None
    return row


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadRowError(NOT_UTF8) from None


@contextmanager
def _parquet_file(path: Path, handle: BinaryIO) -> Iterator[Any]:
    """An open ``pyarrow.parquet.ParquetFile``; pyarrow's own errors become ``DataError``."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow, which is missing", "pip install 'splitfl[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(handle) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read", "Write the file again") from error


def _group_sizes(metadata: Any, columns: Sequence[str]) -> Iterator[int]:
    """Uncompressed bytes of the named columns in each row group."""
    for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
        chunks = (group.column(index) for index in range(group.num_columns))
        yield sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)


def known_column(name: str) -> str:
    """A column's name as it is known here: ``Text`` is ``text``."""
    return name.lower() if name.lower() in COLUMNS else name


def columns_shown(names: Sequence[str]) -> str:
    """Column names for an error. A file without a header has its first row there: show plain words alone."""
    shown = [name for name in names if re.fullmatch(r"[A-Za-z]\w{0,31}", name)]
    hidden = len(names) - len(shown)
    return ", ".join(shown + ([f"{hidden} that look like data, not like names"] if hidden else [])) or "none"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions")
