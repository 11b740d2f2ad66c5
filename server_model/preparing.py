"""Before anybody comes: settings that fit the model, and what of it clients may fetch."""

from __future__ import annotations

import json

import torch
from transformers import PreTrainedConfig

from server_model.blobs import Blobs
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.federation.merging import choose_strategy
from splitfl.split.checkpoint import CheckpointFolder, is_tied
from splitfl.split.export import COPIED_FILES
from splitfl.split.modes import check_record_length, training_policy
from splitfl.split.shares import ends_names
from splitfl.split.training import check_policy, stays_tied


def check_settings(settings: Federation, config: PreTrainedConfig, device: torch.device) -> None:
    """Raise ConfigError for settings that a model of this config cannot be trained with."""
    layers = config.num_hidden_layers
    settings.check_layers(layers)
    check_record_length(settings, config)
    choose_strategy(settings)
    policy = training_policy(settings, layers, device)
    check_policy(policy, tied=is_tied(config))
    if stays_tied(config, policy) and settings.merge.share == "top":
        raise ConfigError(
            'merge.share = "top" on a model whose head is its embedding, and both train',
            'Set merge.share = "ends", or freeze the embedding with model.freeze_below = 1 or more.',
        )


def offer_assets(blobs: Blobs, source: CheckpointFolder, settings: Federation) -> str:
    """Offer config, tokenizer and every tensor a client may hold; returns the hash of their list."""
    files = {}
    for name in ("config.json", *COPIED_FILES):
        if (source.folder / name).is_file():
            data = (source.folder / name).read_bytes()
            files[name] = {"sha256": blobs.add_bytes(data), "nbytes": len(data)}
    wanted = ends_names(source.config, Cut(settings.bottoms[-1], settings.tops[-1]))
    tensors = blobs.add_tensors((name, source.entries[name]) for name in wanted)
    return blobs.add_bytes(json.dumps({"files": files, "tensors": tensors}, sort_keys=True).encode())
