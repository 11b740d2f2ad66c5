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
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from client_model.records import open_tokenizer
from splitfl.config import LEVELS
from splitfl.cut import Cut
from splitfl.data.records import Record
from splitfl.lab.adapt import NarrowModel
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel
from splitfl.lab.audit.observed import Observed
from splitfl.lab.audit.run import Plan, run_audit
from splitfl.lab.bench.contenders import (
    CPU,
    Effort,
    TopTuning,
    adapted_model,
    learn_ends_alone,
    plain_model,
    train_publicly,
    tuned,
    untouched,
    write_ends,
)
from splitfl.lab.bench.harness import Bar, Result, in_parallel, once, spread, workplace
from splitfl.lab.bench.texts import Texts, docstrings, python_texts
from splitfl.privacy.accounting import epsilon_of
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.create import create_checkpoint
from splitfl.split.narrow import load_release

DELTA = 1e-5
MOST_RECOVERY, MOST_LOSS, LEAST_GAIN = 0.25, 1.05, 0.15
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scope:
    """What is measured: cut, rank, noise levels of either mechanism, seeds, and how hard the attacks try.

    The plain levels are those that a federation can name.
    """

    cut: Cut = field(default_factory=lambda: Cut(1, 1))
    rank: int = 16
    narrow_levels: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5)
    plain_levels: tuple[float, ...] = tuple(LEVELS.values())
    seeds: int = 3
    audited: int = 8  # private records whose releases are attacked, for each seed
    audit_public: int = 1500  # public records that attacks train on
    audit_seconds: float = 120.0
    base: tuple[int, int, int] = (8, 256, 2048)  # blocks, width and vocabulary of a base made here
    base_steps: int = 3000


@dataclass
class Found:
    """What the seeds gave for one mechanism at one level."""

    noisy: list[float]
    clean: list[float]
    blank: list[float]
    recovery: list[float]


def silent(_: str) -> None:
    """Nobody listens."""


def run(
    *, model: Path | None, scope: Scope, effort: Effort, work: Path | None = None, jobs: int = 1, say: Say = silent
) -> Result:
    """Measure everything on the checkpoint ``model``, or on one that is made and trained here first.

    ``work`` is a folder that keeps what was adapted and measured, so that an interrupted run goes on; without one all
    is forgotten. ``jobs`` rows are measured at once, on a share of the cores each; then ``say`` must be picklable.
    Raises ConfigError for a folder that holds another run.
    """
    config = {"model": str(model or "made here"), **asdict(scope), **asdict(effort), "delta": DELTA}
    result = Result("privacy", config)
    with workplace(work, config) as folder:
        base = model or made_base(folder / "base", scope, effort, say)
        count = effort.public_steps * effort.records
        texts = python_texts(open_tokenizer(base), length=effort.length, public_records=count)
        result.config |= {"records": {name: len(getattr(texts, name)) for name in ("public", "train", "held_out")}}
        bench = Frontier(base, folder, texts, scope, effort, say)
        in_parallel([bench.publish_base, bench.publish_ends, bench.publish_stage], jobs)
        result.rows += in_parallel(bench.cells(), jobs)
    result.bars += bars(result.rows)
    return result


