"""What holds of the planner for every machine, model and federation."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st
from machines import federations, machines, shapes

from splitfl.config import Federation
from splitfl.errors import PlanError
from splitfl.planning.capability import Capability, LinkSpeed
from splitfl.planning.plan import Candidate
from splitfl.planning.planner import candidates, choose
from splitfl.planning.shapes import ModelShape

few = settings(max_examples=60, deadline=None)


def best(weighed: list[Candidate]) -> Candidate | None:
    try:
        return choose(weighed)
    except PlanError:
        return None


def kept(plan: Candidate | None) -> float:
    """How much of the way from text to activation stays at home: all of it with an empty trunk."""
    if plan is None:
        return -1
    return plan.plan.cut.n_bottom if plan.trunk_blocks else inf


@few
@given(machines(), shapes(), federations())
def test_no_plan_exceeds_the_memory_limit_or_the_federation(m: Capability, s: ModelShape, f: Federation) -> None:
    weighed = candidates(m, s, f)
    plan = best(weighed)
    if plan is None:
        assert all(c.refused for c in weighed)
        return
    assert plan.peak_bytes <= m.memory
    assert f.allows(plan.plan.cut)
    assert f.batch.records % plan.plan.micro_batches == 0
    assert 1 <= plan.plan.in_flight <= min(f.batch.in_flight, plan.plan.micro_batches)
    assert plan.plan.codec in f.wire.codecs
    assert plan.plan.dtype in m.compute


@few
@given(machines(), shapes(), federations())
def test_more_memory_never_leads_to_a_plan_that_needs_less_privacy(m: Capability, s: ModelShape, f: Federation) -> None:
    weighed = candidates(m, s, f)
    peaks = sorted({c.peak_bytes for c in weighed if not c.forbidden})
    limits = peaks[:: max(1, len(peaks) // 20)] + peaks[-1:]
    found = [kept(best([replace(c, limit_bytes=limit) for c in weighed if not c.forbidden])) for limit in limits]
    assert found == sorted(found)


@few
@given(machines(), shapes(), federations(), st.floats(1, 100))
def test_faster_link_slows_no_plan_and_needs_no_more_memory(
    m: Capability, s: ModelShape, f: Federation, factor: float
) -> None:
    link = LinkSpeed(m.link.rtt_s / factor, m.link.up * factor, m.link.down * factor)
    for before, after in zip(candidates(m, s, f), candidates(replace(m, link=link), s, f), strict=True):
        assert after.plan == before.plan
        assert after.peak_bytes == before.peak_bytes
        assert after.step_s <= before.step_s * (1 + 1e-9)
        assert after.pace_s <= before.pace_s * (1 + 1e-9)


@few
@given(machines(), shapes(), federations())
def test_fewer_blocks_or_smaller_pieces_never_need_more_memory(m: Capability, s: ModelShape, f: Federation) -> None:
    peaks = {(c.plan, c.trunk_blocks > 0): c.peak_bytes for c in candidates(m, s, f)}
    for (plan, split), peak in peaks.items():
        cut = plan.cut
        if split and cut.n_bottom:
            assert peaks.get((replace(plan, cut=replace(cut, n_bottom=cut.n_bottom - 1)), True), 0) <= peak
        if split and cut.n_top:
            assert peaks.get((replace(plan, cut=replace(cut, n_top=cut.n_top - 1)), True), 0) <= peak
        if plan.in_flight > 1:
            assert peaks.get((replace(plan, in_flight=1), split), 0) <= peak


@few
@given(machines(), shapes(), federations())
def test_every_refusal_has_a_reason_and_every_part_a_size(m: Capability, s: ModelShape, f: Federation) -> None:
    for c in candidates(m, s, f):
        assert bool(c.refused) == bool(c.forbidden or c.peak_bytes > m.memory)
        assert all(0 <= part < inf for part in c.parts.values())
        assert c.peak_bytes > m.base
