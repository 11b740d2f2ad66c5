"""What the service does to the trunk between rounds, beside the merge itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import server_model.disk
from server_model.coordinator import Coordinator
from server_model.exporting import all_weights
from server_model.store import RoundState
from server_model.updates import ClientUpdate
from splitfl.config import parse_federation
from splitfl.data.notes import generate_notes
from splitfl.errors import ConfigError
from splitfl.federation.rounds import Discounted, MergeRound, Phase, RoundMachine
from splitfl.files import storage_errors
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Failed, Hello, NextRound, RoundOpen, TensorBytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds") / "m"
    texts = generate_notes("general", 30, 0)
    create_checkpoint(folder, family="llama", layers=4, hidden=64, vocab=400, corpus=texts, seed=0, max_length=64)
    return folder


def test_round_that_everybody_left_opens_again_from_the_last_durable_trunk(model, tmp_path):
    async def leave_and_return() -> dict[str, bool]:
        coordinator = Coordinator(model, parse_federation({}, "the test"), tmp_path / "s", device=torch.device("cpu"))
        before = {name: weight.clone() for name, weight in coordinator.engine.trunk.weights().items()}
        member, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "a"))
        assert isinstance(await coordinator.handle(member, NextRound(0, 0, -1)), RoundOpen)
        for weight in coordinator.engine.trunk.trainable().values():
            weight.data.add_(1.0)  # as half a round's steps would
        coordinator.members.forget(member, "the test")
        member, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "a"))
        opened = await coordinator.handle(member, NextRound(0, 0, -1))
        assert isinstance(opened, RoundOpen)
        assert opened.round == 0
        after = await coordinator.engine.call(coordinator.engine.trunk.weights)
        coordinator.close()
        return {name: torch.equal(before[name], after[name]) for name in before}

    same = asyncio.run(leave_and_return())
    assert same
    assert all(same.values())


def test_request_that_is_worked_on_after_its_session_ended_leaves_nobody_to_wait_for(model, tmp_path):
    """A frame's work begins a turn of the loop after it came, and a revocation may lie between."""

    async def ask() -> tuple[object, object]:
        coordinator = Coordinator(model, parse_federation({}, "the test"), tmp_path / "s", device=torch.device("cpu"))
        gone, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "gone"))
        coordinator.members.forget(gone, "the test")
        refused = await coordinator.handle(gone, NextRound(0, 0, -1))
        member, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "a"))
        opened = await asyncio.wait_for(coordinator.handle(member, NextRound(0, 0, -1)), 30)
        assert coordinator.rounds.machine.cohort == {"a"}
        coordinator.close()
        return refused, opened

    refused, opened = asyncio.run(ask())
    assert isinstance(refused, Failed)
    assert "this session has ended" in refused.reason
    assert isinstance(opened, RoundOpen)


def test_disk_that_is_full_gets_the_room_of_kept_releases_and_nobody_is_waited_for(model, tmp_path, monkeypatch):
    said: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(server_model.disk, "RETRY_S", 0.01)

    async def write() -> None:
        settings = parse_federation({"rounds": {"min_clients": 2}}, "the test")
        coordinator = Coordinator(model, settings, tmp_path / "s", device=torch.device("cpu"))
        rounds, releases = coordinator.rounds, coordinator.releases
        rounds.say = lambda event, **facts: said.append((event, facts))
        member, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "a"))
        waiting = asyncio.create_task(coordinator.handle(member, NextRound(0, 0, -1)))
        releases.put("a", "00" * 16, TensorBytes("f32", (2, 64), bytes(512)))
        await asyncio.sleep(0)
        assert rounds.awaited() == ([], 1)

        def fill() -> str:
            with storage_errors(tmp_path):
                if releases.size:
                    raise OSError(28, "No space left on device")
            assert "No space left" in rounds.trouble
            assert rounds.awaited() == ([], 0)
            return "written"

        assert await asyncio.wait_for(rounds.written(fill), 30) == "written"
        assert rounds.trouble == ""
        assert not releases.holds("a", "00" * 16)
        assert list((tmp_path / "s" / "releases").glob("*.bin")) == []
        waiting.cancel()
        coordinator.close()

    asyncio.run(write())
    assert ("storage_error", 0) in [(event, facts.get("round")) for event, facts in said]


def test_deadline_rings_between_rounds_and_the_round_opens_without_who_is_on_its_way(model, tmp_path):
    async def ask() -> object:
        settings = parse_federation({"rounds": {"deadline_s": 0.05}}, "the test")
        coordinator = Coordinator(model, settings, tmp_path / "s", device=torch.device("cpu"))
        coordinator.rounds.machine.present.add("b")  # was in an earlier round, and never asks again
        member, _ = coordinator.hello(Hello(PROTOCOL_VERSIONS, "a"))
        opened = await asyncio.wait_for(coordinator.handle(member, NextRound(0, 0, -1)), 30)
        coordinator.close()
        return opened

    assert isinstance(asyncio.run(ask()), RoundOpen)


