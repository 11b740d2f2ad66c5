"""From the federation's settings to what is done to each kind of release: mechanisms, budgets, what is not sent.

Everything here is fixed before the first release, from settings and from how many records there are, which is public;
never from what the records say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from splitfl.config import LEAVING, LEVELS, Federation
from splitfl.errors import ConfigError
from splitfl.privacy.accounting import mu_for, replace_one, sigma_for
from splitfl.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class DpSgd:
    """DP-SGD of one part of the client's weights: clip and noise. Raises ConfigError for numbers that give no privacy,
    or none that is known."""

    max_grad_norm: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"DP-SGD's {name} is {value}", "Give a finite number above 0.")

    @property
    def sensitivity(self) -> float:
        """By how much one record, replaced by another of its padded length, can move a step's sum (L2)."""
        return replace_one(self.max_grad_norm)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each coordinate of a step's sum."""
        return self.noise_multiplier * self.max_grad_norm


@dataclass(frozen=True)
class Policy:
    """What may leave one client, and how. None for a mechanism: sent as it is (mode off), or not at all.

    ``bottom_trains``: activations come from weights that train here, so each step's are new ones.
    """

    mode: Literal["off", "measured", "certified"]
    unit: Literal["record", "client"]
    activations: Mechanism | None
    gradients: Mechanism | None
    dp_sgd: DpSgd | None
    metric_noise: float  # sigma of a shared held-out loss, in its sensitivity; 0 = none
    record_budget: float  # mu^2; infinite without a target
    run_budget: float  # mu^2 of the client as a whole
    delta: float
    epsilon: float | None = None  # the bound that the budgets keep; None = none was asked for
    noise: Mapping[str, float] = field(default_factory=dict)  # multiplier by kind that leaves; 0 = as it is
    bottom_trains: bool = False

    @property
    def private(self) -> bool:
        """Whether noise is added."""
        return self.mode != "off"


@dataclass(frozen=True)
class Workload:
    """How often a client's records take part. ``records`` to train on, ``held_out`` ones that are measured,
    ``draws`` records that all steps take together, ``steps`` of all rounds; ``padded_length`` in tokens."""

    records: int
    held_out: int
    draws: int
    steps: int
    padded_length: int

    @property
    def participations(self) -> int:
        """Most steps that one record takes part in: it comes once in each epoch."""
        return math.ceil(self.draws / self.records)


def workload(settings: Federation, records: int, held_out: int) -> Workload:
    """What the federation's rounds make of so many records, if this client takes part in all."""
    steps = settings.rounds.count * settings.rounds.local_steps
    length = settings.batch.padded_lengths[-1]
    return Workload(records, held_out, steps * settings.batch.records, steps, length)


def policy_of(settings: Federation, work: Workload, *, bottom_trains: bool = False) -> Policy:
    """The policy of a client with that workload. Raises ConfigError for a target that no noise reaches."""
    privacy = settings.privacy
    if not privacy.on:
        return Policy(
            mode="off",
            unit=privacy.unit,
            activations=None,
            gradients=None,
            dp_sgd=None,
            metric_noise=0.0,
            record_budget=math.inf,
            run_budget=math.inf,
            delta=privacy.delta,
            noise=leaving(settings, NONE),
            bottom_trains=bottom_trains,
        )
    if privacy.clip_norm is None:
        raise ConfigError("privacy.clip_norm is not settled", "The server measures it at its start; or set it.")
    noise = certified_noise(settings, work) if privacy.mode == "certified" else measured_noise(settings)
    trains = privacy.gradients != "none"
    if min(noise.activations * privacy.clip_norm, noise.gradients * privacy.gradient_clip_norm) == 0:
        raise ConfigError("noise that rounds to zero is none", "Raise privacy.noise_multiplier.")
    gradients = Mechanism("record", privacy.gradient_clip_norm, noise.gradients * privacy.gradient_clip_norm)
    budget = mu_for(privacy.epsilon, privacy.delta) ** 2 if privacy.epsilon is not None else math.inf
    return Policy(
        mode=privacy.mode,
        unit=privacy.unit,
        activations=Mechanism(privacy.clip, privacy.clip_norm, noise.activations * privacy.clip_norm),
        gradients=gradients if trains else None,
        dp_sgd=DpSgd(privacy.dp_max_grad_norm, noise.dp_sgd) if privacy.dp_sgd else None,
        metric_noise=noise.metrics,
        record_budget=budget,
        run_budget=budget if privacy.unit == "client" else math.inf,
        delta=privacy.delta,
        epsilon=privacy.epsilon,
        noise=leaving(settings, noise),
        bottom_trains=bottom_trains,
    )


@dataclass(frozen=True)
class NoiseMultipliers:
    """sigma of each kind of release in its own clip norms."""

    activations: float
    gradients: float
    dp_sgd: float
    metrics: float  # in its sensitivity


NONE = NoiseMultipliers(0.0, 0.0, 0.0, 0.0)


def leaving(settings: Federation, noise: NoiseMultipliers) -> dict[str, float]:
    """The noise of each of ``LEAVING`` that leaves, in its own clip norms; that of weights is DP-SGD's."""
    of_weights = noise.dp_sgd if settings.privacy.dp_sgd else 0.0
    leaves = (True, settings.trains_trunk, settings.merge.share != "none", settings.evaluation.share_metrics)
    each = (noise.activations, noise.gradients, of_weights, noise.metrics)
    return {kind: of_it for kind, of_it, goes in zip(LEAVING, each, leaves, strict=True) if goes}


def measured_noise(settings: Federation) -> NoiseMultipliers:
    """Mode "measured": as the settings name it."""
    privacy = settings.privacy
    chosen = LEVELS[privacy.level] if privacy.noise_multiplier is None else privacy.noise_multiplier
    return NoiseMultipliers(
        chosen, privacy.gradient_noise_multiplier, privacy.dp_noise_multiplier, privacy.metric_noise_multiplier
    )


def certified_noise(settings: Federation, work: Workload) -> NoiseMultipliers:
    """Mode "certified": noise that keeps every unit within (epsilon, delta), each kind with an equal part of mu^2."""
    privacy, batch = settings.privacy, settings.batch.records
    kinds = 1 + (privacy.gradients != "none") + privacy.dp_sgd + settings.evaluation.share_metrics

    def sigma(sensitivity: float, releases: int) -> float:
        assert privacy.epsilon is not None
        return sigma_for(privacy.epsilon, privacy.delta, sensitivity, kinds * releases)

    whole = privacy.unit == "client"
    activation = Mechanism(privacy.clip, 1.0, 0.0).sensitivity(work.padded_length)
    return NoiseMultipliers(
        activations=sigma(activation, work.records + work.held_out if whole else 1),
        gradients=sigma(replace_one(1.0), work.draws if whole else work.participations),
        # all records of a client may change at once, and its sums with all of them
        dp_sgd=sigma(replace_one(batch if whole else 1.0), work.steps if whole else work.participations),
        metrics=sigma(1.0, settings.rounds.count),
    )
