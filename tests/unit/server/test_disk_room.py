"""A disk that cannot be written is waited for; what is damaged is said at once."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

import server_model.disk
from server_model.disk import once_there_is_room
from splitfl.errors import StorageError
from splitfl.files import storage_errors


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_model.disk, "RETRY_S", 0.0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EFBIG])
def test_write_that_the_system_refuses_is_tried_until_it_goes_through(number: int) -> None:
    failures, told = [number, number], []

    def write(what: str) -> str:
        with storage_errors(Path(what)):
            if failures:
                raise OSError(failures.pop(), "full")
        return what

    assert asyncio.run(once_there_is_room(lambda *what: told.append(what), write, "x")) == "x"
    assert [full for _, full in told] == [number in (errno.ENOSPC, errno.EDQUOT)] * 2


@pytest.mark.parametrize("cause", [ValueError(), None])
def test_what_waiting_does_not_mend_is_raised_at_once(cause: Exception | None) -> None:
    def write() -> None:
        raise StorageError("the note cannot be read") from cause

    with pytest.raises(StorageError, match="note"):
        asyncio.run(once_there_is_room(pytest.fail, write))
