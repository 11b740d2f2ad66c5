"""A narrow release: little leaves the client, and what it keeps reaches the top by a way of its own.

    bottom -> encoder (rank r) -> clip, noise -> ~~ -> decoder -> trunk -> ~~ -> local skip -> top
       \\________________________ stays at home ________________________________/

The public bottom's output passes a rank-r encoder before clip and noise, so that the noise need only cover r
coordinates and little is sent; a decoder on the server widens it again. The top gets the trunk's hidden states *and*
the client's own clean bottom output through learned mixing weights: only what the trunk can add must pass the noise.

Encoder, decoder and mixing weights are learned by a publisher on public text with the noise on
(:mod:`splitfl.lab.adapt`), and lie beside the checkpoint as ``release.safetensors`` and ``release.json``. Clip and
noise are not here: whoever runs these modules puts the gate between encoder and decoder. None of this is a guarantee;
the gate's accounting holds whatever the encoder does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from splitfl.cut import Cut
from splitfl.errors import CheckpointError, ConfigError
from splitfl.files import sha256_of, write_file
from splitfl.privacy.mechanism import clip_tokens

WEIGHTS_FILE, SPEC_FILE = "release.safetensors", "release.json"
COUNTS = ("n_bottom", "n_top", "hidden", "rank")
DAMAGED = "The folder is damaged or was changed by hand; take the publisher's copy again."


@dataclass(frozen=True)
class NarrowSpec:
    """What a narrow release was made for: it fits no other cut, width or noise.

    ``clip_norm`` bounds each token's encoded vector (L2), ``noise_multiplier`` is the noise's standard deviation in
    each coordinate, in units of ``clip_norm``. Raises ConfigError for values that make no sense.
    """

    n_bottom: int
    n_top: int
    hidden: int
    rank: int
    noise_multiplier: float
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= self.hidden:
            raise ConfigError(f"rank {self.rank} is not between 1 and the model's width {self.hidden}", "16 is usual.")
        for name in ("noise_multiplier", "clip_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} {value} is not a number above 0", "0.5 and 1.0 are usual.")

    @property
    def cut(self) -> Cut:
        return Cut(self.n_bottom, self.n_top)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise, in the encoded vector's own units."""
        return self.noise_multiplier * self.clip_norm


