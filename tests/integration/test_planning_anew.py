"""A link that becomes slow between two rounds: the client says goodbye, visits, plans anew, and comes back."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Place

from client_model import replanning, scouting
from client_model.asking import Asker
from client_model.bandwidth import LinkGauge
from client_model.cli import join
from client_model.replanning import AutoPlan
from splitfl.planning.capability import LinkSpeed

SETTINGS = {
    "rounds": {"count": 3, "local_steps": 2},
    "batch": {"records": 4, "max_length": 32},
    "model": {"n_bottom": 1, "max_bottom": 1, "min_bottom": 1, "min_top": 1, "max_top": 1},
    "merge": {"share": "none"},  # else updates are all that such a link has time for
    "evaluation": {"records": 4},
}
FAST, SLOW = LinkSpeed(0.001, 1e9, 1e9), LinkSpeed(0.05, 1e4, 1e4)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """``join`` takes them for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Link:
    """What each measurement of the link finds: the last one again when there are no more."""

    def __init__(self, *found: LinkSpeed) -> None:
        self.found = list(found)

    def __call__(self, *_: object) -> LinkGauge:
        return LinkGauge.of(self.found.pop(0) if len(self.found) > 1 else self.found[0])


def test_client_plans_anew_between_rounds_and_trains_on_by_the_new_plan(
    place: Place, wards: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = place.serve(SETTINGS)
    link = Link(FAST, FAST, SLOW)  # the first visit, before round 1, and from then on
    looks: list[Asker] = []
    is_stale = AutoPlan.is_stale

    def counted(auto: AutoPlan, asker: Asker) -> bool:
        looks.append(asker)
        return is_stale(auto, asker)

    monkeypatch.setattr(AutoPlan, "is_stale", counted)
    monkeypatch.setattr(replanning, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(replanning, "measure_link", link)
    monkeypatch.setattr(scouting, "measure_link", link)
    folder = place.folder / "client-a"
    join(
        server.url,
        wards["a"],
        name="a",
        state=folder,
        accept=place.agreement,
        key=place.folder / "key",
        cache=place.folder / "cache",
        threads=1,
        as_json=True,
    )
    said = capsys.readouterr()
    events = [json.loads(line) for line in said.out.splitlines()]
    plans = [line for line in said.err.splitlines() if "plan: cut" in line]
    assert ["int8" in plan for plan in plans] == [False, True]
    assert all("cut 1,1" in plan for plan in plans)  # the bottom never moves by itself
    steps = [(event["round"], event["step"]) for event in events if event.get("event") == "step"]
    assert steps == [(round_, step) for round_ in range(3) for step in range(2)]  # each once
    report = events[-1]["report"]
    assert (report["rounds_taken"], report["starts"]) == (3, 1)
    assert len(looks) == 4  # before each round, once more with the new plan, and not after the last one
    assert "memory or link have changed much" in said.err
    assert server.command.wait() == 0, server.command.story()
