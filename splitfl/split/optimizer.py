"""One holder's optimizer over one part (bottom, trunk or top), with its moments under the weights' names.

Gradients arrive summed over label tokens; the part divides each weight's by the label tokens that crossed its
block, clips by its own norm, and steps. A weight that no token crossed gets no gradient at all: Adam would move
it on a zero one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

GradientTerm = Callable[[str, Tensor], Tensor | None]  # name and value of a weight -> what its gradient gains


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW (Loshchilov and Hutter 2019) or SGD; ``max_grad_norm`` 0 means no clipping."""

    name: Literal["adamw", "sgd"]
    weight_decay: float
    betas: tuple[float, float]
    max_grad_norm: float


class PartOptimizer:
    """Optimizer of the trainable weights ``named`` (global name -> parameter); frozen parts have no state."""

    def __init__(self, named: Mapping[str, nn.Parameter], spec: OptimizerSpec) -> None:
        self.named = dict(named)
        self.spec = spec
        self._optimizer = build(list(self.named.values()), spec) if self.named else None

    def step(
        self, learning_rate: float, tokens_of: Callable[[str], int], correction: GradientTerm | None = None
    ) -> float:
        """Apply the accumulated gradients and clear them; returns their norm before clipping.

        ``tokens_of`` gives the label tokens that crossed the block of a weight, ``correction`` what is added to its
        gradient once that is divided and clipped. When the norm is not finite, nothing moves and the norm says so.
        """
        if self._optimizer is None:
            return 0.0
        counts = {name: tokens_of(name) for name in self.named}
        for name, parameter in self.named.items():
            if counts[name] == 0:
                parameter.grad = None
        norm = self._fold(set(counts.values()) - {0}, counts, fused=self.spec.name == "adamw" and correction is None)
        if correction is not None:
            self._add(correction)
        if math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self.clear()
        return norm

    def _fold(self, divisors: set[int], counts: Mapping[str, int], *, fused: bool) -> float:
        """Divide by tokens and clip; returns the norm before clipping.

        When every block saw the same tokens, ``fused`` AdamW does both as it reads the gradients: a pass over memory
        less.
        """
        assert self._optimizer is not None
        if fused and len(divisors) == 1:
            (tokens,) = divisors
            norm = self._norm() / tokens
            place = next(iter(self.named.values())).device
            self._optimizer.grad_scale = torch.tensor(tokens / self._clip_factor(norm), device=place)  # type: ignore[attr-defined]
            self._optimizer.found_inf = torch.zeros((), device=place)  # type: ignore[attr-defined]
            return norm
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                parameter.grad.div_(counts[name])
        norm = self._norm()
        factor = self._clip_factor(norm)
        for parameter in self.named.values():
            if parameter.grad is not None and factor < 1.0:
                parameter.grad.mul_(factor)
        self._optimizer.grad_scale = self._optimizer.found_inf = None  # type: ignore[attr-defined]
        return norm

    def _add(self, correction: GradientTerm) -> None:
        for name, parameter in self.named.items():
            if parameter.grad is not None and (term := correction(name, parameter.detach())) is not None:
                parameter.grad.add_(term)

    def _norm(self) -> float:
        """Of all gradients together. By products with themselves: a third of the time of torch's own norms on a CPU."""
        flat = [parameter.grad.flatten() for parameter in self.named.values() if parameter.grad is not None]
        squares = [torch.dot(gradient, gradient) for gradient in flat]
        return float(torch.stack(squares).double().sum().sqrt()) if squares else 0.0

    def _clip_factor(self, norm: float) -> float:
        """What a gradient of this norm is multiplied by, as ``torch.nn.utils.clip_grad_norm_`` has it."""
        limit = self.spec.max_grad_norm
        return min(1.0, limit / (norm + 1e-6)) if limit and math.isfinite(norm) else 1.0

    def clear(self) -> None:
        """Drop accumulated gradients."""
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts as ``name/moment`` -> tensor, for a checkpoint: the optimizer's own, no copies, so
        they are to be written before the next step."""
        state: dict[Any, dict[str, Any]] = self._optimizer.state if self._optimizer is not None else {}
        return {
            f"{name}/{key}": value.detach()
            for name, parameter in self.named.items()
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put moments back; a weight without any starts from zero."""
        if self._optimizer is None:
            return
        self._optimizer.state.clear()
        for key, value in tensors.items():
            name, _, moment = key.rpartition("/")
            if name in self.named:
                parameter = self.named[name]
                # fused AdamW keeps even its step count beside the weight
                self._optimizer.state[parameter][moment] = value.to(parameter.device).clone()


def build(parameters: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The torch optimizer; the step size is set before each step."""
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=0.0, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, lr=0.0, betas=spec.betas, weight_decay=spec.weight_decay, fused=True)
