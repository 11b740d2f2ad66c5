"""Ordinary training of the whole model, written plainly: transformers, torch, and the data; nothing else of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from client_model.records import ClientData, open_tokenizer
from splitfl.config import Federation
from splitfl.data.packing import Batch


def open_data(model: Path, data: Path, settings: Federation) -> ClientData:
    return ClientData.open(data, settings, open_tokenizer(model))


def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """Mean cross-entropy over all label tokens of the batches."""
    total, tokens = torch.zeros(()), 0
    for batch in batches:
        ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        mask = (torch.arange(ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        tokens += int((labels != -100).sum())
    return total / tokens


def whole_model(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.train()


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze the parameters whose name starts with one of ``names``."""
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(names)):
            parameter.requires_grad_(False)


def train(
    model: nn.Module, steps: Iterable[Sequence[Batch]], optimizer: torch.optim.Optimizer, rates: Iterable[float]
) -> list[float]:
    """One optimizer step for each entry of ``steps``; returns the losses before each step."""
    losses = []
    for batches, rate in zip(steps, rates, strict=False):
        optimizer.zero_grad()
        loss = mean_loss(model, batches)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
