"""A merge as the trunk service makes it: clients' updates and its own copies in, a round's state out.

``splitfl.federation.merging`` has the rules; here they meet files, the trunk, and what is remembered from merge to
merge. One tensor of each client is read at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from server_model.store import RoundState, Store
from server_model.trunk import Trunk
from server_model.updates import ClientUpdate, Weights
from splitfl.config import Federation
from splitfl.federation.merging import TOO_FEW, Merged, Merger, choose_strategy
from splitfl.federation.robust import Contribution, inner_products
from splitfl.federation.schedule import round_step_sizes
from splitfl.federation.strategies import RoundFacts, State
from splitfl.split.checkpoint import CheckpointFolder, embedding_name, is_tied


class Aggregator:
    """Merges one round after the other, on the compute thread.

    ``merged`` are the clients' weights after ``round``, -1 before the first; ``remembered`` is the strategy's state,
    NAME/what -> tensor; ``contributors`` have had a part in any merge so far.
    """

    def __init__(self, settings: Federation, source: CheckpointFolder, store: Store, trunk: Trunk) -> None:
        self.settings, self.source, self.store, self.trunk = settings, source, store, trunk
        self.layers: int = source.config.num_hidden_layers
        self.strategy = choose_strategy(settings)
        self.round = -1
        self.merged: dict[str, Tensor] = {}
        self.remembered: dict[str, Tensor] = {}
        self.contributors: set[str] = set()

    def restore(self, state: RoundState) -> None:
        """Go on from a durable round."""
        self.round = state.round
        self.merged, self.remembered = dict(state.merged), dict(state.strategy)
        contributors = state.facts.get("contributors")
        self.contributors = set(contributors) if isinstance(contributors, list) else set()

    def merge(self, round_: int, updates: Sequence[ClientUpdate]) -> tuple[RoundState, dict[str, str]]:
        """Merge tensor by tensor and hand merged blocks to the trunk.

        Returns what is to be made durable, and the tensors that stayed as they were, with the reason.
        """
        merged, remembered = dict(self.merged), dict(self.remembered)
        merger = Merger(self.strategy, self._facts(round_, updates))
        refused: dict[str, str] = {}
        for name, part in merge_updates(updates, merger, self.newest, self._own_copies(), self._state_of):
            merged[name] = part.tensor
            remembered |= {f"{name}/{what}": value for what, value in part.state.items()}
            refused |= {name: part.refused} if part.refused else {}
        self.trunk.load_weights(merged)
        self.round, self.merged, self.remembered = round_, merged, remembered
        counted = [] if TOO_FEW in refused.values() else updates
        self.contributors |= trained(counted)
        return self._state({update.client: update.tokens for update in counted if update.start is None}), refused

    def newest(self, name: str, shape: torch.Size) -> Tensor:
        """A shared tensor's value now. Raises StorageError."""
        return self.at_start_of(self.round + 1, name, shape)

    def at_start_of(self, round_: int, name: str, shape: torch.Size) -> Tensor:
        """A shared tensor's value when ``round_`` began: in a merge, or in the checkpoint; LoRA's B is zero there.

        Raises StorageError.
        """
        newest = self.merged.get(name) if round_ == self.round + 1 else None
        kept = newest if newest is not None or round_ == 0 else self.store.tensor(round_ - 1, name)
        if kept is not None:
            return kept
        stored = name.replace(".base_layer.", ".")
        if stored == f"{self.source.anatomy.head}.weight" and is_tied(self.source.config):
            stored = embedding_name(self.source.anatomy)
        return self.source.read(stored).float() if self.source.has(stored) else torch.zeros(shape)

    def _state(self, updates: Mapping[str, int]) -> RoundState:
        facts = {"updates": updates, "contributors": sorted(self.contributors), "seed": self.settings.seed}
        moments = self.trunk.optimizer.state_tensors()
        return RoundState(self.round, self.trunk.weights(), moments, self.merged, facts, self.remembered)

    def _own_copies(self) -> dict[str, Contribution]:
        """The trunk's copies of what clients may hold as well, as far as it stepped them."""
        through = self.trunk.tokens_through
        weights = self.trunk.weights().items()
        return {name: Contribution(copy, through(name)) for name, copy in weights if self._held(name) and through(name)}

    def _held(self, name: str) -> bool:
        """Whether some allowed cut puts the block of this trunk weight on a client."""
        block = self.trunk.segment.block_of(name)
        assert block is not None
        top = self.layers - self.settings.tops[-1]
        return self.settings.merge.share != "none" and (block >= top or block < self.settings.bottoms[-1])

    def _facts(self, round_: int, updates: Sequence[ClientUpdate]) -> RoundFacts:
        names = trained(updates)
        before, clients = len(self.contributors), len(self.contributors | names)
        return RoundFacts(round_step_sizes(self.settings, round_), len(names), before, clients)

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """What the strategy remembers of a shared tensor."""
        keys = {what: f"{name}/{what}" for what in self.strategy.state_names}
        return {what: self.remembered[key] for what, key in keys.items() if key in self.remembered}


