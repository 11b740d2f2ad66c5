"""``splitfl join`` around its torch: addresses, names, first words, signals, and the lines for a person."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import open_gate

from client_model.addresses import check_address, check_name
from client_model.choices import Choices
from client_model.events import Event
from client_model.journal import Head
from client_model.participant import Participant
from client_model.resuming import check_same_client, first_words, held_choices, open_journal, paused_choices
from client_model.store import ClientStore, SessionRecord, Snapshot
from client_model.taking_part import StopSignal, parse_plan, say_goodbye
from client_model.telling import EventPrinter, describe, print_report
from splitfl.config import Federation
from splitfl.console import ERASED, note
from splitfl.cut import Cut
from splitfl.errors import ConfigError, LinkError
from splitfl.privacy.report import OFF, privacy_report
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import Bye, Farewell, Hello


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "state")


def snapshot(round_: int) -> Snapshot:
    return Snapshot(round_, 0, 0, (0, 0), (1, 1), {"head": torch.ones(1)}, {})


def settled_text(cut: Cut) -> str:
    """A journal's word for that cut, and all else as the federation has it."""
    return str(Choices(cut).settled(Federation()))


# what is typed


@pytest.mark.parametrize("address", ["ws://127.0.0.1:7000", "ws://localhost:1", "ws://[::1]:7000"])
def test_loopback_address_is_taken_as_it_is(address: str) -> None:
    assert check_address(address, insecure=False) == address


