"""DP-SGD (Abadi et al., CCS 2016) for the weights that a client holds, bottom and top each for itself.

For each step: every record's own gradient over all trainable weights of the part, clipped to ``max_grad_norm``;
their sum over the step's micro-batches; Gaussian noise once; then the mean by the *public* number of records.

What it is worth, for the ledger, which is replace-one (privacy.md, 9): a record moves the sum by at most
``2 * max_grad_norm`` (opacus speaks of add/remove and ``max_grad_norm``), and sigma is
``noise_multiplier * max_grad_norm``: mu^2 = (2 / noise_multiplier)^2 for each record, step and part. Bottom and top
are two releases: their mu^2 add up. They are clipped apart since the bottom's gradient comes when the top's is
long summed; a head tied to the embedding gets two clipped sums and two noises, one from each part. A record may
be in a step once: twice is twice the sensitivity. Nothing is said here of amplification by sampling.

The loss that is clipped is a record's token losses over its *padded* length, both normalisers public: dividing by
label tokens would tell their number, which is the record's own. That loss stays here.

All of this holds up to fp32's rounding of the sum, about 1e-6 of it, which is not in the ledger.

What it is not: it protects what is computed from the weights (updates, the trained head's later gradients), not
the activations and gradients at the cut, which have their own clip and noise in the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from splitfl.errors import ConfigError
from splitfl.privacy.ghost import GhostNorms, suits
from splitfl.privacy.noise import NormalSource
from splitfl.privacy.policy import DpSgd
from splitfl.privacy.record_head import add_weighted_gradient, head_weights, run_record_head, squared_norm
from splitfl.split.loss import IGNORE, HeadLoss
from splitfl.split.segment import Segment

Method = Literal["auto", "ghost", "record"]
NOISE_BLOCK = 1 << 20  # numbers drawn at once: a head's noise in float64 would be twice the head


class PrivatePart:
    """Sums clipped per-record gradients of a segment's trainable weights; only the noised sum leaves it.

    ``method``: "ghost" runs the micro-batch at once, forward and two backwards, norms first, where that is known
    to be right; "record" runs one record after another, for any family; "auto" takes "ghost" on an accelerator. On
    a CPU a record of 64 tokens keeps a core busy alone (measured); "ghost" wins there for many shorter ones.
    Until :meth:`finish` nothing is in the weights' ``grad``, so a step that forgets the noise moves nothing.
    """

    def __init__(self, segment: Segment, settings: DpSgd, noise: NormalSource, method: Method = "auto") -> None:
        """Raises ConfigError for a segment that computes in less than fp32: rounding would outdo the clip."""
        check_precision(segment)
        self.segment = segment
        self.settings = settings
        self.noise = noise
        self.weights = [weight for _, weight in segment.named_weights() if weight.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}
        in_base = {id(weight) for weight in segment.base.parameters()}
        self._head = head_weights(segment) if segment.piece.head else []
        self._base = [weight for weight in self.weights if id(weight) in in_base]
        if len(self._base) + len(self._head) != len(self.weights):
            raise ValueError("a part is either end of a model, not both: a tied weight's two gradients clip as one")
        on_cpu = all(weight.device.type == "cpu" for weight in self.weights)
        self.one_by_one = method == "record" or (method == "auto" and on_cpu) or not suits(segment)
        self._ghost = GhostNorms(segment.base) if self._base and not self.one_by_one else None

    def finish(self) -> None:
        """Noise the step's sum and hand it to the weights' ``grad``, beside what another part put there.

        The optimizer then divides by the public number of records in a step. A weight that no token touched
        gets noise like the others. Call it once a step, when all its micro-batches are in.
        """
        for weight in self.weights:
            total = self._sums.pop(weight, None)
            total = torch.zeros_like(weight) if total is None else total.contiguous()
            self._add_noise(total)
            weight.grad = total if weight.grad is None else weight.grad + total

    def discard(self) -> None:
        """Forget the sums of a step that does not count."""
        self._sums.clear()

    def close(self) -> None:
        """Take opacus' hooks and marks off the segment."""
        if self._ghost is not None:
            self._ghost.cleanup()
            self._ghost = None
        self.one_by_one = True

    def _add_noise(self, total: Tensor) -> None:
        for block in torch.split(total.view(-1), NOISE_BLOCK):
            drawn = self.noise.normal((len(block),)).to(block.device)
            block.copy_(block.double() + self.settings.sigma * drawn)

    def _factors(self, squared_norms: Tensor, time: int) -> Tensor:
        """What each record's gradient of its summed loss is multiplied by, (B,): 1 / T, and the clip.

        0 for a gradient that is not finite: to give the step up would tell the server something about that record.
        """
        norms = squared_norms.sqrt() / time
        factors = self.settings.max_grad_norm / norms.clamp_min(self.settings.max_grad_norm) / time
        return torch.where(norms.isfinite(), factors, 0.0).float()

    def _add(self, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], factor: float) -> None:
        """Add one record's gradients, clipped; with a factor of 0 they may be anything, and are left out."""
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None and factor:
                if weight not in self._sums:
                    self._sums[weight] = torch.zeros_like(weight)
                self._sums[weight].add_(gradient, alpha=factor)

    @contextmanager
    def _summing(self) -> Iterator[None]:
        """Backward passes inside accumulate in the sums and leave ``grad`` alone."""
        others = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = self._sums.get(weight)
        try:
            yield
        finally:
            for weight, other in zip(self.weights, others, strict=True):
                if weight.grad is not None:
                    self._sums[weight] = weight.grad
                weight.grad = other


