"""Eight bits a number: groups of 64 neighbouring channels share a scale, so that an outlier costs its own group alone.

A vector of D channels travels as its scales, one bf16 for each group, and then D signed bytes: 1.03 bytes a channel.
A number is within half a scale of what it was, and the scale is the group's largest magnitude through 127, rounded up
to bf16. (One scale for a whole token was 10 % wrong beside outlier channels; Dettmers et al., "LLM.int8()", 2022.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from splitfl.errors import ProtocolError
from splitfl.wire.messages import GROUP, group_count

LEVELS = 127
SCALE_BYTES = 2


def pack_groups(tensor: Tensor) -> Tensor:
    """fp32 (..., D) on the CPU -> bytes (rows, scales and values)."""
    width = tensor.shape[-1] if tensor.dim() else 1
    rows = tensor.reshape(-1, width)
    groups = in_groups(rows)  # (N, G, 64)
    scales = rounded_up(groups.abs().amax(-1) / LEVELS)  # (N, G) bf16
    steps = scales.float().unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
    values = (groups / steps).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return torch.cat([scales.view(torch.uint8), values.flatten(1)[:, :width].view(torch.uint8)], dim=1)


def unpack_groups(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bytes (flat) -> fp32 of ``shape``. Raises ProtocolError for a scale below zero."""
    width = shape[-1] if shape else 1
    count = group_count(width)
    rows = data.view(-1, SCALE_BYTES * count + width)
    # a copy, for a row's bytes may begin at an odd address
    scales = rows[:, : SCALE_BYTES * count].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    if bool((scales < 0).any()):
        raise ProtocolError("a group's scale is below zero", field="scale")
    values = rows[:, SCALE_BYTES * count :].view(torch.int8).float()
    return (in_groups(values) * scales.unsqueeze(-1)).flatten(1)[:, :width].reshape(shape)


def in_groups(rows: Tensor) -> Tensor:
    """(N, D) -> (N, G, 64), filled up with zeros."""
    width = rows.shape[1]
    filled = torch.nn.functional.pad(rows, (0, group_count(width) * GROUP - width))
    return filled.view(len(rows), -1, GROUP)


def rounded_up(scales: Tensor) -> Tensor:
    """fp32 -> the next bf16 that is not below it, so that the group's largest number is not cut off."""
    down = scales.to(torch.bfloat16)
    above = (down.view(torch.int16) + 1).view(torch.bfloat16)  # the next one: positive floats are ordered as integers
    return torch.where(down.float() < scales, above, down)
