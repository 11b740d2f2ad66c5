"""From the state folder to a Hugging Face checkpoint: base, trunk, merged ends, and a card that says how."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from server_model.store import RoundState, Store
from splitfl.config import Federation, Optimizer
from splitfl.cut import Cut
from splitfl.errors import ConfigError, PrivacyError
from splitfl.federation.agreement import privacy_line, weights_line
from splitfl.split.checkpoint import CheckpointFolder
from splitfl.split.export import TrainedWeights, export_checkpoint
from splitfl.split.flow import bottom_trains
from splitfl.split.training import initial_a

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_state(
    state: Path, out: Path, *, client: Path | None, dtype: str, exporter: str = "operator"
) -> dict[str, object]:
    """Export the newest durable round of ``state``. Raises ConfigError, StorageError, and PrivacyError for an
    ``exporter`` that the agreement does not name."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown", f"Choose one of {', '.join(DTYPES)}.")
    store = Store(state)
    model, settings = store.federation()
    allowed = settings.agreement.exporters
    if exporter not in allowed:
        raise PrivacyError(
            f"the agreement lets {', '.join(allowed) or 'nobody'} export this model, not {exporter!r}",
            "If you are one of them, say who with --as; else ask the federation's owner.",
        )
    rounds = store.durable_rounds()
    if not rounds:
        raise ConfigError(f"{state} holds no finished round yet", "Export after the first round has been merged.")
    round_state = store.load(rounds[-1])
    source = CheckpointFolder(model)
    tensors = all_weights(round_state, settings, client)
    tensors |= frozen_factors(tensors, source, settings)
    trained = TrainedWeights(
        tensors,
        lora_scale=settings.model.lora_alpha / settings.model.lora_rank,
        fan_in_fan_out=source.config.model_type == "gpt2",
    )
    export_checkpoint(model, trained, out, dtype=DTYPES[dtype], card=model_card(settings, round_state, model))
    return {"out": str(out), "round": round_state.round, "tensors_trained": len(tensors), "dtype": dtype}


def all_weights(state: RoundState, settings: Federation, client: Path | None) -> dict[str, Tensor]:
    """The trunk's weights with the clients' over them: merged ones, or one client's own."""
    if not trains_personal_weights(settings):
        return {**state.trunk, **state.merged}
    share = settings.merge.share
    if client is None:
        raise ConfigError(
            f'merge.share = "{share}": every client has a {"head" if share == "none" else "bottom"} of its own',
            "Name the one to export with --client CLIENT_STATE_DIR.",
        )
    path = client / "merged.safetensors"
    if not path.exists():
        raise ConfigError(f"{client} holds no trained ends", "Let that client finish the federation first.")
    return {**state.trunk, **load_file(path)}


def trains_personal_weights(settings: Federation) -> bool:
    """Whether each client's model is another one, for some of its trained weights are merged with nobody's."""
    share = settings.merge.share
    bottom_too = bottom_trains(settings, Cut(settings.bottoms[-1], settings.tops[0]))
    return share == "none" or (share == "top" and bottom_too)


def frozen_factors(tensors: dict[str, Tensor], source: CheckpointFolder, settings: Federation) -> dict[str, Tensor]:
    """LoRA's A where it stayed as it was drawn: nobody sent it, the seed and the name give it again."""
    missing: dict[str, Tensor] = {}
    for name, factor in tensors.items():
        a_name = name.replace(".lora_B.", ".lora_A.")
        if ".lora_B." not in name or a_name in tensors:
            continue
        stored = f"{name.split('.lora_B.')[0]}.weight"
        columns = input_size(source, stored, factor)
        missing[a_name] = initial_a(a_name, torch.Size([factor.shape[1], columns]), settings.seed)
    return missing


def input_size(source: CheckpointFolder, stored: str, factor_b: Tensor) -> int:
    """Inputs of a linear layer whose LoRA B is (outputs, rank); GPT-2 stores its weights transposed."""
    name = stored if stored in source.entries else f"{source.anatomy.prefix}.{source.anatomy.embedding}.weight"
    rows, columns = source.entries[name].shape
    transposed = source.config.model_type == "gpt2" and not stored.startswith(source.anatomy.head)
    return rows if transposed or (rows != factor_b.shape[0] and columns == factor_b.shape[0]) else columns


def model_card(settings: Federation, state: RoundState, model: Path) -> str:
    """What a stranger should know of this checkpoint."""
    updates = state.facts.get("updates", {})
    clients = len(updates) if isinstance(updates, dict) else 0
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [splitfl, split-learning, federated-learning]",
            "---",
            "",
            f"# {settings.name}",
            "",
            f"Fine-tuned from `{model.name}` with SplitFL: the ends of the model stayed with the clients, a server",
            f"held the blocks between. Rounds: {state.round + 1} of {settings.rounds.count}, "
            f"{settings.rounds.local_steps} steps each, {clients} clients in the last one.",
            "",
            f"- merging: {settings.merge.strategy}, share = {settings.merge.share}",
            f"- training: blocks {settings.model.train}, head {settings.model.head}, "
            f"frozen below block {settings.freeze_below}",
            f"- optimizer: {optimizer_line(settings.optimizer)}",
            f"- seed: {settings.seed}",
            f"- privacy {privacy_line(settings)}",
            f"- weights of the clients: {weights_line(settings)} {weights_warning(settings)}",
            "",
        ]
    )


def weights_warning(settings: Federation) -> str:
    """What the weights may tell."""
    if settings.privacy.on and settings.privacy.dp_sgd:
        return "Each client's report says what that is worth."
    return "They are not differentially private: treat them as derived from the clients' text."


def optimizer_line(optimizer: Optimizer) -> str:
    """What moved the weights: the trunk's, and the clients' where theirs was another."""
    line = f"{optimizer.name}, peak learning rate {optimizer.learning_rate}"
    rate = optimizer.client_learning_rate
    return line if rate is None else f"{line}; at the clients {optimizer.of_clients}, {rate}"
