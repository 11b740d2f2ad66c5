"""Who takes part: one session a name, resumed by its token, gone after its grace."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from server_model.members import Member, Members
from splitfl.config import parse_federation
from splitfl.cut import Cut
from splitfl.errors import RefusedError
from splitfl.split.shares import Shapes
from splitfl.wire.frames import encode
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello, NextRound

LAYERS = 6


def shapes_of(cut: Cut) -> Shapes:
    return {"w": (cut.n_bottom, cut.n_top)}


def make(**model: Any) -> tuple[Members, list[str]]:
    """Members of a federation whose clients may keep 1 to 3 blocks at the bottom, and the names of who has left."""
    gone: list[str] = []
    table = {"model": {"max_bottom": 3, **model}, "trunk": {"grace_s": 0.02}}
    return Members(parse_federation(table, "the test"), LAYERS, shapes_of, lambda m, _: gone.append(m.name)), gone


def hello(name: str = "ward-a", **fields: Any) -> Hello:
    return Hello(PROTOCOL_VERSIONS, name, **fields)


def in_loop(body: Callable[[], Any]) -> Any:
    """Run ``body``, which needs an event loop for its timers, and let the grace run out afterwards."""

    async def run() -> Any:
        result = body()
        await asyncio.sleep(0.06)
        return result

    return asyncio.run(run())


# -- Hello -----------------------------------------------------------------------------------------------------


def test_client_without_a_cut_gets_the_federations() -> None:
    members, _ = make()
    member, resumed = members.welcome(hello())
    assert member.cut == Cut(1, 1)
    assert member.shared == {"w": (1, 1)}
    assert not resumed
    assert members.named("ward-a") is member
    assert list(members) == [member]


def test_client_gets_the_cut_that_it_asks_for() -> None:
    member, _ = make()[0].welcome(hello(n_bottom=3, n_top=1))
    assert member.cut == Cut(3, 1)
    assert member.shared == {"w": (3, 1)}


@pytest.mark.parametrize(("n_bottom", "n_top"), [(0, 1), (4, 1), (1, 0), (1, 2)])
def test_client_with_a_cut_outside_the_limits_is_refused(n_bottom: int, n_top: int) -> None:
    members, _ = make()
    with pytest.raises(RefusedError, match="bottom 1 to 3, top 1 to 1, 6 blocks") as refused:
        members.welcome(hello(n_bottom=n_bottom, n_top=n_top))
    assert refused.value.code == "bad_cut"
    assert len(members) == 0


def test_client_has_its_own_pieces_and_number_format() -> None:
    members, _ = make()
    member, _ = members.welcome(hello(micro_batches=4, codec="int8"))
    assert (member.micro_batches, member.codec) == (4, "int8")
    other, _ = members.welcome(hello("ward-b"))
    assert (other.micro_batches, other.codec) == (1, "bf16")


@pytest.mark.parametrize("plan", [{"micro_batches": 3}, {"codec": "fp32"}])
def test_client_with_a_plan_that_cannot_be_is_refused(plan: dict[str, Any]) -> None:
    members, _ = make()
    with pytest.raises(RefusedError, match="not") as refused:
        members.welcome(hello(**plan))
    assert refused.value.code == "bad_plan"
    assert len(members) == 0


def test_client_with_a_cut_larger_than_the_model_is_refused() -> None:
    members, _ = make(max_top=4)
    with pytest.raises(RefusedError, match="not allowed"):
        members.welcome(hello(n_bottom=3, n_top=4))


def test_two_clients_have_sessions_of_their_own() -> None:
    members, _ = make()
    tokens = {members.welcome(hello(name))[0].token for name in ("ward-a", "ward-b")}
    assert len(tokens) == 2
    assert {member.name for member in members} == {"ward-a", "ward-b"}


def test_second_client_of_a_name_is_refused_while_the_first_is_connected() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    with pytest.raises(RefusedError, match="connected already") as refused:
        members.welcome(hello())
    assert refused.value.code == "name_taken"
    assert first in members
    assert gone == []


# -- coming back -----------------------------------------------------------------------------------------------


def test_client_resumes_its_session_by_token() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    again, resumed = members.welcome(hello(resume=first.token))
    assert again is first
    assert resumed
    assert gone == []


@pytest.mark.parametrize(("next_seq", "resumed"), [(0, False), (2, False), (3, True), (9, True), (None, True)])
def test_client_that_forgot_a_request_which_came_is_not_resumed(next_seq: int | None, resumed: bool) -> None:
    """It would give a new request the number of an old one, and hear the old one's answer."""
    members, gone = make()
    first, _ = members.welcome(hello())
    for seq in range(3):
        first.wire.receive(b"".join(encode(NextRound(seq, 0, -1))))
    again, was_resumed = members.welcome(hello(resume=first.token, next_seq=next_seq))
    assert (was_resumed, again is first) == (resumed, resumed)
    assert gone == ([] if resumed else ["ward-a"])


