"""Text that every Python has, for benchmarks that need real English: docstrings as public text, a manual as private.

Public are the docstrings of the standard library and of the packages installed beside it, read from their sources and
never imported. Private are Python's own language topics (``pydoc_data.topics``, what ``help("for")`` prints): the same
world, another text. Topics repeat each other word for word, so training and public records that share a run of tokens
with a held-out record are left out.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from splitfl.data.records import IGNORE, IntArray, Record

SHORTEST = 200  # characters of a docstring that is worth reading
RUN = 16  # tokens in a row that may not stand on both sides
BLOCK, PERIOD = 4, 13  # four records in a row of every 52 are held out


@dataclass(frozen=True)
class Texts:
    """Records of equal length: public ones, and private ones to train on and to measure with."""

    public: Sequence[Record]
    train: Sequence[Record]
    held_out: Sequence[Record]


def python_texts(tokenizer: Any, *, length: int, public_records: int, seed: int = 0) -> Texts:
    """Public docstrings and private topics as records of ``length`` tokens; at most so many public ones."""
    private = records_of(topics.values(), tokenizer, length)
    held_out = [record for index, record in enumerate(private) if index // BLOCK % PERIOD == 0]
    seen = runs(held_out)
    train = [record for index, record in enumerate(private) if index // BLOCK % PERIOD and not overlaps(record, seen)]
    seen |= runs(train)
    public: list[Record] = []
    texts = docstrings(seed)
    while len(public) < public_records and (text := next(texts, None)) is not None:
        public += [record for record in records_of([text], tokenizer, length) if not overlaps(record, seen)]
    return Texts(public[:public_records], train, held_out)


def docstrings(seed: int, *, files_at_once: int = 20) -> Iterator[str]:
    """Docstrings of installed Python sources, those of several files at a time as one text, in a seeded order."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    paths = sorted({path for root in roots for path in root.rglob("*.py") if is_public(path.relative_to(root))})
    random.Random(seed).shuffle(paths)
    for start in range(0, len(paths), files_at_once):
        found = [text for path in paths[start : start + files_at_once] for text in file_docstrings(path)]
        yield "\n\n".join(dict.fromkeys(found))


def is_public(path: Path) -> bool:
    """Whether a source below its root may be read: not the private text, and no tests."""
    return not {"pydoc_data", "test", "tests"} & set(path.parts)


def file_docstrings(path: Path) -> list[str]:
    """The longer docstrings of one file; none where it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old sources with doubtful escapes
            tree = ast.parse(path.read_text(errors="ignore"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
    return [text for text in found if text and len(text) > SHORTEST]


def records_of(texts: Iterable[str], tokenizer: Any, length: int) -> list[Record]:
    """Texts laid end to end and cut into records of ``length`` tokens; the rest at the end is dropped."""
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
    rows = np.array(ids[: len(ids) // length * length], np.int64).reshape(-1, length)
    return [record(row) for row in rows]


def record(row: IntArray) -> Record:
    return Record(row, np.append(row[1:], IGNORE))


def runs(records: Iterable[Record]) -> set[bytes]:
    """Every run of ``RUN`` tokens, as bytes."""
    return {piece for item in records for piece in pieces(item)}


def pieces(item: Record) -> Iterator[bytes]:
    data = item.input_ids.astype("<u4").tobytes()
    return (data[4 * start : 4 * (start + RUN)] for start in range(len(item) - RUN + 1))


def overlaps(item: Record, seen: set[bytes]) -> bool:
    return any(piece in seen for piece in pieces(item))
