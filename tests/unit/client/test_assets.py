"""Fetching by hash: resumed, cached, shared with other clients of the machine, and nothing taken on trust."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from client_model.assets import PIECE_BYTES, PIECES_IN_FLIGHT, Assets, RemoteSource, tensor_from
from server_model.blobs import Blobs
from splitfl.errors import ProtocolError, RefusedError, StorageError
from splitfl.files import sha256_of
from splitfl.wire.messages import Answer, Chunk, Fetch, Request, TensorBytes

BIG = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"tail"


class FakeLink:
    """Answers Fetch from ``blobs``; ``spoil`` may change what comes, ``fail_after`` breaks the link after some pieces."""

    def __init__(self, blobs: Blobs, *, spoil: Callable[[bytes], bytes] = bytes, fail_after: int | None = None) -> None:
        self.blobs = blobs
        self.spoil = spoil
        self.left = fail_after
        self.asked: list[Fetch] = []
        self.flying = 0
        self.most_flying = 0

    def request(self, message: Request) -> Future[Answer]:
        assert isinstance(message, Fetch)
        self.asked.append(message)
        self.flying += 1
        self.most_flying = max(self.most_flying, self.flying)
        future = LateFuture(self)
        try:
            if self.left is not None:
                if self.left == 0:
                    raise RefusedError("the link broke", code="internal")
                self.left -= 1
            data, total = self.blobs.read(message.sha256, message.offset, message.limit)
            data = self.spoil(data)
            future.set_result(Chunk(0, message.sha256, message.offset, total, TensorBytes("u8", (len(data),), data)))
        except RefusedError as error:
            future.set_exception(error)
        return future


class LateFuture(Future[Answer]):
    """Counts as under way until somebody takes its result."""

    def __init__(self, link: FakeLink) -> None:
        super().__init__()
        self.link = link

    def result(self, timeout: float | None = None) -> Answer:
        self.link.flying -= 1
        return super().result(timeout)


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


def assets_of(link: FakeLink, folder: Path) -> Assets:
    return Assets(link, folder / "cache", folder / "model", lambda _: None)


def manifest(blobs: Blobs, files: dict[str, bytes], tensors: dict[str, Any] | None = None) -> str:
    listed = {name: {"sha256": blobs.add_bytes(data), "nbytes": len(data)} for name, data in files.items()}
    return blobs.add_bytes(json.dumps({"files": listed, "tensors": tensors or {}}).encode())


# blobs


@pytest.mark.parametrize("data", [b"", b"x", BIG, BIG[: 2 * PIECE_BYTES]], ids=["empty", "small", "big", "even"])
@pytest.mark.parametrize("know_total", [True, False])
def test_blob_arrives_whole_in_pieces(tmp_path: Path, blobs: Blobs, data: bytes, know_total: bool) -> None:
    link = FakeLink(blobs)
    assets = assets_of(link, tmp_path)
    path = assets.blob(blobs.add_bytes(data), len(data) if know_total else None)
    assert path.read_bytes() == data
    assert link.most_flying <= PIECES_IN_FLIGHT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sha256_of(data)]


def test_blob_in_the_cache_is_not_fetched_again(tmp_path: Path, blobs: Blobs) -> None:
    digest = blobs.add_bytes(BIG)
    assets_of(FakeLink(blobs), tmp_path).blob(digest)
    link = FakeLink(blobs)
    assert assets_of(link, tmp_path).blob(digest).read_bytes() == BIG
    assert link.asked == []


def test_interrupted_download_goes_on_where_it_ended(tmp_path: Path, blobs: Blobs) -> None:
    digest = blobs.add_bytes(BIG)
    with pytest.raises(RefusedError, match="the link broke"):
        assets_of(FakeLink(blobs, fail_after=2), tmp_path).blob(digest, len(BIG))
    assert (tmp_path / f"cache/{digest}.part").stat().st_size == 2 * PIECE_BYTES
    link = FakeLink(blobs)
    assert assets_of(link, tmp_path).blob(digest, len(BIG)).read_bytes() == BIG
    assert [fetch.offset for fetch in link.asked] == [2 * PIECE_BYTES, 3 * PIECE_BYTES]


def test_blob_with_another_hash_is_refused_and_fetched_anew_next_time(tmp_path: Path, blobs: Blobs) -> None:
    digest = blobs.add_bytes(BIG)
    flipped = FakeLink(blobs, spoil=lambda data: bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ProtocolError, match="does not have the announced hash"):
        assets_of(flipped, tmp_path).blob(digest)
    assert list((tmp_path / "cache").iterdir()) == []
    assert assets_of(FakeLink(blobs), tmp_path).blob(digest).read_bytes() == BIG


def test_leftover_of_something_else_is_refused_once(tmp_path: Path, blobs: Blobs) -> None:
    digest = blobs.add_bytes(BIG)
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{digest}.part").write_bytes(b"garbage")
    with pytest.raises(ProtocolError, match="announced hash"):
        assets_of(FakeLink(blobs), tmp_path).blob(digest)
    assert assets_of(FakeLink(blobs), tmp_path).blob(digest).read_bytes() == BIG


def test_clients_of_one_machine_share_a_download(tmp_path: Path, blobs: Blobs) -> None:
    digest = blobs.add_bytes(BIG)
    links = [FakeLink(blobs) for _ in range(4)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda link=link: found.append(assets_of(link, tmp_path).blob(digest).read_bytes()))
        for link in links
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BIG] * 4
    assert sum(bool(link.asked) for link in links) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [digest]


def test_cache_on_a_full_disk_is_a_storage_error(tmp_path: Path, blobs: Blobs) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        assets_of(FakeLink(blobs), tmp_path).blob(blobs.add_bytes(b"x"))


@pytest.mark.parametrize("digest", ["../../outside", "", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "/etc/hostname"])
def test_hash_that_is_a_path_is_refused(tmp_path: Path, blobs: Blobs, digest: str) -> None:
    link = FakeLink(blobs)
    with pytest.raises(ProtocolError, match="is no SHA-256"):
        assets_of(link, tmp_path).blob(digest)
    assert link.asked == []


# the list of assets


def test_files_of_the_model_arrive_under_their_names(tmp_path: Path, blobs: Blobs) -> None:
    assets = assets_of(FakeLink(blobs), tmp_path)
    assets.open(manifest(blobs, {"config.json": b"{}", "tokenizer.json": b"[]"}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
    }


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "a/b", ".bashrc", "..", ""])
def test_file_whose_name_is_a_path_is_refused(tmp_path: Path, blobs: Blobs, name: str) -> None:
    with pytest.raises(ProtocolError, match="Do not trust this server"):
        assets_of(FakeLink(blobs), tmp_path).open(manifest(blobs, {name: b"evil"}))
    assert not (tmp_path / "model").exists() or list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"files": 3, "tensors": {}}', b'{"files": {}, "tensors": 3}', b"\xff"]
)
def test_list_that_is_none_is_refused(tmp_path: Path, blobs: Blobs, data: bytes) -> None:
    with pytest.raises(ProtocolError, match="list of assets cannot be read"):
        assets_of(FakeLink(blobs), tmp_path).open(blobs.add_bytes(data))


# tensors


def item(data: bytes, dtype: str = "F32", shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"sha256": sha256_of(data), "dtype": dtype, "shape": list(shape), "nbytes": len(data)}


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_tensor_is_made_of_its_bytes(dtype: str, torch_dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1.5, -2.0, 3.0]], dtype=torch_dtype)
    data = tensor.view(torch.uint8).numpy().tobytes()
    found = tensor_from(bytearray(data), item(data, dtype, (1, 3)))
    assert found.dtype == torch_dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize(
    "wrong",
    [{"shape": [3]}, {"shape": ["two"]}, {"shape": None}, {"dtype": "I64"}, {"dtype": "BF16"}, {"shape": [-1, -1]}],
)
def test_tensor_whose_shape_or_dtype_lies_is_refused(wrong: dict[str, Any]) -> None:
    data = bytes(8)
    with pytest.raises(ProtocolError, match="do not fit its shape"):
        tensor_from(bytearray(data), {**item(data), **wrong})


def test_weights_are_read_from_their_list_and_not_kept(tmp_path: Path, blobs: Blobs) -> None:
    one, two = torch.ones(2).numpy().tobytes(), torch.zeros(2).numpy().tobytes()
    blobs.add_bytes(one)
    blobs.add_bytes(two)
    listed = blobs.add_bytes(json.dumps({"head": item(one), "norm": item(two)}).encode())
    assets = assets_of(FakeLink(blobs), tmp_path)
    found = assets.weights(listed, ["head", "missing"])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"head": [1.0, 1.0]}
    assert not (tmp_path / "cache").exists()


def test_weights_with_another_hash_are_refused(tmp_path: Path, blobs: Blobs) -> None:
    listed = blobs.add_bytes(b"{}")
    with pytest.raises(ProtocolError, match="announced hash"):
        assets_of(FakeLink(blobs, spoil=lambda data: data + b" "), tmp_path).weights(listed, [])


@pytest.fixture
def source(tmp_path: Path, blobs: Blobs, small_model: Path) -> Iterator[RemoteSource]:
    files = {"config.json": (small_model / "config.json").read_bytes()}
    data = torch.ones(2).numpy().tobytes()
    blobs.add_bytes(data)
    assets = assets_of(FakeLink(blobs), tmp_path)
    assets.open(manifest(blobs, files, {"model.embed_tokens.weight": item(data)}))
    yield RemoteSource(assets)


def test_remote_model_reads_what_the_server_offers(source: RemoteSource) -> None:
    assert source.config.model_type == "llama"
    assert source.has("model.embed_tokens.weight")
    assert source.read("model.embed_tokens.weight").tolist() == [1.0, 1.0]


def test_remote_model_refuses_what_the_server_does_not_offer(source: RemoteSource) -> None:
    assert not source.has("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ProtocolError, match=r"does not offer tensor .*--plan"):
        source.read("model.layers.1.mlp.up_proj.weight")
