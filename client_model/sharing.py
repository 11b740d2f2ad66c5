"""The weights that a client shares: its own on their way to the merge, and the merge on its way back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from client_model.assets import PIECE_BYTES, Assets
from client_model.candidate import Connection
from client_model.ends import Ends
from client_model.store import ClientStore
from splitfl.errors import ProtocolError, RefusedError
from splitfl.files import storage_errors
from splitfl.privacy.gate import Gate
from splitfl.wire.messages import TensorBytes, Upload, Uploaded


class Sharing:
    """Of ``ends``: what leaves passes ``gate`` and crosses ``link`` from a file in ``store``; ``assets`` fetch merges.

    ``beside`` is what came beside the weights that are held, for the strategy's correction.
    """

    def __init__(self, ends: Ends, link: Connection, assets: Assets, gate: Gate, store: ClientStore) -> None:
        self.ends = ends
        self.link = link
        self.assets = assets
        self.gate = gate
        self.store = store
        self.beside: dict[str, Tensor] = {}
        self._held = self._missed = ""  # lists of merged tensors, by hash

    def take(self, weights: str) -> None:
        """Load the merge ``weights``, the hash of its list ("": there is none yet), unless it is what we hold.

        Personal weights stay.
        """
        if weights and weights != self._held:
            self.ends.load_weights(self.assets.weights(weights, self.ends.shared))
            self.beside = self.assets.weights(weights, self.ends.beside) if self.ends.beside else {}
        self._held = weights

    def take_in_time(self, weights: str, *, doing_again: bool) -> bool:
        """The same; False when that took so long that the server keeps newer ones alone: ask for those.

        Raises RefusedError when the server does not have what it still names, and in a round that is done again.
        """
        try:
            self.take(weights)
        except RefusedError as refused:
            gone_since = refused.code == "not_found" and weights != self._missed
            if not gone_since or doing_again:  # what the journal goes on with needs these weights
                raise
            self._missed = weights
            return False
        return True

    def send(self, round_: int, shared: Mapping[str, Tensor]) -> str:
        """Send this round's ``shared`` weights in pieces; returns the hash of them all, "" for none."""
        if not shared:
            return ""
        with self.store.scratch("update.safetensors") as path:
            digest = self.gate.release_weights(round_, shared, path)
            with storage_errors(path), path.open("rb") as file:
                total = path.stat().st_size
                for offset in range(0, total, PIECE_BYTES):
                    piece = file.read(PIECE_BYTES)
                    tensor = TensorBytes("u8", (len(piece),), piece)
                    answer = self.link.ask(Upload(0, 0, digest, offset, total, tensor))
                    if not isinstance(answer, Uploaded):
                        raise ProtocolError(f"{type(answer).__name__} instead of a receipt")
        return digest
