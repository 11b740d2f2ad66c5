"""One step of training, with the hops in the open.

    bottom -> release -> trunk -> top and loss -> gradient release -> trunk -> bottom

Labels stay here: the trunk sees hidden states going in and gradients coming back, and never the loss. Several
micro-batches of a step can be under way at once: one computes here while another crosses or is in the trunk.
Everything computed from a record passes the gate (``splitfl.privacy.gate``), activations by way of the entry.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, partial

import torch
from torch import Tensor

from client_model.asking import Asker
from client_model.ends import Ends, row_of, rows_of
from client_model.entry import entry_of, records_of
from splitfl.codec.tensors import decode_tensor
from splitfl.data.packing import Batch
from splitfl.errors import NumericalError, ProtocolError, RefusedError
from splitfl.federation.schedule import client_learning_rate
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import ReleaseKind
from splitfl.split.loss import HeadLoss
from splitfl.wire.messages import (
    Answer,
    Backward,
    Forward,
    Gradient,
    Hidden,
    Missing,
    SitOut,
    StepMissed,
    TensorBytes,
)

NO_TENSOR = TensorBytes("f32", (0,), b"")
MOST_REPEATS = 4  # of one micro-batch whose records the server turned out not to hold


class MissedStepError(Exception):
    """The step does not count for this client; ``reason`` says why, for the person who watches."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class StepPlace:
    """Where in the federation a micro-batch is: round, step and micro-batch, from 0."""

    round: int
    step: int
    micro: int = 0


@dataclass
class Sum:
    """What the micro-batches of a step, or of an evaluation, add up to."""

    loss: float = 0.0
    tokens: int = 0
    tops: int = 0  # micro-batches whose loss is known and whose gradient is on its way
    each: list[float] | None = None  # where records are wanted one by one

    def add(self, loss: HeadLoss) -> None:
        """Count one more micro-batch."""
        self.loss, self.tokens, self.tops = self.loss + loss.total, self.tokens + loss.tokens, self.tops + 1


class Awaits(Enum):
    """What a micro-batch on its way waits for."""

    OUTPUT = "the trunk's output"
    GRADIENT = "the trunk's gradient"


Crossing = Generator[Awaits, None, None]  # a micro-batch on its way: it pauses wherever it waits for the trunk


