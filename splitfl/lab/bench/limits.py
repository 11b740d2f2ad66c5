"""A real limit on another process's memory, as a container has it: a control group, where one can be made.

Elsewhere RLIMIT_DATA (``ulimit -d``), which counts a process's private writable addresses, resident or not, and so is
tighter: what the heap has freed still counts. RLIMIT_AS would count reserved addresses too.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from client_model.memory import CGROUPS, PROC_CGROUP

EMPTIED_WITHIN_S = 2.0  # what the kernel may take to see that a group's last process has ended


@dataclass(frozen=True)
class MemoryLimit:
    """``enter`` puts the process that calls it under the limit, for good; ``kind`` says what sort of limit it is."""

    kind: str
    enter: Callable[[], object]


@contextmanager
def memory_limit(nbytes: int, data: int) -> Iterator[MemoryLimit]:
    """A limit of ``nbytes`` of memory, or else of ``data`` bytes of private addresses; it ends with the block."""
    group = make_group(nbytes)
    with data_limit(data) if group is None else group_limit(group) as limit:
        yield limit


@contextmanager
def data_limit(nbytes: int) -> Iterator[MemoryLimit]:
    """At most ``nbytes`` of private writable addresses."""
    yield MemoryLimit("RLIMIT_DATA", partial(resource.setrlimit, resource.RLIMIT_DATA, (nbytes, nbytes)))


@contextmanager
def group_limit(group: Path) -> Iterator[MemoryLimit]:
    """What the control group ``group`` allows; it is deleted with the block."""
    try:
        yield MemoryLimit("control group", partial((group / "cgroup.procs").write_text, str(0)))  # 0: whoever writes
    finally:
        remove_group(group)


def make_group(nbytes: int, memberships: Path = PROC_CGROUP, root: Path = CGROUPS) -> Path | None:
    """A new control group of at most ``nbytes`` within this process's own; None where none can be made."""
    if not memberships.exists():  # no Linux
        return None
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" and (root / "cgroup.controllers").exists():
            parent, limit = root / path.lstrip("/"), "memory.max"
        elif "memory" in controllers.split(","):
            parent, limit = root / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
        else:
            continue
        if (group := try_group(parent, limit, nbytes)) is not None:
            return group
    return None


def try_group(parent: Path, limit: str, nbytes: int) -> Path | None:
    """A group within ``parent`` whose file ``limit`` holds ``nbytes``; None where the kernel does not allow that."""
    try:
        group = Path(tempfile.mkdtemp(prefix="splitfl-", dir=parent))
    except OSError:
        return None
    try:
        with (group / limit).open("r+") as file:  # one that the kernel has made, or none at all
            file.write(str(nbytes))
    except OSError:
        group.rmdir()
        return None
    return group


def remove_group(group: Path) -> None:
    """Delete a group whose processes have ended; one that stays occupied is left to the kernel."""
    until = time.monotonic() + EMPTIED_WITHIN_S
    while time.monotonic() < until:
        try:
            os.rmdir(group)
        except OSError:
            time.sleep(0.05)
        else:
            return
