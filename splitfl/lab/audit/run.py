"""Every attack on one sample of records, in order of strength, within a budget of time."""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from splitfl.errors import DataError
from splitfl.lab.audit.baselines import informed_guess, majority_guess, own_guess
from splitfl.lab.audit.enumeration import Search, choose_weights, enumerate_tokens, make_target
from splitfl.lab.audit.evidence import Evidence, Gradients, collect, fit_weights, rehearse
from splitfl.lab.audit.inverter import Inverter, Training, read, two_stages
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.model import PublicModel
from splitfl.lab.audit.nearest import nearest_tokens
from splitfl.lab.audit.observed import NO_GUESS, HeadUpdate, Observed, Sample, stack, truth
from splitfl.lab.audit.public import HELD_OUT, Knowledge
from splitfl.lab.audit.report import AuditReport, Row
from splitfl.lab.audit.scores import rouge_recovery, token_recovery
from splitfl.lab.audit.updates import bag_from_update, score_bag

NEAREST, MLP, TRANSFORMER = "nearest neighbour", "inverter, MLP", "inverter, transformer"
LABELS, JOINT, SEARCH = "labels from gradients", "inverter and gradients", "enumeration, beam and LM prior"
MOST_PUBLIC = 2_000  # public records, drawn at random: more bring little in the time there is
REHEARSED_TOKENS = 1024  # of held-out public text, that evidence is weighed on
SHARES = (0.1, 0.35)  # of the time, by which the MLP and the transformer have to be trained


@dataclass(frozen=True)
class Plan:
    """How hard to try: seconds in all, steps of training of each stage, and how widely to search."""

    seconds: float = 150.0
    steps: int = 2000
    search: Search = field(default_factory=Search)