class PrivateTop(PrivatePart):
    """The top: blocks, norm, head and loss."""

    def backward(self, hidden: Tensor, lengths: Tensor | None, labels: Tensor) -> tuple[HeadLoss, Tensor]:
        """One micro-batch: hidden states (B, T, D) at the trunk's output, true lengths (B,), shifted labels (B, T).

        Returns the summed loss and its gradient at ``hidden`` (B, T, D), *not* clipped: that is the gate's to do.
        """
        with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=False):
            run = self._record_by_record if self.one_by_one else self._whole_batch
            total, gradient = run(hidden.detach(), lengths, labels)
        return HeadLoss(total, int((labels != IGNORE).sum())), gradient

    def _whole_batch(self, hidden: Tensor, lengths: Tensor | None, labels: Tensor) -> tuple[float, Tensor]:
        """Norms of all records first, then one backward with each record's loss times its factor."""
        hidden.requires_grad_()
        with batch_norms(self._ghost, len(hidden)):
            final = self.segment(hidden, lengths)
            losses, at_final, squared = self._run_heads(final, labels)
            (gradient,) = torch.autograd.grad(final, [hidden], at_final, retain_graph=bool(self._base))
            if self._ghost is not None:
                squared += self._ghost.squared_norms()
        factors = self._factors(squared, labels.shape[1])
        if not bool(factors.all()):  # zero times infinity is no number, so these go one by one
            return self._record_by_record(hidden.detach(), lengths, labels)
        with self._summing():
            if self._base:
                torch.autograd.backward(final, at_final * factors[:, None, None], inputs=self._base)
            if self._head:
                add_weighted_gradient(self.segment, final, labels, factors, self._head)
        return losses, gradient

    def _run_heads(self, final: Tensor, labels: Tensor) -> tuple[float, Tensor, Tensor]:
        """Summed loss, its gradient at ``final`` (B, T, D), and squared norms over the head's weights (B,)."""
        loss, gradient, squared = 0.0, torch.empty_like(final, requires_grad=False), []
        for record in range(len(labels)):
            head = run_record_head(self.segment, final[record], labels[record], self._head)
            loss, gradient[record] = loss + head.loss, head.gradient
            squared.append(squared_norm(head.weights, final.device))
        return loss, gradient, torch.stack(squared)

    def _record_by_record(self, hidden: Tensor, lengths: Tensor | None, labels: Tensor) -> tuple[float, Tensor]:
        """Forward and one backward for each record alone."""
        total, gradient = 0.0, torch.empty_like(hidden)
        for record, (row, length) in enumerate(records(hidden, lengths)):
            row.requires_grad_()
            final = self.segment(row, length)
            head = run_record_head(self.segment, final[0], labels[record], self._head)
            at_row, *of_base = torch.autograd.grad(final, [row, *self._base], head.gradient[None], allow_unused=True)
            of_all = [*head.weights, *of_base]
            factor = self._factors(squared_norm(of_all, row.device), labels.shape[1])
            self._add([*self._head, *self._base], of_all, float(factor))
            total, gradient[record] = total + head.loss, at_row[0]
        return total, gradient


