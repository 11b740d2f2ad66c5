"""GET /status on the service's own port: what it is doing, for the machine that it runs on and nobody else."""

from __future__ import annotations

import json
import time
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from processes import Place, Server

import server_model.disk
import server_model.store
from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from server_model.status import answer, status
from splitfl.config import parse_federation
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

SETTINGS: dict[str, dict[str, Any]] = {
    "rounds": {"count": 2, "local_steps": 1000, "min_clients": 1},
    "batch": {"records": 4, "max_length": 32},
    "model": {"n_bottom": 1, "n_top": 1},
    "evaluation": {"records": 4},
}


def get(server: Server, path: str = "/status", **headers: str) -> tuple[int, str, str]:
    """Status code, content type and body."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers.get("Content-Type", ""), response.read().decode()


def test_status_follows_the_federation(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve({**SETTINGS, "rounds": {**SETTINGS["rounds"], "min_clients": 2}})
    code, kind, body = get(server)
    assert (code, kind) == (200, "application/json")
    told = json.loads(body)
    assert (told["phase"], told["round"], told["rounds"], told["durable_round"]) == ("gathering", 0, 2, -1)
    assert (told["federation"], told["missing"], told["clients"]) == ("federation", 2, [])
    clients = {name: place.join(server.url, name, data) for name, data in wards.items()}
    clients["a"].wait_for("step", count=3)
    told = json.loads(get(server)[2])
    assert (told["phase"], told["cohort"], told["missing"]) == ("training", ["a", "b"], 0)
    assert told["steps_applied"] >= 2
    assert [one["name"] for one in told["clients"]] == ["a", "b"]
    for one in told["clients"]:
        assert (one["connected"], one["cut"], one["codec"]) == (True, "1,1", "bf16")
        assert one["bytes_in"] > 0
        assert one["bytes_out"] > 0
    clients["b"].kill()
    server.command.wait_for("disconnected", client="b")
    told = json.loads(get(server)[2])  # the others wait for it, and the service still answers
    assert [one["connected"] for one in told["clients"]] == [True, False]
    until = time.monotonic() + 30
    while told["waiting_for"] != ["b"] and time.monotonic() < until:  # once the other one has done its part
        time.sleep(0.05)
        told = json.loads(get(server)[2])
    assert told["waiting_for"] == ["b"]
    assert [one["takes_part"] for one in told["clients"]] == [True, True]
    assert "token" not in get(server)[2]


def test_status_tells_merges_ends_and_what_holds_them_up(
    small_model: Path, wards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process: what the service would answer whenever something is reported."""
    told: list[dict[str, Any]] = []
    coordinators: list[Coordinator] = []
    write, failures = server_model.store.write_tensors, [1]

    def full_at_first(*arguments: Any) -> None:
        if failures.pop() if failures else 0:
            raise OSError(28, "No space left on device")
        write(*arguments)

    def look(_: object) -> None:
        if coordinators:
            told.append(status(coordinators[0]))

    monkeypatch.setattr(server_model.store, "write_tensors", full_at_first)
    monkeypatch.setattr(server_model.disk, "RETRY_S", 0.01)
    chosen = parse_federation({**SETTINGS, "rounds": {"count": 1, "local_steps": 1}}, "the test")
    coordinator = Coordinator(small_model, chosen, tmp_path / "server", device=torch.device("cpu"), report=look)
    coordinators.append(coordinator)
    with MemoryService(coordinator) as service:
        client = Participant("a", wards["a"], ClientStore(tmp_path / "a"), tmp_path / "cache", torch.device("cpu"))
        client.accept, client.key_file = (lambda _: True), tmp_path / "key"
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        client.run(link, link.open(), URL)
    held_up, then = [one for one in told if one["held_up"]]  # kept activations make room, and the disk is named
    assert held_up == then
    assert "No space left on device" in held_up["held_up"]
    assert (held_up["phase"], held_up["updates"], held_up["durable_round"]) == ("merging", ["a"], -1)
    assert (told[-1]["phase"], told[-1]["durable_round"], told[-1]["held_up"]) == ("finished", 0, "")


def test_other_paths_are_no_pages_and_names_of_other_machines_are_refused(place: Place) -> None:
    server = place.serve(SETTINGS)
    assert get(server, "/")[0] == HTTPStatus.UPGRADE_REQUIRED
    assert get(server, "/status/x")[0] == HTTPStatus.UPGRADE_REQUIRED
    for name in ("evil.example", "evil.example:7000", "127.0.0.1.evil.example", "10.0.0.1", ""):
        code, _, body = get(server, Host=name)
        assert code == HTTPStatus.FORBIDDEN
        assert "phase" not in body
    for name in ("[", "127.0.0.1:x", "//["):
        assert get(server, Host=name)[0] in (HTTPStatus.FORBIDDEN, HTTPStatus.OK)
    for path in ("//[", "/%5B", "/status//["):
        assert get(server, path)[0] == HTTPStatus.UPGRADE_REQUIRED
    assert "Traceback" not in server.command.stderr
    for name in (f"localhost:{server.port}", "127.0.0.1", "[::1]:7000"):
        assert get(server, Host=name)[0] == HTTPStatus.OK


@pytest.mark.parametrize("peer", ["10.0.0.5", "192.168.1.1", "2001:db8::1", "nonsense", ""])
def test_other_machines_are_told_nothing(peer: str) -> None:
    told = answer(cast(Coordinator, None), "/status?x=1", "127.0.0.1:7000", peer)
    assert told is not None
    assert told[0] == HTTPStatus.FORBIDDEN
    assert answer(cast(Coordinator, None), "/", "127.0.0.1:7000", peer) is None
