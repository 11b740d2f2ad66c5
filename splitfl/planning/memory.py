"""How many bytes a client's process will hold at its peak, term by term.

The peak is what always stays (process, weights) and the greater of what comes and goes: reading the model; or the
optimizer's moments and a step, at the end of the federation beside a second pair of ends for the baselines. An update
takes none: it is written to a file and sent from there, and its merge, tensor by tensor, fits where the step's
gradients were.
Every term follows the code that it names; activations are what autograd keeps of a block of the Llama kind, counted
tensor by tensor as Korthikanti et al. (2023, arXiv:2205.05198, section 4.1) count GPT's.
"""

from __future__ import annotations

from splitfl.planning.carried import Carried
from splitfl.planning.plan import Plan
from splitfl.planning.shapes import ModelShape
from splitfl.split.chunks import FEW_TOKENS, chunk_tokens

FP32 = 4
#: bytes of a number on the wire; int8 has a bf16 scale for each 64 channels
WIRE_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1 + 2 / 64}
#: what an optimizer keeps of each weight
MOMENTS = {"adamw": 2, "sgd": 0}
#: copies of the shared weights that a strategy's correction keeps (splitfl/federation/drift.py)
CORRECTIONS = {"fedprox": 1, "scaffold": 3}

#: what a step holds beside what stays
STEP = ("gradients_bytes", "activations_bytes", "head_bytes", "wire_bytes", "holes_bytes")
#: freed memory that a CPU's heap keeps, of what a step asks for and gives back piece by piece: measured 0.2 to 0.9 with
#: a glibc that is told to keep it (splitfl/allocator.py)
HOLES = 0.45
#: what a client holds beside its model, buffers of the link, the data's index, ledger, journal: measured 10 to 16 MiB
AROUND = 12 << 20

Bytes = dict[str, int]


def memory_parts(carried: Carried, plan: Plan, base: int, device: str) -> Bytes:
    """Where memory goes under ``plan``; the names say what, all in bytes."""
    moving = {
        "activations_bytes": activations(carried, plan, device),
        "head_bytes": head(carried, plan),
        "wire_bytes": wire(carried, plan),
    }
    return {
        "base_bytes": base + AROUND,
        "weights_bytes": weights(carried, plan.dtype),
        "optimizer_bytes": moments(carried) + corrections(carried),
        "loading_bytes": loading(carried.shape),
        "gradients_bytes": gradients(carried),
        **moving,
        "holes_bytes": round(HOLES * sum(moving.values())) if device == "cpu" else 0,
        "baselines_bytes": second_ends(carried, plan.dtype),
    }


def peak(parts: Bytes) -> int:
    """What stays, and the greatest of what comes and goes."""
    stays = parts["base_bytes"] + parts["weights_bytes"]
    step = sum(parts[name] for name in STEP)
    return stays + max(parts["loading_bytes"], parts["optimizer_bytes"] + step + parts["baselines_bytes"])


# -- what stays ------------------------------------------------------------------------------------------------


def frozen_bytes(shape: ModelShape, dtype: str) -> int:
    """Of a frozen weight: under bf16 autocast the checkpoint's own, else fp32 (splitfl/split/training.py)."""
    return shape.stored_bytes if dtype == "bf16" else FP32


def weights(carried: Carried, dtype: str) -> int:
    """Trained weights as fp32 masters, frozen ones as they compute, and the embedding's table as it is stored."""
    shape, frozen = carried.shape, frozen_bytes(carried.shape, dtype)
    table = shape.embedding_weights * (FP32 if carried.embedding_trains else shape.stored_bytes)
    still, moving = (sum(kind) for kind in zip(carried.bottom, carried.top, strict=True))
    blocks = still * shape.block_weights * frozen + moving * block_bytes(carried, frozen)
    return table + blocks + head_weights(carried, frozen) + narrow_release(carried)


def block_bytes(carried: Carried, frozen: int) -> int:
    """One block that trains."""
    if carried.settings.model.train == "full":
        return FP32 * carried.shape.block_weights
    return frozen * carried.shape.block_weights + FP32 * (carried.adapter_inputs + carried.adapter_outputs)


def head_weights(carried: Carried, frozen: int) -> int:
    """Norm and output head; a head that shares its weights with a frozen embedding is a copy of its own."""
    shape, mode = carried.shape, carried.settings.model.head
    if carried.head_is_table:
        return FP32 * shape.hidden
    adapter = FP32 * sum(carried.head_adapter) if mode == "lora" else 0
    return shape.head_weights * (FP32 if mode == "full" else frozen) + adapter


def narrow_release(carried: Carried) -> int:
    """Encoder, decoder and local skip (splitfl/split/narrow.py)."""
    rank, hidden = carried.settings.release.rank, carried.shape.hidden
    return 0 if rank is None else FP32 * 2 * hidden * (hidden + rank)


def moments(carried: Carried) -> int:
    """The optimizer's memory of the weights that train."""
    return FP32 * MOMENTS[carried.settings.optimizer.of_clients] * carried.trained


def corrections(carried: Carried) -> int:
    """What a strategy keeps against drift."""
    return FP32 * CORRECTIONS.get(carried.settings.merge.strategy, 0) * carried.shared


# -- what comes and goes ---------------------------------------------------------------------------------------


def loading(shape: ModelShape) -> int:
    """The largest tensor on its way in: the file's bytes, and the copy that becomes the weight."""
    return 2 * shape.stored_bytes * shape.vocab * shape.hidden


def gradients(carried: Carried) -> int:
    """One for each trained weight; DP-SGD holds the sum and one record's own."""
    return FP32 * carried.trained * (2 if carried.private_ends else 1)


