"""The trunk service over real sockets inside the test's own process, where its coordinator can be looked at."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from server_model.coordinator import Coordinator, Progress
from server_model.service import Service
from splitfl.config import Federation


class ServiceThread:
    """A service on a free loopback port, on an event loop of its own; ``events`` is what it has reported."""

    def __init__(self, model: Path, settings: Federation, state: Path, *, resume: bool = False, **options: Any) -> None:
        self.events: list[Progress] = []
        self._spawned: list[Future[Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.coordinator: Coordinator = self.call(self._make(model, settings, state, resume))
        self.service = Service(self.coordinator, **options)
        self.url = f"ws://127.0.0.1:{self.call(self.service.start('127.0.0.1', 0))}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def _make(self, model: Path, settings: Federation, state: Path, resume: bool) -> Coordinator:
        device = torch.device("cpu")
        return Coordinator(model, settings, state, device=device, resume=resume, report=self.events.append)

    def call(self, work: Any) -> Any:
        """Run a coroutine on the service's loop; returns its result."""
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=60)

    def spawn(self, work: Any) -> None:
        """Begin a coroutine on the service's loop; it ends with the service."""
        self._spawned.append(asyncio.run_coroutine_threadsafe(work, self._loop))

    def named(self, event: str, **facts: Any) -> list[dict[str, object]]:
        """Facts of the events of that name with those facts, so far."""
        return [e.facts for e in list(self.events) if e.event == event and facts.items() <= e.facts.items()]

    def stop(self) -> None:
        """Close everything."""
        for work in self._spawned:
            work.cancel()
        self.call(self.service.stop())
        self.coordinator.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
