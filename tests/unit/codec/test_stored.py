"""Tensors on disk: written from where they lie, read one after the other."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from splitfl.codec import stored
from splitfl.codec.stored import StoredTensors, write_tensors


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(2, 5).t(), "none": torch.empty(0)}
    write_tensors(tensors, tmp_path / "x")
    read = StoredTensors(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert ("a" in read, "c" in read, len(read)) == (True, False, 3)
    with pytest.raises(KeyError):
        read["c"]


def test_tensor_is_let_go_before_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x")
    opened, really_open = [0], stored.safe_open

    @contextmanager
    def watched(*arguments: str) -> Iterator[object]:
        opened[0] += 1
        with really_open(*arguments) as file:
            yield file
        opened[0] -= 1

    monkeypatch.setattr(stored, "safe_open", watched)
    held = [(len(tensor), opened[0]) for tensor in StoredTensors(tmp_path / "x").values()]
    assert held == [(2, 0), (2, 0)]  # nothing stays mapped


def test_file_that_is_no_safetensors_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no tensors")
    with pytest.raises(SafetensorError):
        StoredTensors(tmp_path / "x")


def test_tensors_that_find_no_room_are_known_by_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_tensors({}, tmp_path / "x")
    assert error.value.errno == errno.ENOSPC
