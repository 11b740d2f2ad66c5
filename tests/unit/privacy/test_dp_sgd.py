"""What DP-SGD's guarantee rests on: the clip, the noise once a step, one batch at a time, no way round it."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import HIDDEN, LENGTHS, MemorySource, make_batch, tiny_model
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from splitfl.errors import ConfigError
from splitfl.privacy import dp_sgd
from splitfl.privacy.dp_sgd import DpSgd, Method, PrivateBottom, PrivateTop
from splitfl.privacy.ghost import GhostNorms, embedding_norms, product_norms, suits
from splitfl.privacy.record_head import squared_norm
from splitfl.split.checkpoint import load_segment
from splitfl.split.families import FAMILIES
from splitfl.split.loss import head_loss
from splitfl.split.segment import Piece, Segment
from splitfl.split.training import TrainingPolicy, set_up_training, tie_head

BOTTOM, TOP = Piece(0, 1, embedding=True), Piece(5, 6, head=True)
METHODS: tuple[Method, ...] = ("ghost", "record")
BATCH = make_batch(padded=True)
HIDDEN_STATES = torch.randn(*BATCH.ids.shape, HIDDEN, generator=torch.Generator().manual_seed(1))  # (B, T, D)


class Noise:
    """Draws of a seeded generator; ``scale`` 0 draws zeros. Counts the numbers drawn."""

    def __init__(self, scale: float = 0.0) -> None:
        self.scale = scale
        self.drawn = 0
        self.generator = torch.Generator().manual_seed(3)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        self.drawn += math.prod(shape)
        return self.scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)


def segment(piece: Piece, family: str = "llama", policy: TrainingPolicy | None = None, **changes: object) -> Segment:
    made = load_segment(MemorySource.of(tiny_model(family, **changes)), piece)
    set_up_training(made, policy or TrainingPolicy())
    return made


def top(limit: float, method: Method = "record") -> PrivateTop:
    return PrivateTop(segment(TOP), DpSgd(limit, 1.0), Noise(), method)


def taken(part: dp_sgd.PrivatePart) -> Tensor:
    """The step's sum as one vector; ``grad`` is empty again."""
    part.finish()
    vector = torch.cat([weight.grad.flatten().double() for weight in part.weights if weight.grad is not None])
    for weight in part.weights:
        weight.grad = None
    return vector


def rows(part: PrivateTop, *wanted: int) -> None:
    """A micro-batch of these records of the batch."""
    which, lengths = list(wanted), torch.tensor(LENGTHS)
    part.backward(HIDDEN_STATES[which], lengths[which], BATCH.labels[which])


@pytest.mark.parametrize("method", METHODS)
def test_record_contributes_exactly_the_clip_when_its_gradient_is_longer(method: Method) -> None:
    part = top(1e-3, method)
    rows(part, 0)
    assert float(taken(part).norm()) == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_large_clip_leaves_the_gradient_of_the_summed_loss_over_padded_length(method: Method) -> None:
    part = top(1e6, method)
    rows(part, 0, 1, 2)
    found = taken(part)
    plain = segment(TOP)
    head_loss(plain, plain(HIDDEN_STATES, torch.tensor(LENGTHS)), BATCH.labels, train=True)
    expected = torch.cat([weight.grad.flatten() for _, weight in plain.named_weights() if weight.grad is not None])
    assert float((found - expected / BATCH.ids.shape[1]).norm()) <= 2e-6 * float(found.norm())


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_add_up_to_one_batch(method: Method) -> None:
    part = top(0.05, method)
    rows(part, 0, 1, 2)
    whole = taken(part)
    rows(part, 0)
    rows(part, 2, 1)
    assert float((taken(part) - whole).norm()) <= 1e-6 * float(whole.norm())


