"""A segment holds its slice and nothing else, under the whole model's names, and asks nothing of chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HIDDEN, VOCAB, MemorySource, make_batch, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from splitfl.errors import CheckpointError
from splitfl.split.checkpoint import load_segment
from splitfl.split.families import FAMILIES
from splitfl.split.segment import (
    Piece,
    Segment,
    find_anatomy,
    learned_positions,
    one_block,
    padding_mask,
    slice_config,
    without_dropout,
)


def names(segment: Segment) -> set[str]:
    return {name for name, _ in segment.named_weights()}


@pytest.mark.parametrize("family", FAMILIES)
def test_segments_share_out_the_names_of_the_whole_model(family: str) -> None:
    whole = {name for name, _ in tiny_model(family).named_parameters()}
    config = tiny_config(family)
    parts = [Segment(config, piece) for piece in (Piece(0, 1, embedding=True), Piece(1, 4), Piece(4, 6, head=True))]
    bottom, trunk, top = (names(part) for part in parts)
    assert bottom | trunk | top == whole
    assert len(bottom) + len(trunk) + len(top) == len(whole)
    assert {parts[1].block_of(name) for name in trunk} == {1, 2, 3}
    ends_alone = {name for name in bottom | top if parts[0].block_of(name) is None}
    assert len(ends_alone) == len(whole) - sum(parts[0].block_of(name) is not None for name in whole)
    assert not any(parts[1].block_of(name) is None for name in trunk)


@pytest.mark.parametrize("family", FAMILIES)
def test_segment_takes_no_memory_for_weights_until_it_is_loaded(family: str) -> None:
    segment = Segment(tiny_config(family), Piece(1, 3))
    assert {parameter.device.type for parameter in segment.parameters()} == {"meta"}
    assert not any(buffer.is_meta for buffer in segment.buffers())


def test_segment_without_ends_raises_when_asked_for_them() -> None:
    trunk = load_segment(MemorySource.of(tiny_model("llama")), Piece(1, 3))
    with pytest.raises(AssertionError):
        trunk.embed(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(AssertionError, match="does not hold"):
        trunk.logits(torch.zeros(2, HIDDEN))


def test_segment_embeds_bf16_rows_as_fp32() -> None:
    source = MemorySource.of(tiny_model("llama").bfloat16())
    bottom = load_segment(source, Piece(0, 0, embedding=True))
    rows = bottom.embed(torch.tensor([[1, 5, 9]]))
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], source.tensors["model.embed_tokens.weight"][[1, 5, 9]].float())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_narrowed_segment_leaves_the_ends_behind(family: str) -> None:
    source = MemorySource.of(tiny_model(family))
    top = load_segment(source, Piece(3, 6, head=True))
    bottom = load_segment(source, Piece(0, 3, embedding=True))
    hidden = torch.randn(2, 7, HIDDEN)
    for wide, start, stop in [(top, 3, 6), (top, 4, 6), (bottom, 0, 3), (bottom, 0, 1)]:
        view, own = wide.narrow(start, stop), load_segment(source, Piece(start, stop))
        assert view.piece == own.piece
        assert names(view) == names(own)
        assert torch.equal(view(hidden), own(hidden))
    assert names(top) == names(load_segment(source, Piece(3, 6, head=True)))  # the views took nothing away
    ids = make_batch(padded=False).ids
    again = load_segment(source, Piece(0, 3, embedding=True))
    assert torch.equal(bottom(bottom.embed(ids)), again(again.embed(ids)))


def test_segment_narrows_to_itself_when_all_its_blocks_are_asked_for() -> None:
    trunk = Segment(tiny_config("llama"), Piece(1, 4))
    assert trunk.narrow(1, 4) is trunk
    assert trunk.narrow(2, 3).narrow(2, 2).piece == Piece(2, 2)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 5), (3, 2)])
def test_segment_refuses_to_narrow_to_blocks_it_does_not_hold(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not inside"):
        Segment(tiny_config("llama"), Piece(1, 4)).narrow(start, stop)


def test_slice_cuts_every_per_layer_list() -> None:
    config = tiny_config("smollm3")
    config.layer_types = ["full_attention"] * 5 + ["sliding_attention"]
    part = slice_config(config, 3, 6)
    assert part.num_hidden_layers == 3
    assert part.no_rope_layers == config.no_rope_layers[3:6]
    assert part.layer_types == ["full_attention"] * 2 + ["sliding_attention"]
    assert part.use_cache is False
    assert config.num_hidden_layers == len(config.no_rope_layers) == 6  # the original is left alone


def test_slice_of_one_block_model_leaves_other_lists_of_one_alone() -> None:
    config = tiny_config("gemma2", layers=1)
    config.architectures = ["Gemma2ForCausalLM"]
    empty = slice_config(config, 1, 1)
    assert empty.layer_types == []
    assert empty.architectures == ["Gemma2ForCausalLM"]


@pytest.mark.parametrize("family", ["gpt2", "phi", "gpt_neox", "llama"])
def test_config_without_dropout_has_none_left(family: str) -> None:
    config = AutoConfig.for_model(family)
    for name in vars(config):
        if "drop" in name:
            setattr(config, name, 0.25)
    model = one_block(without_dropout(config))
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, nn.Dropout))
    assert not any(value == 0.25 for name, value in vars(model.config).items() if "drop" in name)


def test_gpt2_ships_with_dropout() -> None:
    """Or else the function above would test nothing."""
    assert AutoConfig.for_model("gpt2").resid_pdrop == 0.1


def test_config_without_dropout_loses_layer_drop_and_router_jitter() -> None:
    config = AutoConfig.for_model("mixtral", router_jitter_noise=0.1)
    config.layerdrop = 0.5
    quiet = without_dropout(config)
    assert (quiet.router_jitter_noise, quiet.layerdrop) == (0.0, 0.0)


def test_segment_refuses_gpt2_that_scales_attention_by_block_number() -> None:
    config = tiny_config("gpt2")
    config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx = false"):
        Segment(config, Piece(0, 1, embedding=True))


def foreign(model_type: str) -> PreTrainedConfig:
    small: dict[str, Any] = {"t5": {"d_model": 64, "num_heads": 2, "num_layers": 2}}.get(model_type, {})
    return AutoConfig.for_model(model_type, **small)


@pytest.mark.parametrize("model_type", ["t5", "bert", "whisper", "clip", "vit"])
def test_anatomy_refuses_models_that_are_no_plain_decoders(model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{model_type}'.*decoder-only"):
        find_anatomy(one_block(foreign(model_type)))


def test_anatomy_finds_learned_positions_and_norms() -> None:
    gpt2 = find_anatomy(one_block(tiny_config("gpt2")))
    assert (gpt2.prefix, gpt2.blocks, gpt2.embedding, gpt2.head) == ("transformer", "h", "wte", "lm_head")
    assert (gpt2.positions, gpt2.norms) == (("wpe",), ("ln_f",))


def test_anatomy_finds_a_norm_without_weights() -> None:
    config = AutoConfig.for_model("olmo", hidden_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=VOCAB)
    assert find_anatomy(one_block(config)).norms == ("norm",)


def test_padding_mask_is_absent_when_no_row_is_padded() -> None:
    here = torch.device("cpu")
    assert padding_mask(None, 3, here) is None
    assert padding_mask(torch.tensor([3, 3]), 3, here) is None
    mask = padding_mask(torch.tensor([3, 1]), 3, here)
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_learned_positions_bound_a_sequence(family: str) -> None:
    expected = {"gpt2": tiny_config("gpt2").n_positions}
    assert learned_positions(tiny_config(family)) == expected.get(family)
