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

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

from splitfl.errors import ConfigError

FloatArray = NDArray[np.float64]
KEY_BYTES = 32
STREAM_BYTES = 1 << 34  # of one key
CHUNK_DRAWS = 1 << 20  # normals made at once: 16 MiB of work


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
        drawn = np.empty(count + count % 2)
        for begin in range(0, len(drawn), CHUNK_DRAWS):
            part = drawn[begin : begin + CHUNK_DRAWS]
            part[:] = box_muller(self._uniforms(len(part)))
        return torch.from_numpy(drawn[:count]).reshape(shape)

    def _uniforms(self, count: int) -> FloatArray:
        """Uniform in (0, 1), on a grid of 2^-53."""
        if 8 * count > self._left:
            self._start(
                hashlib.sha256(self._key + b"next").digest() if self.simulated else secrets.token_bytes(KEY_BYTES)
            )
        self._left -= 8 * count
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return np.asarray(((words >> np.uint64(11)) + 0.5) * 2.0**-53, np.float64)


def box_muller(uniforms: FloatArray) -> FloatArray:
    """An even number of uniforms -> as many standard normals."""
    first, second = uniforms[::2], uniforms[1::2]
    radius, angle = np.sqrt(-2 * np.log(first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


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
