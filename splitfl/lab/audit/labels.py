"""Label recovery from the gradient at the trunk's output.

A token's cross-entropy gradient is (softmax - onehot(label)) times the head's Jacobian: its direction names the label
(Li et al. 2022, Label Leakage and Protection in Two-party Split Learning; Zhao, Mopuri and Bilen 2020, iDLG). The
server knows the hidden states it returned, hence the softmax, and compares the gradient it got with what each label of
the vocabulary would have given. Blocks between the trunk and the head are undone first: a gradient is linear in what
came out of the head, so that is a least-squares problem (conjugate gradients), not a search. The label of position t is
the token at t + 1, so this recovers the text. The head is taken to be near the public one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel
from splitfl.lab.audit.observed import pieces
from splitfl.split.loss import IGNORE
from splitfl.split.segment import Segment

GROUP = 2  # records whose Jacobians are held at once
SHORTLIST = 128  # labels at each position, by each of two measures, whose gradient is computed in full
ITERATIONS = 40  # of conjugate gradients
FAINT = 1e-4  # of a record's largest gradient: below it a position had no label


def label_scores(model: PublicModel, mechanism: Mechanism, hidden: Tensor, gradient: Tensor) -> Tensor:
    """Log-likelihood of every label at every position: hidden and gradient (B, T, D) -> (B, T, V).

    Two passes. The first lets each position's scale be free; the labels it finds tell how far the record was clipped,
    and the second uses that. The noise is taken to be at least what the best labels leave unexplained, so that a head
    that has moved away from the public one weakens the evidence instead of falsifying it.
    """
    groups = zip(pieces(hidden.float(), GROUP), pieces(gradient.float(), GROUP), strict=True)
    return torch.cat([scores_of_few(model, mechanism, *group) for group in groups])


def scores_of_few(model: PublicModel, mechanism: Mechanism, hidden: Tensor, gradient: Tensor) -> Tensor:
    """:func:`label_scores` of records whose Jacobians fit in memory together."""
    local, final = without_blocks(model, mechanism, hidden, gradient)
    candidates = HeadGradients(model.head, final)
    first = candidates.scores(local, None, mechanism.sigma)
    faint = gradient.norm(dim=-1) <= FAINT * gradient.norm(dim=-1).amax(-1, keepdim=True)  # (B, T)
    labels = first.argmax(-1).masked_fill(faint, IGNORE)
    scale = mechanism.scale(model.top_gradient(hidden, labels)).expand_as(gradient[..., :1])
    scores = candidates.scores(local, scale, mechanism.sigma)
    return scores.masked_fill(faint[..., None], 0.0).log_softmax(-1)


def without_blocks(model: PublicModel, mechanism: Mechanism, hidden: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient at the input of the final norm, and the states there; both (B, T, D)."""
    if model.cut.n_top == 0:
        return gradient, hidden
    with torch.no_grad():
        final = model.top_blocks(hidden)
    per_token = gradient.square().mean(dim=(-2, -1), keepdim=True)
    signal = (per_token - mechanism.sigma**2).clamp_min(1e-3 * per_token)
    return undo(model.top_blocks, hidden, gradient, mechanism.sigma**2 / signal), final


def undo(blocks: Segment, hidden: Tensor, gradient: Tensor, ridge: Tensor) -> Tensor:
    """Solve min |Jt x - gradient|^2 + ridge |x|^2 for x (B, T, D), record by record; J: Jacobian of ``blocks``.

    Conjugate gradients on the normal equations (Hestenes and Stiefel 1952, section 10).
    """
    inputs = hidden.detach().requires_grad_(True)
    probe = torch.zeros_like(hidden, requires_grad=True)
    (pulled,) = torch.autograd.grad(blocks(inputs), inputs, probe, create_graph=True)  # Jt probe, linear in probe

    def backward(x: Tensor) -> Tensor:  # Jt x
        return torch.autograd.grad(blocks(inputs), inputs, x)[0]

    def forward(u: Tensor) -> Tensor:  # J u, as the gradient of <Jt probe, u>
        return torch.autograd.grad(pulled, probe, u, retain_graph=True)[0]

    solution = torch.zeros_like(gradient)
    rest = forward(gradient)
    direction, size = rest, dot(rest, rest)
    for _ in range(ITERATIONS):
        applied = forward(backward(direction)) + ridge * direction
        step = size / dot(direction, applied).clamp_min(1e-30)
        solution = solution + step * direction
        rest = rest - step * applied
        previous, size = size, dot(rest, rest)
        direction = rest + size / previous.clamp_min(1e-30) * direction
    return solution


