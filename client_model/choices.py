"""What this client does its own way; what it leaves open is as the federation has it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.planning.plan import Plan


@dataclass(frozen=True)
class Choices:
    """A client's own cut, pieces of a step, how many of them are under way at once, arithmetic and number format on the
    wire. None, 0 and "" leave it to the federation."""

    cut: Cut | None = None
    micro_batches: int = 0
    in_flight: int = 0
    dtype: Literal["", "auto", "fp32", "bf16"] = ""
    codec: Literal["", "fp32", "bf16", "fp16", "int8"] = ""

    @classmethod
    def of(cls, plan: Plan) -> Choices:
        """Everything as ``plan`` has it."""
        return cls(**vars(plan))

    def applied(self, settings: Federation) -> Federation:
        """``settings`` as this client trains by them."""
        own = {"micro_batches": self.micro_batches, "in_flight": self.in_flight}
        batch = settings.batch.model_copy(update={name: number for name, number in own.items() if number})
        model = settings.model.model_copy(update={"compute": self.dtype} if self.dtype else {})
        wire = settings.wire.model_copy(update={"codec": self.codec} if self.codec else {})
        return settings.model_copy(update={"batch": batch, "model": model, "wire": wire})

    def settled(self, settings: Federation) -> Choices:
        """The same with nothing left open."""
        own = self.applied(settings)
        batch = own.batch
        return Choices(self.cut or own.cut, batch.micro_batches, batch.in_flight, own.model.compute, own.wire.codec)

    def announced(self) -> dict[str, Any]:
        """What Hello says of them; the server need not know the rest."""
        bottom, top = (-1, -1) if self.cut is None else (self.cut.n_bottom, self.cut.n_top)
        return {"n_bottom": bottom, "n_top": top, "micro_batches": self.micro_batches, "codec": self.codec}

    def as_table(self) -> dict[str, Any]:
        """For JSON; ``from_table`` reads it back equal."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Choices:
        """Raises TypeError for what ``as_table`` did not write."""
        cut = table["cut"]
        return cls(**{**table, "cut": None if cut is None else Cut(**cut)})

    def __str__(self) -> str:
        return json.dumps(self.as_table(), sort_keys=True)
