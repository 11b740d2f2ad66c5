"""An export is the trained model, opens in plain transformers, and is there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, VOCAB, Parts, make_batch, split, tiny_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from splitfl.cut import Cut
from splitfl.errors import CheckpointError, ConfigError, StorageError
from splitfl.split import export
from splitfl.split.checkpoint import is_tied
from splitfl.split.export import TOKENIZER_FILES, TrainedWeights, export_checkpoint
from splitfl.split.families import FAMILIES
from splitfl.split.training import TrainingPolicy, set_up_training, stays_tied

RANK, ALPHA = 4, 12.0
LORA = TrainingPolicy(freeze_below=1, train="lora", head="lora", lora_rank=RANK, lora_alpha=ALPHA)


def save(folder: Path, family: str = "llama", **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model


def trained_parts(model: PreTrainedModel, policy: TrainingPolicy) -> Parts:
    """Segments after a training that moved every weight it may."""
    parts = split(model, Cut(1, 2))
    generator = torch.Generator().manual_seed(5)
    for part in parts:
        set_up_training(part, policy)
    if stays_tied(model.config, policy):
        parts.top.model.get_submodule("lm_head").weight = parts.bottom.embedding.weight
    seen: set[int] = set()
    for part in parts:
        for _, parameter in part.named_weights():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return parts


def weights_of(parts: Parts, *, tied: bool) -> TrainedWeights:
    """What the federation would hand over: trained weights, LoRA's A wherever there is a B, a tied weight once."""
    tensors: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_weights():
            if (parameter.requires_grad or ".lora_A." in name) and not (tied and name == "lm_head.weight"):
                tensors[name] = parameter.detach()
    conv1d = parts.bottom.model.config.model_type == "gpt2"
    return TrainedWeights(tensors, lora_scale=ALPHA / RANK, fan_in_fan_out=conv1d)


def split_logits(parts: Parts) -> Tensor:
    batch = make_batch(padded=False)
    with torch.no_grad():
        hidden = parts.trunk.eval()(parts.bottom.eval()(parts.bottom.embed(batch.ids)))
        logits = parts.top.logits(parts.top.eval()(hidden).flatten(0, 1))
    return logits.unflatten(0, batch.ids.shape)


def exported_logits(folder: Path) -> Tensor:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=make_batch(padded=False).ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    "policy",
    [TrainingPolicy(), TrainingPolicy(freeze_below=1), TrainingPolicy(freeze_below=3, head="frozen")],
    ids=["all", "ends-frozen-below", "head-frozen"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_gives_the_trained_models_logits(
    family: str, tied: bool, policy: TrainingPolicy, tmp_path: Path
) -> None:
    model = save(tmp_path / "base", family, tie=tied)
    parts = trained_parts(model, policy)
    trained = weights_of(parts, tied=stays_tied(model.config, policy))
    export_checkpoint(tmp_path / "base", trained, tmp_path / "out")
    logits = exported_logits(tmp_path / "out")
    assert torch.equal(logits, split_logits(parts))
    with torch.no_grad():
        base = model.eval()(input_ids=make_batch(padded=False).ids, use_cache=False).logits
    assert not torch.allclose(logits, base, atol=1e-3)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "gpt_oss"])
def test_export_folds_lora_into_its_base(family: str, tied: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "base", family, tie=tied)
    parts = trained_parts(model, LORA)
    export_checkpoint(tmp_path / "base", weights_of(parts, tied=False), tmp_path / "out")
    logits, expected = exported_logits(tmp_path / "out"), split_logits(parts)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "out/model.safetensors"))
    with torch.no_grad():
        base = model.eval()(input_ids=make_batch(padded=False).ids, use_cache=False).logits
    assert not torch.allclose(logits, base, atol=1e-2)


