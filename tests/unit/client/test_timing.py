"""How a block's pace is measured: enough tokens, a warm-up, a median, and a line drawn on to a whole micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from client_model import timing
from client_model.timing import Specimen, Spread, measure_pace, per_token
from splitfl.config import Federation, parse_federation
from tests.helpers import LAYERS, MemorySource, tiny_model

CPU = torch.device("cpu")
SETTINGS = parse_federation({"batch": {"records": 8, "micro_batches": 2, "max_length": 32}}, "the test")


class Clock:
    """Stands still but for what a run costs: so much, and so much a token."""

    def __init__(self, fixed_s: float, token_s: float) -> None:
        self.now, self.fixed_s, self.token_s = 0.0, fixed_s, token_s
        self.tokens: list[int] = []

    def run(self, hidden: Tensor) -> None:
        self.tokens.append(hidden.shape[0] * hidden.shape[1])
        self.now += self.fixed_s + self.token_s * self.tokens[-1]

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def specimen() -> Specimen:
    return Specimen(MemorySource.of(tiny_model("llama")), SETTINGS, CPU, "fp32")


@pytest.mark.parametrize(("token_s", "largest"), [(1e-6, 64), (5e-3, 64), (1.0, 64)])
def test_pace_is_that_of_a_whole_micro_batch_however_far_it_was_measured(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch, token_s: float, largest: int
) -> None:
    clock = Clock(fixed_s=3 * token_s, token_s=token_s)
    monkeypatch.setattr(timing, "time", clock)
    spread = per_token(specimen, clock.run, budget_s=1.0)
    assert spread.median == pytest.approx(token_s + clock.fixed_s / 128)
    assert max(clock.tokens) == largest
    assert len(clock.tokens) < 30


def test_fast_machine_is_given_long_runs_and_a_slow_one_few(
    specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token_s, most in ((1e-6, timing.MOST_RUNS), (10.0, timing.LEAST_RUNS)):
        clock = Clock(0.0, token_s)
        monkeypatch.setattr(timing, "time", clock)
        per_token(specimen, clock.run, budget_s=0.1)
        longest = max(clock.tokens)
        assert clock.tokens.count(longest) == most + 2  # a warm-up, and the better of two that one of them counts


def test_specimen_is_the_last_block_and_the_head_and_nothing_else() -> None:
    source = MemorySource.of(tiny_model("llama"))
    Specimen(source, SETTINGS, CPU, "fp32")
    blocks = {name.split(".")[2] for name in source.reads if ".layers." in name}
    assert blocks == {str(LAYERS - 1)}
    assert not any("embed" in name for name in source.reads)


def test_block_trains_in_the_arithmetic_that_was_asked_for(specimen: Specimen) -> None:
    mixed = Specimen(MemorySource.of(tiny_model("llama")), SETTINGS, CPU, "bf16")
    seen: list[torch.dtype] = []
    for one in (specimen, mixed):
        projection: Any = one.block.blocks[0]
        projection.mlp.down_proj.register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
        one.train_block(one.hidden(2, 8))
        assert all(weight.grad is not None for weight in one.optimizers["block"].named.values())
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("model", [{"train": "lora"}, {"head": "frozen"}, {"head": "lora"}])
def test_pace_is_measured_whatever_trains(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for budget in ("BLOCK_S", "FROZEN_S", "HEAD_S", "UPDATE_S"):
        monkeypatch.setattr(timing, budget, 0.0)
    settings: Federation = parse_federation({"model": model, "batch": {"max_length": 32}}, "the test")
    pace = measure_pace(MemorySource.of(tiny_model("llama")), settings, CPU, "fp32")
    assert min(pace.block.low, pace.frozen_block.low, pace.head.low) > 0


def test_spreads_add_and_scale() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 9.0, 2.5]) == Spread(1.0, 2.5, 9.0)
    assert (Spread(1, 2, 3) + Spread(1, 1, 2)).scaled(2) == Spread(4, 6, 10)
