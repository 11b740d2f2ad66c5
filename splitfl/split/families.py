"""Small, valid models of every decoder family that SplitFL splits.

What ``splitfl init``, the demo and the tests build when no published checkpoint is at hand: the genuine
Hugging Face classes, small enough for two CPU cores, with the traits that make a family hard to split kept on
(grouped-query attention, alternating sliding windows, layers without rope, experts, learned positions).
Every dropout is zero, so that a split model and a whole one can be compared to the last bit. These are shapes
with random weights, not pretrained models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from splitfl.errors import ConfigError

ALIASES = {"gemma3": "gemma3_text"}
"""Names people say, and the Hugging Face ``model_type`` of the text decoder they mean."""

HIDDEN_MULTIPLE = 64
"""What ``hidden`` is a multiple of: an even number of heads of 32, half of them key/value heads."""


@dataclass(frozen=True)
class _Size:
    """What the caller asked for; ``heads`` and ``head_dim`` follow from ``hidden``."""

    layers: int
    hidden: int
    max_length: int
    sliding_window: int | None

    @property
    def head_dim(self) -> int:
        return 64 if self.hidden >= 256 and self.hidden % 128 == 0 else 32

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim


def _trunk_fields(size: _Size, intermediate: int) -> dict[str, Any]:
    """The fields that all families but GPT-2 spell alike."""
    return {
        "hidden_size": size.hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": size.max_length,
        "attention_dropout": 0.0,
    }


def _grouped(size: _Size) -> dict[str, Any]:
    """A gated MLP of about 8/3 the hidden size, and grouped-query attention."""
    intermediate = -(-8 * size.hidden // (3 * 32)) * 32  # rounded up, as Llama does
    return _trunk_fields(size, intermediate) | {"num_key_value_heads": size.heads // 2}


def _grouped_head_dim(size: _Size) -> dict[str, Any]:
    """The same, for families whose ``head_dim`` is a field with a default of its own."""
    return _grouped(size) | {"head_dim": size.head_dim}


def _windowed(size: _Size) -> dict[str, Any]:
    """Every layer slides where a window is asked for; none does otherwise."""
    return {"sliding_window": size.sliding_window}


def _alternating(size: _Size) -> dict[str, Any]:
    """Sliding and full layers in turn; a quarter of ``max_length`` unless the caller sets the window."""
    return {
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(size.layers)],
        "sliding_window": size.sliding_window or max(1, size.max_length // 4),
    }


def _mistral(size: _Size) -> dict[str, Any]:
    return _grouped_head_dim(size) | _windowed(size)


def _gemma(size: _Size) -> dict[str, Any]:
    return _grouped_head_dim(size) | _alternating(size) | {"query_pre_attn_scalar": size.head_dim}


def _smollm3(size: _Size) -> dict[str, Any]:
    """Every second layer has no rope (0), so that any slice of two blocks holds both kinds."""
    return _grouped(size) | {
        "no_rope_layers": [1 - i % 2 for i in range(size.layers)],
        "no_rope_layer_interval": 2,
    }


def _phi3(size: _Size) -> dict[str, Any]:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return _grouped(size) | _windowed(size) | dropouts | {"original_max_position_embeddings": size.max_length}


def _phi(size: _Size) -> dict[str, Any]:
    heads = {"num_key_value_heads": size.heads}
    return _trunk_fields(size, 4 * size.hidden) | heads | {"resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _gpt_neox(size: _Size) -> dict[str, Any]:
    return _trunk_fields(size, 4 * size.hidden) | {"hidden_dropout": 0.0, "classifier_dropout": 0.0}


def _gpt_oss(size: _Size) -> dict[str, Any]:
    """Four experts, two a token, without the router's auxiliary loss: it would not be a mean over tokens."""
    return (
        _grouped_head_dim(size)
        | _alternating(size)
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
        | {"rope_parameters": _yarn(size.max_length)}
    )


