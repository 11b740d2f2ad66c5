"""What both shells share: fragments, and a process that is fit for large frames."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from splitfl import pipe
from splitfl.cli import app
from splitfl.pipe import FRAGMENT_BYTES, send_frame, tune_process


class Sent:
    """A connection that remembers."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def send(self, message: Any) -> None:
        self.messages.append(message if isinstance(message, bytes) else list(message))


def test_small_frame_is_one_message_and_a_large_one_is_views_of_itself() -> None:
    sent, large = Sent(), bytes(2 * FRAGMENT_BYTES + 5)
    asyncio.run(send_frame(sent, [b"head", b"tail"]))  # type: ignore[arg-type]
    asyncio.run(send_frame(sent, [b"head", large]))  # type: ignore[arg-type]
    small, fragments = sent.messages
    assert small == b"headtail"
    assert [len(fragment) for fragment in fragments] == [4, FRAGMENT_BYTES, FRAGMENT_BYTES, 5]
    assert all(fragment.obj is large for fragment in fragments[1:])


@pytest.mark.parametrize(("spec", "said"), [(None, 1), (object(), 0)])
def test_missing_c_extension_is_said(spec: object, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "find_spec", lambda _: spec)
    told: list[str] = []
    tune_process(told.append)
    assert len(told) == said
    assert all("C extension" in line for line in told)


@pytest.mark.parametrize(
    "command",
    [["serve", "{missing}", "--state", "{state}"], ["join", "ws://127.0.0.1:1", "--name", "a", "--data", "{missing}"]],
)
def test_serve_and_join_tune_their_process_first(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipe, "find_spec", lambda _: None)
    monkeypatch.setattr(pipe, "keep_freed_memory", lambda: told.append("kept"))
    told: list[str] = []
    arguments = [part.format(missing=tmp_path / "missing", state=tmp_path / "state") for part in command]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code != 0  # for want of a model, or of data
    assert told == ["kept"]
    assert "C extension" in ended.output
