"""What the server hands out, fetched by hash: config, tokenizer, the tensors of the ends, merged weights.

Blobs are checked against their SHA-256, kept in a cache that outlives the federation, and fetched on from where an
interrupted download ended.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from splitfl.cut import Cut
from splitfl.errors import CheckpointError, ProtocolError
from splitfl.files import appending_alone, storage_errors, sync, write_file
from splitfl.split.checkpoint import DTYPES, CheckpointFolder, read_config
from splitfl.split.shares import ends_names
from splitfl.wire.messages import Answer, Chunk, Fetch, Request

PIECE_BYTES = 1 << 20
PIECES_IN_FLIGHT = 8


class Asker(Protocol):
    """The part of a link that fetching needs."""

    def request(self, message: Request) -> Future[Answer]: ...


class Assets:
    """Blobs by hash, in ``cache``; small files of the model in ``folder`` under their names."""

    def __init__(self, link: Asker, cache: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.link = link
        self.cache = cache
        self.folder = folder
        self.say = say
        self.tensors: dict[str, dict[str, Any]] = {}

    def open(self, manifest: str) -> None:
        """Fetch the list of assets, and the config and tokenizer it names."""
        listed = json.loads(self.blob(manifest).read_bytes())
        self.tensors = listed["tensors"]
        for name, file in listed["files"].items():
            if Path(name).name != name or name.startswith("."):
                raise ProtocolError(f"the server offers a file named {name!r}", "Do not trust this server.")
            write_file(self.folder / name, self.blob(file["sha256"]).read_bytes())

    def blob(self, digest: str, total: int | None = None) -> Path:
        """The file that holds a blob, fetched if need be. Raises ProtocolError when its hash is wrong."""
        path, part = self.cache / digest, self.cache / f"{digest}.part"
        if not path.exists():
            with storage_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with appending_alone(part) as file:  # other clients on this machine may want the same blob
                    if path.exists():
                        part.unlink()
                    else:
                        self._download(digest, file, part, total)
                        part.replace(path)
        return path

    def _download(self, digest: str, file: BinaryIO, part: Path, total: int | None) -> None:
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
        """Ask for a blob piece by piece, several at once; without ``total`` the first answer tells it."""
        flying: deque[Future[Answer]] = deque()
        position = offset
        while total is None or position < total or flying:
            while len(flying) < PIECES_IN_FLIGHT and (position < total if total is not None else not flying):
                flying.append(self.link.request(Fetch(0, 0, digest, position, PIECE_BYTES)))
                position += PIECE_BYTES
            if not flying:
                return
            chunk = flying.popleft().result()
            if not isinstance(chunk, Chunk):
                raise ProtocolError(f"{type(chunk).__name__} instead of a piece of a blob")
            total = chunk.total
            yield chunk

    def fetch_tensors(self, names: Iterable[str]) -> None:
        """Fetch those tensors of the base model that are not in the cache yet."""
        wanted = [self.tensors[name] for name in names]
        missing = [item for item in wanted if not (self.cache / item["sha256"]).exists()]
        size = sum(item["nbytes"] for item in missing)
        if missing:
            self.say(f"fetching {len(missing)} tensors of the model, {size / 1e6:.1f} MB")
        for item in missing:
            self.blob(item["sha256"], item["nbytes"])

    def same_as_local(self, local: CheckpointFolder, cut: Cut) -> CheckpointFolder:
        """A local checkpoint, once its tensors are known to be the server's. Raises CheckpointError."""
        for name in ends_names(local.config, cut):
            offered = self.tensors.get(name)
            if offered is None or name not in local.entries or local.entries[name].sha256() != offered["sha256"]:
                raise CheckpointError(
                    f"tensor {name!r} in {local.folder} is not the one that the server's model has",
                    "Leave out --model to fetch the ends from the server, or name the folder that it serves.",
                )
        return local

    def weights(self, digest: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Merged tensors of the list ``digest``, those among ``names`` that it has; not kept in the cache."""
        listed = json.loads(self._bytes(digest))
        return {name: self._merged(listed[name]) for name in names if name in listed}

    def _merged(self, item: dict[str, Any]) -> Tensor:
        return tensor_from(bytearray(self._bytes(item["sha256"])), item)

    def _bytes(self, digest: str) -> bytes:
        data = b"".join(bytes(chunk.data.data) for chunk in self._chunks(digest, 0, None))
        if hashlib.sha256(data).hexdigest() != digest:
            raise ProtocolError(f"blob {digest[:12]} does not have the announced hash", "Join again.")
        return data


class RemoteSource:
    """The base model as the server hands it out: reads tensors from fetched blobs."""

    def __init__(self, assets: Assets) -> None:
        self.assets = assets
        self.config: PreTrainedConfig = read_config(assets.folder)

    def has(self, name: str) -> bool:
        return name in self.assets.tensors

    def read(self, name: str) -> Tensor:
        """One tensor in the checkpoint's dtype. Raises ProtocolError when the server does not offer it."""
        item = self.assets.tensors.get(name)
        if item is None:
            raise ProtocolError(f"the server does not offer tensor {name!r}", "Choose another --plan.")
        return tensor_from(bytearray(self.assets.blob(item["sha256"], item["nbytes"]).read_bytes()), item)


def tensor_from(data: bytearray, item: dict[str, Any]) -> Tensor:
    """Bytes of a safetensors tensor -> the tensor. Raises ProtocolError when they do not fit together."""
    try:
        dtype, shape = DTYPES[item["dtype"]], tuple(int(size) for size in item["shape"])
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ProtocolError("a tensor's bytes do not fit its shape", "Tell the operator.") from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
