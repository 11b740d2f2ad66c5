"""``splitfl bench wan``: training over a distant and slow link, the naive way and the default, step by step in turn.

Naive is fp32 on the wire, one micro-batch under way, activations sent in each epoch. The default is the codec for such
a link, several micro-batches under way, activations released once. Both train the same model on the same records, each
with a trunk service in a process of its own behind a real websocket and an emulated link of its own.
"""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from client_model.ends import Ends
from client_model.entry import DirectEntry
from client_model.link import Link
from client_model.records import ClientData, open_tokenizer
from client_model.trainer import Trainer
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.lab.bench.overhead import parse_settings, plain_gate
from splitfl.lab.link_emulator import Conditions, LinkEmulator, Log
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound

SPEEDUP_BAR, BOUND_BAR, LOSS_BAR, RTT_BAR_S, RATE_BAR = 10.0, 0.85, 0.01, 0.003, 0.03
MBIT = 1e6 / 8  # bytes a second
SAMPLE_S = 0.01  # between readings of who computes: what the kernel counts in
TRIES = 7  # of the emulator's accuracy
BURST_S = 0.25  # that one of them lasts, for its rate

SETTINGS = """
[rounds]
local_steps = 100000
[batch]
records = {records}
micro_batches = {micro_batches}
max_length = {length}
in_flight = {in_flight}
[model]
n_bottom = 1
n_top = 1
compute = "fp32"
[optimizer]
schedule = "constant"
learning_rate = 3e-3
[wire]
codec = "{codec}"
[evaluation]
held_out_fraction = 0.0
"""


@dataclass(frozen=True)
class Scale:
    """The link, in seconds and bytes a second, and a model so small that the naive way waits for nothing else."""

    rtt_s: float = 0.05
    up: float = 20 * MBIT
    down: float = 100 * MBIT
    layers: int = 3
    hidden: int = 128
    vocab: int = 384
    records: int = 400  # in a step
    micro_batches: int = 50
    length: int = 64  # tokens in a record
    epochs: int = 5  # of one step each
    in_flight: int = 8

    @property
    def conditions(self) -> tuple[Conditions, Conditions]:
        """The link's way up and its way down."""
        return Conditions(self.up, delay_s=self.rtt_s / 2), Conditions(self.down, delay_s=self.rtt_s / 2)


@dataclass(frozen=True)
class Way:
    """How a contender uses the link; ``anew``: it sends activations in each epoch."""

    codec: str
    in_flight: int
    anew: bool


@dataclass(frozen=True)
class Step:
    """One training step: when (``time.monotonic``), its mean loss, and seconds of computing on each side."""

    began: float
    ended: float
    loss: float
    client_s: float
    trunk_s: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Activity:
    """Who computed in a step: cumulated seconds of each side's processor time, read every SAMPLE_S."""

    times: list[float] = field(default_factory=list)
    client: list[float] = field(default_factory=list)
    trunk: list[float] = field(default_factory=list)