@pytest.mark.parametrize(
    "address",
    [
        *("", "127.0.0.1:7000", "http://127.0.0.1:7000", "wss://127.0.0.1:7000", "ws://", "ws:x"),
        *("ws://127.0.0.1", "ws://127.0.0.1:99999", "ws://127.0.0.1:0", "ws://127.0.0.1:7000/trunk"),
        *("ws://127.0.0.1:7000?token=1", "ws://ward:secret@127.0.0.1:7000"),
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="no address to join"):
        check_address(address, insecure=False)


@pytest.mark.parametrize("address", ["ws://192.0.2.1:7000", "ws://example.org:7000"])
def test_network_address_needs_insecure(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        check_address(address, insecure=False)
    assert check_address(address, insecure=True) == address
    assert "NOT encrypted" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ward", "Ward-3.b_2", "3", "x" * 64])
def test_name_of_letters_and_digits_is_taken(name: str) -> None:
    check_name(name)
    assert decode(b"".join(encode(Hello((1,), name)))) == Hello((1,), name)  # the protocol takes the same


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", "x" * 65, "a b", "ä", "a\n", "a\0"])
def test_name_that_is_a_path_or_odd_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no client name"):
        check_name(name)


def test_plan_is_a_cut_or_the_federations_own_or_made_by_measuring() -> None:
    assert parse_plan("auto") is None  # still to be made
    assert parse_plan("federation") == Choices()
    assert parse_plan("1,2") == Choices(Cut(1, 2))
    with pytest.raises(ConfigError):
        parse_plan("one,two")


# first words


def test_new_client_says_its_name_and_its_plan(store: ClientStore) -> None:
    hello = first_words("ward", store, Choices(Cut(2, 1), 4, codec="int8"), None, "ws://x")
    assert (hello.name, hello.resume, hello.fresh, hello.round) == ("ward", "", True, -1)
    assert (hello.n_bottom, hello.n_top, hello.micro_batches, hello.codec) == (2, 1, 4, "int8")


def test_client_without_a_plan_takes_the_federations_cut(store: ClientStore) -> None:
    hello = first_words("ward", store, Choices(), None, "ws://x")
    assert (hello.n_bottom, hello.n_top, hello.micro_batches, hello.codec) == (-1, -1, 0, "")


def test_client_without_a_journal_names_its_session_and_that_its_state_is_lost(store: ClientStore) -> None:
    store.save_session(SessionRecord("ward", "ws://x", "token"))
    store.save(snapshot(3))
    hello = first_words("ward", store, Choices(), None, "ws://x")
    assert (hello.resume, hello.fresh, hello.round) == ("token", True, 3)


def test_client_with_a_journal_goes_on_with_its_session(store: ClientStore, tmp_path: Path) -> None:
    store.save_federation(Federation().model_dump_json(), (2, 1))
    open_journal(store, tmp_path / "key", Choices()).begin(
        Head("pause", True, "token", 17, plan=settled_text(Cut(2, 1)))
    )
    store.save_session(SessionRecord("ward", "ws://x", "newer"))
    journal = open_journal(store, tmp_path / "key", Choices(Cut(2, 1)))
    hello = first_words("ward", store, Choices(), journal.head, "")
    assert (hello.resume, hello.fresh, journal.next_seq) == ("token", False, 17)


def test_token_and_journal_are_for_the_server_that_they_came_from(store: ClientStore, tmp_path: Path) -> None:
    store.save_federation(Federation().model_dump_json(), (1, 1))
    head = Head("", False, "token", 0, plan=settled_text(Cut(1, 1)), url="ws://x", floor="f")
    store.save_session(SessionRecord("ward", "ws://x", "token"))
    for url, floor, kept in (
        ("ws://x", "f", True),
        ("wss://y", "f", True),
        ("ws://y", "f", False),
        ("ws://x", "", False),
    ):
        open_journal(store, tmp_path / "key", Choices()).begin(head)
        assert (open_journal(store, tmp_path / "key", Choices(), floor=floor, url=url).head is not None) == kept
    assert first_words("ward", store, Choices(), None, "ws://y").resume == ""


@pytest.mark.parametrize("other", [Choices(Cut(1, 1)), Choices(Cut(2, 1), 2), Choices(Cut(2, 1), codec="fp32")])
def test_journal_of_another_plan_is_dropped(store: ClientStore, tmp_path: Path, other: Choices) -> None:
    store.save_federation(Federation().model_dump_json(), (2, 1))
    head = Head("", False, "token", 0, plan=settled_text(Cut(2, 1)))
    open_journal(store, tmp_path / "key", Choices()).begin(head)
    assert open_journal(store, tmp_path / "key", Choices(Cut(2, 1))).head == head
    assert open_journal(store, tmp_path / "key", other).head is None
    assert not store.journal.exists()


@pytest.mark.parametrize("damage", [b"", b"junk" * 20])
def test_damaged_journal_costs_the_round_and_is_said(
    store: ClientStore, tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    store.journal.write_bytes(damage)
    assert open_journal(store, tmp_path / "key", Choices()).head is None
    assert "journal is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "asked"),
    [
        (Choices(Cut(2, 1), 4), None),
        (Choices(Cut(1, 3), 4), Choices(Cut(1, 3), 4)),
        (Choices(Cut(2, 1)), Choices(Cut(2, 1))),
        (Choices(), Choices(Cut(1, 1))),
    ],
)
def test_paused_round_keeps_its_plan_when_another_is_asked_for(
    store: ClientStore, plan: Choices, asked: Choices | None
) -> None:
    held = Choices(Cut(2, 1), micro_batches=4)
    store.save_federation(Federation().model_dump_json(), (2, 1), held.as_table())
    assert paused_choices(store, plan) is None  # nothing is paused: the next round takes any plan
    store.save_pause(snapshot(3))
    both = None if asked is None else (held.settled(Federation()), asked.settled(Federation()))
    assert paused_choices(store, plan) == both
    assert held_choices(store) == held.settled(Federation())


def test_state_of_another_client_is_refused(store: ClientStore) -> None:
    store.save_session(SessionRecord("ward-a", "ws://x", "token"))
    with pytest.raises(ConfigError, match="holds the state of client 'ward-a'"):
        check_same_client("ward-b", store)


# signals


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopSignal]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    participant = Participant("ward", tmp_path, ClientStore(tmp_path / "state"), tmp_path, torch.device("cpu"))
    yield StopSignal(participant)
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_in_a_step_waits_for_its_end_and_the_second_does_not(
    stop: StopSignal, number: signal.Signals
) -> None:
    stop.participant.in_step = True
    assert not stop.asked()
    signal.raise_signal(number)
    assert stop.asked()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


@pytest.mark.usefixtures("stop")
def test_signal_between_steps_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


class FakeLink:
    """Takes one request and answers it as told."""

    def __init__(self, answer: Farewell | Exception | None) -> None:
        self.answer = answer
        self.heard: list[Any] = []

    def request(self, message: Any) -> Future[Any]:
        self.heard.append(message)
        future: Future[Any] = Future()
        if isinstance(self.answer, Exception):
            future.set_exception(self.answer)
        elif self.answer is not None:
            future.set_result(self.answer)
        return future


@pytest.mark.parametrize("answer", [Farewell(0), LinkError("away"), TimeoutError()])
def test_goodbye_is_said_whether_or_not_anybody_hears_it(answer: Farewell | Exception) -> None:
    link = FakeLink(answer)
    say_goodbye(link, "failed")  # type: ignore[arg-type]
    assert link.heard == [Bye(0, 0, "failed")]


# lines

STEP = {
    "rounds": 2,
    "steps": 9,
    "round": 0,
    "step": 4,
    "loss": 1.5,
    "tokens_per_s": 1234.0,
    "bytes_sent": 2_000_000,
    "bytes_received": 100_000,
}
EVENTS = [
    ("fetching", {"text": "fetching 3 tensors"}, "fetching 3 tensors"),
    (
        "data",
        {
            "train_records": 9,
            "held_out_records": 1,
            "rows": 40,
            "skipped_rows": 2,
            "truncated_records": 0,
            "parted_rows": 3,
        },
        "data: 40 rows, which make 9 records to train on, 1 held out, 2 rows skipped, "
        "3 answers cut from their prompts by packing (batch.pack = false keeps rows whole)",
    ),
    ("privacy", {"mode": "off", "statement": OFF}, f"privacy: off. {OFF}"),
    (
        "waiting",
        {"for_": "the next round"},
        "waiting for the next round (it opens when enough clients are there and a round under way is over)",
    ),
    ("waiting", {"for_": "the last merge"}, "waiting for the last merge"),
    ("step", STEP, "round 1 of 2 step 5 of 9: loss 1.500, 1234 tokens/s, 2.0 MB sent, 0.1 MB received"),
    (
        "baseline_step",
        {"which": "top-only", "step": 300, "steps": 1200, "bytes_sent": 1, "bytes_received": 41_000_000},
        "top-only, step 300 of 1200, 41.0 MB received",
    ),
    ("evaluation", {"round": 1, "loss": 2.0, "perplexity": 7.4}, "held-out loss 2.000, perplexity 7.4, after 1 rounds"),
    ("step_missed", {"round": 0, "step": 4, "reason": "NaN"}, "round 1 step 5 left out: NaN"),
    ("evaluation_failed", {"round": 1, "reason": "NaN"}, "held-out loss after 1 rounds could not be measured: NaN"),
    ("server_restarted", {"durable_round": 1}, "the server restarted; going on after round 2"),
    (
        "away_too_long",
        {"durable_round": 0},
        "this client was away for longer than the federation waits; going on after round 1",
    ),
    ("resumed", {"round": 1, "step": 3, "again": False}, "going on with round 2 at step 4"),
    (
        "resumed",
        {"round": 1, "step": 3, "again": True},
        "going on with round 2 at step 4; the steps before it are done again from what is kept here",
    ),
    (
        "cut_changed",
        {"before": "1,1", "now": "2,1", "released_anew": True},
        "this client's cut was 1,1 and is 2,1 from now on; activations leave anew, and are charged anew",
    ),
]


@pytest.mark.parametrize(("event", "facts", "line"), EVENTS, ids=[event for event, *_ in EVENTS])
def test_event_is_one_line_for_a_person(event: str, facts: dict[str, Any], line: str) -> None:
    assert describe(event, facts) == line


def test_unknown_event_is_passed_over() -> None:
    assert describe("something new", {}) == ""


def test_update_that_came_too_late_is_said() -> None:
    assert describe("round_durable", {"round": 0, "merged": True}) != describe(
        "round_durable", {"round": 0, "merged": False}
    )


def test_events_are_json_lines_on_stdout_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    EventPrinter(as_json=True)(Event("step", STEP))
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"event": "step", **STEP}
    assert printed.err == ""


