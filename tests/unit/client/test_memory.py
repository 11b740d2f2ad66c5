"""What limits this process's memory, read from control groups as the kernel writes them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from client_model import memory
from client_model.memory import Room, cgroup_left, measure_room, rooms
from client_model.shortage import is_shortage


def write_group(folder: Path, limit: tuple[str, str], usage: tuple[str, str], idle: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit[0]).write_text(limit[1] + "\n")
    (folder / usage[0]).write_text(usage[1] + "\n")
    (folder / "memory.stat").write_text(f"anon 5\n{idle}\n")


def test_group_of_version_2_and_all_around_it_count(tmp_path: Path) -> None:
    memberships, root = tmp_path / "cgroup", tmp_path / "fs"
    memberships.write_text("0::/outer/inner\n")
    write_group(root / "outer/inner", ("memory.max", "max"), ("memory.current", "100"), "inactive_file 0")
    write_group(root / "outer", ("memory.max", "1000"), ("memory.current", "400"), "inactive_file 150")
    write_group(root, ("memory.max", "5000"), ("memory.current", "500"), "inactive_file 0")
    assert list(cgroup_left(memberships, root)) == [1000 - 400 + 150, 4500]


def test_group_of_version_1_is_read_below_its_controller(tmp_path: Path) -> None:
    memberships, root = tmp_path / "cgroup", tmp_path / "fs"
    memberships.write_text("9:name=systemd:/x\n4:cpu,memory:/job\n0::/\n")
    names = (("memory.limit_in_bytes", "1000"), ("memory.usage_in_bytes", "300"), "total_inactive_file 20")
    write_group(root / "memory/job", *names)
    assert list(cgroup_left(memberships, root)) == [720]


def test_container_that_shows_its_own_group_as_the_root_is_understood(tmp_path: Path) -> None:
    memberships, root = tmp_path / "cgroup", tmp_path / "fs"
    memberships.write_text("0::/docker/0123\n")  # a path outside the container
    write_group(root, ("memory.max", "1000"), ("memory.current", "300"), "inactive_file 0")
    assert list(cgroup_left(memberships, root)) == [700]


def test_machine_without_control_groups_has_no_such_limit(tmp_path: Path) -> None:
    assert list(cgroup_left(tmp_path / "none", tmp_path)) == []


def test_tightest_limit_counts_and_what_is_held_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(rooms()).left > 0
    monkeypatch.setattr(memory, "rooms", lambda: [Room("wide", 50, 5), Room("tight", 30, 7), Room("idle", 40, 9)])
    assert measure_room(torch.device("cpu")) == Room("tight", 30, 7)
    assert Room("x", 30, 12).usable == 42
    assert Room("x", -5, 12).usable == 12


LIMITED = """
import resource, sys
from client_model.memory import rooms
resource.setrlimit(resource.{name}, (8 << 30, 8 << 30))
print(*[room.left for room in rooms() if "ulimit" in room.source])
"""


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_ulimit_is_seen(name: str) -> None:
    command = [sys.executable, "-c", LIMITED.format(name=name)]
    (left,) = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert 0 < int(left) < 8 << 30
    assert resource.getrlimit(getattr(resource, name))[0] != 8 << 30  # the test's own process is left alone


SHORT = """
import resource, torch
from client_model.shortage import is_shortage
torch.ones(1)
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))
for size in (1 << 30, 1 << 62):
    try:
        torch.empty(size, dtype=torch.uint8)
    except Exception as error:
        print(is_shortage(error))
"""


def test_allocators_refusal_is_told_from_other_errors() -> None:
    told = subprocess.run([sys.executable, "-c", SHORT], check=True, capture_output=True, text=True).stdout
    assert told.split() == ["True", "True"]
    assert is_shortage(MemoryError())
    assert is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_shortage(RuntimeError("shapes do not fit"))
    assert not is_shortage(ValueError("not enough memory"))
