"""Per-record gradient norms of a whole micro-batch in one backward pass, through opacus' hooks.

Ghost clipping (Li et al., ICLR 2022; Bu et al. 2022 for when it pays) needs no per-record gradient: for a linear
layer with inputs a (T, I) and gradients g (T, O) at its outputs, the norm of its weight's gradient is
``sum((g g^T) * (a a^T))``, two T x T tables. opacus keeps the hooks and its embedding norm; what differs from it:

* Tables in float64: in fp32 the terms of a record whose gradient nearly cancels drown in rounding, its norm
  comes out too small, and the clip would let more through than the ledger charges.
* Conv1D (GPT-2), embeddings with a scale (Gemma) and a ``padding_idx``, whose row gets no gradient from autograd.
* One batch at a time, or it raises: opacus keeps inputs on a stack, and two batches under way take each other's.

It attaches to a module without wrapping it, so no weight changes its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from opacus.grad_sample.embedding_norm_sample import compute_embedding_norm_sample
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from splitfl.split.families import FAMILIES
from splitfl.split.segment import Segment

Norms = dict[Tensor, Tensor]  # weight -> its gradient's norm for each record, (B,)


def suits(segment: Segment) -> bool:
    """Whether ghost norms are known to be right for all that trains in the segment's base model.

    Only for families that the oracle tests hold: elsewhere a layer may get the tokens of all records as one row.
    """
    trained = [m for m in segment.base.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
    return segment.model.config.model_type in FAMILIES and all(map(is_known, trained))


def is_known(module: nn.Module) -> bool:
    """Layers with a norm below, and norms of one tensor, whose per-record gradients opacus makes."""
    plain = type(module) in (nn.Linear, Conv1D, nn.LayerNorm) or isinstance(module, nn.Embedding)
    return plain or (
        "norm" in type(module).__name__.lower()
        and not list(module.children())
        and all(parameter.ndim == 1 for parameter in module.parameters())
    )


def product_norms(left: Tensor, right: Tensor) -> Tensor:
    """Frobenius norms of ``left^T right`` for each record: (B, T, P) and (B, T, Q) -> (B,), float64.

    By whichever is smaller, two tables of T x T or the product itself (Bu et al. 2022, mixed ghost clipping).
    """
    time, product = left.shape[1], left.shape[2] * right.shape[2]
    if 2 * time * time >= product:
        rows = (left.float().mT @ right.float()).norm(dim=-1)  # (B, P); not all at once: fp32 sums of many drift
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        return norms
    left, right = left.double(), right.double()
    tables = (left @ left.mT) * (right @ right.mT)  # (B, T, T)
    return torch.sqrt(tables.sum((1, 2)).clamp_min(0))


def linear_norms(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> Norms:
    """Inputs (B, T, I) and gradients at the outputs (B, T, O) -> norms for weight and bias; Conv1D the same."""
    norms: Norms = {}
    if layer.weight.requires_grad:
        norms[layer.weight] = product_norms(backprops, activations[0])
    if layer.bias is not None and layer.bias.requires_grad:
        norms[layer.bias] = backprops.float().sum(1).norm(dim=1)
    return norms


def embedding_norms(table: nn.Embedding, ids: Tensor, gradient: Tensor) -> Tensor:
    """Token ids (B, T) and gradients at the rows (B, T, D) -> norms (B,); rows may be scaled by ``embed_scale``."""
    rows = gradient.double() * float(getattr(table, "embed_scale", 1.0))
    if table.padding_idx is not None:
        rows = rows.masked_fill((ids == table.padding_idx)[..., None], 0.0)
    norms: Tensor = compute_embedding_norm_sample(table, [ids.contiguous()], rows)[table.weight]
    return norms


class GhostNorms(GradSampleHooksFastGradientClipping):  # type: ignore[misc]
    """Hooks on ``module`` that turn one backward pass into per-record gradient norms of what trains in it.

    Run forward and that backward inside :meth:`one_batch`, then ask :meth:`squared_norms`. Outside, the hooks sleep.
    """

    NORM_SAMPLERS: ClassVar = {nn.Linear: linear_norms, Conv1D: linear_norms}
    GRAD_SAMPLERS: ClassVar = GradSampleHooksFastGradientClipping.GRAD_SAMPLERS | NORM_SAMPLERS  # no functorch for them

    def __init__(self, module: nn.Module) -> None:
        module.train()  # opacus' hooks look away in eval mode; segments have no dropout
        super().__init__(module, loss_reduction="sum", strict=False)
        self.autograd_grad_sample_hooks += [
            table.register_forward_hook(self._watch_table)
            for table in module.modules()
            if isinstance(table, nn.Embedding) and table.weight.requires_grad
        ]
        self._records = 0
        self.disable_hooks()

    def iterate_submodules(self, module: nn.Module) -> Iterator[nn.Module]:
        """All that opacus hooks; not tables: their inputs need no gradient, of which torch warns at each backward."""
        yield from (m for m in super().iterate_submodules(module) if not isinstance(m, nn.Embedding))

    @contextmanager
    def one_batch(self, records: int) -> Iterator[None]:
        """Forward and backward of one micro-batch of ``records`` records belong inside.

        Raises RuntimeError when another one is under way: it would take its activations.
        """
        if self._records:
            raise RuntimeError("two batches are under way through one GhostNorms: their gradients would be wrong")
        self._records = records
        self.enable_hooks()
        try:
            yield
        finally:
            self.disable_hooks()
            self._forget()
            self._records = 0

    def squared_norms(self) -> Tensor:
        """Squared norm over all trainable weights for each record, (B,), float64, of the backward just run."""
        norms = [parameter._norm_sample.double() for parameter in self.trainable_parameters]
        return torch.stack(norms).square().sum(0)

    def capture_activations_hook(self, module: nn.Module, forward_input: list[Tensor], output: Tensor) -> None:
        """As opacus has it, for layers that see each record's tokens apart. Raises RuntimeError for others."""
        if self.hooks_enabled and (forward_input[0].shape[0] != self._records or forward_input[0].ndim < 2):
            raise RuntimeError(f"{type(module).__name__} got {tuple(forward_input[0].shape)}, not one row a record")
        super().capture_activations_hook(module, forward_input, output)

    def _watch_table(self, table: nn.Embedding, inputs: tuple[Tensor, ...], rows: Tensor) -> None:
        """When the gradient at looked-up rows (B, T, D) comes, keep the norms of the table's."""
        if self.hooks_enabled and rows.requires_grad:
            ids = inputs[0]
            rows.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: setattr(table.weight, "_norm_sample", embedding_norms(table, ids, gradient))
            )

    def _forget(self) -> None:
        """Drop what the batch left, whether or not its backward ran."""
        for module in self._module.modules():
            for name in ("activations", "max_batch_len"):
                vars(module).pop(name, None)
        for parameter in self.trainable_parameters:
            parameter._forward_counter = 0
            parameter.grad_sample = None
            for name in ("_norm_sample", "_current_grad_sample"):
                vars(parameter).pop(name, None)
