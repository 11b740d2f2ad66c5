"""From the federation's settings to what the split modules take: training policy, optimizer, device, arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedConfig

from splitfl.config import Federation
from splitfl.errors import ConfigError
from splitfl.split.optimizer import OptimizerSpec
from splitfl.split.segment import learned_positions
from splitfl.split.training import TrainingPolicy


def choose_device(name: str = "auto") -> torch.device:
    """``auto``: a GPU if there is one. Raises ConfigError for a device that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} is not available", "Use --device auto, cpu or cuda.") from error
    return device


def computes_bf16(settings: Federation, device: torch.device) -> bool:
    """Whether blocks run under bf16 autocast on ``device``."""
    compute = settings.model.compute
    return compute == "bf16" or (compute == "auto" and device.type == "cuda")


def arithmetic(settings: Federation, device: torch.device) -> AbstractContextManager[object]:
    """The autocast that every forward runs in."""
    if computes_bf16(settings, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def training_policy(settings: Federation, layers: int, device: torch.device) -> TrainingPolicy:
    """What trains, for a model of ``layers`` blocks. LoRA's A trains where no client can hold the block."""
    first = settings.bottoms[-1]
    return TrainingPolicy(
        freeze_below=settings.freeze_below,
        train=settings.model.train,
        head=settings.model.head,
        lora_rank=settings.model.lora_rank,
        lora_alpha=settings.model.lora_alpha,
        seed=settings.seed,
        train_a_blocks=range(first, max(first, layers - settings.tops[-1])),
        mixed=computes_bf16(settings, device),
    )


def check_record_length(settings: Federation, config: PreTrainedConfig) -> None:
    """Raise ConfigError where a record may be longer than the positions that the model has learned."""
    positions = learned_positions(config)
    if positions is not None and settings.batch.max_length > positions:
        raise ConfigError(
            f"batch.max_length = {settings.batch.max_length}, but this model has learned {positions} positions",
            f"Set batch.max_length to {positions} or less.",
        )


def optimizer_spec(settings: Federation, *, client: bool = False) -> OptimizerSpec:
    """The optimizer of the trunk, or of a ``client``'s own weights."""
    optimizer = settings.optimizer
    return OptimizerSpec(
        name=optimizer.of_clients if client else optimizer.name,
        weight_decay=optimizer.weight_decay,
        betas=(optimizer.beta1, optimizer.beta2),
        max_grad_norm=optimizer.max_grad_norm,
    )
