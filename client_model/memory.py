"""How much memory this process may have: the tightest of what the kernel, the container and the machine allow.

Each limit is read as what is left under it now, in bytes; added to what the process holds already, that is what a plan
may use. A GPU's memory counts where the client computes on one.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

#: addresses that a client comes to hold and never touches, which a ulimit counts: stacks, buffers of the link, holes of
#: the heap; seen to be 20 to 120 MiB more than the probe sees
UNTOUCHED = 96 << 20
PROC_CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Room:
    """``left`` bytes are free for this process under the limit ``source``; ``held`` it has already."""

    source: str
    left: int
    held: int

    @property
    def usable(self) -> int:
        """Bytes that the process may have in all."""
        return max(0, self.left) + self.held


def measure_room(device: torch.device) -> Room:
    """The tightest limit for a client that computes on ``device``."""
    return gpu_room(device) if device.type == "cuda" else min(rooms(), key=lambda room: room.left)


def gpu_room(device: torch.device) -> Room:
    """What the GPU has left, and what torch holds of it."""
    free, _ = torch.cuda.mem_get_info(device)
    return Room("GPU memory", free, torch.cuda.memory_reserved(device))


def rooms() -> Iterator[Room]:
    """Every limit on this process's memory that there is."""
    process = psutil.Process().memory_info()
    yield Room("free memory of the machine", psutil.virtual_memory().available, process.rss)
    for name, limit, used in (
        ("address space (ulimit -v)", resource.RLIMIT_AS, process.vms),
        ("data segment (ulimit -d)", resource.RLIMIT_DATA, process.data),
    ):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield Room(name, most - used - UNTOUCHED, process.rss)
    for left in cgroup_left():
        yield Room("memory limit of the container (cgroup)", left, process.rss)


def cgroup_left(memberships: Path = PROC_CGROUP, root: Path = CGROUPS) -> Iterator[int]:
    """Bytes left in each control group around this process that limits memory (version 1 or 2).

    File pages that nobody has touched lately are given up before anything fails, so they count as left.
    """
    if not memberships.exists():  # no Linux
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from groups_left(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from groups_left(root / "memory", path, *names)


def groups_left(root: Path, path: str, limit: str, usage: str, idle: str) -> Iterator[int]:
    """Bytes left in the group ``path`` below ``root`` and in all groups around it."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
            yield int(most) - int((folder / usage).read_text()) + idle_bytes(folder / "memory.stat", idle)
        if folder == root:
            return


def idle_bytes(stat: Path, name: str) -> int:
    """One figure of a group's statistics; 0 where there is none."""
    lines = stat.read_text().splitlines() if stat.exists() else []
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