def dot(first: Tensor, second: Tensor) -> Tensor:
    """Inner product of each record, (B, 1, 1)."""
    return (first * second).sum(dim=(-2, -1), keepdim=True)


class HeadGradients:
    """What each label would give as gradient at the input of the final norm, for states (B, T, D)."""

    def __init__(self, head: Segment, final: Tensor) -> None:
        self.shape = final.shape
        self.rows = head_rows(head, final.shape[-1])  # (V, D)
        with torch.no_grad():
            softmax = head.logits(head(final).flatten(0, 1)).float().softmax(-1)  # (P, V), P = B T
        self.norms = norm_jacobians(head, final)  # (P, D, D)
        self.mean = torch.einsum("pi,pij->pj", softmax @ self.rows, self.norms)  # (P, D): without the label's part

    def scores(self, gradient: Tensor, scale: Tensor | None, sigma: float) -> Tensor:
        """Log-likelihood (B, T, V) of labels; ``scale`` (B, T, 1) is the clip's factor, None leaves it free."""
        flat = gradient.flatten(0, 1)  # (P, D)
        misfit = self._misfit(flat, None if scale is None else scale.flatten(0, 1))  # (P, V)
        unexplained = misfit.amin(-1).mean() / flat.shape[-1]
        variance = max(sigma**2, float(unexplained), 1e-10 * float(flat.square().mean()))
        return (-misfit / (2 * variance)).view(*self.shape[:2], -1)

    def _misfit(self, gradient: Tensor, scale: Tensor | None) -> Tensor:
        """Squared distances between gradients (P, D) and what each label would have given, (P, V).

        A label's gradient is mean - rows[label] @ norm. Its length, V D D operations a position, is computed for a
        shortlist alone; for the others it is estimated, and none of them may beat the shortlist by that.
        """
        along = self._along(gradient)
        misfit = distance(gradient, along, self._sizes_estimated(), scale)
        count = min(SHORTLIST, len(self.rows))
        near = torch.cat([misfit.topk(count, largest=False).indices, along.topk(count).indices], dim=1)  # (P, C)
        exact = distance(gradient, along.gather(1, near), self._sizes(near), scale)
        return misfit.maximum(exact.amax(-1, keepdim=True)).scatter(1, near, exact)

    def _along(self, gradient: Tensor) -> Tensor:
        """Inner products of gradients (P, D) with each label's, (P, V)."""
        through = torch.einsum("pij,pj->pi", self.norms, gradient)
        return (gradient * self.mean).sum(-1, keepdim=True) - through @ self.rows.T

    def _sizes(self, labels: Tensor) -> Tensor:
        """Squared lengths of the gradients of labels (P, C)."""
        slopes = self.rows[labels] @ self.norms  # (P, C, D)
        return (self.mean[:, None] - slopes).square().sum(-1)

    def _sizes_estimated(self) -> Tensor:
        """The same for every label (P, V), as if norms differed between positions by a factor alone."""
        products = self.norms @ self.norms.mT  # (P, D, D)
        common = products.mean(0)
        factor = torch.diagonal(products, dim1=1, dim2=2).sum(-1, keepdim=True) / common.trace()  # (P, 1)
        own = (self.rows @ common * self.rows).sum(-1)  # (V,)
        return self._along(self.mean) * 2 - self.mean.square().sum(-1, keepdim=True) + factor * own


def distance(gradient: Tensor, along: Tensor, sizes: Tensor, scale: Tensor | None) -> Tensor:
    """|gradient - scale candidate|^2 from inner products and squared lengths (P, C), for the best scale where None."""
    total = gradient.square().sum(-1, keepdim=True)
    if scale is None:
        return (total - along.clamp_min(0.0).square() / sizes.clamp_min(1e-20)).clamp_min(0.0)
    return (total - 2 * scale * along + scale.square() * sizes).clamp_min(0.0)


def head_rows(head: Segment, width: int) -> Tensor:
    """The head as one matrix (V, D), logit scaling included: its answers to unit vectors."""
    with torch.no_grad():
        answers = head.logits(torch.cat([torch.eye(width), torch.zeros(1, width)])).float()
    return (answers[:-1] - answers[-1]).T.contiguous()


def norm_jacobians(head: Segment, final: Tensor) -> Tensor:
    """Jacobians of the final norm at states (B, T, D): (B T, D, D), [out, in]. It acts on each token alone."""
    states = final.detach().requires_grad_(True)
    normed = head(states)
    rows = [torch.autograd.grad(normed[..., i].sum(), states, retain_graph=True)[0] for i in range(states.shape[-1])]
    return torch.stack(rows, dim=-2).flatten(0, 1)
