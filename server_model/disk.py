"""Writing to a disk that may be full: that holds its caller up, and loses nothing, until there is room."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from splitfl.errors import StorageError

log = logging.getLogger("splitfl.server.disk")
P = ParamSpec("P")
T = TypeVar("T")

RETRY_S = 10.0  # between attempts


async def once_there_is_room(
    held_up: Callable[[StorageError], None], write: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run ``write`` on a thread, again and again while the disk is full; ``held_up`` hears of each time that it was.

    Raises StorageError for what no room mends, such as a damaged file.
    """
    while True:
        try:
            return await asyncio.to_thread(write, *args, **kwargs)
        except StorageError as error:
            if not is_full(error):
                raise
            log.error("%s; trying again in %.0f s", error, RETRY_S)
            held_up(error)
            await asyncio.sleep(RETRY_S)


def is_full(error: StorageError) -> bool:
    """Whether it was for want of room, on the disk or in a quota."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
