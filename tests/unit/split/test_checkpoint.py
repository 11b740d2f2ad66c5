"""Slices come straight out of safetensors, each tensor once and no other; every bad folder is one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MemorySource, elements, tiny_config, tiny_model, write_safetensors
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from splitfl.errors import CheckpointError
from splitfl.split.checkpoint import CheckpointFolder, embedding_name, folder_entries, load_segment, read_config
from splitfl.split.families import FAMILIES
from splitfl.split.segment import Piece, Segment
from splitfl.split.shares import weight_names

BOTTOM, TRUNK, TOP = Piece(0, 1, embedding=True), Piece(1, 5), Piece(5, 6, head=True)


def save(folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes).to(dtype)
    model.save_pretrained(folder)
    return model


def save_tensors(folder: Path, tensors: dict[str, torch.Tensor], family: str = "llama", **changes: Any) -> None:
    tiny_config(family, **changes).save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")


def weights(segment: Segment) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in segment.named_weights()}


def assert_holds(segment: Segment, model: PreTrainedModel) -> None:
    whole = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights(segment).items():
        assert tensor.dtype == whole[name].dtype
        assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("piece", [BOTTOM, TRUNK, TOP], ids=["bottom", "trunk", "top"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gpt_oss"])
def test_segment_reads_its_own_tensors_once_and_no_other(family: str, piece: Piece, tied: bool) -> None:
    model = tiny_model(family, tie=tied)
    source = MemorySource.of(model)
    segment = load_segment(source, piece)

    table = embedding_name(segment.anatomy)
    expected = list(weight_names(Segment(model.config, piece), tied=tied))
    assert sorted(source.reads) == sorted(expected)
    assert len(set(source.reads)) == len(source.reads)
    outside = {name for name in source.tensors if segment.block_of(name) not in {None, *range(piece.start, piece.stop)}}
    assert not outside & set(source.reads)
    assert (table in source.reads) == (piece.embedding or (tied and piece.head))
    assert_holds(segment, model)
    assert not any(parameter.requires_grad for parameter in segment.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["1GB", "200KB"], ids=["one-file", "shards"])
def test_folder_gives_tensors_in_the_dtype_of_its_files(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    model = tiny_model("llama").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "200KB")
    source = CheckpointFolder(tmp_path)
    assert source.has("model.norm.weight")
    assert not source.has("model.layers.6.mlp.up_proj.weight")
    for piece in (BOTTOM, TRUNK, TOP):
        assert_holds(load_segment(source, piece), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_of_every_family_loads_as_its_model(tmp_path: Path, family: str) -> None:
    model = save(tmp_path, family)
    for piece in (BOTTOM, TRUNK, TOP):
        assert_holds(load_segment(CheckpointFolder(tmp_path), piece), model)


def test_entry_is_the_bytes_of_its_tensor(tmp_path: Path) -> None:
    model = save(tmp_path, dtype=torch.bfloat16)
    for entry in folder_entries(tmp_path):
        tensor = dict(model.named_parameters())[entry.name].detach()
        data = entry.path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert data == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert (entry.dtype, entry.shape) == ("BF16", tuple(tensor.shape))


def test_entry_hash_changes_with_one_byte(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(700_000), "b": torch.ones(3)}  # "a" takes more than one piece of 1 MiB
    save_file(tensors, tmp_path / "model.safetensors")
    before = {entry.name: entry.sha256() for entry in folder_entries(tmp_path)}
    tensors["a"][699_999] = 1
    save_file(tensors, tmp_path / "model.safetensors")
    after = {entry.name: entry.sha256() for entry in folder_entries(tmp_path)}
    assert before["a"] != after["a"]
    assert before["b"] == after["b"]


def test_gpt2_file_without_prefix_loads_as_its_model(tmp_path: Path) -> None:
    model = save(tmp_path, "gpt2", tie=True)
    bare = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)  # the causal mask of old files
    save_file(bare, tmp_path / "model.safetensors")
    assert "wte.weight" in bare
    for piece in (BOTTOM, TRUNK, TOP):
        assert_holds(load_segment(CheckpointFolder(tmp_path), piece), model)


def test_gpt_neox_file_with_old_head_name_loads_as_its_model(tmp_path: Path) -> None:
    model = save(tmp_path, "gpt_neox")
    old = load_file(tmp_path / "model.safetensors")
    old = {name.replace("lm_head.", "embed_out."): tensor for name, tensor in old.items()}
    assert "embed_out.weight" in old
    save_file(old, tmp_path / "model.safetensors")
    assert_holds(load_segment(CheckpointFolder(tmp_path), TOP), model)


def test_tied_head_is_read_from_the_embedding_and_apart_from_it(tmp_path: Path) -> None:
    model = save(tmp_path, tie=True)
    source = CheckpointFolder(tmp_path)
    assert not source.has("lm_head.weight")
    segment = load_segment(source, Piece(0, 6, embedding=True, head=True))
    assert torch.equal(weights(segment)["lm_head.weight"], model.get_input_embeddings().weight)
    assert weights(segment)["lm_head.weight"].data_ptr() != segment.embedding.weight.data_ptr()


def test_folder_config_has_no_dropout(tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.0, 0.0, 0.0)


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"no config\.json.*splitfl init"):
            CheckpointFolder(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no_such_model"}', '{"model_type": 3}'])
def test_folder_with_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        CheckpointFolder(tmp_path)


def test_folder_with_remote_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_folder_of_a_model_that_is_no_decoder_is_refused(tmp_path: Path, model_type: str) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="decoder-only"):
        CheckpointFolder(tmp_path)


def test_folder_with_pickles_alone_is_refused(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04not opened")
    with pytest.raises(CheckpointError, match="SplitFL reads safetensors only"):
        CheckpointFolder(tmp_path)


def test_folder_that_lacks_a_shard_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="200KB")
    shard = next(tmp_path.glob("model-00002-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        CheckpointFolder(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_folder_with_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        CheckpointFolder(tmp_path)


def test_index_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "secret")
    save(tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": "../secret/model.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    assert {entry.path for entry in folder_entries(tmp_path / "model")} == {tmp_path / "model/model.safetensors"}


@pytest.mark.parametrize("data", [b"", b"\0" * 4, b"\xff" * 8, b"\2" + b"\0" * 7 + b"[]", b"\5" + b"\0" * 7 + b'{"a":'])
def test_file_that_is_not_safetensors_is_refused(tmp_path: Path, data: bytes) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        CheckpointFolder(tmp_path)


def test_file_that_is_cut_short_is_refused_when_read(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="Download it again"):
        CheckpointFolder(tmp_path).read("lm_head.weight")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_tensors(tmp_path, tensors)
    source = CheckpointFolder(tmp_path)
    load_segment(source, Piece(0, 3, embedding=True))  # a slice that does not need it
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.up_proj\.weight"):
        load_segment(source, TRUNK)


def test_tensor_of_another_shape_is_refused_under_its_global_name(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(3, 64)
    save_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.up_proj\.weight.*\(3, 64\).*mixes two models"):
        load_segment(CheckpointFolder(tmp_path), TRUNK)


@pytest.mark.parametrize(("dtype", "size"), [("I8", 1), ("F8_E4M3", 1), ("I32", 4), ("F64", 8)])
def test_tensor_of_a_dtype_that_cannot_train_is_refused(tmp_path: Path, dtype: str, size: int) -> None:
    config = tiny_config("llama")
    config.save_pretrained(tmp_path)
    shapes = {name: tuple(p.shape) for name, p in tiny_model("llama").named_parameters()}
    stored = {name: (dtype, shape, bytes(size * elements(shape))) for name, shape in shapes.items()}
    write_safetensors(tmp_path / "model.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"stored as .*Quantised checkpoints cannot be trained"):
        load_segment(CheckpointFolder(tmp_path), TRUNK)


def test_folder_that_calls_itself_quantised_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mxfp4.*Quantised checkpoints cannot be trained"):
        CheckpointFolder(tmp_path)


def test_experts_that_are_converted_while_loading_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mixtral", hidden_size=64, num_hidden_layers=1, num_local_experts=2, vocab_size=300)
    config.save_pretrained(tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    save_file({name: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'mixtral'.*save_original_format=False"):
        CheckpointFolder(tmp_path)
