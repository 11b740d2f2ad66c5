"""Clip, then noise: what is done to a tensor before it may leave. Pure; the gate keeps the books.

Clipping bounds what one record can change, so the noise that hides it can be fixed beforehand. Padding counts as
part of the record and is noised like the rest: its public padded length is all that shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from splitfl.errors import ConfigError
from splitfl.privacy.accounting import replace_one
from splitfl.privacy.noise import NormalSource

Clip = Literal["record", "token"]
LEAST_NORM = 1e-12  # below it a norm is taken for this: zero must not divide


@dataclass(frozen=True)
class Mechanism:
    """Isotropic Gaussian noise of standard deviation ``sigma`` after clipping to L2 norm ``clip_norm``.

    ``clip = "record"`` bounds the Frobenius norm of a record's (T, D), ``"token"`` that of each of its T rows.
    ``sigma = 0`` adds none. Raises ConfigError for numbers that are no bounds.
    """

    clip: Clip
    clip_norm: float
    sigma: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ConfigError(f"a clip norm of {self.clip_norm} bounds nothing", "Set one above 0 and finite.")
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ConfigError(f"sigma = {self.sigma} is no noise", "Set one above 0 and finite.")

    def sensitivity(self, padded_length: int) -> float:
        """Most that replacing one record of this padded length changes: 2C, or 2c sqrt(T)."""
        rows = padded_length if self.clip == "token" else 1
        return replace_one(self.clip_norm) * math.sqrt(rows)

    def clipped(self, hidden: Tensor) -> Tensor:
        """Records (B, T, D) -> the same within their bounds, float64 on the CPU."""
        return clip_records(hidden, self.clip_norm, self.clip)

    def __call__(self, hidden: Tensor, noise: NormalSource) -> Tensor:
        """Records (B, T, D) -> clipped and noised, float32 on the CPU."""
        bounded = self.clipped(hidden)
        if self.sigma > 0:
            bounded.add_(noise.normal(tuple(bounded.shape)), alpha=self.sigma)
        return bounded.float()


def clip_factors(states: Tensor, clip_norm: float, clip: Clip) -> Tensor:
    """What clipping multiplies (..., T, D) by: (..., 1, 1) for whole records, (..., T, 1) for tokens; 1 within bounds.

    In the dtype of ``states``, and it can be differentiated. A ``clip_norm`` of infinity clips nothing.
    """
    dims = (-2, -1) if clip == "record" else (-1,)
    norms = torch.linalg.vector_norm(states, dim=dims, keepdim=True)
    factors: Tensor = (clip_norm / norms.clamp_min(LEAST_NORM)).clamp_max(1.0)
    return factors


def clip_tokens(states: Tensor, clip_norm: float) -> Tensor:
    """Public vectors (..., D), each scaled down to ``clip_norm`` where it is longer: what models learn to be read
    through. Private ones go through ``Mechanism``."""
    clipped: Tensor = states * clip_factors(states, clip_norm, "token")
    return clipped


def clip_records(hidden: Tensor, clip_norm: float, clip: Clip) -> Tensor:
    """Scale records (B, T, D), or each of their rows, down to ``clip_norm``; float64, so that rounding stays below
    anything that the sensitivity could notice. Always a copy."""
    wide = hidden.detach().to(device="cpu", dtype=torch.float64)
    clipped: Tensor = wide * clip_factors(wide, clip_norm, clip)
    return clipped
