"""Does this family split exactly? Asked once, when a model of a family that the tests do not hold is opened.

Oracle O1 in small: a random model of the same config, a few blocks deep, runs whole and as bottom, trunk and
top, through the code that training uses. Anything but equal logits is a refusal, for a family that adds
parts of its own (a second embedding norm, a scale in its forward, blocks that know their number) would
otherwise train on wrong numbers without a word. It says nothing about the weights of the checkpoint itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from splitfl.cut import Cut
from splitfl.errors import CheckpointError
from splitfl.split.checkpoint import is_tied, load_segment
from splitfl.split.families import FAMILIES, build_small_model
from splitfl.split.segment import Piece, Segment, find_anatomy, one_block, slice_config, without_dropout

BLOCKS = 3  # one for each part; more only where the per-layer lists name kinds that come later
VOCAB = 128
LENGTHS = (12, 7)  # tokens of the two rows, the second right-padded
MLP_WIDTH = 256  # most that the small model's MLPs may have: their width decides nothing here, but most of the memory
MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
GRADIENT_TOLERANCE = 1e-4  # relative to the largest entry; rounding alone gives about 1e-6


def check_family_splits(config: PreTrainedConfig) -> None:
    """Raise CheckpointError unless a small model of ``config`` splits exactly; families in FAMILIES pass unasked.

    Takes a second or two, and the memory of three blocks with narrow MLPs. The caller's global generators are
    left as they were.
    """
    if config.model_type in FAMILIES:
        return
    try:
        with torch.random.fork_rng(devices=[]):
            find_anatomy(one_block(config))
            difference = compare(build_check_model(config))
    except Exception as error:  # a foreign family may raise anything, and it always means the same
        raise refusal(config, describe(error)) from error
    if difference:
        raise refusal(config, difference)


def describe(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return error.message
    reason = f"the check raised {type(error).__name__}: {error}"
    return " ".join(reason.split())[:200]


def refusal(config: PreTrainedConfig, reason: str) -> CheckpointError:
    return CheckpointError(
        f"models of type {config.model_type!r} cannot be split exactly: {reason}",
        f"Choose a model of one of these families: {', '.join(FAMILIES)}.",
    )


def build_check_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of ``config``, at most three blocks deep, in which every weight and buffer counts."""
    model = build_small_model(check_config(config), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # persistent buffers too: segments do not load them
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model.requires_grad_(False).train()  # as in training: layers that act at random then show


def check_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """``config`` with few blocks, few words and narrow MLPs; all that decides how it splits is kept."""
    part = without_dropout(slice_config(config, 0, blocks_to_check(config)))
    part.vocab_size = VOCAB
    for name in SPECIAL_TOKENS:
        if getattr(part, name, None) is not None:
            setattr(part, name, 0)
    for name in MLP_WIDTHS:
        width = getattr(part, name, None)
        if isinstance(width, int) and width > MLP_WIDTH:
            setattr(part, name, MLP_WIDTH)
    return part


def blocks_to_check(config: PreTrainedConfig) -> int:
    """Enough blocks to see each part, and every kind of block that a per-layer list of the config names."""
    layers: int = config.num_hidden_layers
    wanted = min(layers, BLOCKS)
    for value in vars(config).values():
        if isinstance(value, list | tuple) and len(value) == layers:
            kinds = [str(kind) for kind in value]
            wanted = max(wanted, 1 + max(kinds.index(kind) for kind in kinds)) if len(set(kinds)) < layers else wanted
    return wanted


@dataclass(frozen=True)
class SharedSource:
    """The weights of a model in memory, as a source of segments; nothing is copied."""

    config: PreTrainedConfig
    tensors: dict[str, Tensor]

    def has(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise CheckpointError(f"a segment has a weight {name!r} that the whole model lacks")
        return self.tensors[name]


def compare(model: PreTrainedModel) -> str:
    """What differs between ``model`` and its segments, in words; empty when nothing does."""
    source = SharedSource(
        copy.deepcopy(model.config), {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    )
    parts = [load_segment(source, piece).train() for piece in pieces(model.config.num_hidden_layers)]
    if unowned := unowned_weight(model, parts):
        return f"no segment holds its weight {unowned!r}"
    ids = torch.randint(1, VOCAB, (2, LENGTHS[0]), generator=torch.Generator().manual_seed(2))  # (B, T)
    for lengths in (None, torch.tensor(LENGTHS)):
        if difference := compare_batch(model, parts, ids, lengths):
            return difference
    return ""


def pieces(layers: int) -> list[Piece]:
    """Bottom, trunk and top of a small model: one block at each end where there are two."""
    cut = Cut(1, 1) if layers > 1 else Cut(0, 1)
    trunk, top = cut.trunk(layers), cut.top(layers)
    return [
        Piece(0, cut.n_bottom, embedding=True),
        Piece(trunk.start, trunk.stop),
        Piece(top.start, top.stop, head=True),
    ]


def unowned_weight(model: PreTrainedModel, parts: list[Segment]) -> str | None:
    """A weight of the whole model that no segment has; a tied head is one with the embedding."""
    owned = {name for part in parts for name, _ in part.named_weights()}
    tied = {f"{parts[0].anatomy.head}.weight"} if is_tied(model.config) else set()
    return next((name for name, _ in model.named_parameters() if name not in owned | tied), None)


def compare_batch(model: PreTrainedModel, parts: list[Segment], ids: Tensor, lengths: Tensor | None) -> str:
    """Logits to the last bit, and gradients at the embedding, for token ids (B, T); empty when they agree."""
    mask = None if lengths is None else (torch.arange(ids.shape[1]) < lengths[:, None]).long()  # (B, T)
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    bottom, trunk, top = parts

    whole_rows, whole = run_whole(model, ids, mask)
    rows = bottom.embed(ids).detach().requires_grad_()
    hidden = top(trunk(bottom(rows, lengths), lengths), lengths)  # (B, T, D)
    logits = top.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)  # (B, T, V)
    kind = "padded" if lengths is not None else "full"
    if not torch.equal(logits[valid], whole[valid]):
        gap = float((logits - whole).detach()[valid].abs().max())
        return f"logits of {kind} rows differ by {gap:.1e} between whole and split"

    direction = torch.randn(whole[valid].shape, generator=torch.Generator().manual_seed(3))
    (expected,) = torch.autograd.grad(whole[valid], whole_rows, direction)
    (gradient,) = torch.autograd.grad(logits[valid], rows, direction)
    gap = float((gradient - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not gap <= GRADIENT_TOLERANCE:  # NaN is refused too
        return f"gradients of {kind} rows differ by {gap:.1e} between whole and split"
    return ""


def run_whole(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The embedding's rows (B, T, D), as a leaf, and the logits (B, T, V) of the whole model."""
    rows: list[Tensor] = []

    def catch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rows.append(output.detach().requires_grad_())
        return rows[0]

    handle = model.get_input_embeddings().register_forward_hook(catch)
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    return rows[0], logits