class PrivateBottom(PrivatePart):
    """The bottom: embedding and first blocks.

    Its forward for the release runs without a graph, as for a frozen bottom; :meth:`backward` runs it again. So
    any number of micro-batches may wait for the trunk, and opacus' hooks see one after another.
    """

    def backward(self, input_ids: Tensor, lengths: Tensor | None, gradient: Tensor) -> None:
        """One micro-batch: token ids (B, T), true lengths (B,), and the gradient that the trunk returned (B, T, D).

        ``gradient`` is of the records' summed losses, as it crosses the wire. Weights must be those of the forward
        that was released.
        """
        if not self.weights:
            return
        with torch.enable_grad(), torch.autocast(input_ids.device.type, enabled=False):
            run = self._record_by_record if self.one_by_one else self._whole_batch
            run(input_ids, lengths, gradient)

    def _whole_batch(self, input_ids: Tensor, lengths: Tensor | None, gradient: Tensor) -> None:
        norms = self._ghost
        assert norms is not None
        with norms.one_batch(len(input_ids)):
            rows = self.segment.embed(input_ids)
            lowest = embedding_weights(self.segment) or [rows.requires_grad_()]
            hidden = self.segment(rows, lengths)
            torch.autograd.grad(hidden, lowest, gradient, retain_graph=True)  # passes every hook, fills no grad
            squared = norms.squared_norms()
        factors = self._factors(squared, input_ids.shape[1])
        if not bool(factors.all()):
            self._record_by_record(input_ids, lengths, gradient)
            return
        with self._summing():
            torch.autograd.backward(hidden, gradient * factors[:, None, None], inputs=self._base)

    def _record_by_record(self, input_ids: Tensor, lengths: Tensor | None, gradient: Tensor) -> None:
        for record, (row, length) in enumerate(records(input_ids, lengths)):
            hidden = self.segment(self.segment.embed(row), length)
            of_base = torch.autograd.grad(hidden, self._base, gradient[record : record + 1], allow_unused=True)
            factor = self._factors(squared_norm(of_base, row.device), input_ids.shape[1])
            self._add(self._base, of_base, float(factor))


def check_precision(segment: Segment) -> None:
    """Raise ConfigError unless all weights but the embedding table are fp32; trained ones always are."""
    table = id(segment.embedding.weight) if segment.piece.embedding else None
    for name, weight in segment.named_weights():
        if weight.dtype != torch.float32 and id(weight) != table:
            raise ConfigError(
                f"DP-SGD computes in fp32, but {name} is {str(weight.dtype).removeprefix('torch.')}",
                'Set compute = "fp32".',
            )


def embedding_weights(segment: Segment) -> list[Tensor]:
    """What trains in the tables where tokens and positions are looked up."""
    tables = [module for module in segment.base.children() if isinstance(module, nn.Embedding)]
    return [table.weight for table in tables if table.weight.requires_grad]


def batch_norms(ghost: GhostNorms | None, records: int) -> AbstractContextManager[None]:
    """One batch through the hooks, where there are any."""
    return ghost.one_batch(records) if ghost is not None else nullcontext()


def records(rows: Tensor, lengths: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Each record of (B, ...) and (B,) as a batch of one."""
    for record in range(len(rows)):
        one = slice(record, record + 1)
        yield rows[one].detach(), None if lengths is None else lengths[one]
