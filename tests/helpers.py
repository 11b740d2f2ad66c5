"""Small models, their segments and the batches that run through them: what several test files share."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from splitfl.cut import Cut
from splitfl.split.checkpoint import load_segment
from splitfl.split.families import SLIDING_FAMILIES, build_small_model, small_config
from splitfl.split.loss import IGNORE
from splitfl.split.segment import Piece, Segment

LAYERS, HIDDEN, VOCAB, TIME = 6, 64, 300, 20
WINDOW = 6  # tokens: well below TIME, so that a sliding window acts
LENGTHS = (TIME, 13, 5)  # true lengths of a right-padded batch


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A config of ``family`` with the sizes above."""
    sizes: dict[str, Any] = {"layers": LAYERS, "hidden": HIDDEN, "vocab": VOCAB, "max_length": 64, "tie": False}
    if family in SLIDING_FAMILIES:
        sizes["sliding_window"] = WINDOW
    return small_config(family, **(sizes | changes))


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of ``family`` in which every weight counts: biases and norms are not at their neutral start."""
    return stirred(build_small_model(tiny_config(family, **changes), seed), seed)


def stirred(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Add noise to every weight of ``model``."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@dataclass
class MemorySource:
    """Weights of a model in memory, copied on reading; ``reads`` lists what was asked for."""

    config: PreTrainedConfig
    tensors: Mapping[str, Tensor]
    reads: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> MemorySource:
        return cls(model.config, {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)})

    def has(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()


@dataclass(frozen=True)
class Parts:
    """The three segments of a split model."""

    bottom: Segment
    trunk: Segment
    top: Segment

    def __iter__(self) -> Iterator[Segment]:
        return iter((self.bottom, self.trunk, self.top))


def split(model: PreTrainedModel, cut: Cut, *, attention: str | None = None) -> Parts:
    """Segments of ``model`` with copies of its weights, all frozen."""
    source, layers = MemorySource.of(model), model.config.num_hidden_layers
    trunk, top = cut.trunk(layers), cut.top(layers)
    pieces = (
        Piece(0, cut.n_bottom, embedding=True),
        Piece(trunk.start, trunk.stop),
        Piece(top.start, top.stop, head=True),
    )
    return Parts(*(load_segment(source, piece, attention=attention) for piece in pieces))


@dataclass(frozen=True)
class Batch:
    """Token ids (B, T), labels (B, T) already shifted, and true lengths (B,) or None where no row is padded."""

    ids: Tensor
    labels: Tensor
    lengths: Tensor | None

    @property
    def mask(self) -> Tensor | None:
        """Attention mask (B, T) as transformers takes it."""
        if self.lengths is None:
            return None
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()

    @property
    def valid(self) -> Tensor:
        """Which positions hold tokens, (B, T)."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.mask is None else self.mask.bool()


def make_batch(*, padded: bool, vocab: int = VOCAB, rows: int = 3, time: int = TIME, seed: int = 7) -> Batch:
    """Random tokens, with the padding of :data:`LENGTHS` or without."""
    ids = torch.randint(1, vocab, (rows, time), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor(LENGTHS[:rows]) if padded else None
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORE)], dim=1)
    if lengths is not None:
        positions = torch.arange(time)
        ids = ids.masked_fill(positions >= lengths[:, None], 0)
        labels = labels.masked_fill(positions + 1 >= lengths[:, None], IGNORE)
    return Batch(ids, labels, lengths)


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file from ``name -> (dtype, shape, bytes)``, by hand: for dtypes that torch cannot save."""
    header: dict[str, Any] = {}
    begin = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in tensors.values()))


def elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
