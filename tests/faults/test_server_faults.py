"""The server goes away (power cut, Ctrl-C, full disk) and comes back: nothing is lost, and the result is the same."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbing import SETTINGS, assert_same, start
from processes import Place, with_settings
from safetensors.torch import load_file

Finish = Callable[..., None]


def test_server_killed_in_a_round_resumes_and_its_clients_roll_back(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, clients = start(place, wards)
    clients[0].wait_for("step", round=1, step=10)
    server.command.kill()
    for client in clients:
        client.wait_for_stderr(f"waiting for the server at {server.url}")
    again = server.again()
    finish(*clients, again.command)
    for client in clients:
        assert client.wait_for("server_restarted")["durable_round"] == 0
        assert [event["step"] for event in client.named("step", round=1)].count(0) == 2  # round 1 was trained again


def test_server_killed_before_its_first_round_is_durable_starts_over(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, clients = start(place, wards)
    clients[1].wait_for("step", round=0, step=10)
    server.command.kill()
    finish(*clients, server.again().command)
    assert clients[0].wait_for("server_restarted")["durable_round"] == -1


def test_server_interrupted_in_a_round_exits_130_and_resumes(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, clients = start(place, wards)
    clients[0].wait_for("step", round=1, step=10)
    server.command.interrupt()
    assert server.command.wait() == 130
    assert "Start again with --resume" in server.command.stderr
    assert "Traceback" not in server.command.stderr
    finish(*clients, server.again().command)


def test_server_interrupted_twice_stops_at_once(place: Place, wards: dict[str, Path], finish: Finish) -> None:
    server, clients = start(place, wards)
    clients[0].wait_for("step", round=0, step=1)
    for client in clients:
        os.kill(client.pid, signal.SIGSTOP)  # no client answers: an orderly end would wait for them
    server.command.interrupt()
    try:
        server.command.wait(1.5)
    except AssertionError:
        server.command.interrupt()
    assert server.command.wait(1.0) == 130
    for client in clients:
        os.kill(client.pid, signal.SIGCONT)
    finish(*clients, server.again().command)


def test_server_restarted_after_the_end_still_hands_out_the_merge(place: Place, wards: dict[str, Path]) -> None:
    settings = with_settings(SETTINGS, rounds={"count": 1, "local_steps": 2}, trunk={"grace_s": 1.0})
    server, clients = start(place, wards, settings)
    assert [command.wait() for command in (*clients, server.command)] == [0, 0, 0]
    kept = place.folder / "client-a/merged.safetensors"
    merged = load_file(kept)
    kept.unlink()  # as if it had missed the end
    again = server.again()
    late = place.join(server.url, "a", wards["a"])
    assert [late.wait(), again.command.wait()] == [0, 0]
    assert_same(load_file(kept), merged)


def test_full_disk_leaves_the_older_round_whole_and_the_federation_goes_on_with_room(
    place: Place, wards: dict[str, Path], finish: Finish
) -> None:
    server, clients = start(place, wards)
    server.command.wait_for("round_durable", round=0)
    uploads = max(path.stat().st_size for path in (place.folder / "server/rounds/round-000000").glob("merged*"))
    server.command.limit_files(uploads + 4096)  # uploads fit, the moments of the trunk do not
    told = server.command.wait_for("storage_error", round=1)
    assert "File too large" in told["error"]
    assert "the older state is whole" in told["error"]
    names = sorted(path.name for path in (place.folder / "server/rounds").iterdir())
    assert names == ["round-000000"]  # no half-written folder beside it
    server.command.kill()
    finish(*clients, server.again().command)
    assert clients[0].wait_for("server_restarted")["durable_round"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_server_killed_at_any_moment_changes_no_bit(
    place: Place, wards: dict[str, Path], finish: Finish, seed: int
) -> None:
    chance = random.Random(seed)
    server, clients = start(place, wards)
    for _ in range(5):
        time.sleep(chance.uniform(0.0, 2.0))
        server.command.kill()
        server = server.again()
    finish(*clients, server.command)
