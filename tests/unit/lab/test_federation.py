"""A federation in one process: it learns, repeats itself to the bit, and ends cleanly however it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from client_model.assets import Assets
from client_model.records import ClientData, open_tokenizer
from server_model.coordinator import Coordinator
from server_model.merge import Aggregator
from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.data.notes import generate_notes, write_notes
from splitfl.errors import ConfigError, DataError, LinkError, ProtocolError, RefusedError
from splitfl.lab.federation import (
    FederationEvent,
    FederationResult,
    hello_of,
    run_federation,
)
from splitfl.lab.memory import MemoryLink, MemoryService
from splitfl.lab.whole import WholeModel, local_steps, train_like_federation
from splitfl.split.create import create_checkpoint
from splitfl.wire.messages import PROTOCOL_VERSIONS, Fetch, Hello, NextRound

pytestmark = pytest.mark.usefixtures("no_thread_stays_behind")

CPU = torch.device("cpu")
LAYERS = 4
NO_BLOB = "0" * 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    corpus = generate_notes("general", 40, 7)
    create_checkpoint(folder, family="llama", layers=LAYERS, hidden=64, vocab=400, corpus=corpus, seed=3, max_length=64)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("notes")
    paths = {specialty: folder / f"{specialty}.jsonl" for specialty in ("oncology", "cardiology")}
    for specialty, path in paths.items():
        write_notes(path, specialty, 30, seed=1)
    return paths


@pytest.fixture(scope="module")
def result(model: Path, data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> FederationResult:
    return run_federation(model, data, settings(), tmp_path_factory.mktemp("first"))


def settings(**tables: dict[str, Any]) -> Federation:
    """Two short rounds, unless said otherwise."""
    defaults: dict[str, dict[str, Any]] = {
        "rounds": {"count": 2, "local_steps": 3},
        "batch": {"records": 4, "max_length": 32},
        "optimizer": {"learning_rate": 3e-3},
        "evaluation": {"held_out_fraction": 0.2, "records": 8},
    }
    merged = {name: {**defaults.get(name, {}), **tables.get(name, {})} for name in {**defaults, **tables}}
    return parse_federation(merged, "the test")


def assert_same_weights(one: FederationResult, other: FederationResult) -> None:
    first, second = one.weights(), other.weights()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_federation_lowers_every_clients_held_out_loss(result: FederationResult, data: dict[str, Path]) -> None:
    for client in data:
        curve = result.held_out_losses(client)
        assert [steps for steps, _ in curve] == [0, 3, 6]
        assert curve[-1][1] < curve[0][1] - 0.1
        assert [step for step, _ in result.training_losses(client)] == [1, 2, 3, 4, 5, 6]
        assert all(count > 10_000 for count in result.reports[client]["bytes"].values())


def test_federation_leaves_state_and_nothing_else(result: FederationResult, data: dict[str, Path]) -> None:
    assert sorted(path.name for path in result.folder.iterdir()) == ["clients", "server"]
    merged = [load_file(result.client_state(client) / "merged.safetensors") for client in data]
    assert all(torch.equal(tensor, result.weights()[name]) for ends in merged for name, tensor in ends.items())


def test_federation_reports_events_of_clients_and_service(result: FederationResult, data: dict[str, Path]) -> None:
    heard = {(told.client, told.event) for told in result.events}
    assert {("", "round_open"), ("", "finished")} <= heard
    assert {(client, event) for client in data for event in ("step", "evaluation", "round_durable")} <= heard
    assert result.events[-1].event == "left"


def test_exported_model_opens_in_transformers(result: FederationResult, tmp_path: Path) -> None:
    opened = AutoModelForCausalLM.from_pretrained(result.export(tmp_path / "out")).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in result.weights().items())


def test_federation_run_twice_gives_the_same_weights(
    model: Path, data: dict[str, Path], result: FederationResult, tmp_path: Path
) -> None:
    reversed_data = dict(reversed(data.items()))  # who is named first must not matter either
    assert_same_weights(run_federation(model, reversed_data, settings(), tmp_path / "again"), result)


def test_federation_with_another_seed_gives_other_weights(
    model: Path, data: dict[str, Path], result: FederationResult, tmp_path: Path
) -> None:
    other = run_federation(model, data, settings().model_copy(update={"seed": 1}), tmp_path / "other").weights()
    assert any(not torch.equal(other[name], tensor) for name, tensor in result.weights().items())


def test_clients_with_different_cuts_share_the_blocks_they_have(
    model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    cuts = {"oncology": Cut(1, 1), "cardiology": Cut(0, 2)}
    allowed = settings(model={"min_bottom": 0, "max_top": 2, "freeze_below": 0})
    result = run_federation(model, data, allowed, tmp_path / "fed", cuts=cuts)
    assert {client: result.reports[client]["cut"] for client in data} == {"oncology": "1,1", "cardiology": "0,2"}
    for client in data:
        assert result.held_out_losses(client)[-1][1] < result.held_out_losses(client)[0][1] - 0.1
        ends = load_file(result.client_state(client) / "merged.safetensors")
        assert all(torch.equal(tensor, result.weights()[name]) for name, tensor in ends.items())


def test_cohort_is_a_part_of_the_clients(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    some = settings(rounds={"count": 3, "client_fraction": 0.5})
    result = run_federation(model, data, some, tmp_path / "fed")
    cohorts = [told.facts["cohort"] for told in result.events if told.event == "round_open"]
    assert [len(cohort) for cohort in cohorts] == [1, 1, 1]
    for client in data:
        assert len(result.training_losses(client)) == 3 * sum(client in cohort for cohort in cohorts)


@pytest.mark.parametrize("own", [{}, {"client_name": "sgd", "client_learning_rate": 0.5}])
def test_federation_of_one_is_the_whole_model_trained_alike(
    own: dict[str, Any], model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    chosen = settings(optimizer=own, wire={"codec": "fp32"}, model={"compute": "fp32"})
    one = run_federation(model, {"oncology": data["oncology"]}, chosen, tmp_path / "run").weights()
    whole = WholeModel(model, chosen, CPU)
    train_like_federation(
        whole, local_steps(ClientData.open(data["oncology"], chosen, open_tokenizer(model)), "oncology")
    )
    before = WholeModel(model, chosen, CPU)
    moved = [
        name for name, weight in whole.segment.named_weights() if not torch.equal(weight, weights_of(before)[name])
    ]
    assert {"lm_head.weight", "model.layers.2.mlp.up_proj.weight"} <= set(moved)
    for name in moved:
        torch.testing.assert_close(one[name], weights_of(whole)[name].detach(), rtol=1e-3, atol=1e-5)


def weights_of(model: WholeModel) -> dict[str, torch.Tensor]:
    return dict(model.segment.named_weights())


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_clients_bad_data_stops_the_federation(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"broken\.jsonl"):
        run_federation(model, {**data, "third": tmp_path / "broken.jsonl"}, settings(), tmp_path / "fed")


@pytest.mark.parametrize(("client", "event"), [("oncology", "step"), ("", "round_durable"), ("", "round_open")])
def test_failure_in_the_middle_stops_the_federation(
    client: str, event: str, model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    def report(told: FederationEvent) -> None:
        if (told.client, told.event) == (client, event):
            raise ZeroDivisionError("as planned")

    with pytest.raises(ZeroDivisionError, match="as planned"):
        run_federation(model, data, settings(), tmp_path / "fed", report=report)


def test_cut_that_is_not_allowed_is_refused(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"cut 1,2 is not allowed"):
        run_federation(model, data, settings(), tmp_path / "fed", cuts={"oncology": Cut(1, 2)})


def test_arguments_that_cannot_work_are_refused_before_anything_is_written(
    model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    new = tmp_path / "new"
    with pytest.raises(ConfigError, match="without clients"):
        run_federation(model, {}, settings(), new)
    with pytest.raises(ConfigError, match="min_clients = 3, but there are 2"):
        run_federation(model, data, settings(rounds={"min_clients": 3}), new)
    with pytest.raises(ConfigError, match="a cut for 'nobody'"):
        run_federation(model, data, settings(), new, cuts={"nobody": Cut(1, 1)})
    with pytest.raises(ConfigError, match="is in use"):
        run_federation(model, data, settings(), tmp_path / "used")
    assert not new.exists()


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(model: Path, tmp_path: Path) -> Iterator[MemoryService]:
    with MemoryService(Coordinator(model, settings(), tmp_path / "state", device=CPU)) as service:
        yield service


def test_link_counts_whole_frames(service: MemoryService) -> None:
    link = MemoryLink(service, hello_of("a", None))
    welcome = link.open()
    sent, received = link.bytes_sent, link.bytes_received
    chunk = link.ask(Fetch(0, 0, welcome.manifest, 0, 100))
    assert 64 < link.bytes_sent - sent < 256
    assert 100 < link.bytes_received - received < 512
    assert (chunk.seq, link.next_seq) == (0, 1)


def test_link_raises_refusals_and_goes_on(service: MemoryService) -> None:
    link = MemoryLink(service, hello_of("a", None))
    welcome = link.open()
    with pytest.raises(RefusedError, match="no blob") as refused:
        link.ask(Fetch(0, 0, NO_BLOB, 0, 100))
    assert refused.value.code == "not_found"
    link.ask(Fetch(0, 0, welcome.manifest, 0, 100))


def test_second_client_of_a_name_is_refused_until_the_first_hangs_up(service: MemoryService) -> None:
    first, second = (MemoryLink(service, hello_of("a", None)) for _ in range(2))
    first.open()
    with pytest.raises(RefusedError, match="connected already"):
        second.open()
    first.close()
    with pytest.raises(LinkError, match="closed"):
        first.ask(NextRound(0, 0, -1))
    assert second.open().session != ""


def test_link_must_be_opened_before_it_is_asked(service: MemoryService) -> None:
    with pytest.raises(LinkError, match="not open"):
        MemoryLink(service, hello_of("a", None)).ask(NextRound(0, 0, -1))


def test_client_of_another_version_is_refused(service: MemoryService) -> None:
    with pytest.raises(ProtocolError, match="speaks protocol"):
        MemoryLink(service, Hello((max(PROTOCOL_VERSIONS) + 1,), "a")).open()


def test_end_of_the_service_fails_what_is_unanswered(model: Path, tmp_path: Path) -> None:
    waits_for_more = settings(rounds={"min_clients": 2})
    with MemoryService(Coordinator(model, waits_for_more, tmp_path / "state", device=CPU)) as service:
        link = MemoryLink(service, hello_of("a", None))
        link.open()
        waiting = link.request(NextRound(0, 0, -1))
        assert not waiting.done()
    with pytest.raises(LinkError, match="has ended"):
        waiting.result(timeout=5)
    with pytest.raises(LinkError, match="has ended"):
        link.ask(NextRound(0, 0, -1))
    link.close()


def test_failed_service_raises_its_first_error_at_every_client(service: MemoryService) -> None:
    first, second = (MemoryLink(service, hello_of(name, None)) for name in "ab")
    first.open()
    service.fail(ZeroDivisionError("the first"))
    service.fail(LinkError("the second"))
    with pytest.raises(ZeroDivisionError, match="the first"):
        first.ask(NextRound(0, 0, -1))
    with pytest.raises(ZeroDivisionError, match="the first"):
        second.open()


def refuse_merges(monkeypatch: pytest.MonkeyPatch, refused: set[int]) -> None:
    """The server does not have the merges that a client asks for the n-th time, ``refused`` counted from 1."""
    calls, take = count(1), Assets.weights

    def weights(self: Assets, digest: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        if next(calls) in refused:
            raise RefusedError("no blob", code="not_found")
        return take(self, digest, names)

    monkeypatch.setattr(Assets, "weights", weights)


def test_merge_that_is_gone_before_a_slow_client_has_it_is_asked_for_anew(
    model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"oncology": data["oncology"]}
    undisturbed = run_federation(model, alone, settings(), tmp_path / "undisturbed")
    refuse_merges(monkeypatch, {1})
    disturbed = run_federation(model, alone, settings(), tmp_path / "disturbed")
    assert [event.client for event in disturbed.events if event.event == "merge_missed"] == ["oncology"]
    assert_same_weights(undisturbed, disturbed)


def test_server_that_names_a_merge_again_and_does_not_have_it_ends_the_client(
    model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_merges(monkeypatch, {1, 2})
    with pytest.raises(RefusedError, match="no blob"):
        run_federation(model, {"oncology": data["oncology"]}, settings(), tmp_path / "run")


def test_fault_in_the_services_background_stops_the_federation(
    model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Aggregator, "merge", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_federation(model, data, settings(), tmp_path / "fed")
