"""The public base model in the attacker's hands: bottom, trunk, top and the whole of it, in fp32, all frozen.

:class:`Prefixes` walks many token sequences at once through a segment, position by position, and asks what each of
many next tokens would give: the heart of causal enumeration.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor
from transformers import DynamicCache

from splitfl.cut import Cut
from splitfl.lab.audit.observed import pieces
from splitfl.split.checkpoint import TensorSource, load_segment
from splitfl.split.loss import IGNORE
from splitfl.split.segment import Piece, Segment

KeysAndValues = tuple[Tensor, Tensor]  # each (N, heads, t, head dimension)


class PublicModel:
    """The segments of a base checkpoint as one federation cuts it. Raises CheckpointError, ConfigError.

    ``prior`` is the language model that tells likely text, where it is another one: a checkpoint that was adapted to a
    narrow release is a poor one, for its trunk has learned to read noise.
    """

    def __init__(self, source: TensorSource, cut: Cut, prior: TensorSource | None = None) -> None:
        layers: int = source.config.num_hidden_layers
        trunk = cut.trunk(layers)
        self.cut = cut
        self.bottom = frozen(source, Piece(0, cut.n_bottom, embedding=True))
        self.trunk = frozen(source, Piece(trunk.start, trunk.stop))
        # eager: gradients of gradients go through these
        self.top_blocks = frozen(source, Piece(trunk.stop, layers), attention="eager")
        self.head = frozen(source, Piece(layers, layers, head=True))
        self.whole = whole_model(source if prior is None else prior)
        self.vocab: int = self.bottom.embedding.num_embeddings

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """The bottom's output for token ids (B, T): (B, T, D), in pieces of a few records."""
        return torch.cat([self.bottom(self.bottom.embed(piece)) for piece in pieces(ids, 16)])

    @torch.no_grad()
    def next_log_probs(self, ids: Tensor) -> Tensor:
        """Log-probabilities of the token after each position, (B, T) -> (B, T, V)."""
        return torch.cat([self._log_probs(piece) for piece in pieces(ids, 4)])

    def _log_probs(self, ids: Tensor) -> Tensor:
        final: Tensor = self.whole(self.whole.embed(ids))  # (B, T, D)
        logits = self.whole.logits(final.flatten(0, 1)).float().log_softmax(-1)
        return logits.view(*ids.shape, -1)

    def top_gradient(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed loss at the trunk's output (B, T, D), for labels (B, T) that are already shifted."""
        hidden = hidden.detach().requires_grad_(True)
        final = self.head(self.top_blocks(hidden))
        wanted = labels != IGNORE
        loss = torch.nn.functional.cross_entropy(
            self.head.logits(final[wanted]).float(), labels[wanted], reduction="sum"
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
        return gradient


def whole_model(source: TensorSource) -> Segment:
    return frozen(source, Piece(0, source.config.num_hidden_layers, embedding=True, head=True))


def frozen(source: TensorSource, piece: Piece, attention: str | None = None) -> Segment:
    segment = load_segment(source, piece, attention=attention)
    return segment.float().eval().requires_grad_(False)


def shifted(ids: Tensor, lengths: Tensor) -> Tensor:
    """Labels of token ids (B, T): the next token, and nothing at the last one and in the padding."""
    after = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)
    return after.masked_fill(torch.arange(ids.shape[1]) + 1 >= lengths[:, None], IGNORE)


class Prefixes:
    """N token sequences of equal length t in a segment with the embedding, with the keys and values of their blocks."""

    def __init__(self, segment: Segment, count: int) -> None:
        self.segment = segment
        self.count = count
        self.length = 0
        self._layers: list[KeysAndValues] = []

    @torch.no_grad()
    def alternatives(self, tokens: Tensor) -> Tensor:
        """States of tokens (N, C), each as if it alone came next: (N, C, D). The sequences stay as they are."""
        return self._run(tokens)[0]

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Append one token (N,) to each sequence; its states (N, D)."""
        states, self._layers = self._run(tokens[:, None])
        self.length += 1
        return states[:, 0]

    def select(self, rows: Tensor) -> None:
        """Keep the sequences ``rows`` (M,), in that order; one may be kept several times."""
        self._layers = [(keys[rows], values[rows]) for keys, values in self._layers]
        self.count = len(rows)

    def subset(self, rows: Tensor) -> Prefixes:
        """A copy that holds the sequences ``rows`` alone."""
        twin = copy(self)
        twin.select(rows)
        return twin

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[KeysAndValues]]:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        output = self.segment.base(
            inputs_embeds=self.segment.embed(tokens),
            attention_mask=self._mask(tokens.shape[1]),
            position_ids=torch.full(tokens.shape, self.length),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, [(layer.keys, layer.values) for layer in cache.layers]

    def _mask(self, tokens: int) -> Tensor | dict[str, Tensor]:
        """Each token sees its sequence and itself, no other token: (N, 1, C, t + C), added to the scores.

        One mask for each kind of block where a family mixes blocks that see everything with such that see a window.
        """
        config = self.segment.model.config
        window = getattr(config, "sliding_window", None)
        everything, near = (self._mask_of(tokens, reach) for reach in (None, window))
        if getattr(config, "layer_types", None):
            return {"full_attention": everything, "sliding_attention": near}
        return near

    def _mask_of(self, tokens: int, window: int | None) -> Tensor:
        """For blocks that see ``window`` tokens, themselves included; None: all."""
        lowest = torch.finfo(torch.float32).min
        itself = torch.full((tokens, tokens), lowest).fill_diagonal_(0.0)
        before = torch.zeros(tokens, self.length)
        if window is not None:
            before[:, : max(0, self.length + 1 - window)] = lowest
        mask = torch.cat([before, itself], dim=1)
        return mask.expand(self.count, 1, *mask.shape)
