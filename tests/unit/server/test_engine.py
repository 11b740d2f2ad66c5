"""The compute queue: who runs together, in what order, what happens to those who are late, and that it never hangs."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import pytest
import torch
from helpers import HIDDEN, LAYERS, MemorySource
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server_model.engine import Engine
from server_model.steps import MissedError, StepKey
from server_model.trunk import Graph, Rows, Trunk, shared_stretches, true_lengths
from splitfl.config import Federation, parse_federation
from splitfl.errors import ProtocolError

BLOCKS = range(1, LAYERS - 1)
RATE = 0.1
TIMEOUT_S = 60.0
SOON_S = 0.2


def federation(*, micro: int = 1, steps: int = 50, **trunk: Any) -> Federation:
    """Plain SGD without clipping, so that a step is a sum that a test can write down."""
    table = {
        "rounds": {"count": 1, "local_steps": steps},
        "batch": {"records": 4 * micro, "micro_batches": micro},
        "optimizer": {"name": "sgd", "schedule": "constant", "learning_rate": RATE, "max_grad_norm": 0.0},
        "trunk": trunk,
    }
    return parse_federation(table, "the test")


@dataclass(frozen=True)
class Piece:
    """One client's micro-batch: hidden states, their lengths, label tokens, the gradient that it will send."""

    rows: Rows
    tokens: int
    gradient: Tensor
    blocks: range = BLOCKS

    @classmethod
    def draw(cls, seed: int, *, batch: int = 2, time: int = 7, padded: bool = False) -> Piece:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(batch, time, HIDDEN, generator=generator)
        lengths = torch.tensor([time, *[max(1, time - 3)] * (batch - 1)]) if padded else None
        return cls(Rows(hidden, lengths), batch * time - 1, torch.randn(hidden.shape, generator=generator))


PIECES = {name: Piece.draw(seed, time=5 + seed, padded=seed == 2) for seed, name in enumerate("abc")}


def each(settings: Federation, names: Iterable[str]) -> dict[str, int]:
    """A cohort whose clients all compute a step in the federation's number of micro-batches."""
    return dict.fromkeys(names, settings.batch.micro_batches)


@dataclass
class Bench:
    """An engine over a real trunk, with an open round."""

    source: MemorySource
    settings: Federation
    cohort: Iterable[str] = "abc"
    neighbours: Iterable[str] = ""
    trunk: Trunk = field(init=False)
    engine: Engine = field(init=False)

    async def __aenter__(self) -> Bench:
        self.trunk = Trunk(self.settings, self.source, BLOCKS, torch.device("cpu"))
        self.engine = Engine(self.trunk, self.settings)
        self.engine.open_round(0, each(self.settings, self.cohort), self.neighbours)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.engine.close()

    async def forward(self, name: str, step: int = 0, micro: int = 0, piece: Piece | None = None) -> Tensor:
        piece = piece or PIECES[name]
        return await self.engine.forward(name, StepKey(0, step, micro), piece.blocks, piece.rows, piece.tokens, True)

    async def backward(self, name: str, step: int = 0, micro: int = 0, piece: Piece | None = None) -> Tensor:
        return await self.engine.backward(name, StepKey(0, step, micro), (piece or PIECES[name]).gradient)

    async def both(self, name: str, step: int = 0, micro: int = 0, piece: Piece | None = None) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch."""
        return await self.forward(name, step, micro, piece), await self.backward(name, step, micro, piece)

    async def settled(self) -> dict[str, Tensor]:
        """The trunk's weights once nothing is in work any more."""
        await self.engine.call(lambda: None)
        while self.engine.work is not None:
            await asyncio.sleep(0.001)
        await self.engine.call(lambda: None)
        return {name: weight.clone() for name, weight in self.trunk.weights().items()}


