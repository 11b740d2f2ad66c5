"""glibc's allocator, told to keep what a computation frees: the next step asks for the same blocks again.

Left alone it gives every large block back to the kernel, and each step pays to have its pages zeroed anew.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BELOW_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Keep freed blocks below 1 GiB in the process; whether this C library could be told so."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(bool(mallopt(name, KEEP_BELOW_BYTES)) for name in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD))


def give_back_freed_memory() -> None:
    """Give what was freed back to the system, where this C library can: after something large that comes but once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
