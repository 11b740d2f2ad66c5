"""A data file of rows, whatever its format: where each row is, and how to read it alone.

A format does two things. ``scan`` walks the file once, in bounded memory, and says where every row is;
``read`` fetches one row from its place later. Files are opened in binary and closed again at each read:
places are byte offsets, which text mode cannot give, and nothing is held open or shared between threads. A
file that changed since it was scanned is refused, since its places would point into the wrong rows. Errors
never quote a row.

A place is two integers: (byte offset, byte length), or for Parquet (row group, row within it).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from splitfl.data.examples import COLUMNS, BadRowError
from splitfl.errors import DataError

MAX_ROW_BYTES = 64 << 20
"""A longer row is a bad row: this keeps a file without line breaks, or with an open quote, out of memory."""

_BOM = b"\xef\xbb\xbf"
TOO_LONG = f"is longer than {MAX_ROW_BYTES >> 20} MiB"
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


class Line(NamedTuple):
    """A line, or a paragraph, of a file. ``raw`` is None when it is longer than ``MAX_ROW_BYTES``."""

    place: tuple[int, int]
    raw: bytes | None


def lines_of(handle: BinaryIO) -> Iterator[Line]:
    """Lines with their line ends, a byte order mark passed over. Never more than 2 ``MAX_ROW_BYTES`` are held."""
    offset = len(_BOM) if handle.read(len(_BOM)) == _BOM else 0
    handle.seek(offset)
    while raw := handle.readline(MAX_ROW_BYTES):
        length, rest = len(raw), raw
        while not rest.endswith(b"\n") and (rest := handle.readline(MAX_ROW_BYTES)):
            length += len(rest)
        yield Line((offset, length), raw if length == len(raw) else None)
        offset += length


def scanned(place: tuple[int, int], name: str, raw: T | None, parse: Callable[[T], RawRow]) -> Scanned:
    if raw is None:
        return Scanned(place, name, {}, TOO_LONG)
    try:
        return Scanned(place, name, parse(raw))
    except BadRowError as error:
        return Scanned(place, name, {}, error.message)


def decoded(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise BadRowError(NOT_UTF8) from None


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