def test_events_are_text_on_stderr_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    EventPrinter(as_json=False)(Event("waiting", {"for_": "the last merge"}))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "waiting for the last merge\n"


def test_line_on_a_terminal_gives_way_to_whatever_is_said_next(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfl.console.has_terminal", lambda: True)
    monkeypatch.setattr("client_model.telling.has_terminal", lambda: True)
    EventPrinter(as_json=False)(Event("step", STEP))
    note("stopping after this step")
    progress, then = capsys.readouterr().err.removeprefix(ERASED).split(ERASED)
    assert progress.startswith("round 1 of 2 step 5 of 9")
    assert not progress.endswith("\n")
    assert then == "stopping after this step\n"


def closing_report(folder: Path, **facts: Any) -> dict[str, Any]:
    gate = open_gate(folder)
    gate.release_weights(0, {"head": torch.ones(2)}, folder / "update")
    return {
        "client": "ward",
        "federation": "wards",
        "rounds": 3,
        "rounds_taken": 2,
        "starts": 4,
        "uncounted_starts": 1,
        "seconds": 1.0,
        "share": "ends",
        "held_out_losses": [],
        "personal": None,
        "baselines": None,
        "bytes": {"bytes_sent": 1, "bytes_received": 2},
        "data": {"rows": 9, "train_records": 8, "held_out_records": 1, "skipped_rows": 2}
        | {"truncated_records": 0, "parted_rows": 0},
        "privacy": privacy_report(gate.policy, gate.ledger),
        "weights": "merged.safetensors",
    } | facts


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"personal": 2.125}, "your own weights before the last merge: 2.125; merged: 2.000 (nats per token)"),
        ({"personal": None}, ""),
        ({"personal": 2.125, "rounds": 4}, ""),  # the merged ones of the end were not measured
        ({"share": "none"}, "heads are personal: this client's ends were merged with nobody's"),
    ],
)
def test_report_puts_personal_weights_beside_merged_ones(
    tmp_path: Path, facts: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [{"round": 0, "loss": 3.0}, {"round": 3, "loss": 2.0}]
    print_report(closing_report(tmp_path, held_out_losses=losses, **facts))
    out = capsys.readouterr().out
    assert line in out
    assert bool(line) == ("your own" in out or "personal" in out)


ONCE, TWICE = [{"round": 3, "loss": 3.0}], [{"round": 0, "loss": 3.0}, {"round": 2, "loss": 2.0}]


@pytest.mark.parametrize("losses", [[], ONCE, TWICE])
def test_report_says_what_left_and_what_stayed(
    tmp_path: Path, losses: list[dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(closing_report(tmp_path, held_out_losses=losses))
    out = capsys.readouterr().out
    assert "ward in wards: part in 2 of 3 rounds" in out
    assert "1 s since this start" in out
    assert "rounds and link are counted over 4 starts" in out
    assert "NOT counted on the link: traffic of 1 of those starts" in out
    assert "stayed here: the data file" in out
    assert "left: weights, 0.00 MB in 1 messages" in out
    assert "data: 9 rows, which make 8 records to train on, 1 held out, 2 rows skipped" in out
    assert ("held-out loss" in out) == bool(losses)
    assert all(out.count(f"{entry['loss']:.3f} after {entry['round']} rounds") == 1 for entry in losses)
