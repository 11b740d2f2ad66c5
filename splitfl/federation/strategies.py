"""How clients' weights become one: pure functions over named tensors.

A strategy sees, for one tensor at a time, the copies that trained it and their weights (label tokens), so a
merge never holds more than one tensor of each client in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contribution:
    """One holder's copy of a tensor after the round, and the label tokens that trained it, discounted if it is late."""

    tensor: Tensor
    tokens: float


class Strategy(Protocol):
    """Merges the copies of one tensor; ``previous`` is its value before the round."""

    def merge(self, name: str, previous: Tensor, contributions: Sequence[Contribution]) -> Tensor: ...


class FedAvg:
    """Mean of the copies, weighted by label tokens (McMahan et al. 2017, algorithm 1)."""

    def merge(self, name: str, previous: Tensor, contributions: Sequence[Contribution]) -> Tensor:  # noqa: ARG002
        """Weighted mean in float64, returned in fp32. Copies that no token trained do not count.

        With no tokens at all the tensor stays as it was.
        """
        total = sum(part.tokens for part in contributions)
        if total == 0:
            return previous
        mean = torch.zeros(previous.shape, dtype=torch.float64)
        for part in contributions:
            mean.add_(part.tensor.to(torch.float64), alpha=part.tokens / total)
        return mean.to(torch.float32)


STRATEGIES: dict[str, type[Strategy]] = {"fedavg": FedAvg}
