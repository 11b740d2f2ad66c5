"""The step size as a pure function of (round, step)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.config import Federation, parse_federation
from splitfl.federation.schedule import client_learning_rate, learning_rate, round_step_sizes

PEAK = 0.01


def federation(count: int = 4, local_steps: int = 5, **optimizer: Any) -> Federation:
    table = {
        "rounds": {"count": count, "local_steps": local_steps},
        "optimizer": {"learning_rate": PEAK, **optimizer},
    }
    return parse_federation(table, "the test")


def rates(settings: Federation) -> list[float]:
    rounds = settings.rounds
    return [
        learning_rate(settings, round_, step) for round_ in range(rounds.count) for step in range(rounds.local_steps)
    ]


def test_constant_schedule_is_constant() -> None:
    assert set(rates(federation(schedule="constant"))) == {PEAK}


def test_warm_up_rises_in_a_line_to_the_peak() -> None:
    found = rates(federation(schedule="constant", warmup_steps=4))
    assert found[:5] == pytest.approx([PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])


def test_warm_up_goes_on_across_rounds() -> None:
    found = rates(federation(schedule="constant", warmup_steps=8))
    assert found[5:8] == pytest.approx([PEAK * 6 / 8, PEAK * 7 / 8, PEAK])


def test_cosine_falls_from_the_peak_towards_its_final_fraction() -> None:
    found = rates(federation(final_fraction=0.1))
    assert found[0] == PEAK
    assert found == sorted(found, reverse=True)
    assert found[10] == pytest.approx(PEAK * 0.55)  # half way
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20))
    assert found[-1] == pytest.approx(PEAK * expected)


def test_cosine_does_not_rise_again_beyond_the_last_round() -> None:
    settings = federation(final_fraction=0.2)
    assert learning_rate(settings, 99, 0) == pytest.approx(PEAK * 0.2)


def test_warm_up_longer_than_the_federation_never_peaks() -> None:
    assert max(rates(federation(warmup_steps=100))) == pytest.approx(PEAK * 20 / 100)


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 40),
    st.sampled_from(["cosine", "constant"]),
    st.floats(0, 1),
)
def test_step_size_is_positive_or_zero_and_never_above_the_peak(
    count: int, local_steps: int, warmup: int, schedule: str, final: float
) -> None:
    settings = federation(count, local_steps, warmup_steps=warmup, schedule=schedule, final_fraction=final)
    assert all(0 <= rate <= PEAK * (1 + 1e-9) for rate in rates(settings))


@given(st.integers(1, 5), st.integers(1, 5))
def test_rounds_and_steps_are_one_line_of_steps(count: int, local_steps: int) -> None:
    assert rates(federation(count, local_steps)) == rates(federation(1, count * local_steps))


def test_clients_step_size_follows_the_same_schedule_to_its_own_peak() -> None:
    settings = federation(schedule="cosine", warmup_steps=3, client_name="sgd", client_learning_rate=5 * PEAK)
    places = [(round_, step) for round_ in range(4) for step in range(5)]
    assert [client_learning_rate(settings, *place) for place in places] == pytest.approx(
        [5 * rate for rate in rates(settings)]
    )
    assert round_step_sizes(settings, 1) == pytest.approx(5 * sum(rates(settings)[5:10]))


def test_clients_step_size_is_the_trunks_unless_it_is_set() -> None:
    settings = federation(warmup_steps=3)
    assert client_learning_rate(settings, 2, 1) == learning_rate(settings, 2, 1)
