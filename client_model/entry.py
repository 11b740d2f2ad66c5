"""How activations enter the trunk: with each step as they are made, or once for all and by name from then on.

``DirectEntry`` puts them into the Forward: a bottom that trains makes new ones each time.
``OnceEntry`` releases a record's activation once, clipped and noised; the server keeps it, and what it does not keep
is sent again from the vault, byte for byte.
``KeptEntry`` is the same for mode off, where nothing is drawn: what the server does not keep is computed again.
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

    def ask_again(
        self, missing: Missing, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]
    ) -> Future[Answer]:
        """Do it again for records that the server turned out not to hold."""
        ...


def entry_of(link: Asker, gate: Gate, *, bottom_trains: bool) -> Entry:
    """The way in for what ``gate`` lets out."""
    if bottom_trains:
        return DirectEntry(link, gate)
    return OnceEntry(link, gate.once) if gate.policy.private else KeptEntry(link, gate)


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

    def ask_again(self, *_: object) -> Future[Answer]:
        raise ProtocolError("the server misses records that were never named", "Do not trust this server.")


class Shelf:
    """What the server holds of what this client has sent under names; ``held`` is what it said."""

    def __init__(self, link: Asker) -> None:
        self.link = link
        self.held: dict[str, bool] = {}
        self._receipts: list[tuple[tuple[str, ...], Future[Answer]]] = []

    def lacks(self, name: str) -> bool:
        """Whether that has to be sent, as far as is known by now."""
        self._read_receipts()
        return not self.held.get(name, False)

    def ask(self, names: Iterable[str]) -> None:
        """Ask which of the releases of earlier starts the server still has."""
        unknown = tuple(dict.fromkeys(name for name in names if name not in self.held))
        if unknown:
            self._note(unknown, self.link.request(AskHeld(0, 0, unknown)).result())

    def send(self, names: tuple[str, ...], hidden: TensorBytes) -> None:
        """Send releases of one shape (B, T, D). The Forward may follow at once: requests keep their order."""
        self.held |= dict.fromkeys(names, False)
        self._receipts.append((names, self.link.request(Release(0, 0, names, hidden))))

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


class OnceEntry:
    """Activations travel once, and with privacy on they are drawn once."""

    def __init__(self, link: Asker, once: OnceReleases) -> None:
        self.link = link
        self.once = once
        self.shelf = Shelf(link)

    def ask(self, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]) -> Future[Answer]:
        before = [self.once.name_of(record) for record in records_of(batch) if self.once.is_paid(record)]
        names = self.once.release(kind, forward.round, records_of(batch), hidden)
        self.shelf.ask(before)
        self._send(name for name in names if self.shelf.lacks(name))
        return self.link.request(with_input(forward, (), None, tuple(names)))

    def ask_again(
        self,
        missing: Missing,
        kind: ReleaseKind,  # noqa: ARG002
        forward: Forward,
        batch: Batch,
        hidden: Callable[[], Tensor],  # noqa: ARG002
    ) -> Future[Answer]:
        names = tuple(self.once.name_of(record) for record in records_of(batch))
        check_named(missing, names)
        self._send(missing.records)
        return self.link.request(with_input(forward, (), None, names))

    def _send(self, names: Iterable[str]) -> None:
        """Send what is paid for; records of one shape go together."""
        payloads = {name: self.once.payload(name) for name in dict.fromkeys(names)}
        for _, group in groupby(sorted(payloads, key=lambda name: payloads[name].shape), lambda n: payloads[n].shape):
            together = tuple(group)
            self.shelf.send(together, stacked([payloads[name] for name in together]))


class KeptEntry:
    """Activations of a frozen bottom travel once, in mode off: the server keeps them as they are."""

    def __init__(self, link: Asker, gate: Gate) -> None:
        self.link = link
        self.gate = gate
        self.shelf = Shelf(link)
        self._sent_before = gate.ledger.count > 0

    def ask(self, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]) -> Future[Answer]:
        names = self._names(batch)
        named = with_input(forward, (), None, names)
        if (reply := self.link.again(named)) is not None:
            return reply
        if self._sent_before:
            self.shelf.ask(names)
        self._send(kind, forward.round, batch, names, {name for name in names if self.shelf.lacks(name)}, hidden)
        return self.link.request(named)

    def ask_again(
        self, missing: Missing, kind: ReleaseKind, forward: Forward, batch: Batch, hidden: Callable[[], Tensor]
    ) -> Future[Answer]:
        names = self._names(batch)
        check_named(missing, names)
        self._send(kind, forward.round, batch, names, set(missing.records), hidden)
        return self.link.request(with_input(forward, (), None, names))

    def _names(self, batch: Batch) -> tuple[str, ...]:
        rows = zip(batch.input_ids, batch.lengths, strict=True)
        return tuple(self.gate.once.name_of_tokens(ids[:length].tobytes()) for ids, length in rows)

    def _send(
        self,
        kind: ReleaseKind,
        round_: int,
        batch: Batch,
        names: tuple[str, ...],
        wanted: set[str],
        hidden: Callable[[], Tensor],
    ) -> None:
        """Send rows up to their own lengths; those of one length go together."""
        lengths = [int(length) for length in batch.lengths]
        rows = sorted((names.index(name) for name in wanted), key=lambda row: (lengths[row], row))
        for length, group in groupby(rows, lengths.__getitem__):
            together = list(group)
            payload = self.gate.release(kind, round_, hidden()[together, :length], [])
            self.shelf.send(tuple(names[row] for row in together), payload)


def check_named(missing: Missing, names: tuple[str, ...]) -> None:
    """Raise ProtocolError for a server that misses what it was never told of."""
    if not set(missing.records) <= set(names):
        raise ProtocolError("the server misses records that were not named", "Do not trust this server.")


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
