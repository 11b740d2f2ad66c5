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


def still_held(way: str) -> int:
    """Bytes that a process holds of a large block that it has freed."""
    ended = subprocess.run([sys.executable, "-c", FREED, way], check=True, capture_output=True, text=True)
    return int(ended.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_blocks_stay_with_the_process() -> None:
    assert still_held("keep") > 40 << 20
    assert still_held("leave") < 8 << 20


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
