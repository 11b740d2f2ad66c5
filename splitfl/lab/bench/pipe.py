"""``splitfl bench pipe``: what the product's own pipe carries over loopback, beside a bare TCP socket.

A client sends frames of 8 MiB and the service, in a process of its own, refuses each in a few bytes: no model has
its shape, so nothing is computed. What is timed is all that a frame goes through: checksum, masking and fragments in
the client's shell, the sockets, joining and checksum in the service's.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from client_model.link import Link
from splitfl.errors import LinkError, RefusedError
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.pipe import tune_process
from splitfl.split.families import build_small_model, small_config
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, Release, TensorBytes

FRAME_BYTES = 8 << 20
FRAMES, RUNS = 24, 5
UNDER_WAY = 2  # so that the next frame is made while one is in the sockets
BAR_GB_S = 0.8

SETTINGS = """
[batch]
records = 8
max_length = 4096
"""


def run(*, frames: int = FRAMES, runs: int = RUNS, say: Callable[[str], None] = lambda _: None) -> Result:
    """Both, in turn, ``runs`` times ``frames`` frames."""
    result = Result("pipe", {"frame_bytes": FRAME_BYTES, "frames": frames, "runs": runs, "under_way": UNDER_WAY})
    tune_process(say)
    rates: dict[str, list[float]] = {"raw TCP": [], "frames through both shells": []}
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        build_small_model(small_config("llama", layers=3, hidden=64, vocab=300), seed=0).save_pretrained(model)
        with served(model, SETTINGS, threads=1) as (url, _):
            link = Link(url, Hello(PROTOCOL_VERSIONS, "bench"), say=say)
            try:
                link.open()
                through_shells(link, UNDER_WAY)  # the first ones find their memory
                for _ in range(runs):
                    rates["raw TCP"].append(through_tcp(frames))
                    rates["frames through both shells"].append(through_shells(link, frames))
            finally:
                link.close()
    result.rows = [{"what": name, "GB_per_s": spread(values)} for name, values in rates.items()]
    for row in result.rows:
        say(f"{row['what']}: {row['GB_per_s']['median']:.2f} GB/s")
    carried = result.rows[1]["GB_per_s"]["median"]
    result.bars = [Bar("loopback, 8 MiB one way, GB/s", carried, BAR_GB_S, "higher")]
    return result


def through_shells(link: Link, frames: int) -> float:
    """GB/s of frames that travel up and are refused."""
    message = Release(0, 0, ("0" * 32,), TensorBytes("f32", (1, FRAME_BYTES // 4, 1), bytes(FRAME_BYTES)))
    waiting = deque(link.request(message) for _ in range(UNDER_WAY))
    began = time.perf_counter()
    for number in range(frames):
        check_refused(waiting.popleft().exception())
        if number < frames - UNDER_WAY:
            waiting.append(link.request(message))
    return frames * FRAME_BYTES / (time.perf_counter() - began) / 1e9


def check_refused(error: BaseException | None) -> None:
    """Raise what is not the answer that was meant."""
    if not isinstance(error, RefusedError):
        raise error or LinkError("the service took a frame that fits no model", "Tell the authors.")


def through_tcp(frames: int) -> float:
    """GB/s of as many bytes over a bare socket to a thread that throws them away."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        reading = threading.Thread(target=drain, args=(far, frames * FRAME_BYTES))
        reading.start()
        data, began = bytes(FRAME_BYTES), time.perf_counter()
        for _ in range(frames):
            near.sendall(data)
        reading.join()
        return frames * FRAME_BYTES / (time.perf_counter() - began) / 1e9


def drain(connection: socket.socket, nbytes: int) -> None:
    """Read so many bytes."""
    block = bytearray(1 << 20)
    while nbytes:
        nbytes -= connection.recv_into(block)