class Trainer:
    """Trains ``ends`` against the trunk behind ``link``; all that leaves goes through ``gate``."""

    def __init__(self, ends: Ends, link: Asker, gate: Gate) -> None:
        self.ends = ends
        self.link = link
        self.gate = gate
        self.in_flight = 1 if ends.private_top is not None else ends.settings.batch.in_flight
        self.entry = entry_of(link, gate, bottom_trains=ends.bottom_trains)
        # With a deadline a step can be refused at its very end; only without one may the top move on before.
        settings = ends.settings
        self._top_may_run_ahead = settings.trunk.step_deadline_s == 0 == settings.rounds.deadline_s

    def step(self, round_: int, step: int, micro_batches: Sequence[Batch]) -> HeadLoss:
        """One optimizer step over its micro-batches. Raises MissedStepError; then its gradients are gone."""
        rate = client_learning_rate(self.ends.settings, round_, step)
        done, norm = Sum(), 0.0
        crossings = (self._train(StepPlace(round_, step, micro), b, done) for micro, b in enumerate(micro_batches))
        try:
            top_moved = False
            for _ in in_turn(crossings, self.in_flight):
                if done.tops == len(micro_batches) and self._top_may_run_ahead and not top_moved:
                    norm = self._step_top(round_, micro_batches, rate)  # while the trunk computes its gradients
                    top_moved = True
        except NumericalError as error:
            self.link.request(SitOut(0, 0, round_, step)).result()
            self.ends.clear_gradients()
            raise MissedStepError(error.message) from error
        except MissedStepError:
            self.ends.clear_gradients()
            raise
        if not top_moved:
            norm = self._step_top(round_, micro_batches, rate)
        if not math.isfinite(norm + self.ends.step_bottom(rate, self._divisor(micro_batches))):
            raise MissedStepError("the gradients' norm was not finite, so these weights stayed as they were")
        return HeadLoss(done.loss, done.tokens)

    def _step_top(self, round_: int, micro_batches: Sequence[Batch], rate: float) -> float:
        """Apply the top's gradients; returns their norm. DP-SGD is paid for before its noise is drawn."""
        ends = self.ends
        if ends.private_top is not None:
            self.gate.charge_dp_sgd(round_, [record for batch in micro_batches for record in records_of(batch)])
        return ends.step_top(rate, self._divisor(micro_batches))

    def _divisor(self, micro_batches: Sequence[Batch]) -> int:
        """What the step's summed gradients are divided by: label tokens, or records, which are public."""
        if self.ends.private_top is None:
            return sum(batch.label_tokens for batch in micro_batches)
        return self.ends.settings.batch.records

    def evaluate(self, round_: int, batches: Sequence[Batch], each: list[float] | None = None) -> HeadLoss:
        """Summed loss over held-out batches; their activations pass the gate like any others.

        ``each`` takes every record's own mean loss, in order.
        """
        done = Sum(each=each)
        crossings = (self._judge(StepPlace(round_, 0, number), batch, done) for number, batch in enumerate(batches))
        for _ in in_turn(crossings, self.in_flight):
            pass
        return HeadLoss(done.loss, done.tokens)

    def _train(self, place: StepPlace, batch: Batch, done: Sum) -> Crossing:
        """All hops of one micro-batch: its gradients are in the ends when it is over."""
        ends = self.ends
        input_ids, labels, lengths = on_device(batch, ends.device)
        run_bottom = cache(lambda: ends.run_bottom(input_ids, lengths, train=True))  # (B, T, D)
        if ends.trunk_is_empty:
            hidden = run_bottom()
            apart = hidden.grad_fn is None  # DP-SGD, or memory is short: the bottom's backward is run on its own
            if apart:
                hidden.requires_grad_(ends.bottom_trains)
            done.add(ends.run_top(hidden, run_bottom, lengths, labels, train=True))
            if apart and hidden.grad is not None:
                ends.backward_bottom(hidden, hidden.grad, input_ids, lengths)
            return
        keep = ends.needs_backward
        answer = yield from self._cross(ReleaseKind.ACTIVATION, place, batch, run_bottom, keep_graph=keep)
        returned = self._decoded(answer, batch).requires_grad_(keep)
        done.add(ends.run_top(returned, run_bottom, lengths, labels, train=True))
        if returned.grad is None:
            return
        reply = self._send_gradient(place, batch, returned, returned.grad)
        yield Awaits.GRADIENT
        answer = answered(reply)
        if not isinstance(answer, Gradient):
            raise ProtocolError(f"{type(answer).__name__} instead of a gradient")
        if ends.bottom_trains and answer.gradient is not None:
            gradient = self._like(batch, answer.gradient, "the gradient that the trunk returned")
            ends.backward_bottom(run_bottom(), gradient, input_ids, lengths)

    def _send_gradient(self, place: StepPlace, batch: Batch, returned: Tensor, gradient: Tensor) -> Future[Answer]:
        """The gradient (B, T, D) at what the trunk returned; one that was sent before a crash is not drawn anew."""
        unsent = Backward(0, 0, place.round, place.step, place.micro, NO_TENSOR)
        if (reply := self.link.again(unsent)) is not None:
            return reply
        self.gate.keep_returned(place.round, returned, records_of(batch))
        payload = self.gate.release(ReleaseKind.GRADIENT, place.round, gradient, records_of(batch))
        return self.link.request(replace(unsent, gradient=payload))

    def _judge(self, place: StepPlace, batch: Batch, done: Sum) -> Crossing:
        """The hops of one held-out batch."""
        ends = self.ends
        input_ids, labels, lengths = on_device(batch, ends.device)
        run_bottom = cache(lambda: ends.run_bottom(input_ids, lengths, train=False))
        if ends.trunk_is_empty:
            hidden = run_bottom()
        else:
            kind = ReleaseKind.HELD_OUT_ACTIVATION
            hidden = self._decoded((yield from self._cross(kind, place, batch, run_bottom, keep_graph=False)), batch)
        if done.each is None:
            done.add(ends.run_top(hidden, run_bottom, lengths, labels, train=False))
            return
        for row in range(len(labels)):
            one = slice(row, row + 1)
            own = partial(row_of, run_bottom, one)
            loss = ends.run_top(hidden[one], own, rows_of(lengths, one), labels[one], train=False)
            done.add(loss)
            done.each.append(loss.mean)

    def _cross(
        self, kind: ReleaseKind, place: StepPlace, batch: Batch, hidden: Callable[[], Tensor], *, keep_graph: bool
    ) -> Generator[Awaits, None, Answer]:
        """Activations into the trunk, and what comes back; it keeps its graph for a Backward if asked."""
        forward = Forward(0, 0, place.round, place.step, place.micro, keep_graph, batch.told_tokens, (), None)
        encoded = cache(lambda: self.ends.encoded(hidden()))  # (B, T, D)
        reply = self.entry.ask(kind, forward, batch, encoded)
        yield Awaits.OUTPUT
        for _ in range(MOST_REPEATS):
            if not isinstance(answer := answered(reply), Missing):
                return answer
            reply = self.entry.ask_again(answer, kind, forward, batch, encoded)
            yield Awaits.OUTPUT
        raise ProtocolError("the server keeps losing what it was sent", "Tell its operator.")

    def _decoded(self, answer: Answer, batch: Batch) -> Tensor:
        """The trunk's output (B, T, D). Raises ProtocolError for anything else."""
        if not isinstance(answer, Hidden):
            raise ProtocolError(f"{type(answer).__name__} instead of hidden states")
        return self._like(batch, answer.hidden, "what the trunk returned")

    def _like(self, batch: Batch, payload: TensorBytes, what: str) -> Tensor:
        """A tensor (B, T, D) for this batch. Raises ProtocolError for another shape, NumericalError for NaN."""
        expected = (*batch.input_ids.shape, self.ends.width)
        if payload.shape != expected:
            raise ProtocolError(f"{what} has shape {payload.shape}, not {expected}", "Do not trust this server.")
        return decode_tensor(payload, self.ends.device, what=what)


