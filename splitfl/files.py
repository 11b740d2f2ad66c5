"""Files that are whole or not there: temporary name, fsync, rename. A full disk leaves the older ones untouched."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from splitfl.errors import ConfigError, StorageError


@contextmanager
def storage_errors(what: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names ``what``."""
    try:
        yield
    except PermissionError as error:
        raise StorageError(
            f"cannot write {what}: {error.strerror}", "Run this as the user that owns the folder, or change its owner."
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write {what}: {error.strerror or error}",
            "Free some space or mend the folder, then start again: the older state is whole.",
        ) from error


@contextmanager
def claimed(folder: Path, option: str = "--state") -> Iterator[None]:
    """Keep other processes out of a state folder while the block runs; the claim dies with the process.

    ``option`` is the one that names the folder.

    Raises ConfigError when another process has it or it is a file, StorageError when it cannot be written.
    """
    if folder.is_file():
        raise ConfigError(f"{folder} is a file", f"Name a folder with {option}.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("ab")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder} is in use by another process",
                f"Wait for its end, or stop it; another one needs another {option}.",
            ) from None
        yield


@contextmanager
def appending_alone(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for appending when no other process does; until then, wait."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_open_as(file, path):  # whoever had it may have renamed or deleted it
                yield file
                return


def is_open_as(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def clear_unfinished(folder: Path) -> None:
    """Delete what ``new_folder`` and ``write_file`` left in ``folder`` when a crash interrupted them."""
    for path in folder.glob(".new-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well. Raises StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
        try:
            yield work
            for file in work.iterdir():
                sync(file)
            sync(work)
            if path.exists():
                shutil.rmtree(path)
            work.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write ``path`` as a whole. Raises StorageError."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
        sync(path.parent)


def keep_file(path: Path, data: bytes) -> None:
    """Have ``path`` hold ``data``: it is not written anew, for the disk may be full. Raises StorageError."""
    with storage_errors(path):
        known = path.is_file() and path.read_bytes() == data
    if not known:
        write_file(path, data)


def give_usual_mode(path: Path) -> None:
    """Give ``path`` the mode of any new file beside it: safetensors writes 0600, whatever the umask says."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()


def numbered(folder: Path, prefix: str) -> list[int]:
    """Numbers of the folders named ``prefix`` and six digits or more, smallest first; anything else is not ours."""
    names = [path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) >= 6)


def sync(path: Path) -> None:
    """fsync a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
