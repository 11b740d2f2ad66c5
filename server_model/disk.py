"""Writing to a disk that may be full or away: that holds its caller up, and loses nothing, until it can be written."""

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
    held_up: Callable[[StorageError, bool], None], write: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run ``write`` on a thread, again and again while the system refuses it; ``held_up`` hears of each time,
    and whether it was for want of room.

    Raises StorageError for what waiting does not mend: a file whose content is damaged.
    """
    while True:
        try:
            return await asyncio.to_thread(write, *args, **kwargs)
        except StorageError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            log.info("%s", error)
            remedy = (
                f"Free some space or mend the folder: it is tried every {RETRY_S:.0f} s, and the older state is whole."
            )
            held_up(StorageError(error.message, remedy), is_full(error.__cause__))
            await asyncio.sleep(RETRY_S)


def is_full(error: OSError) -> bool:
    """Whether there was no room, on the disk or in a quota: then making some helps."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