@pytest.mark.parametrize("method", METHODS)
def test_replaced_record_moves_the_sum_by_the_stated_sensitivity_and_no_more(method: Method) -> None:
    """The reversed gradient is the worst case: twice the clip, which opacus' add/remove would miss."""
    settings = DpSgd(0.01, 1.0)
    part = PrivateBottom(segment(BOTTOM), settings, Noise(), method)
    sums = []
    for sign in (1.0, -1.0):
        gradient = HIDDEN_STATES.clone()
        gradient[0] *= sign
        part.backward(BATCH.ids, BATCH.lengths, gradient)
        sums.append(taken(part))
    assert settings.sensitivity == 0.02
    assert float((sums[0] - sums[1]).norm()) == pytest.approx(settings.sensitivity, rel=1e-5)


def test_noise_has_the_stated_sigma_once_a_step_on_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dp_sgd, "NOISE_BLOCK", 1000)
    settings, noise = DpSgd(0.5, 3.0), Noise(1.0)
    part = PrivateTop(segment(TOP), settings, noise)
    clean = top(0.5)
    for _ in range(2):
        rows(part, 0, 1, 2)
        rows(clean, 0, 1, 2)
    noisy = taken(part) - taken(clean)
    count = len(noisy)
    assert settings.sigma == 1.5
    assert noise.drawn == count == sum(weight.numel() for weight in part.weights)
    assert float(noisy.std()) == pytest.approx(settings.sigma, rel=5 / math.sqrt(2 * count))  # 5 standard errors
    assert abs(float(noisy.mean())) <= 5 * settings.sigma / math.sqrt(count)
    assert not torch.equal(taken(part), taken(part))


def test_step_without_any_record_still_gets_noise() -> None:
    part = PrivateTop(segment(TOP), DpSgd(1.0, 1.0), Noise(1.0))
    assert float(taken(part).std()) == pytest.approx(1.0, rel=0.05)


def test_tied_weight_gets_both_sums_and_both_noises() -> None:
    bottom, upper = (segment(piece, tie=True) for piece in (BOTTOM, TOP))
    tie_head(upper, bottom.embedding)
    parts = (
        PrivateTop(upper, DpSgd(1.0, 3.0), Noise(1.0)),
        PrivateBottom(bottom, DpSgd(1.0, 4.0), Noise(1.0)),
    )
    for part in parts:
        part.noise.generator.manual_seed(id(part) % 1000)  # type: ignore[attr-defined]
        part.finish()
    gradient = bottom.embedding.weight.grad
    assert gradient is not None
    assert float(gradient.std()) == pytest.approx(5.0, rel=0.05)  # 3-4-5


@pytest.mark.parametrize("method", METHODS)
def test_gradient_stays_empty_until_the_noise_is_in(method: Method) -> None:
    part = top(1.0, method)
    rows(part, 0, 1)
    assert all(weight.grad is None for weight in part.weights)


def test_discarded_step_leaves_nothing() -> None:
    part = top(1.0)
    rows(part, 0, 1)
    part.discard()
    assert float(taken(part).norm()) == 0.0


def test_record_without_labels_adds_nothing() -> None:
    for method in METHODS:
        part = top(1.0, method)
        part.backward(HIDDEN_STATES[:1], None, torch.full_like(BATCH.labels[:1], -100))
        assert float(taken(part).norm()) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_record_whose_gradient_is_not_finite_adds_nothing_and_stops_nobody(method: Method) -> None:
    """To give the step up would tell the server about that record, for nothing."""
    hidden = HIDDEN_STATES[:2].clone()
    hidden[1, 3, 5] = math.inf
    with_it, without = top(1.0, method), top(1.0, method)
    with_it.backward(hidden, None, BATCH.labels[:2])
    without.backward(hidden[:1], None, BATCH.labels[:1])
    got, expected = taken(with_it), taken(without)
    assert torch.allclose(got, expected, atol=1e-6)
    assert float(got.norm()) > 0


