"""What the server hands out, fetched by hash: config, tokenizer, the tensors of the ends, merged weights.

Blobs are checked against their SHA-256, kept in a cache that outlives the federation, and fetched on from where an
interrupted download ended.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from client_model.asking import Asker
from client_model.offers import MAX_LIST_BYTES, OfferedTensor, read_manifest, read_weights
from splitfl.cut import Cut
from splitfl.errors import CheckpointError, ProtocolError, StorageError
from splitfl.files import appending_alone, storage_errors, sync, write_file
from splitfl.split.checkpoint import DTYPES, CheckpointFolder, read_config
from splitfl.split.shares import ends_names
from splitfl.wire.messages import Answer, Chunk, Fetch

PIECE_BYTES = 1 << 20
PIECES_IN_FLIGHT = 8


class Assets:
    """Blobs by hash, in ``cache``; small files of the model in ``folder`` under their names."""

    def __init__(self, link: Asker, cache: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.link = link
        self.cache = cache
        self.folder = folder
        self.say = say
        self.tensors: dict[str, OfferedTensor] = {}
        self._verified: set[str] = set()  # blobs of the cache whose hash this process has seen to be right

    def open(self, manifest: str) -> None:
        """Fetch the list of assets, and the config and tokenizer it names. Raises ProtocolError."""
        listed = read_manifest(self._bytes(manifest, None))
        self.tensors = listed.tensors
        for name, file in listed.files.items():
            write_file(self.folder / name, self._bytes(file.sha256, file.nbytes))

    def blob(self, item: OfferedTensor) -> Path:
        """The file that holds a tensor, fetched if need be. Raises ProtocolError when its hash is wrong."""
        digest = item.sha256
        path, part = self.cache / digest, self.cache / f"{digest}.part"
        with storage_errors(path):
            if path.exists() and digest not in self._verified and file_sha256(path) != digest:
                path.unlink()  # damaged on disk
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with appending_alone(part) as file:  # other clients on this machine may want the same blob
                    if path.exists():
                        part.unlink()
                    else:
                        self._download(digest, file, part, item.nbytes)
                        part.replace(path)
        self._verified.add(digest)
        return path

    def _download(self, digest: str, file: BinaryIO, part: Path, total: int) -> None:
        for chunk in self._chunks(digest, file.tell(), total):
            file.write(chunk.data.data)
        file.flush()
        sync(part)
        if file_sha256(part) != digest:
            part.unlink()
            raise ProtocolError(
                f"blob {digest[:12]} does not have the announced hash", "Join again; if it recurs, tell the operator."
            )

    def _chunks(self, digest: str, offset: int, total: int | None) -> Iterable[Chunk]:
        """Ask for a blob piece by piece, several at once; without ``total`` the first answer tells it, within reason.

        Raises ProtocolError for a piece that was not asked for, so that no server decides how much comes.
        """
        flying: deque[tuple[int, Future[Answer]]] = deque()
        position = offset
        while total is None or position < total or flying:
            while len(flying) < PIECES_IN_FLIGHT and (position < total if total is not None else not flying):
                flying.append((position, self.link.request(Fetch(0, 0, digest, position, PIECE_BYTES))))
                position += PIECE_BYTES
            if not flying:
                return
            start, reply = flying.popleft()
            chunk = reply.result()
            if not isinstance(chunk, Chunk):
                raise ProtocolError(f"{type(chunk).__name__} instead of a piece of a blob")
            if total is None:
                total = min(chunk.total, MAX_LIST_BYTES)
            check_piece(chunk, digest, start, total)
            yield chunk

    def fetch_tensors(self, names: Iterable[str]) -> None:
        """Fetch those tensors of the base model that are not in the cache yet."""
        wanted = [self._offered(name) for name in names]
        missing = [item for item in wanted if not (self.cache / item.sha256).exists()]
        size = sum(item.nbytes for item in missing)
        if missing:
            self.say(f"fetching {len(missing)} tensors of the model, {size / 1e6:.1f} MB")
            require_space(self.cache, size)
        for item in missing:
            self.blob(item)

    def _offered(self, name: str) -> OfferedTensor:
        item = self.tensors.get(name)
        if item is None:
            raise ProtocolError(f"the server does not offer tensor {name!r}", "Choose another --plan.")
        return item

    def read(self, name: str) -> Tensor:
        """One tensor of the base model in its own dtype. Raises ProtocolError when the server does not offer it."""
        item = self._offered(name)
        return tensor_from(bytearray(self.blob(item).read_bytes()), item)

    def same_as_local(self, local: CheckpointFolder, cut: Cut) -> CheckpointFolder:
        """A local checkpoint, once its tensors are known to be the server's. Raises CheckpointError."""
        for name in ends_names(local.config, cut):
            offered = self.tensors.get(name)
            if offered is None or name not in local.entries or local.entries[name].sha256() != offered.sha256:
                raise CheckpointError(
                    f"tensor {name!r} in {local.folder} is not the one that the server's model has",
                    "Leave out --model to fetch the ends from the server, or name the folder that it serves.",
                )
        return local

    def weights(self, digest: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Merged tensors of the list ``digest``, those among ``names`` that it has; not kept in the cache."""
        listed = read_weights(self._bytes(digest, None))
        return {name: self._merged(listed[name]) for name in names if name in listed}

    def _merged(self, item: OfferedTensor) -> Tensor:
        return tensor_from(bytearray(self._bytes(item.sha256, item.nbytes)), item)

    def _bytes(self, digest: str, total: int | None) -> bytes:
        """A blob in memory; one of unknown length is a list, and no list is longer than MAX_LIST_BYTES."""
        data = b"".join(bytes(chunk.data.data) for chunk in self._chunks(digest, 0, total))
        if hashlib.sha256(data).hexdigest() != digest:
            raise ProtocolError(f"blob {digest[:12]} does not have the announced hash", "Join again.")
        return data


def check_piece(chunk: Chunk, digest: str, offset: int, total: int) -> None:
    """Raise ProtocolError unless the piece is the one that was asked for."""
    wanted = max(0, min(PIECE_BYTES, total - offset))
    honest = (digest, offset, total, "u8", (wanted,))
    if (chunk.sha256, chunk.offset, chunk.total, chunk.data.dtype, chunk.data.shape) != honest:
        raise ProtocolError(f"a piece of blob {digest[:12]} is not the one asked for", "Do not trust this server.")


class RemoteSource:
    """The base model as the server hands it out: reads tensors from fetched blobs."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.config: PreTrainedConfig = read_config(assets.folder)

    def has(self, name: str) -> bool:
        return name in self.assets.tensors

    def read(self, name: str) -> Tensor:
        """One tensor in the checkpoint's dtype. Raises ProtocolError when the server does not offer it."""
        return self.assets.read(name)


def tensor_from(data: bytearray, item: OfferedTensor) -> Tensor:
    """Bytes of a safetensors tensor -> the tensor; the offer has been checked to fit them."""
    if not data:
        return torch.zeros(item.shape, dtype=DTYPES[item.dtype])
    return torch.frombuffer(data, dtype=DTYPES[item.dtype]).reshape(item.shape)


def require_space(folder: Path, nbytes: int) -> None:
    """Raise StorageError when the disk has less room than a download needs."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise StorageError(
            f"the model's parts take {nbytes / 1e6:.0f} MB, and {folder} has {free / 1e6:.0f} MB free",
            "Free some space, or name another --cache.",
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
