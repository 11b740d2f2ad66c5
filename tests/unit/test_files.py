"""Files that are whole or not there, whatever interrupts their writing."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitfl.errors import ConfigError, StorageError
from splitfl.files import appending_alone, claimed, clear_unfinished, give_usual_mode, new_folder, sha256_of, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_folder_appears_as_a_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep/round-1") as work:
        (work / "a").write_text("one")
        assert not (tmp_path / "deep/round-1").exists()
    assert (tmp_path / "deep/round-1/a").read_text() == "one"
    assert names(tmp_path / "deep") == ["round-1"]


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with new_folder(tmp_path / "pause") as work:
            (work / text).write_text(text)
    assert names(tmp_path / "pause") == ["two"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_folder_that_cannot_be_finished_leaves_the_older_one_whole(tmp_path: Path, error: BaseException) -> None:
    with new_folder(tmp_path / "round") as work:
        (work / "a").write_text("one")

    def write_half() -> None:
        with new_folder(tmp_path / "round") as work:
            (work / "a").write_text("tw")
            raise error

    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)):
        write_half()
    assert (tmp_path / "round/a").read_text() == "one"
    assert names(tmp_path) == ["round"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_file_that_cannot_be_finished_leaves_the_older_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write_file(tmp_path / "state.json", b"one")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(StorageError, match=r"No space left on device.*Free some space"):
        write_file(tmp_path / "state.json", b"two")
    assert (tmp_path / "state.json").read_bytes() == b"one"
    assert names(tmp_path) == ["state.json"]


def test_storage_error_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/state\.json"):
        write_file(tmp_path / "file/state.json", b"one")


def test_leftovers_of_a_crash_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".new-folder").mkdir()
    (tmp_path / ".new-folder/weights").write_text("half")
    (tmp_path / ".new-file").write_text("half")
    (tmp_path / "round-1").mkdir()
    clear_unfinished(tmp_path)
    clear_unfinished(tmp_path / "missing")
    assert names(tmp_path) == ["round-1"]


def test_mode_becomes_that_of_any_new_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.touch()
    path.chmod(0o600)
    other = tmp_path / "other"
    other.touch()
    give_usual_mode(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert names(tmp_path) == ["other", "weights"]


# processes that want the same


def try_to_claim(folder: Path, answers: Any) -> None:
    try:
        with claimed(folder):
            answers.put("claimed")
    except ConfigError as error:
        answers.put(error.message)


def in_another_process(function: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=function, args=(*arguments, answers))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    return answer


def test_claimed_folder_is_refused_to_other_processes_until_it_is_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with claimed(folder):
        assert in_another_process(try_to_claim, folder) == f"{folder} is in use by another process"
    assert in_another_process(try_to_claim, folder) == "claimed"


def test_claim_of_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"is a file\. Name a folder with --state"), claimed(tmp_path / "file"):
        pass
    with pytest.raises(StorageError, match="file/below"), claimed(tmp_path / "file/below"):
        pass


def test_file_is_appended_to_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "blob.part"
    with appending_alone(path) as file:
        file.write(b"one")
        other = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    with appending_alone(path) as file:
        assert file.tell() == 3


def test_file_that_was_renamed_while_another_waited_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "blob.part"
    path.write_bytes(b"finished by another process")
    real = fcntl.flock

    def rename_first(file: Any, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.rename(tmp_path / "blob")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with appending_alone(path) as file:
        file.write(b"mine")
    assert (tmp_path / "blob").read_bytes() == b"finished by another process"
    assert path.read_bytes() == b"mine"


def test_hash_is_sha256() -> None:
    assert sha256_of(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