@pytest.mark.parametrize(
    ("limit", "multiplier"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf), (-1.0, 1.0)]
)
def test_clip_or_noise_that_means_nothing_is_refused(limit: float, multiplier: float) -> None:
    with pytest.raises(ConfigError):
        DpSgd(limit, multiplier)


def test_half_precision_is_refused() -> None:
    half = load_segment(MemorySource.of(tiny_model("llama").bfloat16()), TOP)
    set_up_training(half, TrainingPolicy(head="full", freeze_below=6, mixed=True))
    with pytest.raises(ConfigError, match="fp32"):
        PrivateTop(half, DpSgd(1.0, 1.0), Noise())


def test_one_segment_with_both_ends_tied_is_refused() -> None:
    whole = segment(Piece(0, 6, embedding=True, head=True), tie=True)
    tie_head(whole, whole.embedding)
    with pytest.raises(ValueError, match="not both"):
        PrivateTop(whole, DpSgd(1.0, 1.0), Noise())


def test_logits_of_a_batch_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfl.privacy.record_head.chunk_tokens", lambda _: 6)
    for method in METHODS:
        part, sizes, logits = top(1.0, method), [], Segment.logits

        def spy(self: Segment, hidden: Tensor, sizes: list[int] = sizes, logits: object = logits) -> Tensor:
            sizes.append(len(hidden))
            return logits(self, hidden)  # type: ignore[operator,no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Segment, "logits", spy)
            rows(part, 0, 1, 2)
        assert max(sizes) == 6


def test_opacus_hooks_leave_names_alone_and_come_off() -> None:
    plain = segment(TOP)
    names = [name for name, _ in plain.named_weights()]
    part = PrivateTop(plain, DpSgd(1.0, 1.0), Noise(), "ghost")
    rows(part, 0, 1)
    assert [name for name, _ in plain.named_weights()] == names
    assert not any(hasattr(module, "activations") for module in plain.modules())
    part.close()
    assert not any(module._forward_hooks or module._backward_hooks for module in plain.modules())
    assert not any(hasattr(weight, "grad_sample") or hasattr(weight, "_norm_sample") for weight in part.weights)


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_two_batches_under_way_are_wrong_in_opacus() -> None:
    """What the guard is for: the first backward takes the second batch's activations, without a word."""
    first, second = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))  # (B, I) each
    module = GradSampleModule(nn.Linear(3, 1, bias=False), loss_reduction="sum")
    outputs = module(first), module(second)
    outputs[0].sum().backward()
    outputs[1].sum().backward()
    weight = module._module.weight
    found = weight.grad_sample[0] if isinstance(weight.grad_sample, list) else weight.grad_sample
    assert not torch.allclose(found[:, 0], first)  # the gradient of the first batch would be its inputs
    assert weight.grad is not None  # while the plain gradient is right
    torch.testing.assert_close(weight.grad[0], first.sum(0) + second.sum(0))


def test_two_batches_under_way_are_refused_here() -> None:
    ghost = GhostNorms(nn.Sequential(nn.Linear(3, 1)))
    with ghost.one_batch(2), pytest.raises(RuntimeError, match="under way"), ghost.one_batch(2):
        pass
    with ghost.one_batch(2):  # and the first one's end frees the hooks
        pass


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_layer_that_sees_records_as_one_row_is_refused() -> None:
    ghost = GhostNorms(nn.Sequential(nn.Linear(3, 1)))
    with ghost.one_batch(2), pytest.raises(RuntimeError, match="one row a record"):
        ghost._module(torch.zeros(8, 3))


def test_families_that_ghost_norms_do_not_suit_go_record_by_record() -> None:
    unsuited = {family for family in FAMILIES if not suits(segment(TOP, family))}
    assert unsuited == {"gpt_oss"}  # experts see all tokens as one row, and attention has a weight of its own
    assert PrivateTop(segment(TOP, "gpt_oss"), DpSgd(1.0, 1.0), Noise(), "ghost").one_by_one


