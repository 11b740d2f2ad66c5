"""Real English, three clients: what they learn together is better than what each learns alone, on everybody's text."""

from __future__ import annotations

import json
import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from server_model.exporting import export_state
from splitfl.config import Federation, parse_federation
from splitfl.lab.whole import WholeModel, local_steps, train_like_federation
from splitfl.split.create import create_checkpoint
from tests.parity.federating import federate
from tests.parity.whole import open_data

CLIENTS = ("north", "south", "west")


def write_topics(folder: Path) -> dict[str, Path]:
    """Python's own manual pages, dealt out alphabetically: neighbours in the alphabet share subjects."""
    pages = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    share = -(-len(pages) // len(CLIENTS))
    paths = {}
    for number, name in enumerate(CLIENTS):
        rows = [json.dumps({"text": page}) for page in pages[number * share : (number + 1) * share]]
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("\n".join(rows) + "\n")
    return paths


def topics_settings() -> Federation:
    table = {
        "rounds": {"count": 3, "local_steps": 25, "min_clients": 3},
        "batch": {"records": 8, "max_length": 64},
        "model": {"n_bottom": 1, "n_top": 1, "freeze_below": 0},
        "optimizer": {"learning_rate": 2e-3},
        "evaluation": {"held_out_fraction": 0.15, "records": 48, "every_rounds": 0},
    }
    return parse_federation(table, "the test")


def union_loss(folder: Path, held_out: list, settings: Federation) -> float:
    loss = WholeModel(folder, settings, torch.device("cpu")).evaluate(held_out)
    return loss.total / loss.tokens


@pytest.mark.parametrize("seed", [0])
def test_federation_beats_every_local_client_on_real_english(seed, tmp_path):
    paths, settings = write_topics(tmp_path), topics_settings()
    texts = (page for page in pydoc_data.topics.topics.values())
    create_checkpoint(
        tmp_path / "m", family="llama", layers=4, hidden=64, vocab=800, corpus=texts, seed=seed, max_length=128
    )
    data = {name: open_data(tmp_path / "m", path, settings) for name, path in paths.items()}
    held_out = [batch for name in CLIENTS for batch in data[name].evaluation()]

    local = {}
    for name in CLIENTS:
        model = WholeModel(tmp_path / "m", settings, torch.device("cpu"))
        train_like_federation(model, local_steps(data[name], name))
        loss = model.evaluate(held_out)
        local[name] = loss.total / loss.tokens

    outcome = federate(tmp_path / "m", paths, settings, tmp_path / "run")
    export_state(outcome.state, tmp_path / "out", client=None, dtype="float32")
    federated = union_loss(tmp_path / "out", held_out, settings)
    assert federated < min(local.values()) < union_loss(tmp_path / "m", held_out, settings)
