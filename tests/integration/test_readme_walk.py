"""The README's walk by hand, pasted block by block into shells, with fewer steps and a port of its own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ALREADY_DONE = ("make install", ". .venv/bin/activate")
PATIENCE_S = 240


def walk() -> list[str]:
    """The shell blocks under "By hand", without the lines that install and activate."""
    section = (ROOT / "README.md").read_text().split("## By hand\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    kept = ["\n".join(line for line in block.splitlines() if line not in ALREADY_DONE) for block in blocks]
    return [block for block in kept if block]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare(folder: Path) -> dict[str, str]:
    """A folder with the recipe, shortened, and an environment with a home of its own."""
    shutil.copytree(ROOT / "docs" / "recipes", folder / "docs" / "recipes")
    recipe = folder / "docs" / "recipes" / "small.toml"
    text = recipe.read_text()
    assert "local_steps = 20" in text
    recipe.write_text(text.replace("local_steps = 20", "local_steps = 3"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(folder / "home")}


def agreement(folder: Path) -> str:
    """The hash at the end of the terms that the server has written down."""
    terms, until = folder / "runs" / "walk" / "server" / "agreement.txt", time.monotonic() + PATIENCE_S
    while not terms.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return terms.read_text().split()[-1]


class Shells:
    """Blocks pasted into terminals: all they print goes to one file each."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.running: list[subprocess.Popen[bytes]] = []

    def paste(self, block: str) -> Path:
        """Start a block; returns the file with its output."""
        log = self.folder / f"terminal-{len(list(self.folder.glob('terminal-*')))}.log"
        with log.open("wb") as out:
            self.running.append(
                subprocess.Popen(
                    ["bash", "-euc", block],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )
        return log

    def wait(self) -> None:
        """Until every block has ended well."""
        for process in self.running:
            assert process.wait(PATIENCE_S) == 0, self.story()
        self.running.clear()

    def story(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("terminal-*.log")))

    def close(self) -> None:
        for process in self.running:
            process.kill()


def test_walk_of_the_readme_works_when_pasted(tmp_path: Path) -> None:
    port = free_port()
    shells = Shells(tmp_path, prepare(tmp_path))
    try:
        for block in walk():
            in_a_terminal_of_its_own = "splitfl serve" in block or "splitfl join" in block
            here = block.replace("ws://127.0.0.1:7000", f"ws://127.0.0.1:{port}")
            if "splitfl join" in here:  # a person is asked, and says yes
                here = here.replace("splitfl join", f"splitfl join --accept {agreement(tmp_path)}")
            here = here.replace("splitfl serve", f"splitfl serve --listen 127.0.0.1:{port}")
            if not in_a_terminal_of_its_own:
                shells.wait()
            log = shells.paste(here)
            if not in_a_terminal_of_its_own:
                shells.wait()
    finally:
        shells.close()
    losses = [float(number) for number in re.findall(r"^loss ([\d.]+) nats per token", log.read_text(), re.MULTILINE)]
    assert len(losses) == 2  # before and after
    assert losses[1] < losses[0]
