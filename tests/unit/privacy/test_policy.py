"""Policies: noise that keeps the target whatever the workload, each kind with its part."""

from __future__ import annotations

import math

import pytest
from gates import private_settings
from hypothesis import given
from hypothesis import strategies as st

from splitfl.config import Federation
from splitfl.errors import ConfigError
from splitfl.privacy.accounting import epsilon_of, mu_squared
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.policy import Policy, Workload, policy_of


def work(records: int = 10, steps: int = 15) -> Workload:
    return Workload(records, held_out=0, draws=2 * steps, steps=steps, padded_length=8)


def certified(workload: Workload, **privacy: object) -> Policy:
    settings = private_settings("certified", **{"dp_sgd": True, "gradients": "noised"} | privacy)
    return policy_of(settings, workload)


def mechanisms(policy: Policy) -> tuple[Mechanism, Mechanism]:
    assert policy.activations is not None
    assert policy.gradients is not None
    return policy.activations, policy.gradients


@given(st.integers(1, 300), st.integers(1, 100), st.floats(0.1, 100), st.sampled_from(["token", "record"]))
def test_certified_noise_spends_the_whole_target_on_a_record_and_no_more(
    records: int, steps: int, epsilon: float, clip: str
) -> None:
    policy = certified(work(records, steps), epsilon=epsilon, clip=clip)
    activations, gradients = mechanisms(policy)
    assert policy.dp_sgd is not None
    again = work(records, steps).participations
    total = mu_squared(activations.sensitivity(8), activations.sigma)
    total += again * mu_squared(gradients.sensitivity(8), gradients.sigma)
    total += again * mu_squared(policy.dp_sgd.sensitivity, policy.dp_sgd.sigma)
    assert epsilon_of(math.sqrt(total), policy.delta) == pytest.approx(epsilon, rel=1e-6)


def test_certified_noise_of_a_whole_client_counts_all_its_records_and_their_joint_sums() -> None:
    policy = certified(work(), unit="client")
    activations, gradients = mechanisms(policy)
    assert policy.dp_sgd is not None
    total = 10 * mu_squared(activations.sensitivity(8), activations.sigma)
    total += 30 * mu_squared(gradients.sensitivity(8), gradients.sigma)
    total += 15 * mu_squared(2 * policy.dp_sgd.sensitivity, policy.dp_sgd.sigma)  # steps of two records
    assert epsilon_of(math.sqrt(total), policy.delta) == pytest.approx(8.0, rel=1e-6)


def test_a_small_share_of_the_records_in_a_step_buys_nothing() -> None:
    """As many participations of a record among thousands as among few: no amplification by subsampling."""
    few, many = certified(work(records=2, steps=1)), certified(work(records=2000, steps=1000))
    assert few.dp_sgd == many.dp_sgd
    assert mechanisms(few) == mechanisms(many)


def test_with_privacy_off_there_is_no_mechanism_and_no_bound() -> None:
    policy = policy_of(Federation(), work())
    assert (policy.private, policy.activations, policy.gradients, policy.dp_sgd) == (False, None, None, None)
    assert policy.record_budget == math.inf
    assert policy.noise == {"activations": 0.0, "gradients": 0.0, "weights": 0.0}


def test_measured_noise_is_what_the_settings_name_in_clip_norms() -> None:
    policy = policy_of(private_settings(level="strong", clip_norm=3.0), work())
    assert policy.activations == Mechanism("token", 3.0, 3.0)
    assert (policy.gradients, policy.dp_sgd) == (None, None)
    assert policy.noise == {"activations": 1.0, "weights": 0.0}


def test_noise_that_rounds_to_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="rounds to zero"):
        policy_of(private_settings(noise_multiplier=1e-300, clip_norm=1e-100), work())


def test_a_clip_norm_that_nobody_settled_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip_norm is not settled"):
        policy_of(private_settings(clip_norm=None), work())


@pytest.mark.parametrize("settings", [Federation(), private_settings()])
@pytest.mark.parametrize("trains", [True, False])
def test_a_policy_knows_whether_the_bottom_trains(settings: Federation, trains: bool) -> None:
    assert policy_of(settings, work(), bottom_trains=trains).bottom_trains == trains
