"""The client's own weights before the last merge, measured beside the merged ones: what they are, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from client_model.store import ClientStore
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.lab.federation import FederationResult, client_folder, run_federation
from splitfl.privacy.ledger import Ledger
from splitfl.split.create import create_checkpoint
from splitfl.split.export import TrainedWeights, export_checkpoint
from tests.parity.whole import mean_loss, open_data, whole_model

SPECIALTIES = {"a": "cardiology", "b": "oncology"}
TRAINED = {"freeze_below": 0, "compute": "fp32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    texts = generate_notes("general", 60, 7)
    create_checkpoint(folder, family="llama", layers=3, hidden=64, vocab=320, corpus=texts, seed=0, tie=False)
    return folder


def settings(**tables: Any) -> Federation:
    default: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 4, "min_clients": 2},
        "batch": {"records": 4, "max_length": 32},
        "model": TRAINED,
        "optimizer": {"learning_rate": 5e-3},
        "wire": {"codec": "fp32"},
        "evaluation": {"records": 6, "baselines": "none"},
    }
    return parse_federation(default | tables, "the test")


def run(model: Path, folder: Path, chosen: Federation, cuts: dict[str, Cut] | None = None) -> FederationResult:
    data = {name: folder / f"{name}.jsonl" for name in SPECIALTIES}
    for name, path in data.items():
        write_notes(path, SPECIALTIES[name], 30, 1)
    return run_federation(model, data, chosen, folder / "run", cuts=cuts, noise_seed=3 if chosen.privacy.on else None)


@pytest.mark.parametrize("share", ["ends", "top"])
def test_personal_loss_is_that_of_the_clients_own_ends_around_the_merged_trunk(
    model: Path, tmp_path: Path, share: str
) -> None:
    chosen = settings(merge={"share": share})
    result = run(model, tmp_path, chosen)
    for name in SPECIALTIES:
        report = result.reports[name]
        own = ClientStore(client_folder(result.folder, name)).newest(1)
        assert own is not None
        trained = TrainedWeights({**result.weights(), **own.weights})
        export_checkpoint(model, trained, tmp_path / name)
        with torch.no_grad():
            batches = open_data(model, tmp_path / f"{name}.jsonl", chosen).evaluation()
            expected = float(mean_loss(whole_model(tmp_path / name), batches))
        assert report["personal"] == pytest.approx(expected, abs=1e-5)
        assert report["personal"] != pytest.approx(report["held_out_losses"][-1]["loss"], abs=1e-4)
        kept = load_file(report["weights"])  # what stays behind is the merge all the same
        merged = result.weights()
        shared = [weight for weight in kept if share == "ends" or weight.startswith("lm_head")]
        assert shared
        assert all(torch.equal(kept[weight], merged[weight]) for weight in shared)


def test_personal_heads_have_nothing_to_be_compared_with(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path, settings(merge={"share": "none"}))
    assert [(report["share"], report["personal"]) for report in result.reports.values()] == [("none", None)] * 2


MEASURED = {"mode": "measured", "clip_norm": 1.0}


def test_personal_loss_costs_nothing_where_activations_are_released_once(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path, settings(model={}, privacy=MEASURED))
    for name in SPECIALTIES:
        assert result.reports[name]["personal"] is not None
        rows = [row for row, _, _ in Ledger(client_folder(result.folder, name) / "ledger.sqlite").rows()]
        held_out = [row.record for row in rows if row.kind == "activations of held-out records"]
        assert 0 < len(held_out) == len(set(held_out))


def test_personal_loss_is_not_measured_where_it_would_be_charged(model: Path, tmp_path: Path) -> None:
    cuts = {"a": Cut(1, 1), "b": Cut(0, 3)}  # the second lets no activation out
    limits = {"min_bottom": 0, "max_top": 3, **TRAINED}
    result = run(model, tmp_path, settings(model=limits, privacy=MEASURED), cuts)
    assert result.reports["a"]["personal"] is None
    assert result.reports["b"]["personal"] is not None
