"""Machines, models and federations to plan for, drawn small enough to weigh every plan many times."""

from __future__ import annotations

from hypothesis import strategies as st

from splitfl.config import Batch, Federation, Merge, Model, Optimizer, Privacy, Rounds, Wire
from splitfl.planning.capability import Arithmetic, Capability, LinkSpeed
from splitfl.planning.shapes import ModelShape

MIB = 1 << 20


@st.composite
def shapes(draw: st.DrawFn) -> ModelShape:
    """Decoders of up to six blocks."""
    heads = draw(st.sampled_from([2, 4, 8]))
    return ModelShape(
        layers=draw(st.integers(2, 6)),
        hidden=heads * 32,
        intermediate=draw(st.sampled_from([128, 512, 2048])),
        heads=heads,
        kv_heads=draw(st.sampled_from([1, heads])),
        head_dim=32,
        vocab=draw(st.sampled_from([300, 8000, 150_000])),
        tied=draw(st.booleans()),
        gated=draw(st.booleans()),
        stored_bytes=draw(st.sampled_from([2, 4])),
    )


@st.composite
def federations(draw: st.DrawFn, layers: int = 2) -> Federation:
    """Settings that allow at least one cut of a model with ``layers`` blocks, with privacy on or off."""
    private, dp_sgd = draw(st.booleans()), draw(st.booleans())
    max_bottom, max_top = draw(st.integers(1, 2)), draw(st.integers(1, layers))
    return Federation(
        batch=Batch(
            records=draw(st.sampled_from([1, 4, 6])),
            max_length=draw(st.sampled_from([32, 1024])),
            in_flight=draw(st.sampled_from([1, 2, 5])),
        ),
        rounds=Rounds(local_steps=draw(st.sampled_from([1, 20]))),
        model=Model(
            n_bottom=1,
            min_bottom=draw(st.integers(0, 1)),
            max_bottom=max_bottom,
            min_top=draw(st.integers(0, 1)),
            max_top=max_top,
            freeze_below=draw(st.sampled_from([None, 0, 1])),
            train=draw(st.sampled_from(["full", "lora"])),
        ),
        optimizer=Optimizer(name=draw(st.sampled_from(["adamw", "sgd"]))),
        merge=Merge(share=draw(st.sampled_from(["top", "ends"]))),
        wire=Wire(coarsest=draw(st.sampled_from([None, "bf16"]))),
        privacy=Privacy(
            mode="measured" if private else "off",
            dp_sgd=dp_sgd,
            gradients=draw(st.sampled_from(["none", "noised"])),
        ),
    )


@st.composite
def machines(draw: st.DrawFn) -> Capability:
    """Machines from far too small to large, on links from a modem's to a cluster's."""

    def speeds(low: float, high: float) -> st.SearchStrategy[float]:
        return st.floats(low, high, allow_nan=False)

    block = draw(speeds(1e-7, 1e-2))
    arithmetic = Arithmetic(block, block * draw(speeds(0.2, 0.4)), draw(speeds(1e-7, 1e-2)))
    compute = {"fp32": arithmetic}
    if draw(st.booleans()):
        compute["bf16"] = Arithmetic(block / 3, arithmetic.frozen_block_s / 3, arithmetic.head_s / 2)
    return Capability(
        device=draw(st.sampled_from(["cpu", "cuda"])),
        memory=draw(st.integers(50, 4000)) * MIB,
        base=draw(st.integers(10, 300)) * MIB,
        compute=compute,
        link=LinkSpeed(draw(speeds(0, 0.3)), draw(speeds(1e4, 1e9)), draw(speeds(1e4, 1e9))),
    )
