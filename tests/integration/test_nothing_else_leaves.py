"""Every message of a whole run, looked at as it leaves: free of data by its type, or in the ledger already.

A message type that this file does not know fails it, so a new one has to be thought about here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from gates import agree

from client_model.participant import Participant
from client_model.store import ClientStore
from server_model.coordinator import Coordinator
from splitfl.codec.tensors import by_record
from splitfl.config import Federation, parse_federation
from splitfl.lab.memory import URL, MemoryLink, MemoryService
from splitfl.privacy.ledger import Ledger
from splitfl.wire.messages import (
    PROTOCOL_VERSIONS,
    REQUESTS,
    Answer,
    AskHeld,
    Backward,
    Bye,
    Countersign,
    Echo,
    Fetch,
    Forward,
    Hello,
    NextRound,
    Release,
    Request,
    SitOut,
    TensorBytes,
    Update,
    Upload,
)

#: by type: no field of theirs is computed from a record (names are keyed hashes, a head is a hash of ledger rows)
FREE = (Fetch, NextRound, AskHeld, Countersign, SitOut, Bye)
MEASURING = (Echo,)  # zeros, to see how fast they travel
CARRYING = (Release, Forward, Backward, Upload, Update)
MODES: dict[str, dict[str, Any]] = {
    "off": {},
    "measured": {"mode": "measured"},
    "gradients": {"mode": "measured", "gradients": "noised"},
    "dp_sgd": {"mode": "measured", "gradients": "noised", "dp_sgd": True},
    "metrics": {"mode": "measured"},
    "certified": {"mode": "certified", "epsilon": 8.0, "dp_sgd": True, "gradients": "noised"},
}
PLACES = {"seq", "ack", "round", "step", "micro", "train"}  # numbers that the schedule alone decides


def settings(privacy: dict[str, Any], *, metrics: bool = False) -> Federation:
    tables: dict[str, Any] = {
        "rounds": {"count": 2, "local_steps": 4},
        "batch": {"records": 4, "micro_batches": 2, "max_length": 32},
        "evaluation": {"records": 4, "share_metrics": metrics},
        "privacy": privacy,
    }
    return parse_federation(tables, "the test")


class WatchedLink(MemoryLink):
    """Checks each request before it goes."""

    def __init__(self, service: MemoryService, hello: Hello, state: Path, chosen: Federation) -> None:
        super().__init__(service, hello)
        self.ledger_file = state / "ledger.sqlite"
        self.settings = chosen
        self.seen: set[type] = set()
        self.blob = bytearray()

    def request(self, message: Request) -> Future[Answer]:
        self.seen.add(type(message))
        self.check(message)
        return super().request(message)

    def knows(self, data: bytes | memoryview) -> bool:
        """Whether these bytes are in the ledger on disk, as another process would read it."""
        return self.knows_hash(hashlib.sha256(data).digest())

    def knows_hash(self, digest: bytes) -> bool:
        ledger = Ledger(self.ledger_file)
        try:
            return ledger.knows(digest)
        finally:
            ledger.close()

    def check(self, message: Request) -> None:
        private = self.settings.privacy.on
        if isinstance(message, FREE):
            assert not any(isinstance(v, TensorBytes) for v in vars(message).values())
        elif isinstance(message, Echo):
            assert not any(message.data.data)
        elif isinstance(message, Release):
            pieces = by_record(message.hidden) if private else [message.hidden]
            assert all(self.knows(piece.data) for piece in pieces)
        elif isinstance(message, Forward):
            self.check_forward(message)
        elif isinstance(message, Backward):
            pieces = by_record(message.gradient) if private else [message.gradient]
            assert all(self.knows(piece.data) for piece in pieces)
        elif isinstance(message, Upload):
            assert self.knows_hash(bytes.fromhex(message.sha256))  # before the first piece of it
            self.blob[message.offset :] = bytes(message.data.data)
        else:
            assert isinstance(message, Update), f"{type(message).__name__} is not known here: what does it tell?"
            assert self.knows(bytes(self.blob))
            assert hashlib.sha256(self.blob).hexdigest() == message.sha256
            self.check_metric(message)
            if private:  # records x padded length, whatever the records say
                assert message.tokens % 32 == 0

    def check_metric(self, message: Update) -> None:
        """A loss goes along only where that was agreed, and its rows are there already."""
        assert (message.held_out_loss is not None) == self.settings.evaluation.share_metrics
        if message.held_out_loss is not None:
            assert self.knows(struct.pack("<d", message.held_out_loss))

    def check_forward(self, message: Forward) -> None:
        assert message.hidden is None  # every bottom here is frozen, so activations go ahead, once
        if not self.settings.privacy.on:
            return
        assert message.lengths == ()
        assert message.label_tokens == 32 * len(message.records)  # public: every record here fills its bucket
        told = {field.name for field in dataclasses.fields(message)} - PLACES
        assert told == {"label_tokens", "lengths", "hidden", "records"}


def test_every_request_is_thought_about() -> None:
    assert {*FREE, *MEASURING, *CARRYING} == set(REQUESTS)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_reaches_the_link_but_what_the_ledger_knows_and_messages_without_data(
    mode: str, small_model: Path, wards: dict[str, Path], tmp_path: Path
) -> None:
    chosen = settings(MODES[mode], metrics=mode in ("metrics", "certified"))
    coordinator = Coordinator(small_model, chosen, tmp_path / "server", device=torch.device("cpu"))
    client = Participant(
        "a", wards["a"], ClientStore(tmp_path / "client"), tmp_path / "cache", torch.device("cpu"), accept=agree
    )
    with MemoryService(coordinator) as service:
        link = WatchedLink(service, Hello(PROTOCOL_VERSIONS, "a"), tmp_path / "client", chosen)
        report = client.run(link, link.open(), URL)
    assert {Forward, Release, Countersign, Upload, Update, Fetch, NextRound, Bye} <= link.seen
    assert (Backward in link.seen) == (mode not in ("measured", "metrics"))
    kinds = set(report["privacy"]["left"])
    assert kinds >= {"activations", "activations of held-out records", "weights"}
    assert (report["privacy"]["epsilon"] is not None) == (mode in ("dp_sgd", "certified"))
    if mode == "certified":
        assert report["privacy"]["epsilon"] <= 8.0 + 1e-6
