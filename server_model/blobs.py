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


@dataclass(frozen=True)
class Range:
    """``nbytes`` from ``offset`` in ``path``."""

    path: Path
    offset: int
    nbytes: int


class Blobs:
    """Content-addressed bytes."""

    def __init__(self) -> None:
        self._blobs: dict[str, Range | bytes] = {}

    def add_bytes(self, data: bytes) -> str:
        """Offer ``data``; returns its hash."""
        digest = sha256_of(data)
        self._blobs[digest] = data
        return digest

    def add_tensors(self, entries: Iterable[tuple[str, TensorEntry]]) -> dict[str, dict[str, object]]:
        """Offer tensors under their names; returns name -> hash, dtype, shape and size, for a list of tensors."""
        listed: dict[str, dict[str, object]] = {}
        for name, entry in entries:
            digest = entry.sha256()
            self._blobs[digest] = Range(entry.path, entry.offset, entry.nbytes)
            listed[name] = {
                "sha256": digest,
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "nbytes": entry.nbytes,
            }
        return listed

    def read(self, digest: str, offset: int, limit: int) -> tuple[bytes, int]:
        """Up to ``limit`` bytes of a blob from ``offset``, and the blob's length. Raises RefusedError."""
        blob = self._blobs.get(digest)
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

    def forget_folder(self, folder: Path) -> None:
        """Stop offering what lay in a folder that is deleted."""
        gone = [key for key, blob in self._blobs.items() if isinstance(blob, Range) and folder in blob.path.parents]
        for key in gone:
            del self._blobs[key]


def tensor_list(listed: dict[str, dict[str, object]]) -> bytes:
    """A list of tensors as canonical JSON bytes."""
    return json.dumps(listed, sort_keys=True, separators=(",", ":")).encode()
