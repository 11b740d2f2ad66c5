"""Telling an allocation that failed for want of memory from every other error."""

from __future__ import annotations

import torch

ALLOCATOR_SAYS = ("not enough memory", "can't allocate memory", "Cannot allocate memory")  # c10's CPU allocator


def is_shortage(error: BaseException) -> bool:
    """Whether ``error`` says that there was no memory: Python's own, the GPU's, or torch's allocator on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATOR_SAYS)
