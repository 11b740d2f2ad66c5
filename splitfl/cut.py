"""Where a model is cut: how many blocks of it a client keeps at each end.

A cut is two numbers and says nothing of weights; planners, clients and the server all speak of it, so it
knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfl.errors import ConfigError


@dataclass(frozen=True, order=True)
class Cut:
    """``n_bottom`` first blocks and ``n_top`` last blocks stay on the client; the trunk is what lies between.

    ``Cut(0, 0)`` keeps embedding and output head alone. ``Cut(0, L)`` keeps every block: the trunk is empty,
    no activation leaves, and the client does plain federated learning.
    """

    n_bottom: int
    n_top: int

    def __post_init__(self) -> None:
        if self.n_bottom < 0 or self.n_top < 0:
            raise ConfigError(f"cut {self} is negative", "Both numbers are counts of blocks: 0 or more.")

    def __str__(self) -> str:
        return f"{self.n_bottom},{self.n_top}"

    @classmethod
    def parse(cls, text: str) -> Cut:
        """Read ``"N,N"`` (blocks at the bottom, blocks at the top). Raises ConfigError."""
        parts = text.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise ConfigError(f"cut {text!r} is not two numbers", "Write it as BOTTOM,TOP, for example 1,1.")
        return cls(int(parts[0]), int(parts[1]))

    def check(self, layers: int) -> None:
        """Raise ConfigError when a model of ``layers`` blocks is too small for this cut."""
        if self.n_bottom + self.n_top > layers:
            raise ConfigError(
                f"cut {self} keeps {self.n_bottom + self.n_top} blocks but the model has {layers}",
                f"Choose a cut whose two numbers add up to at most {layers}.",
            )

    def trunk(self, layers: int) -> range:
        """Blocks that run on the server."""
        self.check(layers)
        return range(self.n_bottom, layers - self.n_top)

    def top(self, layers: int) -> range:
        """Blocks at the client's top."""
        self.check(layers)
        return range(layers - self.n_top, layers)
