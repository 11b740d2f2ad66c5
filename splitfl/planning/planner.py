"""Capability x model x federation -> every plan weighed, and the one to take.

The federation's settings overrule everything, then memory. Of what is left:

1. The empty trunk leaks least, so a machine that carries the whole model at a tolerable speed takes it.
2. Else the deepest bottom that is as fast as the fastest plan would be without a limit on memory.
3. Else the shallowest bottom that the federation allows, as fast as it goes.

Speeds within ``TIE`` are equal, and candidates come in the order in which they are preferred: the federation's own
pieces and formats first, then coarser ones. More memory adds plans and takes none away, and what a plan is compared
with does not depend on memory: so more memory never leads to a plan that keeps less at the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from splitfl.config import CODEC_NAMES, Batch, Federation
from splitfl.cut import Cut
from splitfl.errors import PlanError
from splitfl.planning.capability import Arithmetic, Capability
from splitfl.planning.carried import Carried
from splitfl.planning.memory import memory_parts, peak
from splitfl.planning.plan import Candidate, Plan, gib
from splitfl.planning.shapes import ModelShape
from splitfl.planning.timing import step_seconds, time_parts

TOLERABLE_STEP_S = 60.0  # of a step with the whole model here: a thousand steps are a night and a morning
TIE = 1.1  # times the fastest: predictions are no better than that
FREE = Arithmetic(0.0, 0.0, 0.0)
DTYPES = ("fp32", "bf16")  # most exact first


def candidates(
    capability: Capability, shape: ModelShape, settings: Federation, *, trunk: Arithmetic = FREE
) -> list[Candidate]:
    """Every plan, with its predicted peak and step time, in the order of preference.

    ``trunk``: its seconds a token. Nobody at home knows them, nor how many others it serves, so they are left out
    unless given: what the client can choose is its own part. A cut that is not allowed is weighed with the federation's
    own formats, one piece after another.
    """
    dtypes = [name for name in DTYPES if name in capability.compute]
    return [
        weighed(capability, Carried(shape, settings, cut), plan, trunk)
        for cut in cuts(shape.layers)
        for plan in plans(settings, cut, dtypes)
    ]


def weighed(capability: Capability, carried: Carried, plan: Plan, trunk: Arithmetic) -> Candidate:
    """One plan's memory and time."""
    memory = memory_parts(carried, plan, capability.base, capability.device)
    time = time_parts(carried, plan, capability.compute[plan.dtype], trunk, capability.link)
    return Candidate(
        plan=plan,
        peak_bytes=peak(memory),
        limit_bytes=capability.memory,
        step_s=step_seconds(time, plan, backward=carried.needs_backward),
        trunk_blocks=len(carried.trunk),
        parts={**memory, **time},
        forbidden=forbidden(carried, plan),
    )


def cuts(layers: int) -> Iterator[Cut]:
    """Every cut of a model."""
    return (Cut(bottom, top) for bottom in range(layers + 1) for top in range(layers - bottom + 1))


def plans(settings: Federation, cut: Cut, dtypes: Sequence[str]) -> Iterator[Plan]:
    """What can be chosen beside a cut: formats, the most exact first, then pieces, the federation's own first."""
    codecs: Sequence[str] = CODEC_NAMES[CODEC_NAMES.index(settings.wire.codec) :]
    most = settings.batch.in_flight
    if not settings.allows(cut):
        codecs, most = codecs[:1], 1
    for codec, dtype, pieces in product(codecs, dtypes, divisors(settings.batch)):
        for in_flight in windows(min(most, pieces)):
            yield Plan(cut, pieces, dtype, codec, in_flight)


def divisors(batch: Batch) -> list[int]:
    """Into how many pieces a step can be cut: the federation's own number first, then the fewest."""
    others = [n for n in range(1, batch.records + 1) if batch.records % n == 0 and n != batch.micro_batches]
    return [batch.micro_batches, *others]


def windows(most: int) -> list[int]:
    """How many pieces may be under way, fewest first: powers of two, and the most."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


# -- what the federation forbids -------------------------------------------------------------------------------


def forbidden(carried: Carried, plan: Plan) -> str:
    """Which of the federation's settings rules a plan out; "" where none does."""
    settings = carried.settings
    return (
        wrong_cut(settings, plan.cut)
        or bottom_without_gradient(carried)
        or wrong_dtype(settings, plan.dtype)
        or wrong_codec(settings, plan.codec)
        or too_many_under_way(carried, plan)
    )


def wrong_cut(settings: Federation, cut: Cut) -> str:
    """A cut outside the federation's limits."""
    for name, blocks, allowed in (("bottom", cut.n_bottom, settings.bottoms), ("top", cut.n_top, settings.tops)):
        if blocks < allowed[0]:
            return f"model.min_{name} is {allowed[0]}"
        if blocks > allowed[-1]:
            return f"model.max_{name} is {allowed[-1]}"
    return ""


def bottom_without_gradient(carried: Carried) -> str:
    """A bottom that would train, below a trunk that takes no gradient."""
    if not carried.trunk or not carried.bottom_trains or carried.needs_backward:
        return ""
    return (
        f"model.freeze_below is {carried.settings.freeze_below}, so this bottom would train, and privacy.gradients is "
        '"none"'
    )


