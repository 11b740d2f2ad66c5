"""The checksum: the same as the slow, obvious way, however the frame is cut into parts; and it notices what changed."""

from __future__ import annotations

import itertools
import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.wire.checksum import BLOCK_BYTES, checksum


def slowly(data: bytes) -> int:
    """CRC-32 of all blocks XORed, as whole numbers."""
    if len(data) <= BLOCK_BYTES:
        return zlib.crc32(data)
    folded = 0
    for start in range(0, len(data), BLOCK_BYTES):
        folded ^= int.from_bytes(data[start : start + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0"), "big")
    return zlib.crc32(folded.to_bytes(BLOCK_BYTES, "big"))


SIZES = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 5 * BLOCK_BYTES, 5 * BLOCK_BYTES + 77]


@given(st.sampled_from(SIZES), st.lists(st.integers(0, 6 * BLOCK_BYTES), max_size=4), st.integers(0, 99))
def test_checksum_does_not_depend_on_the_parts(size: int, cuts: list[int], seed: int) -> None:
    data = random.Random(seed).randbytes(size)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    parts = [memoryview(data)[one:other] for one, other in itertools.pairwise(edges)]
    assert checksum(parts) == checksum([data]) == slowly(data)


@pytest.mark.parametrize("size", [9, BLOCK_BYTES, 3 * BLOCK_BYTES + 5])
def test_checksum_notices_a_changed_byte_and_two_that_changed_places(size: int) -> None:
    chance = random.Random(0)
    data = chance.randbytes(size)
    for _ in range(50):
        changed, place, other = bytearray(data), *sorted(chance.sample(range(min(size, BLOCK_BYTES)), 2))
        changed[place] ^= chance.randint(1, 255)
        assert checksum([changed]) != checksum([data])
        swapped = bytearray(data)
        swapped[place], swapped[other] = data[other], data[place]
        assert data[place] == data[other] or checksum([swapped]) != checksum([data])
