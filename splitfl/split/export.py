"""The federation's model as a plain Hugging Face checkpoint: base tensors, trained tensors over them.

Tensors stream one by one into shards, so exporting needs memory for one shard and not for the model. LoRA is
folded into its base weight.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from splitfl.codec.stored import FOR_TRANSFORMERS, write_tensors
from splitfl.errors import CheckpointError, ConfigError, StorageError
from splitfl.files import give_usual_mode
from splitfl.split.checkpoint import CheckpointFolder, embedding_name, is_tied

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
)
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json", "release.json", "release.safetensors")
LORA_PART = re.compile(r"^(?P<base>.+)\.lora_(?P<part>[AB])\.[^.]+\.weight$")


@dataclass(frozen=True)
class TrainedWeights:
    """What a federation trained, by global name; LoRA factors under peft's names."""

    tensors: Mapping[str, Tensor]
    lora_scale: float = 1.0  # alpha / rank
    fan_in_fan_out: bool = False  # GPT-2 stores its linear weights transposed


def export_checkpoint(
    base: Path, trained: TrainedWeights, out: Path, *, dtype: torch.dtype = torch.float32, card: str = ""
) -> None:
    """Write ``base`` with ``trained`` laid over it to the new folder ``out``.

    The folder opens with ``AutoModelForCausalLM.from_pretrained``. Raises ConfigError when ``out`` is in use,
    CheckpointError when ``trained`` belongs to another model, StorageError when ``out`` cannot be written; a
    half-written folder never stays behind under that name.
    """
    check_free(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
            folder = Path(work) / "model"
            folder.mkdir()
            write_model(CheckpointFolder(base), trained, folder, dtype)
            (folder / "README.md").write_text(card)
            if out.exists():
                out.rmdir()
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {out}: {reason}", "Free some space, export again.") from error


def check_free(out: Path) -> None:
    """Raise ConfigError when a new folder ``out`` cannot be made because something is there."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file", "Name a new folder to export to.")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty", "Name a new folder to export to.")


def write_model(source: CheckpointFolder, trained: TrainedWeights, folder: Path, dtype: torch.dtype) -> None:
    """Config, tokenizer and sharded weights of one checkpoint."""
    names = sorted(source.entries)
    head = f"{source.anatomy.head}.weight"
    untied = is_tied(source.config) and any(weight_of(name) == head for name in trained.tensors)
    if untied and head not in names:
        names.append(head)
    if not untied and is_tied(source.config):
        names = [name for name in names if name != head]
    check_belongs(source, trained, names)
    write_shards(folder, exported(source, trained, names, dtype))
    config = json.loads((source.folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    if untied:
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def weight_of(name: str) -> str:
    """The base weight that a trained tensor changes: its own, or the one that its LoRA factor is added to."""
    factor = LORA_PART.match(name)
    return f"{factor['base']}.weight" if factor else name.replace(".base_layer.", ".")


def check_belongs(source: CheckpointFolder, trained: TrainedWeights, names: list[str]) -> None:
    """Raise CheckpointError for a trained tensor that no exported weight takes up, or that does not fit it."""
    for name, tensor in trained.tensors.items():
        weight = weight_of(name)
        if weight not in names:
            raise CheckpointError(
                f"trained weight {name!r} has no place in the base model", "Name the checkpoint that was trained."
            )
        shape = source.entries[weight if source.has(weight) else embedding_name(source.anatomy)].shape
        if not LORA_PART.match(name) and tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"trained weight {name!r} has shape {tuple(tensor.shape)}, the base model's has {shape}",
                "Name the checkpoint that was trained.",
            )


def exported(
    source: CheckpointFolder, trained: TrainedWeights, names: list[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The final tensors one by one, in ``dtype``; buffers that are no weights (old masks) are left out."""
    for name in names:
        tensor = final_tensor(source, trained, name)
        if tensor.is_floating_point():
            stored = source.entries[name].name if name in source.entries else name
            yield stored, tensor.to(dtype).contiguous()


def final_tensor(source: CheckpointFolder, trained: TrainedWeights, name: str) -> Tensor:
    """One tensor of the result: trained, or the base's with its LoRA product added, or the base's own."""
    if name in trained.tensors:
        return trained.tensors[name]
    stem = name.removesuffix(".weight")
    plain = trained.tensors.get(f"{stem}.base_layer.weight")
    tensor = plain if plain is not None else source.read(name if source.has(name) else embedding_name(source.anatomy))
    factors = {part: trained.tensors.get(f"{stem}.lora_{part}.default.weight") for part in "AB"}
    if factors["A"] is None or factors["B"] is None:
        return tensor
    product = trained.lora_scale * (factors["B"].float() @ factors["A"].float())
    return tensor.float() + (product.T if trained.fan_in_fan_out and "lm_head" not in name else product)


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Tensors into ``model.safetensors``, or into shards of at most 4 GiB with an index."""
    shards: list[dict[str, str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            shards.append(write_shard(folder, len(shards), pending))
            pending, size = {}, 0
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(write_shard(folder, len(shards), pending))
    finish_shards(folder, shards, total)


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, str]:
    path = folder / f"shard-{number}.safetensors"
    write_tensors(tensors, path, FOR_TRANSFORMERS)
    give_usual_mode(path)
    return dict.fromkeys(tensors, path.name)


def finish_shards(folder: Path, shards: list[dict[str, str]], total: int) -> None:
    """Give the shards their final names, now that their number is known."""
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(shard, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
