"""Parquet files, through pyarrow, a row group at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from splitfl.data.examples import BadRowError, is_usable
from splitfl.data.rowfile import NOT_UTF8, RawRow, RowFile, Scanned, columns_shown, scanned
from splitfl.errors import DataError

MAX_ROW_GROUP_BYTES = 1 << 30
"""Parquet is read a row group at a time; a larger one (uncompressed bytes of the columns read) is refused."""

_CACHED_ROW_GROUPS = 2
_PARQUET_BATCH_ROWS = 256


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
                        yield scanned((group, row), f"row {number}", (batch, index), _arrow_row)
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


def _arrow_row(place: tuple[Any, int]) -> RawRow:
    table, index = place
    try:
        row: RawRow = table.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError:
        raise BadRowError(NOT_UTF8) from None
    return row


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
