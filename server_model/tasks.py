"""Tasks in the background of the event loop, alive until they end and heard when they fail; answers to who waits."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

T = TypeVar("T")


async def done(future: asyncio.Future[None]) -> None:
    """Wait for a future, as a coroutine."""
    await future


BACKGROUND_FAILURE = "a background task failed"
_tasks: set[asyncio.Task[None]] = set()


def spawn(work: Any) -> None:
    """Run a coroutine in the background and keep it alive until it ends."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_ended)


def resolve(reply: asyncio.Future[T] | None, value: T) -> None:
    """Answer somebody, if there is somebody who still waits."""
    if reply is not None and not reply.done():
        reply.set_result(value)


def fail(reply: asyncio.Future[T] | None, error: BaseException) -> None:
    """Answer somebody with an error, if there is somebody who still waits."""
    if reply is not None and not reply.done():
        reply.set_exception(error)


def _ended(task: asyncio.Task[None]) -> None:
    """A background task that failed tells the loop's owner instead of vanishing: somebody may wait for its work."""
    _tasks.discard(task)
    error = None if task.cancelled() else task.exception()
    if error is not None:
        context = {"message": BACKGROUND_FAILURE, "exception": error, "task": task}
        task.get_loop().call_exception_handler(context)
