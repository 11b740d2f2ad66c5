"""One step of training, with the hops in the open.

    bottom -> release -> trunk -> top and loss -> gradient release -> trunk -> bottom

Labels stay here: the trunk sees hidden states going in and gradients coming back, and never the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from client_model.ends import Ends
from splitfl.codec.tensors import decode_tensor
from splitfl.data.packing import Batch
from splitfl.errors import NumericalError, ProtocolError, RefusedError
from splitfl.federation.schedule import learning_rate
from splitfl.privacy.gate import Gate, ReleaseKind
from splitfl.split.loss import HeadLoss
from splitfl.wire.messages import Answer, Backward, Forward, Gradient, Hidden, Request, SitOut, StepMissed


class Asker(Protocol):
    """The part of a link that training needs."""

    def request(self, message: Request) -> Future[Answer]: ...


class MissedStepError(Exception):
    """The step does not count for this client; ``reason`` says why, for the person who watches."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Place:
    """Where in the federation a micro-batch is: round, step and micro-batch, from 0."""

    round: int
    step: int
    micro: int = 0


class Trainer:
    """Trains ``ends`` against the trunk behind ``link``; all that leaves goes through ``gate``."""

    def __init__(self, ends: Ends, link: Asker, gate: Gate) -> None:
        self.ends = ends
        self.link = link
        self.gate = gate
        # With a deadline a step can be refused at its very end; only without one may the top move on before.
        self._top_may_run_ahead = ends.settings.trunk.step_deadline_s == 0

    def step(self, round_: int, step: int, micro_batches: Sequence[Batch]) -> HeadLoss:
        """One optimizer step over its micro-batches. Raises MissedStepError; then its gradients are gone."""
        total, tokens = 0.0, sum(batch.label_tokens for batch in micro_batches)
        rate = learning_rate(self.ends.settings, round_, step)
        top_moved, norm = False, 0.0
        try:
            for micro, batch in enumerate(micro_batches):
                last = micro == len(micro_batches) - 1
                loss, below = self._forward_and_backward(Place(round_, step, micro), batch)
                if last and self._top_may_run_ahead:
                    norm = self.ends.step_top(rate, tokens)  # while the trunk computes its gradients
                    top_moved = True
                below.finish()
                total += loss.total
        except NumericalError as error:
            self.link.request(SitOut(0, 0, round_, step)).result()
            self.ends.clear_gradients()
            raise MissedStepError(error.message) from error
        except MissedStepError:
            self.ends.clear_gradients()
            raise
        if not top_moved:
            norm = self.ends.step_top(rate, tokens)
        if not math.isfinite(norm + self.ends.step_bottom(rate, tokens)):
            raise MissedStepError("the gradients' norm was not finite, so these weights stayed as they were")
        return HeadLoss(total, tokens)

    def _forward_and_backward(self, place: Place, batch: Batch) -> tuple[HeadLoss, Below]:
        """All hops of one micro-batch but the last: the gradient that comes back to the bottom is still on its way."""
        ends = self.ends
        input_ids, labels, lengths = on_device(batch, ends.device)
        hidden = ends.run_bottom(input_ids, lengths, train=True)  # (B, T, D)
        if ends.trunk_is_empty:
            loss = ends.run_top(hidden, lengths, labels, train=True)
            return loss, Below(self, hidden, None)
        keep = ends.needs_backward
        returned = self._through_trunk(place, hidden, batch, ReleaseKind.ACTIVATION, keep_graph=keep)
        returned.requires_grad_(keep)
        loss = ends.run_top(returned, lengths, labels, train=True)
        if returned.grad is None:
            return loss, Below(self, hidden, None)
        payload = self.gate.release(ReleaseKind.GRADIENT, returned.grad)
        reply = self.link.request(Backward(0, 0, place.round, place.step, place.micro, payload))
        return loss, Below(self, hidden, reply)

    def _through_trunk(
        self, place: Place, hidden: Tensor, batch: Batch, kind: ReleaseKind, *, keep_graph: bool
    ) -> Tensor:
        """Release activations (B, T, D), get the trunk's output back; it keeps its graph for a Backward if asked."""
        payload = self.gate.release(kind, hidden)
        padded = bool((batch.lengths != batch.input_ids.shape[1]).any())
        lengths = tuple(int(length) for length in batch.lengths) if padded else ()
        tokens = batch.label_tokens
        request = Forward(0, 0, place.round, place.step, place.micro, keep_graph, tokens, lengths, payload)
        answer = answered(self.link.request(request))
        if not isinstance(answer, Hidden):
            raise ProtocolError(f"{type(answer).__name__} instead of hidden states")
        return decode_tensor(answer.hidden, self.ends.device, what="what the trunk returned")

    def evaluate(self, round_: int, batches: Sequence[Batch]) -> HeadLoss:
        """Summed loss over held-out batches; their activations pass the gate like any others."""
        total, tokens = 0.0, 0
        with torch.no_grad():
            for number, batch in enumerate(batches):
                input_ids, labels, lengths = on_device(batch, self.ends.device)
                hidden = self.ends.run_bottom(input_ids, lengths, train=False)
                if not self.ends.trunk_is_empty:
                    kind = ReleaseKind.HELD_OUT_ACTIVATION
                    hidden = self._through_trunk(Place(round_, 0, number), hidden, batch, kind, keep_graph=False)
                loss = self.ends.run_top(hidden, lengths, labels, train=False)
                total, tokens = total + loss.total, tokens + loss.tokens
        return HeadLoss(total, tokens)


@dataclass
class Below:
    """The last hop of a micro-batch: the gradient for the bottom, once the trunk has sent it."""

    trainer: Trainer
    hidden: Tensor
    reply: Future[Answer] | None

    def finish(self) -> None:
        """Wait for the trunk, and run backward through the bottom where it trains."""
        ends = self.trainer.ends
        if self.reply is None:
            return
        answer = answered(self.reply)
        if not isinstance(answer, Gradient):
            raise ProtocolError(f"{type(answer).__name__} instead of a gradient")
        if ends.bottom_trains and answer.gradient is not None:
            gradient = decode_tensor(answer.gradient, ends.device, what="the gradient that the trunk returned")
            self.hidden.backward(gradient)  # type: ignore[no-untyped-call]


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
