"""Clipping holds its bound for any input, and noise has the promised scale."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitfl.errors import ConfigError
from splitfl.lab.audit.mechanism import Mechanism as KnownMechanism
from splitfl.privacy.mechanism import Clip, Mechanism, clip_tokens
from splitfl.privacy.noise import NoiseStream


def records(scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed))


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.sampled_from(["record", "token"]))
def test_clipped_records_stay_within_half_the_sensitivity(scale: float, norm: float, clip: Clip) -> None:
    mechanism = Mechanism(clip, norm, 1.0)
    bounded = mechanism.clipped(records(scale))
    assert bounded.dtype == torch.float64
    assert float(bounded.flatten(1).norm(dim=1).max()) <= mechanism.sensitivity(5) / 2 * (1 + 1e-12)


@given(st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.sampled_from(["record", "token"]))
def test_what_attackers_and_models_are_shown_is_clipped_as_the_gate_does(scale: float, norm: float, clip: Clip) -> None:
    gated, tensor = Mechanism(clip, norm, 1.0).clipped(records(scale)), records(scale)
    assert torch.allclose(KnownMechanism(clip, norm).clean(tensor).double(), gated, rtol=1e-5)
    if clip == "token":
        assert torch.allclose(clip_tokens(tensor, norm).double(), gated, rtol=1e-5)


def test_an_infinite_bound_of_public_states_clips_nothing() -> None:
    assert torch.equal(clip_tokens(records(1e6), math.inf), records(1e6))


def test_what_is_within_the_bound_is_untouched() -> None:
    small = records(1e-3)
    assert torch.equal(Mechanism("record", 1.0, 0.0)(small, NoiseStream()), small)


def test_the_two_ways_to_clip() -> None:
    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])  # (1, 2, 2)
    assert torch.allclose(Mechanism("record", 1.0, 0.0).clipped(hidden).norm(), torch.tensor(1.0).double())
    assert torch.allclose(Mechanism("token", 1.0, 0.0).clipped(hidden)[0], torch.eye(2).double())


def test_noise_has_the_promised_scale_in_every_direction() -> None:
    hidden = torch.zeros(64, 16, 32)
    noised = Mechanism("token", 1.0, 0.5)(hidden, NoiseStream(bytes(32)))
    assert noised.dtype == torch.float32
    assert float(noised.std()) == pytest.approx(0.5, rel=0.02)
    assert float(noised.mean(dim=(0, 1)).abs().max()) < 0.1


def test_zero_rows_do_not_become_nan() -> None:
    assert torch.isfinite(Mechanism("token", 1.0, 0.1)(torch.zeros(1, 2, 3), NoiseStream())).all()


@pytest.mark.parametrize(("norm", "sigma"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (math.inf, 1.0)])
def test_a_clip_norm_that_bounds_nothing_is_refused(norm: float, sigma: float) -> None:
    with pytest.raises(ConfigError, match="clip norm"):
        Mechanism("record", norm, sigma)


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_noise_that_is_none_is_refused(sigma: float) -> None:
    with pytest.raises(ConfigError, match="sigma"):
        Mechanism("record", 1.0, sigma)
