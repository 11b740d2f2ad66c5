"""A segment: a genuine Hugging Face causal model that holds a slice of the blocks.

There is no forward code per family. The family's own ``*ForCausalLM`` is built from a config whose block
count, and every list with one entry a block, is the slice; what the segment does not own is replaced by
modules without weights. Running bottom, trunk and top one after another is then, bit for bit, the whole model
(oracle O1). Names are always those of the whole checkpoint, with the global block number, so that holders of
different slices mean the same tensor by the same name.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from splitfl.errors import CheckpointError
from splitfl.split.kernels import lighten


@dataclass(frozen=True)
class Piece:
    """Which part of the model a segment holds: blocks ``start`` to ``stop - 1``, and which of the ends."""

    start: int
    stop: int
    embedding: bool = False
    head: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Where a family keeps its parts: attribute names below the base model, and the head's on the outer one."""

    prefix: str  # of the base model in the causal model: "model", "transformer", "gpt_neox"
    blocks: str  # ModuleList of the blocks in the base model
    embedding: str
    positions: tuple[str, ...]  # learned positions, added inside the base model's forward (GPT-2)
    norms: tuple[str, ...]  # what runs after the last block
    head: str


class NoWeights(nn.Module):
    """Stands where a segment owns nothing; calling it is a bug of ours."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise AssertionError("a segment was asked for a part it does not hold")


class NoPositions(nn.Module):
    """Learned positions act in the bottom alone; elsewhere exact zeros are added."""

    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((*position_ids.shape, 1), device=position_ids.device)  # (B, T, 1)


class _PassThroughOutput(MoeModelOutputWithPast):  # type: ignore[misc]
    cross_attentions = None


class PassThrough(nn.Module):
    """A base model without blocks, so that the causal model's own head code runs on given hidden states.

    The outer model may scale or soft-cap its logits (Gemma 2, Granite, Cohere); calling ``lm_head`` alone
    would miss that.
    """

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _PassThroughOutput:
        return _PassThroughOutput(last_hidden_state=inputs_embeds)


_this_thread = threading.local()


def _without_memory(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Torch asks this of every new parameter, everywhere; None leaves it alone."""
    if parameter is None or not getattr(_this_thread, "builds_empty", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


register_module_parameter_registration_hook(_without_memory)  # type: ignore[arg-type]


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Parameters made here are on the meta device, buffers are real.

    accelerate's ``init_empty_weights`` does the same by patching ``nn.Module`` for the whole process, so that two
    threads that build models at once ruin each other's weights. This acts on the calling thread alone.
    """
    _this_thread.builds_empty = True
    try:
        yield
    finally:
        _this_thread.builds_empty = False


def slice_config(config: PreTrainedConfig, start: int, stop: int) -> PreTrainedConfig:
    """Copy ``config`` for blocks ``start..stop-1``: the block count and all per-block lists are cut."""
    layers = config.num_hidden_layers
    part = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == layers and layers > 1:
            setattr(part, name, type(value)(value[start:stop]))
    if layers == 1 and getattr(config, "layer_types", None):
        part.layer_types = config.layer_types[start:stop]
    part.num_hidden_layers = stop - start
    part.use_cache = False
    return part


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Copy ``config`` with every dropout at 0: it would run anew in each segment, and GPT-2 ships with 0.1.

    The other layers that act at random while training go with it (layer drop, an expert router's jitter).
    """
    part = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(part, name, 0.0)
    return part


def one_block(config: PreTrainedConfig) -> PreTrainedModel:
    """The family's model with its first block only, without memory: to look at its structure and names.

    Raises CheckpointError for a config that is not of a causal language model.
    """
    try:
        with torch.device("meta"):  # dtype: transformers makes it torch's default meanwhile, in every thread
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                slice_config(config, 0, 1), trust_remote_code=False, dtype=torch.float32
            )
    except (ValueError, AttributeError) as error:
        raise not_a_plain_decoder(config) from error
    return model


