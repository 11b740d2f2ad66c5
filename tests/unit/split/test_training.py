"""What trains depends on the block and not on its holder; LoRA starts from no change and equal factors for all."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from helpers import HIDDEN, MemorySource, make_batch, tiny_config, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from splitfl.errors import ConfigError
from splitfl.split.checkpoint import load_segment
from splitfl.split.families import FAMILIES
from splitfl.split.segment import Piece, Segment
from splitfl.split.training import TrainingPolicy, check_policy, initial_a, set_up_training, stays_tied, trains

WHOLE = Piece(0, 6, embedding=True, head=True)
BOTTOM, TRUNK, TOP = Piece(0, 2, embedding=True), Piece(2, 4), Piece(4, 6, head=True)


def prepared(
    family: str, piece: Piece, policy: TrainingPolicy, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Segment:
    segment = load_segment(MemorySource.of(tiny_model(family, **changes).to(dtype)), piece)
    set_up_training(segment, policy)
    return segment


def trained(segment: Segment) -> set[str]:
    return {name for name, parameter in segment.named_weights() if parameter.requires_grad}


def owners(segment: Segment) -> set[int | str]:
    """Which blocks train, and "embedding", "norm" or "head" for what lies outside them."""
    found: set[int | str] = set()
    for name in trained(segment):
        block = segment.block_of(name)
        outside = "head" if name.startswith("lm_head") else "embedding" if "w" in name and "e" in name else "norm"
        norm = any(part in name for part in ("norm", "ln_f"))
        found.add(block if block is not None else "norm" if norm else outside)
    return found


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (TrainingPolicy(), {"embedding", 0, 1, 2, 3, 4, 5, "norm", "head"}),
        (TrainingPolicy(freeze_below=1), {1, 2, 3, 4, 5, "norm", "head"}),
        (TrainingPolicy(freeze_below=4), {4, 5, "norm", "head"}),
        (TrainingPolicy(freeze_below=6), {"norm", "head"}),
        (TrainingPolicy(freeze_below=4, head="frozen"), {4, 5}),
        (TrainingPolicy(freeze_below=4, head="lora"), {4, 5, "head"}),
        (TrainingPolicy(train="lora", head="frozen"), {0, 1, 2, 3, 4, 5}),
        (TrainingPolicy(train="lora", freeze_below=2, head="full"), {2, 3, 4, 5, "norm", "head"}),
        (TrainingPolicy(train="lora", freeze_below=5, head="lora"), {5, "head"}),
        (TrainingPolicy(freeze_below=6, head="frozen"), set()),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_policy_trains_its_blocks_whoever_holds_them(family: str, policy: TrainingPolicy, expected: set[Any]) -> None:
    whole = prepared(family, WHOLE, policy)
    assert owners(whole) == expected
    parts = [prepared(family, piece, policy) for piece in (BOTTOM, TRUNK, TOP)]
    assert trained(whole) == set().union(*(trained(part) for part in parts))
    for segment in (whole, *parts):
        for name, parameter in segment.named_weights():
            assert parameter.requires_grad == trains(segment, policy, name)
            assert parameter.is_leaf


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_trains_every_weight_of_every_family(family: str) -> None:
    segment = prepared(family, WHOLE, TrainingPolicy())
    assert trained(segment) == {name for name, _ in segment.named_weights()}


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "mixed"])
def test_trained_weights_are_fp32_and_frozen_ones_keep_their_dtype_under_autocast(mixed: bool) -> None:
    policy = TrainingPolicy(freeze_below=3, head="lora", mixed=mixed)
    segment = prepared("llama", WHOLE, policy, dtype=torch.bfloat16)
    for name, parameter in segment.named_weights():
        table = name == "model.embed_tokens.weight"
        keeps = not parameter.requires_grad and (mixed or table) and ".lora_" not in name
        assert parameter.dtype == (torch.bfloat16 if keeps else torch.float32), name


def test_frozen_plain_embedding_keeps_bf16_and_gives_the_same_rows() -> None:
    policy = TrainingPolicy(freeze_below=1)
    segment = prepared("qwen2", BOTTOM, policy, dtype=torch.bfloat16)
    wide = tiny_model("qwen2").bfloat16().float()
    ids = make_batch(padded=False).ids
    assert segment.embedding.weight.dtype == torch.bfloat16
    assert torch.equal(segment.embed(ids), wide.get_input_embeddings()(ids))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_frozen_embedding_that_scales_is_widened(family: str) -> None:
    segment = prepared(family, BOTTOM, TrainingPolicy(freeze_below=1), dtype=torch.bfloat16)
    wide = tiny_model(family).bfloat16().float()
    ids = make_batch(padded=False).ids
    assert segment.embedding.weight.dtype == torch.float32
    assert torch.equal(segment.embed(ids), wide.get_input_embeddings()(ids))


def test_frozen_learned_positions_are_widened_in_fp32() -> None:
    segment = prepared("gpt2", BOTTOM, TrainingPolicy(freeze_below=1), dtype=torch.bfloat16)
    weights = dict(segment.named_weights())
    assert weights["transformer.wpe.weight"].dtype == torch.float32
    assert weights["transformer.wte.weight"].dtype == torch.bfloat16


def test_embedding_that_trains_is_fp32() -> None:
    segment = prepared("llama", BOTTOM, TrainingPolicy(), dtype=torch.bfloat16)
    assert segment.embedding.weight.dtype == torch.float32


LORA = TrainingPolicy(freeze_below=1, train="lora", head="lora", lora_rank=4, seed=11, train_a_blocks=range(2, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_changes_nothing_at_the_start(family: str) -> None:
    source = MemorySource.of(tiny_model(family))
    plain, adapted = load_segment(source, WHOLE), load_segment(source, WHOLE)
    set_up_training(adapted, LORA)
    assert any(".lora_B." in name for name in trained(adapted))
    batch = make_batch(padded=True)
    with torch.no_grad():
        for segment in (plain, adapted):
            segment.eval()
        hidden = [segment(segment.embed(batch.ids), batch.lengths)[batch.valid] for segment in (plain, adapted)]
        assert torch.equal(*hidden)
        assert torch.equal(plain.logits(hidden[0]), adapted.logits(hidden[1]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_oss"])
def test_lora_adapts_every_linear_layer_of_its_blocks_and_no_other(family: str) -> None:
    source = MemorySource.of(tiny_model(family))
    before = load_segment(source, TOP)
    linear = {
        before.global_name(name)
        for name, module in before.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }
    segment = prepared(family, TOP, TrainingPolicy(freeze_below=5, train="lora", head="full"))
    adapted = {name.split(".lora_A.")[0] for name, _ in segment.named_weights() if ".lora_A." in name}
    assert adapted == {name for name in linear if before.block_of(name) == 5}
    assert adapted


def test_lora_gives_all_holders_of_a_block_the_same_a_under_the_same_name() -> None:
    pieces = (WHOLE, Piece(0, 4, embedding=True), Piece(3, 6, head=True), Piece(3, 4))
    factors = []
    for piece in pieces:
        weights = dict(prepared("llama", piece, LORA, seed=piece.stop).named_weights())  # whatever the base is
        prefix = "model.layers.3."
        factors.append({n: p.detach() for n, p in weights.items() if ".lora_A." in n and n.startswith(prefix)})
    assert len(factors[0]) == 7
    for other in factors[1:]:
        assert other.keys() == factors[0].keys()
        assert all(torch.equal(other[name], factors[0][name]) for name in other)


def test_lora_a_depends_on_seed_and_name_and_not_on_the_global_generator() -> None:
    shape = torch.Size((4, HIDDEN))
    torch.manual_seed(1)
    first, state = initial_a("a", shape, 0), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, initial_a("a", shape, 0))
    assert not torch.equal(first, initial_a("a", shape, 1))
    assert not torch.equal(first, initial_a("b", shape, 0))
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_lora_a_is_kaiming_uniform_as_in_peft() -> None:
    shape = torch.Size((64, 256))
    ours = initial_a("a", shape, 0)
    theirs = nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=torch.Generator().manual_seed(0))
    assert float(ours.abs().max()) <= 1 / 16
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)


def test_lora_a_trains_only_in_blocks_of_one_holder() -> None:
    names = trained(prepared("llama", WHOLE, LORA))
    with_a = {name for name in names if ".lora_A." in name}
    assert {int(name.split(".")[2]) for name in with_a} == {2, 3}
    with_b = {name for name in names if ".lora_B." in name}
    assert {name.split(".")[2] for name in with_b if name.startswith("model.")} == {"1", "2", "3", "4", "5"}
    assert "lm_head.lora_B.default.weight" in with_b
    assert with_a | with_b == names


def test_lora_trains_in_fp32_on_a_bf16_base() -> None:
    segment = prepared("llama", TOP, TrainingPolicy(train="lora", head="lora", mixed=True), dtype=torch.bfloat16)
    for name, parameter in segment.named_weights():
        assert parameter.dtype == (torch.float32 if ".lora_B." in name else parameter.dtype)
        if "base_layer" in name:
            assert parameter.dtype == torch.bfloat16


def test_lora_gradient_reaches_b_of_every_adapter() -> None:
    segment = prepared("gpt2", WHOLE, LORA)
    segment.logits(segment(segment.embed(make_batch(padded=False).ids)).flatten(0, 1)).square().sum().backward()
    for name, parameter in segment.named_weights():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == (".lora_B." in name and parameter.requires_grad), name  # A's gradient is zero while B is


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_is_injected_without_a_warning(family: str, tied: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(family, TOP, LORA, tie=tied)


@pytest.mark.parametrize("policy", [TrainingPolicy(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_set_up_on_segments_without_memory(family: str, policy: TrainingPolicy) -> None:
    """The server learns the shapes of a client's share this way."""
    for piece in (BOTTOM, TRUNK, TOP):
        empty = Segment(tiny_config(family), piece)
        set_up_training(empty, policy)
        full = prepared(family, piece, policy)
        shapes = [{name: p.shape for name, p in each.named_weights() if p.requires_grad} for each in (empty, full)]
        assert shapes[0] == shapes[1]
        assert {parameter.device.type for parameter in empty.parameters()} <= {"meta"}