class Encoder(nn.Module):
    """On the client: hidden states (..., D) -> (..., r), linear. Scaled so that public tokens meet the clip."""

    def __init__(self, spec: NarrowSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden, spec.rank, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        encoded: Tensor = self.linear(hidden_states)
        return encoded


class Decoder(nn.Module):
    """On the server: released vectors (..., r) -> what enters the trunk (..., D)."""

    def __init__(self, spec: NarrowSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.rank, spec.hidden)

    def forward(self, released: Tensor) -> Tensor:
        widened: Tensor = self.linear(released)
        return widened


class LocalSkip(nn.Module):
    """On the client: its own clean states and the trunk's, both (..., D) -> what enters the top (..., D)."""

    def __init__(self, spec: NarrowSpec) -> None:
        super().__init__()
        self.own = nn.Linear(spec.hidden, spec.hidden, bias=False)
        self.trunk = nn.Linear(spec.hidden, spec.hidden, bias=False)

    def forward(self, own: Tensor, from_trunk: Tensor) -> Tensor:
        width = from_trunk.shape[-1:]
        mixed: Tensor = self.own(own) + self.trunk(nn.functional.rms_norm(from_trunk.float(), width, eps=1e-6))
        return mixed


class NarrowRelease(nn.Module):
    """The three modules of one narrow release, with what they were made for."""

    def __init__(self, spec: NarrowSpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.skip = LocalSkip(spec)

    @torch.no_grad()
    def start_from(self, own: Tensor, wanted: Tensor, generator: torch.Generator) -> None:
        """Set weights to begin adapting from, by linear algebra on public states (N, D).

        ``own``: what the client's bottom gives; ``wanted``: what the trunk is used to read at the same tokens. The
        encoder takes the strongest directions, each scaled to the same power and nearly all tokens to the clip; the
        decoder is the ridge regression from noised codes. The skip hands on the client's own states and none of the
        trunk's, so that adapting starts from the ends alone and the trunk joins as far as it helps.
        """
        spec = self.spec
        directions = whitening(own.float(), spec.rank)  # (r, D)
        reach = (own.float() @ directions.T).norm(dim=-1).quantile(0.05).clamp_min(1e-6)
        self.encoder.linear.weight.copy_(directions * (2 * spec.clip_norm / reach))
        codes = clip_tokens(self.encoder(own.float()), spec.clip_norm)
        noised = codes + spec.sigma * torch.randn(codes.shape, generator=generator)
        weight, bias = ridge(noised, wanted.float())
        self.decoder.linear.weight.copy_(weight)
        self.decoder.linear.bias.copy_(bias)
        self.skip.own.weight.copy_(torch.eye(spec.hidden))
        self.skip.trunk.weight.zero_()


def whitening(states: Tensor, rank: int) -> Tensor:
    """The ``rank`` strongest directions of states (N, D), scaled so that each has unit power: (rank, D)."""
    values, vectors = torch.linalg.eigh(states.T @ states / len(states))  # smallest first
    strongest = values[-rank:].clamp_min(1e-12)
    directions: Tensor = (vectors[:, -rank:] / strongest.sqrt()).T
    return directions


def ridge(inputs: Tensor, outputs: Tensor, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Linear regression (N, r) -> (N, D) with a little damping: weight (D, r) and bias (D,)."""
    extended = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)  # (N, r + 1)
    damping = strength * len(inputs) * torch.eye(extended.shape[1])
    solution = torch.linalg.solve(extended.T @ extended + damping, extended.T @ outputs)  # (r + 1, D)
    return solution[:-1].T, solution[-1]


def save_release(folder: Path, release: NarrowRelease) -> None:
    """Write weights and description beside the checkpoint in ``folder``. Raises StorageError."""
    tensors = {name: weight.detach().float().contiguous().cpu() for name, weight in release.named_parameters()}
    data: bytes = to_safetensors(tensors)
    description = {"format": 1, **asdict(release.spec), "sha256": sha256_of(data)}
    write_file(folder / WEIGHTS_FILE, data)
    write_file(folder / SPEC_FILE, (json.dumps(description, indent=2) + "\n").encode())


def load_release(folder: Path) -> NarrowRelease:
    """Read all three modules, frozen. Raises CheckpointError where they are missing, damaged or do not fit."""
    return assemble(read_description(folder), read_bytes(folder / WEIGHTS_FILE), str(folder))


def assemble(description: Mapping[str, Any], data: bytes, where: str) -> NarrowRelease:
    """Description and weights, from disk or from the wire -> modules, frozen. Raises CheckpointError."""
    if sha256_of(data) != description.get("sha256"):
        raise CheckpointError(f"the narrow release of {where} is not what its publisher wrote", DAMAGED)
    release = NarrowRelease(parse_spec(description, where))
    try:
        release.load_state_dict(from_safetensors(data))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the narrow release of {where} does not fit its own description", DAMAGED) from error
    return release.requires_grad_(False)


def parse_spec(description: Mapping[str, Any], where: str) -> NarrowSpec:
    """The spec in a description of format 1. Raises CheckpointError."""
    names = [field.name for field in fields(NarrowSpec)]
    if description.get("format") != 1 or any(not fits(description.get(name), name in COUNTS) for name in names):
        raise CheckpointError(f"{where} describes its narrow release in a form unknown here", "Update SplitFL.")
    try:
        return NarrowSpec(**{name: description[name] for name in names})
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error.message}", DAMAGED) from error


def fits(value: object, whole: bool) -> bool:
    """Whether a value out of JSON is a number, and a whole one where it must be."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def read_description(folder: Path) -> dict[str, Any]:
    """``release.json`` as a table. Raises CheckpointError."""
    try:
        table = json.loads(read_bytes(folder / SPEC_FILE))
    except ValueError as error:
        raise CheckpointError(f"{folder / SPEC_FILE} is not JSON", DAMAGED) from error
    if not isinstance(table, dict) or not isinstance(table.get("sha256"), str):
        raise CheckpointError(f"{folder / SPEC_FILE} describes no release", DAMAGED)
    return table


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}",
            "Make a narrow release with `splitfl adapt`, or leave it out of the settings.",
        ) from error
