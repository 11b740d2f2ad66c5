"""Recovery, ROUGE-L and their intervals, on cases that can be checked by hand."""

from __future__ import annotations

import pytest
import torch

from splitfl.lab.audit.scores import bootstrap, rouge_l, rouge_recovery, token_recovery


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("guess", "truth", "value"),
    [
        ("a b c d", "a b c d", 1.0),
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("x y", "a b c", 0.0),
        ("", "a", 0.0),
        ("a c", "a b c", 0.8),
    ],
)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(guess: str, truth: str, value: float) -> None:
    assert rouge_l(guess.split(), truth.split()) == pytest.approx(value)


def test_recovery_counts_tokens_of_all_records_alike() -> None:
    truths = [torch.tensor([1, 2, 3, 4]), torch.tensor([5])]
    guesses = [torch.tensor([1, 2, 3, 9]), torch.tensor([9])]
    assert token_recovery(guesses, truths, generator()).value == pytest.approx(3 / 5)
    assert rouge_recovery(guesses, truths, generator()).value == pytest.approx((0.75 + 0.0) / 2)


def test_interval_holds_the_value_and_is_the_same_for_the_same_seed() -> None:
    values = torch.rand(40, generator=generator())
    found = bootstrap(lambda rows: values[rows].mean(-1), 40, generator())
    assert found.low < found.value < found.high
    assert found == bootstrap(lambda rows: values[rows].mean(-1), 40, generator())
    standard_error = float(values.std()) / 40**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_interval_of_equal_records_is_a_point() -> None:
    truths = [torch.tensor([1, 2])] * 5
    found = token_recovery([torch.tensor([1, 9])] * 5, truths, generator())
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)
