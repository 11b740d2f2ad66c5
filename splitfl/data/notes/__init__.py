"""Synthetic clinical notes in English, drawn from a seed: text for demos and tests that belongs to nobody.

``general`` stands for public notes on which a base model is trained; ``cardiology``, ``paediatrics`` and ``oncology``
are three hospitals' private ones. They share format, headings and general language, and differ in conditions, drugs and
findings: data that is not identically distributed, with something to gain from training together. Within a note, the
diagnosis decides the rest, and numbers agree with words (doses with weights, *tachycardic* with the heart rate).

Not clinical advice, not a model of real patients: everything is made up by the tables of this package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from splitfl.data.notes.generator import CONDITIONS, draw_note
from splitfl.errors import ConfigError, StorageError

__all__ = ["SPECIALTIES", "generate_notes", "write_notes"]

SPECIALTIES: tuple[str, ...] = tuple(CONDITIONS)


def generate_notes(specialty: str, count: int, seed: int) -> Iterator[str]:
    """Yield ``count`` distinct notes of about 80 to 220 words.

    The same ``(specialty, seed)`` gives the same notes, and a smaller ``count`` gives the first of them; any other pair
    gives an independent stream. The global generators are neither read nor moved.

    Raises ``ConfigError`` at the call, before the first note is asked for: ``specialty`` is not one of ``SPECIALTIES``,
    or ``count`` is negative.
    """
    if specialty not in SPECIALTIES:
        raise ConfigError(f"unknown specialty {specialty!r}", f"Choose one of: {', '.join(SPECIALTIES)}")
    if count < 0:
        raise ConfigError(f"count is {count}", "Ask for zero notes or more")
    return _distinct_notes(specialty, count, _stream(specialty, seed))


def write_notes(path: Path, specialty: str, count: int, seed: int) -> None:
    """Write ``generate_notes(specialty, count, seed)`` to ``path`` as JSON lines ``{"text": ...}``.

    The file appears whole or not at all; one that was there is replaced. Missing folders are made.

    Raises ``ConfigError`` as ``generate_notes`` does, ``StorageError`` if the file cannot be written.
    """
    notes = generate_notes(specialty, count, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_with_rows(path, notes)
    except OSError as error:
        raise StorageError(f"cannot write notes to {path}: {error}", "Check the folder and its free space") from error


def _stream(specialty: str, seed: int) -> random.Random:
    """A generator of its own for each (specialty, seed); ``v1`` changes when the tables' meaning does."""
    digest = hashlib.sha256(f"splitfl.data.notes v1 {specialty} {seed}".encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _distinct_notes(specialty: str, count: int, rng: random.Random) -> Iterator[str]:
    seen: set[bytes] = set()
    while len(seen) < count:
        note = draw_note(rng, specialty)
        key = hashlib.blake2b(note.encode(), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield note


def _replace_with_rows(path: Path, notes: Iterator[str]) -> None:
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": note}, ensure_ascii=False) + "\n" for note in notes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
