"""The one door out: everything computed from a client's records leaves through here, by kind, and is counted.

In mode ``off`` the door only counts, and its report says that the server can read the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from enum import Enum

from safetensors.torch import save as to_safetensors
from torch import Tensor

from splitfl.codec.tensors import CodecName, check_finite, encode_tensor
from splitfl.wire.messages import TensorBytes


class ReleaseKind(Enum):
    """What can be computed from a record and leave."""

    ACTIVATION = "activations"
    HELD_OUT_ACTIVATION = "activations of held-out records"
    GRADIENT = "gradients"
    WEIGHTS = "weights"


#: what mode "off" means, in the words that the closing report uses
STATEMENT = "No noise was added: the server can read the text, and labels can be recovered from gradients."


class Gate:
    """Encodes what leaves and keeps count of it."""

    def __init__(
        self, codec: CodecName, releases: Mapping[str, int] | None = None, nbytes: Mapping[str, int] | None = None
    ) -> None:
        """``releases`` and ``nbytes``: what had left before, by kind."""
        self.codec = codec
        self.releases: Counter[str] = Counter(releases)
        self.bytes: Counter[str] = Counter(nbytes)

    def release(self, kind: ReleaseKind, tensor: Tensor) -> TensorBytes:
        """Encode a tensor that leaves. Raises NumericalError for NaN or infinity; then nothing leaves."""
        payload = encode_tensor(tensor, self.codec)
        self._count(kind, payload.nbytes)
        return payload

    def release_weights(self, weights: Mapping[str, Tensor]) -> bytes:
        """Encode weights that leave as a safetensors file. Raises NumericalError; then nothing leaves."""
        for name, tensor in weights.items():
            check_finite(tensor, f"weight {name!r}")
        data: bytes = to_safetensors({name: tensor.contiguous() for name, tensor in weights.items()})
        self._count(ReleaseKind.WEIGHTS, len(data))
        return data

    def _count(self, kind: ReleaseKind, nbytes: int) -> None:
        """Note a release of ``nbytes`` bytes."""
        self.releases[kind.value] += 1
        self.bytes[kind.value] += nbytes

    def report(self) -> dict[str, object]:
        """What left, by kind, and what that means."""
        return {
            "mode": "off",
            "statement": STATEMENT,
            "stayed": ["the data file", "label ids", "losses", "moments of the optimizer"],
            "told": ["this client's name", "number and lengths of records", "counts of label tokens", "when it works"],
            "left": {
                kind: {"releases": self.releases[kind], "bytes": self.bytes[kind]} for kind in sorted(self.releases)
            },
        }
