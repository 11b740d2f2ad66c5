"""Activations that are released once: drawn, kept, paid for, and the same bytes whenever they are asked for again.

With a frozen bottom a record's activation does not change; fresh noise each time would average out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence

from torch import Tensor

from splitfl.codec.tensors import CodecName, check_finite, encode_tensor
from splitfl.errors import PrivacyError
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.ledger import Ledger, ReleaseKind
from splitfl.privacy.mechanism import Mechanism
from splitfl.privacy.noise import NormalSource
from splitfl.privacy.vault import Vault, pack, unpack
from splitfl.wire.messages import TensorBytes

#: (kind, round, records, their bytes): rows for what is about to leave; raises PrivacyError, StorageError
Pay = Callable[[ReleaseKind, int, Sequence[RecordRef], Sequence[TensorBytes]], None]


class OnceReleases:
    """Activations under ``mechanism``. ``secret`` keys the records' names at the server; ``context`` is whatever an
    activation depends on beside its record (bottom, cut, arithmetic): another context makes another release."""

    def __init__(
        self,
        mechanism: Mechanism | None,
        codec: CodecName,
        ledger: Ledger,
        vault: Vault,
        noise: NormalSource,
        pay: Pay,
        *,
        secret: bytes,
        context: str,
    ) -> None:
        self.mechanism = mechanism
        self.codec = codec
        self.ledger = ledger
        self.vault = vault
        self.noise = noise
        self.pay = pay
        self.secret = secret
        self.context = context
        self._paid: dict[str, TensorBytes | None] = {}  # names released; bytes while they are at hand

    def release(
        self, kind: ReleaseKind, round_: int, records: Sequence[RecordRef], hidden: Callable[[], Tensor]
    ) -> list[str]:
        """Pay for the activations of records, if they are not paid for; returns their names at the server.

        ``hidden`` gives (B, T, D) and is called only when some record is new; ``payload`` gives the bytes. Raises
        PrivacyError, NumericalError and StorageError; then nothing new leaves.
        """
        names = [self.name_of(record) for record in records]
        fresh = [n for n, name in enumerate(names) if names.index(name) == n and not self._is_paid(name)]
        if fresh:
            new, new_names = [records[number] for number in fresh], [names[number] for number in fresh]
            made = self._in_vault(new_names) or self._draw(new, new_names, hidden()[fresh])
            self.pay(kind, round_, new, made)
            self._paid |= zip(new_names, made, strict=True)
        return names

    def _in_vault(self, names: Sequence[str]) -> list[TensorBytes] | None:
        """Bytes that were drawn before a crash and not paid for: they are paid now, not drawn again."""
        found = [self.vault.get(vault_name(name)) for name in names]
        return [unpack(data) for data in found if data is not None] if None not in found else None

    def _draw(self, records: Sequence[RecordRef], names: Sequence[str], hidden: Tensor) -> list[TensorBytes]:
        """Clip and noise records (B, T, D), each at its own padded length, and make the bytes durable."""
        assert self.mechanism is not None
        check_finite(hidden, "an activation")
        made = []
        for number, record in enumerate(records):
            own = hidden[number : number + 1, : record.padded_length]  # (1, T, D)
            noised = self.mechanism(own, self.noise)
            made.append(encode_tensor(noised[0], self.codec))
        self.vault.put((vault_name(name), pack(payload)) for name, payload in zip(names, made, strict=True))
        return made

    def is_paid(self, record: RecordRef) -> bool:
        """Whether this record's activation is in the vault and in the ledger."""
        return self._is_paid(self.name_of(record))

    def _is_paid(self, name: str) -> bool:
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
        return self._name(record.key, record.padded_length)

    def name_of_tokens(self, tokens: bytes) -> str:
        """The same in mode off, where a row's tokens decide all."""
        return self._name(tokens, len(tokens))

    def _name(self, key: bytes, length: int) -> str:
        text = f"{self.context}\0{self.mechanism}\0{self.codec}\0{length}\0"
        return hmac.new(self.secret, b"name\0" + text.encode() + key, hashlib.sha256).hexdigest()[:32]


def digest(payload: TensorBytes) -> bytes:
    """SHA-256 of the bytes that leave."""
    return hashlib.sha256(payload.data).digest()


def vault_name(name: str) -> bytes:
    return b"activation/" + name.encode()
