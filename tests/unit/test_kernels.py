"""The families' arithmetic in fewer passes: equal numbers and gradients, once and twice; others are left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb as interleaved
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as rounding

from splitfl.split.chunks import FEW_TOKENS
from splitfl.split.families import small_config
from splitfl.split.kernels import (
    ATTENTION,
    LighterNorm,
    RmsNorm,
    Rotation,
    attention,
    lighten,
    lighter,
    rotating,
    same_rotation,
)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_norm_is_the_familys_to_the_last_bit_and_so_are_its_gradients_up_to_rounding() -> None:
    theirs = LlamaRMSNorm(48)
    with torch.no_grad():
        theirs.weight.copy_(drawn(48, seed=1))
    ours = copy.deepcopy(theirs)
    ours.__class__ = lighter(LlamaRMSNorm)
    answers = []
    for norm in (theirs, ours):
        x = drawn(2, 7, 48).requires_grad_()
        y = norm(x)
        y.backward(drawn(2, 7, 48, seed=2))
        answers.append((y.detach(), x.grad, norm.weight.grad))
    assert isinstance(ours, LighterNorm)
    assert torch.equal(answers[0][0], answers[1][0])
    torch.testing.assert_close(answers[1][1:], answers[0][1:], rtol=1e-5, atol=1e-6)


def test_gradients_of_norm_and_rotation_hold_twice() -> None:
    x, weight = drawn(2, 3, 6, dtype=torch.float64), drawn(6, seed=1, dtype=torch.float64)

    def norm(*inputs: Tensor) -> Any:
        return RmsNorm.apply(*inputs, 1e-6)[0]

    def rotation(turned: Tensor) -> Any:
        return Rotation.apply(turned, drawn(2, 3, 6, seed=2).double(), drawn(2, 3, 6, seed=3).double())

    for function, inputs in ((norm, (x, weight)), (rotation, (x,))):
        wanted = tuple(each.clone().requires_grad_() for each in inputs)
        assert gradcheck(function, wanted)
        assert gradgradcheck(function, wanted)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_norm_computes_no_gradient_that_nobody_wants(frozen: str) -> None:
    x, weight = drawn(2, 3, 6).requires_grad_(frozen != "x"), drawn(6).requires_grad_(frozen != "weight")
    RmsNorm.apply(x, weight, 1e-6)[0].sum().backward()
    assert (x.grad is None, weight.grad is None) == (frozen == "x", frozen == "weight")


def test_norm_of_other_numbers_than_fp32_is_the_familys() -> None:
    norm = lighter(LlamaRMSNorm)(16)
    x = drawn(2, 3, 16).bfloat16().requires_grad_()
    y = norm(x)
    assert torch.equal(y, LlamaRMSNorm(16)(x))
    assert "RmsNorm" not in type(y.grad_fn).__name__


def test_norm_that_computes_something_else_stays() -> None:
    class WithoutRMSNorm(nn.Module):
        def __init__(self, _: int) -> None:
            super().__init__()

    assert lighter(Gemma2RMSNorm) is Gemma2RMSNorm  # 1 + weight
    assert lighter(WithoutRMSNorm) is WithoutRMSNorm
    assert lighter(nn.Linear) is nn.Linear
    assert lighter(lighter(LlamaRMSNorm)) is lighter(LlamaRMSNorm)


def test_rotations_that_pair_or_round_otherwise_stay() -> None:
    assert same_rotation(apply_rotary_pos_emb)
    assert not same_rotation(interleaved)
    assert not same_rotation(rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 8], ids=["whole", "partly"])
def test_attention_calls_our_rotation_with_the_same_answer(dtype: torch.dtype, width: int) -> None:
    """A table that is narrower than the heads is left to the family (Phi-3 turns a part of them)."""
    calls = []

    def theirs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("theirs")
        return apply_rotary_pos_emb(q, k, cos, sin) if width == 16 else (q, k)

    ours = rotating(LlamaAttention.forward, theirs).__globals__["apply_rotary_pos_emb"]
    q, k = drawn(2, 4, 3, 16).to(dtype).requires_grad_(), drawn(2, 2, 3, 16, seed=1).to(dtype)
    cos, sin = drawn(2, 3, width, seed=2), drawn(2, 3, width, seed=3)
    answers = ours(q, k, cos, sin)
    if width == 8:
        assert calls == ["theirs"]
        return
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    assert all(torch.equal(mine, other) for mine, other in zip(answers, expected, strict=True))
    assert calls == []
    (mine,) = torch.autograd.grad(answers[0].sum(), q)
    (other,) = torch.autograd.grad(expected[0].sum(), q)
    torch.testing.assert_close(mine, other, rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-2)


def test_few_tokens_attend_in_fp32_under_autocast_and_many_in_bf16() -> None:
    model = AutoModelForCausalLM.from_config(small_config("llama", layers=1, hidden=64, vocab=64), dtype=torch.float32)
    module = model.model.layers[0].self_attn
    for time, dtype in ((FEW_TOKENS, torch.float32), (FEW_TOKENS + 1, torch.bfloat16)):
        q, k, v = drawn(1, 2, time, 32), drawn(1, 1, time, 32, seed=1), drawn(1, 1, time, 32, seed=2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer, _ = attention(module, q, k.bfloat16(), v.bfloat16(), None)
        assert answer.dtype is dtype
        exact, _ = attention(module, q, k, v, None)
        torch.testing.assert_close(answer.float(), exact, rtol=2e-2, atol=2e-2)


def test_few_tokens_attend_within_their_mask_under_autocast() -> None:
    model = AutoModelForCausalLM.from_config(small_config("llama", layers=1, hidden=64, vocab=64), dtype=torch.float32)
    module = model.model.layers[0].self_attn
    q, k, v = drawn(1, 2, 5, 32), drawn(1, 1, 5, 32, seed=1), drawn(1, 1, 5, 32, seed=2)
    mask = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    exact, _ = attention(module, q, k, v, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer, _ = attention(module, q, k, v, mask.bfloat16())
    torch.testing.assert_close(answer, exact)
    assert not torch.allclose(answer, attention(module, q, k, v, torch.zeros_like(mask))[0])


def test_attention_that_does_not_ask_transformers_for_its_function_stays() -> None:
    """Falcon looks at the name and would take another way."""
    config = AutoConfig.for_model("falcon", hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lighten(model)
    assert model.config._attn_implementation == "sdpa"


def test_model_in_bf16_is_nearer_to_the_exact_one_than_before() -> None:
    model = AutoModelForCausalLM.from_config(
        small_config("llama", layers=2, hidden=128, vocab=64), dtype=torch.float32
    ).eval()
    light = copy.deepcopy(model)
    lighten(light)
    ids = torch.arange(48).view(2, 24) % 64
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        assert torch.equal(light(input_ids=ids).logits, exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before, after = model(input_ids=ids).logits.float(), light(input_ids=ids).logits.float()
    assert light.config._attn_implementation == ATTENTION
    assert (after - exact).norm() <= 1.05 * (before - exact).norm()
