"""A small model, real English in tokens, and releases of some of it as a run would have sent them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from helpers import MemorySource, tiny_model
from torch import Tensor

from splitfl.cut import Cut
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel, shifted
from splitfl.lab.audit.observed import Observed
from splitfl.lab.audit.public import Knowledge

VOCAB, TIME = 400, 24


@dataclass(frozen=True)
class Text:
    """Records of token ids: a few that are attacked, public ones, and those that a base model was trained on.

    The last two are apart: a prior that has seen the text it is weighed on seems better than it is.
    """

    private: list[Tensor]
    public: list[Tensor]
    base: list[Tensor]


@dataclass(frozen=True)
class Bench:
    """A model with texts; makes what a run would have released."""

    text: Text
    family: str = "llama"
    layers: int = 3

    def model(self, cut: Cut) -> PublicModel:
        config = {"layers": self.layers, "vocab": VOCAB}
        return PublicModel(MemorySource.of(tiny_model(self.family, **config)), cut)

    def knowledge(self, cut: Cut, mechanism: Mechanism) -> Knowledge:
        return Knowledge(self.model(cut), mechanism, self.text.public, TIME)

    def observed(
        self,
        model: PublicModel,
        mechanism: Mechanism,
        *,
        releases: int = 1,
        gradients: Mechanism | None = None,
        seed: int = 5,
    ) -> list[Observed]:
        """Every private record, padded to TIME."""
        generator = torch.Generator().manual_seed(seed)
        return [observe(model, ids, mechanism, releases, gradients, generator) for ids in self.text.private]


def observe(
    model: PublicModel,
    ids: Tensor,
    mechanism: Mechanism,
    releases: int,
    gradients: Mechanism | None,
    generator: torch.Generator,
) -> Observed:
    padded = torch.nn.functional.pad(ids, (0, TIME - len(ids)))
    hidden = model.hidden(padded[None])
    sent = [mechanism.apply(hidden, generator) for _ in range(releases)]
    if gradients is None:
        return Observed(padded, len(ids), tuple(item[0] for item in sent))
    with torch.no_grad():
        returned = model.trunk(sent[0])
    exact = model.top_gradient(returned, shifted(padded[None], torch.tensor([len(ids)])))
    released = gradients.apply(exact, generator)
    return Observed(padded, len(ids), tuple(item[0] for item in sent), (released[0],), (returned[0],))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def share(guesses: Tensor, observed: list[Observed], first: int = 0) -> float:
    """Recovered share of the real tokens from position ``first`` on."""
    pairs = [(guess[first : record.length], record.token_ids[first : record.length])
             for guess, record in zip(guesses, observed, strict=True)]  # fmt: skip
    return sum(int((a == b).sum()) for a, b in pairs) / sum(len(b) for _, b in pairs)