class Contender:
    """A client behind an emulated link, and its trunk, until ``stack`` is closed; then the link's log is there."""

    def __init__(self, stack: ExitStack, model: Path, data: Path, scale: Scale, way: Way) -> None:
        sizes = {name: getattr(scale, name) for name in ("records", "micro_batches", "length")}
        text = SETTINGS.format(**sizes, in_flight=way.in_flight, codec=way.codec)
        settings = parse_settings(text)
        url, _ = stack.enter_context(served(model, text, threads=1))
        self._trunk = max(psutil.Process().children(), key=lambda child: float(child.create_time()))
        self.emulator = stack.enter_context(LinkEmulator(url, *scale.conditions))
        state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        link = Link(self.emulator.url, Hello(PROTOCOL_VERSIONS, "bench"), say=lambda _: None)
        stack.callback(link.close)
        link.open()
        gate = plain_gate(settings, state)
        self._trainer = Trainer(Ends(CheckpointFolder(model), settings, Cut(1, 1), torch.device("cpu")), link, gate)
        if way.anew:
            self._trainer.entry = DirectEntry(link, gate)
        link.ask(NextRound(0, 0, -1))
        self._batches = ClientData.open(data, settings, open_tokenizer(model)).micro_batches(range(scale.records))
        self.steps: list[Step] = []
        self.activity = Activity()  # of the last step

    def step(self) -> Step:
        """Train on all records once."""
        with self._watched() as activity:
            began = time.monotonic()
            loss = self._trainer.step(0, len(self.steps), self._batches)
            ended = time.monotonic()
        self.activity = activity
        client_s, trunk_s = (spent[-1] - spent[0] for spent in (activity.client, activity.trunk))
        self.steps.append(Step(began, ended, loss.mean, client_s, trunk_s))
        return self.steps[-1]

    @contextmanager
    def _watched(self) -> Iterator[Activity]:
        """Reads processor times until the context ends."""
        activity, ended = Activity(), threading.Event()

        def read() -> None:
            times = self._trunk.cpu_times()
            activity.times.append(time.monotonic())
            activity.client.append(time.process_time())
            activity.trunk.append(float(times.user + times.system))

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                read()

        read()
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield activity
        finally:
            ended.set()
            watcher.join()
            read()


