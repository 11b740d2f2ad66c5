"""How long an optimizer step takes: a pipeline of client, way up, trunk and way down.

Beside the step stands its share of the round's update, which nothing overlaps. The step is one of the first epoch, in
which activations travel; where they are released once, later epochs send names and are faster. What the trunk takes is
not known at home; the planner's caller says what to take for it.
"""

from __future__ import annotations

from splitfl.planning.capability import Arithmetic, LinkSpeed
from splitfl.planning.carried import Carried
from splitfl.planning.memory import FP32, WIRE_BYTES
from splitfl.planning.plan import Plan

PIECE_S = 0.01  # what a micro-batch costs beside its tokens: a durable row of the ledger, frames, Python

STAGES = ("client_s", "up_s", "trunk_s", "down_s")

Seconds = dict[str, float]


def time_parts(carried: Carried, plan: Plan, own: Arithmetic, trunk: Arithmetic, link: LinkSpeed) -> Seconds:
    """Where a step's time goes, each stage on its own and over all micro-batches, in seconds."""
    tokens = plan.micro_batches * carried.tokens(plan.micro_batches)
    parts = {"client_s": tokens * client_token(carried, own) + plan.micro_batches * PIECE_S}
    parts["update_s"] = update(carried, link)
    if not carried.trunk:
        return parts | {"up_s": 0.0, "down_s": 0.0, "trunk_s": 0.0, "latency_s": 0.0}
    return parts | {
        "up_s": tokens * up_bytes(carried, plan.codec) / link.up,
        "down_s": tokens * down_bytes(carried, plan.codec) / link.down,
        "trunk_s": tokens * trunk_token(carried, trunk),
        "latency_s": plan.micro_batches * (1 + carried.needs_backward) * link.rtt_s,
    }


def step_seconds(parts: Seconds, plan: Plan, *, backward: bool) -> float:
    """The first micro-batch crosses alone. Each of the others adds what the busiest stage takes, unless too few are
    under way to keep it busy: then they cross in groups.

    With a ``backward`` a crossing is two hops, and ``2 * in_flight - 1`` are under way: ``in_flight`` of them wait for
    the trunk's output, the others of a group follow when those have it (``client_model/trainer.py``).
    """
    pieces = plan.micro_batches
    stages = [parts[stage] / pieces for stage in STAGES]
    crossing, busiest = sum(stages) + parts["latency_s"] / pieces, max(stages)
    groups, rest = divmod(pieces - 1, 2 * plan.in_flight - 1 if backward else plan.in_flight)
    behind = rest - plan.in_flight  # of the last group: so many follow when half of the crossing is over
    last = max(rest * busiest, crossing / 2 + behind * busiest) if behind >= 0 else rest * busiest
    return crossing + max((pieces - 1) * busiest, groups * crossing + last)


def update(carried: Carried, link: LinkSpeed) -> float:
    """One step's share of a round's merge: the shared weights go up, and their merge comes down, in fp32."""
    return FP32 * carried.shared * (1 / link.up + 1 / link.down) / carried.settings.rounds.local_steps


def client_token(carried: Carried, own: Arithmetic) -> float:
    """Seconds of one token on the client. DP-SGD runs the bottom's forward a second time."""
    frozen, trained = (sum(kind) for kind in zip(carried.bottom, carried.top, strict=True))
    again = carried.cut.n_bottom if carried.private_ends and carried.bottom_trains else 0
    return (frozen + again) * own.frozen_block_s + trained * own.block_s + own.head_s


def trunk_token(carried: Carried, trunk: Arithmetic) -> float:
    """Seconds of one token in the trunk: backward goes down to the lowest thing that trains."""
    blocks = len(carried.trunk)
    if not carried.needs_backward:
        return blocks * trunk.frozen_block_s
    lowest = 0 if carried.bottom_trains else carried.settings.freeze_below
    forward_only = len(range(carried.trunk.start, min(carried.trunk.stop, lowest)))
    return forward_only * trunk.frozen_block_s + (blocks - forward_only) * trunk.block_s


def up_bytes(carried: Carried, codec: str) -> float:
    """Bytes of one token on the way up: its activation, as narrow as it is released, and its gradient."""
    width = carried.settings.release.rank or carried.shape.hidden
    return WIRE_BYTES[codec] * (width + carried.needs_backward * carried.shape.hidden)


def down_bytes(carried: Carried, codec: str) -> float:
    """Bytes of one token on the way down: its hidden state, and the gradient that a bottom that trains is owed."""
    owed = carried.needs_backward and carried.bottom_trains
    return WIRE_BYTES[codec] * carried.shape.hidden * (1 + owed)
