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


def read_in_turn(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors one after the other, each on the CPU: memory holds one at a time. Raises OSError,
    SafetensorError."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:  # anew each time: what was read stays mapped until it is closed
            yield name, file.get_tensor(name)
