"""The checksum at a frame's end: it tells bytes that changed on the way, where no TLS does.

CRC-32 alone would take a third of the time that a large frame takes on loopback. So the frame is first cut into
blocks that are XORed together, at the speed of memory; a frame of one block is its own fold. Against accidents,
not against people: anybody can compute it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

BLOCK_BYTES = 16_384


def checksum(parts: Sequence[bytes | memoryview]) -> int:
    """CRC-32 of the fold of ``parts`` one after another; of the parts themselves while they fit into one block."""
    if sum(len(part) for part in parts) <= BLOCK_BYTES:
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        return crc
    folded, position = np.zeros(BLOCK_BYTES, np.uint8), 0
    for part in parts:
        fold(folded, np.frombuffer(part, np.uint8), position % BLOCK_BYTES)
        position += len(part)
    return zlib.crc32(folded.data)


def fold(folded: np.ndarray, data: np.ndarray, start: int) -> None:
    """XOR ``data`` into a block, from byte ``start`` of it on and round its end."""
    head = min(len(data), -start % BLOCK_BYTES)
    folded[start : start + head] ^= data[:head]
    blocks = (len(data) - head) // BLOCK_BYTES
    tail = head + blocks * BLOCK_BYTES
    if blocks:
        words = data[head:tail].view(np.uint64).reshape(blocks, -1)
        folded.view(np.uint64)[:] ^= np.bitwise_xor.reduce(words, axis=0)
    folded[: len(data) - tail] ^= data[tail:]
