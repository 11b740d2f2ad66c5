"""From [merge] to what is done with one tensor's copies: which average, which strategy, what does not go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from splitfl.config import Federation, Merge
from splitfl.errors import ConfigError
from splitfl.federation.robust import Contribution, Screen, average_of, screen_of
from splitfl.federation.strategies import STRATEGIES, RoundFacts, State, Strategy

#: fields of [merge] that belong to one average, by merge.aggregate
AVERAGE_USES = {"trimmed_mean": ("trim_fraction",), "krum": ("byzantine",)}
ALWAYS_USED = {"strategy", "share", "aggregate", "clip_norm"}


class Merged(NamedTuple):
    """A tensor's next value and what the strategy remembers of it, fp32. ``refused``: those would not have been finite
    in fp32, so these are the ones before the round."""

    tensor: Tensor
    state: State
    refused: bool = False


@dataclass(frozen=True)
class Merger:
    """Merges copies of one tensor at a time, in a round of which ``facts`` are known."""

    strategy: Strategy
    facts: RoundFacts

    @property
    def screens(self) -> bool:
        """Whether whole updates are looked at before any of them is merged."""
        return self.strategy.settings.aggregate == "krum" or self.strategy.settings.clip_norm > 0

    def screen(self, products: Tensor) -> Screen:
        """What becomes of updates with these inner products."""
        return screen_of(self.strategy.settings, products)

    def __call__(self, name: str, previous: Tensor, parts: Sequence[Contribution], state: State) -> Merged:
        """Merge the copies of the tensor ``name``. With no copy that a token trained all stays as it was.

        Raises ConfigError when the strategy returns something else than it should.
        """
        trained = [part for part in parts if part.tokens]
        if not trained:
            return Merged(previous, state)
        wide = {what: tensor.double() for what, tensor in state.items()}
        counted = [replace(part, tokens=1) for part in trained] if self.strategy.weighs == "clients" else trained
        average = average_of(self.strategy.settings)(counted)
        merged, kept = self.strategy.merge(previous.double(), average, wide, self.facts)
        self._check_returned(name, previous, {"the weights": merged, **kept})
        found = Merged(merged.float(), {what: tensor.float() for what, tensor in kept.items()})
        finite = all(torch.isfinite(tensor).all() for tensor in (found.tensor, *found.state.values()))
        return found if finite else Merged(previous, state, refused=True)

    def _check_returned(self, name: str, previous: Tensor, returned: State) -> None:
        found = {what: tuple(tensor.shape) for what, tensor in returned.items()}
        wanted = dict.fromkeys(("the weights", *self.strategy.state_names), tuple(previous.shape))
        for what in sorted(found.keys() | wanted.keys()):
            if found.get(what) != wanted.get(what):
                raise ConfigError(
                    f'merge.strategy = "{self.strategy.settings.strategy}" returned for {name!r}: {what!r} '
                    f"{found.get(what, 'missing')}, expected {wanted.get(what, 'none')}",
                    "Mend its merge(): weights of the tensor's shape, and as much of each of its state_names.",
                )


def choose_strategy(settings: Federation) -> Strategy:
    """The federation's strategy. Raises ConfigError for one that does not exist, and for settings that it, or the
    chosen average, would leave unread or cannot keep its word with."""
    merge = settings.merge
    if merge.strategy not in STRATEGIES:
        raise ConfigError(
            f"merge.strategy = {merge.strategy!r} does not exist", f"Choose one of {', '.join(STRATEGIES)}."
        )
    strategy = STRATEGIES[merge.strategy](merge)
    used = ALWAYS_USED.union(strategy.uses, AVERAGE_USES.get(merge.aggregate, ()))
    for name, field in Merge.model_fields.items():
        if name not in used and getattr(merge, name) != field.default:
            raise ConfigError(
                f"merge.{name} is set, but {merge.strategy} with the {merge.aggregate} of the copies does not use it",
                f"Leave it out; these use {', '.join(sorted(used - ALWAYS_USED)) or 'no parameter'}.",
            )
    check_shares(merge)
    strategy.check(settings)
    check_robust(settings)
    check_krum(merge, settings.rounds.min_clients)
    return strategy


def check_shares(merge: Merge) -> None:
    """Raise ConfigError for a way of merging where nothing is merged."""
    plain = merge.strategy == "fedavg" and merge.aggregate == "mean" and not merge.clip_norm
    if merge.share == "none" and not plain:
        raise ConfigError(
            f'merge.share = "none" merges nothing, so {merge.strategy} with the {merge.aggregate} has nothing to do',
            'Leave them out, or set merge.share = "top" or "ends".',
        )


def check_robust(settings: Federation) -> None:
    """Raise ConfigError where an average other than the mean could not keep its bound."""
    aggregate = settings.merge.aggregate
    if aggregate == "mean":
        return
    if settings.rounds.staleness != "drop":
        raise ConfigError(
            f'merge.aggregate = "{aggregate}" with late updates: it counts every copy once, and has no discount',
            'Set rounds.staleness = "drop", or leave out merge.aggregate.',
        )
    if len(settings.bottoms) * len(settings.tops) > 1:  # of a block that one client holds alone there are two copies
        raise ConfigError(
            f'merge.aggregate = "{aggregate}" where clients may differ in their cuts: a client with a cut of its own '
            "decides over its blocks alone",
            "Leave out model.min_* and model.max_*, or leave out merge.aggregate and set merge.clip_norm.",
        )


def check_krum(merge: Merge, min_clients: int) -> None:
    """Raise ConfigError where Krum could not tell liars from others."""
    least = 2 * merge.byzantine + 3
    if merge.aggregate == "krum" and min_clients < least:
        raise ConfigError(
            f'merge.aggregate = "krum" with merge.byzantine = {merge.byzantine} needs {least} updates, '
            f"rounds.min_clients is {min_clients}",
            "Raise rounds.min_clients, or lower merge.byzantine.",
        )
