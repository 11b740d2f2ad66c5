"""Averages of clients' copies of one tensor, and screens of their whole updates, for when somebody may lie.

An update is y_i - x, over all shared tensors. Every average here is over the copies that some token trained. Only the
mean weighs by tokens: those are the client's own word, so the robust averages count every copy once.

What is bounded are merged weights. A client's gradients into the trunk are bounded apart: trunk.gradient_clip_norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfl.config import Merge

COLUMNS = 1 << 20  # of all updates that are widened to float64 at once


@dataclass(frozen=True)
class Contribution:
    """One holder's copy of a tensor after the round, and the label tokens that trained it; below 1, the ``discount``
    of a late one."""

    tensor: Tensor
    tokens: int
    discount: float = 1.0

    @property
    def weight(self) -> float:
        """In the mean."""
        return self.tokens * self.discount


Average = Callable[[Sequence[Contribution]], Tensor]  # at least one, each with tokens -> float64
Screen = tuple[float | None, ...]  # what each update is multiplied by; None = it is left out


def token_mean(parts: Sequence[Contribution]) -> Tensor:
    """Mean weighted by label tokens, float64 (McMahan et al. 2017). No bound: one copy can move it anywhere, unless
    updates are clipped: see ``clip_factors``."""
    total = sum(part.weight for part in parts)
    mean = torch.zeros(parts[0].tensor.shape, dtype=torch.float64)
    for part in parts:
        mean.add_(part.tensor.to(torch.float64), alpha=part.weight / total)
    return mean


def trimmed_mean(parts: Sequence[Contribution], trim: int) -> Tensor:
    """Coordinate by coordinate, the mean without the ``trim`` smallest and largest values (Yin et al. 2018), float64.

    Bound: with at most ``trim`` liars each coordinate lies between the smallest and the largest honest value. ``trim``
    must be below half of the copies.
    """
    ordered = torch.stack([part.tensor for part in parts]).sort(dim=0).values
    return ordered[trim : len(parts) - trim].mean(dim=0, dtype=torch.float64)


def most_trimmed(copies: int) -> int:
    """The largest number that can be trimmed on each side of so many copies."""
    return (copies - 1) // 2


def median(parts: Sequence[Contribution]) -> Tensor:
    """Coordinate by coordinate, the median (Yin et al. 2018); of an even number, the mean of the middle two. float64.

    Bound: with fewer than half of the copies lying, each coordinate lies between the smallest and the largest honest
    value.
    """
    return trimmed_mean(parts, most_trimmed(len(parts)))


def average_of(merge: Merge) -> Average:
    """What ``merge.aggregate`` says. Of ``trim_fraction``'s copies at least one is trimmed, where there are three."""
    if merge.aggregate == "median":
        return median
    if merge.aggregate == "trimmed_mean":
        return lambda parts: trimmed_mean(
            parts, min(math.ceil(merge.trim_fraction * len(parts)), most_trimmed(len(parts)))
        )
    return token_mean  # with krum, of the one copy that is left


def inner_products(updates: Iterable[tuple[Tensor, Sequence[Tensor | None]]], clients: int) -> Tensor:
    """<u_i, u_j> of all clients' whole updates, (clients, clients), float64, from (previous, their copies) of one
    tensor after the other. A tensor that a client does not hold counts as not moved."""
    products = torch.zeros(clients, clients, dtype=torch.float64)
    for previous, copies in updates:
        flat = [previous.flatten() if copy is None else copy.flatten() for copy in copies]
        for first in range(0, previous.numel(), COLUMNS):
            piece = slice(first, first + COLUMNS)
            rows = torch.stack([row[piece].double() for row in flat]) - previous.flatten()[piece].double()
            products += rows @ rows.T
    return products


def screen_of(merge: Merge, products: Tensor) -> Screen:
    """What ``merge.clip_norm`` and ``merge.aggregate = "krum"`` make of updates with these inner products."""
    factors = clip_factors(products, merge.clip_norm) if merge.clip_norm else [1.0] * len(products)
    if merge.aggregate != "krum":
        return tuple(factors)
    scale = torch.tensor(factors, dtype=torch.float64)
    chosen = krum(products * scale * scale[:, None], merge.byzantine)
    return tuple(factor if number == chosen else None for number, factor in enumerate(factors))


def clip_factors(products: Tensor, clip_norm: float) -> list[float]:
    """Factors that bring each update's L2 norm to ``clip_norm`` at most.

    Bound: the norm of the mean update is at most ``clip_norm``, whatever anybody sends and whatever tokens he claims,
    where all clients hold the same tensors; else sqrt(clients) times that, beside what the trunk's own copies moved.
    Coordinate by coordinate, as the trimmed mean and the median choose, it is at most sqrt(2) ``clip_norm``: where one
    is t, n - trim copies or more have a mean square of t^2 at least.
    """
    return [min(1.0, clip_norm / norm) if norm else 1.0 for norm in products.diagonal().sqrt().tolist()]


def krum(products: Tensor, byzantine: int) -> int | None:
    """The update whose n - f - 2 nearest others are nearest, f = ``byzantine`` (Blanchard et al. 2017, section 4).

    Bound: for n >= 2 f + 3 the chosen update is at most as far (squared distances, summed) from its nearest n - f - 2
    as any honest one; at least n - 2 f - 2 >= 1 of those are honest, so a liar who is chosen is as near to an honest
    update as that. None for fewer updates: nobody can be told from a liar.
    """
    count = len(products)
    if count < 2 * byzantine + 3:
        return None
    squares = products.diagonal()
    distances = squares + squares[:, None] - 2 * products
    distances.fill_diagonal_(math.inf)
    scores = distances.sort(dim=1).values[:, : count - byzantine - 2].sum(dim=1)
    return int(scores.argmin())
