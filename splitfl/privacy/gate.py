"""The one door out: everything computed from a client's records leaves through here, by kind.

    clip -> noise -> bytes, and a row of the ledger, durable -> they may leave

The same bytes again are free; a new draw is a new row. When the ledger cannot be written or a budget is spent, an
error comes instead of bytes. In mode ``off`` the rows say that there was no noise.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from splitfl.codec.stored import write_tensors
from splitfl.codec.tensors import CodecName, by_record, check_finite, encode_tensor
from splitfl.errors import PrivacyError
from splitfl.files import storage_errors
from splitfl.privacy.budget import Budget, Reservation
from splitfl.privacy.charges import MOST_LOSS, Leaving, RecordRef, bounds, mechanism_of, rows_of
from splitfl.privacy.keepsakes import RETURNED, Keepsakes
from splitfl.privacy.ledger import Ledger, ReleaseKind
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.noise import NormalSource
from splitfl.privacy.once import OnceReleases, digest
from splitfl.privacy.policy import Policy
from splitfl.privacy.vault import Vault
from splitfl.wire.messages import TensorBytes


class Gate:
    """Lets out what ``policy`` allows; ``once`` are the activations that are released once for each record.

    ``secret`` and ``context`` are theirs; everything that the records ``audited`` release is kept for the audit.
    """

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
        audited: frozenset[bytes] = frozenset(),
    ) -> None:
        self.policy = policy
        self.codec = codec
        self.ledger = ledger
        self.budget = Budget(policy, ledger)
        self.noise = noise
        self.keepsakes = Keepsakes(vault, audited)
        mechanism, pay = policy.activations, self._pay_by_record
        self.once = OnceReleases(mechanism, codec, ledger, vault, noise, pay, secret=secret, context=context)

    def reserve(self) -> Reservation:
        """Picks the records of a step that can be paid for to its end."""
        return Reservation(self.budget, self.once.is_paid)

    def release(self, kind: ReleaseKind, round_: int, tensor: Tensor, records: Sequence[RecordRef]) -> TensorBytes:
        """A batch (B, T, D) of gradients, or of activations that are released anew each time; a row for each record.

        In mode off there is one row and no record is named. Raises PrivacyError, NumericalError, StorageError.
        """
        if not self.policy.private:
            payload = encode_tensor(tensor, self.codec)
            self._pay(kind, round_, [], [Leaving(digest(payload), payload.nbytes)])
            return payload
        mechanism = mechanism_of(self.policy, kind)
        if mechanism is None:
            raise PrivacyError(f"{kind.value} do not leave in this federation", "This is a fault inside SplitFL.")
        if kind is ReleaseKind.GRADIENT:
            tensor = without_overflow(tensor)
        check_finite(tensor, "an activation")
        payload = encode_tensor(self._noised(mechanism, tensor, records), self.codec)
        self._pay_by_record(kind, round_, records, by_record(payload))
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

    def charge_dp_sgd(self, round_: int, records: Sequence[RecordRef]) -> None:
        """Pay for a step of DP-SGD, before its noise is drawn. Raises PrivacyError, StorageError."""
        self._pay(ReleaseKind.DP_SGD, round_, records, [Leaving()])

    def release_weights(self, round_: int, weights: Mapping[str, Tensor], path: Path) -> str:
        """Trained weights as the safetensors file ``path``, which may leave then; returns its SHA-256 in hex.

        After DP-SGD they are post-processing of its steps; else nothing bounds what they tell. The same bytes again are
        free. A file, for in memory they would be one more copy of all that trains. Raises NumericalError, StorageError.
        """
        for name, tensor in weights.items():
            check_finite(tensor, f"weight {name!r}")
        with storage_errors(path):
            write_tensors(weights, path)
            with path.open("rb") as file:
                payload = hashlib.file_digest(file, "sha256")
            size = path.stat().st_size
        if not self.ledger.knows(payload.digest()):
            self._pay(ReleaseKind.WEIGHTS, round_, [], [Leaving(payload.digest(), size)])
        return payload.hexdigest()

    def release_metric(self, round_: int, losses: Sequence[float], records: Sequence[RecordRef]) -> float:
        """The mean of held-out records' losses, each clipped to [0, MOST_LOSS] nats, noised with privacy on.

        Replacing one of n records changes it by MOST_LOSS / n at most. Raises PrivacyError, StorageError.
        """
        clipped = [min(max(loss, 0.0), MOST_LOSS) if loss == loss else MOST_LOSS for loss in losses]
        _, _, sigma = bounds(self.policy, ReleaseKind.METRIC, records)[0]
        sent = sum(clipped) / len(clipped) + sigma * float(self.noise.normal((1,)))
        self._pay(ReleaseKind.METRIC, round_, records, [leaving_number(sent)])
        return sent

    def _pay_by_record(
        self, kind: ReleaseKind, round_: int, records: Sequence[RecordRef], payloads: Sequence[TensorBytes]
    ) -> None:
        """Rows for tensors of single records, which are kept for the audit where it wants them."""
        self.keepsakes.keep(kind.value, round_, zip([record.key for record in records], payloads, strict=True))
        self._pay(kind, round_, records, [Leaving(digest(payload), payload.nbytes) for payload in payloads])

    def _pay(self, kind: ReleaseKind, round_: int, records: Sequence[RecordRef], leaving: Sequence[Leaving]) -> None:
        rows = rows_of(self.policy, kind, records, leaving, round_)
        self.budget.check(rows)
        self.ledger.append(rows)


def leaving_number(value: float) -> Leaving:
    """A number as it leaves: 8 bytes, little-endian."""
    return Leaving(hashlib.sha256(struct.pack("<d", value)).digest(), 8)


def without_overflow(gradients: Tensor) -> Tensor:
    """Gradients (B, T, D) with zeros for a record whose own are not finite.

    To sit such a step out would tell the server one bit about the record, at a price of nothing: whoever serves the
    trunk can choose hidden states that overflow for one label and not for another.
    """
    sound = gradients.isfinite().flatten(1).all(dim=1)  # (B,)
    return torch.where(sound[:, None, None], gradients, torch.zeros_like(gradients))
