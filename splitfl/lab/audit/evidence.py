"""Evidence about single tokens, and how much each kind of it weighs.

What the networks read, what the gradients say, what a language model expects and how well a state explains what was
observed are log-likelihoods; were they exact and independent they would simply add. They are neither, so each has a
weight, fitted on held-out public text that went through the same mechanism (a log-linear model, Och and Ney 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from splitfl.lab.audit.inverter import Inverter, read
from splitfl.lab.audit.labels import label_scores
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel, shifted
from splitfl.lab.audit.public import Knowledge, Texts

Gradients = Sequence[tuple[Tensor, Tensor]]  # (hidden states, gradient), each (B, T, D)


@dataclass(frozen=True)
class Evidence:
    """Log-likelihoods of every token at every position (B, T, V); ``labels`` only where gradients were released.

    ``linear``: of the released state under the tokens' mean public states, without any prior (up to a constant).
    """

    linear: Tensor
    inverter: Tensor
    labels: Tensor | None = None

    def kinds(self) -> list[Tensor]:
        """What counts in a search beside state and prior."""
        return [self.inverter] if self.labels is None else [self.inverter, self.labels]

    def __getitem__(self, rows: slice) -> Evidence:
        return Evidence(self.linear[rows], self.inverter[rows], None if self.labels is None else self.labels[rows])


def collect(
    model: PublicModel,
    inverter: Inverter,
    released: Tensor,
    mask: Tensor,
    gradients: Gradients,
    mechanism: Mechanism | None,
) -> Evidence:
    """All per-token evidence of some records. ``mechanism``: of the gradients, None where there are none."""
    labels = None if mechanism is None or not gradients else token_scores(model, mechanism, gradients)
    linear = inverter.linear(released) - inverter.log_prior
    return Evidence(linear, read(inverter, released, mask), labels)


def token_scores(model: PublicModel, mechanism: Mechanism, gradients: Gradients) -> Tensor:
    """What all gradient releases together say about each token, (B, T, V): the label of t is the token at t + 1."""
    total = sum((label_scores(model, mechanism, *release) for release in gradients), torch.zeros(()))
    return torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], dim=1)


def rehearse(
    knowledge: Knowledge,
    texts: Texts,
    mechanism: Mechanism,
    gradient_mechanism: Mechanism | None,
    releases: int,
    generator: torch.Generator,
) -> tuple[Tensor, Gradients]:
    """Public records as the run would have released them: averaged activations, and so many gradient releases.

    ``mechanism`` is that of the averaged activations; the trunk gets the state of a single release.
    """
    model = knowledge.model
    hidden = model.hidden(texts.ids)
    released = mechanism.apply(hidden, generator)
    if gradient_mechanism is None or not releases or knowledge.mechanism.encoder is not None:
        return released, ()
    with torch.no_grad():
        returned = model.trunk(knowledge.mechanism.apply(hidden, generator))
    exact = model.top_gradient(returned, shifted(texts.ids, texts.lengths))
    return released, [(returned, gradient_mechanism.apply(exact, generator)) for _ in range(releases)]


def fit_weights(features: Tensor, answers: Tensor) -> Tensor:
    """Weights (F,) >= 0 that predict answers (P,) best from log-likelihoods (P, C, F) of C candidates each.

    They start at 1; L-BFGS on the mean cross-entropy, which is convex but for the sign.
    """
    size = features.detach().abs().mean(dim=(0, 1)).clamp_min(1.0)  # (F,): brings very sharp evidence within reach
    roots = size.sqrt().requires_grad_(True)
    scaled = features / size
    optimizer = torch.optim.LBFGS([roots], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(scaled @ roots.square(), answers)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weights = (roots.square() / size).detach()
    return weights if torch.isfinite(weights).all() else torch.ones_like(weights)
