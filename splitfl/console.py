"""What every command does alike: errors become one line and an exit code, logs go to stderr, JSON to stdout."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from splitfl.errors import INTERRUPTED_EXIT_CODE, ConfigError, SplitFLError

ERASED = "\r\x1b[K"  # back to the beginning of a terminal's line, without what stood there
LOADER_SAYS = ("failed to map segment", "cannot allocate memory")  # of a library for which there is no memory


@contextmanager
def command(*, verbose: bool = False) -> Iterator[None]:
    """Run a command's body: a SplitFLError is printed with its remedy and ends the process with its exit code."""
    level = logging.DEBUG if verbose else logging.WARNING
    logging.Formatter.converter = time.gmtime
    line = "%(asctime)s.%(msecs)03d+00:00 %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, stream=sys.stderr, format=line, datefmt="%Y-%m-%dT%H:%M:%S")
    for noisy in ("websockets", "asyncio", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield
    except SplitFLError as error:
        if verbose:
            logging.exception("the error came from here")
        line = " ".join(str(error).split())
        note(f"error: {''.join(filter(str.isprintable, line))}")  # some of it may be the other side's
        raise SystemExit(error.exit_code) from None
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and not any(words in str(error).lower() for words in LOADER_SAYS):
            raise
        note("error: out of memory. Give this process more, and check its limits (ulimit -a).")
        raise SystemExit(SplitFLError.exit_code) from None
    except KeyboardInterrupt:
        note("interrupted; what was saved stays saved")
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None


def print_json(value: object) -> None:
    """One JSON value on one line of stdout, at once."""
    sys.stdout.write(json.dumps(value, sort_keys=True) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """One line for a person, on stderr."""
    say(f"{text}\n")


def note_live(text: str) -> None:
    """A line on a terminal that whatever is noted next takes the place of."""
    say(text)


def say(text: str) -> None:
    """What is done does not end because nobody can read of it: a full disk under a log, a terminal that is gone."""
    with suppress(OSError):
        sys.stderr.write((ERASED if has_terminal() else "") + text)
        sys.stderr.flush()


def has_terminal() -> bool:
    """Whether a person looks on, at something that can take a line back."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` -> its parts. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535 or not host:
        raise ConfigError(f"{text!r} is no HOST:PORT", "Write it as 127.0.0.1:7000; port 0 takes any free one.")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether traffic to ``host`` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def require_loopback(host: str, *, insecure: bool) -> None:
    """Plain sockets are for this machine alone, unless somebody insists. Raises ConfigError."""
    if is_loopback(host):
        return
    if not insecure:
        raise ConfigError(
            f"{host} is not this machine, and this link is not encrypted",
            "Join with a join string (splitfl invite), which encrypts; --insecure sends everything in the clear.",
        )
    note(f"WARNING: the link to {host} is NOT encrypted: anyone on the way can read what crosses it.")
