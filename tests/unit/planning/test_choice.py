"""The choice: the federation overrules all, the whole model first, then the deepest bottom that costs nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError, PlanError
from splitfl.planning.capability import Arithmetic, Capability, LinkSpeed
from splitfl.planning.machines import Machine
from splitfl.planning.plan import Candidate
from splitfl.planning.planner import TOLERABLE_STEP_S, candidates, choose, shortlist, why
from splitfl.planning.shapes import ModelShape

MIB, GIB = 1 << 20, 1 << 30
SHAPE = ModelShape(8, 512, 1408, 8, 4, 64, 16_000, tied=False)
FAST = Capability("cpu", 8 * GIB, 400 * MIB, {"fp32": Arithmetic(3e-5, 1e-5, 5e-5)}, LinkSpeed(0.001, 1e9, 1e9))
SLOW_LINK = replace(FAST, link=LinkSpeed(0.05, 2.5e5, 2.5e5))
MACHINES = sorted((Path(__file__).parents[3] / "docs/planning/machines").glob("*.json"))


def federation(**tables: Any) -> Federation:
    return parse_federation({"batch": {"in_flight": 4}, **tables}, "the test")


ROOMY = {"max_bottom": 4, "max_top": 4, "min_bottom": 0, "min_top": 0, "freeze_below": 4}
OPEN = {**ROOMY, "max_top": 8}


def weigh(machine: Capability, **tables: Any) -> list[Candidate]:
    return candidates(machine, SHAPE, federation(**tables))


def refusals(weighed: list[Candidate]) -> dict[Cut, set[str]]:
    found: dict[Cut, set[str]] = {}
    for c in weighed:
        found.setdefault(c.plan.cut, set()).add(c.refused)
    return found


def test_every_cut_is_weighed_and_those_outside_the_limits_name_the_setting() -> None:
    found = refusals(weigh(FAST, model={"min_bottom": 1, "max_bottom": 2, "min_top": 1, "max_top": 3}))
    assert found.keys() == {Cut(bottom, top) for bottom in range(9) for top in range(9 - bottom)}
    assert found[Cut(0, 1)] == {"model.min_bottom is 1"}
    assert found[Cut(3, 1)] == {"model.max_bottom is 2"}
    assert found[Cut(1, 0)] == {"model.min_top is 1"}
    assert found[Cut(1, 4)] == {"model.max_top is 3"}
    assert "" in found[Cut(2, 3)]


def test_default_federation_leaves_its_own_cut_and_formats() -> None:
    plan = choose(weigh(FAST)).plan
    assert (plan.cut, plan.dtype, plan.codec) == (Cut(1, 1), "fp32", "bf16")


def test_machine_that_carries_the_whole_model_is_offered_it_first() -> None:
    weighed = weigh(FAST, model=OPEN)
    chosen = choose(weighed)
    assert chosen.trunk_blocks == 0
    assert min(c.pace_s for c in weighed if not c.refused) < chosen.pace_s / 2  # though a split would be faster
    assert "whole model" in why(chosen, weighed)


def test_whole_model_is_not_offered_where_the_federation_does_not_allow_it() -> None:
    assert choose(weigh(FAST, model=ROOMY | {"max_top": 3})).trunk_blocks > 0


def test_whole_model_that_crawls_is_not_offered() -> None:
    crawling = replace(FAST, compute={"fp32": Arithmetic(1e-2, 3e-3, 1e-3)})
    weighed = weigh(crawling, model=OPEN)
    assert min(c.pace_s for c in weighed if not c.trunk_blocks) > TOLERABLE_STEP_S
    assert choose(weighed).trunk_blocks > 0


def test_whole_model_that_crawls_is_offered_when_the_link_crawls_more() -> None:
    crawling = replace(SLOW_LINK, compute={"fp32": Arithmetic(4e-3, 1e-3, 1e-3)}, link=LinkSpeed(1.0, 1e4, 1e4))
    assert choose(weigh(crawling, model=OPEN, merge={"share": "top"}, rounds={"local_steps": 500})).trunk_blocks == 0


def test_bottom_deepens_where_the_link_hides_it_and_stays_shallow_where_it_costs() -> None:
    settings = {"model": ROOMY | {"max_top": 1, "freeze_below": 4}}
    hidden, costly = weigh(SLOW_LINK, **settings), weigh(FAST, **settings)
    assert choose(hidden).plan.cut.n_bottom == 4
    assert "deepest" in why(choose(hidden), hidden)
    assert choose(costly).plan.cut.n_bottom < 4


def test_bottom_is_the_shallowest_where_memory_allows_no_fast_plan() -> None:
    settings = {"model": {"max_bottom": 4, "compute": "fp32"}, "batch": {"records": 8, "max_length": 2048}}
    least = min(c.peak_bytes for c in weigh(FAST, **settings) if not c.forbidden)
    tight = replace(FAST, memory=least, compute={"fp32": Arithmetic(3e-7, 1e-7, 5e-7)})
    weighed = weigh(tight, **settings)
    assert choose(weighed).plan.cut == Cut(1, 1)
    assert "shallowest" in why(choose(weighed), weighed)


def test_lack_of_memory_alone_never_deepens_the_bottom() -> None:
    """In small pieces over slow round trips all depths are equally slow, in large ones not."""
    settings = {
        "model": {"max_bottom": 4},
        "batch": {"in_flight": 1},
        "optimizer": {"name": "sgd"},
        "merge": {"share": "none"},
    }
    far = replace(FAST, link=LinkSpeed(0.1, 1e9, 1e9))
    peaks = sorted({c.peak_bytes for c in weigh(far, **settings) if not c.forbidden})
    depths = [choose(weigh(replace(far, memory=limit), **settings)).plan.cut.n_bottom for limit in peaks]
    assert depths == sorted(depths)


def test_coarser_format_is_taken_on_a_slow_link_and_only_if_allowed() -> None:
    assert choose(weigh(SLOW_LINK)).plan.codec == "int8"
    assert choose(weigh(FAST)).plan.codec == "bf16"
    weighed = weigh(SLOW_LINK, wire={"coarsest": "bf16"})
    assert choose(weighed).plan.codec == "bf16"
    assert {c.refused for c in weighed if c.plan.codec == "int8"} == {'wire.coarsest is "bf16"'}


def test_coarsest_format_cannot_be_finer_than_the_federations_own() -> None:
    with pytest.raises(ConfigError, match="finer than codec"):
        federation(wire={"coarsest": "fp32"})


def test_arithmetic_is_the_fastest_that_the_federation_leaves_open_and_the_more_exact_of_equals() -> None:
    matrix_unit = replace(FAST, compute={**FAST.compute, "bf16": Arithmetic(3e-6, 1e-6, 5e-6)})
    assert choose(weigh(matrix_unit)).plan.dtype == "bf16"
    weighed = weigh(matrix_unit, model={"compute": "fp32"})
    assert choose(weighed).plan.dtype == "fp32"
    assert {c.refused for c in weighed if c.plan.dtype == "bf16" and c.plan.cut == Cut(1, 1)} == {
        'model.compute is "fp32"'
    }
    same = replace(FAST, compute={**FAST.compute, "bf16": FAST.compute["fp32"]})
    assert choose(weigh(same)).plan.dtype == "fp32"


def test_slow_round_trips_put_more_pieces_under_way_up_to_the_federations_number() -> None:
    far = replace(FAST, link=LinkSpeed(0.2, 2e6, 2e6))
    exact: dict[str, Any] = {"wire": {"coarsest": "bf16"}}
    plan = choose(weigh(far, **exact)).plan
    assert 1 < plan.in_flight <= 4
    assert choose(weigh(far, batch={"in_flight": 1}, **exact)).plan.in_flight == 1


def test_dp_sgd_ends_force_one_micro_batch_in_flight_and_fp32() -> None:
    far = replace(FAST, link=LinkSpeed(0.2, 2e6, 2e6), compute=dict.fromkeys(("fp32", "bf16"), FAST.compute["fp32"]))
    weighed = weigh(far, privacy={"mode": "measured", "dp_sgd": True})
    assert (choose(weighed).plan.in_flight, choose(weighed).plan.dtype) == (1, "fp32")
    own = {c.refused for c in weighed if c.plan.cut == Cut(1, 1) and c.plan.codec == "bf16"}
    assert own == {"", "privacy.dp_sgd takes one micro-batch at a time", "privacy.dp_sgd computes in fp32"}


def test_bottom_that_would_train_without_a_gradient_is_refused() -> None:
    weighed = weigh(FAST, model={"max_bottom": 2, "freeze_below": 1}, privacy={"mode": "measured"})
    assert all("model.freeze_below is 1" in c.refused for c in weighed if c.plan.cut == Cut(2, 1))
    assert choose(weighed).plan.cut == Cut(1, 1)


def test_what_is_too_large_says_what_it_needs_and_what_there_is() -> None:
    weighed = weigh(replace(FAST, memory=GIB))
    refused = [c for c in weighed if c.missing_bytes and not c.forbidden]
    assert all(c.refused == f"memory: needs {c.peak_bytes / GIB:.2f} GiB, has 1.00 GiB" for c in refused)


def test_error_says_what_is_missing_and_which_cut_would_fit() -> None:
    model = {"n_bottom": 2, "n_top": 4, "freeze_below": 0}
    smaller = min(c.peak_bytes for c in weigh(FAST, model=model) if c.forbidden)
    with pytest.raises(PlanError) as error:
        choose(weigh(replace(FAST, memory=smaller), model=model))
    assert "the smallest, cut 2,4 in 8 micro-batches with fp32, needs" in error.value.message
    assert "would fit, but model.min_bottom is 2" in error.value.remedy
    least = min(c.peak_bytes for c in weigh(FAST, model=model) if not c.forbidden)
    assert error.value.missing == least - smaller


def test_error_says_when_nothing_would_fit() -> None:
    with pytest.raises(PlanError, match="no other cut would fit"):
        choose(weigh(replace(FAST, memory=MIB)))


def test_error_for_a_model_with_too_few_blocks_is_not_about_memory() -> None:
    with pytest.raises(PlanError, match="the federation's settings leave no plan") as error:
        choose(weigh(FAST, model={"n_bottom": 5, "n_top": 5}))
    assert error.value.missing == 0


def test_shortlist_has_one_row_for_each_cut_and_arithmetic_and_holds_the_choice() -> None:
    both = replace(FAST, compute=dict.fromkeys(("fp32", "bf16"), FAST.compute["fp32"]))
    weighed = weigh(both, model=ROOMY | {"max_top": 2})
    rows = shortlist(weighed)
    assert len(rows) == 45 * 2
    assert len({(c.plan.cut, c.plan.dtype) for c in rows}) == len(rows)
    open_ = {(c.plan.cut, c.plan.dtype) for c in weighed if not c.refused}
    assert {(c.plan.cut, c.plan.dtype) for c in rows if not c.refused} == open_


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_recorded_machine_plans_for_a_model_that_nobody_has_fetched(path: Path) -> None:
    machine = Machine.read(path)
    capability = machine.with_model(SHAPE)
    chosen = choose(candidates(capability, SHAPE, federation()))
    assert chosen.peak_bytes <= machine.memory
    block = capability.compute["fp32"].block_s
    assert block == pytest.approx(6 * SHAPE.block_weights / machine.operations["fp32"])
