"""A step as a pipeline, against a simulation of it that moves one micro-batch after another through the stages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_model.trainer import Awaits, Crossing, in_turn
from splitfl.config import parse_federation
from splitfl.cut import Cut
from splitfl.planning.capability import Arithmetic, LinkSpeed
from splitfl.planning.carried import Carried
from splitfl.planning.plan import Plan
from splitfl.planning.shapes import ModelShape
from splitfl.planning.timing import PIECE_S, STAGES, step_seconds, time_parts

SHAPE = ModelShape(8, 512, 1408, 8, 4, 64, 16_000, tied=False)
OWN, TRUNK, LINK = Arithmetic(4e-4, 1e-4, 2e-4), Arithmetic(4e-5, 1e-5, 0.0), LinkSpeed(0.1, 1e6, 2e6)
TOKENS = 8 * 256


def parts(cut: Cut, plan: Plan, **tables: Any) -> dict[str, float]:
    return time_parts(Carried(SHAPE, parse_federation(tables, "the test"), cut), plan, OWN, TRUNK, LINK)


def plan(cut: Cut, pieces: int = 1, in_flight: int = 1, codec: str = "bf16") -> Plan:
    return Plan(cut, pieces, "fp32", codec, in_flight)


def test_frozen_bottom_sends_and_takes_what_the_trainer_does() -> None:
    cut = Cut(2, 1)
    found = parts(cut, plan(cut), model={"max_bottom": 2})
    assert found["client_s"] == pytest.approx(TOKENS * (2 * 1e-4 + 4e-4 + 2e-4) + PIECE_S)
    assert found["up_s"] == pytest.approx(2 * TOKENS * 512 * 2 / 1e6)  # activation and gradient
    assert found["down_s"] == pytest.approx(TOKENS * 512 * 2 / 2e6)  # hidden states alone
    assert found["trunk_s"] == pytest.approx(TOKENS * 5 * 4e-5)
    assert found["latency_s"] == pytest.approx(2 * 0.1)


def test_bottom_that_trains_is_owed_a_gradient() -> None:
    cut = Cut(1, 1)
    found = parts(cut, plan(cut, codec="fp32"), model={"freeze_below": 0})
    assert found["down_s"] == pytest.approx(2 * TOKENS * 512 * 4 / 2e6)
    assert found["client_s"] == pytest.approx(TOKENS * (2 * 4e-4 + 2e-4) + PIECE_S)


def test_trunk_that_takes_no_gradient_runs_forward_in_one_hop() -> None:
    cut = Cut(1, 1)
    found = parts(cut, plan(cut), privacy={"mode": "measured"}, release={"rank": 16})
    assert found["trunk_s"] == pytest.approx(TOKENS * 6 * 1e-5)
    assert found["up_s"] == pytest.approx(TOKENS * 16 * 2 / 1e6)
    assert found["latency_s"] == pytest.approx(0.1)


def test_blocks_of_the_trunk_below_the_lowest_that_trains_run_forward_alone() -> None:
    cut = Cut(1, 1)
    found = parts(cut, plan(cut), model={"freeze_below": 4})
    assert found["trunk_s"] == pytest.approx(TOKENS * (3 * 1e-5 + 3 * 4e-5))


def test_empty_trunk_waits_for_nobody_but_still_sends_its_update() -> None:
    cut = Cut(0, 8)
    found = parts(cut, plan(cut), model={"min_bottom": 0, "max_top": 8, "freeze_below": 0})
    assert step_seconds(found, plan(cut), backward=False) == found["client_s"]
    assert found["update_s"] == pytest.approx(4 * SHAPE.weights * (1 / 1e6 + 1 / 2e6) / 10, rel=0.01)


def test_dp_sgd_runs_a_bottom_that_trains_twice() -> None:
    cut, privacy = Cut(1, 1), {"mode": "measured", "gradients": "noised"}
    plain = parts(cut, plan(cut), model={"freeze_below": 0}, privacy=privacy)
    private = parts(cut, plan(cut), model={"freeze_below": 0}, privacy={**privacy, "dp_sgd": True})
    assert private["client_s"] - plain["client_s"] == pytest.approx(TOKENS * 1e-4)


seconds = st.floats(0, 10)


def simulated(stages: list[float], latency: float, pieces: int, in_flight: int, hops: int) -> float:
    """The trainer's own order of micro-batches, on a clock of its own: a crossing is ``hops`` ways there and back.

    Stages and latency are of all hops of a micro-batch; way up, trunk and way down take one at a time.
    """
    client, *there_and_back = stages
    clock, free = [0.0], [0.0] * len(there_and_back)

    def hop() -> float:
        at = clock[0]
        for number, takes in enumerate(there_and_back):
            at = free[number] = max(at, free[number]) + takes / hops
        return at + latency / hops

    def crossing() -> Iterator[Awaits]:
        clock[0] += 0.2 * client
        for awaits in (Awaits.OUTPUT, Awaits.GRADIENT)[:hops]:
            back = hop()
            yield awaits
            clock[0] = max(clock[0], back) + 0.8 * client / hops

    for _ in in_turn((cast(Crossing, crossing()) for _ in range(pieces)), in_flight):
        pass
    return clock[0]


def predicted(stages: Sequence[float], latency: float, pieces: int, in_flight: int, hops: int) -> float:
    found = {name: pieces * takes for name, takes in zip(STAGES, stages, strict=True)} | {"latency_s": pieces * latency}
    return step_seconds(found, plan(Cut(1, 1), pieces, in_flight), backward=hops == 2)


@given(st.tuples(seconds, seconds, seconds, seconds), seconds, st.integers(1, 16), st.integers(1, 8), st.integers(1, 2))
def test_step_takes_about_what_the_trainer_would_take(
    stages: tuple[float, float, float, float], latency: float, pieces: int, in_flight: int, hops: int
) -> None:
    exact = simulated(list(stages), latency, pieces, in_flight, hops)
    assert 0.85 * exact - 1e-9 <= predicted(stages, latency, pieces, in_flight, hops) <= 1.6 * exact + 1e-9


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 8])
@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 8, 16])
def test_step_that_waits_for_the_link_alone_takes_what_the_trainer_takes(
    pieces: int, in_flight: int, hops: int
) -> None:
    nothing = [0.0, 0.0, 0.0, 0.0]
    exact = simulated(nothing, 0.1 * hops, pieces, in_flight, hops)
    assert predicted(nothing, 0.1 * hops, pieces, in_flight, hops) == pytest.approx(exact)
