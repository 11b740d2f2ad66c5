"""Rounds as a state machine: in whatever order things happen, a round is merged once, of its own cohort, and ends."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfl.config import Federation, parse_federation
from splitfl.errors import RefusedError
from splitfl.federation.rounds import (
    Action,
    Discounted,
    Finish,
    LateUpdate,
    MergeRound,
    OpenRound,
    Phase,
    RoundMachine,
    discount,
    draw_cohort,
)

CLIENTS = ("a", "b", "c", "d")


def federation(seed: int = 0, aggregate: str = "mean", **rounds: Any) -> Federation:
    tables = {"seed": seed, "rounds": {"count": 3, **rounds}, "merge": {"aggregate": aggregate}}
    return parse_federation(tables, "the test")


def gathered(names: str, **rounds: Any) -> tuple[RoundMachine, list[Action]]:
    """A machine for which these clients have asked for the first round, in that order; what the last one caused."""
    machine = RoundMachine(federation(min_clients=len(names), **rounds))
    actions: list[Action] = []
    for name in names:
        assert actions == []
        actions = machine.wait(name, 0.0)
    return machine, actions


# opening


def test_round_opens_when_enough_clients_wait() -> None:
    machine = RoundMachine(federation(min_clients=2))
    assert machine.wait("b", 0.0) == []
    assert machine.wait("a", 0.0) == [OpenRound(0, ("a", "b"))]
    assert machine.phase is Phase.TRAINING


def test_round_waits_for_a_client_that_was_there_before() -> None:
    machine, _ = gathered("ab")
    for name in "ab":
        machine.update(name, 0, 10, 0.0)
    assert machine.merged(0.0) == []
    assert machine.wait("a", 0.0) == []
    assert machine.wait("c", 0.0) == []  # enough by number, but b is still on its way
    assert machine.wait("b", 0.0) == [OpenRound(1, ("a", "b", "c"))]


def test_late_joiner_takes_part_in_the_next_round() -> None:
    machine, _ = gathered("ab")
    assert machine.wait("c", 0.0) == []
    machine.update("a", 0, 10, 0.0)
    assert machine.update("b", 0, 10, 0.0) == [MergeRound(0, ("a", "b"))]
    machine.merged(0.0)
    machine.wait("a", 0.0)
    assert machine.wait("b", 0.0) == [OpenRound(1, ("a", "b", "c"))]


def test_client_that_leaves_while_others_wait_lets_the_round_open() -> None:
    machine, _ = gathered("ab")
    for name in "ab":
        machine.update(name, 0, 10, 0.0)
    machine.merged(0.0)
    machine.settings = federation(min_clients=1)
    machine.wait("a", 0.0)
    assert machine.leave("b", 0.0) == [OpenRound(1, ("a",))]


# merging


def test_round_is_merged_when_every_member_has_sent_its_update() -> None:
    machine, _ = gathered("ab")
    assert machine.update("b", 0, 5, 0.0) == []
    assert machine.update("a", 0, 7, 0.0) == [MergeRound(0, ("a", "b"))]
    assert machine.updates == {"a": 7, "b": 5}
    assert machine.phase is Phase.MERGING


def test_update_of_a_client_that_left_still_counts() -> None:
    machine, _ = gathered("ab")
    machine.update("a", 0, 5, 0.0)
    assert machine.leave("a", 0.0) == []
    assert machine.update("b", 0, 5, 0.0) == [MergeRound(0, ("a", "b"))]


def test_client_that_leaves_without_an_update_is_not_waited_for() -> None:
    machine, _ = gathered("ab")
    machine.update("a", 0, 5, 0.0)
    assert machine.leave("b", 0.0) == [MergeRound(0, ("a",))]


def test_client_that_comes_back_without_its_state_is_not_waited_for() -> None:
    machine, _ = gathered("ab")
    machine.update("a", 0, 5, 0.0)
    assert machine.wait("b", 0.0) == [MergeRound(0, ("a",))]


def test_round_opens_again_when_everybody_left() -> None:
    machine, _ = gathered("ab")
    assert machine.leave("a", 0.0) == []
    assert machine.leave("b", 0.0) == []
    assert machine.phase is Phase.GATHERING
    machine.wait("b", 0.0)
    assert machine.wait("a", 0.0) == [OpenRound(0, ("a", "b"))]


@pytest.mark.parametrize(("client", "round_"), [("c", 0), ("a", 1), ("a", -1)])
def test_update_of_a_stranger_or_another_round_is_refused(client: str, round_: int) -> None:
    machine, _ = gathered("ab")
    with pytest.raises(RefusedError) as error:
        machine.update(client, round_, 5, 0.0)
    assert error.value.code == "wrong_round"


def test_update_while_the_round_is_merged_is_refused() -> None:
    machine, _ = gathered("a")
    machine.update("a", 0, 5, 0.0)
    with pytest.raises(RefusedError):
        machine.update("a", 0, 5, 0.0)


# time


def opened(names: str, **rounds: Any) -> RoundMachine:
    """A machine whose first round all of these clients are in."""
    machine = RoundMachine(federation(deadline_s=10.0, **rounds), present=set(names))
    for name in names:
        machine.wait(name, 0.0)
    return machine


def test_deadline_merges_what_is_there() -> None:
    machine = opened("ab")
    assert machine.deadline() == 10.0
    machine.update("a", 0, 5, 3.0)
    assert machine.tick(9.9) == []
    assert machine.tick(10.0) == [MergeRound(0, ("a",))]
    assert machine.update("b", 0, 5, 10.1) == [LateUpdate("b", 0, kept=False)]


def test_deadline_merges_no_fewer_updates_than_min_clients_where_somebody_may_lie() -> None:
    machine = opened("abx", min_clients=2, aggregate="median")
    machine.update("x", 0, 5, 3.0)
    assert machine.tick(10.0) == []  # who is early decides nothing alone
    assert machine.update("a", 0, 5, 12.0) == [MergeRound(0, ("a", "x"))]
    assert machine.update("b", 0, 5, 13.0) == [LateUpdate("b", 0, kept=False)]


def test_round_that_too_few_are_left_in_for_its_deadline_is_merged_when_all_of_them_have_sent() -> None:
    machine = opened("abc", min_clients=3, aggregate="median")
    machine.update("a", 0, 5, 3.0)
    assert machine.leave("b", 4.0) == []
    assert machine.tick(10.0) == []
    assert machine.update("c", 0, 5, 12.0) == [MergeRound(0, ("a", "c"))]


def test_client_that_was_late_holds_up_no_later_round() -> None:
    machine = opened("ab")
    machine.update("a", 0, 5, 3.0)
    machine.tick(10.0)
    machine.merged(10.5)
    assert machine.wait("a", 11.0) == [OpenRound(1, ("a",))]
    assert machine.wait("b", 12.0) == []


def test_deadline_without_any_update_waits_for_the_first() -> None:
    machine = opened("ab")
    assert machine.tick(11.0) == []
    assert machine.update("b", 0, 5, 12.0) == [MergeRound(0, ("b",))]


def test_round_without_a_deadline_waits_for_ever() -> None:
    machine, _ = gathered("ab")
    machine.update("a", 0, 5, 0.0)
    assert machine.deadline() is None
    assert machine.tick(1e9) == []


def between_rounds(**rounds: Any) -> RoundMachine:
    """Round 0 of ``a`` and ``b`` was merged at 5.0, and nobody has asked for the next one yet."""
    machine = opened("ab", **rounds)
    for name in "ab":
        machine.update(name, 0, 5, 3.0)
    assert machine.merged(5.0) == []
    return machine


def test_client_that_does_not_ask_for_the_next_round_holds_the_others_up_until_the_deadline() -> None:
    machine = between_rounds()
    assert machine.deadline() is None  # nobody is held up yet
    assert machine.wait("a", 6.0) == []
    assert machine.deadline() == 16.0
    assert machine.tick(15.9) == []
    assert machine.tick(16.0) == [OpenRound(1, ("a",))]
    assert machine.deadline() == 26.0
    machine.wait("b", 17.0)  # it was not thrown out
    machine.update("a", 1, 5, 18.0)
    machine.merged(19.0)
    assert machine.wait("a", 20.0) == [OpenRound(2, ("a", "b"))]


def test_deadline_between_rounds_runs_from_when_enough_wait() -> None:
    machine = opened("abc", min_clients=2)
    for name in "abc":
        machine.update(name, 0, 5, 3.0)
    machine.merged(5.0)
    machine.wait("a", 6.0)
    assert machine.tick(100.0) == []
    machine.wait("b", 101.0)
    machine.leave("a", 102.0)
    assert machine.deadline() is None
    machine.wait("a", 103.0)
    assert machine.deadline() == 113.0
    assert machine.tick(113.0) == [OpenRound(1, ("a", "b"))]


def test_without_a_deadline_who_does_not_ask_for_the_next_round_is_waited_for() -> None:
    machine = between_rounds()
    machine.settings = federation()
    machine.wait("a", 6.0)
    assert machine.deadline() is None
    assert machine.tick(1e9) == []


# late updates


def missed(round_: int = 0, **rounds: Any) -> RoundMachine:
    """``a`` has sent its update of ``round_``, ``b`` has missed the deadline, and the round is being merged."""
    machine = RoundMachine(federation(deadline_s=10.0, staleness="polynomial", count=9, **rounds), round_)
    machine.present = {"a", "b"}
    machine.wait("a", 0.0)
    machine.wait("b", 0.0)
    machine.update("a", round_, 5, 3.0)
    assert machine.tick(10.0) == [MergeRound(round_, ("a",))]
    return machine


def next_round(machine: RoundMachine) -> list[Action]:
    """``a`` alone trains one more round; what its update causes."""
    machine.wait("a", 11.0)
    return machine.update("a", machine.round, 5, 12.0)


@pytest.mark.parametrize("when", ["merging", "gathering", "training"])
def test_late_update_counts_in_the_next_merge_at_a_discount(when: str) -> None:
    machine = missed()
    if when != "merging":
        machine.merged(10.5)
    if when == "training":
        machine.wait("a", 11.0)
    assert machine.update("b", 0, 7, 11.5) == [LateUpdate("b", 0, kept=True)]
    if when == "merging":
        machine.merged(12.0)
    machine.wait("a", 12.0)
    assert machine.update("a", 1, 5, 13.0) == [MergeRound(1, ("a",), (Discounted("b", 0, 2**-0.5),))]
    machine.merged(14.0)
    assert next_round(machine) == [MergeRound(2, ("a",))]  # once, and not again


def test_late_update_beyond_max_staleness_is_dropped() -> None:
    for limit in (1, 2):
        machine = missed(max_staleness=limit)
        machine.merged(10.5)
        next_round(machine)
        assert machine.update("b", 0, 7, 12.5) == [LateUpdate("b", 0, kept=limit == 2)]


def test_late_update_of_the_last_round_is_dropped() -> None:
    assert missed(8).update("b", 8, 7, 10.5) == [LateUpdate("b", 8, kept=False)]


def test_late_client_may_be_in_the_next_cohort_too_and_counts_once() -> None:
    machine = missed()
    machine.update("b", 0, 7, 10.2)
    machine.wait("b", 10.3)
    machine.merged(10.5)
    machine.wait("a", 11.0)
    machine.update("a", 1, 5, 12.0)
    assert machine.update("b", 1, 5, 13.0) == [MergeRound(1, ("a", "b"))]
    assert machine.late == {}


@pytest.mark.parametrize("after", ["update", "wait", "leave"])
def test_late_update_is_taken_once_and_from_who_still_owes_it(after: str) -> None:
    machine = missed()
    machine.update("b", 0, 7, 10.2) if after == "update" else getattr(machine, after)("b", 10.2)
    with pytest.raises(RefusedError) as error:
        machine.update("b", 0, 7, 10.3)
    assert error.value.code == "wrong_round"


def test_late_update_of_a_client_that_left_still_counts() -> None:
    machine = missed()
    machine.update("b", 0, 7, 10.2)
    machine.leave("b", 10.3)
    machine.merged(10.5)
    assert next_round(machine) == [MergeRound(1, ("a",), (Discounted("b", 0, 2**-0.5),))]


@given(st.integers(0, 10), st.floats(0, 5), st.floats(0, 5))
def test_discount_falls_with_staleness_and_with_its_exponent(staleness: int, one: float, other: float) -> None:
    assert discount(0, one) == discount(staleness, 0) == 1
    assert discount(staleness + 1, one) <= discount(staleness, one) <= 1
    assert discount(staleness, max(one, other)) <= discount(staleness, min(one, other))
    assert discount(3, 0.5) == 0.5


def test_replayed_update_changes_nothing() -> None:
    machine, _ = gathered("ab")
    machine.update("a", 0, 5, 0.0)
    with pytest.raises(RefusedError, match="has come already"):
        machine.update("a", 0, 500, 0.0)
    assert machine.updates == {"a": 5}


# the end


def test_federation_ends_after_its_last_round() -> None:
    machine = RoundMachine(federation(count=1))
    machine.wait("a", 0.0)
    machine.update("a", 0, 1, 0.0)
    assert machine.merged(0.0) == [Finish(0)]
    assert machine.phase is Phase.FINISHED
    assert machine.wait("a", 0.0) == []


def test_machine_that_starts_behind_the_last_round_has_ended() -> None:
    assert RoundMachine(federation(count=2), 2).phase is Phase.FINISHED


# cohorts


@given(st.permutations(CLIENTS), st.integers(0, 9), st.integers(0, 5))
def test_cohort_does_not_depend_on_the_order_of_arrival(order: list[str], seed: int, round_: int) -> None:
    chosen = federation(seed, client_fraction=0.5)
    assert draw_cohort(chosen, round_, set(order)) == draw_cohort(chosen, round_, set(CLIENTS))


@given(st.sets(st.sampled_from(CLIENTS), min_size=1), st.floats(0.01, 1.0), st.integers(0, 9))
def test_cohort_is_a_share_of_those_who_wait_and_never_empty(waiting: set[str], fraction: float, round_: int) -> None:
    cohort = draw_cohort(federation(client_fraction=fraction), round_, waiting)
    assert set(cohort) <= waiting
    assert list(cohort) == sorted(set(cohort))
    assert max(1, fraction * len(waiting) - 1e-9) <= len(cohort) < fraction * len(waiting) + 1


def test_cohorts_of_half_the_clients_take_everybody_in_turn() -> None:
    chosen = federation(client_fraction=0.5)
    drawn = [draw_cohort(chosen, round_, set(CLIENTS)) for round_ in range(20)]
    assert all(len(cohort) == 2 for cohort in drawn)
    assert {name for cohort in drawn for name in cohort} == set(CLIENTS)


# anything at all


@dataclass
class Watcher:
    """Checks every action against what came before it."""

    machine: RoundMachine
    cohorts: dict[int, set[str]] = field(default_factory=dict)  # of the round as it was opened last
    merged: list[int] = field(default_factory=list)
    late: dict[str, int] = field(default_factory=dict)  # kept, and in no merge yet
    there: set[str] = field(default_factory=set)  # who is waited for before a round opens
    enough_since: float | None = None  # wait for the next one
    finished: bool = False

    def see(self, actions: list[Action], now: float) -> None:
        for action in actions:
            assert not self.finished
            match action:
                case OpenRound(round=round_, cohort=cohort):
                    assert round_ == self.machine.round == len(self.merged)
                    assert cohort
                    asked = self.machine.waiting | set(cohort)
                    rounds = self.machine.settings.rounds
                    assert len(asked) >= rounds.min_clients
                    if not self.there <= asked:  # somebody is still on its way
                        assert rounds.deadline_s > 0
                        assert self.enough_since is not None
                        assert now - self.enough_since >= rounds.deadline_s
                    self.there = asked
                    self.cohorts[round_] = set(cohort)
                case LateUpdate(client=client, round=round_, kept=kept):
                    assert client in self.cohorts[round_]
                    assert client not in self.late
                    self.late |= {client: round_} if kept else {}
                case MergeRound(round=round_, contributors=contributors, late=late):
                    taken = {part.client: part.round for part in late}
                    assert taken == {name: old for name, old in self.late.items() if name not in contributors}
                    assert all(part.discount == discount(round_ - part.round, 0.5) < 1 for part in late)
                    self.late = {}
                    assert round_ not in self.merged
                    assert set(contributors) <= self.cohorts[round_]
                    assert contributors
                    left = self.machine.cohort == set(contributors)  # of the cohort, by all who have not gone
                    settings = self.machine.settings
                    robust = settings.merge.aggregate != "mean"
                    assert left or not robust or len(contributors) >= settings.rounds.min_clients
                    self.merged.append(round_)
                    self.there -= self.cohorts[round_] - set(contributors)
                case Finish(round=round_):
                    assert self.merged == list(range(round_ + 1))
                    self.finished = True
        machine = self.machine
        least = max(1, machine.settings.rounds.min_clients)
        if machine.phase is not Phase.GATHERING or len(machine.waiting) < least:
            self.enough_since = None
        elif self.enough_since is None:
            self.enough_since = now


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["wait", "update", "leave", "merged", "tick"]), st.sampled_from(CLIENTS), st.integers(-1, 3)
    ),
    max_size=60,
)
MACHINES = st.builds(
    lambda seed, aggregate, least, fraction, deadline, staleness: RoundMachine(
        federation(
            seed, aggregate, min_clients=least, client_fraction=fraction, deadline_s=deadline, staleness=staleness
        )
    ),
    st.integers(0, 9),
    st.sampled_from(["mean", "median"]),
    st.integers(1, 3),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from(["drop", "polynomial"]),
)


def happen(watcher: Watcher, event: str, client: str, round_: int, now: float) -> None:
    """One event, as the service would pass it on: a merge is reported only when there is one."""
    machine = watcher.machine
    if event == "merged":
        if machine.phase is Phase.MERGING:
            watcher.see(machine.merged(now), now)
    elif event == "update":
        try:
            watcher.see(machine.update(client, round_, 3, now), now)
        except RefusedError:
            owes = client in machine.cohort and client not in machine.updates
            assert machine.phase is not Phase.TRAINING or round_ != machine.round or not owes
    elif event == "tick":
        watcher.see(machine.tick(now), now)
    elif event == "wait":
        watcher.there.add(client)
        watcher.see(machine.wait(client, now), now)
    else:
        watcher.there.discard(client)
        watcher.see(machine.leave(client, now), now)


def behave(watcher: Watcher, client: str, now: float) -> bool:
    """What a client that keeps to the rules does next; False when it waits for others."""
    machine = watcher.machine
    if machine.phase is Phase.TRAINING and client in machine.cohort and client not in machine.updates:
        happen(watcher, "update", client, machine.round, now)
    elif client not in machine.waiting and client not in machine.updates:
        happen(watcher, "wait", client, 0, now)
    else:
        return False
    return True


@given(MACHINES, EVENTS)
def test_no_order_of_events_merges_a_round_twice_or_beyond_its_cohort(
    machine: RoundMachine, events: list[tuple[str, str, int]]
) -> None:
    watcher = Watcher(machine)
    for now, (event, client, round_) in enumerate(events):
        happen(watcher, event, client, round_, float(now))


@given(MACHINES, EVENTS, st.integers(0, 2**16))
def test_clients_that_behave_bring_any_federation_to_its_end(
    machine: RoundMachine, events: list[tuple[str, str, int]], seed: int
) -> None:
    watcher, now, chance = Watcher(machine), 0.0, random.Random(seed)
    for event, client, round_ in events:  # an unruly past
        now += 1
        happen(watcher, event, client, round_, now)
    for _ in range(200):
        now += 1
        clients = list(CLIENTS)
        chance.shuffle(clients)
        for client in clients:
            behave(watcher, client, now)
        happen(watcher, "merged", "", 0, now)
        if machine.phase is Phase.FINISHED:
            break
    assert machine.phase is Phase.FINISHED
    assert watcher.merged == [0, 1, 2]


@given(st.integers(2, 3), st.sampled_from(CLIENTS), st.integers(0, 6), st.integers(0, 2**16))
def test_client_that_falls_silent_at_any_moment_ends_no_federation_with_a_deadline(
    least: int, silent: str, acts: int, seed: int
) -> None:
    watcher, chance = Watcher(RoundMachine(federation(min_clients=least, deadline_s=5.0))), random.Random(seed)
    for now in range(100):
        for client in chance.sample(CLIENTS, len(CLIENTS)):
            if client != silent or acts > 0:
                acts -= behave(watcher, client, float(now)) and client == silent
        happen(watcher, "merged", "", 0, float(now))
        happen(watcher, "tick", "", 0, float(now))
    assert watcher.finished
    assert watcher.merged == [0, 1, 2]
