"""The ends of the model on the client: bottom and top as segments, each with its own optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ProtocolError
from splitfl.federation.merging import choose_strategy
from splitfl.privacy.noise import NormalSource
from splitfl.privacy.policy import DpSgd
from splitfl.split.checkpoint import TensorSource, load_segment
from splitfl.split.flow import bottom_trains, trunk_needs_backward
from splitfl.split.loss import HeadLoss, head_loss
from splitfl.split.modes import arithmetic, optimizer_spec, training_policy
from splitfl.split.narrow import NarrowRelease
from splitfl.split.optimizer import PartOptimizer
from splitfl.split.shares import ends_pieces, shared_shapes
from splitfl.split.training import set_up_training, stays_tied, tie_head

if TYPE_CHECKING:
    from splitfl.privacy.dp_sgd import PrivateBottom, PrivateTop


class Ends:
    """Bottom and top of ``cut``, read slice-wise from ``source`` onto ``device``.

    ``dp_sgd`` trains them with ``noise``: the gate then takes their weights for paid for, so one without the other is
    a ValueError.
    """

    def __init__(
        self,
        source: TensorSource,
        settings: Federation,
        cut: Cut,
        device: torch.device,
        dp_sgd: DpSgd | None = None,
        noise: NormalSource | None = None,
        narrow: NarrowRelease | None = None,
    ) -> None:
        self.settings = settings
        self.cut = cut
        self.device = device
        self.layers: int = source.config.num_hidden_layers
        self.width: int = source.config.hidden_size
        policy = training_policy(settings, self.layers, device)
        spec = optimizer_spec(settings, client=True)
        if dp_sgd is not None:  # per-record norms need fp32; clipping the noised sum would scale by its noise
            policy, spec = replace(policy, mixed=False), replace(spec, max_grad_norm=0.0)
        self.bottom, self.top = (load_segment(source, piece) for piece in ends_pieces(cut, self.layers))
        for segment in (self.bottom, self.top):
            set_up_training(segment, policy)
            segment.to(device)
        if stays_tied(source.config, policy):
            tie_head(self.top, self.bottom.embedding)
        bottom, top = self.bottom.trainable(), self.top.trainable()
        own = {id(weight) for weight in bottom.values()}
        top = {name: weight for name, weight in top.items() if id(weight) not in own}
        self.bottom_optimizer = PartOptimizer(bottom, spec)
        self.top_optimizer = PartOptimizer(top, spec)
        self.shared = list(shared_shapes(source.config, settings, cut))
        self.correction = choose_strategy(settings).correction()
        self.narrow = None if narrow is None else narrow.to(device)  # the publisher's, frozen
        self.bottom_trains = bottom_trains(settings, cut)
        self.trunk_is_empty = len(cut.trunk(self.layers)) == 0
        self.trunk_left_out = False
        self.row_pieces = 1  # in how many pieces the rows of a micro-batch are computed, where memory is short
        self.head_name = f"{self.top.anatomy.head}.weight"
        self.needs_backward = trunk_needs_backward(settings, cut, self.layers)
        self.private_top: PrivateTop | None = None
        self.private_bottom: PrivateBottom | None = None
        if dp_sgd is not None:
            if noise is None:
                raise ValueError("DP-SGD without noise is none")
            from splitfl.privacy.dp_sgd import PrivateBottom, PrivateTop  # opacus takes seconds to import

            self.private_top = PrivateTop(self.top, dp_sgd, noise)
            self.private_bottom = PrivateBottom(self.bottom, dp_sgd, noise)

    def leave_trunk_out(self) -> None:
        """From now on the ends are a small model of their own: what the bottom gives goes straight into the top."""
        self.trunk_is_empty = self.trunk_left_out = True

    def run_bottom(self, input_ids: Tensor, lengths: Tensor | None, *, train: bool) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, D) at the trunk's input.

        Without a graph where DP-SGD trains the bottom, and where memory is short: its backward runs the forward again.
        """
        keep_graph = train and self.bottom_trains and self.private_bottom is None and self.row_pieces == 1
        pieces = self._pieces(len(input_ids))
        return joined([self._run_bottom(input_ids[p], rows_of(lengths, p), keep_graph=keep_graph) for p in pieces])

    def _run_bottom(self, input_ids: Tensor, lengths: Tensor | None, *, keep_graph: bool) -> Tensor:
        with torch.set_grad_enabled(keep_graph), arithmetic(self.settings, self.device):
            hidden: Tensor = self.bottom(self.bottom.embed(input_ids), lengths)
        return hidden.float()

    def encoded(self, hidden: Tensor) -> Tensor:
        """The bottom's output (B, T, D) -> what the gate is given: (B, T, r) with a narrow release, else the same."""
        if self.narrow is None:
            return hidden
        with torch.no_grad():
            narrowed: Tensor = self.narrow.encoder(hidden)
        return narrowed.float()

    def run_top(
        self, hidden: Tensor, own: Callable[[], Tensor], lengths: Tensor | None, labels: Tensor, *, train: bool
    ) -> HeadLoss:
        """Hidden states (B, T, D) at the trunk's output -> summed loss; with ``train`` also runs backward.

        ``own`` gives the bottom's clean output, which a narrow release mixes in. Gradients accumulate in the top's
        weights, and in ``hidden`` where it asks for one.
        """
        if self.row_pieces == 1:
            return self._run_top(hidden, own, lengths, labels, train=train)
        parts = [
            self._run_top(hidden[p], partial(row_of, own, p), rows_of(lengths, p), labels[p], train=train)
            for p in self._pieces(len(labels))
        ]
        return HeadLoss(sum(part.total for part in parts), sum(part.tokens for part in parts))

    def _run_top(
        self, hidden: Tensor, own: Callable[[], Tensor], lengths: Tensor | None, labels: Tensor, *, train: bool
    ) -> HeadLoss:
        with torch.set_grad_enabled(train), arithmetic(self.settings, self.device):
            mixed = hidden if self.narrow is None else self._mixed(own(), hidden)
        if train and self.private_top is not None:
            loss, gradient = self.private_top.backward(mixed, lengths, labels)
            if mixed.requires_grad:
                torch.autograd.backward(mixed, gradient)
            return loss
        with torch.set_grad_enabled(train), arithmetic(self.settings, self.device):
            final = self.top(mixed, lengths)
            return head_loss(self.top, final, labels, train=train)

    def _mixed(self, own: Tensor, from_trunk: Tensor) -> Tensor:
        """What a narrow release's local skip makes of both states; a trunk that is left out is silent."""
        assert self.narrow is not None
        heard = torch.zeros_like(from_trunk) if self.trunk_left_out else from_trunk
        mixed: Tensor = self.narrow.skip(own, heard)
        return mixed.float()

    def backward_bottom(self, hidden: Tensor, gradient: Tensor, input_ids: Tensor, lengths: Tensor | None) -> None:
        """Take the gradient (B, T, D) at the trunk's input into the bottom's weights; ``hidden`` is what it gave."""
        if hidden.grad_fn is not None:
            hidden.backward(gradient)  # type: ignore[no-untyped-call]
            return
        for p in self._pieces(len(input_ids)):
            if self.private_bottom is not None:
                self.private_bottom.backward(input_ids[p], rows_of(lengths, p), gradient[p])
            else:
                again = self._run_bottom(input_ids[p], rows_of(lengths, p), keep_graph=True)
                again.backward(gradient[p])  # type: ignore[no-untyped-call]

    def _pieces(self, rows: int) -> list[slice]:
        """The rows of a micro-batch as they are computed: all at once, where there is memory."""
        size = -(-rows // self.row_pieces)
        return [slice(at, at + size) for at in range(0, rows, size)]

    def step_top(self, learning_rate: float, tokens: int) -> float:
        """Apply the top's gradients; returns their norm. With DP-SGD ``tokens`` is the public number of records."""
        if self.private_top is not None:
            self.private_top.finish()
        return self.top_optimizer.step(learning_rate, lambda _: tokens, self.correction)

    def step_bottom(self, learning_rate: float, tokens: int) -> float:
        """Apply the bottom's gradients; returns their norm. With DP-SGD ``tokens`` is the public number of records."""
        if self.private_bottom is not None:
            self.private_bottom.finish()
        return self.bottom_optimizer.step(learning_rate, lambda _: tokens, self.correction)

    def begin_round(self, sent: Mapping[str, Tensor]) -> None:
        """The shared weights are the round's start; ``sent`` is what came beside them for the strategy's correction.

        Raises ProtocolError for a tensor that does not fit its weight.
        """
        if self.correction is not None:
            start = {name: weight.clone() for name, weight in self._shared_weights().items()}
            for name, tensor in sent.items():
                if tensor.shape != start[name.rpartition("/")[0]].shape:
                    raise ProtocolError(f"{name!r} has another shape than its weight", "Do not trust this server.")
            self.correction.begin(start, {name: tensor.to(self.device) for name, tensor in sent.items()})

    def end_round(self, step_sizes: float) -> None:
        """All local steps are done; their step sizes add up to ``step_sizes``."""
        if self.correction is not None:
            self.correction.end(self._shared_weights(), step_sizes)

    @property
    def beside(self) -> list[str]:
        """Names of what this client takes down beside the merged weights."""
        kind = None if self.correction is None else self.correction.sent_name
        return [] if kind is None else [f"{name}/{kind}" for name in self.shared]

    def correction_tensors(self) -> dict[str, Tensor]:
        """What the strategy's correction keeps, on the CPU."""
        kept = {} if self.correction is None else self.correction.kept
        return {name: tensor.cpu() for name, tensor in kept.items()}

    def load_correction_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        if self.correction is not None:
            self.correction.kept = {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _shared_weights(self) -> dict[str, Tensor]:
        named = self.bottom_optimizer.named | self.top_optimizer.named
        return {name: named[name].detach() for name in self.shared}

    def clear_gradients(self) -> None:
        """Discard what a missed step left."""
        for part in (self.private_top, self.private_bottom):
            if part is not None:
                part.discard()
        self.bottom_optimizer.clear()
        self.top_optimizer.clear()

    def weights(self) -> dict[str, Tensor]:
        """All trained weights by global name, on the CPU."""
        named = self.bottom_optimizer.named | self.top_optimizer.named
        return {name: weight.detach().cpu() for name, weight in named.items()}

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite those trained weights that ``tensors`` names. Raises ProtocolError for one that does not fit."""
        named = self.bottom_optimizer.named | self.top_optimizer.named
        with torch.no_grad():
            for name, weight in named.items():
                if name in tensors:
                    if tensors[name].shape != weight.shape:
                        raise ProtocolError(f"weight {name!r} has another shape here", "Do not trust this server.")
                    weight.copy_(tensors[name])

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Moments of both optimizers."""
        return self.bottom_optimizer.state_tensors() | self.top_optimizer.state_tensors()

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put moments back."""
        self.bottom_optimizer.load_state_tensors(tensors)
        self.top_optimizer.load_state_tensors(tensors)


def joined(pieces: list[Tensor]) -> Tensor:
    """Pieces of a batch (B, T, D) as one; a single one as it is."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def rows_of(lengths: Tensor | None, rows: slice) -> Tensor | None:
    """Some of a batch's lengths (B,), None for rows that are not padded."""
    return None if lengths is None else lengths[rows]


def row_of(hidden: Callable[[], Tensor], rows: slice) -> Tensor:
    """Some rows of a batch (B, T, D)."""
    return hidden()[rows]