def made_base(folder: Path, scope: Scope, effort: Effort, say: Say) -> Path:
    """A small llama, trained on docstrings until its depth matters; one that is there already is taken as it is."""
    if (folder / "model.safetensors").exists():
        return folder
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
    """One base model, its texts, and all that is measured on them.

    A publisher adapts once; the seeds are those of clients and attackers, who draw noise and order anew.
    """

    def __init__(self, base: Path, work: Path, texts: Texts, scope: Scope, effort: Effort, say: Say) -> None:
        self.base, self.work, self.texts, self.scope, self.effort, self.say = base, work, texts, scope, effort, say
        self.width: int = CheckpointFolder(base).config.hidden_size
        self.adapted, self.ends, self.stage = work / "adapted", work / "ends-adapted", work / "stage.safetensors"

    def publish_base(self) -> None:
        """The whole base after the public steps: what baselines and plain noise start from."""
        if not (self.adapted / "model.safetensors").exists():
            train_publicly(self.base, self.adapted, self.texts, self.effort, 0)

    def publish_ends(self) -> None:
        """The ends alone after the public steps."""
        if (self.ends / "model.safetensors").exists():
            return
        if not (self.work / "ends").exists():
            write_ends(self.base, self.work / "ends", self.scope.cut)
        train_publicly(self.work / "ends", self.ends, self.texts, self.effort, 0)

    def publish_stage(self) -> None:
        """What all narrow releases start from."""
        if not self.stage.exists():
            learn_ends_alone(self.base, self.texts, self.effort, self.scope.cut, self.scope.rank, self.stage)

    def cells(self) -> list[Callable[[], dict[str, Any]]]:
        """Everything that can be measured on its own, each a row: baselines first."""
        scope = self.scope
        baselines = ("no fine-tuning", "ends-only", "top-only", "noise-free split")
        narrow = f"narrow, rank {scope.rank}"
        rows: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            *((name, partial(self.baseline, name)) for name in baselines),
            *((f"{narrow}, {level}", partial(self.measure, narrow, level)) for level in scope.narrow_levels),
            *((f"plain, {level}", partial(self.measure, "plain Gaussian", level)) for level in scope.plain_levels),
        ]
        return [partial(once, self.work, name, measure) for name, measure in rows]

    def baseline(self, name: str) -> dict[str, Any]:
        """What releases nothing, or everything."""
        top = {"n_top": self.scope.cut.n_top} if name == "top-only" else {}
        folder = self.ends if name == "ends-only" else self.adapted
        if name == "no fine-tuning":
            losses = [untouched(folder, self.texts, self.effort)]
        else:
            losses = [tuned(folder, self.texts, self.effort, seed, **top) for seed in range(self.scope.seeds)]
        self.say(f"{name}: {fmean(losses):.3f}")
        return {"mechanism": name, "level": 0.0, "loss_noisy": spread(losses)}

    def model(self, plain: bool, level: float) -> NarrowModel:
        """What the publisher hands out for this mechanism and level."""
        cut, rank = self.scope.cut, self.scope.rank
        if plain:
            return plain_model(self.adapted, self.texts, self.effort, cut, level)
        settings = self.effort.adaptation(cut, rank, level, 0).settings()
        folder = self.publish_narrow(level)
        return NarrowModel(folder, settings, load_release(folder), CPU)

    def publish_narrow(self, level: float) -> Path:
        """A narrow release adapted to this level."""
        folder = self.work / f"narrow-{level}"
        if not folder.exists():
            cut, rank = self.scope.cut, self.scope.rank
            model = adapted_model(self.base, self.stage, self.texts, self.effort, cut, rank, level)
            with tempfile.TemporaryDirectory(dir=self.work) as begun:
                model.save(Path(begun) / "model")
                (Path(begun) / "model").rename(folder)
        return folder

    def measure(self, name: str, level: float) -> dict[str, Any]:
        """One mechanism at one level: tuned and attacked for each seed."""
        found = Found([], [], [], [])
        attacks: list[str] = []
        plain = name.startswith("plain")
        model = self.model(plain, level)
        for seed in range(self.scope.seeds):
            tuning = TopTuning(model, self.texts, self.effort, seed)
            losses = tuning.run()
            recovery, attack = self.attack(model, tuning, plain=plain, seed=seed)
            found.noisy.append(losses.noisy)
            found.clean.append(losses.clean)
            if not plain:
                found.blank.append(TopTuning(model, self.texts, self.effort, seed, blank=True).run().noisy)
            found.recovery.append(recovery)
            attacks.append(attack)
            self.say(f"{name}, level {level}: loss {losses.noisy:.3f}, recovery {recovery:.3f} ({attack})")
        rank = self.width if plain else self.scope.rank
        return {
            "mechanism": name,
            "level": level,
            "loss_noisy": spread(found.noisy),
            "loss_clean": spread(found.clean),
            "recovery": spread(found.recovery),
            "strongest_attack": max(set(attacks), key=attacks.count),
            "epsilon_per_record": epsilon_of(2 * math.sqrt(self.effort.length) / level, DELTA),
            "bytes_per_token": 2 * rank,
            **({} if plain else {"loss_if_noise_alone_is_sent": spread(found.blank)}),
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
        """What the attacker has: the published bottom, and as language model the base after the public steps."""
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            model.save(Path(folder) / "published")
            return PublicModel(
                CheckpointFolder(Path(folder) / "published"), self.scope.cut, CheckpointFolder(self.adapted)
            )

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
        Bar("ends-only: loss above noise-free split", loss["ends-only"] / split - 1, LEAST_GAIN, "higher"),
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