def alone(
    source: MemorySource, steps: Sequence[Sequence[Piece]]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """The slow oracle: each piece by itself, then one SGD step on the sum over all label tokens of the step."""
    trunk = Trunk(federation(), source, BLOCKS, torch.device("cpu"))
    results = []
    for pieces in steps:
        for piece in pieces:
            hidden = piece.rows.hidden.clone().requires_grad_()
            output = trunk.segment.narrow(piece.blocks.start, piece.blocks.stop)(hidden, piece.rows.lengths)
            output.backward(piece.gradient)
            assert hidden.grad is not None
            results.append((output.detach(), hidden.grad))
        with torch.no_grad():
            for name, weight in trunk.trainable().items():
                if weight.grad is not None:
                    block = trunk.segment.block_of(name)
                    weight -= RATE * weight.grad / sum(piece.tokens for piece in pieces if block in piece.blocks)
                    weight.grad = None
    return results, trunk.weights()


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's coroutine; a hang is a failure."""
    return asyncio.run(asyncio.wait_for(work(), TIMEOUT_S))  # type: ignore[arg-type]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


async def soon(work: Awaitable[Any]) -> bool:
    """Whether ``work`` ends within a moment; it goes on otherwise."""
    done, _ = await asyncio.wait([asyncio.ensure_future(work)], timeout=SOON_S)
    return bool(done)


# one joint step


def assert_each_gets_what_it_would_get_alone(source: MemorySource, pieces: dict[str, Piece], **trunk: Any) -> None:
    async def work() -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        async with Bench(source, federation(**trunk), pieces) as bench:
            results = await asyncio.gather(*(bench.both(name, piece=piece) for name, piece in pieces.items()))
            return results, await bench.settled()

    results, weights = run(work)
    expected, stepped = alone(source, [list(pieces.values())])
    for found, wanted, piece in zip(results, expected, pieces.values(), strict=True):
        time = torch.arange(piece.rows.hidden.shape[1])
        valid = time < true_lengths(piece.rows)[:, None]  # (B, T)
        for tensor, tensor_alone in zip(found, wanted, strict=True):
            torch.testing.assert_close(tensor[valid], tensor_alone[valid], atol=1e-5, rtol=1e-5)
    assert_close(weights, stepped)


def test_client_batch_gives_each_client_what_it_would_get_alone(source: MemorySource) -> None:
    assert_each_gets_what_it_would_get_alone(source, PIECES)


RANGES = {
    "a suffix": [range(1, 5), range(2, 5)],
    "a prefix": [range(1, 3), range(1, 5)],
    "one inside another": [range(2, 4), range(1, 5), range(2, 4)],
    "they overlap": [range(1, 4), range(2, 5)],
    "nothing": [range(1, 2), range(3, 5)],
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_clients_share_the_blocks_that_both_have(source: MemorySource, ranges: list[range], recompute: bool) -> None:
    pieces = {
        name: replace(Piece.draw(seed, time=5 + seed, padded=seed == 1), blocks=blocks)
        for seed, (name, blocks) in enumerate(zip("abc", ranges, strict=False))
    }
    assert_each_gets_what_it_would_get_alone(source, pieces, recompute=recompute)


def test_shared_blocks_run_once_for_all(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[range, int]] = []
    through = Trunk._through

    def counted(self: Trunk, blocks: range, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        ran.append((blocks, len(hidden)))
        return through(self, blocks, hidden, lengths)

    monkeypatch.setattr(Trunk, "_through", counted)
    pieces = {"a": replace(PIECES["a"], blocks=range(1, 5)), "b": replace(PIECES["b"], blocks=range(2, 5))}
    assert_each_gets_what_it_would_get_alone(source, pieces)
    assert ran == [(range(1, 2), 2), (range(2, 5), 4)]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=5))
def test_stretches_cover_each_range_and_nothing_else(drawn: list[tuple[int, int]]) -> None:
    ranges = [range(start, start + length) for start, length in drawn]
    stretches = shared_stretches(ranges)
    for own in ranges:
        inside = [stretch for stretch in stretches if stretch.start in own]
        assert [block for stretch in inside for block in stretch] == list(own)
    assert {block for stretch in stretches for block in stretch} == {block for own in ranges for block in own}
    if len(set(ranges)) == 1:
        assert stretches == ranges[:1]


@pytest.mark.parametrize("scale", [1e6, -1e6, 1e30])
def test_records_gradients_enter_the_trunk_within_the_clip_norm(source: MemorySource, scale: float) -> None:
    """A client that sends 1e6 times its gradients moves the trunk as one whose records are just at the bound."""
    limit = float(PIECES["b"].gradient.flatten(1).norm(dim=1).max()) * 1.01  # the honest are within it
    lie = PIECES["a"].gradient * scale
    at_bound = lie / lie.double().flatten(1).norm(dim=1)[:, None, None] * limit

    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(gradient_clip_norm=limit), "ab") as bench:
            liar = replace(PIECES["a"], gradient=lie)
            await asyncio.gather(bench.both("a", piece=liar), bench.both("b"))
            return await bench.settled()

    bounded = replace(PIECES["a"], gradient=at_bound.float())
    assert_close(run(work), alone(source, [[bounded, PIECES["b"]]])[1])


def test_order_of_arrival_changes_no_bit(source: MemorySource) -> None:
    async def work(order: Sequence[str]) -> dict[str, Tensor]:
        async with Bench(source, federation()) as bench:
            for step in range(2):
                jobs = []
                for name in order:
                    jobs.append(asyncio.ensure_future(bench.both(name, step)))
                    await asyncio.sleep(0.002)
                await asyncio.gather(*jobs)
            return await bench.settled()

    first, *others = [run(lambda order=order: work(order)) for order in permutations("abc")]
    for weights in others:
        assert all(torch.equal(weights[name], tensor) for name, tensor in first.items())


