"""What clients may fetch, by hash: byte ranges of files, small things in memory, and no more than is offered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server_model.blobs import Blobs
from splitfl.errors import RefusedError
from splitfl.files import sha256_of
from splitfl.split.checkpoint import file_entries


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(100.0), "b": torch.ones(3, 2).half()}, tmp_path / "model.safetensors")
    return tmp_path


def entries(folder: Path) -> list[tuple[str, object]]:
    return [(entry.name, entry) for entry in file_entries(folder / "model.safetensors")]


def whole(blobs: Blobs, digest: str, step: int) -> bytes:
    """Fetch a blob piece by piece."""
    data, total = blobs.read(digest, 0, step)
    while len(data) < total:
        more, again = blobs.read(digest, len(data), step)
        assert again == total
        assert 0 < len(more) <= step
        data += more
    return data


@pytest.mark.parametrize("step", [1, 7, 400, 1000])
def test_tensor_is_served_from_its_place_in_the_file(folder: Path, step: int) -> None:
    blobs = Blobs()
    listed = blobs.add_tensors(entries(folder))  # type: ignore[arg-type]
    expected = {"a": torch.arange(100.0), "b": torch.ones(3, 2).half()}
    for name, tensor in expected.items():
        data = whole(blobs, str(listed[name]["sha256"]), step)
        assert data == tensor.numpy().tobytes()
        assert listed[name]["sha256"] == sha256_of(data)
        assert listed[name]["shape"] == list(tensor.shape)
        assert listed[name]["nbytes"] == len(data)
    assert [listed[name]["dtype"] for name in "ab"] == ["F32", "F16"]


def test_bytes_are_served_by_their_hash() -> None:
    blobs = Blobs()
    digest = blobs.add_bytes(b"config")
    assert digest == sha256_of(b"config")
    assert whole(blobs, digest, 4) == b"config"


@pytest.mark.parametrize("offset", [6, 7, 2**40])
def test_read_behind_the_end_gives_nothing_but_the_length(folder: Path, offset: int) -> None:
    blobs = Blobs()
    assert blobs.read(blobs.add_bytes(b"config"), offset, 10) == (b"", 6)
    digest = str(blobs.add_tensors(entries(folder))["b"]["sha256"])  # type: ignore[arg-type]
    assert blobs.read(digest, 12 + offset, 10) == (b"", 12)


def test_read_never_leaves_the_tensor(folder: Path) -> None:
    blobs = Blobs()
    digest = str(blobs.add_tensors(entries(folder))["a"]["sha256"])  # type: ignore[arg-type]
    data, total = blobs.read(digest, 396, 10_000)
    assert (len(data), total) == (4, 400)


@pytest.mark.parametrize("digest", ["ab" * 32, "", "../model.safetensors", "/etc/passwd"])
def test_unknown_hash_is_refused(folder: Path, digest: str) -> None:
    blobs = Blobs()
    blobs.add_tensors(entries(folder))  # type: ignore[arg-type]
    with pytest.raises(RefusedError) as error:
        blobs.read(digest, 0, 10)
    assert error.value.code == "not_found"


def test_file_that_is_gone_is_refused(folder: Path) -> None:
    blobs = Blobs()
    digest = str(blobs.add_tensors(entries(folder))["a"]["sha256"])  # type: ignore[arg-type]
    (folder / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match="is gone"):
        blobs.read(digest, 0, 10)


def test_rounds_are_offered_until_they_are_forgotten(folder: Path) -> None:
    blobs = Blobs()
    listed = blobs.add_round(folder, entries(folder))  # type: ignore[arg-type]
    assert b'"a"' in whole(blobs, listed, 1000)
    blobs.forget_round(folder)
    with pytest.raises(RefusedError):
        blobs.read(listed, 0, 10)


def test_bytes_that_another_round_has_too_stay_when_one_is_forgotten(tmp_path: Path) -> None:
    blobs, lists = Blobs(), []
    for number in range(2):
        round_folder = tmp_path / str(number)
        round_folder.mkdir()
        save_file({"a": torch.ones(2)}, round_folder / "model.safetensors")
        lists.append(blobs.add_round(round_folder, entries(round_folder)))  # type: ignore[arg-type]
    (tmp_path / "0/model.safetensors").unlink()
    blobs.forget_round(tmp_path / "0")
    digest = sha256_of(torch.ones(2).numpy().tobytes())
    assert whole(blobs, digest, 100) == torch.ones(2).numpy().tobytes()
    assert lists[0] == lists[1]