def in_turn(crossings: Iterable[Crossing], in_flight: int) -> Iterator[None]:
    """Run micro-batches; yields after each hop. At most ``in_flight`` of them wait for the trunk's output, and at most
    ``2 * in_flight - 1`` are under way in all: one after another at 1.

    Each goes on in the order of their requests, which is the trunk's order of answers: gradients add up in one order.
    As soon as a gradient has been sent the next micro-batch follows it up the link, so that a link with a long way
    back has something to carry in both directions, and while the trunk works its client does.
    """
    to_come, under_way = iter(crossings), deque[tuple[Awaits, Crossing]]()
    while True:
        inside = sum(awaits is Awaits.OUTPUT for awaits, _ in under_way)
        room = inside < in_flight and len(under_way) < 2 * in_flight - 1
        fresh = next(to_come, None) if room else None
        if fresh is None and not under_way:
            return
        crossing = fresh or under_way.popleft()[1]
        with contextlib.suppress(StopIteration):
            under_way.append((next(crossing), crossing))
        yield


def answered(reply: Future[Answer]) -> Answer:
    """The answer of a step's request. Raises MissedStepError when the step goes on without this client."""
    try:
        answer = reply.result()
    except RefusedError as error:
        if error.code != "bad_tensor":
            raise
        raise MissedStepError(error.message) from error
    if isinstance(answer, StepMissed):
        raise MissedStepError("the other clients went on without this one")
    return answer


def on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input ids (B, T), labels (B, T) and lengths (B,) as tensors; lengths None when no row is padded."""
    input_ids = torch.from_numpy(batch.input_ids).to(device)
    labels = torch.from_numpy(batch.labels).to(device)
    padded = bool((batch.lengths != batch.input_ids.shape[1]).any())
    return input_ids, labels, torch.from_numpy(batch.lengths).to(device) if padded else None