def not_a_plain_decoder(config: PreTrainedConfig) -> CheckpointError:
    return CheckpointError(
        f"models of type {config.model_type!r} are not built as embedding, blocks, norm and head",
        "SplitFL splits decoder-only language models; choose one of those.",
    )


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a family in a one-block model of it.

    Raises CheckpointError for a model that is not a plain decoder (no block list, no embedding, no head).
    """
    config = model.config
    base = getattr(model, model.base_model_prefix, None)
    lists = [name for name, child in named_children(base) if isinstance(child, nn.ModuleList) and len(child) == 1]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if base is None or len(lists) != 1 or embedding is None or head is None:
        raise not_a_plain_decoder(config)
    rest = [(n, c) for n, c in named_children(base) if n != lists[0] and c is not embedding and acts(c)]
    return Anatomy(
        prefix=model.base_model_prefix,
        blocks=lists[0],
        embedding=name_of(base, embedding),
        positions=tuple(name for name, child in rest if isinstance(child, nn.Embedding)),
        norms=tuple(name for name, child in rest if not isinstance(child, nn.Embedding)),
        head=name_of(model, head),
    )


def learned_positions(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest sequence for which the model has learned positions; None where it computes them (rope).

    Raises CheckpointError for a config that is not of a plain decoder.
    """
    model = one_block(config)
    anatomy = find_anatomy(model)
    tables = [getattr(getattr(model, anatomy.prefix), name) for name in anatomy.positions]
    return min((table.num_embeddings for table in tables), default=None)


def named_children(module: nn.Module | None) -> list[tuple[str, nn.Module]]:
    return list(module.named_children()) if module is not None else []


def acts(module: nn.Module) -> bool:
    """Whether a child of the base model changes hidden states: it has weights, or is a norm without any (OLMo)."""
    return any(True for _ in module.parameters()) or "norm" in type(module).__name__.lower()


def name_of(parent: nn.Module, wanted: nn.Module) -> str:
    for name, child in parent.named_children():
        if child is wanted:
            return name
    raise CheckpointError(
        f"{type(parent).__name__} nests its {type(wanted).__name__} deeper than expected",
        "SplitFL cannot split this family; choose another model.",
    )


