"""``splitfl bench privacy``: what a release costs in loss, and what it gives away.

On one plane: held-out loss after private fine-tuning, and the share of tokens that the strongest of our attacks
recovers from what was sent. Mechanisms: plain Gaussian noise on the bottom's output, and a narrow release with local
skip. Every record is released once, the trunk is frozen and no gradient leaves. Beside them the baselines without which
a figure says nothing: no fine-tuning, ends-only (nothing leaves), top-only and the noise-free split (the server can
read all).

One control decides whether a leak is earned: the same client with the same training, to whose server noise alone is
sent. A release that does no better than that gives text away for nothing, however good its loss looks.

Private and public text come from this machine's own Python (:mod:`splitfl.lab.bench.texts`). Noise is drawn from seeded
generators, for nothing here is a secret. A recovery is a lower bound and no guarantee.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from client_model.records import open_tokenizer
from splitfl.cut import Cut
from splitfl.data.records import Record
from splitfl.lab.adapt import NarrowModel
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel
from splitfl.lab.audit.observed import Observed
from splitfl.lab.audit.run import Plan, run_audit
from splitfl.lab.bench.contenders import (
    Effort,
    TopTuning,
    adapted_model,
    plain_model,
    train_publicly,
    tuned,
    untouched,
    write_ends,
)
from splitfl.lab.bench.harness import Bar, Result, spread
from splitfl.lab.bench.texts import Texts, docstrings, python_texts
from splitfl.privacy.accounting import epsilon_of
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint

DELTA = 1e-5
MOST_RECOVERY, MOST_LOSS, LEAST_GAIN = 0.25, 1.05, 0.15
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scope:
    """What is measured: cut, rank, noise levels of either mechanism, seeds, and how hard the attacks try."""

    cut: Cut = field(default_factory=lambda: Cut(1, 2))
    rank: int = 16
    narrow_levels: tuple[float, ...] = (0.3, 0.5, 0.7)
    plain_levels: tuple[float, ...] = (0.05, 0.1, 0.2)
    seeds: int = 3
    audited: int = 24  # private records whose releases are attacked
    audit_public: int = 1500  # public records that attacks train on
    audit_seconds: float = 180.0
    base: tuple[int, int, int] = (8, 256, 2048)  # blocks, width and vocabulary of a base made here
    base_steps: int = 3000


@dataclass
class Found:
    """What the seeds gave for one mechanism at one level."""

    noisy: list[float]
    clean: list[float]
    blank: list[float]
    recovery: list[float]


def run(*, model: Path | None, scope: Scope, effort: Effort, say: Say = lambda _: None) -> Result:
    """Measure everything on the checkpoint ``model``, or on one that is made and trained here first."""
    result = Result("privacy", {"model": str(model or "made here"), **asdict(scope), **asdict(effort)})
    with tempfile.TemporaryDirectory() as work:
        base = model or made_base(Path(work) / "base", scope, effort, say)
        count = effort.public_steps * effort.records
        texts = python_texts(open_tokenizer(base), length=effort.length, public_records=count)
        sizes = {name: len(getattr(texts, name)) for name in ("public", "train", "held_out")}
        result.config |= {"records": sizes, "delta": DELTA}
        bench = Frontier(base, Path(work), texts, scope, effort, say)
        result.rows += bench.baselines()
        result.rows += bench.mechanisms()
    result.bars += bars(result.rows)
    return result


def made_base(folder: Path, scope: Scope, effort: Effort, say: Say) -> Path:
    """A small llama, trained on docstrings until its depth matters."""
    blocks, width, vocab = scope.base
    raw = folder.with_name("raw")
    corpus = (text for text, _ in zip(docstrings(1), range(60), strict=False))
    create_checkpoint(raw, family="llama", layers=blocks, hidden=width, vocab=vocab, corpus=corpus, seed=0, tie=False)
    say(f"training a base of {blocks} blocks for {scope.base_steps} steps")
    longer = Effort(public_steps=scope.base_steps, records=effort.records, length=effort.length, compute=effort.compute)
    count = scope.base_steps * effort.records
    texts = python_texts(open_tokenizer(raw), length=effort.length, public_records=count, seed=1)
    train_publicly(raw, folder, texts, longer, 0)
    return folder


class Frontier:
    """One base model, its texts, and all that is measured on them."""

    def __init__(self, base: Path, work: Path, texts: Texts, scope: Scope, effort: Effort, say: Say) -> None:
        self.base, self.work, self.texts, self.scope, self.effort, self.say = base, work, texts, scope, effort, say
        self.source = CheckpointFolder(base)
        self.width: int = self.source.config.hidden_size

    def baselines(self) -> list[dict[str, Any]]:
        """Rows of what releases nothing, or everything; base and ends had the same public steps as the mechanisms."""
        cut, seeds = self.scope.cut, range(self.scope.seeds)
        adapted, ends = self.work / "adapted", self.work / "ends-adapted"
        write_ends(self.base, self.work / "ends", cut)
        train_publicly(self.work / "ends", ends, self.texts, self.effort, 0)
        train_publicly(self.base, adapted, self.texts, self.effort, 0)
        found = {
            "no fine-tuning": [untouched(adapted, self.texts, self.effort)],
            "ends-only": [tuned(ends, self.texts, self.effort, seed) for seed in seeds],
            "top-only": [tuned(adapted, self.texts, self.effort, seed, n_top=cut.n_top) for seed in seeds],
            "noise-free split": [tuned(adapted, self.texts, self.effort, seed) for seed in seeds],
            "noise-free split, base as given": [tuned(self.base, self.texts, self.effort, seed) for seed in seeds],
        }
        for name, losses in found.items():
            self.say(f"{name}: {fmean(losses):.3f}")
        return [{"mechanism": name, "level": 0.0, "loss_noisy": spread(losses)} for name, losses in found.items()]

    def mechanisms(self) -> list[dict[str, Any]]:
        """Rows of both mechanisms at all their levels."""
        scope = self.scope
        rows = [self.measure("plain Gaussian", level, self.plain) for level in scope.plain_levels]
        return rows + [self.measure(f"narrow, rank {scope.rank}", level, self.narrow) for level in scope.narrow_levels]

    def plain(self, level: float, _seed: int) -> NarrowModel:
        return plain_model(self.base, self.texts, self.effort, self.scope.cut, level)

    def narrow(self, level: float, seed: int) -> NarrowModel:
        return adapted_model(self.base, self.texts, self.effort, self.scope.cut, self.scope.rank, level, seed)

    def measure(self, name: str, level: float, make: Callable[[float, int], NarrowModel]) -> dict[str, Any]:
        """One mechanism at one level, over the seeds: each adapts, tunes and is attacked on its own."""
        found = Found([], [], [], [])
        attacks: list[str] = []
        for seed in range(self.scope.seeds):
            model = make(level, seed)
            tuning = TopTuning(model, self.texts, self.effort, seed)
            losses = tuning.run()
            recovery, attack = self.attack(model, tuning, plain=name.startswith("plain"), seed=seed)
            found.noisy.append(losses.noisy)
            found.clean.append(losses.clean)
            found.blank.append(TopTuning(model, self.texts, self.effort, seed, blank=True).run().noisy)
            found.recovery.append(recovery)
            attacks.append(attack)
            self.say(f"{name}, level {level}: loss {losses.noisy:.3f}, recovery {recovery:.3f} ({attack})")
        rank = self.width if name.startswith("plain") else self.scope.rank
        return {
            "mechanism": name,
            "level": level,
            "loss_noisy": spread(found.noisy),
            "loss_clean": spread(found.clean),
            "loss_if_noise_alone_is_sent": spread(found.blank),
            "recovery": spread(found.recovery),
            "strongest_attack": max(set(attacks), key=attacks.count),
            "epsilon_per_record": epsilon_of(2 * math.sqrt(self.effort.length) / level, DELTA),
            "bytes_per_token": 2 * rank,
        }

    def attack(self, model: NarrowModel, tuning: TopTuning, *, plain: bool, seed: int) -> tuple[float, str]:
        """The strongest attack on the first training records' releases: share of tokens recovered, and its name."""
        spec = model.narrow.spec
        encoder = None if plain else model.narrow.encoder.linear.weight.detach()
        mechanism = Mechanism("token", spec.clip_norm, spec.sigma, "bf16", encoder)
        report = run_audit(
            [observed(record, item.sent) for record, item in self.sample(tuning)],
            self.public_model(model),
            mechanism,
            [torch.from_numpy(record.input_ids) for record in self.texts.public[: self.scope.audit_public]],
            generator=torch.Generator().manual_seed(seed),
            plan=Plan(seconds=self.scope.audit_seconds),
            say=self.say,
        )
        return report.worst.recovery.value, report.worst.name

    def public_model(self, model: NarrowModel) -> PublicModel:
        """What the attacker has: the published bottom, and the base as its language model: that never learned noise."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            model.save(Path(folder) / "published")
            return PublicModel(CheckpointFolder(Path(folder) / "published"), self.scope.cut, self.source)

    def sample(self, tuning: TopTuning) -> Sequence[tuple[Record, Any]]:
        """Records to attack, spread over the training text, with what was released of them."""
        step = max(1, len(self.texts.train) // self.scope.audited)
        return list(zip(self.texts.train, tuning.train, strict=True))[::step][: self.scope.audited]


def observed(record: Record, sent: torch.Tensor) -> Observed:
    return Observed(torch.from_numpy(record.input_ids), len(record), (sent,))


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """What the issue asks for; where no level is safe enough, the least leaky one stands for the narrow release."""
    loss = {row["mechanism"]: row["loss_noisy"]["median"] for row in rows if "recovery" not in row}
    narrow = [row for row in rows if row["mechanism"].startswith("narrow")]
    safe = [row for row in narrow if row["recovery"]["median"] <= MOST_RECOVERY]
    best = (
        min(safe, key=lambda row: row["loss_noisy"]["median"])
        if safe
        else min(narrow, key=lambda row: row["recovery"]["median"])
    )
    reached, split = best["loss_noisy"]["median"], loss["noise-free split"]
    return [
        Bar("noise-free split: gain over ends-only", 1 - split / loss["ends-only"], LEAST_GAIN, "higher"),
        Bar("narrow: worst recovery", best["recovery"]["median"], MOST_RECOVERY, "lower"),
        Bar("narrow: loss / noise-free split", reached / split, MOST_LOSS, "lower"),
        Bar("narrow: loss / ends-only", reached / loss["ends-only"], 1.0, "lower"),
        Bar("narrow: loss / top-only without noise", reached / loss["top-only"], 1.0, "lower"),
        Bar(
            "narrow: loss / with noise alone sent",
            reached / best["loss_if_noise_alone_is_sent"]["median"],
            1.0,
            "lower",
        ),
    ]
