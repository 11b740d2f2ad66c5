"""The demo's processes: started, listened to, measured, and ended whatever happens.

Each is a new interpreter that prints JSON events on stdout; its stderr goes to a log file. A process that fails ends
the demo, and only processes started here are ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from splitfl.errors import SplitFLError
from splitfl.lab.peaks import peak_rss
from splitfl.spinning import brief_spins

POLL_S = 0.2  # between looks at the memory
GRACE_S = 3.0  # from asking a process to end until it is ended

Event = dict[str, Any]

# Said before torch is imported there. Nothing is downloaded.
ENVIRONMENT = {
    **brief_spins({}),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # glibc would give every large tensor back to the system and take fresh pages for the next: a tenth of the time.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
}


@dataclass
class Child:
    """One process. ``peak_rss`` is in bytes, as of the last look."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    peak_rss: int = 0

    def measure(self) -> None:
        """Look at the memory."""
        self.peak_rss = max(self.peak_rss, peak_rss(self.process.pid))

    def failure(self) -> SplitFLError:
        """Why it ended, out of its log, with its own exit code."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        code = self.process.returncode
        ended = f"exit code {code}" if code > 0 else f"it was ended by signal {-code}"
        why = said[-1] if said else lines[-1] if lines and code > 0 else ended
        error = SplitFLError(f"{self.name} failed: {why.rstrip('.')}", f"All it said is in {self.log}.")
        error.exit_code = code if 0 < code < 128 else SplitFLError.exit_code
        return error


class Children:
    """Processes that end with the ``with`` block. ``logs`` is the folder for their stderr."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.all: list[Child] = []
        self._open: set[str] = set()  # those whose stdout has not ended
        self._events: queue.Queue[tuple[Child, Event | None]] = queue.Queue()

    def __enter__(self) -> Children:
        self.logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, module: str, *arguments: object) -> None:
        """Run ``python -m module arguments`` under ``name``."""
        log = self.logs / f"{name}.log"
        with log.open("wb") as stderr, interrupts_put_off():
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=ENVIRONMENT | os.environ,
                process_group=0,  # Ctrl-C reaches the demo alone, which then ends them in order
            )
            child = Child(name, process, log)
            self.all.append(child)
        self._open.add(name)
        threading.Thread(target=self._listen, args=(child,), name=f"listen-{name}", daemon=True).start()

    def events(self) -> Iterator[tuple[str, Event]]:
        """(name, event) as they come, until every process has ended well.

        Raises SplitFLError with the process's own message when one fails.
        """
        looked = 0.0
        while self._open:
            if time.monotonic() - looked > POLL_S:
                self._measure()
                looked = time.monotonic()
            try:
                child, event = self._events.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if event is not None:
                yield child.name, event
            else:
                self._ended(child)

    def peak_rss(self) -> dict[str, int]:
        """Bytes of memory that each process held at most."""
        return {child.name: child.peak_rss for child in self.all}

    def stop(self) -> None:
        """End every process that still runs: ask, wait a little, insist."""
        try:
            for child in self.all:
                if child.process.poll() is None:
                    child.process.terminate()
            deadline = time.monotonic() + GRACE_S
            for child in self.all:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also when another Ctrl-C comes meanwhile
            for child in self.all:
                if child.process.poll() is None:
                    child.process.kill()
                    child.process.wait()

    def _listen(self, child: Child) -> None:
        """On a thread of its own: stdout, line by line, into the queue."""
        assert child.process.stdout is not None
        with child.process.stdout as lines:
            for line in lines:
                if line.startswith(b"{"):
                    self._events.put((child, json.loads(line)))
        self._events.put((child, None))

    def _measure(self) -> None:
        for child in self.all:
            if child.name in self._open:
                child.measure()

    def _ended(self, child: Child) -> None:
        if child.process.wait() != 0:
            raise child.failure()
        self._open.discard(child.name)


@contextmanager
def interrupts_put_off() -> Iterator[None]:
    """Ctrl-C waits until the block has ended: no process is started without being noted down."""
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        ours = {}  # signals strike the main thread alone
    for number in ours:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
