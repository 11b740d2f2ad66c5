"""The noise is normal, never repeats, and cannot be found by trying seeds."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest

from splitfl.errors import ConfigError
from splitfl.privacy.noise import NoiseStream, open_stream

SMALL_SEEDS = 1 << 12  # stands for 2^32: the search is the same, only longer


def test_draws_are_standard_normal_in_float64() -> None:
    drawn = NoiseStream(bytes(32)).normal((200_001,))
    assert drawn.dtype == torch.float64
    assert drawn.shape == (200_001,)
    assert kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert abs(float((drawn[:-1] * drawn[1:]).mean())) < 0.01


def test_draws_of_a_large_tensor_are_independent_across_chunks() -> None:
    drawn = NoiseStream(bytes(32)).normal((3, 1 << 17))
    assert abs(float((drawn[0] * drawn[1]).mean())) < 0.005
    assert abs(float((drawn[1] * drawn[2]).mean())) < 0.005


def test_two_streams_never_draw_the_same() -> None:
    assert not torch.equal(NoiseStream().normal((8,)), NoiseStream().normal((8,)))
    stream = NoiseStream()
    assert not torch.equal(stream.normal((8,)), stream.normal((8,)))


def test_torch_keeps_32_bits_of_its_seed() -> None:
    low = torch.randn(8, generator=torch.Generator().manual_seed(5))
    high = torch.randn(8, generator=torch.Generator().manual_seed(5 + 2**32))
    assert torch.equal(low, high)


def known_record_attack(observed: torch.Tensor, known: torch.Tensor) -> int | None:
    """The seed whose noise is the difference between what was seen and a record that the attacker knows."""
    noise = observed - known
    for seed in range(SMALL_SEEDS):
        if torch.allclose(torch.randn(len(known), generator=torch.Generator().manual_seed(seed)), noise, atol=1e-4):
            return seed
    return None


def test_searching_seeds_strips_torchs_noise_and_not_ours() -> None:
    known = torch.linspace(-1, 1, 16)
    theirs = known + torch.randn(16, generator=torch.Generator().manual_seed(1234))
    assert known_record_attack(theirs, known) == 1234
    torch.manual_seed(1234)  # somebody who seeds torch does not seed us
    ours = known + NoiseStream().normal((16,)).float()
    assert known_record_attack(ours, known) is None


def test_a_seed_is_refused_outside_simulations() -> None:
    with pytest.raises(ConfigError, match="seed"):
        open_stream(seed=0, simulated=False)
    first, second = (open_stream(seed=7, simulated=True).normal((4,)) for _ in range(2))
    assert torch.equal(first, second)
    assert not open_stream(seed=None, simulated=False).simulated


def test_stream_that_is_used_up_goes_on_under_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfl.privacy.noise.STREAM_BYTES", 1024)
    drawn = NoiseStream().normal((4, 128))
    assert torch.unique(drawn).numel() == drawn.numel()
    again = [NoiseStream(bytes(32)).normal((4, 128)) for _ in range(2)]
    assert torch.equal(*again)
