"""The attacker's copy of the mechanism does what its parameters say."""

from __future__ import annotations

import pytest
import torch

from splitfl.lab.audit.mechanism import Mechanism

from .bench import generator

HIDDEN = 3 * torch.randn(4, 6, 32, generator=generator(1))


def test_record_clip_bounds_the_record_and_keeps_its_direction() -> None:
    clean = Mechanism("record", 2.0).clean(HIDDEN)
    assert torch.allclose(clean.flatten(1).norm(dim=1), torch.full((4,), 2.0))
    assert torch.allclose(clean / clean[:, :1, :1], HIDDEN / HIDDEN[:, :1, :1], rtol=1e-4)


def test_token_clip_bounds_each_token_and_leaves_short_ones() -> None:
    hidden = HIDDEN.clone()
    hidden[0, 0] *= 1e-3
    clean = Mechanism("token", 1.0).clean(hidden)
    assert torch.equal(clean[0, 0], hidden[0, 0])
    assert torch.allclose(clean[1].norm(dim=-1), torch.ones(6))


def test_noise_has_the_standard_deviation_that_was_asked_for() -> None:
    mechanism = Mechanism("token", 1.0, sigma=0.3)
    noise = mechanism.apply(torch.zeros(50, 20, 32), generator(2))
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
    assert float(mechanism.averaged(9).apply(torch.zeros(50, 20, 32), generator(2)).std()) == pytest.approx(
        0.1, rel=0.02
    )


def test_codec_rounds_what_the_server_sees() -> None:
    seen = Mechanism("token", 1.0, codec="bf16").apply(HIDDEN, generator())
    exact = Mechanism("token", 1.0).apply(HIDDEN, generator())
    assert 0 < float((seen - exact).abs().max()) < 4e-3


def test_encoder_narrows_before_the_clip() -> None:
    encoder = torch.randn(8, 32, generator=generator(3))
    released = Mechanism("token", 1.0, encoder=encoder).apply(HIDDEN, generator())
    assert released.shape == (4, 6, 8)
    assert float(released.norm(dim=-1).max()) <= 1.0 + 1e-5
