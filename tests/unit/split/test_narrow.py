"""A narrow release: small on the wire, clipped everywhere at the start, and refused when it is not the publisher's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from splitfl.cut import Cut
from splitfl.errors import CheckpointError, ConfigError
from splitfl.split.narrow import (
    SPEC_FILE,
    WEIGHTS_FILE,
    NarrowRelease,
    NarrowSpec,
    load_release,
    read_description,
    save_release,
)

SPEC = NarrowSpec(n_bottom=1, n_top=2, hidden=32, rank=4, noise_multiplier=0.5, clip_norm=2.0)


def states(rows: int = 200) -> Tensor:
    return torch.randn(rows, SPEC.hidden, generator=torch.Generator().manual_seed(3))


def made() -> NarrowRelease:
    release = NarrowRelease(SPEC)
    release.start_from(states(), states() + 1.0, torch.Generator().manual_seed(0))
    return release


def test_encoder_narrows_and_decoder_widens_again() -> None:
    release, hidden = made(), states(6).view(2, 3, -1)
    encoded = release.encoder(hidden)
    assert encoded.shape == (2, 3, SPEC.rank)
    assert release.decoder(encoded).shape == release.skip(hidden, hidden).shape == hidden.shape


def test_encoder_starts_above_the_clip_so_that_the_signal_is_as_strong_as_allowed() -> None:
    norms = made().encoder(states()).norm(dim=-1)
    assert float((norms >= SPEC.clip_norm).float().mean()) > 0.94


def test_skip_starts_with_the_clients_own_states_alone() -> None:
    hidden = states(5)
    assert torch.equal(made().skip(hidden, states(5).flip(0)), hidden)


def test_encoder_starts_with_equal_power_in_each_direction() -> None:
    stretched = states(4000) * torch.linspace(0.1, 3.0, SPEC.hidden)
    release = NarrowRelease(SPEC)
    release.start_from(stretched, stretched, torch.Generator().manual_seed(0))
    power = release.encoder(stretched).square().mean(0)
    assert torch.allclose(power / power.mean(), torch.ones(SPEC.rank), atol=1e-3)


def test_decoder_starts_nearer_to_what_the_trunk_reads_than_its_mean() -> None:
    spec = replace(SPEC, rank=SPEC.hidden, noise_multiplier=0.05)
    release, own = NarrowRelease(spec), states(2000)
    wanted = own @ torch.randn(SPEC.hidden, SPEC.hidden, generator=torch.Generator().manual_seed(4)) + 5.0
    release.start_from(own, wanted, torch.Generator().manual_seed(0))
    release.requires_grad_(False)
    codes = release.encoder(own)
    found = release.decoder(codes * (spec.clip_norm / codes.norm(dim=-1, keepdim=True)).clamp_max(1.0))
    assert float((found - wanted).square().mean()) < 0.2 * float((wanted - wanted.mean(0)).square().mean())


def test_sigma_is_in_the_encoded_vectors_own_units() -> None:
    assert SPEC.sigma == 1.0
    assert SPEC.cut == Cut(1, 2)


def test_release_comes_back_from_disk_as_it_was_and_frozen(tmp_path: Path) -> None:
    release = made()
    save_release(tmp_path, release)
    again = load_release(tmp_path)
    assert again.spec == SPEC
    assert not any(weight.requires_grad for weight in again.parameters())
    for name, weight in release.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)


def test_release_with_one_byte_changed_is_refused(tmp_path: Path) -> None:
    save_release(tmp_path, made())
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CheckpointError, match="not what its publisher wrote"):
        load_release(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 5),
        ("rank", 4.0),
        ("rank", 0),
        ("hidden", "32"),
        ("format", 2),
        ("noise_multiplier", -1.0),
        ("n_top", None),
    ],
)
def test_description_that_does_not_fit_is_refused(tmp_path: Path, field: str, value: object) -> None:
    save_release(tmp_path, made())
    description = json.loads((tmp_path / SPEC_FILE).read_text())
    (tmp_path / SPEC_FILE).write_text(json.dumps({**description, field: value}))
    with pytest.raises(CheckpointError):
        load_release(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"sha256": 3}'])
def test_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_release(tmp_path, made())
    (tmp_path / SPEC_FILE).write_text(text)
    with pytest.raises(CheckpointError):
        read_description(tmp_path)


def test_checkpoint_without_a_release_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="splitfl adapt"):
        load_release(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"rank": 33}, {"noise_multiplier": 0.0}, {"noise_multiplier": float("nan")}, {"clip_norm": -1.0}],
)
def test_spec_that_makes_no_sense_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        replace(SPEC, **change)  # type: ignore[arg-type]