def trained(updates: Iterable[ClientUpdate]) -> set[str]:
    """Whose copies count: a client that missed every step of the round has sent what it was given."""
    return {update.client for update in updates if update.tokens}


@dataclass(frozen=True)
class OpenUpdate:
    """A client's tensors, read one at a time."""

    update: ClientUpdate
    file: Any
    previous: Weights

    def tensor(self, name: str) -> Tensor | None:
        """fp32; None when this client does not hold it. Of a late update its change, on top of the newest weights."""
        if name not in self.file.keys():  # noqa: SIM118 - safe_open is no dict
            return None
        copy: Tensor = self.file.get_tensor(name)
        start = self.update.start
        return copy if start is None else self.previous(name, copy.shape) + (copy - start(name, copy.shape))


def merge_updates(
    updates: Sequence[ClientUpdate],
    merger: Merger,
    previous: Weights,
    own: Mapping[str, Contribution],
    states: Callable[[str], State],
) -> Iterator[tuple[str, Merged]]:
    """Merge tensor by tensor, every name that anybody sent, and every one of ``own``: the server's copies of blocks
    that clients may hold as well."""
    with ExitStack() as stack:
        sent = [
            OpenUpdate(update, stack.enter_context(safe_open(update.path, framework="pt")), previous)
            for update in updates
            if update.path is not None
        ]
        shapes = {name: torch.Size(one.file.get_slice(name).get_shape()) for one in sent for name in one.file.keys()}  # noqa: SIM118
        factors = screened(sent, merger, ((name, previous(name, shape)) for name, shape in shapes.items()))
        all_left_out = bool(factors) and all(factor is None for factor in factors.values())
        for name, shape in sorted((shapes | {name: part.tensor.shape for name, part in own.items()}).items()):
            start = previous(name, shape)
            if all_left_out:
                yield name, Merged(start, states(name), TOO_FEW)
                continue
            parts = list(contributions(sent, name, start, factors))
            if name in own:
                parts.append(own[name])
            yield name, merger(name, start, parts, states(name))


def screened(
    sent: Sequence[OpenUpdate], merger: Merger, before: Iterable[tuple[str, Tensor]]
) -> dict[Path | None, float | None]:
    """What each client's update is multiplied by, None = left out: a first pass over all files, where it is needed."""
    if not merger.screens:
        return {}
    trained = [one for one in sent if one.update.tokens]
    pairs = ((start, [one.tensor(name) for one in trained]) for name, start in before)
    screen = merger.screen(inner_products(pairs, len(trained)))
    return {one.update.path: factor for one, factor in zip(trained, screen, strict=True)}


def contributions(
    sent: Sequence[OpenUpdate], name: str, start: Tensor, factors: Mapping[Path | None, float | None]
) -> Iterator[Contribution]:
    """The copies of one tensor that are merged, each as far from ``start`` as its client's factor leaves it."""
    for update in sent:
        copy, factor = update.tensor(name), factors.get(update.update.path, 1.0)
        if copy is None or factor is None:
            continue
        near = copy if factor == 1.0 else (start.double() + factor * (copy.double() - start.double())).float()
        yield Contribution(near, update.update.tokens, update.update.discount)