def test_merge_takes_late_updates_once_and_leaves_those_that_come_while_it_runs_to_the_next(model, tmp_path):
    async def merge() -> tuple[Coordinator, object]:
        settings = parse_federation({"rounds": {"deadline_s": 9.0, "staleness": "polynomial"}}, "the test")
        coordinator = Coordinator(model, settings, tmp_path / "s", device=torch.device("cpu"))
        rounds = coordinator.rounds
        rounds.machine = RoundMachine(settings, 1, Phase.MERGING)
        superseded = tmp_path / "superseded"
        superseded.touch()
        rounds._updates = {"a": ClientUpdate("a", 5, None)}
        rounds._late = {"a": ClientUpdate("a", 5, superseded), "b": ClientUpdate("b", 5, None)}
        rounds._act(coordinator.members, [MergeRound(1, ("a",), (Discounted("b", 0, 0.7),))])
        rounds._late["b"] = ClientUpdate("b", 6, None)  # of round 1, before the merge's task has begun
        while rounds.durable < 1:
            await asyncio.sleep(0.001)
        coordinator.close()
        assert not superseded.exists()
        return coordinator, rounds._late

    coordinator, late = asyncio.run(merge())
    assert coordinator.rounds.aggregator.contributors == {"a", "b"}
    assert late == {"b": ClientUpdate("b", 6, None)}


def test_tensor_whose_merge_is_not_finite_stays_and_the_operator_hears_its_name(model, tmp_path):
    said: list[tuple[str, dict[str, object]]] = []

    async def merge() -> Coordinator:
        settings = parse_federation({"merge": {"strategy": "fedadam"}}, "the test")
        coordinator = Coordinator(model, settings, tmp_path / "s", device=torch.device("cpu"))
        rounds = coordinator.rounds
        rounds.say = lambda event, **facts: said.append((event, facts))
        rounds.machine = RoundMachine(settings, 0, Phase.MERGING)
        head = coordinator.source.read("lm_head.weight").float()
        save_file({"lm_head.weight": head + 1e25}, tmp_path / "lie")
        rounds._updates = {"a": ClientUpdate("a", 5, tmp_path / "lie")}
        rounds._act(coordinator.members, [MergeRound(0, ("a",))])
        while rounds.durable < 0:
            await asyncio.sleep(0.001)
        coordinator.close()
        assert torch.equal(rounds.aggregator.merged["lm_head.weight"], head)
        return coordinator

    assert asyncio.run(merge()).rounds.aggregator.remembered == {}
    refused = {"round": 0, "tensors": ["lm_head.weight"], "reason": "their merge would not be finite"}
    assert ("merge_refused", refused) in said


def test_krum_of_too_few_updates_merges_nobody_and_says_so(model, tmp_path):
    said: list[tuple[str, dict[str, object]]] = []

    async def merge() -> tuple[Coordinator, bool]:
        tables = {"merge": {"aggregate": "krum"}, "rounds": {"min_clients": 5}}
        coordinator = Coordinator(
            model, parse_federation(tables, "the test"), tmp_path / "s", device=torch.device("cpu")
        )
        rounds = coordinator.rounds
        rounds.say = lambda event, **facts: said.append((event, facts))
        rounds.machine = RoundMachine(coordinator.settings, 0, Phase.MERGING)
        head = coordinator.source.read("lm_head.weight").float()
        save_file({"lm_head.weight": head + 1.0}, tmp_path / "upload")
        rounds._updates = {"a": ClientUpdate("a", 5, tmp_path / "upload")}  # the others have left
        answer = rounds._desk.update["a"] = asyncio.get_running_loop().create_future()
        rounds._act(coordinator.members, [MergeRound(0, ("a",))])
        heard = await answer
        coordinator.close()
        assert torch.equal(rounds.aggregator.merged["lm_head.weight"], head)
        return coordinator, heard.merged

    coordinator, counts = asyncio.run(merge())
    assert not counts
    assert coordinator.rounds.aggregator.contributors == set()
    facts = dict(said)
    assert facts["merge_refused"]["tensors"] == ["lm_head.weight"]
    assert "too few updates" in str(facts["merge_refused"]["reason"])
    assert facts["round_durable"]["clients"] == []


def test_block_that_nobody_holds_in_a_round_moves_by_the_strategy_too(model, tmp_path):
    async def merge() -> tuple[Coordinator, dict[str, torch.Tensor]]:
        tables = {"merge": {"strategy": "fedavgm", "server_learning_rate": 0.5}, "model": {"max_top": 2}}
        coordinator = Coordinator(
            model, parse_federation(tables, "the test"), tmp_path / "s", device=torch.device("cpu")
        )
        trunk, rounds = coordinator.engine.trunk, coordinator.rounds
        before = {name: weight.clone() for name, weight in trunk.weights().items()}
        for weight in trunk.trainable().values():
            weight.data.add_(1.0)
        trunk.round_tokens.update(dict.fromkeys(trunk.blocks, 7))
        rounds.machine = RoundMachine(coordinator.settings, 0, Phase.MERGING)
        rounds._updates = {"a": ClientUpdate("a", 5, None)}
        rounds._act(coordinator.members, [MergeRound(0, ("a",))])
        while rounds.durable < 0:
            await asyncio.sleep(0.001)
        coordinator.close()
        return coordinator, before

    coordinator, before = asyncio.run(merge())
    held = {name for name in before if name.startswith("model.layers.2.")}  # in the top of Cut(1, 2)
    assert held == set(coordinator.rounds.aggregator.merged)
    assert {name.rpartition("/")[0] for name in coordinator.rounds.aggregator.remembered} == held
    after = coordinator.engine.trunk.weights()
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight + (0.5 if name in held else 1.0))


@pytest.mark.parametrize(("share", "part"), [("none", "head"), ("top", "bottom")])
def test_export_asks_for_a_client_when_ends_are_personal(share, part):
    settings = parse_federation({"merge": {"share": share}, "model": {"freeze_below": 0}}, "the test")
    with pytest.raises(ConfigError, match=f"every client has a {part} of its own"):
        all_weights(RoundState(0, {}, {}, {}, {}), settings, None)
