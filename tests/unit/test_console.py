"""What every command does alike: one line on stderr, an exit code, JSON on stdout, and no plain link by accident."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress

import pytest

from splitfl.console import command, is_loopback, note, parse_address, print_json, require_loopback
from splitfl.errors import ConfigError, DataError, SplitFLError, StorageError

CANNOT_ALLOCATE = "libgomp.so.1: cannot allocate memory in static TLS block"


@pytest.fixture(autouse=True)
def _quiet_logging() -> None:
    logging.getLogger().handlers.clear()


@pytest.mark.parametrize("kind", [SplitFLError, ConfigError, DataError, StorageError])
def test_command_ends_with_one_line_and_the_code_of_its_error(
    kind: type[SplitFLError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, command():
        raise kind("it broke", "Mend it.")
    assert ended.value.code == kind.exit_code
    assert capsys.readouterr().err == "error: it broke. Mend it.\n"


def test_command_keeps_an_error_of_many_lines_on_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), command():
        raise ConfigError("first\nsecond\n  third")
    assert capsys.readouterr().err == "error: first second third\n"


def test_command_ends_with_130_on_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, command():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; what was saved stays saved\n"


@pytest.mark.parametrize(
    "error",
    [MemoryError(), ImportError("libtorch.so: failed to map segment from shared object"), ImportError(CANNOT_ALLOCATE)],
)
def test_command_says_so_when_there_is_no_memory_for_its_libraries(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended, command():
        raise error
    assert ended.value.code == SplitFLError.exit_code
    assert capsys.readouterr().err.startswith("error: out of memory. Give this process more")


def test_command_lets_a_library_that_is_missing_through() -> None:
    with pytest.raises(ImportError, match="no module"), command():
        raise ImportError("no module of that name")


def test_line_that_nobody_can_read_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        note("a line")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_command_lets_a_fault_of_its_own_through() -> None:
    with pytest.raises(ZeroDivisionError), command():
        print(1 / 0)


def test_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"text": "one\ntwo", "number": 1})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"text": "one\ntwo", "number": 1}


@pytest.mark.parametrize(
    ("text", "parts"),
    [("127.0.0.1:7000", ("127.0.0.1", 7000)), ("[::1]:0", ("::1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_address_is_taken_apart(text: str, parts: tuple[str, int]) -> None:
    assert parse_address(text) == parts


@pytest.mark.parametrize("text", ["", "7000", ":7000", "host", "host:", "host:http", "host:65536", "host:-1", "host:²"])
def test_address_without_host_or_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_no_flag(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_loopback(host)
    require_loopback(host, insecure=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.org", "localhost.example.org", ""])
def test_network_address_needs_insecure_and_then_warns(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="--insecure"):
        require_loopback(host, insecure=False)
    require_loopback(host, insecure=True)
    assert "NOT encrypted" in capsys.readouterr().err
