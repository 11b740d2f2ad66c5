"""What a strategy adds to a client's gradients, so that clients that differ do not drift apart within a round.

It is added to the gradient of each shared weight after division by tokens and clipping, just before the step. A
correction remembers its tensors in ``kept`` under ``NAME/what``, which goes into the client's snapshots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Correction(ABC):
    """A term per weight. Weights that it was not given at the round's beginning stay uncorrected."""

    sent_name: str | None = None  # which of the strategy's tensors comes down beside the merged weights

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    @abstractmethod
    def begin(self, start: Tensors, sent: Tensors) -> None:
        """A round begins at the shared weights ``start``; ``sent`` came beside them, as ``NAME/sent_name``."""

    @abstractmethod
    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        """What is added to the gradient of ``weight``; None = nothing."""

    @abstractmethod
    def end(self, weights: Tensors, step_sizes: float) -> None:
        """The round's local steps have led to ``weights``; their step sizes add up to ``step_sizes``."""

    def of(self, what: str) -> dict[str, Tensor]:
        """The kept tensors ``NAME/what``, with these names."""
        return {name: tensor for name, tensor in self.kept.items() if name.endswith(f"/{what}")}


class Proximal(Correction):
    """mu (y - x): the gradient of (mu / 2) |y - x|^2, x the weights at the round's start (Li et al. 2020)."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self.mu = mu

    def begin(self, start: Tensors, sent: Tensors) -> None:  # noqa: ARG002
        self.kept = {f"{name}/start": tensor for name, tensor in start.items()}

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:
        start = self.kept.get(f"{name}/start")
        return None if start is None else self.mu * (weight - start)

    def end(self, weights: Tensors, step_sizes: float) -> None:  # noqa: ARG002
        self.kept = {}


class ControlVariates(Correction):
    """c - c_i (Karimireddy et al. 2020, algorithm 1). After the round, by option II,

        c_i+ = c_i - c + (x - y_i) / K

    with x the weights at the round's start, y_i at its end, K the sum of its step sizes. c_i starts at zero and never
    leaves: the server computes its change from y_i.
    """

    sent_name = "control"

    def begin(self, start: Tensors, sent: Tensors) -> None:
        nothing = {f"{name}/own": torch.zeros_like(tensor) for name, tensor in start.items()}
        control = {f"{name}/control": torch.zeros_like(tensor) for name, tensor in start.items()}
        control |= {name: tensor for name, tensor in sent.items() if name in control}
        self.kept = nothing | self.of("own") | control | {f"{name}/start": tensor for name, tensor in start.items()}

    def __call__(self, name: str, weight: Tensor) -> Tensor | None:  # noqa: ARG002
        control = self.kept.get(f"{name}/control")
        return None if control is None else control - self.kept[f"{name}/own"]

    def end(self, weights: Tensors, step_sizes: float) -> None:
        def moved(name: str, weight: Tensor) -> Tensor:
            own, control, start = (self.kept[f"{name}/{what}"] for what in ("own", "control", "start"))
            return own - control + (start - weight) / step_sizes

        self.kept = self.of("own") | {f"{name}/own": moved(name, weight) for name, weight in weights.items()}
