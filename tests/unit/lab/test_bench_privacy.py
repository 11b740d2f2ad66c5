"""The privacy benchmark: its texts share nothing, its baselines are what they say, its epsilon is the pinned one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from client_model.records import open_tokenizer
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.lab.adapt import NarrowModel, adapt, narrow_model, public_release
from splitfl.lab.bench import privacy
from splitfl.lab.bench.contenders import (
    Effort,
    TopTuning,
    adapted_model,
    learn_ends_alone,
    plain_model,
    release_once,
    tuned,
    untouched,
    without_noise,
    write_ends,
)
from splitfl.lab.bench.harness import Result, claim, once
from splitfl.lab.bench.plots import draw_frontier
from splitfl.lab.bench.privacy import Frontier, Scope, bars, run
from splitfl.lab.bench.texts import RUN, Texts, docstrings, python_texts, runs

QUICK = Effort(public_steps=4, private_steps=6, records=4, length=32, rates=(3e-3,), compute="fp32")


@pytest.fixture(scope="module")
def texts(small_model: Path) -> Texts:
    whole = python_texts(open_tokenizer(small_model), length=32, public_records=40)
    return Texts(whole.public, whole.train[:24], whole.held_out[:8])


def test_private_public_and_held_out_text_share_no_run_of_tokens(small_model: Path) -> None:
    texts = python_texts(open_tokenizer(small_model), length=48, public_records=60)
    held_out, train, public = runs(texts.held_out), runs(texts.train), runs(texts.public)
    assert len(texts.public) == 60
    assert len(texts.train) > 4 * len(texts.held_out) > 100
    assert not held_out & train
    assert not public & (held_out | train)
    assert {len(piece) for piece in public} == {4 * RUN}


def test_docstrings_never_include_the_private_text() -> None:
    from pydoc_data.topics import topics

    some = next(docstrings(0))
    assert len(some) > 1000
    assert not any(text in some for text in topics.values())


def test_ends_are_the_base_without_its_trunk(small_model: Path, tmp_path: Path) -> None:
    write_ends(small_model, tmp_path / "ends", Cut(1, 1))
    base = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "ends", dtype=torch.float32)
    base.model.layers = torch.nn.ModuleList([base.model.layers[0], base.model.layers[2]])
    base.model.layers[1].self_attn.layer_idx = 1
    ids = torch.arange(20).unsqueeze(0)
    assert torch.equal(base(ids, use_cache=False).logits, ends(ids, use_cache=False).logits)


def test_tuning_lowers_the_loss_and_more_of_the_model_lowers_it_further(small_model: Path, texts: Texts) -> None:
    before = untouched(small_model, texts, QUICK)
    whole = tuned(small_model, texts, QUICK, 0)
    top_only = tuned(small_model, texts, QUICK, 0, n_top=1)
    assert whole < top_only < before


def test_plain_release_without_noise_is_top_only(small_model: Path, texts: Texts) -> None:
    """The two ways to tune a top give the same loss where nothing is clipped or noised."""
    model = plain_model(small_model, texts, QUICK, Cut(1, 1), 1e-9)
    model.narrow.spec = type(model.narrow.spec)(1, 1, 64, 64, 1e-9, 1e6)
    tuning = TopTuning(model, texts, QUICK, 0)
    tuning.train = release_unrounded(tuning, texts.train)
    tuning.held_out = tuning.held_out_clean = release_unrounded(tuning, texts.held_out)
    assert tuning.run().noisy == pytest.approx(tuned(small_model, texts, QUICK, 0, n_top=1), rel=1e-4)


def release_unrounded(tuning: TopTuning, records: object) -> list:  # type: ignore[type-arg]
    """As ``release_once``, but what was sent is not rounded to bf16."""
    found = release_once(tuning.model, records, without_noise(tuning.model))  # type: ignore[arg-type]
    with torch.no_grad():
        return [type(item)(item.own, item.own, tuning.model.run_trunk(item.own[None], None)[0]) for item in found]


@pytest.fixture
def adapted(small_model: Path, texts: Texts, tmp_path: Path) -> NarrowModel:
    stage = tmp_path / "stage.safetensors"
    learn_ends_alone(small_model, texts, QUICK, Cut(1, 1), 4, stage)
    return adapted_model(small_model, stage, texts, QUICK, Cut(1, 1), 4, 0.5)


def test_adapting_in_two_parts_is_adapting_at_once(small_model: Path, texts: Texts, adapted: NarrowModel) -> None:
    adaptation = QUICK.adaptation(Cut(1, 1), 4, 0.5, 0)
    whole = narrow_model(small_model, adaptation, torch.device("cpu"))
    adapt(whole, adaptation, texts.public, 0)
    assert all(torch.equal(weight, adapted.segments()[name]) for name, weight in whole.segments().items())


def test_adapted_release_is_kept_for_a_run_that_goes_on(
    small_model: Path, texts: Texts, adapted: NarrowModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Frontier(small_model, tmp_path, texts, Scope(Cut(1, 1), rank=4), QUICK, print)
    monkeypatch.setattr(privacy, "adapted_model", lambda *_: adapted)
    first = bench.model(plain=False, level=0.5)
    monkeypatch.setattr(privacy, "adapted_model", lambda *_: pytest.fail("adapted twice"))
    again = bench.model(plain=False, level=0.5)
    assert first.narrow.spec == again.narrow.spec == adapted.narrow.spec
    for name, weight in adapted.segments().items():
        assert torch.equal(weight, again.segments()[name])
    for name, weight in adapted.narrow.named_parameters():
        assert torch.equal(weight, dict(again.narrow.named_parameters())[name])


def test_top_tuning_learns_from_one_release_and_puts_the_model_back(texts: Texts, adapted: NarrowModel) -> None:
    model = adapted
    weights = [weight.clone() for weight in (*model.top.parameters(), *model.narrow.parameters())]
    tuning = TopTuning(model, texts, QUICK, 0)
    assert tuning.train[0].sent.shape == (32, 4)
    before = tuning._loss(tuning.held_out)
    assert tuning.run().noisy < before
    after = (*model.top.parameters(), *model.narrow.parameters())
    assert all(torch.equal(old, new) for old, new in zip(weights, after, strict=True))


def test_release_is_noised_by_as_much_as_the_level_says(texts: Texts, adapted: NarrowModel) -> None:
    model = adapted
    noise = public_release(model.narrow.spec, torch.Generator().manual_seed(1))
    noised, clean = (release_once(model, texts.train, how) for how in (noise, without_noise(model)))
    away = torch.stack([a.sent - b.sent for a, b in zip(noised, clean, strict=True)])
    assert float(away.std()) == pytest.approx(0.5, rel=0.05)
    assert max(float(item.sent.norm(dim=-1).max()) for item in clean) < 1.01


def test_control_sends_noise_and_nothing_of_the_record(small_model: Path, texts: Texts) -> None:
    model = plain_model(small_model, texts, QUICK, Cut(1, 1), 0.5)
    sent = torch.stack([item.sent for item in TopTuning(model, texts, QUICK, 0, blank=True).train])
    own = torch.stack([item.own for item in TopTuning(model, texts, QUICK, 0).train])
    assert float(sent.std()) == pytest.approx(model.narrow.spec.sigma, rel=0.02)
    assert abs(float(torch.corrcoef(torch.stack([sent.flatten(), own.flatten()]))[0, 1])) < 0.02


def row(mechanism: str, loss: float, recovery: float | None = None, level: float = 0.0) -> dict[str, object]:
    one = {"mechanism": mechanism, "level": level, "loss_noisy": {"min": loss, "median": loss, "max": loss}}
    if recovery is None:
        return one
    return {**one, "recovery": {"median": recovery}, "loss_if_noise_alone_is_sent": {"median": 2.9}}


ROWS = [
    row("ends-only", 3.0),
    row("top-only", 2.6),
    row("noise-free split", 2.5),
    row("plain Gaussian", 2.7, 0.8, 0.1),
    row("narrow, rank 4", 2.55, 0.4, 0.3),
    row("narrow, rank 4", 2.65, 0.2, 0.6),
]


def test_bars_judge_the_best_level_that_is_safe_enough() -> None:
    by_name = {bar.name: bar for bar in bars(ROWS)}
    assert by_name["narrow: worst recovery"].value == 0.2
    assert by_name["narrow: loss / noise-free split"].value == pytest.approx(2.65 / 2.5)
    assert [bar.holds for bar in bars(ROWS)] == [True, True, False, True, False, True]


def test_bars_judge_the_least_leaky_level_where_none_is_safe_enough() -> None:
    assert next(bar for bar in bars(ROWS[:-1]) if "recovery" in bar.name).value == 0.4


def test_picture_is_drawn(tmp_path: Path) -> None:
    draw_frontier(Result("privacy", {}, rows=ROWS), tmp_path / "privacy.png")
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_benchmark_measures_every_contender(small_model: Path, tmp_path: Path) -> None:
    """On a model that knows nothing: that it runs, and that plain noise this small hides nothing."""
    levels = {"narrow_levels": (0.5,), "plain_levels": (0.01,)}
    scope = Scope(Cut(1, 1), rank=8, seeds=1, audited=8, audit_public=300, audit_seconds=15, **levels)
    result = run(model=small_model, scope=scope, effort=replace(QUICK, public_steps=80), work=tmp_path, jobs=2)
    assert [row["mechanism"] for row in result.rows] == [
        "no fine-tuning",
        "ends-only",
        "top-only",
        "noise-free split",
        "narrow, rank 8",
        "plain Gaussian",
    ]
    narrow, plain = result.rows[-2:]
    assert plain["recovery"]["median"] > 0.9 > narrow["recovery"]["median"]
    assert (plain["bytes_per_token"], narrow["bytes_per_token"]) == (128, 16)
    assert len(result.as_json()["bars"]) == 6


def test_run_that_was_interrupted_goes_on_and_another_does_not_mix_in(tmp_path: Path) -> None:
    claim(tmp_path, {"seeds": 1})
    asked: list[str] = []

    def measure() -> dict[str, float]:
        asked.append("ends-only")
        return {"loss": 2.5}

    assert [once(tmp_path, "ends-only", measure) for _ in range(2)] == 2 * [{"loss": 2.5}]
    assert asked == ["ends-only"]
    with pytest.raises(ConfigError, match="another run"):
        claim(tmp_path, {"seeds": 3})
