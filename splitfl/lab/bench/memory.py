"""``splitfl bench memory``: what a client needs, as the peak resident size of its own process.

Two questions. Does a client grow with the trunk? A real ``splitfl join`` runs against trunks of 4 and of 24 blocks.
Are logits ever whole? One training step of a top with 152k words and 2,048 tokens, against the naive loss.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import SplitFLError
from splitfl.lab.bench.harness import Bar, Result, served, spread
from splitfl.lab.peaks import PeakWatch
from splitfl.split.checkpoint import CheckpointFolder, load_segment
from splitfl.split.chunks import LOGIT_BYTES
from splitfl.split.create import create_checkpoint
from splitfl.split.families import build_small_model, small_config
from splitfl.split.loss import head_loss
from splitfl.split.modes import training_policy
from splitfl.split.segment import Piece
from splitfl.split.training import set_up_training

SHALLOW, DEEP = 4, 24  # trunk blocks
RUNS = 2
WORDS, TOKENS, WIDTH = 152_064, 2048, 128
FLAT_WITHIN = 1.02

SETTINGS = """
[rounds]
count = 1
local_steps = 3
[batch]
records = 8
max_length = 128
[evaluation]
records = 8
"""


def run(*, say: Callable[[str], None] = lambda _: None) -> Result:
    """Both measurements."""
    config = {"trunk_blocks": [SHALLOW, DEEP], "hidden": 256, "vocabulary": WORDS, "tokens": TOKENS, "width": WIDTH}
    result = Result("memory", {**config, "logit_bytes": LOGIT_BYTES, "whole_logits_bytes": 4 * WORDS * TOKENS})
    with tempfile.TemporaryDirectory() as work:
        peaks: dict[str, float] = {}
        clients: dict[int, list[int]] = {blocks: [] for blocks in (SHALLOW, DEEP)}
        for blocks in RUNS * (SHALLOW, DEEP):  # in turn: what a heap keeps differs by a few percent from run to run
            clients[blocks].append(client_peak(Path(work), blocks, len(clients[blocks])))
            say(f"client with a trunk of {blocks} blocks: {clients[blocks][-1] / 2**20:.1f} MiB")
        for blocks, found in clients.items():
            result.rows.append({"what": "client process", "trunk_blocks": blocks, "peak_rss": spread(found)})
        make_wide_checkpoint(Path(work) / "wide")
        for way in ("base", "chunked", "naive"):
            peaks[way] = step_peak(Path(work) / "wide", way)
            say(f"one step with {WORDS} words, {way}: {peaks[way] / 2**20:.0f} MiB")
            result.rows.append({"what": f"top's step, {way}", "peak_rss": peaks[way]})
    above = {way: peaks[way] - peaks["base"] for way in ("chunked", "naive")}
    result.rows.append({"what": "step above its weights, chunked / naive", "ratio": above["chunked"] / above["naive"]})
    flat = statistics.median(clients[DEEP]) / statistics.median(clients[SHALLOW])
    result.bars.append(Bar("client peak, 24 / 4 trunk blocks", flat, FLAT_WITHIN, "lower"))
    whole_logits = 4 * WORDS * TOKENS
    result.bars.append(Bar("step above its weights / whole logits", above["chunked"] / whole_logits, 1.0, "lower"))
    return result


def client_peak(work: Path, blocks: int, run: int) -> int:
    """Peak resident bytes of a real client against a trunk of ``blocks`` blocks."""
    model, data = work / f"model-{blocks}", work / "notes.jsonl"
    if not model.exists():
        texts = generate_notes("general", 200, 0)
        create_checkpoint(model, family="llama", layers=blocks + 2, hidden=256, vocab=2048, corpus=texts, seed=0)
        write_notes(data, "cardiology", 200, 0)
    with served(model, SETTINGS, threads=1) as (url, agreement):
        command = [sys.executable, "-m", "splitfl.cli", "join", url, "--name", "bench", "--data", str(data)]
        command += ["--state", str(work / f"client-{blocks}-{run}"), "--cache", str(work / "cache"), "--threads", "1"]
        command += ["--accept", agreement, "--key", str(work / "key"), "--plan", "federation"]
        return peak_of(command)


def peak_of(command: list[str]) -> int:
    """Run a command to its end; its peak resident bytes. Raises SplitFLError."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    watch = PeakWatch(process)
    _, message = process.communicate()
    if process.returncode:
        raise SplitFLError(f"{command[:5]} failed", message.decode(errors="replace")[-300:])
    return watch.peak


def make_wide_checkpoint(folder: Path) -> None:
    """Two narrow blocks under a very wide head."""
    config = small_config("llama", layers=2, hidden=WIDTH, vocab=WORDS, tie=False)
    build_small_model(config, seed=0).save_pretrained(folder)


def step_peak(folder: Path, way: str) -> int:
    """Peak resident bytes of one training step of the top, in a process of its own."""
    return peak_of([sys.executable, "-m", "splitfl.lab.bench.memory", str(folder), way])


def top_step(folder: Path, way: str) -> None:
    """One block, norm and head: forward, loss and backward over TOKENS tokens. ``base`` stops before the loss."""
    source = CheckpointFolder(folder)
    top = load_segment(source, Piece(1, 2, head=True))
    from splitfl.config import Federation

    set_up_training(top, training_policy(Federation(), 2, torch.device("cpu")))
    for weight in top.parameters():
        weight.grad = torch.zeros_like(weight)  # the gradients' own memory is part of the base
    hidden = torch.randn(8, TOKENS // 8, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    labels = torch.randint(0, WORDS, (8, TOKENS // 8), generator=torch.Generator().manual_seed(1))
    final = top(hidden)
    if way == "chunked":
        head_loss(top, final, labels, train=True)
    elif way == "naive":
        logits = top.logits(final.flatten(0, 1))
        nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    top_step(Path(sys.argv[1]), sys.argv[2])
