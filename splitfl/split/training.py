"""What trains, said per block and not per holder.

The embedding and blocks below ``freeze_below`` are frozen for everyone, the server included; the other blocks
train in full or through LoRA, the same way whoever holds them; the head has its own mode. Trained weights are
fp32 masters. Frozen weights keep the checkpoint's dtype where the computation allows it.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from splitfl.errors import ConfigError
from splitfl.split.checkpoint import is_tied
from splitfl.split.segment import Segment

BlockMode = Literal["full", "lora"]
HeadMode = Literal["full", "lora", "frozen"]
ADAPTER = "default"  # peft's name of the one adapter


@dataclass(frozen=True)
class TrainingPolicy:
    """The federation's word on what trains. ``lora_rank`` and ``lora_alpha`` as in peft; ``seed`` draws LoRA's A.

    ``train_a_blocks`` are the blocks whose LoRA A trains too: those that one holder alone has. Ends that are
    merged keep A frozen, for the average of B times A is not the product of their averages.
    """

    freeze_below: int = 0
    train: BlockMode = "full"
    head: HeadMode = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    seed: int = 0
    train_a_blocks: range = range(0)
    mixed: bool = False  # True: autocast computes in bf16, so frozen weights may stay in the checkpoint's dtype


def set_up_training(segment: Segment, policy: TrainingPolicy) -> None:
    """Give every weight of ``segment`` its mode and dtype, and inject LoRA where the policy says so.

    Raises ConfigError for LoRA on a block that has no linear layer to adapt.
    """
    settle_dtypes(segment, policy)
    targets = lora_targets(segment, policy)
    check_adapted(segment, policy, targets)
    if targets:
        inject_lora(segment, policy, targets)
    for name, parameter in segment.named_weights():
        parameter.requires_grad_(trains(segment, policy, name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def settle_dtypes(segment: Segment, policy: TrainingPolicy) -> None:
    """Frozen weights stay as they are under autocast; in fp32 all but a plain embedding table become fp32.

    A table lookup is exact in any dtype, so the table (often the client's largest tensor) need not grow. A
    family that scales inside its embedding (Gemma) would round there, so its table is widened.
    """
    keep = segment.embedding if segment.piece.embedding and type(segment.embedding) is nn.Embedding else None
    for module in segment.model.modules():
        for parameter in module.parameters(recurse=False):
            if module is not keep and not policy.mixed:
                parameter.data = parameter.data.float()


def trains(segment: Segment, policy: TrainingPolicy, name: str) -> bool:
    """Whether the weight with this global name trains."""
    block = segment.block_of(name)
    adapter = ".lora_" in name
    if block is not None:
        if block < policy.freeze_below or adapter != (policy.train == "lora"):
            return False
        return ".lora_A." not in name or block in policy.train_a_blocks
    if is_head_part(segment, name):
        return policy.head == ("lora" if adapter else "full") and ".lora_A." not in name
    return policy.freeze_below == 0 and policy.train == "full"


def is_head_part(segment: Segment, name: str) -> bool:
    """Whether a global name belongs to the final norm or the output head."""
    anatomy = segment.anatomy
    norms = tuple(f"{anatomy.prefix}.{norm}." for norm in anatomy.norms)
    return name.startswith((f"{anatomy.head}.", *norms))


def lora_targets(segment: Segment, policy: TrainingPolicy) -> list[str]:
    """Local names of the linear layers that get an adapter: in blocks that train by LoRA, and a LoRA head."""
    found = []
    for name, module in segment.model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        block = segment.block_of(segment.global_name(name))
        in_block = block is not None and block >= policy.freeze_below and policy.train == "lora"
        if in_block or (block is None and policy.head == "lora" and name == segment.anatomy.head):
            found.append(name)
    return found


def check_adapted(segment: Segment, policy: TrainingPolicy, targets: list[str]) -> None:
    """Raise ConfigError when a block that trains by LoRA has nothing to adapt: it would stay as it is in silence."""
    adapted = {segment.block_of(segment.global_name(name)) for name in targets}
    for block in range(max(segment.piece.start, policy.freeze_below), segment.piece.stop):
        if policy.train == "lora" and block not in adapted:
            raise ConfigError(f"block {block} has no linear layer for LoRA to adapt", 'Set train = "full".')


def inject_lora(segment: Segment, policy: TrainingPolicy, targets: list[str]) -> None:
    """Adapters through peft, with A drawn from the federation's seed and the weight's name: equal for all holders."""
    config = LoraConfig(
        r=policy.lora_rank,
        lora_alpha=policy.lora_alpha,
        lora_dropout=0.0,
        target_modules="|".join(re.escape(name) for name in targets),
        fan_in_fan_out=any(isinstance(segment.model.get_submodule(name), Conv1D) for name in targets),
    )
    with warnings.catch_warnings():  # GPT-2 has layers of both kinds; peft corrects the flag for each, and says so
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        inject_adapter_in_model(config, segment.model, adapter_name=ADAPTER)
    for name, parameter in segment.named_weights():
        if ".lora_A." in name:
            drawn = initial_a(name, parameter.shape, policy.seed)
            parameter.data = drawn.to(parameter.device)  # the meta device too, where only names and shapes count


def initial_a(name: str, shape: torch.Size, seed: int) -> Tensor:
    """LoRA's A as peft draws it (Kaiming uniform, a = sqrt 5), from a generator of its own."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    bound = math.sqrt(1.0 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def tie_head(top: Segment, embedding: nn.Embedding) -> None:
    """Make the head of ``top`` and ``embedding`` one parameter."""
    top.model.get_submodule(top.anatomy.head).weight = embedding.weight


def check_policy(policy: TrainingPolicy, *, tied: bool) -> None:
    """Raise ConfigError for modes that contradict each other on this model."""
    if tied and policy.freeze_below == 0 and policy.train == "full" and policy.head != "full":
        raise ConfigError(
            f"the head shares its weights with the embedding, which trains, yet head = {policy.head!r}",
            'Set head = "full", or freeze the embedding with freeze_below = 1 or more.',
        )


def stays_tied(config: PreTrainedConfig, policy: TrainingPolicy) -> bool:
    """Embedding and head stay one tensor only where both train in full; else they part, and export says so."""
    return is_tied(config) and policy.freeze_below == 0 and policy.train == "full"
