"""A foreign family is let in only when it splits to the last bit, and refused by name with a remedy otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from splitfl.errors import CheckpointError
from splitfl.split import selfcheck
from splitfl.split.families import FAMILIES
from splitfl.split.segment import Segment
from splitfl.split.selfcheck import blocks_to_check, check_config, check_family_splits

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 600,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "pad_token_id": 7,
    "bos_token_id": 300,
    "eos_token_id": 400,
}
GROUPED = {"num_key_value_heads": 2}


def config_of(model_type: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **(SIZES | changes))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("stablelm", GROUPED),
        ("olmo", GROUPED),  # a norm without weights
        ("starcoder2", GROUPED | {"residual_dropout": 0.5}),
        ("cohere", GROUPED | {"logit_scale": 0.3}),  # logits are scaled behind the head
        ("granite", GROUPED | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
        ("cohere2", GROUPED | {"num_hidden_layers": 8, "head_dim": 16}),  # the fourth block is of another kind
        ("falcon", {}),
        ("mixtral", GROUPED | {"num_local_experts": 2}),
        ("stablelm", GROUPED | {"num_hidden_layers": 1}),
        ("stablelm", GROUPED | {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    ],
)
def test_check_lets_in_families_that_split_exactly(model_type: str, changes: dict[str, Any]) -> None:
    assert model_type not in FAMILIES
    check_family_splits(config_of(model_type, **changes))


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {}, "logits of full rows differ"),  # a norm behind the embedding
        ("granite", GROUPED | {"embedding_multiplier": 12.0}, "logits of full rows differ"),  # scales in its forward
        ("minimax", GROUPED | {"num_local_experts": 2}, "logits of full rows differ"),  # decay by block number
        ("apertus", GROUPED, "logits of full rows differ"),  # buffers that a segment does not load
        ("opt", {}, "not built as embedding, blocks, norm and head"),
        ("mamba", {}, "AttributeError"),
        ("qwen2_moe", GROUPED | {"mlp_only_layers": [0]}, "a segment has a weight"),  # a list of block numbers
        ("t5", {}, "not built as embedding, blocks, norm and head"),
    ],
)
def test_check_refuses_families_that_do_not_split(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        check_family_splits(config_of(model_type, **changes))
    assert f"{model_type!r} cannot be split exactly" in caught.value.message
    assert "\n" not in caught.value.message
    assert "llama" in caught.value.remedy
    assert (caught.value.__cause__ is None) == ("differ" in reason)


def test_check_refuses_a_family_whose_gradients_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Segment.forward

    def halved(self: Segment, hidden: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The same numbers, but only half of the gradient comes back."""
        out = forward(self, hidden, lengths)
        if out.requires_grad:
            out.register_hook(lambda gradient: gradient / 2)
        return out

    monkeypatch.setattr(Segment, "forward", halved)
    with pytest.raises(CheckpointError, match="gradients of full rows differ"):
        check_family_splits(config_of("stablelm", **GROUPED))


@pytest.mark.parametrize("family", FAMILIES)
def test_check_skips_families_that_the_tests_hold(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "build_check_model", lambda _: pytest.fail("built a model"))
    check_family_splits(AutoConfig.for_model(family))


def test_check_leaves_config_and_global_randomness_alone() -> None:
    config = config_of("stablelm", **GROUPED)
    before, state = config.to_dict(), torch.random.get_rng_state()
    check_family_splits(config)
    assert config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_check_model_is_small_where_that_decides_nothing() -> None:
    small = check_config(config_of("stablelm", **GROUPED, attention_dropout=0.3))
    assert (small.num_hidden_layers, small.vocab_size, small.intermediate_size) == (3, 128, 256)
    assert (small.hidden_size, small.num_attention_heads, small.num_key_value_heads) == (64, 4, 2)
    assert (small.pad_token_id, small.bos_token_id, small.eos_token_id) == (0, 0, 0)
    assert small.attention_dropout == 0.0


def test_check_model_has_every_kind_of_block() -> None:
    config = config_of("cohere2", **GROUPED, num_hidden_layers=8)
    assert config.layer_types.index("full_attention") == 3
    assert blocks_to_check(config) == 4
    assert check_config(config).layer_types == config.layer_types[:4]
    assert blocks_to_check(config_of("stablelm", num_hidden_layers=2)) == 2
