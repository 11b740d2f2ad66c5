"""What a release costs: the rows of the ledger that it takes, by kind. Pure; asked before a step and when it is paid.

Before a step the same rows say whether its records may take part at all: a step that began can be paid for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfl.privacy.ledger import EVERYTHING, ReleaseKind, Row
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.policy import Policy

MOST_LOSS = 20.0  # nats a token: a loss above it says no more than that it is bad
AS_IT_IS = (1.0, 0.0)  # sensitivity and sigma of what travels without noise: no bound
POST_PROCESSING = (0.0, 0.0)  # of what is computed from releases that are paid for
ACTIVATIONS = (ReleaseKind.ACTIVATION, ReleaseKind.HELD_OUT_ACTIVATION)


@dataclass(frozen=True)
class RecordRef:
    """A record as the gate knows it: its ``key`` in the budget (a keyed hash) and its public padded length."""

    key: bytes
    padded_length: int


@dataclass(frozen=True)
class Leaving:
    """What leaves: SHA-256 and number of its bytes. Nothing, where a row only pays for what weights have learned."""

    payload: bytes = b""
    nbytes: int = 0


def tainted(policy: Policy, kind: ReleaseKind) -> bool:
    """Whether such a release depends on weights that private records have trained without DP.

    Activations see the bottom, which may be frozen; whatever else leaves sees the top, which trains from the first
    step on. After DP-SGD weights are post-processing of what it has paid for.
    """
    return policy.dp_sgd is None and (policy.bottom_trains or kind not in ACTIVATIONS)


def mechanism_of(policy: Policy, kind: ReleaseKind) -> Mechanism | None:
    """What is done to a tensor (B, T, D) of this kind; None where none may leave."""
    return policy.gradients if kind is ReleaseKind.GRADIENT else policy.activations


def bounds(policy: Policy, kind: ReleaseKind, records: Sequence[RecordRef]) -> list[tuple[bytes, float, float]]:
    """Whose rows a release of ``records`` takes: (record, sensitivity, sigma) of each.

    Tensors have one a record. What is computed from several at once has one for each of them, or with the client as
    the unit one for all, by what all together can change.
    """
    if not policy.private:
        return [(EVERYTHING, *AS_IT_IS)]
    if kind is ReleaseKind.WEIGHTS:
        return [(EVERYTHING, *(AS_IT_IS if policy.dp_sgd is None else POST_PROCESSING))]
    if kind is ReleaseKind.DP_SGD:
        assert policy.dp_sgd is not None
        parts = 1 + policy.bottom_trains  # each has noise of its own
        return joint(policy, policy.dp_sgd.sensitivity, policy.dp_sgd.sigma, records) * parts
    if kind is ReleaseKind.METRIC:
        one = MOST_LOSS / len(records)
        return joint(policy, one, policy.metric_noise * (one if policy.unit == "record" else MOST_LOSS), records)
    mechanism = mechanism_of(policy, kind)
    assert mechanism is not None
    return [(record.key, mechanism.sensitivity(record.padded_length), mechanism.sigma) for record in records]


def joint(
    policy: Policy, sensitivity: float, sigma: float, records: Sequence[RecordRef]
) -> list[tuple[bytes, float, float]]:
    """Bounds of one noised sum or mean over records, which each changes by ``sensitivity`` at most."""
    if policy.unit == "client":
        return [(EVERYTHING, sensitivity * len(records), sigma)]
    return [(record.key, sensitivity, sigma) for record in records]


def rows_of(
    policy: Policy, kind: ReleaseKind, records: Sequence[RecordRef], leaving: Sequence[Leaving], round_: int
) -> list[Row]:
    """The rows of one release; ``leaving`` has an entry for each of them, or a single one for all."""
    bounded, taint = bounds(policy, kind, records), tainted(policy, kind)
    each = [*leaving] * len(bounded) if len(leaving) == 1 else leaving
    return [
        Row(record, kind.value, sensitivity, sigma, round_, taint, left.payload, left.nbytes)
        for (record, sensitivity, sigma), left in zip(bounded, each, strict=True)
    ]


def step_rows(policy: Policy, records: Sequence[RecordRef], fresh: Sequence[RecordRef], *, trains: bool) -> list[Row]:
    """All rows that a step with ``records`` takes, activations for the ``fresh`` ones among them alone. Held-out
    records do not train."""
    kinds = [(ReleaseKind.ACTIVATION if trains else ReleaseKind.HELD_OUT_ACTIVATION, fresh)]
    if trains and policy.gradients is not None:
        kinds.append((ReleaseKind.GRADIENT, records))
    if trains and policy.dp_sgd is not None:
        kinds.append((ReleaseKind.DP_SGD, records))
    return [row for kind, of_it in kinds for row in rows_of(policy, kind, of_it, [Leaving()], 0)]