LORA = TrainingPolicy(train="lora", head="lora", lora_rank=4)


@pytest.mark.parametrize(
    ("family", "policy", "ghost"),
    [
        ("llama", TrainingPolicy(), True),
        ("gpt2", TrainingPolicy(), True),
        ("llama", LORA, True),
        ("gpt2", LORA, True),
        ("gpt_oss", TrainingPolicy(), False),
        ("gpt_oss", LORA, True),  # its experts are frozen then
    ],
)
def test_ghost_norms_are_for_accelerators_and_for_layers_that_they_know(
    family: str, policy: TrainingPolicy, ghost: bool
) -> None:
    here = segment(TOP, family, policy)
    assert PrivateTop(here, DpSgd(1.0, 1.0), Noise()).one_by_one
    elsewhere = here.to("meta")  # no accelerator needed: nothing is computed
    assert PrivateTop(elsewhere, DpSgd(1.0, 1.0), Noise()).one_by_one != ghost


@pytest.mark.parametrize("what", ["family", "layer"])
def test_what_nobody_has_tried_goes_record_by_record_and_clips_the_same(what: str) -> None:
    """Record by record needs nothing of a model but its gradients, so there is none that it does not suit."""

    class Odd(nn.Linear):
        pass

    strange = segment(TOP)
    if what == "family":
        strange.model.config.model_type = "unheard_of"
    else:
        layer = next(module for module in strange.base.modules() if type(module) is nn.Linear)
        layer.__class__ = Odd
    part, known = PrivateTop(strange, DpSgd(0.05, 1.0), Noise(), "ghost"), top(0.05, "ghost")
    assert (part.one_by_one, known.one_by_one) == (True, False)
    for each in (part, known):
        rows(each, 0, 1, 2)
    expected = taken(known)
    assert float((taken(part) - expected).norm()) <= 1e-6 * float(expected.norm())


def test_layer_that_nobody_has_tried_does_not_matter_where_it_is_frozen() -> None:
    strange = segment(TOP, "gpt_oss")
    for parameter in strange.base.parameters():
        parameter.requires_grad_(False)
    assert suits(strange)


def test_ghost_norm_of_a_nearly_cancelling_record_is_not_rounded_away() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(1, 2, 40, generator=generator).repeat_interleave(2, dim=1)
    right = torch.randn(1, 2, 40, generator=generator).repeat_interleave(2, dim=1)
    right[:, 1::2] *= -1
    right[:, 1::2] += 1e-5 * torch.randn(1, 2, 40, generator=generator)  # (B, T, Q)
    exact = (left.double().mT @ right.double()).norm()
    assert 2 * left.shape[1] ** 2 < left.shape[2] * right.shape[2]  # so it goes by tables
    in_fp32 = ((left @ left.mT) * (right @ right.mT)).sum().clamp_min(0).sqrt()
    assert float(in_fp32) != pytest.approx(float(exact), rel=0.1)
    assert float(product_norms(left, right)) == pytest.approx(float(exact), rel=1e-5)


def test_norm_of_a_large_gradient_does_not_drift() -> None:
    """torch's own fp32 norm of these is off by more than 1e-5."""
    large = torch.rand(4000, 2500, generator=torch.Generator().manual_seed(0)) * 0.01 + 0.01
    exact = float(large.double().square().sum())
    assert float(squared_norm([large, None], large.device)) == pytest.approx(exact, rel=1e-6)


def test_padding_row_has_no_gradient() -> None:
    table = nn.Embedding(5, 4, padding_idx=2)
    ids = torch.tensor([[1, 2, 2, 1], [2, 2, 2, 2]])
    gradient = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = [torch.autograd.grad(table(ids[b]), table.weight, gradient[b])[0].norm() for b in range(2)]
    torch.testing.assert_close(embedding_norms(table, ids, gradient).float(), torch.stack(expected))
