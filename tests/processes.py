"""The commands of splitfl as processes of their own, over real sockets: start them, read their events, stop, kill.

Importing torch and transformers takes a process seconds. So one process, the standard library's fork server,
imports them once and forks for each command; what runs from ``splitfl.cli.main`` on is the same. ``fresh=True``
starts a new interpreter with ``-m splitfl.cli``, and ``SPLITFL_TESTS_FRESH=1`` does so for every command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

POLL_S = 0.01
PATIENCE_S = 90.0  # most that a test waits for anything; it only matters when something is broken

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["splitfl.cli", "client_model.participant", "server_model.service", "splitfl.lab.whole"])

Settings = Mapping[str, Mapping[str, Any]]
agreements: dict[str, str] = {}  # by address: what the servers that tests started want accepted


class Command:
    """One running ``splitfl`` command. Its output goes to files in ``folder``."""

    def __init__(
        self, folder: Path, label: str, arguments: list[str], *, fresh: bool = False, limit: int | None = None
    ) -> None:
        """``limit``: bytes that no file it writes may exceed, as if the disk were full beyond them."""
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob(f"{label}-*.out")))
        self.label = label
        self.out, self.err = (folder / f"{label}-{number}.{kind}" for kind in ("out", "err"))
        self.out.touch()
        self.err.touch()
        self._exit_code: int | None = None
        self._fresh: subprocess.Popen[bytes] | None = None
        self._fork: Any = None
        if fresh or os.environ.get("SPLITFL_TESTS_FRESH"):
            with self.out.open("wb") as out, self.err.open("wb") as err:
                self._fresh = subprocess.Popen(
                    [sys.executable, "-m", "splitfl.cli", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    preexec_fn=(lambda: limit_files(limit)) if limit else None,
                )
        else:
            self._fork = _forks.Process(target=run_forked, args=(arguments, self.out, self.err, limit))
            self._fork.start()

    @property
    def pid(self) -> int:
        process = self._fresh if self._fresh is not None else self._fork
        return int(process.pid)

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._fresh.poll() if self._fresh is not None else self._fork.exitcode

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    @property
    def error(self) -> str:
        """The one line that says why it ended; fails when there are more, or a traceback."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.story()
        assert "Traceback" not in self.stderr, self.story()
        assert self.stderr.splitlines()[-1] == lines[0], self.story()
        return lines[0]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it printed with --json so far."""
        lines = self.stdout.splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]

    @property
    def report(self) -> dict[str, Any]:
        """A client's closing report."""
        return dict(self.events[-1]["report"])

    def named(self, event: str, **facts: Any) -> list[dict[str, Any]]:
        """Events of that name with those facts, so far."""
        return [e for e in self.events if e.get("event") == event and facts.items() <= e.items()]

    def wait_for(self, event: str, *, count: int = 1, timeout: float = PATIENCE_S, **facts: Any) -> dict[str, Any]:
        """Wait until ``count`` such events were printed; returns the last of them."""
        self._until(lambda: len(self.named(event, **facts)) >= count, f"{event} {facts or ''}", timeout)
        return self.named(event, **facts)[count - 1]

    def wait_for_stderr(self, text: str, timeout: float = PATIENCE_S) -> None:
        """Wait until ``text`` was said on stderr."""
        self._until(lambda: text in self.stderr, repr(text), timeout)

    def _until(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            running = self.exit_code is None
            if condition():
                return
            assert running, f"{self.label} ended while the test waited for {what}\n{self.story()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout} s\n{self.story()}"
            time.sleep(POLL_S)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """Wait for its end; returns the exit code."""
        deadline = time.monotonic() + timeout
        while self.exit_code is None:
            assert time.monotonic() < deadline, f"{self.label} still runs after {timeout} s\n{self.story()}"
            time.sleep(POLL_S)
        return self.exit_code

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    def kill(self) -> None:
        """End it at once, as a power cut would, and wait until it has gone."""
        if self.exit_code is None:
            with suppress(ProcessLookupError):  # it just ended, and the fork server has yet to say how
                os.kill(self.pid, signal.SIGKILL)
            self.wait(20)

    def limit_files(self, limit: int) -> None:
        """From now on no file of its may grow beyond ``limit`` bytes, as if the disk were full."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def lift_limit(self) -> None:
        """Give it disk space again."""
        self.limit_files(resource.RLIM_INFINITY)

    def story(self) -> str:
        """The last it said, for a failing test."""
        out, err = ("\n".join(text.splitlines()[-12:]) for text in (self.stdout, self.stderr))
        return f"--- {self.label} (exit {self.exit_code}) stdout\n{out}\n--- stderr\n{err}"


def run_forked(arguments: list[str], out: Path, err: Path, limit: int | None) -> None:
    """In the forked process: become the command."""
    from splitfl.cli import main

    for path, number in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
    limit_files(limit)
    sys.argv = ["splitfl", *arguments]
    main()


def limit_files(limit: int | None) -> None:
    """Let no file grow beyond ``limit`` bytes: writing more fails, as on a full disk."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


class Place:
    """A folder with a model, where a federation's processes run and leave their state."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = model
        self.commands: list[Command] = []
        self.agreement = ""  # what the server that was started last wants accepted

    def run(self, label: str, *arguments: object, **options: Any) -> Command:
        """Start any command."""
        started = Command(self.folder / "output", label, [str(argument) for argument in arguments], **options)
        self.commands.append(started)
        return started

    def serve(
        self,
        settings: Settings | None = None,
        *flags: object,
        port: int = 0,
        state: str = "server",
        wait: bool = True,
        **options: Any,
    ) -> Server:
        """Start the service, and wait until it listens; None for ``settings`` goes on with those in its state."""
        arguments: list[object] = [self.model, "--state", self.folder / state, "--threads", 1, "--json"]
        if settings is not None:
            arguments += ["--federation", write_settings(self.folder / f"{state}.toml", settings)]
        arguments += ["--listen", f"127.0.0.1:{port}", *flags]
        command = self.run("serve", "serve", *arguments, **options)
        return Server(self, command) if wait else Server(self, command, url="")

    def join(self, url: str, name: str, data: Path, *flags: object, state: str = "", **options: Any) -> Command:
        """Start a client with a state folder of its own; the cache of fetched tensors is shared."""
        folder = self.folder / (state or f"client-{name}")
        arguments = [url, "--name", name, "--data", data, "--state", folder, "--cache", self.folder / "cache"]
        terms = agreements.get(url, self.agreement)
        consent = ["--accept", terms] if terms and "--accept" not in flags else []
        plan = [] if "--plan" in flags else ["--plan", "federation"]  # what is measured differs from run to run
        return self.run("join", "join", *arguments, *consent, *plan, "--threads", 1, "--json", *flags, **options)

    def stop(self) -> None:
        """End whatever still runs."""
        for command in self.commands:
            command.kill()


class Server:
    """A running service and its address."""

    def __init__(self, place: Place, command: Command, url: str | None = None) -> None:
        self.place = place
        self.command = command
        self.url = url or ""
        if url is None:
            listening = command.wait_for("listening")
            self.url, place.agreement = listening["url"], listening["agreement"]
            agreements[self.url] = place.agreement

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def again(self, **options: Any) -> Server:
        """Start it once more on the same state and port."""
        return self.place.serve(None, "--resume", port=self.port, **options)


@contextmanager
def place(folder: Path, model: Path) -> Iterator[Place]:
    """A Place whose processes end with the block."""
    here = Place(folder, model)
    try:
        yield here
    finally:
        here.stop()


def write_settings(path: Path, settings: Settings) -> Path:
    """A ``federation.toml`` from tables of plain values."""
    lines: list[str] = []
    for table, fields in settings.items():
        lines.append(f"[{table}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


def with_settings(settings: Settings, **changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``settings`` with some fields of some tables changed."""
    return {table: {**settings.get(table, {}), **changes.get(table, {})} for table in {**settings, **changes}}
