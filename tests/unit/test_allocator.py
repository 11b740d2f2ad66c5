"""glibc keeps what was freed, where it can be told so."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from splitfl.allocator import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory

FREED = """
import sys, psutil
from splitfl.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
before = psutil.Process().memory_info().rss
block = bytearray(b"x") * (48 << 20)  # more than glibc keeps by itself
del block
print(psutil.Process().memory_info().rss - before)
"""

#: fills all the memory that it may have, gives every other block back, and starts a thread
SECOND_THREAD = """
import resource, sys, threading
import psutil
from splitfl.allocator import keep_freed_memory, share_one_heap
keep_freed_memory()
if sys.argv[1] == "share":
    share_one_heap()
first = threading.Thread(target=lambda: None)
first.start(); first.join()  # its stack is kept for the next one
most = psutil.Process().memory_info().data + (32 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
held = []
for power in range(20, 5, -1):
    try:
        while True:
            held.append(bytearray(1 << power))
    except MemoryError:
        pass
del held[::2]
second = threading.Thread(target=lambda: print("ran", flush=True), daemon=True)
second.start(); second.join()
"""


def still_held(way: str) -> int:
    """Bytes that a process holds of a large block that it has freed."""
    ended = subprocess.run([sys.executable, "-c", FREED, way], check=True, capture_output=True, text=True)
    return int(ended.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_blocks_stay_with_the_process() -> None:
    assert still_held("keep") > 40 << 20
    assert still_held("leave") < 8 << 20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_thread_starts_where_memory_had_run_out_and_would_wait_for_ever_otherwise() -> None:
    command = [sys.executable, "-c", SECOND_THREAD]
    shared = subprocess.run([*command, "share"], check=True, capture_output=True, text=True, timeout=60)
    assert shared.stdout == "ran\n"
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([*command, "leave"], capture_output=True, timeout=5)


def library(takes: Callable[[int, int], bool]) -> tuple[SimpleNamespace, dict[int, int]]:
    """A C library whose mallopt takes what ``takes`` says, and what it took."""
    taken: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if takes(name, value):
            taken[name] = value
        return int(takes(name, value))

    return SimpleNamespace(mallopt=mallopt), taken


def test_old_glibc_takes_the_most_that_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, taken = library(lambda name, value: name == M_TRIM_THRESHOLD or value <= 32 << 20)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: fake)
    assert keep_freed_memory()
    assert taken == {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 32 << 20}


@pytest.mark.parametrize("fake", [SimpleNamespace(), library(lambda *_: False)[0]])
def test_other_libraries_are_left_alone(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: fake)
    assert not keep_freed_memory()
