"""The learning rate as a pure function of (round, step): every holder computes the same number."""

from __future__ import annotations

import math

from splitfl.config import Federation


def learning_rate(settings: Federation, round_: int, step: int) -> float:
    """The trunk's step size for step ``step`` of round ``round_`` (both from 0)."""
    return scheduled(settings, settings.optimizer.learning_rate, round_, step)


def client_learning_rate(settings: Federation, round_: int, step: int) -> float:
    """The step size of the clients' own weights, on the same schedule."""
    return scheduled(settings, settings.optimizer.rate_of_clients, round_, step)


def scheduled(settings: Federation, peak: float, round_: int, step: int) -> float:
    """Linear warm-up to ``peak``, then cosine or constant."""
    optimizer = settings.optimizer
    total = settings.rounds.count * settings.rounds.local_steps
    position = round_ * settings.rounds.local_steps + step
    if position < optimizer.warmup_steps:
        return peak * (position + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return peak
    progress = (position - optimizer.warmup_steps) / max(1, total - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return peak * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)


def round_step_sizes(settings: Federation, round_: int) -> float:
    """Sum of the clients' step sizes over a round's local steps."""
    return sum(client_learning_rate(settings, round_, step) for step in range(settings.rounds.local_steps))