def test_lora_is_refused_for_a_block_without_linear_layers() -> None:
    segment = load_segment(MemorySource.of(tiny_model("llama")), TRUNK)
    for name, module in list(segment.blocks[1].named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(segment.blocks[1].get_submodule(parent), leaf, nn.Identity())
    with pytest.raises(ConfigError, match=r"block 3 has no linear layer.*full"):
        set_up_training(segment, TrainingPolicy(train="lora"))
    set_up_training(segment, TrainingPolicy(train="lora", freeze_below=4))


def test_bottom_without_blocks_has_nothing_to_adapt_and_is_accepted() -> None:
    assert trained(prepared("llama", Piece(0, 0, embedding=True), TrainingPolicy(train="lora"))) == set()


@pytest.mark.parametrize("head", ["lora", "frozen"])
def test_policy_that_trains_one_half_of_a_tied_weight_is_refused(head: Any) -> None:
    contradictory = TrainingPolicy(head=head)
    with pytest.raises(ConfigError, match=r"shares its weights.*freeze_below = 1"):
        check_policy(contradictory, tied=True)
    check_policy(contradictory, tied=False)
    check_policy(TrainingPolicy(head=head, freeze_below=1), tied=True)
    check_policy(TrainingPolicy(head=head, train="lora"), tied=True)
    check_policy(TrainingPolicy(), tied=True)


def test_weights_stay_tied_only_where_both_halves_train() -> None:
    tied, untied = tiny_config("llama", tie=True), tiny_config("llama", tie=False)
    assert stays_tied(tied, TrainingPolicy())
    assert not stays_tied(untied, TrainingPolicy())
    assert not stays_tied(tied, TrainingPolicy(freeze_below=1))
    assert not stays_tied(tied, TrainingPolicy(train="lora", head="full"))