def activations(carried: Carried, plan: Plan, device: str) -> int:
    """Graphs of the bottoms under way and of the one top that runs, and what the running block works with."""
    tokens = graph_tokens(carried, plan)
    one = block_graph(carried, plan.dtype, tokens, device)
    bottom, top = (trained * one for _, trained in (carried.bottom, carried.top))
    return bottoms_under_way(carried, plan) * bottom + top + working(carried, plan, tokens)


def graph_tokens(carried: Carried, plan: Plan) -> int:
    """Tokens that one graph spans: a micro-batch, or with DP-SGD a record."""
    return carried.tokens(carried.settings.batch.records if carried.private_ends else plan.micro_batches)


def bottoms_under_way(carried: Carried, plan: Plan) -> int:
    """Bottom graphs held at once: each micro-batch under way keeps its own, DP-SGD runs the forward again."""
    return 1 if carried.private_ends or not carried.trunk else under_way(plan)


def under_way(plan: Plan) -> int:
    """Micro-batches that a client has begun and not ended: some wait for the trunk's output, others for a gradient."""
    return min(2 * plan.in_flight - 1, plan.micro_batches)


def block_graph(carried: Carried, dtype: str, tokens: int, device: str) -> int:
    """One trained block: what autograd keeps for ``tokens`` tokens, and under autocast the weights' bf16 copies."""
    copies = 2 * carried.shape.block_weights if dtype == "bf16" and casts(carried) else 0
    return tokens * token_graph(carried, dtype, device) + copies


def casts(carried: Carried) -> bool:
    """Whether autocast meets fp32 weights in a trained block."""
    return carried.settings.model.train == "full" or carried.shape.stored_bytes == FP32


def token_graph(carried: Carried, dtype: str, device: str) -> int:
    """Bytes that autograd keeps of one token in one trained block: around the norms, in attention, in the MLP.

    A CPU's norms and attention are our own (splitfl/split/kernels.py).
    """
    shape, full = carried.shape, carried.settings.model.train == "full"
    number = 2 if dtype == "bf16" else FP32
    few = device == "cpu" and carried.settings.batch.max_length <= FEW_TOKENS  # attend in fp32
    keys = shape.attention if carried.padded else shape.kv  # with a mask, grouped keys and values are spread out
    attention = (FP32 if few else number) * (2 * shape.attention + 2 * keys)
    mask = number * carried.settings.batch.max_length if carried.padded else 0
    wide = shape.active * (shape.wide if full else shape.wide - 1)  # a frozen matrix does not ask for its input
    return norm_graph(shape, dtype, device, full) + attention + number * wide * shape.intermediate + mask


def norm_graph(shape: ModelShape, dtype: str, device: str, full: bool) -> int:
    """The norms in fp32: their input (a GPU's RMSNorm that trains: the normalised one too), and what matrices read."""
    around = 2 * FP32 * shape.hidden * (2 if full and shape.gated and device != "cpu" else 1)
    around += shape.head_norms * FP32 * (shape.attention + shape.kv) * (2 if full and device != "cpu" else 1)
    if not full:
        return around
    readers = 2 * (4 + shape.gated) if dtype == "bf16" else 2 * FP32  # autocast makes a copy for each matrix
    return around + readers * shape.hidden


def working(carried: Carried, plan: Plan, tokens: int) -> int:
    """What one block has in its hands: three tensors of its own width and three of its MLP's, and a new gradient."""
    shape, number = carried.shape, 2 if plan.dtype == "bf16" else FP32
    trains = carried.settings.model.train == "full" and carried.bottom[1] + carried.top[1] > 0
    largest = FP32 * max(inputs * outputs for inputs, outputs in shape.matrices) if trains else 0
    runs = carried.cut.n_bottom + carried.cut.n_top > 0
    return largest + runs * tokens * (3 * FP32 * shape.hidden + 3 * number * shape.intermediate)


def head(carried: Carried, plan: Plan) -> int:
    """Rows and their gradients, and of one chunk (splitfl/split/chunks.py) logits, softmax and gradient.

    A head that trains meets its gradient so far with a new one of the same size.
    """
    shape, tokens = carried.shape, graph_tokens(carried, plan)
    chunk = min(tokens, chunk_tokens(shape.vocab))
    logits, rows = FP32 * chunk * shape.vocab, 4 * FP32 * tokens * shape.hidden
    full = carried.settings.model.head == "full"
    again = full and (chunk < tokens or plan.micro_batches > 1)
    copy = 2 * shape.head_weights if full and plan.dtype == "bf16" else 0
    return rows + copy + max(3 * logits, logits + again * FP32 * shape.head_weights)


def wire(carried: Carried, plan: Plan) -> int:
    """For each micro-batch under way: the bottom's output, what came back and its gradient; and a payload that waits
    for its answer beside one that is put together from its fragments."""
    token = FP32 * carried.shape.hidden
    if not carried.trunk:
        return carried.tokens(plan.micro_batches) * token
    token = round((3 * FP32 + 3 * WIRE_BYTES[plan.codec]) * carried.shape.hidden)
    return under_way(plan) * carried.tokens(plan.micro_batches) * token


def second_ends(carried: Carried, dtype: str) -> int:
    """Baselines train fresh ends while the federation's are still held."""
    measured = carried.settings.evaluation.held_out_fraction > 0 and carried.settings.evaluation.records > 0
    if carried.settings.baselines == "none" or not measured or not carried.trunk:
        return 0
    return weights(carried, dtype) + moments(carried)
