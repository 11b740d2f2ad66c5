"""Who computes with how many threads in the trunk service: one pool for the trunk, and none beside it.

libgomp keeps a pool of workers for every thread that computes in parallel. Once all of them together are more than the
cores, it no longer lets them spin at the many short barriers of a step but puts them to sleep at each: the trunk was
seen to be a quarter slower. So whoever else touches a tensor here, the loop's thread and the codec's, does it alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def computing_thread(name: str, threads: int) -> ThreadPoolExecutor:
    """One thread, started now, in which torch computes with ``threads``."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=compute_with, initargs=(threads,))
    executor.submit(torch.get_num_threads).result()  # torch settles a thread's number when it first asks
    return executor


def compute_with(threads: int) -> None:
    """From now on torch computes with ``threads`` in this thread, and in those that compute for the first time."""
    torch.set_num_threads(threads)
