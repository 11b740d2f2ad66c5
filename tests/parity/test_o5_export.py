"""O5: the export opens in plain transformers and gives the federation's own held-out loss, to 1e-5."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server_model.exporting import export_state
from tests.parity.federating import exact_settings, federate
from tests.parity.whole import mean_loss, open_data

MODES = {
    "full": {},
    "lora": {"train": "lora", "head": "lora", "lora_rank": 4},
    "lora with a full head": {"train": "lora", "head": "full"},
    "frozen head": {"head": "frozen"},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama", "gpt2"])
def test_export_gives_federations_held_out_loss(mode, checkpoint, notes, tmp_path, request):
    folder = request.getfixturevalue(checkpoint)
    settings = exact_settings(
        rounds={"count": 2, "local_steps": 3, "min_clients": 2},
        model={"freeze_below": None, **MODES[mode]},
        optimizer={"learning_rate": 5e-3},
    )
    data = {name: notes[name] for name in ("cardiology", "oncology")}
    outcome = federate(folder, data, settings, tmp_path)
    export_state(outcome.state, tmp_path / "out", client=None, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size
    for name, path in data.items():
        losses = outcome.reports[name]["held_out_losses"]
        with torch.no_grad():
            exported = float(mean_loss(model, open_data(folder, path, settings).evaluation()))
        assert exported == pytest.approx(losses[-1]["loss"], abs=1e-5)
        assert losses[-1]["loss"] < losses[0]["loss"] - 0.01  # it did train
