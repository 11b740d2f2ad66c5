"""What a server might try to get more, or sooner, than was agreed; and what an old state folder must not bring back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import agree

from client_model.guard import Guard
from client_model.journal import Head, Journal
from client_model.participant import Participant
from client_model.records import ClientData, open_tokenizer
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.config import Federation, parse_federation
from splitfl.errors import PrivacyError, ProtocolError, RefusedError
from splitfl.federation.agreement import Terms
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.wire.messages import PROTOCOL_VERSIONS, Forward, Hello, RoundOpen

CPU = torch.device("cpu")


def settings(privacy: dict[str, Any] | None = None, **tables: Any) -> Federation:
    base: dict[str, Any] = {
        "rounds": {"count": 1, "local_steps": 2},
        "batch": {"records": 4, "max_length": 32},
        "evaluation": {"records": 2, "baselines": "none"},
        "privacy": {"mode": "measured", "clip_norm": 1.0} if privacy is None else privacy,
    }
    return parse_federation({**base, **tables}, "the test")


def client(folder: Path, data: Path, **options: Any) -> Participant:
    return Participant("a", data, ClientStore(folder), folder.parent / "cache", CPU, accept=agree, **options)


def run(model: Path, chosen: Federation, server: Path, participant: Participant, **welcome: Any) -> dict[str, Any]:
    """One client through a federation; ``welcome`` is what the server lies about."""
    with MemoryService(Coordinator(model, chosen, server, device=CPU)) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        return participant.run(link, replace(link.open(), **welcome), URL)


def test_server_that_names_another_cut_than_the_terms_is_refused(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    with pytest.raises(ProtocolError, match="cut 0,1"):
        run(small_model, settings(), tmp_path / "server", client(tmp_path / "a", wards["a"]), n_bottom=0)


def test_weights_trained_under_other_terms_are_not_taken_up_again(
    tmp_path: Path, small_model: Path, wards: dict[str, Path]
) -> None:
    """Trained without DP and kept here; sent on after "certified" they would leave as if they had been paid for."""
    model = {"model": {"freeze_below": 1}}
    plain = settings({"mode": "measured", "clip_norm": 1.0}, merge={"share": "none"}, **model)
    run(small_model, plain, tmp_path / "first", client(tmp_path / "a", wards["a"]))
    store = ClientStore(tmp_path / "a")
    kept = store.newest(5)
    assert kept is not None
    certified = settings({"mode": "certified", "epsilon": 8.0, "dp_sgd": True, "clip_norm": 1.0}, **model)
    (tmp_path / "a" / "countersigner").unlink()  # as if it were the same server
    second = client(tmp_path / "a", wards["a"])
    with MemoryService(Coordinator(small_model, certified, tmp_path / "second", device=CPU)) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        welcome = replace(link.open(), round=0)  # "you hold round 0 already"
        second.link, second.url = link, URL
        second._prepare(welcome)
        second._go_on_from(welcome)
        started = second.ends.weights()
    assert any(not torch.equal(started[name], weight) for name, weight in kept.weights.items())
    assert second.round == -1


@pytest.mark.parametrize("other", ["terms", "signer"])
def test_session_is_not_gone_on_with_under_other_terms_or_with_another_key(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], other: str
) -> None:
    """What a journal holds was sent under the terms that it names: neither its weights nor its frames go elsewhere."""
    chosen = settings({"mode": "measured", "clip_norm": 1.0})
    with MemoryService(Coordinator(small_model, chosen, tmp_path / "server", device=CPU)) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        welcome = replace(link.open(), resumed=True)
        agreed = {"terms": Terms(chosen, welcome.manifest).sha256, "signer": welcome.signer}
        link.journal = Journal(tmp_path / "journal", bytes(32))
        link.journal.begin(Head("", False, welcome.session, 0, **{**agreed, other: "ab" * 32}))
        resumed = client(tmp_path / "a", wards["a"])
        with pytest.raises(ProtocolError, match="other terms, or with another key"):
            resumed.run(link, welcome, URL)
        assert (tmp_path / "a" / "model").exists() is False  # nothing was asked of that server


@pytest.mark.parametrize("opened", [0, 2, 3])
def test_round_that_is_not_the_next_one_is_not_trained(
    tmp_path: Path, small_model: Path, wards: dict[str, Path], opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mode "measured" each round that is done again shows the server another draw of the same gradients."""
    chosen = settings({"mode": "measured", "clip_norm": 1.0}, rounds={"count": 2, "local_steps": 1})
    asked: list[int] = []

    def open_round(*_: object) -> Any:
        asked.append(opened)
        return RoundOpen(0, opened, "")

    second = client(tmp_path / "a", wards["a"])
    with MemoryService(Coordinator(small_model, chosen, tmp_path / "server", device=CPU)) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        welcome = link.open()
        second.link, second.url = link, URL
        second._prepare(welcome)
        second._go_on_from(welcome)
        second.round = 0
        monkeypatch.setattr(link, "ask", open_round)
        with pytest.raises(ProtocolError, match="each round is trained once"):
            second._rounds()
    assert asked == [opened]


def test_terms_that_were_accepted_long_ago_are_asked_for_again(tmp_path: Path) -> None:
    guard = Guard(ClientStore(tmp_path), None)
    old, new = (Terms(settings({"mode": "measured", "noise_multiplier": n}), "ab" * 32) for n in (0.2, 0.5))
    for terms in (old, new):
        guard.check_terms(terms, agree)
    with pytest.raises(PrivacyError, match=r"have changed \(privacy\)"):
        guard.check_terms(old, lambda _: False)


def test_records_keep_their_budget_whatever_tokenizer_and_length(small_model: Path, wards: dict[str, Path]) -> None:
    tokenizer, secret = open_tokenizer(small_model), bytes(32)
    keys = []
    for length in (32, 31):
        data = ClientData.open(wards["a"], settings(batch={"records": 4, "max_length": length}), tokenizer)
        data.name_records(secret)
        keys.append((data.train_keys, data.held_out_keys))
    assert keys[0] == keys[1]
    assert len(set(keys[0][0] + keys[0][1])) == len(keys[0][0]) + len(keys[0][1])


def test_two_federations_with_one_key_file_name_a_record_differently(tmp_path: Path) -> None:
    first, second = (Guard(ClientStore(tmp_path / name), tmp_path / "key") for name in "ab")
    assert first.key.derived("names") != second.key.derived("names")
    assert first.key.derived("records") != second.key.derived("records")


def test_another_countersigning_key_stops_a_private_client(tmp_path: Path) -> None:
    guard = Guard(ClientStore(tmp_path), None)
    guard.check_signer("ab" * 32, private=True)
    guard.check_signer("ab" * 32, private=True)
    with pytest.raises(PrivacyError, match="another key"):
        guard.check_signer("cd" * 32, private=True)


def test_more_records_than_a_micro_batch_has_are_refused_before_any_is_read(tmp_path: Path, small_model: Path) -> None:
    chosen = settings()
    with MemoryService(Coordinator(small_model, chosen, tmp_path / "server", device=CPU)) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        link.open()
        with pytest.raises(RefusedError, match="records in a micro-batch of 4"):
            link.ask(Forward(0, 0, 0, 0, 0, False, 1, (), None, ("ab" * 16,) * 5))
