"""The clip norm of activations, where the federation does not set it: read off the public bottom on public text.

It must not come from private data, for then it would tell of them. So the server measures it once, at its start, on
synthetic notes that ship with SplitFL, and clients see the number in the terms that they accept.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoTokenizer

from splitfl.config import Federation
from splitfl.data.notes import generate_notes
from splitfl.errors import ConfigError
from splitfl.split.checkpoint import CheckpointFolder, load_segment
from splitfl.split.narrow import load_release
from splitfl.split.segment import Piece

TEXTS = 64
QUANTILE = 0.9  # a tenth of the tokens, the loudest ones, are scaled down


def settled(settings: Federation, source: CheckpointFolder) -> Federation:
    """``settings`` with a clip norm, if privacy is on and they have none; a narrow release brings its own, and noise.

    Raises ConfigError for a rank that the model's release has not.
    """
    if settings.release.rank is not None:
        return as_published(settings, source)
    privacy = settings.privacy
    if not privacy.on or privacy.clip_norm is not None:
        return settings
    norms = token_norms(source, settings)
    norm = (
        norms.quantile(QUANTILE) if privacy.clip == "token" else norms.square().mean().sqrt() * record_scale(settings)
    )
    chosen = privacy.model_copy(update={"clip_norm": float(f"{float(norm):.3g}")})
    return settings.model_copy(update={"privacy": chosen})


def as_published(settings: Federation, source: CheckpointFolder) -> Federation:
    """Clip norm and noise as the narrow release was adapted with. Raises ConfigError when it is another one."""
    spec = load_release(source.folder).spec
    if (spec.rank, spec.cut) != (settings.release.rank, settings.cut):
        raise ConfigError(
            f"release.rank = {settings.release.rank} at cut {settings.cut}, but the model's narrow release has rank "
            f"{spec.rank} at cut {spec.cut}",
            "Set release.rank, model.n_bottom and model.n_top to those, or make another with `splitfl adapt`.",
        )
    privacy = settings.privacy
    noise = spec.noise_multiplier if privacy.noise_multiplier is None else privacy.noise_multiplier
    chosen: dict[str, object] = {"clip": "token", "clip_norm": spec.clip_norm}
    if privacy.mode == "measured":
        chosen["noise_multiplier"] = noise
    return settings.model_copy(update={"privacy": privacy.model_copy(update=chosen)})


def record_scale(settings: Federation) -> float:
    """From a token's norm to a whole record's, Frobenius."""
    return float(settings.batch.padded_lengths[-1] ** 0.5)


def token_norms(source: CheckpointFolder, settings: Federation) -> Tensor:
    """L2 norms of the deepest bottom's output over public tokens, (N,)."""
    tokenizer = AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    bottom = load_segment(source, Piece(0, settings.bottoms[-1], embedding=True)).eval()
    norms = []
    with torch.no_grad():
        for text in generate_notes("general", TEXTS, 0):
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=settings.batch.max_length)[
                "input_ids"
            ]
            norms.append(bottom(bottom.embed(ids)).float().norm(dim=-1).flatten())
    return torch.cat(norms)
