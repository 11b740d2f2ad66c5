"""Reading a hospital's data in place: a corpus is an index over the files, never a copy of them.

Opening makes one pass that checks every row and notes where it stands: 20 bytes of index a row, and no row is
kept. Later ``corpus[i]`` reads that row alone. So a 10 GB file never enters memory, and no second copy of the
text is written to a disk that nobody knew of. The formats are in ``formats.py`` and what
it names; what a row means is in ``examples.py``.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from splitfl.data.examples import BadRowError, Example, example_from_row
from splitfl.data.formats import FORMATS
from splitfl.data.rowfile import NOT_UTF8, SAVE_AS_UTF8, RowFile, Scanned, columns_shown
from splitfl.errors import ConfigError, DataError

IntArray = NDArray[np.int64]

FIRST_ROWS = 100
_FIX_OR_SKIP = "Correct the row, or pass --skip-bad to leave bad rows out and have them counted"
_CLOSE_QUOTE = "Close the quote or take it out; one within a text is written twice, in a text that stands in quotes"


class Corpus:
    """The usable rows of one or more files, by number, in file order. Made by ``open_corpus``.

    ``paths`` are the files read, ``skipped`` the bad rows left out (lines, where quotes do not pair), and
    ``fingerprint`` a SHA-256 (hex) over the files' names, sizes and times of change: it tells, without reading
    them, whether the data are still the same.
    """

    def __init__(self, root: Path, files: Sequence[RowFile], *, skip_bad: bool) -> None:
        self._files = tuple(files)
        self._file, self._first, self._second = array("i"), array("q"), array("q")
        self.paths = tuple(file.path for file in files)
        self.skipped = 0
        self.fingerprint = _fingerprint(root, files)
        for number, file in enumerate(self._files):
            self._index(number, file, skip_bad)
        if not len(self):
            raise no_rows(root, self.skipped)

    def _index(self, number: int, file: RowFile, skip_bad: bool) -> None:
        for scanned in file.scan():
            example, fault = _judge(scanned)
            if example is not None:
                self._file.append(number)
                self._first.append(scanned.place[0])
                self._second.append(scanned.place[1])
            elif skip_bad:
                self.skipped += scanned.lines
            else:
                raise bad_row(file.path, scanned, fault)

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, row: int) -> Example:
        """Read one row from disk. Raises ``IndexError``, or ``DataError`` if its file changed meanwhile."""
        return example_from_row(self._files[self._file[row]].read(self._first[row], self._second[row]))

    def __iter__(self) -> Iterator[Example]:
        """All rows in order, streamed: faster than one at a time by number."""
        for file in self._files:
            for _, example in _usable(file):
                yield example

    def place(self, row: int) -> str:
        """Where a row stands, for an error message: the file, and the byte offset or row group and row."""
        path, first, second = self.paths[self._file[row]], self._first[row], self._second[row]
        parquet = path.suffix.lower() == ".parquet"
        return f"{path}, row group {first} row {second}" if parquet else f"{path}, byte {first}"


def open_corpus(path: Path, *, skip_bad: bool = False) -> Corpus:
    """Index a .jsonl, .csv, .parquet or .txt file, or a folder of them (recursive, sorted, none hidden).

    Raises ``DataError`` for a path that is missing or holds no such file, an empty file, and a bad row:
    broken JSON or CSV, not UTF-8, without text, of the wrong type. With ``skip_bad`` bad rows are counted in
    ``Corpus.skipped`` instead; that no row is left still raises.
    """
    return Corpus(path, _open_files(path), skip_bad=skip_bad)


def check_beginning(path: Path, *, skip_bad: bool = False) -> None:
    """Raise the ``DataError`` of ``open_corpus`` for what shows without reading on: a file's kind, its header, and
    its first ``FIRST_ROWS`` rows.
    """
    seen, usable, all_seen = 0, 0, True
    for file in _open_files(path):
        first = list(islice(file.scan(), FIRST_ROWS))
        for scanned in first:
            example, fault = _judge(scanned)
            usable += example is not None
            if fault and not skip_bad:
                raise bad_row(file.path, scanned, fault)
        seen, all_seen = seen + len(first), all_seen and len(first) < FIRST_ROWS
    if all_seen and not usable:
        raise no_rows(path, seen)


def no_rows(path: Path, skipped: int) -> DataError:
    bad = f"; {skipped} bad rows were skipped" if skipped else ""
    return DataError(f"{path} holds no usable rows{bad}", "Give at least one row with text")


def read_groups(path: Path, column: str) -> list[str]:
    """What ``column`` says of each usable row: by number, as ``open_corpus`` counts them.

    Raises ``DataError`` as ``open_corpus`` does, and for a usable row that does not say it in a word or a number.
    """
    return [_group(file, scanned, column) for file in _open_files(path, column) for scanned, _ in _usable(file)]


def split_corpus(corpus: Corpus, held_out_fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Divide the rows into training and held-out: sorted row numbers, int64 (n_train,) and (n_held_out,).

    Each row is put on its side by a hash of its content and the seed, so the order of rows does not matter
    and equal rows fall on one side: nothing held out was trained on. The fraction is met in expectation.
    Where it is above 0 and a side would stay empty, the row with the extreme hash, with its equals, is moved
    there; a corpus of one distinct row trains on it. One streaming pass over the text, 8 bytes kept a row.

    Raises ``ConfigError`` for a fraction outside [0, 1).
    """
    if not 0 <= held_out_fraction < 1:
        raise ConfigError(f"held_out_fraction {held_out_fraction} is outside [0, 1)", "0.1 is a usual value")
    keys = np.fromiter((_split_key(example, seed) for example in corpus), np.uint64, len(corpus))
    held_out = keys < np.uint64(int(held_out_fraction * 2**64))
    distinct = keys.min() != keys.max()
    if held_out_fraction > 0 and not held_out.any() and distinct:
        held_out = keys == keys.min()
    elif held_out.all():
        held_out = (keys != keys.max()) & distinct
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _split_key(example: Example, seed: int) -> int:
    digest = hashlib.sha256(f"splitfl.split:{seed}:".encode() + example.content()).digest()
    return int.from_bytes(digest[:8], "big")


