"""The accountant against published values, against opacus, and against mistakes that accountants make."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from splitfl.errors import ConfigError
from splitfl.privacy.accounting import (
    delta_of,
    epsilon_of,
    group_mu,
    guess_bound,
    mean_bits,
    mu_for,
    mu_squared,
    replace_one,
    sigma_for,
)
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.policy import DpSgd

DELTA = 1e-5


@pytest.mark.parametrize(
    ("ratio", "releases", "epsilon"), [(1, 2, 6.573), (1, 10, 17.857), (2, 2, 2.943), (5, 10, 2.594), (10, 100, 4.377)]
)
def test_pinned_epsilons_of_equal_releases(ratio: float, releases: int, epsilon: float) -> None:
    mu = math.sqrt(releases * mu_squared(1.0, ratio))
    assert epsilon_of(mu, DELTA) == pytest.approx(epsilon, abs=5e-4)


def test_replace_one_and_not_add_remove_and_not_summed_epsilons() -> None:
    releases = [(replace_one(1.0), 4.0), *[(replace_one(0.5), 5.0)] * 3]
    mu = math.sqrt(sum(mu_squared(*release) for release in releases))
    assert mu**2 == pytest.approx(0.37)
    assert epsilon_of(mu, DELTA) == pytest.approx(2.4829, abs=1e-4)
    assert epsilon_of(mu / 2, DELTA) == pytest.approx(1.1490, abs=1e-4)
    summed = sum(epsilon_of(math.sqrt(mu_squared(*release)), DELTA) for release in releases)
    assert summed == pytest.approx(4.1697, abs=1e-4)


def test_clipping_tokens_is_counted_over_the_whole_record() -> None:
    mechanism = Mechanism("token", 1.0, 0.36)
    mu = math.sqrt(mu_squared(mechanism.sensitivity(64), mechanism.sigma))
    assert mu**2 == pytest.approx(1975.31, abs=5e-3)
    assert epsilon_of(mu, DELTA) == pytest.approx(1176.25, abs=5e-3)
    assert epsilon_of(mu / 8, DELTA) == pytest.approx(38.3861, abs=1e-4)


def test_a_second_draw_is_charged_and_sending_again_is_not() -> None:
    mu = math.sqrt(0.3**2 + 0.4**2)
    assert epsilon_of(mu, DELTA) == pytest.approx(1.9931, abs=1e-4)
    assert epsilon_of(0.4, DELTA) == pytest.approx(1.5550, abs=1e-4)
    assert epsilon_of(math.sqrt(10) * mu, DELTA) == pytest.approx(7.5113, abs=1e-4)


def test_dp_sgd_of_opacus_is_doubled_before_it_is_added() -> None:
    once, dp_sgd = mu_squared(replace_one(1.0), 1.0), DpSgd(1.0, 4.0)
    mu = math.sqrt(once + 20 * mu_squared(dp_sgd.sensitivity, dp_sgd.sigma))
    assert mu**2 == pytest.approx(9)
    assert epsilon_of(mu, DELTA) == pytest.approx(16.6755, abs=1e-4)
    mixed = math.sqrt(once + 20 * mu_squared(1.0, 4.0))
    assert epsilon_of(mixed, DELTA) == pytest.approx(11.8353, abs=1e-4)


def test_calibration_reaches_its_target() -> None:
    assert mu_for(8.0, DELTA) ** 2 == pytest.approx(2.776, abs=1e-3)
    assert sigma_for(8.0, DELTA, replace_one(1.0), 1) == pytest.approx(1.2005, abs=1e-4)


@given(st.floats(0.05, 500), st.sampled_from([1e-9, 1e-7, 1e-5, 1e-3]))
def test_calibration_inverts_the_accountant(epsilon: float, delta: float) -> None:
    assert epsilon_of(mu_for(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-6)


@pytest.mark.parametrize(("ratio", "releases"), [(1, 2), (2, 2), (5, 10), (10, 100)])
def test_opacus_accountants_agree(ratio: float, releases: int) -> None:
    ours = epsilon_of(math.sqrt(releases * mu_squared(1.0, ratio)), DELTA)
    prv, rdp = PRVAccountant(), RDPAccountant()
    for accountant in (prv, rdp):
        for _ in range(releases):
            accountant.step(noise_multiplier=float(ratio), sample_rate=1.0)
    assert ours <= prv.get_epsilon(DELTA) <= ours + 0.02
    assert ours <= rdp.get_epsilon(DELTA) <= 1.25 * ours  # a bound, and a looser one


def test_calibration_agrees_with_opacus_where_that_converges() -> None:
    theirs = get_noise_multiplier(
        target_epsilon=3.0, target_delta=DELTA, sample_rate=1.0, steps=10, accountant="prv", epsilon_tolerance=1e-3
    )
    assert sigma_for(3.0, DELTA, 1.0, 10) == pytest.approx(theirs, rel=0.01)


def test_no_noise_has_no_epsilon() -> None:
    assert math.isinf(mu_squared(1.0, 0.0))
    assert mu_squared(0.0, 0.0) == 0.0  # depends on no record
    assert math.isinf(epsilon_of(math.inf, DELTA))
    assert delta_of(math.inf, 3.0) == 1.0


@pytest.mark.parametrize("rate", [0.01, 0.0, 2.0, math.nan])
def test_amplification_by_subsampling_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="no amplification"):
        sigma_for(8.0, DELTA, 2.0, 1, sampling_rate=rate)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e12])
def test_a_target_that_no_noise_reaches_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError):
        sigma_for(epsilon, DELTA, 1.0, 1)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="delta"):
        epsilon_of(1.0, delta)


def test_bits_and_guesses() -> None:
    mu = mu_for(8.0, DELTA)
    assert mean_bits(mu) == pytest.approx(0.5, abs=0.01)  # epsilon 8 allows half a bit a record
    assert guess_bound(0.0, 0.3) == pytest.approx(0.3)
    assert guess_bound(mu, 0.5) == pytest.approx(0.7976, abs=1e-3)
    assert guess_bound(math.inf, 0.1) == 1.0


def test_several_records_of_one_person() -> None:
    assert group_mu(0.5, 4, direct=True) == pytest.approx(1.0)
    assert group_mu(0.5, 4, direct=False) == pytest.approx(2.0)
