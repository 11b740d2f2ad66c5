"""What clients may fetch, by the SHA-256 of its bytes: byte ranges of files, and small things in memory.

Nothing is copied: a tensor of the base checkpoint is served from its place in the safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from splitfl.errors import RefusedError
from splitfl.files import sha256_of
from splitfl.split.checkpoint import TensorEntry

Listed = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Range:
    """``nbytes`` from ``offset`` in ``path``."""

    path: Path
    offset: int
    nbytes: int


class Blobs:
    """Content-addressed bytes: the base model's, offered for good, and those of each durable round on disk."""

    def __init__(self) -> None:
        self._base: dict[str, Range | bytes] = {}
        self._rounds: dict[Path, dict[str, Range | bytes]] = {}  # by the round's folder, oldest first

    def add_bytes(self, data: bytes) -> str:
        """Offer ``data`` for good; returns its hash."""
        digest = sha256_of(data)
        self._base[digest] = data
        return digest

    def add_tensors(self, entries: Iterable[tuple[str, TensorEntry]]) -> Listed:
        """Offer tensors for good, under their names; returns their list."""
        ranges, listed = ranges_of(entries)
        self._base |= ranges
        return listed

    def add_round(self, folder: Path, entries: Iterable[tuple[str, TensorEntry]]) -> str:
        """Offer a round's tensors until its folder is deleted; returns the hash of their list."""
        ranges, listed = ranges_of(entries)
        data = tensor_list(listed)
        digest = sha256_of(data)
        self._rounds[folder] = {**ranges, digest: data}
        return digest

    def forget_round(self, folder: Path) -> None:
        """Stop offering what lay in a folder that is deleted; equal bytes elsewhere stay."""
        self._rounds.pop(folder, None)

    def read(self, digest: str, offset: int, limit: int) -> tuple[bytes, int]:
        """Up to ``limit`` bytes of a blob from ``offset``, and the blob's length. Raises RefusedError."""
        places = [self._base, *reversed(self._rounds.values())]
        blob = next((place[digest] for place in places if digest in place), None)
        if blob is None:
            raise RefusedError(f"no blob {digest[:12]}", "Ask for the newest list of tensors.", code="not_found")
        if isinstance(blob, bytes):
            return blob[offset : offset + limit], len(blob)
        wanted = max(0, min(limit, blob.nbytes - offset))
        try:
            with blob.path.open("rb") as file:
                file.seek(blob.offset + offset)
                return file.read(wanted), blob.nbytes
        except OSError as error:
            raise RefusedError(f"blob {digest[:12]} is gone", "Ask for the newest list.", code="not_found") from error


def ranges_of(entries: Iterable[tuple[str, TensorEntry]]) -> tuple[dict[str, Range | bytes], Listed]:
    """Where each tensor lies, by hash; and name -> hash, dtype, shape and size, for a list of tensors."""
    ranges: dict[str, Range | bytes] = {}
    listed: Listed = {}
    for name, entry in entries:
        digest = entry.sha256()
        ranges[digest] = Range(entry.path, entry.offset, entry.nbytes)
        listed[name] = {"sha256": digest, "dtype": entry.dtype, "shape": list(entry.shape), "nbytes": entry.nbytes}
    return ranges, listed


def tensor_list(listed: Listed) -> bytes:
    """A list of tensors as canonical JSON bytes."""
    return json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
