"""The families' own arithmetic in fewer passes over memory, for torch on CPUs.

Beside its matrix products a block spends a CPU's time on moving numbers: torch runs a norm as six operations and its
backward as ten, a rotary embedding as five and seven, each over a fresh tensor. Here each is one. Attention over few
tokens runs in fp32 under bf16 autocast too: torch's backward for bf16 takes longer there, and fp32 is more exact.

Nothing here belongs to a family. A class is exchanged only where ours gives what its own code gives on a probe, to
the last bit (oracle O1 holds that on whole models); all others stay as they are, and so does everything on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from splitfl.split.chunks import FEW_TOKENS

Rotate = Callable[..., tuple[Tensor, Tensor]]

ROTATE = "apply_rotary_pos_emb"  # what the families' files call it
ATTENTION = "splitfl_sdpa"  # our attention's name with transformers
PROBE_WIDTH = 16


def lighten(model: PreTrainedModel) -> None:
    """Exchange what computes the same here, in place; weights and names stay."""
    for module in model.modules():
        module.__class__ = lighter(cast(Hashable, type(module)))
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.config._attn_implementation = ATTENTION


@cache
def lighter(kind: Any) -> Any:
    """The class that does the same as ``kind`` in fewer passes; ``kind`` itself where there is none."""
    if "RMSNorm" in kind.__name__ and not issubclass(kind, LighterNorm):
        candidate = type(kind.__name__, (LighterNorm, kind), {"__module__": __name__})
        return candidate if same_norm(kind, candidate) else kind
    forward = kind.forward
    if isinstance(forward, FunctionType) and ROTATE in forward.__code__.co_names:
        rotate = forward.__globals__[ROTATE]
        if not same_rotation(rotate):
            return kind
        return type(kind.__name__, (kind,), {"__module__": __name__, "forward": rotating(forward, rotate)})
    return kind


# -- root mean square norm -----------------------------------------------------------------------------------------


class RmsNorm(torch.autograd.Function):
    """``weight * x / sqrt(mean(x^2) + eps)`` (Zhang and Sennrich 2019) over the last dimension, and its gradients.

    With ``d`` the gradient at the output, ``r`` the inverse root and ``H`` the width: ``d weight`` is the sum of
    ``r d x`` over rows, and ``d x = r w d - x r^3 sum(w d x) / H``, so ``d x`` (elementwise) is computed once for both.
    """

    generate_vmap_rule = True  # opacus takes gradients of single records through it

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = inverse_root(x, eps)
        return (x * inverse).mul_(weight), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, d: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient: the root depends on x, too
            inverse = inverse_root(x, ctx.eps)
        of_x, of_weight, _ = ctx.needs_input_grad
        product, roots = (d * x).flatten(0, -2), inverse.flatten()  # (N, H), (N,)
        d_weight = torch.mv(product.mT, roots) if of_weight else None
        d_x = None
        if of_x:
            along = torch.mv(product, weight) * roots**3 / -x.shape[-1]  # autocast would have matmul round to bf16
            d_x = (d * weight).mul_(inverse).addcmul_(x, along.view_as(inverse))
        return d_x, d_weight, None


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` over the last dimension, (..., H) -> (..., 1), as the families have it."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class LighterNorm(nn.Module):
    """Goes before a family's own norm: fp32 on a CPU takes the short way, all else the family's."""

    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> the same shape."""
        if hidden_states.device.type == "cpu" and hidden_states.dtype is self.weight.dtype is torch.float32:
            return cast(Tensor, RmsNorm.apply(hidden_states, self.weight, epsilon_of(self))[0])  # type: ignore[no-untyped-call]
        return cast(Tensor, super().forward(hidden_states))


def epsilon_of(norm: nn.Module) -> float:
    """What a norm adds below its root, by the names that the families have for it."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def same_norm(kind: type[nn.Module], candidate: type[nn.Module]) -> bool:
    """Whether norms of both classes give the same bits."""
    drawn = torch.Generator().manual_seed(0)
    with torch.device("cpu"), torch.no_grad():
        x, weight = torch.randn(3, 5, PROBE_WIDTH, generator=drawn), torch.randn(PROBE_WIDTH, generator=drawn)
        answers = []
        for norm_class in (kind, candidate):
            try:
                norm = norm_class(PROBE_WIDTH).float()
                norm.weight.copy_(weight)  # type: ignore[operator]
                answers.append(norm(x))
            except (AttributeError, RuntimeError, TypeError):
                return False  # built otherwise, or without a weight: no norm that we know
    return torch.equal(*answers)


# -- rotary embedding ----------------------------------------------------------------------------------------------


class Rotation(torch.autograd.Function):
    """``x * cos + (-x2, x1) * sin`` for the halves x1, x2 of the last dimension (Su et al. 2021, as Llama has it)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return turned(x, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(d, cos, swapped(sin).neg()), None, None  # the transpose of a rotation


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of numbers, one from either half of the last dimension, turned."""
    half = x.shape[-1] // 2
    result = x * cos
    result[..., :half].sub_(x[..., half:] * sin[..., :half])
    result[..., half:].add_(x[..., :half] * sin[..., half:])
    return result


def swapped(x: Tensor) -> Tensor:
    """The halves of the last dimension, exchanged."""
    return x.roll(x.shape[-1] // 2, -1)


def rotating(forward: FunctionType, rotate: Rotate) -> FunctionType:
    """``forward`` of an attention that turns queries and keys by ours: the same code, in which that name is ours."""

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        if rest or more or q.device.type != "cpu" or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:
            return rotate(q, k, cos, sin, *rest, **more)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, D), for all heads
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)  # type: ignore[no-untyped-call]

    names = forward.__globals__ | {ROTATE: rotated}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


@cache
def same_rotation(rotate: Rotate) -> bool:
    """Whether a family's function turns queries and keys as :class:`Rotation` does, to bits and dtypes."""
    drawn = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(2, *shape, PROBE_WIDTH, generator=drawn) for shape in ((4, 3), (3,), (3,)))
    for dtype in (torch.float32, torch.bfloat16):
        mine = turned(x.to(dtype), cos.unsqueeze(1), sin.unsqueeze(1))
        try:
            theirs = rotate(x.to(dtype), x.to(dtype), cos, sin)
        except (RuntimeError, TypeError):
            return False
        if not all(each.dtype == mine.dtype and torch.equal(each, mine) for each in theirs):
            return False
    return True


# -- attention -----------------------------------------------------------------------------------------------------


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' ``sdpa`` for heads (B, heads, T, D); few tokens on a CPU are computed in fp32, autocast or not."""
    few = query.device.type == "cpu" and key.shape[-2] <= FEW_TOKENS
    if not (few and torch.is_autocast_enabled("cpu")):
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **options))
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        heads = (query.float(), key.float(), value.float())
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, *heads, attention_mask, **options))


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