def wrong_dtype(settings: Federation, dtype: str) -> str:
    """Arithmetic that the federation does not leave open."""
    if settings.model.compute not in ("auto", dtype):
        return f'model.compute is "{settings.model.compute}"'
    dp_sgd = settings.privacy.on and settings.privacy.dp_sgd
    return "privacy.dp_sgd computes in fp32" if dp_sgd and dtype != "fp32" else ""


def wrong_codec(settings: Federation, codec: str) -> str:
    """A format that is coarser than the federation wants."""
    return "" if codec in settings.wire.codecs else f'wire.coarsest is "{settings.wire.codecs[-1]}"'


def too_many_under_way(carried: Carried, plan: Plan) -> str:
    """DP-SGD takes the per-record gradients of one batch at a time."""
    overlaps = carried.private_ends and plan.in_flight > 1
    return "privacy.dp_sgd takes one micro-batch at a time" if overlaps else ""


# -- the choice ------------------------------------------------------------------------------------------------


def choose(weighed: Sequence[Candidate]) -> Candidate:
    """The plan to take. Raises PlanError, which says what is missing and what would come nearest."""
    allowed = [c for c in weighed if not c.forbidden]
    split = [c for c in allowed if c.trunk_blocks]
    with_trunk = fastest(split)
    whole = [c for c in allowed if not c.trunk_blocks and tolerable(c, with_trunk)]
    fitting = [c for c in split if not c.missing_bytes]
    if held := [c for c in whole if not c.missing_bytes]:
        return preferred(held)
    if not fitting:
        raise nothing_fits(weighed)
    if fast := [c for c in fitting if c.pace_s <= TIE * with_trunk]:
        return max(fast, key=bottom)  # the first of the deepest
    depth = min(map(bottom, fitting))
    return preferred([c for c in fitting if bottom(c) == depth])


def bottom(candidate: Candidate) -> int:
    """Blocks that the plan keeps at the bottom."""
    return candidate.plan.cut.n_bottom


def tolerable(whole: Candidate, with_trunk: float) -> bool:
    """Whether the whole model is fast enough here: within ``TOLERABLE_STEP_S``, or faster than with any trunk."""
    return whole.pace_s <= max(TOLERABLE_STEP_S, with_trunk)


def fastest(weighed: Iterable[Candidate]) -> float:
    """Seconds of the fastest step; without a plan there is none."""
    return min((c.pace_s for c in weighed), default=math.inf)


def preferred(weighed: Sequence[Candidate]) -> Candidate:
    """The first of those that are as fast as the fastest."""
    limit = TIE * fastest(weighed)
    return next(c for c in weighed if c.pace_s <= limit)


def why(chosen: Candidate, weighed: Sequence[Candidate]) -> str:
    """The choice in a sentence, for the person who reads the table."""
    if not chosen.trunk_blocks:
        return f"the whole model fits here, at {chosen.pace_s:.1f} s a step: no activation leaves"
    limit = TIE * fastest(c for c in weighed if not c.forbidden and c.trunk_blocks)
    if chosen.pace_s <= limit:
        return "the deepest bottom that is as fast as the fastest plan"
    return "the shallowest bottom that the federation allows: memory leaves no plan as fast as the fastest"


def nothing_fits(weighed: Sequence[Candidate]) -> PlanError:
    """What is missing, and the nearest thing that would fit."""
    allowed = [c for c in weighed if not c.forbidden]
    others = [c for c in weighed if c.forbidden and not c.missing_bytes]
    ruled_out = f"{described(others[0])} would fit, but {others[0].forbidden}" if others else "no other cut would fit"
    if not allowed:
        return PlanError("the federation's settings leave no plan for this model", f"For its operator: {ruled_out}.")
    least = min(allowed, key=lambda c: c.missing_bytes)
    return PlanError(
        f"no plan fits this machine: the smallest, {described(least)}, needs {gib(least.peak_bytes)} of memory, and "
        f"{gib(least.limit_bytes)} are there: {gib(least.missing_bytes)} are missing",
        f"Free that much, or take another machine; {ruled_out}. A shorter batch.max_length needs less as well.",
        missing=least.missing_bytes,
    )


def described(candidate: Candidate) -> str:
    """A plan in words."""
    plan = candidate.plan
    return f"cut {plan.cut} in {plan.micro_batches} micro-batches with {plan.dtype}"


def shortlist(weighed: Iterable[Candidate]) -> list[Candidate]:
    """For the reader's table: of each cut and arithmetic the plan that would be chosen, or else comes nearest."""
    groups: dict[tuple[Cut, str], list[Candidate]] = {}
    for candidate in weighed:
        groups.setdefault((candidate.plan.cut, candidate.plan.dtype), []).append(candidate)
    return [best_of(group) for group in groups.values()]


def best_of(group: Sequence[Candidate]) -> Candidate:
    """The preferred one of those that can be taken; the smallest where none can."""
    open_ = [c for c in group if not c.refused]
    return preferred(open_) if open_ else min(group, key=lambda c: (c.forbidden != "", c.missing_bytes))
