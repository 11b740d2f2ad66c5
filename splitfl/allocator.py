"""What glibc's allocator is told: keep what a computation frees; serve all threads from one heap; give back now.

Left alone it gives every large block back to the kernel, and each step pays to have its pages zeroed anew.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEEP_BELOW_BYTES = (1 << 30, 32 << 20)  # the latter is the most that glibc took before 2.35


def keep_freed_memory() -> bool:
    """Keep freed blocks below 1 GiB (old glibc: 32 MiB) in the process; whether this C library could be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    below = next((size for size in KEEP_BELOW_BYTES if mallopt(M_MMAP_THRESHOLD, size)), 0)
    return bool(below and mallopt(M_TRIM_THRESHOLD, below))


def share_one_heap() -> None:
    """All threads from now on take from one heap, where this C library has several.

    What one thread frees serves the others then; and a thread that starts where memory has run out finds what was
    freed, where it would fail to make a heap of its own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Give what was freed back to the system, where this C library can: after something large that comes but once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