def bad_row(path: Path, scanned: Scanned, fault: str) -> DataError:
    """What is wrong with a row. Skipping is not offered where it would cost more than that row."""
    if scanned.lines > 1:
        swallowed = f"a quote that is not closed swallows {scanned.lines} lines from here on"
        return DataError(f"{path}, {scanned.name} {fault}; {swallowed}", _CLOSE_QUOTE)
    return DataError(f"{path}, {scanned.name} {fault}", SAVE_AS_UTF8 if fault == NOT_UTF8 else _FIX_OR_SKIP)


def _judge(scanned: Scanned) -> tuple[Example | None, str]:
    """The example, or None and what is wrong with the row."""
    if scanned.fault:
        return None, scanned.fault
    try:
        return example_from_row(scanned.values), ""
    except BadRowError as error:
        return None, error.message


def _group(file: RowFile, scanned: Scanned, column: str) -> str:
    value = scanned.values.get(column)
    if not isinstance(value, str | int | float) or str(value) == "":
        there = columns_shown(file.header or list(scanned.values))
        raise DataError(
            f"{file.path}, {scanned.name} does not say its {column!r}",
            f"Name a column that every row has a value in, its letters in the same case; there are {there}",
        )
    return str(value)


def _usable(file: RowFile) -> Iterator[tuple[Scanned, Example]]:
    for scanned in file.scan():
        example, _ = _judge(scanned)
        if example is not None:
            yield scanned, example


def _open_files(path: Path, extra: str = "") -> list[RowFile]:
    if not path.exists():
        raise DataError(f"there is no {path}", "Name a data file or folder that exists")
    return [FORMATS[file.suffix.lower()](file, extra) for file in _find_files(path)]


def _find_files(path: Path) -> list[Path]:
    suffixes = ", ".join(FORMATS)
    if not path.is_dir():
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"{path} is not of a known format", f"Known are {suffixes}, and folders of them")
        return [path]
    files = [file for file in path.rglob("*") if file.suffix.lower() in FORMATS and file.is_file()]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise DataError(f"{path} holds no data file", f"Put at least one file there that ends in {suffixes}")
    return sorted(files, key=lambda file: file.relative_to(path).as_posix())


def _fingerprint(root: Path, files: Sequence[RowFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        name = file.path.relative_to(root).as_posix() if root.is_dir() else file.path.name
        digest.update(f"{name}\0{file.size}\0{file.mtime_ns}\n".encode())
    return digest.hexdigest()
