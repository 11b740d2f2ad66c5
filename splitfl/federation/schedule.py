"""The learning rate as a pure function of (round, step): every holder computes the same number."""

from __future__ import annotations

import math

from splitfl.config import Federation


def learning_rate(settings: Federation, round_: int, step: int) -> float:
    """Step size for step ``step`` of round ``round_`` (both from 0): linear warm-up, then cosine or constant."""
    optimizer = settings.optimizer
    total = settings.rounds.count * settings.rounds.local_steps
    position = round_ * settings.rounds.local_steps + step
    if position < optimizer.warmup_steps:
        return optimizer.learning_rate * (position + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (position - optimizer.warmup_steps) / max(1, total - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.learning_rate * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)


def round_step_sizes(settings: Federation, round_: int) -> float:
    """Sum of the step sizes of a round's local steps."""
    return sum(learning_rate(settings, round_, step) for step in range(settings.rounds.local_steps))
