"""What Gaussian releases are worth: epsilon, delta and how they compose. Arithmetic alone.

A release of sensitivity S under isotropic Gaussian noise of standard deviation sigma is mu-Gaussian-DP with
mu = S / sigma. Releases compose as mu^2 = sum of mu_i^2, adaptively too (Dong, Roth and Su 2022, corollary 3.3;
as a filter on a budget fixed beforehand: Smith and Thakurta 2022). epsilon(delta) is Balle and Wang's closed form
(ICML 2018, theorem 8), exact and not a bound.

Neighbours differ in one record, replaced by another of the same public padded length. A mechanism that clips to
norm C has sensitivity 2C there. Figures for add/remove neighbours (opacus' DP-SGD: C) must be converted first:
``replace_one``. There is no amplification by subsampling here: the server sees who takes part in what, and
``sigma_for`` refuses to count on it.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from splitfl.errors import ConfigError

LEAST_MU, MOST_MU = 1e-9, 1e5  # at any delta, epsilon is below and above what follows
LEAST_EPSILON, MOST_EPSILON = 1e-6, 1e9


def mu_squared(sensitivity: float, sigma: float) -> float:
    """What a release adds to mu^2: L2 ``sensitivity`` (replace-one) and ``sigma`` of its noise, in the same unit.

    Infinite without noise, 0 for what depends on no record.
    """
    if sensitivity == 0:
        return 0.0
    return (sensitivity / sigma) ** 2 if sigma > 0 else math.inf


def delta_of(mu: float, epsilon: float) -> float:
    """delta at which mu-GDP is (epsilon, delta)-DP (Balle and Wang 2018, theorem 8)."""
    if mu == 0:
        return 0.0
    if math.isinf(mu):
        return 1.0
    above, below = float(log_ndtr(mu / 2 - epsilon / mu)), epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(above) * -math.expm1(min(0.0, below - above))


def epsilon_of(mu: float, delta: float) -> float:
    """epsilon of mu-GDP at ``delta``; infinite for mu infinite. Raises ConfigError for a delta outside (0, 1)."""
    check_delta(delta)
    if math.isinf(mu):
        return math.inf
    if mu == 0 or delta_of(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while delta_of(mu, high) > delta:
        high *= 2
    # in logarithms, for delta changes by orders of magnitude
    root: float = brentq(lambda eps: log_delta(mu, eps) - math.log(delta), 0.0, high, xtol=1e-15, rtol=1e-13)
    return root


def log_delta(mu: float, epsilon: float) -> float:
    """log(delta_of): -inf where delta underflows."""
    value = delta_of(mu, epsilon)
    return math.log(value) if value > 0 else -1e308


def mu_for(epsilon: float, delta: float) -> float:
    """The largest mu that is (epsilon, delta)-DP. Raises ConfigError for targets that no noise can reach."""
    check_delta(delta)
    if not LEAST_EPSILON <= epsilon < MOST_EPSILON:
        raise ConfigError(
            f"epsilon = {epsilon:g} cannot be reached",
            f"Choose one from {LEAST_EPSILON:g} up to below {MOST_EPSILON:g}.",
        )
    root: float = brentq(lambda mu: epsilon_of(mu, delta) - epsilon, LEAST_MU, MOST_MU, xtol=1e-15, rtol=1e-13)
    return root


def sigma_for(
    epsilon: float, delta: float, sensitivity: float, releases: float, *, sampling_rate: float = 1.0
) -> float:
    """The noise that keeps ``releases`` releases of one record within (epsilon, delta).

    Raises ConfigError for numbers that no noise fits, and for a sampling rate below 1: the server sees the ids of each
    batch, and batches are parts of a shuffled epoch rather than Poisson samples, so no amplification theorem applies.
    """
    if not (0 < sensitivity < math.inf and 1 <= releases < math.inf):
        raise ConfigError(
            f"no noise fits {releases} releases of sensitivity {sensitivity}",
            "Set clip norms above 0 and finite, and count at least one release.",
        )
    if sampling_rate != 1:
        raise ConfigError(
            f"no amplification by subsampling at rate {sampling_rate:g}: the server sees the records of each batch",
            "Leave it at 1.",
        )
    return sensitivity * math.sqrt(releases) / mu_for(epsilon, delta)


def replace_one(add_remove_sensitivity: float) -> float:
    """Sensitivity between replace-one neighbours of a sum of clipped terms: one goes and another comes."""
    return 2 * add_remove_sensitivity


def mean_bits(mu: float) -> float:
    """Most bits a record tells on average: mu^2 / 8 nats for Gaussian releases in a ball of half the sensitivity."""
    return mu**2 / 8 / math.log(2)


def guess_bound(mu: float, prior: float) -> float:
    """Most probability of guessing right what was guessed right with probability ``prior`` before."""
    return float(ndtr(ndtri(prior) + mu / 2)) if math.isfinite(mu) else 1.0


def group_mu(mu: float, records: int, *, direct: bool) -> float:
    """mu of somebody with several records: sqrt(k) mu where each release holds one record, else up to k mu."""
    return mu * (math.sqrt(records) if direct else records)


def check_delta(delta: float) -> None:
    """Raise ConfigError for a delta that is no probability."""
    if not (np.isfinite(delta) and 0 < delta < 1):
        raise ConfigError(f"delta = {delta} is no probability between 0 and 1", "1e-5 is usual; below 1 / records.")
