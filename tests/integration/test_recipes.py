"""Every recipe that is shipped trains: the whole federation in one process, with fewer and shorter steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitfl.config import Federation, load_federation
from splitfl.data.notes import generate_notes, write_notes
from splitfl.lab.federation import run_federation
from splitfl.split.create import create_checkpoint

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.toml"))
CLIENTS = ("cardiology", "oncology", "paediatrics")
LAYERS = 8  # what federated-only.toml is written for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    corpus = generate_notes("general", 30, seed=1)
    create_checkpoint(folder, family="llama", layers=LAYERS, hidden=64, vocab=300, corpus=corpus, seed=0)
    return folder


def shortened(settings: Federation) -> Federation:
    """The same federation with two rounds of two steps, on short records."""
    rounds = settings.rounds.model_copy(update={"count": 2, "local_steps": 2})
    batch = settings.batch.model_copy(update={"max_length": 32})
    evaluation = settings.evaluation.model_copy(update={"records": 4})
    return settings.model_copy(update={"rounds": rounds, "batch": batch, "evaluation": evaluation})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_trains_and_exports(recipe: Path, model: Path, tmp_path: Path) -> None:
    data = {name: tmp_path / f"{name}.jsonl" for name in CLIENTS}
    for name, path in data.items():
        write_notes(path, name, 12, seed=1)
    settings = shortened(load_federation(recipe))
    result = run_federation(model, data, settings, tmp_path / "run")
    for name in CLIENTS:
        losses = dict(result.training_losses(name))
        assert len(losses) == 4
        assert losses[4] < losses[1]
    personal = settings.merge.share == "none"
    exported = result.export(tmp_path / "model", client=CLIENTS[0] if personal else None)
    assert (exported / "model.safetensors").exists()
