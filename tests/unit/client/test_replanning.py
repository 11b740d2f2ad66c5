"""Which plan a client takes: kept through small changes, anew after large ones, never another bottom in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client_model import replanning
from client_model.bandwidth import LinkGauge
from client_model.choices import Choices
from client_model.memory import Room
from client_model.probe import Probe
from client_model.replanning import AutoPlan, KeptPlan, keep_plan, kept_plan, make_plan, needs_no_new_release
from client_model.scouting import Scouted
from client_model.store import ClientStore, Snapshot
from client_model.timing import Pace, Spread
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.errors import PlanError
from splitfl.planning.capability import LinkSpeed
from splitfl.planning.plan import Plan
from splitfl.planning.shapes import ModelShape

CPU = torch.device("cpu")
LINK = LinkSpeed(0.02, 1e7, 1e7)
SLOW = LinkSpeed(0.02, 1e6, 1e6)  # it sets the pace, so that a deeper bottom costs next to nothing
GIB = 2**30
SHAPE = ModelShape(24, 1024, 4096, 16, 16, 64, 32_000, tied=False)
MODEL = {"min_bottom": 0, "max_bottom": 4, "n_bottom": 1, "min_top": 0, "max_top": 8}


def found(memory: int, link: LinkSpeed = LINK, **tables: Any) -> Scouted:
    """What a visit measured."""
    settings: Federation = parse_federation({"model": MODEL, **tables}, "the test")
    pace = Pace(*(Spread.of([seconds]) for seconds in (1e-3, 3e-4, 1e-3)))
    room = Room("the test", memory - GIB // 2, GIB // 2)
    return Scouted(
        "m" * 64, settings, SHAPE, Probe("cpu", room, GIB // 2, GIB // 2, {"fp32": pace}, LinkGauge.of(link))
    )


@pytest.mark.parametrize(
    ("memory", "link", "kept"),
    [
        (1.0, (1.0, 1.0, 1.0), True),
        (1.2, (1.9, 0.6, 1.9), True),
        (0.85, (0.6, 1.9, 0.6), True),
        (1.3, (1.0, 1.0, 1.0), False),
        (0.75, (1.0, 1.0, 1.0), False),
        (1.0, (3.0, 1.0, 1.0), False),
        (1.0, (1.0, 0.4, 1.0), False),
        (1.0, (1.0, 1.0, 2.1), False),
    ],
)
def test_plan_is_kept_within_the_hysteresis(memory: float, link: tuple[float, float, float], kept: bool) -> None:
    plan = KeptPlan("m" * 64, Choices(Cut(1, 1), 1), 4 * GIB, LINK)
    now = LinkSpeed(*(value * factor for value, factor in zip((LINK.rtt_s, LINK.up, LINK.down), link, strict=True)))
    assert plan.still_fits(int(memory * 4 * GIB), now) == kept


def test_links_that_are_faster_than_it_matters_are_all_alike() -> None:
    plan = KeptPlan("m", Choices(Cut(1, 1)), GIB, LinkSpeed(1e-3, 3e8, 2e9))
    assert plan.still_fits(GIB, LinkSpeed(1e-3, 2e9, 3e8))
    assert not plan.still_fits(GIB, LinkSpeed(1e-3, 2e9, 3e7))


def test_tiny_round_trips_are_all_alike() -> None:
    plan = KeptPlan("m" * 64, Choices(), GIB, LinkSpeed(1e-5, 1.0, 1.0))
    assert plan.still_fits(GIB, LinkSpeed(4e-3, 1.0, 1.0))


def test_first_plan_is_the_planners(tmp_path: Path) -> None:
    plan, weighed = make_plan(None, None, found(8 * GIB))
    assert weighed
    assert plan.choices.cut is not None
    store = ClientStore(tmp_path)
    keep_plan(store, plan)
    assert kept_plan(store) == plan
    assert make_plan(plan, plan.choices, found(8 * GIB)) == (plan, [])


def test_slower_link_moves_all_but_the_bottom() -> None:
    fast, _ = make_plan(None, None, found(8 * GIB, LinkSpeed(1e-3, 1e9, 1e9)))
    slow, weighed = make_plan(fast, fast.choices, found(8 * GIB, LinkSpeed(0.2, 2e4, 2e4)))
    assert fast.choices.cut is not None
    assert (fast.choices.codec, slow.choices.codec) == ("bf16", "int8")
    assert {one.plan.cut.n_bottom for one in weighed} == {fast.choices.cut.n_bottom}


def test_bottom_that_no_plan_can_keep_is_an_error() -> None:
    plan, _ = make_plan(None, None, found(8 * GIB))
    with pytest.raises(PlanError):
        make_plan(plan, plan.choices, found(GIB))


def test_plan_that_the_federation_no_longer_allows_is_made_anew() -> None:
    plan = KeptPlan("m" * 64, Choices(Cut(1, 1), 3), 8 * GIB, LINK)  # 3 does not divide its 8 records
    assert make_plan(plan, None, found(8 * GIB))[0].choices.micro_batches != 3


@pytest.mark.parametrize(("manifest", "cut"), [("n" * 64, Cut(1, 1)), ("m" * 64, Cut(9, 9))])
def test_plan_for_another_model_or_with_a_cut_that_is_not_allowed_is_made_anew(manifest: str, cut: Cut) -> None:
    fitting, _ = make_plan(None, None, found(8 * GIB))
    plan, weighed = make_plan(replace(fitting, manifest=manifest, choices=Choices(cut, 1)), None, found(8 * GIB))
    assert weighed
    assert plan == fitting


def test_plan_in_a_number_format_that_is_no_longer_allowed_is_made_anew() -> None:
    coarse = KeptPlan("m" * 64, Choices(Cut(1, 1), 1, 1, "fp32", "int8"), 8 * GIB, LINK)
    plan, _ = make_plan(coarse, None, found(8 * GIB, wire={"coarsest": "bf16"}))
    assert plan.choices.codec == "bf16"


@pytest.mark.parametrize(
    ("plan", "private", "same"),
    [
        (Plan(Cut(1, 4), 2, "fp32", "bf16", 2), True, True),
        (Plan(Cut(2, 1), 2, "fp32", "bf16", 2), False, False),
        (Plan(Cut(1, 1), 2, "bf16", "int8", 2), False, True),
        (Plan(Cut(1, 1), 2, "bf16", "bf16", 2), True, False),
        (Plan(Cut(1, 1), 2, "fp32", "int8", 2), True, False),
    ],
)
def test_what_needs_a_new_release(plan: Plan, private: bool, same: bool) -> None:
    settings = parse_federation({"privacy": {"mode": "measured"}} if private else {}, "the test")
    before = Choices(Cut(1, 1), 1, 1, "auto", "bf16")
    assert needs_no_new_release(before, plan, settings, "cpu") == same


def test_private_client_goes_on_under_the_names_of_its_releases() -> None:
    before = Choices(Cut(1, 1), 1, 1, "auto", "bf16")
    private = found(8 * GIB, privacy={"mode": "measured"})
    plan, _ = make_plan(None, before, private)
    assert (plan.choices.dtype, plan.choices.codec) == ("auto", "bf16")


@pytest.fixture
def auto(tmp_path: Path) -> Callable[..., AutoPlan]:
    def make(memory: int = 8 * GIB) -> AutoPlan:
        return AutoPlan(ClientStore(tmp_path / "state"), CPU, lambda: found(memory, SLOW), lambda _: None)

    return make


def test_round_that_was_begun_keeps_its_plan(auto: Callable[..., AutoPlan]) -> None:
    store = auto().store
    store.save_federation(Federation().model_dump_json(), (1, 3), Choices(Cut(1, 3), 4, codec="int8").as_table())
    store.save_pause(Snapshot(0, 0, 0, (0, 0), (1, 3), {"head": torch.ones(1)}, {}))
    assert auto().choose() == Choices(Cut(1, 3), 4, codec="int8").settled(Federation())
    assert kept_plan(store) is None


def test_client_that_has_trained_keeps_its_bottom_when_it_plans_first(auto: Callable[..., AutoPlan]) -> None:
    store = auto().store
    free = auto().choose()
    store.save_federation(Federation().model_dump_json(), (0, 3))
    store.save(Snapshot(0, 0, 0, (0, 0), (0, 3), {"head": torch.ones(1)}, {}))
    (store.folder / "plan.json").unlink()
    bound = auto().choose()
    assert free.cut is not None
    assert bound.cut is not None
    assert (free.cut.n_bottom > 0, bound.cut.n_bottom) == (True, 0)


def test_client_that_may_have_released_records_keeps_its_bottom_and_form_before_its_first_snapshot(
    auto: Callable[..., AutoPlan],
) -> None:
    store, private = auto().store, parse_federation({"privacy": {"mode": "measured", "clip_norm": 1.0}}, "the test")
    store.save_federation(private.model_dump_json(), (0, 3))
    bound = auto().choose()
    assert bound.cut is not None
    assert bound.cut.n_bottom == 0


def test_machine_is_looked_at_between_rounds_once_a_while(
    auto: Callable[..., AutoPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = auto()
    plan.choose()
    kept = kept_plan(plan.store)
    assert kept is not None
    monkeypatch.setattr(replanning, "measure_link", lambda *_: LinkGauge.of(SLOW))
    monkeypatch.setattr(replanning, "measure_room", lambda _: Room("x", kept.memory, 0))
    link: Any = None
    assert not plan.is_stale(link)
    monkeypatch.setattr(replanning, "measure_room", lambda _: Room("x", kept.memory // 2, 0))
    assert not plan.is_stale(link)  # it has just been looked at
    plan.looked -= replanning.LOOK_EVERY_S
    assert plan.is_stale(link)
    plan.looked -= replanning.LOOK_EVERY_S
    keep_plan(plan.store, replace(kept, memory=kept.memory // 2))
    assert not plan.is_stale(link)