def run(*, scale: Scale | None = None, say: Callable[[str], None] = lambda _: None) -> Result:
    """Both ways in turn, and how true the emulated link is."""
    scale = scale or Scale()
    ways = {"naive": Way("fp32", 1, anew=True), "default": Way("int8", scale.in_flight, anew=False)}
    model = {"cut": [1, 1], "optimizer": "adamw, bottom frozen"}
    result = Result("wan", {**vars(scale), **model, "ways": {name: vars(way) for name, way in ways.items()}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # client, trunk and link have a core's worth each at most
    try:
        contenders = race(scale, ways, say)
    finally:
        torch.set_num_threads(threads)
    rows = {name: row_of(name, contender, scale) for name, contender in contenders.items()}
    emulated = accuracy(*scale.conditions)
    result.rows = [*rows.values(), emulated]
    result.drawn = {name: timeline(contender) for name, contender in contenders.items()}
    result.bars = bars(rows["naive"], rows["default"], emulated)
    return result


def race(scale: Scale, ways: dict[str, Way], say: Callable[[str], None]) -> dict[str, Contender]:
    """Train both, epoch by epoch in turn."""
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        model, data = Path(work) / "model", Path(work) / "notes.jsonl"
        texts = generate_notes("general", 400, 0)
        create_checkpoint(
            model, family="llama", layers=scale.layers, hidden=scale.hidden, vocab=scale.vocab, corpus=texts, seed=0
        )
        write_notes(data, "cardiology", scale.records, 0)  # each has more tokens than a record
        contenders = {name: Contender(stack, model, data, scale, way) for name, way in ways.items()}
        for epoch in range(scale.epochs):
            for name, contender in contenders.items():
                step = contender.step()
                say(f"epoch {epoch + 1}, {name}: {step.seconds:.2f} s, loss {step.loss:.4f}")
    return contenders


def row_of(name: str, contender: Contender, scale: Scale) -> dict[str, Any]:
    """One way's time, bytes and loss, and the bound: whichever of computing and sending would take longest alone."""
    steps = contender.steps
    up, down = ([carried(log, step) for step in steps] for log in (contender.emulator.up, contender.emulator.down))
    bound_s = sum(
        max(step.client_s, step.trunk_s, there / scale.up, back / scale.down)
        for step, there, back in zip(steps, up, down, strict=True)
    )
    seconds = [step.seconds for step in steps]
    return {
        "what": name,
        "seconds": sum(seconds),
        "step_s": spread(seconds),
        "bound_s": bound_s,
        "share_of_bound": bound_s / sum(seconds),
        "client_s": sum(step.client_s for step in steps),
        "trunk_s": sum(step.trunk_s for step in steps),
        "up_s": sum(up) / scale.up,
        "down_s": sum(down) / scale.down,
        "MB_up_first_epoch": up[0] / 1e6,
        "MB_up_last_epoch": up[-1] / 1e6,
        "MB_down_last_epoch": down[-1] / 1e6,
        "first_loss": steps[0].loss,
        "last_loss": steps[-1].loss,
    }


def carried(log: Log, step: Step) -> int:
    """Bytes that went one way in a step, every one that was in a socket."""
    return sum(spell.nbytes for spell in log.spells if step.began <= spell.began <= step.ended)


def timeline(contender: Contender) -> dict[str, Any]:
    """Who was at work in the last step, in seconds from its beginning.

    For each way of the link the spells in which it was sending; for client and trunk the share of a core in use between
    one of ``times`` and the next.
    """
    step, activity = contender.steps[-1], contender.activity

    def spells(log: Log) -> list[list[float]]:
        mine = [spell for spell in log.spells if step.began <= spell.began <= step.ended]
        return [[spell.began - step.began, spell.left - step.began] for spell in mine]

    return {
        "step_s": step.seconds,
        "times": [at - step.began for at in activity.times],
        "client": shares(activity.times, activity.client),
        "up": spells(contender.emulator.up),
        "trunk": shares(activity.times, activity.trunk),
        "down": spells(contender.emulator.down),
    }


def shares(times: Sequence[float], spent: Sequence[float]) -> list[float]:
    """Processor seconds a second between one reading and the next."""
    pairs = zip(pairwise(times), pairwise(spent), strict=True)
    return [(more - before) / max(1e-9, until - since) for (since, until), (before, more) in pairs]


def accuracy(up: Conditions, down: Conditions) -> dict[str, Any]:
    """The emulated link's own round trip and rates, with nothing of this project on it: the best of some tries."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with LinkEmulator(f"ws://127.0.0.1:{port}", up, down) as emulator:
            near = socket.create_connection(("127.0.0.1", int(emulator.url.rpartition(":")[2])))
            far, _ = server.accept()
            with near, far:
                round_trips = [round_trip(near, far) for _ in range(TRIES)]
                ups = [rate(near, far, up) for _ in range(TRIES)]
                downs = [rate(far, near, down) for _ in range(TRIES)]
    return {
        "what": "link emulator",
        "rtt_error_s": min(round_trips) - up.delay_s - down.delay_s,
        "up_error": max(ups) / up.rate - 1,
        "down_error": max(downs) / down.rate - 1,
        "rtt_s": spread(round_trips),
        "down_bytes_per_s": spread(downs),
    }


def round_trip(near: socket.socket, far: socket.socket) -> float:
    """Seconds of a byte there and another one back."""
    began = time.monotonic()
    near.sendall(b"?")
    far.sendall(far.recv(1))
    near.recv(1)
    return time.monotonic() - began


def rate(sender: socket.socket, receiver: socket.socket, line: Conditions) -> float:
    """Bytes a second of one long burst."""
    burst = bytes(int(BURST_S * line.rate))
    began, left = time.monotonic(), len(burst)
    sending = threading.Thread(target=sender.sendall, args=(burst,))
    sending.start()
    while left:
        left -= len(receiver.recv(1 << 16))
    took = time.monotonic() - began - line.delay_s
    sending.join()
    return len(burst) / took


def bars(naive: dict[str, Any], default: dict[str, Any], emulated: dict[str, Any]) -> list[Bar]:
    """What the link should cost."""
    difference = abs(default["last_loss"] / naive["last_loss"] - 1)
    rates = max(abs(emulated["up_error"]), abs(emulated["down_error"]))
    return [
        Bar("naive / default, time to the same loss", naive["seconds"] / default["seconds"], SPEEDUP_BAR, "higher"),
        Bar("bound / time of the default", default["share_of_bound"], BOUND_BAR, "higher"),
        Bar("last loss, default against naive, relative difference", difference, LOSS_BAR, "lower"),
        Bar("link emulator, error of the round trip in seconds", abs(emulated["rtt_error_s"]), RTT_BAR_S, "lower"),
        Bar("link emulator, relative error of the rates", rates, RATE_BAR, "lower"),
    ]
