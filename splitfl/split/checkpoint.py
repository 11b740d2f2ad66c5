"""Reading a Hugging Face checkpoint slice by slice, straight from safetensors.

Only the tensors of the slice are read, so a client never holds a trunk block in memory and the server never an
embedding. Files are safetensors (one, or shards with an ``.index.json``); pickle and remote code are never
touched. A tensor is also known as a byte range of its file with a SHA-256, which is how the server hands ends
to clients.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from splitfl.errors import CheckpointError
from splitfl.split.segment import Anatomy, Piece, Segment, find_anatomy, one_block, without_dropout

# what reading a header may raise when its bytes are not what they should be
MALFORMED = (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UNQUANTISED = "Quantised checkpoints cannot be trained; use the one in bf16, fp16 or fp32."
MAX_HEADER_BYTES = 100 << 20  # of a safetensors file, as in the format's own reference reader


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as bytes of a file: ``nbytes`` from ``offset`` in ``path``, row-major, little-endian."""

    name: str
    dtype: str  # safetensors' name: F32, F16, BF16
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def sha256(self) -> str:
        """SHA-256 of the tensor's bytes, read in pieces."""
        return hash_range(self.path, self.offset, self.nbytes)


class TensorSource(Protocol):
    """Where weights come from: a checkpoint folder, or blobs fetched from the server."""

    @property
    def config(self) -> PreTrainedConfig: ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> Tensor: ...


class CheckpointFolder:
    """A local Hugging Face checkpoint. Raises CheckpointError when it is not one, or holds no safetensors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: PreTrainedConfig = read_config(folder)
        model = one_block(self.config)
        self.anatomy: Anatomy = find_anatomy(model)
        rename = KeyRenaming(model)
        self.entries = {rename(entry.name): entry for entry in folder_entries(folder)}

    def has(self, name: str) -> bool:
        return name in self.entries

    def read(self, name: str) -> Tensor:
        """One tensor in the file's own dtype. Raises CheckpointError when it is missing or damaged."""
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}", "Download or export the checkpoint again.")
        try:
            with safe_open(entry.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{entry.path} cannot be read: {error}", "Download it again.") from error
        return tensor


class KeyRenaming:
    """Names in files -> names in the model, as transformers itself maps them while loading.

    Older files may use other names (GPT-NeoX's ``embed_out``) or lack the base model's prefix (GPT-2 on the
    hub). A family whose tensors must be *converted* (experts that are stacked while loading) is refused.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self.prefix = model.base_model_prefix + "."
        self.outer = tuple(f"{name}." for name, _ in model.named_children())
        self.family = model.config.model_type

    def __call__(self, name: str) -> str:
        renamed, converted = rename_source_key(name, self.renamings, self.converters)
        if converted is not None:
            raise CheckpointError(
                f"checkpoints of type {self.family!r} store {name!r} in a form that is converted while loading",
                "Save it again with transformers 5: model.save_pretrained(folder, save_original_format=False).",
            )
        name_in_model: str = renamed if renamed.startswith(self.outer) else self.prefix + renamed
        return name_in_model


def read_config(folder: Path) -> PreTrainedConfig:
    """The folder's config, without dropout. Raises CheckpointError."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json",
            "Name a folder saved with save_pretrained, or make one with `splitfl init`.",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}/config.json cannot be used: {one_line(error)}", "Choose a model that transformers knows."
        ) from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else type(quantised).__name__
        raise CheckpointError(f"{folder} is quantised ({method})", UNQUANTISED)
    return without_dropout(config)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def folder_entries(folder: Path) -> list[TensorEntry]:
    """Every tensor of the folder's safetensors files. Raises CheckpointError when there is none."""
    index = folder / "model.safetensors.index.json"
    names = indexed_files(index) if index.is_file() else ["model.safetensors"]
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {missing[0]}",
            "SplitFL reads safetensors only; save the model with save_pretrained(folder) to get them.",
        )
    return [entry for file in files for entry in file_entries(file)]


def indexed_files(index: Path) -> list[str]:
    """Names of the shards that an index lists, without folders. Raises CheckpointError."""
    try:
        return sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {one_line(error)}", "Download it again.") from error


def file_entries(path: Path, max_header: int = MAX_HEADER_BYTES) -> list[TensorEntry]:
    """The tensors of one safetensors file, as byte ranges. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > max_header:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return [tensor_entry(path, name, item, 8 + length) for name, item in header.items()]
    except MALFORMED as error:
        raise CheckpointError(f"{path} is not a safetensors file: {one_line(error)}", "Download it again.") from error


def tensor_entry(path: Path, name: str, item: dict[str, object], data_start: int) -> TensorEntry:
    begin, end = (int(number) for number in item["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(size) for size in item["shape"])  # type: ignore[attr-defined]
    return TensorEntry(name, str(item["dtype"]), shape, path, data_start + begin, end - begin)


def hash_range(path: Path, offset: int, nbytes: int) -> str:
    """SHA-256 of ``nbytes`` from ``offset`` in ``path``, in pieces of 1 MiB."""
    digest, left = hashlib.sha256(), nbytes
    with path.open("rb") as file:
        file.seek(offset)
        while left and (piece := file.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def load_segment(source: TensorSource, piece: Piece, *, attention: str | None = None) -> Segment:
    """Build a segment and read its tensors, and no others, in the checkpoint's dtype.

    A tied head is read from the embedding's tensor; the two are apart from here on unless the caller gives them
    one parameter. Raises CheckpointError for a missing tensor or one whose shape disagrees with the config.
    """
    segment = Segment(source.config, piece, attention=attention)
    tensors: dict[str, Tensor] = {}
    for name, parameter in segment.model.named_parameters(remove_duplicate=False):
        stored = stored_name(source, segment, segment.global_name(name))
        tensors[name] = checked(stored, source.read(stored), parameter.shape)
    assign(segment.model, tensors)
    return segment


def checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """``tensor`` as it is. Raises CheckpointError for a dtype or shape that the model cannot take."""
    if tensor.dtype not in DTYPES.values():
        raise CheckpointError(f"tensor {name!r} is stored as {tensor.dtype}", UNQUANTISED)
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, the config says {tuple(shape)}",
            "The folder mixes two models; download it again.",
        )
    return tensor


def stored_name(source: TensorSource, segment: Segment, name: str) -> str:
    """The name under which a tensor lies in the file: a tied head is stored as the embedding."""
    if name == f"{segment.anatomy.head}.weight" and is_tied(source.config):
        return embedding_name(segment.anatomy)
    return name


def embedding_name(anatomy: Anatomy) -> str:
    return f"{anatomy.prefix}.{anatomy.embedding}.weight"


def is_tied(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``tensors`` in place of the model's meta parameters, frozen; nothing is initialised over them."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
