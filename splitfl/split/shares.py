"""Which of a client's weights train and which of those are merged: the same answer on both sides.

The server asks without holding a client's weights: segments on the meta device have names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.split.checkpoint import is_tied
from splitfl.split.flow import bottom_trains
from splitfl.split.modes import training_policy
from splitfl.split.segment import Piece, Segment
from splitfl.split.training import set_up_training, stays_tied

Shapes = dict[str, tuple[int, ...]]


def ends_pieces(cut: Cut, layers: int) -> tuple[Piece, Piece]:
    """Bottom and top of a client with ``cut``."""
    top = cut.top(layers)
    return Piece(0, cut.n_bottom, embedding=True), Piece(top.start, top.stop, head=True)


def trained_shapes(segment: Segment) -> Shapes:
    """Names and shapes of a segment's trainable weights."""
    return {name: tuple(weight.shape) for name, weight in segment.named_weights() if weight.requires_grad}


def shared_shapes(config: PreTrainedConfig, settings: Federation, cut: Cut) -> Shapes:
    """Names and shapes of the weights that a client with ``cut`` sends for merging."""
    if settings.merge.share == "none":
        return {}
    layers = config.num_hidden_layers
    policy = training_policy(settings, layers, torch.device("cpu"))
    bottom, top = (Segment(config, piece) for piece in ends_pieces(cut, layers))
    for segment in (bottom, top):
        set_up_training(segment, policy)
    top_shapes = trained_shapes(top)
    if stays_tied(config, policy):
        top_shapes.pop(f"{top.anatomy.head}.weight", None)
    return top_shapes if settings.merge.share == "top" else trained_shapes(bottom) | top_shapes


def check_handover(settings: Federation, before: Cut, now: Cut) -> None:
    """Raise ConfigError for a change of cut in which blocks that are personal would change hands.

    A block that is merged is the same for all who hold it. Tops of different depth are merged or refused as such.
    """
    moves = before.n_bottom != now.n_bottom and any(bottom_trains(settings, cut) for cut in (before, now))
    if moves and settings.merge.share != "ends":
        raise ConfigError(
            f"{before} was this client's cut: with merge.share = {settings.merge.share!r} its bottom is personal, and "
            "no block of it can be given back or taken on",
            f"Join with --plan {before.n_bottom},{now.n_top}, or name a new --state.",
        )


def ends_names(config: PreTrainedConfig, cut: Cut) -> list[str]:
    """Stored names of the base tensors that a client with ``cut`` needs; cuts may overlap here."""
    layers = config.num_hidden_layers
    names: dict[str, None] = {}
    for piece in (Piece(0, cut.n_bottom, embedding=True), Piece(layers - cut.n_top, layers, head=True)):
        segment = Segment(config, piece)
        names |= dict.fromkeys(weight_names(segment, tied=is_tied(config)))
    return list(names)


def weight_names(segment: Segment, *, tied: bool) -> Iterable[str]:
    """Global names of a segment's weights as the checkpoint stores them: a tied head is the embedding."""
    anatomy = segment.anatomy
    for name, _ in segment.model.named_parameters(remove_duplicate=False):
        full = segment.global_name(name)
        yield f"{anatomy.prefix}.{anatomy.embedding}.weight" if tied and full == f"{anatomy.head}.weight" else full
