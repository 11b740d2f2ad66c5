"""A real limit on another process's memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from splitfl.lab.bench.limits import group_limit, make_group, memory_limit, try_group

MIB = 1 << 20
TAKES = "import sys; held = bytearray(b'x') * (int(sys.argv[1]) << 20); print('has it')"


@pytest.mark.parametrize(("wanted", "gets"), [(16, True), (512, False)])
def test_process_cannot_have_more_than_its_limit(wanted: int, gets: bool) -> None:
    with memory_limit(256 * MIB, 256 * MIB) as limit:
        command = [sys.executable, "-c", TAKES, str(wanted)]
        ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit.enter)
    assert (ended.stdout == "has it\n") == gets
    assert (ended.returncode == 0) == gets


def test_group_is_gone_with_the_block(tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    with group_limit(group):
        assert group.exists()
    assert not group.exists()


@pytest.mark.parametrize("line", ["4:memory:/here", "0::/here", "3:cpu:/", ""])
def test_where_no_group_can_be_made_there_is_none_and_nothing_stays(tmp_path: Path, line: str) -> None:
    for root in (tmp_path / "here", tmp_path / "memory/here"):
        root.mkdir(parents=True)  # folders that no kernel fills
    (tmp_path / "cgroup.controllers").touch()
    memberships = tmp_path / "cgroup"
    memberships.write_text(f"{line}\n" if line else "")
    assert make_group(MIB, memberships, tmp_path) is None
    assert make_group(MIB, tmp_path / "none", tmp_path) is None
    assert not list(tmp_path.rglob("splitfl-*"))


def test_group_holds_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_by_the_kernel(prefix: str, dir: Path) -> str:
        group = dir / f"{prefix}x"
        group.mkdir()
        (group / "memory.max").write_text("max       ")
        return str(group)

    monkeypatch.setattr("splitfl.lab.bench.limits.tempfile.mkdtemp", made_by_the_kernel)
    group = try_group(tmp_path, "memory.max", 123456789)
    assert group is not None
    assert (group / "memory.max").read_text().startswith("123456789")
