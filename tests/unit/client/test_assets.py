"""Fetching by hash: resumed, cached, shared with other clients of the machine, and nothing taken on trust."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client_model.assets import PIECE_BYTES, PIECES_IN_FLIGHT, Assets, RemoteSource, tensor_from
from client_model.offers import OfferedTensor
from server_model.blobs import Blobs
from splitfl.errors import ProtocolError, RefusedError, StorageError
from splitfl.files import sha256_of
from splitfl.wire.messages import Answer, Chunk, Fetch, Request, TensorBytes

BIG = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"tail"


class FakeLink:
    """Answers Fetch from ``blobs``; ``spoil`` changes what comes, ``fail_after`` breaks the link after some pieces."""

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


def listed(data: bytes, **changes: Any) -> dict[str, Any]:
    """How a server offers ``data`` as a tensor of fp16."""
    return {"sha256": sha256_of(data), "dtype": "F16", "shape": [len(data) // 2], "nbytes": len(data), **changes}


def offered(blobs: Blobs, data: bytes) -> OfferedTensor:
    blobs.add_bytes(data)
    return OfferedTensor.model_validate_json(json.dumps(listed(data)))


def manifest(blobs: Blobs, files: dict[str, bytes], tensors: dict[str, Any] | None = None) -> str:
    entries = {name: {"sha256": blobs.add_bytes(data), "nbytes": len(data)} for name, data in files.items()}
    return blobs.add_bytes(json.dumps({"files": entries, "tensors": tensors or {}}).encode())


# blobs


@pytest.mark.parametrize("data", [b"", b"xy", BIG, BIG[: 2 * PIECE_BYTES]], ids=["empty", "small", "big", "even"])
def test_blob_arrives_whole_in_pieces(tmp_path: Path, blobs: Blobs, data: bytes) -> None:
    link = FakeLink(blobs)
    path = assets_of(link, tmp_path).blob(offered(blobs, data))
    assert path.read_bytes() == data
    assert link.most_flying <= PIECES_IN_FLIGHT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [sha256_of(data)]


def test_blob_in_the_cache_is_not_fetched_again(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    assets_of(FakeLink(blobs), tmp_path).blob(item)
    link = FakeLink(blobs)
    assert assets_of(link, tmp_path).blob(item).read_bytes() == BIG
    assert link.asked == []


def test_blob_that_was_damaged_in_the_cache_is_fetched_anew(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    assets_of(FakeLink(blobs), tmp_path).blob(item).write_bytes(bytes(len(BIG)))
    assert assets_of(FakeLink(blobs), tmp_path).blob(item).read_bytes() == BIG


def test_interrupted_download_goes_on_where_it_ended(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    with pytest.raises(RefusedError, match="the link broke"):
        assets_of(FakeLink(blobs, fail_after=2), tmp_path).blob(item)
    assert (tmp_path / f"cache/{item.sha256}.part").stat().st_size == 2 * PIECE_BYTES
    link = FakeLink(blobs)
    assert assets_of(link, tmp_path).blob(item).read_bytes() == BIG
    assert [fetch.offset for fetch in link.asked] == [2 * PIECE_BYTES, 3 * PIECE_BYTES]


def test_blob_with_another_hash_is_refused_and_fetched_anew_next_time(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    flipped = FakeLink(blobs, spoil=lambda data: bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ProtocolError, match="does not have the announced hash"):
        assets_of(flipped, tmp_path).blob(item)
    assert list((tmp_path / "cache").iterdir()) == []
    assert assets_of(FakeLink(blobs), tmp_path).blob(item).read_bytes() == BIG


def test_leftover_of_something_else_is_refused_once(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    (tmp_path / "cache").mkdir()
    (tmp_path / f"cache/{item.sha256}.part").write_bytes(b"garbage")
    with pytest.raises(ProtocolError, match="announced hash"):
        assets_of(FakeLink(blobs), tmp_path).blob(item)
    assert assets_of(FakeLink(blobs), tmp_path).blob(item).read_bytes() == BIG


@pytest.mark.parametrize("spoil", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""])
def test_piece_that_was_not_asked_for_is_refused(tmp_path: Path, blobs: Blobs, spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ProtocolError, match="is not the one asked for"):
        assets_of(FakeLink(blobs, spoil=spoil), tmp_path).blob(offered(blobs, BIG))


def test_clients_of_one_machine_share_a_download(tmp_path: Path, blobs: Blobs) -> None:
    item = offered(blobs, BIG)
    links = [FakeLink(blobs) for _ in range(4)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda link=link: found.append(assets_of(link, tmp_path).blob(item).read_bytes()))
        for link in links
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BIG] * 4
    assert sum(bool(link.asked) for link in links) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [item.sha256]


def test_cache_that_is_a_file_is_a_storage_error(tmp_path: Path, blobs: Blobs) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        assets_of(FakeLink(blobs), tmp_path).blob(offered(blobs, b"xy"))


def test_download_that_the_disk_has_no_room_for_is_refused_before_it_begins(
    tmp_path: Path, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = FakeLink(blobs)
    assets = assets_of(link, tmp_path)
    assets.tensors = {"head": offered(blobs, BIG)}
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"take 3 MB, .* has 0 MB free\. Free some space"):
        assets.fetch_tensors(["head"])
    assert link.asked == []


# the list of assets


def test_files_of_the_model_arrive_under_their_names(tmp_path: Path, blobs: Blobs) -> None:
    assets = assets_of(FakeLink(blobs), tmp_path)
    assets.open(manifest(blobs, {"config.json": b"{}", "tokenizer.json": b"[]"}))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
    }


@pytest.mark.parametrize("name", ["../config.json", "/etc/evil", "a/config.json", ".bashrc", "..", "", "modeling.py"])
def test_file_that_no_model_folder_has_is_refused(tmp_path: Path, blobs: Blobs, name: str) -> None:
    with pytest.raises(ProtocolError, match="no model folder has"):
        assets_of(FakeLink(blobs), tmp_path).open(manifest(blobs, {name: b"evil"}))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"files": 3, "tensors": {}}', b'{"files": {}, "tensors": 3}', b"\xff", b"[" * 10_000]
)
def test_list_that_is_none_is_refused(tmp_path: Path, blobs: Blobs, data: bytes) -> None:
    with pytest.raises(ProtocolError, match="list of tensors is malformed"):
        assets_of(FakeLink(blobs), tmp_path).open(blobs.add_bytes(data))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [3]},
        {"shape": ["two"]},
        {"shape": None},
        {"shape": [-1, -1]},
        {"dtype": "I64"},
        {"dtype": "F32"},
        {"nbytes": 4},
        {"sha256": "../../outside"},
        {"sha256": "AB" * 32},
        {"sha256": "ab" * 32 + "\n"},
        {"more": 1},
    ],
)
def test_tensor_that_is_offered_with_a_lie_is_refused(tmp_path: Path, blobs: Blobs, wrong: dict[str, Any]) -> None:
    tensors = {"head": listed(b"xy", **wrong)}
    with pytest.raises(ProtocolError, match=r"list of tensors is malformed: tensors\.head"):
        assets_of(FakeLink(blobs), tmp_path).open(manifest(blobs, {}, tensors))


# tensors


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
@pytest.mark.parametrize("shape", [(1, 3), (3,), (0, 3)])
def test_tensor_is_made_of_its_bytes(dtype: str, torch_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(float(torch.Size(shape).numel())).reshape(shape).to(torch_dtype)
    data = tensor.flatten().view(torch.uint8).numpy().tobytes()
    item = listed(data, dtype=dtype, shape=list(shape))
    found = tensor_from(bytearray(data), OfferedTensor.model_validate_json(json.dumps(item)))
    assert found.dtype == torch_dtype
    assert torch.equal(found, tensor)


def test_weights_are_read_from_their_list_and_not_kept(tmp_path: Path, blobs: Blobs) -> None:
    one, two = torch.ones(2).half().numpy().tobytes(), torch.zeros(2).half().numpy().tobytes()
    blobs.add_bytes(one)
    blobs.add_bytes(two)
    weights = blobs.add_bytes(json.dumps({"head": listed(one), "norm": listed(two)}).encode())
    assets = assets_of(FakeLink(blobs), tmp_path)
    found = assets.weights(weights, ["head", "missing"])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"head": [1.0, 1.0]}
    assert not (tmp_path / "cache").exists()


def test_weights_with_another_hash_are_refused(tmp_path: Path, blobs: Blobs) -> None:
    weights = blobs.add_bytes(b"{}")
    with pytest.raises(ProtocolError, match="announced hash"):
        assets_of(FakeLink(blobs, spoil=lambda _: b"[]"), tmp_path).weights(weights, [])


@pytest.fixture
def source(tmp_path: Path, blobs: Blobs, small_model: Path) -> RemoteSource:
    files = {"config.json": (small_model / "config.json").read_bytes()}
    data = torch.ones(2).half().numpy().tobytes()
    blobs.add_bytes(data)
    assets = assets_of(FakeLink(blobs), tmp_path)
    assets.open(manifest(blobs, files, {"model.embed_tokens.weight": listed(data)}))
    return RemoteSource(assets)


def test_remote_model_reads_what_the_server_offers(source: RemoteSource) -> None:
    assert source.config.model_type == "llama"
    assert source.has("model.embed_tokens.weight")
    assert source.read("model.embed_tokens.weight").tolist() == [1.0, 1.0]


def test_remote_model_refuses_what_the_server_does_not_offer(source: RemoteSource) -> None:
    assert not source.has("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ProtocolError, match=r"does not offer tensor .*--plan"):
        source.read("model.layers.1.mlp.up_proj.weight")