class Audit:
    """One audit under way. Guesses are (B, T); what they are compared with stays in the scoring alone."""

    def __init__(
        self,
        observed: Sequence[Observed],
        knowledge: Knowledge,
        gradient_mechanism: Mechanism | None,
        plan: Plan,
        generator: torch.Generator,
        say: Callable[[str], None],
    ) -> None:
        self.knowledge, self.plan, self.generator, self.say = knowledge, plan, generator, say
        self.started = self.lap = clock.monotonic()
        self.sample: Sample = stack(observed)
        self.truths = truth(observed)
        self.mechanism = knowledge.mechanism.averaged(float(self.sample.counts.float().mean()))
        self.gradient_mechanism = gradient_mechanism if self.sample.gradients else None

    def deadline(self, share: float) -> float:
        """When that share of the time is over."""
        return self.started + share * self.plan.seconds

    def row(self, name: str, guesses: Tensor, simpler: tuple[str, ...] = (), note: str = "") -> Row:
        """Score guesses (B, T) and take the time since the row before."""
        spent, self.lap = clock.monotonic() - self.lap, clock.monotonic()
        mine = [guess[: len(true)] for guess, true in zip(guesses, self.truths, strict=True)]
        row = Row(
            name,
            token_recovery(mine, self.truths, self.generator),
            rouge_recovery(mine, self.truths, self.generator),
            spent,
            simpler,
            note,
        )
        self.say(f"{name}: {row.recovery} of tokens, {spent:.1f} s")
        return row

    def baselines(self) -> Iterator[Row]:
        """Guesses that need no release."""
        shape = (len(self.truths), self.sample.released.shape[1])
        padded = torch.nn.utils.rnn.pad_sequence(self.truths, batch_first=True)
        yield self.row("commonest token", majority_guess(self.knowledge, shape))
        yield self.row("language model, own text", own_guess(self.knowledge, shape))
        yield self.row("language model, told the true prefix", informed_guess(self.knowledge, padded))

    def attacks(self) -> Iterator[Row]:
        """All attacks, the simplest first."""
        released, mask = self.sample.released, self.sample.mask
        yield self.row(NEAREST, nearest_tokens(self.knowledge, released))
        budgets = tuple(Training(self.plan.steps, self.deadline(share)) for share in SHARES)
        for stage, inverter in two_stages(self.knowledge, self.mechanism, budgets, self.generator, self.say):  # type: ignore[arg-type]
            name, simpler = (MLP, (NEAREST,)) if stage == "mlp" else (TRANSFORMER, (NEAREST, MLP))
            yield self.row(name, read(inverter, released, mask).argmax(-1), simpler)
        yield from self.joint_attacks(inverter)

    def joint_attacks(self, inverter: Inverter) -> Iterator[Row]:
        """Those that use activations and gradients together, with weights fitted on public text."""
        evidence = self.evidence(inverter, self.sample.released, self.sample.mask, self.sample.gradients)
        rehearsal, rehearsed, ids, mask = self.rehearsal(inverter)
        guesses, cheap = evidence.inverter.argmax(-1), torch.ones(1)
        simpler: tuple[str, ...] = (NEAREST, MLP, TRANSFORMER)
        if evidence.labels is not None:
            yield self.row(LABELS, from_labels(evidence.labels), note="never the first token")
            kinds = torch.stack([kind[mask] for kind in rehearsed.kinds()], dim=-1)  # (P, V, 2)
            cheap = fit_weights(kinds, ids[mask])
            guesses = (torch.stack(evidence.kinds(), dim=-1) @ cheap).argmax(-1)
            yield self.row(JOINT, guesses, simpler)
            simpler = (*simpler, JOINT)
        knowledge, mechanism = self.knowledge, self.mechanism
        practice = make_target(knowledge, mechanism, rehearsal, mask, rehearsed)
        weights = choose_weights(knowledge, mechanism, practice, ids, mask, cheap)
        self.say("weights of state, prior, inverter, gradients: " + ", ".join(f"{w:.2f}" for w in weights.tolist()))
        target = make_target(knowledge, mechanism, self.sample.released, self.sample.mask, evidence)
        decoded = enumerate_tokens(knowledge, mechanism, target, weights, self.plan.search, self.deadline(1.0))
        count = len(decoded)
        note = (
            "" if count == len(guesses) else f"time for {count} of {len(guesses)} records; the rest as the row before"
        )
        yield self.row(SEARCH, torch.cat([decoded, guesses[count:]]), simpler, note)

    def rehearsal(self, inverter: Inverter) -> tuple[Tensor, Evidence, Tensor, Tensor]:
        """Held-out public records as if released: states, evidence, and the truth about them (ids, mask)."""
        held_out = self.knowledge.held_out
        texts = held_out[: max(HELD_OUT // 2, REHEARSED_TOKENS // held_out.ids.shape[1])]
        count = len(self.sample.gradients)
        released, gradients = rehearse(
            self.knowledge, texts, self.mechanism, self.gradient_mechanism, count, self.generator
        )
        return released, self.evidence(inverter, released, texts.mask, gradients), texts.ids, texts.mask

    def evidence(self, inverter: Inverter, released: Tensor, mask: Tensor, gradients: Gradients) -> Evidence:
        model = self.knowledge.model
        return collect(model, inverter, released, mask, gradients, self.gradient_mechanism)


def from_labels(scores: Tensor) -> Tensor:
    """The likeliest labels as tokens, (B, T, V) -> (B, T); the first token is nobody's label."""
    guesses = scores.argmax(-1)
    guesses[:, 0] = NO_GUESS
    return guesses


def run_audit(
    observed: Sequence[Observed],
    model: PublicModel,
    mechanism: Mechanism,
    public: Sequence[Tensor],
    *,
    generator: torch.Generator,
    gradient_mechanism: Mechanism | None = None,
    updates: Sequence[HeadUpdate] = (),
    pad_token_id: int = 0,
    plan: Plan | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> AuditReport:
    """Attack ``observed`` with everything there is.

    ``model``: the public base, cut as the run was. ``mechanism`` and ``gradient_mechanism``: how activations and
    gradients were released. ``public``: token ids (t,) of public records; best not what the base was trained on, or its
    prior seems better than it is. ``say`` hears of progress. Raises DataError when there is nothing to attack or too
    little public text.
    """
    if not observed:
        raise DataError("no releases were kept, so there is nothing to attack", "Let a run keep a sample of records.")
    plan = plan or Plan()
    started = clock.monotonic()
    time = max(len(record.token_ids) for record in observed)
    order = torch.randperm(len(public), generator=generator)[:MOST_PUBLIC].tolist()
    knowledge = Knowledge(model, mechanism, [public[index] for index in order], time, pad_token_id)
    audit = Audit(observed, knowledge, gradient_mechanism, plan, generator, say)
    audit.started = started
    baselines = tuple(audit.baselines())
    attacks = sorted(audit.attacks(), key=lambda row: -row.recovery.value)
    bags = tuple(score_bag(knowledge, bag_from_update(knowledge, update), update) for update in updates)
    tokens = sum(len(true) for true in audit.truths)
    return AuditReport(len(observed), tokens, tuple(attacks), baselines, bags, clock.monotonic() - started)
