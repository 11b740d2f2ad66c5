"""Most memory that another process has held."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path

import psutil

LOOK_EVERY_S = 0.02


def peak_rss(pid: int) -> int:
    """Most bytes of memory that a running process has held so far; 0 when it has gone.

    Linux keeps that mark itself. ``ru_maxrss`` of an ended process is no help: it counts the memory of the process
    that started it as well. Elsewhere it is the memory held now, and the largest of many looks must do.
    """
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


class PeakWatch:
    """Looks at a child process until it ends."""

    def __init__(self, process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
        self._process = process
        self._peak = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while self._process.returncode is None:
            self._peak = max(self._peak, peak_rss(self._process.pid))
            time.sleep(LOOK_EVERY_S)

    @property
    def peak(self) -> int:
        """Most bytes of memory that it has held; waits until somebody has waited for its end."""
        self._thread.join()
        return self._peak
