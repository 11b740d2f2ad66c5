"""What ``--plan auto`` comes to: the plan that was made last, as long as machine and link are about what they were.

A plan is kept in the state folder with what it was made for. A round that was begun keeps its plan, whatever happens.
Between rounds another one is made when memory or the link has changed by more than a hysteresis. It keeps the bottom,
for another one needs a new release of every record; with privacy on it keeps all that a release depends on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch

from client_model.asking import Asker
from client_model.bandwidth import A_FEW_PIECES, measure_link
from client_model.choices import Choices
from client_model.memory import measure_room
from client_model.resuming import held_choices
from client_model.scouting import Scouted
from client_model.store import ClientStore
from splitfl.config import Federation
from splitfl.files import write_file
from splitfl.planning.capability import LinkSpeed
from splitfl.planning.plan import Candidate, Plan
from splitfl.planning.planner import candidates, choose

MEMORY_HYSTERESIS = 1.25  # times more or less memory that a plan is kept through
LINK_HYSTERESIS = 2.0  # times a faster or slower link: those vary more
LEAST_RTT_S = 0.005  # round trips below are all alike
MOST_RATE = 1e9 / 8  # bytes a second; faster links are all alike
LOOK_EVERY_S = 60.0


@dataclass(frozen=True)
class KeptPlan:
    """``choices``, made for the model ``manifest`` with ``memory`` bytes and ``link``."""

    manifest: str
    choices: Choices
    memory: int
    link: LinkSpeed

    def still_fits(self, memory: int, link: LinkSpeed) -> bool:
        """Whether what there is now is within the hysteresis."""
        before = self.link
        delays = (LEAST_RTT_S + before.rtt_s, LEAST_RTT_S + link.rtt_s)
        ways = ((before.up, link.up), (before.down, link.down))
        speeds = (delays, *((min(then, MOST_RATE), min(rate, MOST_RATE)) for then, rate in ways))
        return alike(self.memory, memory, MEMORY_HYSTERESIS) and all(alike(*pair, LINK_HYSTERESIS) for pair in speeds)


def alike(before: float, now: float, factor: float) -> bool:
    """Whether neither is more than ``factor`` times the other."""
    return before <= now * factor and now <= before * factor


def kept_plan(store: ClientStore) -> KeptPlan | None:
    """The plan that was made last; None for none, or none that can be read: it is then made anew."""
    try:
        table = json.loads((store.folder / "plan.json").read_text())
        return KeptPlan(
            str(table["manifest"]),
            Choices.from_table(table["choices"]),
            int(table["memory"]),
            LinkSpeed(**table["link"]),
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_plan(store: ClientStore, plan: KeptPlan) -> None:
    """Make it durable. Raises StorageError."""
    write_file(store.folder / "plan.json", json.dumps(asdict(plan)).encode())


def make_plan(kept: KeptPlan | None, before: Choices | None, found: Scouted) -> tuple[KeptPlan, list[Candidate]]:
    """The plan to take from now on, and all that were weighed; none where the ``kept`` one holds on.

    ``before`` is what this client has trained with, if it has. Raises PlanError when nothing can be taken.
    """
    capability, settings = found.probe.capability, found.settings
    allowed = kept is not None and kept.manifest == found.manifest and fits(kept.choices, settings)
    if kept is not None and allowed and kept.still_fits(capability.memory, capability.link):
        return kept, []
    weighed = candidates(capability, found.shape, settings)
    if before is not None:
        weighed = [one for one in weighed if needs_no_new_release(before, one.plan, settings, capability.device)]
    choices = Choices.of(choose(weighed).plan)
    if before is not None and settings.privacy.on:  # under the very names that the releases were made under
        choices = replace(choices, dtype=before.dtype, codec=before.codec)
    return KeptPlan(found.manifest, choices, capability.memory, capability.link), weighed


def fits(choices: Choices, settings: Federation) -> bool:
    """Whether the federation, which may have changed its settings, still allows them."""
    divides = settings.batch.records % choices.micro_batches == 0
    has_codec = choices.codec in settings.wire.codecs
    return choices.cut is not None and settings.allows(choices.cut) and divides and has_codec


def needs_no_new_release(before: Choices, plan: Plan, settings: Federation, device: str) -> bool:
    """Whether ``plan`` makes the activations that ``before`` made: of the same blocks, in the same form if they were
    noised and charged."""
    usual = "bf16" if device == "cuda" else "fp32"
    form = (usual if before.dtype == "auto" else before.dtype, before.codec)
    same_form = form == (plan.dtype, plan.codec) or not settings.privacy.on
    return before.cut is not None and plan.cut.n_bottom == before.cut.n_bottom and same_form


@dataclass
class AutoPlan:
    """``--plan auto`` of the client with this ``store``: ``visit`` measures, ``say`` tells a person."""

    store: ClientStore
    device: torch.device
    visit: Callable[[], Scouted]
    say: Callable[[str], None]
    looked: float = field(default_factory=time.monotonic)

    def choose(self) -> Choices:
        """What to take part with: a round that was begun keeps what it was begun with, and so does a
        client that has finished. Raises SplitFLError."""
        if self.store.pause_folder.exists() or self.store.journal.exists() or self.store.closing() is not None:
            return held_choices(self.store)
        self.say("measuring this machine and the link to the server, to plan with")
        before = held_choices(self.store) if self.store.took_part() else None
        plan, weighed = make_plan(kept_plan(self.store), before, self.visit())
        keep_plan(self.store, plan)
        self.looked = time.monotonic()
        if weighed:
            self.say(f"plan: {describe(plan.choices)} (`splitfl probe` shows why)")
        return plan.choices

    def is_stale(self, link: Asker) -> bool:
        """Asked between rounds: whether it is time for another plan. Looks once a minute at most."""
        if time.monotonic() - self.looked < LOOK_EVERY_S:
            return False
        self.looked = time.monotonic()
        kept = kept_plan(self.store)
        speed = measure_link(link, A_FEW_PIECES).speed
        stale = kept is None or not kept.still_fits(measure_room(self.device).usable, speed)
        if stale:
            self.say("memory or link have changed much since this client planned")
        return stale


def describe(choices: Choices) -> str:
    """For a person."""
    assert choices.cut is not None
    bottom, top = choices.cut.n_bottom, choices.cut.n_top
    return (
        f"cut {choices.cut} (of the model's blocks the first {bottom} and the last {top} are computed here), "
        f"{choices.micro_batches} micro-batch{'es' * (choices.micro_batches != 1)} a step "
        f"({choices.in_flight} under way), "
        f"{choices.dtype} arithmetic, {choices.codec} on the wire"
    )