def test_micro_batches_add_up_to_one_step(source: MemorySource) -> None:
    pieces = {(name, micro): Piece.draw(10 * micro + ord(name)) for name in "ab" for micro in range(3)}

    async def client(bench: Bench, name: str) -> None:
        for micro in range(3):
            await bench.both(name, 0, micro, pieces[name, micro])

    async def work() -> tuple[dict[str, Tensor], int]:
        async with Bench(source, federation(micro=3), "ab") as bench:
            await asyncio.gather(client(bench, "a"), client(bench, "b"))
            return await bench.settled(), bench.engine.steps_applied

    weights, steps = run(work)
    assert steps == 1
    assert_close(weights, alone(source, [list(pieces.values())])[1])


def test_clients_may_differ_in_their_micro_batches(source: MemorySource) -> None:
    """One brings its four records at once and the other one by one: the same step as if both had brought all."""
    whole = {name: Piece.draw(ord(name), batch=4) for name in "ab"}
    each_row = [
        Piece(Rows(whole["b"].rows.hidden[row : row + 1], None), 4, whole["b"].gradient[row : row + 1])
        for row in range(4)
    ]
    each_row[0] = replace(each_row[0], tokens=whole["b"].tokens - 3 * 4)

    async def together(micro: int) -> tuple[Tensor, dict[str, Tensor], int]:
        async with Bench(source, federation(steps=2), "") as bench:
            bench.engine.open_round(0, {"a": 1, "b": micro})
            pieces = each_row if micro == 4 else [whole["b"]]
            for step in range(2):
                of_a = asyncio.ensure_future(bench.both("a", step, 0, whole["a"]))
                of_b = [await bench.both("b", step, number, piece) for number, piece in enumerate(pieces)]
                await of_a
            return torch.cat([output for output, _ in of_b]), await bench.settled(), bench.engine.steps_applied

    apart, in_one = run(lambda: together(4)), run(lambda: together(1))
    torch.testing.assert_close(apart[0], in_one[0], atol=1e-6, rtol=1e-6)
    assert_close(apart[1], in_one[1])
    assert apart[2] == in_one[2] == 2


