"""What a client carries under a cut: its blocks, those that train among them, and counts of weights. No bytes yet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.planning.shapes import ModelShape
from splitfl.split.flow import bottom_trains, embedding_trains, trunk_needs_backward


@dataclass(frozen=True)
class Carried:
    """The client's share of a model of ``shape`` when it is cut at ``cut``; all sizes are counts.

    Each is worked out once for a cut: a planner asks for all of them with every plan, and there are thousands.
    """

    shape: ModelShape
    settings: Federation
    cut: Cut

    @cached_property
    def trunk(self) -> range:
        """Blocks on the server."""
        return self.cut.trunk(self.shape.layers)

    @cached_property
    def bottom(self) -> tuple[int, int]:
        """Blocks of the bottom: frozen ones, trained ones."""
        return self._parted(range(self.cut.n_bottom))

    @cached_property
    def top(self) -> tuple[int, int]:
        """Blocks of the top: frozen ones, trained ones."""
        return self._parted(self.cut.top(self.shape.layers))

    def _parted(self, blocks: range) -> tuple[int, int]:
        frozen = len(range(blocks.start, min(blocks.stop, self.settings.freeze_below)))
        return frozen, len(blocks) - frozen

    @cached_property
    def embedding_trains(self) -> bool:
        return embedding_trains(self.settings)

    @cached_property
    def bottom_trains(self) -> bool:
        """Whether the trunk owes the client a gradient."""
        return bottom_trains(self.settings, self.cut)

    @cached_property
    def needs_backward(self) -> bool:
        """Whether a gradient goes into the trunk."""
        return trunk_needs_backward(self.settings, self.cut, self.shape.layers)

    @cached_property
    def private_ends(self) -> bool:
        """Whether DP-SGD trains the client's weights."""
        return self.settings.privacy.on and self.settings.privacy.dp_sgd

    @cached_property
    def head_is_table(self) -> bool:
        """Whether head and embedding are one trained tensor."""
        return self.shape.tied and self.embedding_trains

    @cached_property
    def adapter_inputs(self) -> int:
        """LoRA's A of one block, which a client keeps as it was drawn."""
        return self._rank * sum(inputs for inputs, _ in self.shape.matrices)

    @cached_property
    def adapter_outputs(self) -> int:
        """LoRA's B of one block, which trains."""
        return self._rank * sum(outputs for _, outputs in self.shape.matrices)

    @cached_property
    def head_adapter(self) -> tuple[int, int]:
        """LoRA's A and B of the head."""
        return self._rank * self.shape.hidden, self._rank * self.shape.vocab

    @property
    def _rank(self) -> int:
        return self.settings.model.lora_rank

    @cached_property
    def trained_block(self) -> int:
        """Weights that train of a block that trains."""
        return self.shape.block_weights if self.settings.model.train == "full" else self.adapter_outputs

    @cached_property
    def trained_head(self) -> int:
        """Weights that train above the last block; those of a head that is the embedding count there."""
        full = self.shape.hidden if self.head_is_table else self.shape.head_weights
        return {"full": full, "lora": self.head_adapter[1], "frozen": 0}[self.settings.model.head]

    @cached_property
    def trained_bottom(self) -> int:
        """Weights that train below the trunk."""
        return self.embedding_trains * self.shape.embedding_weights + self.bottom[1] * self.trained_block

    @cached_property
    def trained_top(self) -> int:
        """Weights that train above the trunk."""
        return self.top[1] * self.trained_block + self.trained_head

    @cached_property
    def trained(self) -> int:
        """All weights that train here."""
        return self.trained_bottom + self.trained_top

    @cached_property
    def shared(self) -> int:
        """Weights that are merged."""
        return {"none": 0, "top": self.trained_top, "ends": self.trained}[self.settings.merge.share]

    @cached_property
    def padded(self) -> bool:
        """Whether rows may be padded, so that attention takes a mask."""
        return not self.settings.packs

    def tokens(self, micro_batches: int) -> int:
        """Most tokens of a micro-batch."""
        return self.settings.batch.records // micro_batches * self.settings.batch.max_length
