"""What stands before the gate: terms, the key that countersigns, the ledger's past, the unit, and who may take part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import agree, private_settings

from client_model.floor import Floor
from client_model.guard import Guard
from client_model.records import ClientData, open_tokenizer
from client_model.store import ClientStore
from splitfl.config import Federation, parse_federation
from splitfl.errors import PrivacyError
from splitfl.federation.agreement import Terms
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import ReleaseKind
from splitfl.privacy.witness import Mark

MODEL = "ab" * 32


def settings(mode: str = "measured", **privacy: Any) -> Federation:
    if mode == "off":
        return parse_federation({"batch": {"max_length": 8, "records": 2}}, "the test")
    return private_settings(mode, **privacy)


class Client:
    """A state folder with its key beside it, as a client opens it in every start."""

    def __init__(self, folder: Path, model: Path, text: Path) -> None:
        self.state, self.key, self.text = folder / "state", folder / "key", text
        self.tokenizer = open_tokenizer(model)

    def guard(self) -> Guard:
        return Guard(ClientStore(self.state), self.key)

    def data(self, chosen: Federation) -> ClientData:
        return ClientData.open(self.text, chosen, self.tokenizer)

    def start(self, chosen: Federation) -> tuple[Guard, Gate]:
        guard, data = self.guard(), self.data(chosen)
        guard.check_terms(Terms(chosen, MODEL), agree)
        guard.check_floor(chosen, data, Floor())
        return guard, guard.open_gate(chosen, data, "cut 1", bottom_trains=False)


@pytest.fixture
def client(tmp_path: Path, small_model: Path, wards: dict[str, Path]) -> Client:
    return Client(tmp_path, small_model, wards["a"])


def report_of(started: tuple[Guard, Gate]) -> dict[str, Any]:
    guard, gate = started
    return guard.report(gate)


def refs(*numbers: int) -> list[RecordRef]:
    return [RecordRef(bytes([number]) * 16, 8) for number in numbers]


def test_terms_that_are_not_accepted_leave_no_trace(client: Client) -> None:
    guard, terms = client.guard(), Terms(settings(), MODEL)
    with pytest.raises(PrivacyError, match="not accepted") as caught:
        guard.check_terms(terms, lambda _: False)
    assert terms.sha256[:12] in caught.value.remedy
    assert guard.ledger.count == 0


def test_terms_are_asked_for_once_and_again_when_they_change_back(client: Client) -> None:
    guard, old, new = client.guard(), Terms(settings(), MODEL), Terms(settings(noise_multiplier=0.2), MODEL)
    guard.check_terms(old, agree)
    client.guard().check_terms(old, lambda _: pytest.fail("asked again"))
    guard.check_terms(new, agree)
    with pytest.raises(PrivacyError, match=r"terms have changed \(privacy\)"):
        guard.check_terms(old, lambda _: False)


def test_a_floor_is_held_against_the_noise_of_these_records_whatever_was_accepted(client: Client) -> None:
    guard, chosen = client.guard(), settings(noise_multiplier=0.2)
    guard.check_terms(Terms(chosen, MODEL), agree)
    guard.check_floor(chosen, client.data(chosen), Floor.parse("measured:0.2,weights:0"))
    with pytest.raises(PrivacyError, match="floor"):
        guard.check_floor(chosen, client.data(chosen), Floor.parse("measured:0.3,weights:0"))


def test_agreeing_taints_nothing_and_a_gradient_does_for_good(client: Client) -> None:
    chosen = settings(gradients="noised")
    guard, gate = client.start(chosen)
    gate.once.release(ReleaseKind.ACTIVATION, 0, refs(1, 2), lambda: torch.randn(2, 8, 4))
    assert guard.report(gate)["epsilon"] is not None
    guard, gate = client.start(chosen)
    assert guard.report(gate)["epsilon"] is not None
    gate.release(ReleaseKind.GRADIENT, 0, torch.randn(2, 8, 4), refs(1, 2))
    for report in (guard.report(gate), report_of(client.start(chosen))):
        assert (report["epsilon"], report["epsilon_activations"] is None) == (None, False)


def test_another_countersigning_key_stops_a_private_client_alone(client: Client) -> None:
    guard = client.guard()
    guard.check_signer("ab" * 32, private=True)
    client.guard().check_signer("ab" * 32, private=True)
    with pytest.raises(PrivacyError, match="another key"):
        guard.check_signer("cd" * 32, private=True)
    guard.check_signer("cd" * 32, private=False)
    guard.check_signer("cd" * 32, private=True)  # the one that was seen last


def test_a_ledger_that_went_back_stops_a_private_client_and_is_said_in_mode_off(client: Client) -> None:
    guard, _ = client.start(settings())
    newest = Mark(guard.ledger.count, guard.ledger.head.hex())
    assert guard.check_mark(newest, private=True)
    assert guard.check_mark(Mark(0, bytes(32).hex()), private=True)
    shutil.rmtree(client.state)
    client.key.unlink()
    again = client.guard()
    assert not again.check_mark(newest, private=False)
    with pytest.raises(PrivacyError, match="not the one that the server countersigned"):
        again.check_mark(newest, private=True)


@pytest.mark.parametrize("joint", ["steps of DP-SGD", "held-out losses"])
def test_what_was_counted_record_by_record_is_not_enough_for_a_whole_client(client: Client, joint: str) -> None:
    _, gate = client.start(settings(dp_sgd=True))
    if joint == "steps of DP-SGD":
        gate.charge_dp_sgd(0, refs(1, 2))
    else:
        gate.release_metric(0, [1.0, 2.0], refs(1, 2))
    with pytest.raises(PrivacyError, match="whole client is not known"):
        client.start(settings(dp_sgd=True, unit="client"))
    client.start(settings(dp_sgd=True))


def test_activations_of_single_records_add_up_to_a_clients(client: Client) -> None:
    _, gate = client.start(settings())
    gate.once.release(ReleaseKind.ACTIVATION, 0, refs(1, 2), lambda: torch.randn(2, 8, 4))
    client.start(settings(unit="client"))


def test_everybody_may_take_part_with_privacy_off_and_budgets_decide_else(client: Client) -> None:
    guard, gate = client.start(settings("off"))
    assert guard.spend(gate) is None
    guard, gate = client.start(settings("certified"))
    first, again = guard.spend(gate), refs(1)[0]
    assert first is not None
    assert first(again.key, 8, True)
    gate.once.release(ReleaseKind.ACTIVATION, 0, [again], lambda: torch.randn(1, 8, 4))
    replanned = guard.open_gate(settings("certified"), client.data(settings("certified")), "cut 2", bottom_trains=False)
    later = guard.spend(replanned)
    assert later is not None
    assert not later(again.key, 8, True)


@pytest.mark.parametrize("trains", [True, False])
def test_the_gate_is_told_whether_the_bottom_trains(client: Client, trains: bool) -> None:
    chosen = settings()
    gate = client.guard().open_gate(chosen, client.data(chosen), "cut 1", bottom_trains=trains)
    assert gate.policy.bottom_trains == trains


def test_records_are_named_by_the_clients_own_key(client: Client, tmp_path: Path) -> None:
    chosen = settings()
    _, gate = client.start(chosen)
    other = Guard(ClientStore(tmp_path / "other"), tmp_path / "other key")
    elsewhere = other.open_gate(chosen, client.data(chosen), "cut 1", bottom_trains=False)
    assert gate.once.name_of(refs(1)[0]) != elsewhere.once.name_of(refs(1)[0])
    assert len(gate.keepsakes.chosen) == min(chosen.privacy.audit_records, len(client.data(chosen).train))
    assert not gate.keepsakes.chosen & elsewhere.keepsakes.chosen


def test_a_report_takes_an_audit_of_this_very_ledger_alone(client: Client) -> None:
    guard, gate = client.start(settings())
    gate.once.release(ReleaseKind.ACTIVATION, 0, refs(1), lambda: torch.randn(1, 8, 4))
    found: dict[str, Any] = {"rows": guard.ledger.count, "head": guard.ledger.head.hex()}
    path = client.state / "audit.json"
    path.write_text(json.dumps(found | {"recovery": 0.25, "interval": [0.2, 0.3]}))
    assert "recovered 25%" in guard.report(gate)["statement"]
    gate.once.release(ReleaseKind.ACTIVATION, 0, refs(2), lambda: torch.randn(1, 8, 4))
    assert "Not audited yet" in guard.report(gate)["statement"]
