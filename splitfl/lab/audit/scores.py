"""How much of a text was recovered: exact tokens, ROUGE-L, and intervals over records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 1000


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval over records."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def token_recovery(guesses: Sequence[Tensor], truths: Sequence[Tensor], generator: torch.Generator) -> Interval:
    """Share of real tokens that were recovered exactly, each at its own place."""
    hits = torch.tensor([float((guess == truth).sum()) for guess, truth in zip(guesses, truths, strict=True)])
    sizes = torch.tensor([float(len(truth)) for truth in truths])
    return bootstrap(lambda rows: hits[rows].sum(-1) / sizes[rows].sum(-1), len(truths), generator)


def rouge_recovery(guesses: Sequence[Tensor], truths: Sequence[Tensor], generator: torch.Generator) -> Interval:
    """Mean ROUGE-L of the records, over tokens."""
    pairs = zip(guesses, truths, strict=True)
    values = torch.tensor([rouge_l(guess.tolist(), truth.tolist()) for guess, truth in pairs])
    return bootstrap(lambda rows: values[rows].mean(-1), len(truths), generator)


def bootstrap(statistic: Callable[[Tensor], Tensor], count: int, generator: torch.Generator) -> Interval:
    """95 % percentile interval of ``statistic`` (rows (..., n) -> (...)) when records are drawn with replacement.

    Efron and Tibshirani 1993, chapter 13.
    """
    rows = torch.randint(count, (DRAWS, count), generator=generator)
    low, high = torch.quantile(statistic(rows), torch.tensor([0.025, 0.975])).tolist()
    return Interval(float(statistic(torch.arange(count))), low, high)


def rouge_l(guess: Sequence[object], truth: Sequence[object]) -> float:
    """F1 of the longest common subsequence (Lin 2004, section 3.1, beta = 1), over tokens or words."""
    if not guess or not truth:
        return 0.0
    common = longest_common_subsequence(guess, truth)
    return 2 * common / (len(guess) + len(truth))


def longest_common_subsequence(first: Sequence[object], second: Sequence[object]) -> int:
    """Its length, by dynamic programming over two rows."""
    above = [0] * (len(second) + 1)
    for item in first:
        row = [0]
        for number, other in enumerate(second):
            row.append(above[number] + 1 if item == other else max(row[number], above[number + 1]))
        above = row
    return above[-1]
