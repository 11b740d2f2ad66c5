"""Every release of a fixed sample of records, kept encrypted on the client, for its audit to attack.

The sample is the records with the smallest keyed hashes: chosen without looking at them, and the same in every start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from splitfl.privacy.vault import Vault, pack, unpack
from splitfl.wire.messages import TensorBytes

PREFIX, HEAD = b"audit/", b"update/head"
RETURNED = "returned"  # kind of what the trunk gave back, beside the gradient that answered it
MOST_HEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Keepsake:
    """One release of one record: its key in the budget, kind, round, running number, and the bytes that left."""

    key: bytes
    kind: str
    round: int
    number: int
    payload: TensorBytes


def sample(keys: Iterable[bytes], count: int) -> frozenset[bytes]:
    """The ``count`` records of which everything is kept."""
    return frozenset(sorted(keys)[:count])


class Keepsakes:
    """Keeps what the records of ``chosen`` release in ``vault``."""

    def __init__(self, vault: Vault, chosen: frozenset[bytes]) -> None:
        self.vault = vault
        self.chosen = chosen
        self._number = len(vault.names(PREFIX))

    def keep(self, kind: str, round_: int, releases: Iterable[tuple[bytes, TensorBytes]]) -> None:
        """Keep those releases (record key, bytes) that belong to the sample."""
        entries = []
        for key, payload in releases:
            if key in self.chosen:
                name = PREFIX + f"{key.hex()}/{self._number:010d}/{round_}/{kind}".encode()
                entries.append((name, pack(payload)))
                self._number += 1
        if entries:
            self.vault.put(entries)

    def keep_head(self, head: Tensor | None, labels: Iterable[int]) -> None:
        """Keep the output head (V, D) of the first update and which labels it had learned from, if it is not huge."""
        if head is None or 4 * head.numel() > MOST_HEAD_BYTES:
            return
        known = torch.tensor(sorted(label for label in labels if label >= 0))
        self.vault.put([(HEAD, save({"head": head.float().contiguous(), "labels": known}))])


def read_head(vault: Vault) -> tuple[Tensor, Tensor] | None:
    """Head (V, D) and labels (N,) of the first update, where they were kept."""
    data = vault.get(HEAD)
    if data is None:
        return None
    tensors = load(data)
    return tensors["head"], tensors["labels"]


def read_keepsakes(vault: Vault) -> list[Keepsake]:
    """All that was kept, record by record, in the order of release. Raises StorageError."""
    kept = []
    for name in vault.names(PREFIX):
        key, number, round_, kind = name[len(PREFIX) :].decode().split("/", 3)
        data = vault.get(name)
        assert data is not None
        kept.append(Keepsake(bytes.fromhex(key), kind, int(round_), int(number), unpack(data)))
    return kept
