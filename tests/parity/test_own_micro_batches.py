"""A client may compute its step in more pieces than another: the same step as if both had brought theirs whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gates import open_gate
from serving import ServiceThread
from torch import Tensor

from client_model.ends import Ends
from client_model.link import Link
from client_model.trainer import Trainer
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound
from tests.parity.federating import CPU, exact_settings

RECORDS, TIME, STEPS = 4, 12, 3


def pieces(seed: int, count: int) -> list[Batch]:
    """Random records, all tokens labelled but the last, in ``count`` micro-batches."""
    ids = np.random.default_rng(seed).integers(0, 400, (RECORDS, TIME))
    labels = np.concatenate([ids[:, 1:], np.full((RECORDS, 1), -100)], axis=1)
    size = RECORDS // count
    return [Batch(ids[at : at + size], labels[at : at + size], np.full(size, TIME)) for at in range(0, RECORDS, size)]


def losses_of(
    name: str, url: str, model: Path, settings: Federation, folder: Path, batches: list[Batch]
) -> list[float]:
    """A client's losses over some steps on the same records, in as many micro-batches as it says in Hello."""
    link = Link(url, Hello(PROTOCOL_VERSIONS, name, micro_batches=len(batches)), say=lambda _: None)
    link.open()
    try:
        trainer = Trainer(Ends(CheckpointFolder(model), settings, Cut(1, 1), CPU), link, open_gate(folder))
        link.ask(NextRound(0, 0, -1))
        return [trainer.step(0, step, batches).mean for step in range(STEPS)]
    finally:
        link.close()


def test_one_client_in_four_pieces_and_one_in_one_equal_both_in_one(llama, tmp_path):
    settings = exact_settings(
        rounds={"local_steps": 50, "min_clients": 2}, batch={"records": RECORDS, "max_length": TIME}
    )

    def together(counts: tuple[int, int]) -> tuple[list[list[float]], dict[str, Tensor]]:
        folder = tmp_path / str(counts)
        with ServiceThread(llama, settings, folder / "server") as server, ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(losses_of, name, server.url, llama, settings, folder / name, pieces(seed, count))
                for seed, (name, count) in enumerate(zip("ab", counts, strict=True))
            ]
            losses = [job.result(timeout=60) for job in jobs]
            engine = server.coordinator.engine
            server.call(engine.call(lambda: None))  # the last step is applied
            assert engine.steps_applied == STEPS
            return losses, {name: weight.clone() for name, weight in engine.trunk.weights().items()}

    mixed, whole = together((1, 4)), together((1, 1))
    assert mixed[0] == [pytest.approx(losses, abs=1e-6) for losses in whole[0]]
    assert whole[0][0][0] > whole[0][0][-1]
    for name, weight in whole[1].items():
        torch.testing.assert_close(mixed[1][name], weight, atol=1e-5, rtol=0)
