"""A shape read off a config counts what the family's own modules hold."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from helpers import tiny_config

from splitfl.errors import ConfigError
from splitfl.planning.shapes import ModelShape
from splitfl.split.families import FAMILIES, small_config
from splitfl.split.segment import Piece, Segment

SIZES: dict[str, Any] = {"layers": 3, "hidden": 256, "vocab": 3000}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])
def test_shape_counts_the_weights_of_every_family(family: str) -> None:
    config = small_config(family, **SIZES, tie=False)
    shape = ModelShape.of(config)
    whole = Segment(config, Piece(0, 3, embedding=True, head=True))
    blocks = sum(weight.numel() for name, weight in whole.named_weights() if whole.block_of(name) is not None)
    everything = sum(weight.numel() for _, weight in whole.named_weights())
    assert 3 * shape.block_weights == pytest.approx(blocks, rel=0.01)
    assert shape.weights == pytest.approx(everything, rel=0.01)


def test_shape_counts_all_experts_and_works_with_those_that_see_a_token() -> None:
    shape = ModelShape.of(small_config("gpt_oss", **SIZES))
    assert (shape.experts, shape.active) == (4, 2)
    assert shape.block_weights > 4 * 3 * shape.hidden * shape.intermediate


def test_shape_is_the_same_from_a_config_and_from_its_json() -> None:
    config = tiny_config("qwen2")
    assert ModelShape.of(config.to_dict()) == ModelShape.of(config)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("torch.float16", 2), ("float32", 4), (None, 4)])
def test_shape_knows_what_a_stored_weight_takes(dtype: str | None, size: int) -> None:
    assert ModelShape.of(tiny_config("llama").to_dict() | {"dtype": dtype}).stored_bytes == size


def test_config_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no hidden_size"):
        ModelShape.of({"model_type": "clip", "num_hidden_layers": 2})


def test_planning_loads_no_torch() -> None:
    program = "import sys, splitfl.planning.planner; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
