"""Tensors as a safetensors file on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FOR_TRANSFORMERS = {"format": "pt"}  # metadata without which it opens no checkpoint


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write ``path``, straight from where the tensors lie. Raises OSError, with its number, when the disk is full."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))  # all that safetensors says of it
        raise OSError(int(number[1]) if number else 0, str(error)) from error


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read from the disk when it is asked for: memory holds those that
    somebody keeps. Raises OSError or SafetensorError for a file that is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, "pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:  # anew each time: what was read stays mapped until it is closed
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()  # of one tensor: as a view it would keep the mapping

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
