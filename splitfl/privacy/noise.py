"""Gaussian noise from a cryptographic stream.

torch's CPU generator keeps 32 bits of its seed, so whoever knows one record can try all seeds and take the noise off
every other one. Here 256 bits from the operating system key ChaCha20, are never stored, and die with the process.

Draws are float64; the caller casts afterwards, which is post-processing. What is not defended: the gaps between
floating-point numbers of a normal draw (Mironov 2012); sums are rounded to the wire's 8 or 24 bits of mantissa, which
hides most of them, and nothing is claimed beyond that.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from typing import Protocol

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from splitfl.errors import ConfigError

KEY_BYTES = 32
STREAM_BYTES = 1 << 34  # of one key
CHUNK_DRAWS = 1 << 17  # normals made at once: what fits a core's cache
ZEROS = memoryview(bytes(8 * CHUNK_DRAWS))  # what the cipher turns into its stream


class NormalSource(Protocol):
    """Where noise comes from."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent standard normals, float64, on the CPU."""
        ...


class NoiseStream:
    """Standard normals from ChaCha20 by Box and Muller. The stream never repeats; it cannot be restored."""

    def __init__(self, key: bytes | None = None) -> None:
        """``key``: 32 bytes, for tests and simulations alone; by default the operating system draws it."""
        self.simulated = key is not None
        self._start(secrets.token_bytes(KEY_BYTES) if key is None else key)

    def _start(self, key: bytes) -> None:
        """Begin a stream; it is good for 256 GiB, after which its counter would come round."""
        self._key, self._left = key, STREAM_BYTES
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Independent standard normals, float64, on the CPU."""
        count = math.prod(shape)
        drawn = torch.empty(count + count % 2, dtype=torch.float64)
        for part in torch.split(drawn, CHUNK_DRAWS):
            box_muller(self._uniforms(len(part)), part)
        return drawn[:count].reshape(shape)

    def _uniforms(self, count: int) -> Tensor:
        """Uniform in (0, 1), on a grid of 2^-53."""
        if 8 * count > self._left:
            self._start(
                hashlib.sha256(self._key + b"next").digest() if self.simulated else secrets.token_bytes(KEY_BYTES)
            )
        self._left -= 8 * count
        stream = bytearray(8 * count)
        self._stream.update_into(ZEROS[: 8 * count], stream)
        words = torch.frombuffer(stream, dtype=torch.int64).bitwise_and_(2**53 - 1)
        return words.double().add_(0.5).mul_(2.0**-53)


def box_muller(uniforms: Tensor, out: Tensor) -> None:
    """An even number of uniforms -> as many standard normals in ``out``, float64 (N,)."""
    half = len(uniforms) // 2
    radius = uniforms[:half].log_().mul_(-2).sqrt_()
    angle = uniforms[half:].mul_(2 * math.pi)
    torch.mul(radius, angle.cos(), out=out[:half])
    torch.mul(radius, angle.sin_(), out=out[half:])


def open_stream(*, seed: int | None, simulated: bool) -> NoiseStream:
    """The noise of a run. A seed is for simulations, where nothing private leaves. Raises ConfigError elsewhere."""
    if seed is None:
        return NoiseStream()
    if not simulated:
        raise ConfigError(
            "noise from a seed protects nothing: whoever guesses the seed takes it off",
            'Leave the seed out, or set privacy.mode = "off" or simulate.',
        )
    return NoiseStream(hashlib.sha256(f"splitfl simulated noise {seed}".encode()).digest())