class Segment(nn.Module):
    """Blocks ``piece.start .. piece.stop - 1`` of a causal model, and the ends that ``piece`` names.

    Built without memory: parameters are on the meta device until ``splitfl.split.checkpoint`` fills them.
    ``attention`` names the implementation (``"eager"``, ``"sdpa"``); None lets transformers choose as it would
    for the whole model.
    """

    def __init__(self, config: PreTrainedConfig, piece: Piece, *, attention: str | None = None) -> None:
        super().__init__()
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise CheckpointError(
                "this GPT-2 scales attention by the block's own number, which renumbered blocks would get wrong",
                "Use a checkpoint with scale_attn_by_inverse_layer_idx = false.",
            )
        self.piece = piece
        self.anatomy = find_anatomy(one_block(config))
        with empty_parameters():
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                slice_config(config, piece.start, piece.stop),
                trust_remote_code=False,
                dtype=torch.float32,
                **({"attn_implementation": attention} if attention else {}),
            )
        self._strip()
        lighten(self.model)

    def _strip(self) -> None:
        """Replace what this segment does not own."""
        if not self.piece.embedding:
            setattr(self.base, self.anatomy.embedding, NoWeights())
            for name in self.anatomy.positions:
                setattr(self.base, name, NoPositions())
        if not self.piece.head:
            setattr(self.model, self.anatomy.head, NoWeights())
            for name in self.anatomy.norms:
                setattr(self.base, name, nn.Identity())

    @property
    def base(self) -> Any:
        return getattr(self.model, self.anatomy.prefix)

    @property
    def embedding(self) -> nn.Embedding:
        module = getattr(self.base, self.anatomy.embedding)
        assert isinstance(module, nn.Embedding)
        return module

    @property
    def blocks(self) -> nn.ModuleList:
        module = getattr(self.base, self.anatomy.blocks)
        assert isinstance(module, nn.ModuleList)
        return module

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> what enters the first block, (B, T, D), in fp32 unless autocast says otherwise."""
        rows: Tensor = self.embedding(input_ids)
        return rows.float()

    def forward(self, hidden_states: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the blocks: (B, T, D) -> (B, T, D); behind the final norm where this segment holds the head.

        ``lengths`` (B,) are the true lengths of right-padded rows; None means that no row is padded.
        """
        batch, time, _ = hidden_states.shape
        positions = torch.arange(time, device=hidden_states.device).expand(batch, time)  # (B, T)
        output = self.base(
            inputs_embeds=hidden_states,
            attention_mask=padding_mask(lengths, time, hidden_states.device),
            position_ids=positions,
            use_cache=False,
        )
        result: Tensor = output.last_hidden_state
        return result

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Hidden states behind the final norm, (N, D), -> logits (N, V), by the family's own head code."""
        head = shallow(self.model)
        head._modules[self.anatomy.prefix] = PassThrough()
        output = head(inputs_embeds=hidden_states.unsqueeze(0), use_cache=False)
        result: Tensor = output.logits.squeeze(0)
        return result

    def narrow(self, start: int, stop: int) -> Segment:
        """A view of blocks ``start..stop-1`` (global numbers) that shares this segment's weights, without ends.

        Raises ValueError for blocks that this segment does not hold.
        """
        if not self.piece.start <= start <= stop <= self.piece.stop:
            raise ValueError(f"blocks {start}..{stop} are not inside {self.piece}")
        if self.piece == Piece(start, stop):
            return self
        offset = self.piece.start
        view: Segment = shallow(self)
        view.piece = Piece(start, stop)
        view.model = shallow(self.model)
        base = shallow(self.base)
        base._modules[self.anatomy.blocks] = nn.ModuleList(list(self.blocks)[start - offset : stop - offset])
        base.config = slice_config(self.model.config, start - offset, stop - offset)
        view.model._modules[self.anatomy.prefix] = base
        view._strip()
        return view

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under their names in the whole checkpoint (global block numbers); tied ones once."""
        for name, parameter in self.model.named_parameters():
            yield self.global_name(name), parameter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those that train, by their names in the whole checkpoint."""
        return {name: weight for name, weight in self.named_weights() if weight.requires_grad}

    def global_name(self, name: str) -> str:
        """Local parameter name -> name in the whole checkpoint."""
        return renumber(name, self.block_prefix, self.piece.start)

    def block_of(self, name: str) -> int | None:
        """Global number of the block that owns ``name`` (a global name), or None for embedding, norm and head."""
        return block_number(name, self.block_prefix)

    @property
    def block_prefix(self) -> str:
        return f"{self.anatomy.prefix}.{self.anatomy.blocks}."


def shallow(module: Any) -> Any:
    """Copy a module without its weights: children can be exchanged in the copy, the original keeps its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def renumber(name: str, prefix: str, offset: int) -> str:
    """Shift the block number in ``name`` by ``offset``; names outside the blocks come back unchanged."""
    if not name.startswith(prefix):
        return name
    number, dot, rest = name[len(prefix) :].partition(".")
    return f"{prefix}{int(number) + offset}{dot}{rest}"


def block_number(name: str, prefix: str) -> int | None:
    """The block number in ``name``, or None for names outside the blocks."""
    return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else None


def padding_mask(lengths: Tensor | None, time: int, device: torch.device) -> Tensor | None:
    """True lengths (B,) -> attention mask (B, T), 1 for tokens and 0 for padding on the right."""
    if lengths is None or bool((lengths == time).all()):
        return None
    return (torch.arange(time, device=device) < lengths.to(device)[:, None]).long()
