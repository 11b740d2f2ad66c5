"""From a target to noise: all of the target is used, none of it is broken, and what cannot be had is one error."""

from __future__ import annotations

import math

import pytest
from gates import private_settings
from hypothesis import given
from hypothesis import strategies as st

from splitfl.errors import ConfigError
from splitfl.privacy.accounting import LEAST_EPSILON, MOST_EPSILON, epsilon_of, mu_for, mu_squared, sigma_for
from splitfl.privacy.budget import ROUNDING
from splitfl.privacy.policy import Policy, Workload, policy_of

EPSILON = st.floats(1e-3, 1e3)
DELTA = st.floats(-12, -1).map(lambda exponent: 10**exponent)
SENSITIVITY = st.floats(1e-3, 1e3)
RELEASES = st.integers(1, 10_000)
MORE = st.floats(1.001, 1e3)  # a factor


def epsilon_by_closed_form(sigma: float, delta: float, sensitivity: float, releases: int) -> float:
    return epsilon_of(math.sqrt(releases * mu_squared(sensitivity, sigma)), delta)


@given(EPSILON, DELTA, SENSITIVITY, RELEASES)
def test_calibrated_noise_keeps_the_target_and_wastes_none_of_it(
    epsilon: float, delta: float, sensitivity: float, releases: int
) -> None:
    sigma = sigma_for(epsilon, delta, sensitivity, releases)
    spent = epsilon_by_closed_form(sigma, delta, sensitivity, releases)
    assert 0.99 * epsilon <= spent <= ROUNDING * epsilon


@given(EPSILON, DELTA, SENSITIVITY, st.integers(1, 100), MORE)
def test_more_privacy_more_releases_and_larger_ones_take_more_noise(
    epsilon: float, delta: float, sensitivity: float, releases: int, more: float
) -> None:
    sigma = sigma_for(epsilon, delta, sensitivity, releases)
    assert sigma_for(epsilon * more, delta, sensitivity, releases) < sigma
    assert sigma_for(epsilon, min(0.5, delta * more), sensitivity, releases) < sigma
    assert sigma_for(epsilon, delta, sensitivity * more, releases) == pytest.approx(sigma * more)
    assert sigma_for(epsilon, delta, sensitivity, releases * 4) == pytest.approx(sigma * 2)


@given(
    st.floats(math.log(LEAST_EPSILON), math.log(0.999 * MOST_EPSILON)).map(math.exp),
    st.floats(-320, -1e-12).map(lambda exponent: 10**exponent),
)
def test_every_target_in_range_gets_noise(epsilon: float, delta: float) -> None:
    assert 0 < mu_for(epsilon, delta) < math.inf


NO_NUMBER = [0.0, -1.0, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("epsilon", [*NO_NUMBER, 5e-324, 1e-300, 1e-8, 1e9])
@pytest.mark.parametrize("delta", [1e-9, 1e-5])
def test_epsilon_that_no_noise_reaches_is_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError, match=r"epsilon = .* cannot be reached\. Choose one from"):
        sigma_for(epsilon, delta, 1.0, 1)


@pytest.mark.parametrize("delta", [*NO_NUMBER, 1.0])
def test_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ConfigError, match="is no probability"):
        sigma_for(8.0, delta, 1.0, 1)


@pytest.mark.parametrize(
    ("sensitivity", "releases"), [*((wrong, 1) for wrong in NO_NUMBER), *((1.0, wrong) for wrong in (*NO_NUMBER, 0.5))]
)
def test_sensitivity_or_number_of_releases_that_is_none_is_refused(sensitivity: float, releases: float) -> None:
    with pytest.raises(ConfigError, match="no noise fits"):
        sigma_for(8.0, 1e-5, sensitivity, releases)


# -- kinds of releases -------------------------------------------------------------------------------------------------

KINDS = [{}, {"dp_sgd": True}, {"gradients": "noised", "dp_sgd": True}]


def certified(*, records: int = 10, steps: int = 15, **privacy: object) -> Policy:
    """Steps of two records of 8 tokens."""
    work = Workload(records, held_out=0, draws=2 * steps, steps=steps, padded_length=8)
    return policy_of(private_settings("certified", **privacy), work)


def noises(policy: Policy) -> dict[str, float]:
    """sigma by kind, of the kinds that are released."""
    parts = {"activations": policy.activations, "gradients": policy.gradients, "dp_sgd": policy.dp_sgd}
    return {kind: part.sigma for kind, part in parts.items() if part is not None}


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize("privacy", KINDS)
def test_each_kind_more_that_is_released_takes_noise_from_a_smaller_part(privacy: dict[str, object], unit: str) -> None:
    """Parts are equal, so the same kind alone is sqrt(number of kinds) quieter."""
    alone = noises(certified(unit=unit))["activations"]
    together = noises(certified(unit=unit, **privacy))
    assert len(together) == 1 + len(privacy)
    assert together["activations"] == pytest.approx(alone * math.sqrt(len(together)))


@pytest.mark.parametrize("unit", ["record", "client"])
@given(epsilon=st.floats(0.1, 100), steps=st.integers(1, 100), more=st.floats(1.01, 10))
def test_noise_of_every_kind_grows_as_the_target_shrinks_and_with_steps(
    unit: str, epsilon: float, steps: int, more: float
) -> None:
    both = {"gradients": "noised", "dp_sgd": True, "unit": unit}
    here = noises(certified(epsilon=epsilon, steps=steps, **both))
    stricter = noises(certified(epsilon=epsilon / more, steps=steps, **both))
    longer = noises(certified(epsilon=epsilon, steps=10 * steps, **both))
    assert all(stricter[kind] > here[kind] for kind in here)
    assert longer["activations"] == here["activations"]  # released once, whatever the steps
    assert longer["gradients"] > here["gradients"]
    assert longer["dp_sgd"] > here["dp_sgd"]


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize("epsilon", [1e-8, 1e12])
def test_client_that_cannot_keep_the_target_says_so_before_anything_is_made(unit: str, epsilon: float) -> None:
    with pytest.raises(ConfigError, match="cannot be reached"):
        certified(epsilon=epsilon, unit=unit)
