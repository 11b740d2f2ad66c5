"""How activations enter the trunk: what the link is handed is what the gate let out, noise and all."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from gates import open_gate, ref

from client_model.entry import DirectEntry, KeptEntry, OnceEntry, sent_lengths
from splitfl.codec.tensors import by_record, decode_tensor
from splitfl.data.packing import Batch
from splitfl.errors import ProtocolError
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import ReleaseKind
from splitfl.privacy.once import digest
from splitfl.wire.messages import Answer, AskHeld, Forward, Held, Missing, Release, Request

CPU = torch.device("cpu")
HIDDEN = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0))  # (B, T, D)
FORWARD = Forward(0, 0, 3, 1, 0, True, 12, (), None)


@dataclass
class FakeLink:
    """Writes down what is asked; holds whatever it was sent."""

    asked: list[Request] = field(default_factory=list)

    def request(self, message: Request) -> Future[Answer]:
        self.asked.append(message)
        reply: Future[Answer] = Future()
        if isinstance(message, Release | AskHeld):
            reply.set_result(Held(0, (isinstance(message, Release),) * len(message.records)))
        return reply

    def again(self, message: Request) -> None:
        """Nothing was sent before."""

    def sent(self, kind: type) -> list[Request]:
        return [message for message in self.asked if isinstance(message, kind)]


class FullLink(FakeLink):
    """A server without room."""

    def request(self, message: Request) -> Future[Answer]:
        reply = super().request(message)
        if isinstance(message, Release):
            reply = Future()
            reply.set_result(Held(0, (False,) * len(message.records)))
        return reply


def batch() -> Batch:
    """Two records of 8 and 4 padded tokens."""
    ids = np.zeros((2, 8), np.int64)
    return Batch(ids, ids, np.array([7, 3]), keys=(ref(1).key, ref(2).key), padded_lengths=(8, 4))


def ask(entry: DirectEntry | OnceEntry) -> None:
    entry.ask(ReleaseKind.ACTIVATION, FORWARD, batch(), lambda: HIDDEN)


def noisy_gate(folder: Path) -> Gate:
    return open_gate(folder, "measured", noise_multiplier=0.5)


def test_activations_of_a_bottom_that_trains_carry_fresh_noise_in_every_forward(tmp_path: Path) -> None:
    gate, link = noisy_gate(tmp_path), FakeLink()
    entry = DirectEntry(link, gate)
    ask(entry)
    ask(entry)
    assert gate.policy.activations is not None
    clipped = gate.policy.activations.clipped(HIDDEN)
    noises = []
    for message in link.sent(Forward):
        assert isinstance(message, Forward)
        assert message.hidden is not None
        assert message.lengths == (8, 4)
        sent = decode_tensor(message.hidden, CPU, what="hidden").double()
        assert not sent[1, 4:].any()
        noises.append((sent - clipped)[0])
        assert float(noises[-1].std()) == pytest.approx(0.5, rel=0.06)
    assert abs(float(torch.corrcoef(torch.stack(noises).flatten(1))[0, 1])) < 0.1
    assert gate.ledger.releases["activations"] == 4


def test_with_privacy_on_the_trunk_is_told_padded_lengths_alone() -> None:
    assert sent_lengths(batch()) == (8, 4)  # and not 7 and 3


def test_a_release_goes_once_and_by_name_from_then_on(tmp_path: Path) -> None:
    gate, link = noisy_gate(tmp_path), FakeLink()
    entry = OnceEntry(link, gate.once)
    ask(entry)
    ask(entry)
    releases, forwards = link.sent(Release), link.sent(Forward)
    assert len(releases) == 2  # one a shape
    payloads = [piece for message in releases for piece in by_record(message.hidden)]  # type: ignore[attr-defined]
    assert all(gate.ledger.knows(digest(piece)) for piece in payloads)
    assert [message.hidden for message in forwards] == [None, None]  # type: ignore[attr-defined]
    assert len({message.records for message in forwards}) == 1  # type: ignore[attr-defined]


def test_a_release_of_an_earlier_start_is_asked_for_and_sent_again_if_the_server_lost_it(tmp_path: Path) -> None:
    ask(OnceEntry(FakeLink(), noisy_gate(tmp_path).once))
    link = FakeLink()
    ask(OnceEntry(link, noisy_gate(tmp_path).once))
    assert [type(message) for message in link.asked] == [AskHeld, Release, Release, Forward]


def test_a_record_that_was_not_named_is_not_sent_again(tmp_path: Path) -> None:
    entry = OnceEntry(FakeLink(), noisy_gate(tmp_path).once)
    ask(entry)
    with pytest.raises(ProtocolError, match="not named"):
        entry.ask_again(Missing(0, 3, 1, 0, ("ff" * 16,)), ReleaseKind.ACTIVATION, FORWARD, batch(), lambda: HIDDEN)


# -- mode off, where the server keeps activations as they are ---------------------------------------------------------


def plain_batch() -> Batch:
    """Three rows of 8, 3 and 8 tokens; the third is the first one again."""
    ids = np.arange(24, dtype=np.int64).reshape(3, 8)
    ids[2] = ids[0]
    return Batch(ids, ids, np.array([8, 3, 8]))


PLAIN = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))


def ask_plainly(entry: KeptEntry) -> None:
    entry.ask(ReleaseKind.ACTIVATION, FORWARD, plain_batch(), lambda: PLAIN)


def test_in_mode_off_rows_go_once_as_they_are_and_without_padding(tmp_path: Path) -> None:
    gate, link = open_gate(tmp_path, "off"), FakeLink()
    entry = KeptEntry(link, gate)
    ask_plainly(entry)
    ask_plainly(entry)
    releases = [message for message in link.asked if isinstance(message, Release)]
    assert [message.hidden.shape for message in releases] == [(1, 3, 16), (1, 8, 16)]
    assert torch.equal(decode_tensor(releases[1].hidden, CPU, what="hidden")[0], PLAIN[0])
    assert all(gate.ledger.knows(digest(message.hidden)) for message in releases)
    first, second = (message for message in link.asked if isinstance(message, Forward))
    assert first == second
    assert first.hidden is None
    assert first.records[0] == first.records[2] != first.records[1]


def test_in_mode_off_a_later_start_asks_before_it_sends(tmp_path: Path) -> None:
    ask_plainly(KeptEntry(FakeLink(), open_gate(tmp_path, "off")))
    link = FakeLink()
    entry = KeptEntry(link, open_gate(tmp_path, "off"))
    ask_plainly(entry)
    ask_plainly(entry)
    assert [type(message) for message in link.asked] == [AskHeld, Release, Release, Forward, Forward]


def test_in_mode_off_what_the_server_lost_is_computed_again(tmp_path: Path) -> None:
    link = FakeLink()
    entry = KeptEntry(link, open_gate(tmp_path, "off"))
    ask_plainly(entry)
    short = link.asked[0]
    assert isinstance(short, Release)
    missing = Missing(0, 3, 1, 0, short.records)
    entry.ask_again(missing, ReleaseKind.ACTIVATION, FORWARD, plain_batch(), lambda: PLAIN)
    assert [type(message) for message in link.asked[-2:]] == [Release, Forward]
    assert link.asked[-2] == short
    strange = Missing(0, 3, 1, 0, ("ff" * 16,))
    with pytest.raises(ProtocolError, match="not named"):
        entry.ask_again(strange, ReleaseKind.ACTIVATION, FORWARD, plain_batch(), lambda: PLAIN)


def test_what_the_server_has_no_room_for_goes_in_each_epoch(tmp_path: Path) -> None:
    link = FullLink()
    entry = KeptEntry(link, open_gate(tmp_path, "off"))
    ask_plainly(entry)
    ask_plainly(entry)
    assert [type(message) for message in link.asked] == [Release, Release, Forward] * 2


def test_names_depend_on_the_codec_and_the_bottom(tmp_path: Path) -> None:
    tokens, names = b"tokens", set()
    for number, changed in enumerate(({}, {"codec": "bf16"}, {"context": "another bottom"})):
        names.add(open_gate(tmp_path / str(number), "off", **changed).once.name_of_tokens(tokens))
    assert len(names) == 3
