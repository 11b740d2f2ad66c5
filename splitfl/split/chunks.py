"""Numbers of tokens on which memory depends, for who computes and for who plans.

The head's tokens are cut into chunks, so that a chunk's logits stay within a fixed number of bytes; few tokens attend
in fp32 (splitfl/split/kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator

LOGIT_BYTES = 64 << 20  # most that one chunk's fp32 logits may take
FEW_TOKENS = 128  # in a record, up to which a CPU is faster with attention in fp32 under bf16 autocast too


def chunk_tokens(vocab: int, logit_bytes: int = LOGIT_BYTES) -> int:
    """How many tokens a chunk may have when its logits are kept below ``logit_bytes``."""
    return max(1, logit_bytes // (4 * vocab))


def chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``range(count)`` into pieces of at most ``size``."""
    for begin in range(0, count, size):
        yield begin, min(begin + size, count)