def test_next_step_waits_until_the_one_before_is_applied(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            backward_a = asyncio.ensure_future(bench.backward("a"))
            ahead = asyncio.ensure_future(bench.forward("a", 1))
            assert not await soon(asyncio.shield(ahead))
            await asyncio.gather(backward_a, bench.backward("b"))
            next_b = asyncio.ensure_future(bench.forward("b", 1))
            await asyncio.gather(ahead, next_b)
            assert bench.engine.steps_applied == 1

    run(work)


def test_sequential_steps_the_trunk_after_each_client(source: MemorySource) -> None:
    async def work() -> tuple[dict[str, Tensor], int]:
        async with Bench(source, federation(mode="sequential"), "ab") as bench:
            await bench.forward("a")
            waiting = asyncio.ensure_future(bench.both("b"))
            assert not await soon(asyncio.shield(waiting))  # a holds the trunk from its forward to its step
            await bench.backward("a")
            await waiting
            return await bench.settled(), bench.engine.steps_applied

    weights, steps = run(work)
    assert steps == 2
    assert_close(weights, alone(source, [[PIECES["a"]], [PIECES["b"]]])[1])


def test_evaluation_passes_while_a_step_is_in_work(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            piece = PIECES["c"]
            output = await bench.engine.forward("c", StepKey(0, 0, 0), BLOCKS, piece.rows, 0, False)
            with torch.no_grad():
                expected = bench.trunk.segment(piece.rows.hidden, piece.rows.lengths)
            torch.testing.assert_close(output, expected)

    run(work)


def test_evaluation_at_the_place_of_a_forward_that_waits_disturbs_nobody(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            waits = asyncio.ensure_future(bench.forward("a"))
            await asyncio.sleep(0)
            other = PIECES["b"]
            await bench.engine.forward("a", StepKey(0, 0, 0), BLOCKS, other.rows, other.tokens, False)
            await asyncio.gather(waits, bench.forward("b"))
            assert bench.engine.waiting == []

    run(work)


# clients that are late, leave, or skip


def test_client_that_misses_the_deadline_is_dropped_and_goes_on_with_the_next_step(source: MemorySource) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(step_deadline_s=0.3), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            await bench.backward("a")  # b is silent; the deadline ends its part of the step
            with pytest.raises(MissedError):
                await bench.backward("b")
            with pytest.raises(MissedError):
                await bench.forward("b")
            weights = await bench.settled()
            await asyncio.gather(bench.both("a", 1), bench.both("b", 1))
            await bench.settled()
            assert bench.engine.steps_applied == 2
            return weights

    assert_close(run(work), alone(source, [[PIECES["a"]]])[1])


def test_client_that_never_comes_misses_the_deadline_alone(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(step_deadline_s=0.2)) as bench:
            for step in range(2):
                await asyncio.gather(bench.both("a", step), bench.both("b", step))
            await bench.settled()
            assert bench.engine.steps_applied == 2

    run(work)


def test_deadline_spares_a_client_that_waits_for_the_server(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(step_deadline_s=0.2), "ab") as bench:
            blocker = threading.Event()
            held = asyncio.ensure_future(bench.engine.call(blocker.wait, 10.0))
            jobs = [asyncio.ensure_future(bench.both(name)) for name in "ab"]
            await asyncio.sleep(0.5)  # the compute thread is busy, well beyond the deadline
            blocker.set()
            await asyncio.gather(held, *jobs)

    run(work)


def test_deadline_comes_again_for_those_who_stop_later(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(step_deadline_s=0.2)) as bench:
            first = [asyncio.ensure_future(bench.forward(name)) for name in "ab"]
            await asyncio.gather(*first)  # after the deadline took c out
            await bench.backward("a")  # and b stops here
            await bench.settled()
            assert bench.engine.steps_applied == 1

    run(work)


def test_those_whom_others_wait_for_are_known(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            assert bench.engine.holding_up() == frozenset()  # no step is in work
            waits = asyncio.ensure_future(bench.forward("a"))
            await asyncio.sleep(0)
            assert bench.engine.holding_up() == {"b"}
            await asyncio.gather(waits, bench.forward("b"))
            assert bench.engine.holding_up() == frozenset()  # both compute

    run(work)


def test_in_turn_the_others_wait_for_the_one_whose_step_it_is(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(mode="sequential"), "ab") as bench:
            await bench.forward("a")
            assert bench.engine.holding_up() == frozenset()
            waits = asyncio.ensure_future(bench.forward("b"))
            await asyncio.sleep(0)
            assert bench.engine.holding_up() == {"a"}
            await bench.backward("a")
            await waits

    run(work)


def test_client_that_leaves_a_joint_graph_counts_no_more(source: MemorySource) -> None:
    async def work() -> tuple[Tensor, dict[str, Tensor]]:
        async with Bench(source, federation(), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            below = asyncio.ensure_future(bench.backward("a"))
            assert not await soon(asyncio.shield(below))
            bench.engine.leave_round("b")
            result = await below
            with pytest.raises(MissedError):
                await bench.backward("b")
            return result, await bench.settled()

    below, weights = run(work)
    expected, stepped = alone(source, [[PIECES["a"]]])
    torch.testing.assert_close(below, expected[0][1], atol=1e-5, rtol=1e-5)
    assert_close(weights, stepped)


def test_client_that_leaves_before_its_forward_holds_nobody_up(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            waiting = asyncio.ensure_future(bench.both("a"))
            assert not await soon(asyncio.shield(waiting))
            bench.engine.leave_round("b")
            await waiting

    run(work)


def test_client_that_sits_out_goes_on_with_the_next_step(source: MemorySource) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            bench.engine.sit_out("b", 0)
            await bench.backward("a")
            await asyncio.gather(bench.both("a", 1), bench.both("b", 1))
            return await bench.settled()

    pieces = [PIECES["a"], PIECES["b"]]
    assert_close(run(work), alone(source, [pieces[:1], pieces])[1])


@pytest.mark.parametrize("ahead", [1, 3])
def test_client_that_skips_ahead_holds_nobody_up(source: MemorySource, ahead: int) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            waiting = asyncio.ensure_future(bench.both("a"))
            assert not await soon(asyncio.shield(waiting))
            later = asyncio.ensure_future(bench.both("b", ahead))
            await waiting
            for step in range(1, ahead):
                await bench.both("a", step)
            await asyncio.gather(later, bench.both("a", ahead))

    run(work)


@pytest.mark.parametrize("key", [StepKey(1, 0, 0), StepKey(-1, 0, 0)])
def test_forward_of_another_round_is_missed(source: MemorySource, key: StepKey) -> None:
    async def work() -> None:
        async with Bench(source, federation()) as bench:
            piece = PIECES["a"]
            with pytest.raises(MissedError):
                await bench.engine.forward("a", key, BLOCKS, piece.rows, piece.tokens, True)
            with pytest.raises(MissedError):
                await bench.engine.backward("a", key, piece.gradient)

    run(work)


def test_forward_of_a_stranger_is_missed(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            with pytest.raises(MissedError):
                await bench.forward("c")

    run(work)


def test_forward_of_a_step_that_is_over_is_missed(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "a") as bench:
            await bench.both("a")
            await bench.settled()
            with pytest.raises(MissedError):
                await bench.forward("a", 0)

    run(work)


def test_second_forward_of_a_micro_batch_is_missed(source: MemorySource) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(), "ab") as bench:
            first = asyncio.ensure_future(bench.forward("a"))
            await asyncio.sleep(0)
            with pytest.raises(MissedError):
                await bench.forward("a")
            await asyncio.gather(first, bench.forward("b"))
            with pytest.raises(MissedError):
                await bench.forward("a")
            await asyncio.gather(bench.backward("a"), bench.backward("b"))
            return await bench.settled()

    assert_close(run(work), alone(source, [[PIECES["a"], PIECES["b"]]])[1])


def test_second_backward_of_a_micro_batch_is_missed(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "ab") as bench:
            await asyncio.gather(bench.forward("a"), bench.forward("b"))
            first = asyncio.ensure_future(bench.backward("a"))
            await asyncio.sleep(0)
            with pytest.raises(MissedError):
                await bench.backward("a")
            await asyncio.gather(first, bench.backward("b"))

    run(work)


def test_gradient_of_another_shape_is_refused(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "a") as bench:
            await bench.forward("a")
            with pytest.raises(ProtocolError, match="gradient"):
                await bench.engine.backward("a", StepKey(0, 0, 0), torch.zeros(1, 1, HIDDEN))
            await bench.backward("a")

    run(work)


# numbers that are none


def test_activations_that_overflow_in_the_trunk_spoil_their_own_client_alone(source: MemorySource) -> None:
    overflowing = Piece(Rows(torch.full((2, 7, HIDDEN), torch.inf), None), 14, torch.ones(2, 7, HIDDEN))

    async def work() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        async with Bench(source, federation(), "ab") as bench:
            output, bad = await asyncio.gather(bench.forward("a"), bench.forward("b", piece=overflowing))
            assert not torch.isfinite(bad).all()
            bench.engine.sit_out("b", 0)  # the coordinator does so when it cannot encode the output
            below = await bench.backward("a")
            return output, below, await bench.settled()

    output, below, weights = run(work)
    expected, stepped = alone(source, [[PIECES["a"]]])
    torch.testing.assert_close(output, expected[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(below, expected[0][1], atol=1e-5, rtol=1e-5)
    assert_close(weights, stepped)


def test_gradient_that_overflows_leaves_the_trunk_as_it_was(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "a") as bench:
            before = {name: weight.clone() for name, weight in bench.trunk.weights().items()}
            huge = Piece(PIECES["a"].rows, 13, torch.full_like(PIECES["a"].gradient, 3e38))
            await bench.both("a", piece=huge)
            assert all(torch.equal(before[name], weight) for name, weight in (await bench.settled()).items())
            await bench.both("a", 1)
            assert not all(torch.equal(before[name], weight) for name, weight in (await bench.settled()).items())

    run(work)


def test_only_tokens_that_trained_the_trunk_weigh_its_copy(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(micro=2), "a") as bench:
            huge = Piece(PIECES["a"].rows, 13, torch.full_like(PIECES["a"].gradient, 3e38))
            for micro in range(2):
                await bench.both("a", 0, micro, huge)
            for micro in range(2):
                await bench.both("a", 1, micro)
            await bench.both("a", 2, 0)  # and the round ends in mid-step
            bench.engine.end_round()
            await bench.settled()
            assert bench.trunk.round_tokens == dict.fromkeys(BLOCKS, 2 * PIECES["a"].tokens)

    run(work)


def test_tokens_of_a_step_that_ends_while_a_new_round_opens_count_in_neither(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(), "a") as bench:
            await bench.forward("a")
            blocker = threading.Event()
            held = asyncio.ensure_future(bench.engine.call(blocker.wait, 10.0))
            backward = asyncio.ensure_future(bench.backward("a"))
            await asyncio.sleep(0.01)
            applied = asyncio.ensure_future(bench.engine.call(bench.trunk.step, RATE))
            await asyncio.sleep(0.01)
            bench.engine.open_round(1, each(bench.settings, "a"))
            blocker.set()
            await asyncio.wait([held, backward, applied])
            await bench.settled()
            assert not bench.trunk.round_tokens

    run(work)


# a step that waits until the trunk is asked again


@pytest.mark.parametrize(("neighbours", "waits"), [("", False), ("a", False), ("ab", True), ("abc", True)])
def test_step_waits_while_all_it_answered_compute_on_its_cores(
    source: MemorySource, neighbours: str, waits: bool
) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(), "ab", neighbours) as bench:
            await asyncio.gather(bench.both("a"), bench.both("b"))
            await asyncio.sleep(SOON_S)
            assert bench.engine.steps_applied == (0 if waits else 1)
            assert (bench.engine.work is not None) == waits
            before_it = asyncio.ensure_future(bench.forward("a", 1))
            await asyncio.sleep(SOON_S)
            assert bench.engine.steps_applied == 1  # one that asks is enough
            await bench.forward("b", 1)
            await before_it
            await asyncio.gather(bench.backward("a", 1), bench.backward("b", 1))
            return await bench.settled()

    assert_close(run(work), alone(source, [[PIECES["a"], PIECES["b"]]] * 2)[1])


def test_trunk_that_leaves_cores_to_others_steps_at_once(source: MemorySource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)

    async def applied(threads: int) -> int:
        async with Bench(source, federation(), "a", "a") as bench:
            bench.engine.close()
            bench.engine = Engine(bench.trunk, bench.settings, threads)
            bench.engine.open_round(0, {"a": 1}, "a")
            await bench.both("a")
            await asyncio.sleep(SOON_S)
            return bench.engine.steps_applied

    assert [run(lambda threads=threads: applied(threads)) for threads in (0, 1, 4)] == [0, 1, 0]


def test_nobody_is_awaited_for_a_step_that_is_due(source: MemorySource) -> None:
    """Whom the others wait for then is the round's matter: somebody may owe the next step, or an update."""

    async def work() -> None:
        async with Bench(source, federation(), "ab", "ab") as bench:
            await asyncio.gather(bench.both("a"), bench.both("b"))
            await asyncio.sleep(SOON_S)
            assert bench.engine.work is not None
            assert bench.engine.awaited() is None
            assert not bench.engine.holding_up()

    run(work)


def test_step_waits_for_nobody_where_somebody_has_asked_already(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(mode="sequential"), "ab", "ab") as bench:
            await bench.forward("a")
            other = asyncio.ensure_future(bench.forward("b"))
            await asyncio.sleep(0)
            await bench.backward("a")
            await other
            assert bench.engine.steps_applied == 1

    run(work)


def test_evaluation_sees_the_step_that_was_due(source: MemorySource) -> None:
    async def judged(neighbours: str) -> Tensor:
        async with Bench(source, federation(), "a", neighbours) as bench:
            await bench.both("a")
            piece = PIECES["b"]
            return await bench.engine.forward("a", StepKey(0, 1, 0), piece.blocks, piece.rows, piece.tokens, False)

    assert torch.equal(run(lambda: judged("a")), run(lambda: judged("")))


@pytest.mark.parametrize("ends", [True, False])
def test_step_that_is_due_belongs_to_its_round_and_its_tokens_too(source: MemorySource, ends: bool) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(), "a", "a") as bench:
            await bench.both("a")
            if ends:
                bench.engine.leave_round("a")
                bench.engine.end_round()
                counted = await bench.engine.call(lambda: dict(bench.trunk.round_tokens))
                assert set(counted.values()) == {PIECES["a"].tokens}
            bench.engine.open_round(1, {"a": 1}, "a")
            weights = await bench.settled()
            assert bench.engine.steps_applied == 1
            assert not bench.trunk.round_tokens
            return weights

    assert_close(run(work), alone(source, [[PIECES["a"]]])[1])


# rounds


def test_round_that_opens_forgets_what_the_last_one_left(source: MemorySource) -> None:
    async def work() -> dict[str, Tensor]:
        async with Bench(source, federation(micro=2), "ab") as bench:
            await asyncio.gather(bench.both("a"), bench.both("b"))  # half a step: its gradients wait in the trunk
            late = [asyncio.ensure_future(bench.forward(name, 0, 1)) for name in "ab"]
            await asyncio.gather(*late)
            pending = asyncio.ensure_future(bench.backward("a", 0, 1))
            await asyncio.sleep(0.01)
            bench.engine.open_round(1, each(bench.settings, "a"))
            with pytest.raises(MissedError):
                await pending
            assert bench.engine.tokens_held == 0
            piece = PIECES["a"]
            for micro in range(2):
                key = StepKey(1, 0, micro)
                await bench.engine.forward("a", key, BLOCKS, piece.rows, piece.tokens, True)
                await bench.engine.backward("a", key, piece.gradient)
            return await bench.settled()

    assert_close(run(work), alone(source, [[PIECES["a"], PIECES["a"]]])[1])


def test_forward_that_runs_while_a_new_round_opens_gives_its_room_back(source: MemorySource) -> None:
    async def work() -> None:
        async with Bench(source, federation(max_tokens_in_flight=1), "a") as bench:
            blocker = threading.Event()
            held = asyncio.ensure_future(bench.engine.call(blocker.wait, 10.0))
            running = asyncio.ensure_future(bench.forward("a"))
            await asyncio.sleep(0.01)
            bench.engine.open_round(1, each(bench.settings, "a"))
            blocker.set()
            await held
            with pytest.raises(MissedError):
                await running
            piece = PIECES["a"]
            await bench.engine.forward("a", StepKey(1, 0, 0), BLOCKS, piece.rows, piece.tokens, True)
            await bench.engine.backward("a", StepKey(1, 0, 0), piece.gradient)
            await bench.settled()
            assert bench.engine.tokens_held == 0

    run(work)


# memory


def test_recomputed_gradients_are_the_same_bits(source: MemorySource) -> None:
    async def work(recompute: bool) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        async with Bench(source, federation(recompute=recompute)) as bench:
            results = [await asyncio.gather(*(bench.both(name, step) for name in "abc")) for step in range(2)]
            return results[0] + results[1], await bench.settled()

    kept, again = run(lambda: work(False)), run(lambda: work(True))
    for pair, same in zip(kept[0], again[0], strict=True):
        assert all(torch.equal(*tensors) for tensors in zip(pair, same, strict=True))
    assert all(torch.equal(weight, again[1][name]) for name, weight in kept[1].items())


def test_recomputing_trunk_keeps_no_activation_while_clients_compute(source: MemorySource) -> None:
    """So clients whose graphs have no room together are served together."""
    tokens = PIECES["a"].rows.hidden.shape[0] * PIECES["a"].rows.hidden.shape[1]

    async def both_wait(recompute: bool) -> bool:
        async with Bench(source, federation(max_tokens_in_flight=tokens, recompute=recompute), "ab") as bench:
            forwards = [asyncio.ensure_future(bench.forward(name)) for name in "ab"]
            together = await soon(asyncio.gather(*map(asyncio.shield, forwards)))
            assert bench.engine.tokens_held == (0 if recompute else tokens)
            assert all(joint.graph is None for joint in bench.engine.work.joints) == recompute  # type: ignore[union-attr]
            for name, forward in zip("ab", forwards, strict=True):
                await forward
                await bench.backward(name)
            await bench.settled()
            return together

    assert run(lambda: both_wait(True))
    assert not run(lambda: both_wait(False))


@pytest.mark.parametrize("recompute", [False, True])
def test_backward_of_a_round_that_ends_meanwhile_leaves_nothing(source: MemorySource, recompute: bool) -> None:
    async def work() -> None:
        async with Bench(source, federation(recompute=recompute), "a") as bench:
            await bench.forward("a")
            backward = asyncio.ensure_future(bench.backward("a"))
            while not bench.engine.work.joints[0].backward_started:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            bench.engine.open_round(1, each(bench.settings, "a"))
            with pytest.raises(MissedError):
                await backward
            await bench.settled()
            assert all(weight.grad is None for weight in bench.trunk.trainable().values())
            assert not bench.trunk.tokens

    run(work)


def test_backward_never_waits_behind_admission(source: MemorySource) -> None:
    async def work() -> None:
        tokens = PIECES["a"].rows.hidden.shape[0] * PIECES["a"].rows.hidden.shape[1]
        async with Bench(source, federation(max_tokens_in_flight=tokens), "ab") as bench:
            first = asyncio.ensure_future(bench.forward("a"))
            second = asyncio.ensure_future(bench.forward("b"))
            await first
            assert not await soon(asyncio.shield(second))  # no room
            await bench.backward("a")
            await second
            await bench.backward("b")

    run(work)


class FakeTrunk:
    """Arithmetic in place of a model: output = 2 x, gradient = 2 g. It notes how much memory graphs hold."""

    device = torch.device("cpu")

    def __init__(
        self, *, fails: Callable[[], bool] = lambda: False, backward_fails: Callable[[], bool] = lambda: False
    ) -> None:
        self.round_tokens: dict[int, int] = {}
        self.steps = 0
        self.cleared = 0
        self.fails = fails
        self.backward_fails = backward_fails

    def forward(
        self, blocks: Sequence[range], clients: Sequence[Rows], *, keep_graph: bool
    ) -> tuple[list[Tensor], Graph | None]:
        if self.fails():
            raise RuntimeError("out of memory")
        outputs = [2 * rows.hidden for rows in clients]
        shapes = [(rows.hidden.shape[0], rows.hidden.shape[1]) for rows in clients]
        return outputs, Graph(blocks, outputs[0], outputs[0], shapes) if keep_graph else None

    def backward(self, graph: Graph, gradients: Sequence[Tensor | None], tokens: Sequence[int]) -> list[Tensor]:
        assert len(gradients) == len(graph.shapes) == len(tokens)
        if self.backward_fails():
            raise RuntimeError("out of memory")
        return [torch.zeros(1) if gradient is None else 2 * gradient for gradient in gradients]

    def step(self, rate: float) -> float:
        self.steps += 1
        return rate

    def clear(self) -> None:
        self.cleared += 1


async def play(engine: Engine, name: str, steps: int, micro: int, blocks: range, behave: random.Random) -> int:
    """An honest client of any temper: it sometimes sits out; how many steps it finished."""
    finished = 0
    for step in range(steps):
        try:
            for number in range(micro):
                if behave.random() < 0.1:
                    engine.sit_out(name, step)
                    raise MissedError
                rows = Rows(torch.ones(behave.randint(1, 3), behave.randint(1, 5), 1), None)
                key = StepKey(0, step, number)
                output = await engine.forward(name, key, blocks, rows, 1, True)
                assert output.shape == rows.hidden.shape
                await asyncio.sleep(behave.random() * 0.002)
                below = await engine.backward(name, key, rows.hidden)
                assert torch.equal(below, 2 * rows.hidden)
            finished += 1
        except MissedError:
            continue
    engine.leave_round(name)
    return finished


@given(
    seed=st.integers(0, 2**32),
    clients=st.integers(1, 4),
    micro=st.integers(1, 3),
    limit=st.sampled_from([1, 10, 30, 10**6]),
    mode=st.sampled_from(["client-batch", "sequential"]),
    cuts=st.integers(1, 3),
    near=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_honest_clients_never_hang_whatever_the_memory(
    seed: int, clients: int, micro: int, limit: int, mode: str, cuts: int, near: int
) -> None:
    async def work() -> None:
        chance = random.Random(seed)
        chosen = federation(micro=micro, mode=mode, max_tokens_in_flight=limit)
        trunk = FakeTrunk()
        engine = Engine(trunk, chosen)  # type: ignore[arg-type]
        names = [f"client-{number}" for number in range(clients)]
        micros = {name: chance.randint(1, micro) for name in names}
        engine.open_round(0, micros, names[:near])
        jobs = [
            play(engine, name, 6, micros[name], range(1, 2 + number % cuts), random.Random(chance.random()))
            for number, name in enumerate(names)
        ]
        await asyncio.gather(*jobs)
        await engine.call(lambda: None)
        while engine.work is not None:
            await asyncio.sleep(0.001)
        assert engine.tokens_held == 0
        assert engine.waiting == []
        engine.close()

    run(work)


@pytest.mark.parametrize("mode", ["client-batch", "sequential"])
def test_forward_that_fails_inside_holds_nobody_up(mode: str) -> None:
    async def work() -> None:
        failures = iter([True])
        trunk = FakeTrunk(fails=lambda: next(failures, False))
        engine = Engine(trunk, federation(mode=mode))  # type: ignore[arg-type]
        engine.open_round(0, {"a": 1, "b": 1})
        rows = Rows(torch.ones(2, 3, 1), None)

        async def client(name: str) -> list[str]:
            story = []
            for step in range(2):
                key = StepKey(0, step, 0)
                try:
                    await engine.forward(name, key, range(1, 2), rows, 1, True)
                    await engine.backward(name, key, rows.hidden)
                    story.append("done")
                except RuntimeError:
                    story.append("failed")
            return story

        stories = await asyncio.gather(client("a"), client("b"))
        assert stories in ([["failed", "done"]] * 2, [["failed", "done"], ["done", "done"]])
        assert engine.tokens_held == 0
        engine.close()

    run(work)


@pytest.mark.parametrize("failing", [0, 1])
def test_step_whose_backward_fails_is_void_for_all_of_it(failing: int) -> None:
    """Of two micro-batches' gradients one would be missing."""

    async def work() -> None:
        failures = iter([number == failing for number in range(2)])
        trunk = FakeTrunk(backward_fails=lambda: next(failures, False))
        engine = Engine(trunk, federation(micro=2))  # type: ignore[arg-type]
        engine.open_round(0, {"a": 2, "b": 2})
        rows = Rows(torch.ones(2, 3, 1), None)

        async def hops(name: str, step: int, micro: int) -> str:
            key = StepKey(0, step, micro)
            try:
                await engine.forward(name, key, range(1, 2), rows, 1, True)
                await engine.backward(name, key, rows.hidden)
            except (RuntimeError, MissedError) as error:
                return type(error).__name__
            return "done"

        async def client(name: str, step: int) -> list[str]:
            return [await hops(name, step, micro) for micro in range(2)]

        story = ["done"] * failing + ["RuntimeError"] + ["MissedError"] * (1 - failing)
        assert await asyncio.gather(client("a", 0), client("b", 0)) == [story] * 2
        assert trunk.steps == 0
        assert await asyncio.gather(client("a", 1), client("b", 1)) == [["done"] * 2] * 2
        while engine.work is not None:
            await asyncio.sleep(0.001)
        assert (trunk.steps, trunk.cleared, engine.tokens_held) == (1, 1, 0)
        engine.close()

    run(work)


def test_micro_batch_before_those_that_come_first_is_refused(source: MemorySource) -> None:
    async def scenario() -> None:
        async with Bench(source, federation(micro=2), cohort="a") as bench:
            with pytest.raises(ProtocolError, match="micro-batch 1 before those that come first"):
                await bench.forward("a", micro=1)
            for micro in range(2):
                await bench.both("a", micro=micro)
            await bench.settled()
            assert bench.engine.steps_applied == 1

    asyncio.run(scenario())
