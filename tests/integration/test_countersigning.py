"""Countersignatures that are asked for one after another without waiting are written down in that order."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest
import torch

from server_model.coordinator import Coordinator
from server_model.witness import Witness
from splitfl.config import Federation
from splitfl.lab.memory import MemoryLink, MemoryService
from splitfl.privacy.witness import Mark, check_signature
from splitfl.wire.messages import PROTOCOL_VERSIONS, Countersign, Countersigned, Hello


def test_marks_that_are_on_their_way_together_do_not_overtake_each_other(
    tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = iter([0.2, *[0.0] * 20])
    countersign = Witness.countersign

    def delayed(self: Witness, client: str, mark: Mark, *, proven: bool) -> str:
        time.sleep(next(slow))  # the first one would be the last to be written
        return countersign(self, client, mark, proven=proven)

    monkeypatch.setattr(Witness, "countersign", delayed)
    coordinator = Coordinator(small_model, Federation(), tmp_path, device=torch.device("cpu"))
    with MemoryService(coordinator) as service:
        link = MemoryLink(service, Hello(PROTOCOL_VERSIONS, "a"))
        signer = link.open().signer
        marks = [Mark(count, hashlib.sha256(bytes([count])).hexdigest()) for count in range(1, 9)]
        replies = [link.request(Countersign(0, 0, mark.count, mark.head)) for mark in marks]
        for mark, reply in zip(marks, replies, strict=True):
            answer = reply.result(timeout=10)
            assert isinstance(answer, Countersigned)
            check_signature(signer, "a", mark, answer.signature)
        assert coordinator.witness.last("a", proven=False) == marks[-1]
