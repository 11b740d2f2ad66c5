"""The one door out: everything computed from a client's records leaves through here, by kind.

    clip -> noise -> bytes, and a row of the ledger, durable -> they may leave

The same bytes again are free; a new draw is a new row. When the ledger cannot be written or a budget is spent, an
error comes instead of bytes. In mode ``off`` the rows say that there was no noise.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from splitfl.codec.tensors import CodecName, by_record, check_finite, encode_tensor
from splitfl.errors import PrivacyError
from splitfl.privacy.budget import Budget
from splitfl.privacy.keepsakes import RETURNED, Keepsakes
from splitfl.privacy.ledger import EVERYTHING, Ledger, Row
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.noise import NormalSource
from splitfl.privacy.policy import Policy
from splitfl.privacy.vault import Vault, pack, unpack
from splitfl.wire.messages import TensorBytes

MOST_LOSS = 20.0  # nats a token: a loss above it says no more than that it is bad
NO_NOISE = (1.0, 0.0)  # sensitivity and sigma of what travels as it is: no bound
POST_PROCESSING = (0.0, 0.0)  # of what is computed from releases that are paid for


class ReleaseKind(Enum):
    """What can be computed from a record and leave."""

    ACTIVATION = "activations"
    HELD_OUT_ACTIVATION = "activations of held-out records"
    GRADIENT = "gradients"
    DP_SGD = "steps of DP-SGD"
    WEIGHTS = "weights"
    METRIC = "held-out losses"


@dataclass(frozen=True)
class RecordRef:
    """A record as the gate knows it: its ``key`` in the budget (a keyed hash) and its public padded length."""

    key: bytes
    padded_length: int


class Gate:
    """Lets out what ``policy`` allows. ``secret`` keys the records' names at the server; ``context`` is whatever an
    activation depends on beside its record (bottom, cut, arithmetic): another context makes another release."""

    def __init__(
        self,
        policy: Policy,
        codec: CodecName,
        ledger: Ledger,
        vault: Vault,
        noise: NormalSource,
        *,
        secret: bytes,
        context: str = "",
        bottom_trains: bool = False,
        audited: frozenset[bytes] = frozenset(),
    ) -> None:
        self.policy = policy
        self.codec = codec
        self.ledger = ledger
        self.budget = Budget(policy, ledger)
        self.vault = vault
        self.noise = noise
        self.secret = secret
        self.context = context
        self.bottom_trains = bottom_trains
        self.trained = ledger.count > 0  # the client's weights may have seen records, in an earlier start too
        self.keepsakes = Keepsakes(vault, audited)
        self._paid: dict[str, TensorBytes | None] = {}  # names released; bytes while they are at hand

    # -- activations, once for each record -------------------------------------------------------------------------

    def release_once(
        self, kind: ReleaseKind, round_: int, records: Sequence[RecordRef], hidden: Callable[[], Tensor]
    ) -> list[str]:
        """Pay for the activations of records, if they are not paid for; returns their names at the server.

        ``hidden`` gives (B, T, D) and is called only when some record is new; ``payload`` gives the bytes. Raises
        PrivacyError, NumericalError and StorageError; then nothing new leaves.
        """
        names = [self.name_of(record) for record in records]
        fresh = [n for n, name in enumerate(names) if names.index(name) == n and not self.is_paid(name)]
        if fresh:
            new = [records[number] for number in fresh]
            made = self._in_vault([names[n] for n in fresh]) or self._draw(
                new, [names[n] for n in fresh], hidden()[fresh]
            )
            self._charge_activations(kind, round_, new, made)
            self._paid |= {names[number]: payload for number, payload in zip(fresh, made, strict=True)}
        return names

    def _in_vault(self, names: Sequence[str]) -> list[TensorBytes] | None:
        """Bytes that were drawn before a crash and not paid for: they are paid now, not drawn again."""
        found = [self.vault.get(vault_name(name)) for name in names]
        return [unpack(data) for data in found if data is not None] if None not in found else None

    def _draw(self, records: Sequence[RecordRef], names: Sequence[str], hidden: Tensor) -> list[TensorBytes]:
        """Clip and noise records (B, T, D), each at its own padded length, and make the bytes durable."""
        assert self.policy.activations is not None
        check_finite(hidden, "an activation")
        made = []
        for number, record in enumerate(records):
            own = hidden[number : number + 1, : record.padded_length]  # (1, T, D)
            noised = self.policy.activations(own, self.noise)
            made.append(encode_tensor(noised[0], self.codec))
        self.vault.put((vault_name(name), pack(payload)) for name, payload in zip(names, made, strict=True))
        return made

    def _charge_activations(
        self, kind: ReleaseKind, round_: int, records: Sequence[RecordRef], payloads: Sequence[TensorBytes]
    ) -> None:
        assert self.policy.activations is not None
        self._charge(self._rows(kind, round_, self.policy.activations, records, payloads, tainted=False))

    def is_paid(self, name: str) -> bool:
        """Whether this activation is in the vault and in the ledger."""
        if name not in self._paid:
            data = self.vault.get(vault_name(name))
            if data is None or not self.ledger.knows(digest(unpack(data))):
                return False
            self._paid[name] = None
        return True

    def payload(self, name: str) -> TensorBytes:
        """The bytes (T, D) of an activation that is paid for: the same ones, whenever they are asked for."""
        at_hand = self._paid[name]
        if at_hand is not None:
            self._paid[name] = None  # from now on the vault has them
            return at_hand
        data = self.vault.get(vault_name(name))
        assert data is not None
        payload = unpack(data)
        if not self.ledger.knows(digest(payload)):
            raise PrivacyError("a stored release is not the one that was paid for", "Put back the state folder.")
        return payload

    def name_of(self, record: RecordRef) -> str:
        """The opaque name of a record's activation: 32 hex digits, another one for whatever it depends on."""
        text = f"{self.context}\0{self.policy.activations}\0{self.codec}\0{record.padded_length}\0"
        return hmac.new(self.secret, b"name\0" + text.encode() + record.key, hashlib.sha256).hexdigest()[:32]

    # -- anything else -----------------------------------------------------------------------------------------------

    def release(self, kind: ReleaseKind, round_: int, tensor: Tensor, records: Sequence[RecordRef]) -> TensorBytes:
        """A batch (B, T, D) of gradients, or of activations that are released anew each time; a row for each record.

        In mode off there is one row and no record is named. Raises PrivacyError, NumericalError, StorageError.
        """
        if not self.policy.private:
            check_finite(tensor, "what is about to be sent")
            payload = encode_tensor(tensor, self.codec)
            row = Row(EVERYTHING, kind.value, *NO_NOISE, round_, self.trained, digest(payload), payload.nbytes)
            self._charge([row])
            return payload
        mechanism = self.policy.gradients if kind is ReleaseKind.GRADIENT else self.policy.activations
        if mechanism is None:
            raise PrivacyError(f"{kind.value} do not leave in this federation", "This is a fault inside SplitFL.")
        if kind is ReleaseKind.GRADIENT:
            tensor = without_overflow(tensor)
        check_finite(tensor, "an activation")
        payload = encode_tensor(self._noised(mechanism, tensor, records), self.codec)
        tainted = self.trained and (self.policy.dp_sgd is None or self.bottom_trains)
        self._charge(self._rows(kind, round_, mechanism, records, by_record(payload), tainted=tainted))
        return payload

    def _noised(self, mechanism: Mechanism, tensor: Tensor, records: Sequence[RecordRef]) -> Tensor:
        """Each record up to its own padded length; what lies beyond is the batch's, and zero."""
        sent = torch.zeros(tensor.shape)
        for number, record in enumerate(records):
            own = tensor[number : number + 1, : record.padded_length]
            sent[number, : record.padded_length] = mechanism(own, self.noise)[0]
        return sent

    def keep_returned(self, round_: int, hidden: Tensor, records: Sequence[RecordRef]) -> None:
        """Keep what the trunk returned (B, T, D) beside the gradients that answer it, for the audit: it knows it."""
        if any(record.key in self.keepsakes.chosen for record in records):
            pieces = by_record(encode_tensor(hidden, "fp32"))
            self.keepsakes.keep(RETURNED, round_, zip([record.key for record in records], pieces, strict=True))

    def charge_dp_sgd(self, round_: int, records: Sequence[RecordRef], parts: int = 1) -> None:
        """Pay for a step of DP-SGD, before its noise is drawn: each part (top, bottom) has noise of its own.

        Raises PrivacyError, StorageError.
        """
        dp_sgd = self.policy.dp_sgd
        assert dp_sgd is not None
        step = secrets.token_bytes(32)  # what leaves of it is the weights, later
        kind, one = ReleaseKind.DP_SGD.value, dp_sgd.sensitivity
        if self.policy.unit == "client":  # all of its records may change at once
            rows = [Row(EVERYTHING, kind, one * len(records), dp_sgd.sigma, round_, False, step, 0)]
        else:
            rows = [Row(record.key, kind, one, dp_sgd.sigma, round_, False, step, 0) for record in records]
        self._charge(rows * parts)

    def release_weights(self, round_: int, weights: Mapping[str, Tensor]) -> bytes:
        """Trained weights as a safetensors file. After DP-SGD they are post-processing of its steps; else nothing
        bounds what they tell. The same bytes again are free. Raises NumericalError, StorageError."""
        for name, tensor in weights.items():
            check_finite(tensor, f"weight {name!r}")
        data: bytes = to_safetensors({name: tensor.contiguous() for name, tensor in weights.items()})
        plain = self.policy.dp_sgd is None
        bounds = NO_NOISE if plain else POST_PROCESSING
        payload = hashlib.sha256(data).digest()
        if not self.ledger.knows(payload):
            self._charge([Row(EVERYTHING, ReleaseKind.WEIGHTS.value, *bounds, round_, plain, payload, len(data))])
        return data

    def release_metric(self, round_: int, losses: Sequence[float], records: Sequence[RecordRef]) -> float:
        """The mean of held-out records' losses, each clipped to [0, MOST_LOSS] nats, noised with privacy on.

        Replacing one of n records changes it by MOST_LOSS / n at most. Raises PrivacyError, StorageError.
        """
        clipped = [min(max(loss, 0.0), MOST_LOSS) if loss == loss else MOST_LOSS for loss in losses]
        mean, one = sum(clipped) / len(clipped), MOST_LOSS / len(clipped)
        kind, payload = ReleaseKind.METRIC.value, secrets.token_bytes(32)
        if not self.policy.private:
            self._charge([Row(EVERYTHING, kind, *NO_NOISE, round_, self.trained, payload, 8)])
            return mean
        keys, sensitivity = [record.key for record in records], one
        if self.policy.unit == "client":
            keys, sensitivity = [EVERYTHING], MOST_LOSS
        sigma, tainted = self.policy.metric_noise * sensitivity, self.trained and self.policy.dp_sgd is None
        self._charge([Row(key, kind, sensitivity, sigma, round_, tainted, payload, 8) for key in keys])
        return mean + sigma * float(self.noise.normal((1,)))

    # -- what it costs -----------------------------------------------------------------------------------------------

    def cost(self, record: RecordRef, *, trains: bool) -> float:
        """mu^2 of one more step with this record; ``trains`` is False for held-out ones."""
        policy, length = self.policy, record.padded_length
        new = policy.activations is not None and not self.is_paid(self.name_of(record))
        activation = ratio(policy.activations, length) if new and policy.activations is not None else 0.0
        if not trains:
            return activation
        gradient = 0.0 if policy.gradients is None else ratio(policy.gradients, length)
        own = 0.0 if policy.dp_sgd is None else (policy.dp_sgd.sensitivity / policy.dp_sgd.sigma) ** 2
        return activation + gradient + own

    def _rows(
        self,
        kind: ReleaseKind,
        round_: int,
        mechanism: Mechanism,
        records: Sequence[RecordRef],
        payloads: Sequence[TensorBytes],
        *,
        tainted: bool,
    ) -> list[Row]:
        self.keepsakes.keep(kind.value, round_, zip([record.key for record in records], payloads, strict=True))
        return [
            Row(
                record.key,
                kind.value,
                mechanism.sensitivity(record.padded_length),
                mechanism.sigma,
                round_,
                tainted,
                digest(payload),
                payload.nbytes,
            )
            for record, payload in zip(records, payloads, strict=True)
        ]

    def _charge(self, rows: Sequence[Row]) -> None:
        if self.policy.private:
            self.budget.check(rows)
        self.ledger.append(rows)


def without_overflow(gradients: Tensor) -> Tensor:
    """Gradients (B, T, D) with zeros for a record whose own are not finite.

    To sit such a step out would tell the server one bit about the record, at a price of nothing: whoever serves the
    trunk can choose hidden states that overflow for one label and not for another.
    """
    sound = gradients.isfinite().flatten(1).all(dim=1)  # (B,)
    return torch.where(sound[:, None, None], gradients, torch.zeros_like(gradients))


def ratio(mechanism: Mechanism, padded_length: int) -> float:
    """mu^2 of one release."""
    return (mechanism.sensitivity(padded_length) / mechanism.sigma) ** 2


def digest(payload: TensorBytes) -> bytes:
    """SHA-256 of the bytes that leave."""
    return hashlib.sha256(payload.data).digest()


def vault_name(name: str) -> bytes:
    return b"activation/" + name.encode()
