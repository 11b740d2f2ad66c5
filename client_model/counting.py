"""Counts what a client does over all its starts: rounds taken, bytes on the link, starts that were cut short."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from client_model.store import ClientStore


class Counted(Protocol):
    """What is counted of a link: whole frames, in bytes."""

    bytes_sent: int
    bytes_received: int


class Count:
    """Counts on from what earlier starts have saved in ``store``; ``data`` is the fingerprint of the data file."""

    def __init__(self, store: ClientStore, link: Counted) -> None:
        """Raises StorageError for a damaged tally."""
        self._store = store
        self._link = link
        self.before = store.tally()
        cut_short = self.before.uncounted_starts + self.before.open
        self.tally = replace(self.before, starts=self.before.starts + 1, uncounted_starts=cut_short)

    def go_on(self, link: Counted) -> None:
        """Count the same start on over another link, which counts from nought."""
        self.before, self._link = self.tally, link

    def save(self, *, still_open: bool, data: str = "") -> None:
        """Make the count durable. Raises StorageError."""
        traffic = self.total_traffic()
        data = data or self.tally.data
        self.tally = replace(self.tally, open=still_open, data=data, **traffic)
        self._store.save_tally(self.tally)

    def set_rounds(self, taken: int) -> None:
        """One more round is over: so many were taken part in. Raises StorageError."""
        self.tally = replace(self.tally, rounds_taken=taken)
        self.save(still_open=True)

    def traffic(self) -> dict[str, int]:
        """Bytes of this start."""
        return {"bytes_sent": self._link.bytes_sent, "bytes_received": self._link.bytes_received}

    def total_traffic(self) -> dict[str, int]:
        """Bytes over all starts, as far as they were counted."""
        sent, received = self.before.bytes_sent, self.before.bytes_received
        return {"bytes_sent": sent + self._link.bytes_sent, "bytes_received": received + self._link.bytes_received}