def _yarn(max_length: int) -> dict[str, Any]:
    """gpt-oss's rope, stretched fourfold to ``max_length`` (published: 32-fold to 131072)."""
    return {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": max(1, max_length // 4),
    }


def _gpt2(size: _Size) -> dict[str, Any]:
    return {
        "n_embd": size.hidden,
        "n_inner": 4 * size.hidden,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_positions": size.max_length,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "summary_first_dropout": 0.0,
    }


_FIELDS: dict[str, Callable[[_Size], dict[str, Any]]] = {
    "llama": _grouped_head_dim,
    "qwen2": _grouped,
    "qwen3": _grouped_head_dim,
    "mistral": _mistral,
    "glm": _grouped_head_dim,
    "glm4": _grouped_head_dim,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "olmo2": _grouped,
    "smollm3": _smollm3,
    "phi3": _phi3,
    "phi": _phi,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "gpt2": _gpt2,
}

FAMILIES: tuple[str, ...] = tuple(_FIELDS)
"""The families that split exactly, by their Hugging Face ``model_type``."""

SLIDING_FAMILIES: tuple[str, ...] = ("mistral", "phi3", "gemma2", "gemma3_text", "gpt_oss")
"""Those that take ``sliding_window``: on every layer (mistral, phi3) or on every second one (the others)."""


def small_config(
    family: str,
    *,
    layers: int,
    hidden: int,
    vocab: int,
    max_length: int = 1024,
    tie: bool | None = None,
    sliding_window: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> PreTrainedConfig:
    """A small valid config of ``family`` (one of :data:`FAMILIES`, or an alias such as ``gemma3``).

    ``layers``: number of blocks. ``hidden``: a multiple of 64. ``vocab``: rows of the embedding.
    ``max_length``: longest sequence, in tokens. ``tie``: whether embedding and head share weights; None keeps
    the family's own default. ``sliding_window``: in tokens, for :data:`SLIDING_FAMILIES` alone. A token id of
    None means that the model has no such token.

    Raises :class:`ConfigError` for an unknown family or a size that the family cannot take.
    """
    model_type = ALIASES.get(family, family)
    if model_type not in _FIELDS:
        raise ConfigError(f"unknown model family {family!r}", f"Choose one of: {', '.join(FAMILIES)}")
    _check_hidden(hidden)
    _check_positive(layers=layers, vocab=vocab, max_length=max_length)
    _check_window(model_type, sliding_window)
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    _check_tokens(tokens, vocab)
    fields = _FIELDS[model_type](_Size(layers, hidden, max_length, sliding_window))
    if tie is not None:
        fields["tie_word_embeddings"] = tie
    return AutoConfig.for_model(model_type, vocab_size=vocab, **tokens, **fields)


def build_small_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The genuine ``*ForCausalLM`` of ``config``: fp32, on the CPU, in eval mode.

    The weights depend on ``config`` and ``seed`` alone; the caller's global generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _check_hidden(hidden: int) -> None:
    if hidden < 1 or hidden % HIDDEN_MULTIPLE:
        nearest = max(1, round(hidden / HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE
        raise ConfigError(
            f"hidden size {hidden} does not divide into an even number of attention heads",
            f"Choose a multiple of {HIDDEN_MULTIPLE}, such as {nearest}",
        )


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")


def _check_window(model_type: str, sliding_window: int | None) -> None:
    if sliding_window is None:
        return
    _check_positive(sliding_window=sliding_window)
    if model_type not in SLIDING_FAMILIES:
        raise ConfigError(
            f"{model_type} has no sliding-window layers",
            f"Leave sliding_window out, or choose one of: {', '.join(SLIDING_FAMILIES)}",
        )


def _check_tokens(tokens: dict[str, int | None], vocab: int) -> None:
    for name, token in tokens.items():
        if token is not None and not 0 <= token < vocab:
            raise ConfigError(f"{name} {token} is outside the vocabulary of {vocab}")
