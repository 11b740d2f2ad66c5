"""What people agree to before anything computed from their data leaves: the terms, in words, and their hash.

Both sides compute the hash from the settings and the model's manifest, so no server can show one text and mean
another. All settings are part of it but those that change nothing of what leaves, to whom, or for how long.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from splitfl.config import LEVELS, Federation, Privacy
from splitfl.cut import Cut
from splitfl.privacy.accounting import mean_bits, mu_for
from splitfl.privacy.charges import MOST_LOSS
from splitfl.privacy.report import told
from splitfl.split.flow import bottom_trains

#: settings that are not agreed to: how fast weights move, and how the server runs its own part (``keeps`` is agreed to)
NOT_AGREED = {"seed", "optimizer", "trunk"}
SHORT = 12  # hex digits that are enough to name an agreement by hand


@dataclass(frozen=True)
class Terms:
    """The terms of a federation on the model with this ``manifest`` (SHA-256 of the list of what clients fetch)."""

    settings: Federation
    manifest: str

    @property
    def sha256(self) -> str:
        """The hash that is accepted, 64 hex digits."""
        settings = self.settings.model_dump(mode="json", exclude=NOT_AGREED)
        agreed = {"settings": settings, "manifest": self.manifest, "keeps": keeps(self.settings)}
        return hashlib.sha256(json.dumps(agreed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def short(self) -> str:
        """As much of the hash as is enough to name it by hand."""
        return self.sha256[:SHORT]

    def named_by(self, given: str) -> bool:
        """Whether ``given`` is the hash, or enough of its beginning."""
        return len(given) >= SHORT and self.sha256.startswith(given.lower())

    def lines(self) -> list[str]:
        """The terms for a person, a line each."""
        settings, agreement, rounds = self.settings, self.settings.agreement, self.settings.rounds
        keeps = f"{settings.model.n_bottom} + {settings.model.n_top} blocks, embedding and output head"
        stays = "your file and the labels (what is computed from them and sent tells of them: below)"
        said = [
            ("federation", settings.name),
            ("owner", agreement.owner or "not stated"),
            ("contact", agreement.contact or "not stated"),
            ("purpose", agreement.purpose or "not stated"),
            ("may export", ", ".join(agreement.exporters) or "nobody"),
            ("takes", f"{rounds.count} rounds of {rounds.local_steps} steps, {settings.batch.records} records each"),
            ("needs", f"{rounds.min_clients} client{'s' * (rounds.min_clients > 1)} at least"),
            ("stays here", f"{stays}; of the model {keeps}, unless you plan otherwise"),
            ("privacy", privacy_line(settings)),
            ("activations", activations_line(settings)),
            ("gradients", gradients_line(settings)),
            ("weights", weights_line(settings)),
            ("losses", losses_line(settings)),
            ("told too", ", ".join(told(private=settings.privacy.on))),
            ("model", f"sha256 {self.manifest[:16]}..."),
            ("agreement", self.sha256),
        ]
        return [f"{name:<12} {text}" for name, text in said]


def privacy_line(settings: Federation) -> str:
    """What the mode means, in one line."""
    privacy = settings.privacy
    if privacy.mode == "off":
        return "off. The server can read the text."
    clipped = f"each {privacy.clip} clipped to {privacy.clip_norm or 0:g}, records padded to {padded(settings)} tokens"
    if privacy.mode == "certified":
        target = f"epsilon = {privacy.epsilon:g}, delta = {privacy.delta:g}, for each {privacy.unit}"
        return f"certified: {target}; {clipped}. It allows {allowed(privacy)} bits a {privacy.unit} on average."
    noise = LEVELS[privacy.level] if privacy.noise_multiplier is None else privacy.noise_multiplier
    return f"measured: noise of {noise:g} clip norms; {clipped}. No guarantee; an honest server is assumed."


def allowed(privacy: Privacy) -> str:
    """How much the target lets through: what it guarantees is worth judging by that."""
    return f"{mean_bits(mu_for(privacy.epsilon or 0, privacy.delta)):.2g}"


def padded(settings: Federation) -> str:
    """The public lengths."""
    return ", ".join(str(length) for length in settings.batch.padded_lengths)


def activations_line(settings: Federation) -> str:
    """What of every record leaves, in one line."""
    trains = {bottom_trains(settings, Cut(n_bottom, 0)) for n_bottom in settings.bottoms}
    frozen = " where your bottom is frozen" if len(trains) == 2 else ""
    if settings.privacy.on:
        often = f"once{frozen}" if False in trains else "anew in each step"
        often += ", else anew in each step" if frozen else ""
        return f"of every record, held-out ones too, are sent {often}, clipped and noised as above."
    kept = keeps(settings) and False in trains
    stay = f"; the server keeps them{frozen} until the federation ends" if kept else ""
    return f"of every record, held-out ones too, are sent as they are{stay}."


def keeps(settings: Federation) -> bool:
    """Whether the server has room to keep what is released; how much is its own affair."""
    return settings.trunk.cache_gib > 0


def gradients_line(settings: Federation) -> str:
    """Whether gradients leave, in one line."""
    privacy = settings.privacy
    if not privacy.on:
        return "sent as they are: labels can be recovered from them."
    if not settings.trains_trunk:
        return "not sent; the trunk stays as published."
    noise = noise_of(privacy, privacy.gradient_noise_multiplier, "clip norms")
    return f"sent, each record's clipped to {privacy.gradient_clip_norm:g}; noise: {noise}."


def weights_line(settings: Federation) -> str:
    """Whether weights leave, in one line."""
    if settings.merge.share == "none":
        return "stay here."
    privacy, how = settings.privacy, "as they are: without noise"
    if privacy.on and privacy.dp_sgd:
        noise = noise_of(privacy, privacy.dp_noise_multiplier, "clip norms")
        how = f"after DP-SGD: each record's gradient clipped to {privacy.dp_max_grad_norm:g}; noise: {noise}"
    return f"those of the {'top' if settings.merge.share == 'top' else 'ends'} are sent after every round, {how}."


def losses_line(settings: Federation) -> str:
    """Whether losses leave, in one line."""
    if not settings.evaluation.share_metrics:
        return "stay here."
    privacy, how = settings.privacy, "as it is: without noise"
    if privacy.on:
        noise = noise_of(privacy, privacy.metric_noise_multiplier, f"of what one {privacy.unit} can change")
        how = f"each record's clipped to {MOST_LOSS:g} nats; noise: {noise}"
    return f"the mean over your held-out records is sent with every update, {how}."


def noise_of(privacy: Privacy, multiplier: float, unit: str) -> str:
    """How much noise a kind of release gets: a number, or what follows from the target."""
    return "as epsilon asks" if privacy.mode == "certified" else f"{multiplier:g} {unit}"
