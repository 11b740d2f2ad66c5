"""What arithmetic needs of a model: its sizes, read off a Hugging Face config. No weights, and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from splitfl.errors import ConfigError

#: bytes of a number in each format that weights are stored in
STORED_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: fields that families spell in their own way; the first that a config has counts
SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "intermediate": ("intermediate_size", "n_inner"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "vocab": ("vocab_size",),
}
#: families whose MLP has two matrices instead of a gate, an up and a down projection
UNGATED = frozenset(
    {"gpt2", "gpt_neox", "gptj", "phi", "opt", "bloom", "falcon", "starcoder2", "gpt_bigcode", "codegen"}
)

#: families that normalise queries and keys
HEAD_NORMS = frozenset({"qwen3", "qwen3_moe", "gemma3_text", "olmo2"})
#: tensors that an activation written out in torch operations leaves for its backward, with its output
WIDE = {"gelu_new": 5, "gelu_fast": 5, "gelu_pytorch_tanh": 2}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder: counts of blocks, channels, heads and words.

    ``gated``: the MLP has three matrices, not two. ``experts``: MLPs in a block, of which ``active`` see a token.
    ``wide``: tensors as wide as the MLP that its forward leaves for the backward. ``head_norms``: queries and keys are
    normalised. ``positions``: rows of learned positions, 0 with rope. ``stored_bytes``: of a weight in the checkpoint.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    gated: bool = True
    wide: int = 4
    experts: int = 1
    active: int = 1
    head_norms: bool = False
    positions: int = 0
    stored_bytes: int = 2

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape that ``config``, a Hugging Face config or the fields of its config.json, describes.

        Raises ConfigError when a size is missing.
        """
        fields = config if isinstance(config, dict) else config.to_dict()
        family = str(fields.get("model_type", ""))
        hidden, heads = required(fields, "hidden"), required(fields, "heads")
        activation = fields.get("activation_function") or fields.get("hidden_act")
        return cls(
            layers=required(fields, "layers"),
            hidden=hidden,
            intermediate=first_of(fields, "intermediate") or 4 * hidden,
            heads=heads,
            kv_heads=first_of(fields, "kv_heads") or heads,
            head_dim=fields.get("head_dim") or hidden // heads,
            vocab=required(fields, "vocab"),
            tied=bool(fields.get("tie_word_embeddings", family == "gpt2")),
            gated=family not in UNGATED,
            wide=4 if family not in UNGATED else WIDE.get(str(activation), 2),
            experts=fields.get("num_local_experts") or fields.get("num_experts") or 1,
            active=fields.get("num_experts_per_tok") or 1,
            head_norms=family in HEAD_NORMS,
            positions=fields["n_positions"] if family == "gpt2" else 0,
            stored_bytes=stored_bytes(fields.get("dtype") or fields.get("torch_dtype")),
        )

    @property
    def attention(self) -> int:
        """Channels of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Channels of all key heads; as many again are values."""
        return self.kv_heads * self.head_dim

    @cached_property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a block's linear layers: q, k, v, o, then those of the MLP's experts."""
        mlp = ((self.hidden, self.intermediate),) * (1 + self.gated) + ((self.intermediate, self.hidden),)
        attention = ((self.hidden, self.attention), *(((self.hidden, self.kv),) * 2), (self.attention, self.hidden))
        return attention + mlp * self.experts

    @cached_property
    def block_weights(self) -> int:
        """Weights of one block: its matrices and two norms. Biases, below a thousandth, are left out."""
        return sum(inputs * outputs for inputs, outputs in self.matrices) + 2 * self.hidden

    @property
    def embedding_weights(self) -> int:
        """Weights below the first block."""
        return (self.vocab + self.positions) * self.hidden

    @property
    def head_weights(self) -> int:
        """Weights above the last block, the final norm among them; those of a tied head are the embedding's too."""
        return (self.vocab + 1) * self.hidden

    @property
    def weights(self) -> int:
        """Weights of the whole model as its checkpoint has them."""
        head = self.hidden if self.tied else self.head_weights
        return self.embedding_weights + self.layers * self.block_weights + head


def first_of(fields: dict[str, Any], size: str) -> int | None:
    """A size under whichever name the family has for it."""
    return next((fields[name] for name in SPELLINGS[size] if fields.get(name) is not None), None)


def required(fields: dict[str, Any], size: str) -> int:
    """The same. Raises ConfigError when there is none."""
    value = first_of(fields, size)
    if value is None:
        raise ConfigError(
            f"the model's config has no {SPELLINGS[size][0]}", "Choose a decoder-only language model that splits."
        )
    return value


def stored_bytes(dtype: object) -> int:
    """Bytes of a weight whose dtype a config names; configs without one mean fp32."""
    return STORED_BYTES.get(str(dtype or "float32").removeprefix("torch."), 4)
