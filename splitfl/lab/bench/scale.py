"""``splitfl bench scale``: several clients on one trunk against one whole model that trains on all their batches.

Every client is a process of its own with its own ends, optimizer, gate and websocket, and the trunk service is another;
all of them share the cores that the whole model has to itself. The processes are forked from one that has imported
torch, so that eight of them start in seconds and share the libraries' memory; each has its share of the cores' threads,
as a person with one machine would give it. Tokens a second count all batches of a step, the clients' own compute and
their optimizers included. The clients' weights are not merged here: that is once a round, and not a matter of steps.
And how many may be connected that do nothing: ``crowd.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from splitfl.allocator import keep_freed_memory, share_one_heap
from splitfl.data.notes import generate_notes
from splitfl.data.packing import Batch
from splitfl.lab.bench.crowd import Crowd
from splitfl.lab.bench.crowd import measure as measure_crowd
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.lab.bench.overhead import Mode, SplitStep, parse_settings, random_batch
from splitfl.lab.bench.overhead import Size as Step
from splitfl.lab.bench.whole import WholeProcess
from splitfl.split.create import create_checkpoint

LAST_BAR = 0.95  # of the whole model's tokens a second, with the most clients
MEMORY_BAR, ANSWER_BAR_S = float(1 << 20), 0.1  # bytes for each client that waits; seconds


@dataclass(frozen=True)
class Size:
    """What is measured: a llama, and ``records`` x ``length`` tokens a client and step."""

    hidden: int = 512
    layers: int = 10
    vocab: int = 2048
    records: int = 4
    length: int = 128
    clients: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 2
    crowd: Crowd = field(default_factory=Crowd)
    burst: int = 2  # steps of one client at a time, or one step of as many clients: what ends late counts little

    def steps(self, clients: int) -> int:
        """Steps of each kind in a repeat."""
        return max(1, self.burst // clients)


def run(*, size: Size = Size(), say: Callable[[str], None] = lambda _: None) -> Result:
    """Measure for each number of clients, and for a crowd."""
    result = Result(
        "scale", {**asdict(size), "cut": [1, 1], "codec": "bf16", "optimizer": "adamw, all parts trained, fp32"}
    )
    with tempfile.TemporaryDirectory() as work:
        model = make_model(Path(work) / "model", size)
        for clients in size.clients:
            row = measure(model, size, clients)
            say(f"{clients} clients: {row['ratio']['median']:.3f} of the whole model's tokens a second")
            result.rows.append(row)
        waiting = measure_crowd(model, size.hidden, size.crowd)
    say(f"{size.crowd.connected} connected: {waiting['idle_client_bytes'] / 2**10:.0f} KiB for each that waits")
    last = result.rows[-1]
    name = f"tokens a second, {last['clients']} clients / whole model"
    result.bars.append(Bar(name, last["ratio"]["median"], LAST_BAR, "higher"))
    result.rows.append(waiting)
    result.bars += [
        Bar("trunk memory for each idle client, bytes", waiting["idle_client_bytes"], MEMORY_BAR, "lower"),
        Bar("status meanwhile, 99 of 100 within seconds", waiting["status_99th_s"], ANSWER_BAR_S, "lower"),
    ]
    return result


def make_model(folder: Path, size: Size) -> Path:
    corpus = generate_notes("general", 400, 0)
    create_checkpoint(
        folder, family="llama", layers=size.layers, hidden=size.hidden, vocab=size.vocab, corpus=corpus, seed=0
    )
    return folder


def measure(model: Path, size: Size, clients: int) -> dict[str, Any]:
    """Interleaved bursts of steps: all clients together, and the whole model on the union of their batches."""
    text = Mode("", "bf16").settings(Step(records=size.records, length=size.length))
    text = text.replace("[rounds]", f"[rounds]\nmin_clients = {clients}")
    batches = [random_batch(size.records, size.length, size.vocab, seed) for seed in range(clients)]
    union = joined(batches)
    steps = size.steps(clients)
    tokens = steps * clients * size.records * size.length
    rates: dict[str, list[float]] = {"split": [], "whole": []}
    with (
        closing(WholeProcess(model, fused=None)) as whole,
        served(model, text) as (url, _),
        fleet(model, text, url, batches) as step_all,
    ):
        for _ in range(1 + size.repeats):
            began = time.perf_counter()
            step_all(steps)
            between = time.perf_counter()
            whole([union] * steps)
            ended = time.perf_counter()
            rates["split"].append(tokens / (between - began))
            rates["whole"].append(tokens / (ended - between))
    taken = {name: values[1:] for name, values in rates.items()}  # the first is to warm up
    return {
        "clients": clients,
        "split_tokens_per_s": spread(taken["split"]),
        "whole_tokens_per_s": spread(taken["whole"]),
        "ratio": spread([a / b for a, b in zip(taken["split"], taken["whole"], strict=True)]),
    }


def joined(batches: list[Batch]) -> Batch:
    """Several batches of one length as one."""
    ids, labels, lengths = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("input_ids", "labels", "lengths")
    )
    return Batch(ids, labels, lengths)


@contextmanager
def fleet(model: Path, text: str, url: str, batches: list[Batch]) -> Iterator[Callable[[int], None]]:
    """A client process for each batch; gives what makes all of them take so many steps."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    threads = max(1, (os.cpu_count() or 1) // len(batches))
    pipes = []
    processes = []
    for number, batch in enumerate(batches):
        ours, theirs = context.Pipe()
        process = context.Process(target=client, args=(model, text, url, f"client-{number}", batch, threads, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)

    def step_all(steps: int) -> None:
        for pipe in pipes:
            pipe.send(steps)
        for pipe in pipes:
            pipe.recv()

    try:
        for pipe in pipes:
            pipe.recv()
        yield step_all
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def client(model: Path, text: str, url: str, name: str, batch: Batch, threads: int, pipe: Connection) -> None:
    """A client's process: takes steps as it is told, until the other end of ``pipe`` is closed."""
    keep_freed_memory()  # as join does both
    share_one_heap()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as state:
        split = SplitStep(model, parse_settings(text), url, Path(state), name)
        try:
            pipe.send("ready")
            while True:
                for _ in range(pipe.recv()):
                    split(batch)
                pipe.send("done")
        except EOFError:
            pass
        finally:
            split.close()
