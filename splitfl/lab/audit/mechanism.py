"""The mechanism as the attacker knows it: what becomes of a hidden state before the server sees it.

Attacks run public text through it, and compare what they observed with what a guess would have given without noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splitfl.codec.tensors import CodecName, rounded
from splitfl.privacy.mechanism import Clip, clip_factors


@dataclass(frozen=True, eq=False)
class Mechanism:
    """Encode (narrow releases alone), clip, add Gaussian noise, cast.

    ``clip_norm`` bounds the Frobenius norm of a record or the norm of each token; infinity clips nothing. ``sigma`` is
    the noise's standard deviation in each coordinate, in units of the activations. ``encoder`` (R, D) comes first.
    """

    clip: Clip
    clip_norm: float
    sigma: float = 0.0
    codec: CodecName = "fp32"
    encoder: Tensor | None = None

    def encode(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., R); as it is where there is no encoder."""
        return hidden if self.encoder is None else torch.matmul(hidden, self.encoder.T)

    def scale(self, encoded: Tensor) -> Tensor:
        """The factors that clip ``encoded`` (B, T, R): (B, 1, 1) for records, (B, T, 1) for tokens."""
        return clip_factors(encoded, self.clip_norm, self.clip)

    def clean(self, hidden: Tensor) -> Tensor:
        """What would be released of (B, T, D) without noise: (B, T, R)."""
        encoded = self.encode(hidden)
        return encoded * self.scale(encoded)

    def apply(self, hidden: Tensor, generator: torch.Generator) -> Tensor:
        """What the server sees of (B, T, D): (B, T, R)."""
        return self.blur(self.clean(hidden), generator)

    def blur(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Noise and cast of clipped states, of any shape."""
        noised = clean + self.sigma * torch.randn(clean.shape, generator=generator) if self.sigma else clean
        return rounded(noised, self.codec)

    def averaged(self, releases: float) -> Mechanism:
        """The mechanism whose noise is that of the mean of so many releases."""
        return replace(self, sigma=self.sigma / releases**0.5)
