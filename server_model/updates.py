"""Clients' weights on their way in: uploaded in pieces, and checked against what this client should send.

Nothing of an upload is trusted: its hash, its size, each tensor's name, shape and dtype, and that its numbers are
finite.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfl.errors import CheckpointError, RefusedError, StorageError
from splitfl.split.checkpoint import file_entries, hash_range
from splitfl.split.shares import Shapes
from splitfl.wire.messages import Update, Upload

HEADER_ALLOWANCE = 1 << 20  # bytes of safetensors header beside the tensors


#: (name, shape) -> a shared tensor's value at some moment
Weights = Callable[[str, torch.Size], Tensor]


@dataclass(frozen=True)
class ClientUpdate:
    """A checked update: the file it lies in (None when nothing is shared) and its label tokens.

    ``start`` is for late ones alone: the weights that its client had trained from.
    """

    client: str
    tokens: int
    path: Path | None
    discount: float = 1.0
    start: Weights | None = None


class Inbox:
    """Uploads of all clients: one file each while it comes, another once it is checked, which nobody writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writing = threading.Lock()  # pieces come on several threads

    def coming(self, client: str) -> Path:
        return self.folder / f"{client}.part"

    def receive(self, client: str, upload: Upload, limit: int) -> int:
        """Write a piece where it belongs; returns how many bytes are there.

        Raises RefusedError for more than ``limit`` bytes or a gap, StorageError when the disk is full.
        """
        if upload.total > limit or upload.offset + upload.data.nbytes > upload.total:
            raise RefusedError(
                f"an upload of {upload.total} bytes where {limit} are expected",
                "Update the client: it sends weights that are not shared.",
                code="over_limit",
            )
        with self._writing:
            return self._write(self.coming(client), upload)

    def _write(self, path: Path, upload: Upload) -> int:
        there = path.stat().st_size if path.exists() and upload.offset else 0
        if upload.offset > there:
            raise RefusedError(f"a gap in an upload at byte {there}", "Send it again from the start.", code="not_found")
        try:
            with path.open("r+b" if upload.offset else "wb") as file:
                file.seek(upload.offset)
                file.write(upload.data.data)
                file.truncate()
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "Free some space on the server.") from error
        return upload.offset + upload.data.nbytes

    def check(self, client: str, update: Update, expected: Shapes) -> ClientUpdate:
        """Check a finished upload. Raises RefusedError that names what is wrong."""
        if not expected:
            return ClientUpdate(client, update.tokens, None)
        path = self.folder / f"{client}.{secrets.token_hex(8)}.safetensors"
        with self._writing:  # from here on no piece that is still on its way can change the file
            if self.coming(client).exists():
                self.coming(client).replace(path)
        try:
            if not path.exists() or file_hash(path) != update.sha256:
                raise RefusedError("the uploaded weights are not the announced ones", "Upload again.", code="not_found")
            check_tensors(path, expected)
        except RefusedError:
            path.unlink(missing_ok=True)
            raise
        return ClientUpdate(client, update.tokens, path)

    def forget_coming(self, client: str) -> None:
        """Delete what a client that is gone had begun to upload."""
        with self._writing:
            self.coming(client).unlink(missing_ok=True)

    def forget(self, update: ClientUpdate) -> None:
        """Delete a checked upload."""
        if update.path is not None:
            update.path.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    return hash_range(path, 0, path.stat().st_size)


def check_tensors(path: Path, expected: Shapes) -> None:
    """Raise RefusedError unless the file holds exactly the tensors of ``expected``, in fp32 and finite."""
    try:
        found = {entry.name: (entry.dtype, entry.shape) for entry in file_entries(path, HEADER_ALLOWANCE)}
    except CheckpointError as error:
        raise RefusedError(
            "the uploaded weights are not safetensors", "Update the client.", code="bad_tensor"
        ) from error
    wanted = {name: ("F32", shape) for name, shape in expected.items()}
    if found != wanted:
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise RefusedError(
            f"uploaded tensor {odd[0]!r} is {found.get(odd[0])}, expected {wanted.get(odd[0])}",
            "Client and server must train the same model with the same settings.",
            code="bad_tensor",
        )
    try:
        with safe_open(path, framework="pt") as file:
            bad = next((name for name in expected if not torch.isfinite(file.get_tensor(name)).all()), None)
    except SafetensorError as error:
        raise RefusedError(
            "the uploaded weights are not safetensors", "Update the client.", code="bad_tensor"
        ) from error
    if bad is not None:
        raise RefusedError(
            f"uploaded tensor {bad!r} holds NaN or infinity", "Lower the learning rate.", code="bad_tensor"
        )
