"""Dealing the rows of one data set to clients, alike or unlike on purpose: iid, by label, by group, by quantity.

Pure numpy over labels (or a count) of rows; no file is opened. What comes out is a partition: every row goes to
exactly one client. The same arguments give the same partition, and the global generators are neither read nor moved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from splitfl.errors import ConfigError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Partition = list[IntArray]  # row numbers of each client, int64 (n_rows of that client,), rising

SMALLEST_ALPHA = 1e-6  # below it a draw is one label to the last bit anyway, and floats run out


def iid(rows: int, clients: int, seed: int, minimum: int = 1) -> Partition:
    """Deal ``rows`` evenly and at random: sizes differ by one at most.

    Raises ConfigError when a client would get fewer than ``minimum`` rows.
    """
    check_counts(rows, clients, minimum)
    return cut_up(generator(seed).permutation(rows), even(rows, clients))


def dirichlet(labels: Sequence[str], clients: int, alpha: float, seed: int, minimum: int = 1) -> Partition:
    """Each client draws its own proportions of the labels from a Dirichlet distribution; sizes differ by one at most.

    q ~ Dir(alpha p) for each client in turn (Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data
    distribution", section 3). There p is the share of each label in the whole; here it is that in the rows that are
    left, and a client whose label runs out draws again, so that every row is dealt, and none twice. A large ``alpha``
    makes all clients alike; one near 0 gives each of them one label, as far as its rows reach.

    Raises ConfigError for an ``alpha`` that is not above 0, or when a client would get fewer than ``minimum`` rows.
    """
    check_counts(len(labels), clients, minimum)
    check_alpha(alpha)
    random = generator(seed)
    stacks = [random.permutation(rows) for rows in by_label(labels)]
    left = np.array([len(stack) for stack in stacks])
    partition = []
    for size in even(len(labels), clients):
        counts = draw_labels(left, int(size), alpha, random)
        parts = [stack[rest - count : rest] for stack, rest, count in zip(stacks, left, counts, strict=True)]
        left = left - counts
        partition.append(np.sort(np.concatenate(parts)))
    return partition


def by_group(groups: Sequence[str], clients: int, seed: int, minimum: int = 1) -> Partition:
    """Each client holds one group: one specialty, one ward, one author.

    With more clients than groups, a group's rows are dealt evenly to several clients, the more of them the larger it
    is. With fewer, a client holds several whole groups: the largest first, each to the client with the fewest rows.

    Raises ConfigError when a client would get fewer than ``minimum`` rows.
    """
    check_counts(len(groups), clients, minimum)
    random = generator(seed)
    stacks = [random.permutation(rows) for rows in by_label(groups)]
    sizes = np.array([len(stack) for stack in stacks])
    if len(stacks) > clients:
        partition = gathered(stacks, clients)
    else:
        holders = np.ones_like(sizes)
        for _ in range(clients - len(stacks)):
            holders[np.argmax(sizes / holders)] += 1
        parts = zip(stacks, holders, strict=True)
        partition = [part for stack, count in parts for part in cut_up(stack, even(len(stack), count))]
    smallest = min(map(len, partition))
    if smallest < minimum:
        raise ConfigError(
            f"{clients} clients by group leave one with {smallest} rows, and the least is {minimum}",
            "Take fewer clients, drop the smallest groups, or lower the minimum.",
        )
    return partition


def quantity_skew(rows: int, clients: int, alpha: float, seed: int, minimum: int = 1) -> Partition:
    """Rows at random, sizes unlike: beyond ``minimum`` they are shared out by q ~ Dir(alpha) over the clients.

    (Li et al. 2022, "Federated learning on non-IID data silos: an experimental study", section IV.) A large ``alpha``
    makes sizes alike; one near 0 gives nearly everything to one client.

    Raises ConfigError for an ``alpha`` that is not above 0, or for fewer rows than ``minimum`` a client.
    """
    check_counts(rows, clients, minimum)
    check_alpha(alpha)
    random = generator(seed)
    shares = random.dirichlet(np.full(clients, max(alpha, SMALLEST_ALPHA)))
    sizes = minimum + apportion(rows - minimum * clients, shares)
    return cut_up(random.permutation(rows), sizes)


def draw_labels(left: IntArray, size: int, alpha: float, random: np.random.Generator) -> IntArray:
    """How many rows of each label a client of ``size`` rows takes, of those ``left``: int64 (labels,) each."""
    counts = np.zeros_like(left)
    while (missing := size - int(counts.sum())) > 0:
        open_ = np.flatnonzero(left > counts)
        rest = (left - counts)[open_]
        shares = random.dirichlet(np.maximum(alpha * rest / rest.sum(), SMALLEST_ALPHA))
        counts[open_] += np.minimum(apportion(missing, shares), rest)
    return counts


def apportion(total: int, shares: FloatArray) -> IntArray:
    """Whole numbers that sum to ``total`` and are nearest to ``shares`` of it (largest remainders): int64 (n,)."""
    exact = total * shares / shares.sum()
    counts: IntArray = np.floor(exact).astype(np.int64)
    ahead = np.argsort(counts - exact, kind="stable")  # the largest remainder first
    counts[ahead[: total - int(counts.sum())]] += 1
    return counts


def gathered(stacks: Sequence[IntArray], clients: int) -> Partition:
    """Whole stacks dealt to fewer clients: the largest first, each to the client with the fewest rows so far."""
    held: list[list[IntArray]] = [[] for _ in range(clients)]
    for stack in sorted(stacks, key=len, reverse=True):
        min(held, key=lambda parts: sum(map(len, parts))).append(stack)
    return [np.sort(np.concatenate(parts)) for parts in held]


def by_label(labels: Sequence[str]) -> list[IntArray]:
    """The rows of each label, labels in alphabetical order."""
    _, numbers = np.unique(np.asarray(labels), return_inverse=True)
    return [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]


def even(rows: int, parts: int) -> IntArray:
    """Sizes of ``parts`` that sum to ``rows`` and differ by one at most: int64 (parts,)."""
    sizes = np.full(parts, rows // parts)
    sizes[: rows % parts] += 1
    return sizes


def cut_up(rows: IntArray, sizes: IntArray) -> Partition:
    """Consecutive pieces of ``rows`` with these sizes, each sorted."""
    return [np.sort(part) for part in np.split(rows, np.cumsum(sizes)[:-1])]


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def check_counts(rows: int, clients: int, minimum: int) -> None:
    """Raise ConfigError when there are not ``minimum`` rows for each client."""
    if clients < 1 or minimum < 1:
        raise ConfigError(f"{clients} clients with at least {minimum} rows each", "Both are 1 or more.")
    if rows < clients * minimum:
        raise ConfigError(
            f"{rows} rows are too few for {clients} clients with at least {minimum} each",
            "Take fewer clients, more rows, or lower the minimum.",
        )


def check_alpha(alpha: float) -> None:
    """Raise ConfigError for an alpha that no Dirichlet distribution has."""
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {alpha}, which no Dirichlet distribution has", "0.1 is very unlike, 100 alike.")
