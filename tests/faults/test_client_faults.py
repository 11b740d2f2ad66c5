"""A client goes away (power cut, Ctrl-C, full disk) and comes back: it goes on, and nobody waits for it in vain."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbing import SETTINGS, start
from processes import Place, with_settings
from proxy import Proxy

Finish = Callable[..., None]


def test_client_interrupted_in_a_round_exits_130_and_goes_on_where_it_stopped(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, (first, second) = start(place, wards)
    first.wait_for("step", round=1, step=10)
    first.interrupt()
    assert first.wait() == 130, first.story()
    assert "stopping after this step" in first.stderr or "paused" in first.stderr
    assert "Run the same command to go on" in first.stderr
    assert "Traceback" not in first.stderr
    again = place.join(server.url, "a", wards["a"])
    resumed = again.wait_for("resumed", round=1)
    last = first.named("step", round=1)[-1]["step"]
    assert resumed["step"] == last + 1
    finish(again, second, server.command)
    assert not server.command.named("left", client="a")[:-1]  # its session lived on


def test_client_interrupted_while_it_waits_holds_nobody_up(place: Place, wards: dict[str, Path]) -> None:
    settings = with_settings(SETTINGS, rounds={"count": 1, "local_steps": 2, "min_clients": 2})
    server = place.serve(settings)
    first = place.join(server.url, "a", wards["a"])
    first.wait_for("waiting")
    first.interrupt()
    assert first.wait() == 130
    server.command.wait_for("left", client="a")
    clients = [place.join(server.url, name, data) for name, data in wards.items()]
    assert [command.wait() for command in (*clients, server.command)] == [0, 0, 0]


def test_client_interrupted_twice_stops_within_a_step(place: Place, wards: dict[str, Path]) -> None:
    server, (first, second) = start(place, wards)
    first.wait_for("step", round=0, step=1)
    os.kill(server.command.pid, signal.SIGSTOP)  # the step under way does not end
    first.interrupt()
    first.wait_for_stderr("stopping after this step")
    assert first.exit_code is None
    first.interrupt()
    assert first.wait(10) == 130
    assert "Traceback" not in first.stderr
    os.kill(server.command.pid, signal.SIGCONT)
    again = place.join(server.url, "a", wards["a"])
    for command in (again, second, server.command):
        assert command.wait() == 0, command.story()


@pytest.mark.parametrize("after", [{"round": 0, "step": 0}, {"round": 1, "step": 10}, {"round": 2, "step": 29}])
def test_client_killed_in_a_round_goes_on_in_it_and_nothing_is_lost(
    place: Place, wards: dict[str, Path], finish: Finish, after: dict[str, int]
) -> None:
    server, (first, second) = start(place, wards)
    first.wait_for("step", **after)
    first.kill()
    again = place.join(server.url, "a", wards["a"])
    assert server.command.wait_for("connected", client="a", count=2)["resumed"] is True
    finish(again, second, server.command)


def test_client_killed_in_a_round_comes_back_while_the_server_still_believes_in_it(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server = place.serve(SETTINGS)
    with Proxy(server.url, deaf=True) as proxy:
        first = place.join(proxy.url, "a", wards["a"])
        second = place.join(server.url, "b", wards["b"])
        first.wait_for("step", round=1, step=10)
        first.kill()
        time.sleep(0.3)
        assert not server.command.named("disconnected", client="a")
        again = place.join(proxy.url, "a", wards["a"])
        connected = server.command.wait_for("connected", client="a", count=2)
        assert connected["resumed"] is True
        finish(again, second, server.command)


def test_client_that_stays_away_beyond_the_grace_is_not_waited_for(place: Place, wards: dict[str, Path]) -> None:
    settings = with_settings(SETTINGS, trunk={"grace_s": 0.5})
    server, (first, second) = start(place, wards, settings)
    first.wait_for("round_durable", round=0)
    first.wait_for("step", round=1, step=1)
    first.kill()
    server.command.wait_for("left", client="a")
    again = place.join(server.url, "a", wards["a"])
    for command in (second, again, server.command):
        assert command.wait() == 0, command.story()
    assert len(second.named("step", round=1)) == 30


def test_client_with_a_full_disk_exits_9_and_goes_on_with_room_where_it_was(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, (first, second) = start(place, wards)
    first.wait_for("round_durable", round=0)
    first.limit_files(50_000)  # room for its log, none for weights
    assert first.wait() == 9
    assert "cannot write" in first.error
    assert "Free some space" in first.error
    snapshots = sorted(path.name for path in (place.folder / "client-a/snapshots").iterdir())
    assert snapshots == ["round-000000"]
    again = place.join(server.url, "a", wards["a"])
    assert server.command.wait_for("connected", client="a", count=2)["resumed"] is True
    finish(again, second, server.command)


def test_second_process_on_one_state_folder_is_refused(place: Place, wards: dict[str, Path], finish: Finish) -> None:
    server, (first, second) = start(place, wards)
    first.wait_for("step", round=0, step=0)
    twin = place.join(server.url, "a", wards["a"])
    assert twin.wait() == 2
    assert "in use by another process" in twin.error
    finish(first, second, server.command)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_clients_killed_or_interrupted_at_any_moment_still_end_the_federation(
    place: Place, wards: dict[str, Path], seed: int
) -> None:
    chance = random.Random(seed)
    settings = with_settings(SETTINGS, rounds={"count": 8, "local_steps": 20}, trunk={"grace_s": 5.0})
    server, clients = start(place, wards, settings)
    for _ in range(6):
        time.sleep(chance.uniform(0.0, 1.5))
        which = chance.randrange(2)
        if clients[which].exit_code is None:
            chance.choice([clients[which].interrupt, clients[which].kill])()
        if clients[which].wait() == 0:  # the federation has ended
            break
        assert clients[which].exit_code in (-9, 130), clients[which].story()
        clients[which] = place.join(server.url, "ab"[which], wards["ab"[which]])
    for command in (*clients, server.command):
        assert command.wait() == 0, command.story()
        assert "Traceback" not in command.stderr
