"""How activations enter the trunk: with each step as they are made, or once for all and by name from then on.

``DirectEntry`` puts them into the Forward: mode off, or a bottom that trains, whose activations are new each time.
``OnceEntry`` releases a record's activation once, clipped and noised; the server keeps it, and what it does not keep
is sent again from the vault, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from itertools import groupby
from typing import Protocol

from torch import Tensor

from client_model.asking import Asker
from splitfl.data.packing import Batch
from splitfl.errors import ProtocolError
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import ReleaseKind
from splitfl.privacy.once import OnceReleases
from splitfl.wire.messages import Answer, AskHeld, Forward, Held, Missing, Release, TensorBytes


class Entry(Protocol):
    """One way in."""

    def ask(self, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]) -> Future[Answer]:
        """Send the micro-batch's activations (B, T, D) into the trunk; ``forward`` says all but what they are."""
        ...

    def ask_again(self, missing: Missing, forward: Forward, batch: Batch) -> Future[Answer]:
        """Do it again for records that the server turned out not to hold."""
        ...


def records_of(batch: Batch) -> list[RecordRef]:
    """The batch's records as the gate knows them; none in mode off."""
    return [RecordRef(key, length) for key, length in zip(batch.keys, batch.padded_lengths, strict=True)]


def sent_lengths(batch: Batch) -> tuple[int, ...]:
    """Lengths that the trunk is told: public padded ones where there are any; empty when none is padded."""
    lengths = batch.padded_lengths or tuple(int(length) for length in batch.lengths)
    return lengths if any(length != batch.input_ids.shape[1] for length in lengths) else ()


class DirectEntry:
    """Activations travel inside the Forward."""

    def __init__(self, link: Asker, gate: Gate) -> None:
        self.link = link
        self.gate = gate

    def ask(self, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]) -> Future[Answer]:
        unsent = with_input(forward, sent_lengths(batch), None, ())
        if (reply := self.link.again(unsent)) is not None:
            return reply
        payload = self.gate.release(kind, forward.round, hidden(), records_of(batch))
        return self.link.request(replace(unsent, hidden=payload))

    def ask_again(self, missing: Missing, forward: Forward, batch: Batch) -> Future[Answer]:  # noqa: ARG002
        raise ProtocolError("the server misses records that were never named", "Do not trust this server.")


class OnceEntry:
    """Activations travel once; ``held`` remembers which of them the server keeps."""

    def __init__(self, link: Asker, once: OnceReleases) -> None:
        self.link = link
        self.once = once
        self.held: dict[str, bool] = {}
        self._receipts: list[tuple[tuple[str, ...], Future[Answer]]] = []

    def ask(self, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]) -> Future[Answer]:
        self._read_receipts()
        before = [self.once.name_of(record) for record in records_of(batch) if self.once.is_paid(record)]
        names = self.once.release(kind, forward.round, records_of(batch), hidden)
        self._learn(name for name in before if name not in self.held)
        self._send(name for name in names if not self.held.get(name, False))
        return self.link.request(with_input(forward, (), None, tuple(names)))

    def ask_again(self, missing: Missing, forward: Forward, batch: Batch) -> Future[Answer]:
        names = tuple(self.once.name_of(record) for record in records_of(batch))
        if not set(missing.records) <= set(names):
            raise ProtocolError("the server misses records that were not named", "Do not trust this server.")
        self._send(missing.records)
        return self.link.request(with_input(forward, (), None, names))

    def _learn(self, names: Iterable[str]) -> None:
        """Ask which of the releases of earlier starts the server still has."""
        unknown = tuple(dict.fromkeys(names))
        if unknown:
            self._note(unknown, self.link.request(AskHeld(0, 0, unknown)).result())

    def _send(self, names: Iterable[str]) -> None:
        """Send releases; those of one shape together. The Forward may follow at once: requests keep their order."""
        payloads = {name: self.once.payload(name) for name in dict.fromkeys(names)}
        for _, group in groupby(sorted(payloads, key=lambda name: payloads[name].shape), lambda n: payloads[n].shape):
            together = tuple(group)
            message = Release(0, 0, together, stacked([payloads[name] for name in together]))
            self.held |= dict.fromkeys(together, False)
            self._receipts.append((together, self.link.request(message)))

    def _read_receipts(self) -> None:
        waiting = []
        for names, reply in self._receipts:
            if reply.done():
                self._note(names, reply.result())
            else:
                waiting.append((names, reply))
        self._receipts = waiting

    def _note(self, names: tuple[str, ...], answer: Answer) -> None:
        if not isinstance(answer, Held) or len(answer.held) != len(names):
            raise ProtocolError(f"{type(answer).__name__} instead of what the server holds")
        self.held |= dict(zip(names, answer.held, strict=True))


def with_input(
    forward: Forward, lengths: tuple[int, ...], hidden: TensorBytes | None, records: tuple[str, ...]
) -> Forward:
    """The request with its input."""
    place = (forward.round, forward.step, forward.micro)
    return Forward(0, 0, *place, forward.train, forward.label_tokens, lengths, hidden, records)


def stacked(payloads: list[TensorBytes]) -> TensorBytes:
    """Records of one shape as one tensor."""
    first = payloads[0]
    return TensorBytes(first.dtype, (len(payloads), *first.shape), b"".join(bytes(p.data) for p in payloads))
