"""Segments may be built in several threads at once, as clients of one process do."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from helpers import MemorySource, tiny_model
from torch import nn

from splitfl.split.checkpoint import load_segment
from splitfl.split.segment import Piece, Segment

THREADS = 4


def test_segments_built_at_once_have_all_their_weights() -> None:
    source = MemorySource.of(tiny_model("llama"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            segments = list(pool.map(lambda _: load_segment(source, Piece(0, 2, embedding=True)), range(2 * THREADS)))
    finally:
        sys.setswitchinterval(interval)
    for segment in segments:
        for name, weight in segment.named_weights():
            assert torch.equal(weight, source.tensors[name]), name


def test_building_leaves_other_modules_and_the_default_dtype_alone() -> None:
    config = tiny_model("llama").config
    config.dtype = torch.bfloat16
    segment = Segment(config, Piece(0, 1))
    assert all(weight.is_meta for _, weight in segment.named_weights())
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