def test_export_adds_lora_to_a_trained_base_layer(tmp_path: Path) -> None:
    save(tmp_path / "base")
    stem = "model.layers.2.mlp.down_proj"
    base, a, b = torch.randn(64, 192), torch.randn(RANK, 192), torch.randn(64, RANK)
    tensors = {
        f"{stem}.base_layer.weight": base,
        f"{stem}.lora_A.default.weight": a,
        f"{stem}.lora_B.default.weight": b,
    }
    export_checkpoint(tmp_path / "base", TrainedWeights(tensors, lora_scale=3.0), tmp_path / "out")
    folded = load_file(tmp_path / "out/model.safetensors")[f"{stem}.weight"]
    torch.testing.assert_close(folded, base + 3 * b @ a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_export_unties_a_head_that_trained_alone(family: str, tmp_path: Path) -> None:
    model = save(tmp_path / "base", family, tie=True)
    policy = TrainingPolicy(freeze_below=1)
    export_checkpoint(tmp_path / "base", weights_of(trained_parts(model, policy), tied=False), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not is_tied(opened.config)
    table, head = opened.get_input_embeddings().weight, opened.get_output_embeddings().weight
    assert torch.equal(table, model.get_input_embeddings().weight)
    assert not torch.equal(table, head)


def test_export_keeps_a_tied_head_tied_where_both_trained(tmp_path: Path) -> None:
    model = save(tmp_path / "base", tie=True)
    export_checkpoint(
        tmp_path / "base", weights_of(trained_parts(model, TrainingPolicy()), tied=True), tmp_path / "out"
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_export_of_gpt2_without_prefix_keeps_its_names_and_opens(tmp_path: Path) -> None:
    model = save(tmp_path / "base", "gpt2", tie=True)
    path = tmp_path / "base/model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    save_file(bare, path, metadata={"format": "pt"})
    for number, policy in enumerate([TrainingPolicy(), TrainingPolicy(freeze_below=1)]):
        parts = trained_parts(model, policy)
        out = tmp_path / f"out-{number}"
        export_checkpoint(tmp_path / "base", weights_of(parts, tied=stays_tied(model.config, policy)), out)
        names = load_file(out / "model.safetensors").keys()
        assert "wte.weight" in names
        assert "h.0.attn.bias" not in names
        assert torch.equal(exported_logits(out), split_logits(parts))


def test_export_of_gpt_neox_with_old_head_name_opens(tmp_path: Path) -> None:
    model = save(tmp_path / "base", "gpt_neox")
    path = tmp_path / "base/model.safetensors"
    old = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in load_file(path).items()}
    save_file(old, path, metadata={"format": "pt"})
    parts = trained_parts(model, TrainingPolicy())
    export_checkpoint(tmp_path / "base", weights_of(parts, tied=False), tmp_path / "out")
    assert torch.equal(exported_logits(tmp_path / "out"), split_logits(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_export_is_written_in_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / "base")
    export_checkpoint(tmp_path / "base", TrainedWeights({}), tmp_path / "out", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {dtype}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_export_in_shards_equals_export_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "base")
    trained = weights_of(trained_parts(model, TrainingPolicy()), tied=False)
    export_checkpoint(tmp_path / "base", trained, tmp_path / "one")
    monkeypatch.setattr(export, "SHARD_BYTES", 200_000)
    export_checkpoint(tmp_path / "base", trained, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 3
    whole = load_file(tmp_path / "one/model.safetensors")
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 200_000
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    assert torch.equal(exported_logits(tmp_path / "many"), exported_logits(tmp_path / "one"))
    export_checkpoint(tmp_path / "many", TrainedWeights({}), tmp_path / "again")  # shards are a base too
    assert torch.equal(exported_logits(tmp_path / "again"), exported_logits(tmp_path / "one"))


def test_export_carries_tokenizer_card_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path / "base")
    carried = [*TOKENIZER_FILES, "generation_config.json"]
    for name in carried:
        (tmp_path / "base" / name).write_text('{"made": "here"}')
    (tmp_path / "base/training_args.bin").write_bytes(b"no")
    export_checkpoint(tmp_path / "base", TrainedWeights({}), tmp_path / "out", card="# A model\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *carried,
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert all((tmp_path / "out" / name).read_text() == '{"made": "here"}' for name in carried)
    assert (tmp_path / "out/README.md").read_text() == "# A model\n"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_exported_files_have_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    save(tmp_path / "base")
    export_checkpoint(tmp_path / "base", TrainedWeights({}), tmp_path / "out")
    assert {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == dict.fromkeys(
        ("README.md", "config.json", "generation_config.json", "model.safetensors"), 0o640
    )
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_export_goes_into_an_empty_folder_and_makes_missing_parents(tmp_path: Path) -> None:
    save(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a/b/c"):
        export_checkpoint(tmp_path / "base", TrainedWeights({}), out)
        assert (out / "model.safetensors").is_file()


def test_export_refuses_a_folder_in_use_and_leaves_it_alone(tmp_path: Path) -> None:
    save(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out, reason in ((tmp_path / "out", "not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(ConfigError, match=rf"{reason}.*Name a new folder"):
            export_checkpoint(tmp_path / "base", TrainedWeights({}), out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_export_that_fails_leaves_nothing_behind(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "base")
    written: list[Path] = []

    def fill_disk(tensors: dict[str, Tensor], path: Path, *_: Any) -> None:
        if written:
            raise error
        save_file(tensors, path)
        written.append(path)

    monkeypatch.setattr("splitfl.codec.stored.save_file", fill_disk)
    monkeypatch.setattr(export, "SHARD_BYTES", 200_000)
    with pytest.raises(StorageError, match=r"No space left on device.*export again"):
        export_checkpoint(tmp_path / "base", TrainedWeights({}), tmp_path / "out")
    assert written
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_export_that_is_interrupted_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "base")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "finish_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "base", TrainedWeights({}), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize(
    "name",
    [
        f"model.layers.{LAYERS}.mlp.up_proj.weight",
        "transformer.h.0.attn.c_attn.weight",
        f"model.layers.{LAYERS}.mlp.up_proj.lora_B.default.weight",
        "model.layers.0.mlp.no_such.base_layer.weight",
    ],
)
def test_export_refuses_trained_weights_of_another_model(name: str, tmp_path: Path) -> None:
    save(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"has no place in the base model"):
        export_checkpoint(tmp_path / "base", TrainedWeights({name: torch.zeros(1)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_trained_weight_of_another_shape(tmp_path: Path) -> None:
    save(tmp_path / "base")
    trained = TrainedWeights({"lm_head.weight": torch.zeros(VOCAB + 1, 64)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*shape"):
        export_checkpoint(tmp_path / "base", trained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_a_base_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        export_checkpoint(tmp_path / "nowhere", TrainedWeights({}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