def test_session_is_not_resumed_under_another_name() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    other, resumed = members.welcome(hello("ward-b", resume=first.token))
    assert not resumed
    assert other.token != first.token
    assert first in members
    assert gone == []


def test_unknown_token_opens_a_new_session() -> None:
    members, _ = make()
    member, resumed = members.welcome(hello(resume="of-another-server"))
    assert not resumed
    assert member.token != "of-another-server"


def test_client_that_lost_its_state_gets_a_new_session_and_the_old_one_leaves() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    second, resumed = members.welcome(hello(resume=first.token, fresh=True))
    assert not resumed
    assert second.token != first.token
    assert gone == ["ward-a"]
    assert list(members) == [second]
    assert first not in members


def test_client_that_asks_for_a_mistaken_cut_keeps_its_session() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    with pytest.raises(RefusedError, match="cut 4,1 is not allowed"):
        members.welcome(hello(resume=first.token, fresh=True, n_bottom=4, n_top=1))
    assert gone == []
    assert members.welcome(hello(resume=first.token)) == (first, True)


def test_client_that_comes_back_with_another_cut_has_it_in_a_new_session() -> None:
    members, gone = make()
    first, _ = members.welcome(hello())
    second, resumed = members.welcome(hello(resume=first.token, fresh=True, n_bottom=2, n_top=1))
    assert (second.cut, second.shared, resumed) == (Cut(2, 1), {"w": (2, 1)}, False)
    assert gone == ["ward-a"]


def test_client_without_its_token_replaces_its_session_once_that_is_disconnected() -> None:
    members, gone = make()

    def body() -> Member:
        first, _ = members.welcome(hello())
        members.disconnected(first)
        return members.welcome(hello())[0]

    second = in_loop(body)
    assert gone == ["ward-a"]
    assert list(members) == [second]


# -- leaving ---------------------------------------------------------------------------------------------------


def test_session_outlives_its_connection_by_the_grace_and_then_leaves_once() -> None:
    members, gone = make()

    def body() -> bool:
        member, _ = members.welcome(hello())
        assert members.disconnected(member)
        return member in members

    assert in_loop(body)
    assert gone == ["ward-a"]
    assert len(members) == 0


def test_client_that_comes_back_within_the_grace_stays() -> None:
    members, gone = make()

    def body() -> Member:
        member, _ = members.welcome(hello())
        members.disconnected(member)
        return members.welcome(hello(resume=member.token))[0]

    member = in_loop(body)
    assert member in members
    assert member.connected
    assert gone == []


def test_forgetting_twice_tells_it_once() -> None:
    members, gone = make()
    member, _ = members.welcome(hello())
    members.forget(member, "the test")
    members.forget(member, "the test")
    assert gone == ["ward-a"]


def test_connection_of_a_forgotten_session_starts_no_timer() -> None:
    members, gone = make()

    def body() -> bool:
        member, _ = members.welcome(hello())
        members.forget(member, "the test")
        return members.disconnected(member)

    assert not in_loop(body)
    assert gone == ["ward-a"]


def test_closing_stops_the_timers() -> None:
    members, gone = make()

    def body() -> None:
        member, _ = members.welcome(hello())
        members.disconnected(member)
        members.close()

    in_loop(body)
    assert gone == []


# -- room ------------------------------------------------------------------------------------------------------


def test_sessions_have_a_limit_and_those_that_are_there_may_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_model.members.MAX_SESSIONS", 2)
    members, _ = make()
    first, _ = members.welcome(hello("ward-a"))
    members.welcome(hello("ward-b"))
    with pytest.raises(RefusedError) as caught:
        members.welcome(hello("ward-c"))
    assert caught.value.code == "over_limit"
    assert members.welcome(hello("ward-a", resume=first.token)) == (first, True)
