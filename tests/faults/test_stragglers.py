"""Updates that miss their round's deadline: dropped, or their change counts in the next merge at a discount."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_client import RawClient, blob, right_weights
from serving import ServiceThread
from torch import Tensor

from server_model.store import Store
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.wire.messages import Failed, Hidden, NextRound, RoundDurable, RoundOpen

HEAD = "lm_head.weight"
SHARED = "model.layers.1.mlp.up_proj.weight"  # in the trunk of a, and in the top of b when that has two blocks
TOKENS = 100


def federation(staleness: str = "polynomial", **rounds: Any) -> Federation:
    tables: dict[str, Any] = {
        "rounds": {"count": 4, "local_steps": 1, "deadline_s": 0.3, "staleness": staleness, "staleness_exponent": 1.0},
        "batch": {"records": 4, "max_length": 32},
        "model": {"max_top": 2},
        "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "wire": {"codec": "fp32"},
    }
    return parse_federation({**tables, "rounds": tables["rounds"] | rounds}, "the test")


class Ward:
    """A client that sends weights of one number, or with one tensor of another."""

    def __init__(self, service: ServiceThread, name: str, cut: Cut) -> None:
        self.source = service.coordinator.source
        self.raw = RawClient(service.url, name, n_bottom=cut.n_bottom, n_top=cut.n_top)
        self.cut = cut

    def update(self, round_: int, value: float, **tensors: Tensor) -> Any:
        weights = right_weights(self.source.config, self.raw.settings, self.cut)
        data = blob({name: torch.full_like(tensor, value) for name, tensor in weights.items()} | tensors)
        self.raw.upload(data)
        return self.raw.update(round_, data, TOKENS)

    def train(self, round_: int) -> None:
        """One step through the trunk."""
        generator = torch.Generator().manual_seed(round_)
        hidden = torch.randn(4, 5, 64, generator=generator)
        assert isinstance(self.raw.forward(round_, 0, hidden), Hidden)
        self.raw.backward(round_, 0, torch.randn(4, 5, 64, generator=generator))


def first_round(
    service: ServiceThread, stack: ExitStack, cuts: tuple[Cut, Cut] = (Cut(1, 1), Cut(1, 1))
) -> tuple[Ward, Ward]:
    """Two clients in round 0."""
    machine, chosen = service.coordinator.rounds.machine, service.coordinator.settings
    both = chosen.rounds.model_copy(
        update={"min_clients": 2}
    )  # else the deadline may open the round without the second
    machine.settings = chosen.model_copy(update={"rounds": both})
    wards = tuple(Ward(service, name, cut) for name, cut in zip("ab", cuts, strict=True))
    for ward in wards:
        stack.enter_context(ward.raw)
        ward.raw.send(NextRound(0, 0, -1))
    for ward in wards:
        assert isinstance(ward.raw.hear(), RoundOpen)
    machine.settings = chosen
    return wards  # type: ignore[return-value]


def in_trunk(service: ServiceThread) -> Tensor:
    """The trunk's copy of the shared block's weight, once all that is queued is done."""
    engine = service.coordinator.engine
    copied: Tensor = service.call(engine.call(lambda: engine.trunk.weights()[SHARED].clone()))
    return copied


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def test_late_change_counts_in_the_next_merge(small_model: Path, tmp_path: Path, stack: ExitStack) -> None:
    base = CheckpointFolder(small_model).read(HEAD).double()
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path))
    first, second = first_round(service, stack)
    assert first.update(0, 0.01).merged
    answer = second.update(0, 0.05)
    assert isinstance(answer, RoundDurable)
    assert not answer.merged  # and so it would stay if the server went away now
    assert answer.weights == service.coordinator.rounds.weights  # it goes on with the newest merge
    assert isinstance(first.raw.next_round(0), RoundOpen)
    assert first.update(1, 0.03).merged
    merged = Store(tmp_path).load(1).merged[HEAD].double()
    expected = (TOKENS * 0.03 + TOKENS / 2 * (0.01 + (0.05 - base))) / (1.5 * TOKENS)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
    assert service.named("late_update") == [{"client": "b", "round": 0, "kept": True}]
    assert service.named("round_durable")[1] == {"round": 1, "clients": ["a"], "late": ["b"]}
    assert not list((tmp_path / "uploads").glob("*.safetensors"))


def test_late_change_of_a_block_that_the_trunk_holds_too_goes_on_top_of_the_trunks_and_back_to_it(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    base = CheckpointFolder(small_model).read(SHARED)
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path))
    first, second = first_round(service, stack, (Cut(1, 1), Cut(1, 2)))
    first.train(0)
    assert first.update(0, 0.01).merged
    newest = in_trunk(service)  # nobody else trained it in round 0
    assert not torch.equal(newest, base)
    change = 0.01 * torch.ones_like(base)
    second.update(0, 0.0, **{SHARED: base + change})
    assert isinstance(first.raw.next_round(0), RoundOpen)
    first.train(1)
    trained = in_trunk(service)
    assert first.update(1, 0.01).merged
    through = 20  # label tokens that crossed the block in the trunk
    expected = (through * trained + TOKENS / 2 * (newest + change)) / (through + TOKENS / 2)
    merged = Store(tmp_path).load(1)
    torch.testing.assert_close(merged.merged[SHARED], expected, rtol=0, atol=1e-6)
    assert torch.equal(merged.trunk[SHARED], merged.merged[SHARED])


def test_late_update_that_no_merge_has_taken_is_gone_after_a_restart(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    with ServiceThread(small_model, federation(), tmp_path) as service, ExitStack() as before:
        first, second = first_round(service, before)
        assert first.update(0, 0.01).merged
        assert not second.update(0, 0.05).merged  # never said to be in
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path, resume=True))
    first = Ward(service, "a", Cut(1, 1))
    with first.raw:
        assert isinstance(first.raw.next_round(0), RoundOpen)
        assert first.update(1, 0.03).merged
    assert Store(tmp_path).load(1).merged[HEAD].unique().tolist() == [pytest.approx(0.03)]


@pytest.mark.parametrize(("staleness", "changes"), [("drop", {}), ("polynomial", {"max_staleness": 1})])
def test_late_update_that_is_dropped_changes_no_bit(
    small_model: Path, tmp_path: Path, stack: ExitStack, staleness: str, changes: dict[str, int]
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(staleness, **changes), tmp_path))
    first, second = first_round(service, stack)
    first.update(0, 0.01)
    assert isinstance(first.raw.next_round(0), RoundOpen)
    first.update(1, 0.02)
    assert not second.update(0, 0.05).merged  # two rounds late
    assert isinstance(first.raw.next_round(1), RoundOpen)
    first.update(2, 0.03)
    assert Store(tmp_path).load(2).merged[HEAD].unique().tolist() == [pytest.approx(0.03)]
    assert service.named("late_update") == [{"client": "b", "round": 0, "kept": False}]
    assert not list((tmp_path / "uploads").glob("*.safetensors"))


def test_update_of_a_round_that_the_client_is_not_in_is_an_error(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path))
    first, second = first_round(service, stack)
    for round_ in (-1, 1, 7):
        answer = second.update(round_, 0.05)
        assert isinstance(answer, Failed)
        assert answer.code == "wrong_round"
    first.update(0, 0.01)
    assert not second.update(0, 0.05).merged
    replayed = second.update(0, 0.05)
    assert isinstance(replayed, Failed)
    assert replayed.code == "wrong_round"
