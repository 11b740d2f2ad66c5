"""What a client would have reached without the split: the leak must be earned, and the report says whether it was.

*ends-only*: the client's own ends as a small model, the trunk left out; nothing leaves for it. *top-only*: the trunk as
published and no gradient sent, the top trained on this client's own records alone; it names records that were released
before, and nothing new leaves. Both start from the base weights and get what this client got in the federation:
as many rounds of local steps as it took part in, in its order of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from client_model.asking import Asker
from client_model.ends import Ends
from client_model.records import ClientData, Spend
from client_model.trainer import MissedStepError, Trainer
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.data.packing import Batch
from splitfl.errors import PrivacyError
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.gate import Gate
from splitfl.split.flow import bottom_trains


@dataclass(frozen=True)
class Baselines:
    """Held-out losses in nats per token; None = not measured. ``steps`` each of them trained."""

    federated: float
    ends_only: float | None
    top_only: float | None
    steps: int

    @property
    def earned(self) -> bool:
        """Whether the federated weights beat whatever was measured beside them."""
        others = [loss for loss in (self.ends_only, self.top_only) if loss is not None]
        return all(self.federated < loss for loss in others)


def wanted(settings: Federation, cut: Cut) -> tuple[bool, bool]:
    """Whether ends-only and top-only are to be measured.

    For the latter the trunk must be as published, and with privacy on every record released for good.
    """
    chosen = settings.baselines
    costs_nothing = not settings.privacy.on or not bottom_trains(settings, cut)
    return chosen != "none", chosen == "all" and not settings.trains_trunk and costs_nothing


class BaselineRun:
    """Trains baselines for the client ``name``, which took part in ``rounds`` rounds; ``fresh`` gives ends with the
    base weights.

    ``say`` hears of every step: which baseline, how many steps are done, and of how many.
    """

    def __init__(
        self,
        name: str,
        rounds: int,
        data: ClientData,
        evaluation: Sequence[Batch],
        link: Asker,
        gate: Gate,
        fresh: Callable[[], Ends],
        say: Callable[[str, int, int], None],
    ) -> None:
        self.name = name
        self.data = data
        self.rounds = spread(rounds, data.settings.rounds.count)
        self.steps = rounds * data.settings.rounds.local_steps
        self.evaluation = evaluation
        self.link = link
        self.gate = gate
        self.fresh = fresh
        self.say = say

    def ends_only(self) -> float | None:
        """Held-out loss of the ends alone; None when it is no number."""
        ends = self.fresh()
        ends.leave_trunk_out()
        return self._run("ends-only", ends, None)

    def top_only(self) -> float | None:
        """Held-out loss of a top that this client trained alone, on the trunk as it was published."""
        return self._run("top-only", self.fresh(), self._paid_for())

    def _run(self, which: str, ends: Ends, spend: Spend | None) -> float | None:
        settings, trainer = self.data.settings, Trainer(ends, self.link, self.gate)
        order, rounds = self.data.order(self.name), settings.rounds
        try:
            for done, (round_, step) in enumerate(product(self.rounds, range(rounds.local_steps)), 1):
                trainer.step(round_, step, self.data.step(order, spend))
                self.say(which, done, self.steps)
            loss = trainer.evaluate(rounds.count, self.evaluation)
        except (MissedStepError, PrivacyError):  # or too few records whose release is paid for
            return None
        return loss.mean if math.isfinite(loss.mean) else None

    def _paid_for(self) -> Spend | None:
        """With privacy on, only records that were released before take part: a baseline costs nothing."""
        if not self.gate.policy.private:
            return None
        return lambda key, length, _: self.gate.once.is_paid(RecordRef(key, length))


def spread(taken: int, count: int) -> list[int]:
    """``taken`` of ``count`` rounds, evenly spaced: the step sizes of a client that was now here, now not."""
    return [number * count // taken for number in range(taken)]
