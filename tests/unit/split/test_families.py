"""Every family builds small, runs, and survives a save and a plain load without changing one bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from splitfl.errors import ConfigError
from splitfl.split.families import FAMILIES, SLIDING_FAMILIES, build_small_model, small_config

ALTERNATING = ("gemma2", "gemma3_text", "gpt_oss")
TOKENS = torch.tensor([[5, 17, 200, 3, 42, 42, 299, 8, 1, 77]])  # (1, 10)


def tiny(family: str, **changes):
    sizes = {"layers": 2, "hidden": 64, "vocab": 300, "max_length": 32} | changes
    return small_config(family, **sizes)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens).logits  # (1, T, V)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_keeps_its_logits_across_save_and_load(family: str, tmp_path: Path) -> None:
    model = build_small_model(tiny(family, bos_token_id=1, eos_token_id=1, pad_token_id=0), seed=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.model_type == family
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert logits(model).shape == (1, 10, 300)
    assert torch.isfinite(logits(model)).all()
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_sets_only_fields_that_the_family_knows(family: str) -> None:
    config = tiny(family)
    assert config.to_dict().keys() <= AutoConfig.for_model(family).to_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_config_has_no_dropout(family: str) -> None:
    rates = {name: rate for name, rate in tiny(family).to_dict().items() if "drop" in name}
    assert rates
    assert not any(rates.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [True, False])
def test_model_ties_its_head_as_told(family: str, tie: bool, tmp_path: Path) -> None:
    model = build_small_model(tiny(family, tie=tie), seed=0)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for built in (model, loaded):
        shared = built.get_input_embeddings().weight is built.get_output_embeddings().weight
        assert shared is tie
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_keeps_the_familys_own_tying_when_not_told(family: str) -> None:
    assert tiny(family).tie_word_embeddings == AutoConfig.for_model(family).tie_word_embeddings


@pytest.mark.parametrize("family", FAMILIES)
def test_model_trains_every_block(family: str) -> None:
    model = build_small_model(tiny(family), seed=0)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert silent == []


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_right_leaves_earlier_logits_alone(family: str) -> None:
    model = build_small_model(tiny(family, pad_token_id=0), seed=0)
    padded = torch.nn.functional.pad(TOKENS, (0, 4))  # (1, 14)
    mask = (torch.arange(14) < 10).long()[None]  # (1, 14)
    with torch.no_grad():
        got = model(input_ids=padded, attention_mask=mask).logits[:, :10]
    torch.testing.assert_close(got, logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_seed_decides_the_weights(family: str) -> None:
    first, again, other = (build_small_model(tiny(family), seed=seed) for seed in (7, 7, 8))
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    assert not torch.equal(logits(first), logits(other))


def test_building_leaves_the_callers_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build_small_model(tiny("llama"), seed=7)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("family", SLIDING_FAMILIES)
def test_small_window_hides_the_distant_past(family: str) -> None:
    narrow = build_small_model(tiny(family, layers=4, sliding_window=2), seed=0)
    wide = build_small_model(tiny(family, layers=4, sliding_window=32), seed=0)
    torch.testing.assert_close(logits(narrow)[:, :2], logits(wide)[:, :2], atol=1e-5, rtol=0)
    assert not torch.allclose(logits(narrow)[:, 5:], logits(wide)[:, 5:], atol=1e-5)


@pytest.mark.parametrize("family", ALTERNATING)
def test_config_alternates_sliding_and_full_layers(family: str) -> None:
    config = tiny(family, layers=4)
    assert config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert config.sliding_window == 8


def test_smollm3_has_a_layer_without_rope_in_every_pair() -> None:
    assert tiny("smollm3", layers=4).no_rope_layers == [1, 0, 1, 0]


@pytest.mark.parametrize(("hidden", "head_dim", "heads"), [(64, 32, 2), (192, 32, 6), (256, 64, 4)])
def test_config_halves_the_key_value_heads(hidden: int, head_dim: int, heads: int) -> None:
    config = tiny("llama", hidden=hidden)
    assert (config.head_dim, config.num_attention_heads) == (head_dim, heads)
    assert config.num_key_value_heads == heads // 2
    assert config.intermediate_size % 32 == 0


def test_alias_names_the_text_decoder() -> None:
    assert tiny("gemma3").model_type == "gemma3_text"


def test_config_refuses_unknown_family_and_lists_the_known() -> None:
    with pytest.raises(ConfigError) as caught:
        tiny("bloom")
    assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden": 100},
        {"hidden": 0},
        {"layers": 0},
        {"vocab": 0},
        {"max_length": 0},
        {"sliding_window": 4},
        {"pad_token_id": 300},
        {"eos_token_id": -1},
    ],
)
def test_config_refuses_sizes_that_do_not_fit(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        tiny("llama", **changes)


def test_config_refuses_window_of_no_tokens() -> None:
    with pytest.raises(ConfigError):
        tiny("gemma2", sliding_window=0)
