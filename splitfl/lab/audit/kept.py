"""The releases that a finished run kept for its audit, with the truth from the data file beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from client_model.candidate import parse_federation_json
from client_model.guard import policy_for
from client_model.keys import open_key
from client_model.records import ClientData, open_tokenizer
from client_model.store import ClientStore
from splitfl.codec.tensors import decode_tensor
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.lab.audit.mechanism import Mechanism
from splitfl.lab.audit.observed import HeadUpdate, Observed
from splitfl.privacy.keepsakes import RETURNED, Keepsake, read_head, read_keepsakes
from splitfl.privacy.ledger import ReleaseKind
from splitfl.privacy.mechanism import Mechanism as Released
from splitfl.privacy.vault import Vault
from splitfl.split.checkpoint import CheckpointFolder, embedding_name
from splitfl.split.narrow import load_release

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Kept:
    """A sample of records with all their releases, and how they were made.

    ``gradient_mechanism`` is None where no gradients were sent; ``max_length`` is a record's, in tokens.
    """

    observed: tuple[Observed, ...]
    cut: Cut
    mechanism: Mechanism
    gradient_mechanism: Mechanism | None
    max_length: int
    updates: tuple[HeadUpdate, ...] = ()


def load_observed(state: Path, data: Path, model: Path, key_file: Path | None = None) -> Kept:
    """Decrypt what the client with this state folder kept. ``data`` is its text, ``model`` the public base.

    Raises ConfigError when it kept nothing, PrivacyError without the key, StorageError, DataError.
    """
    if not (state / "releases.sqlite").exists():
        raise ConfigError(f"{state} kept no releases", "Name the state folder of a client that ran with privacy on.")
    text, cut = ClientStore(state).federation()
    settings = parse_federation_json(text)
    key = open_key(state, key_file, may_create=False)
    vault = Vault(state / "releases.sqlite", key.derived("vault"))
    records = ClientData.open(data, settings, open_tokenizer(state / "model"), skip_bad=True)
    if not settings.privacy.on:
        raise ConfigError("with privacy off nothing is kept", "The server could read all of it: there is no question.")
    records.name_records(key.derived("records"))
    activations, gradients = mechanisms(settings, records, state / "model")
    observed = tuple(observations(read_keepsakes(vault), records, with_gradients=gradients is not None))
    if not observed:
        raise ConfigError(
            f"{state} kept no release of {data}", "Set privacy.audit_records, or name the text it ran on."
        )
    return Kept(
        observed, Cut(*cut), activations, gradients, settings.batch.padded_lengths[-1], tuple(updates(vault, model))
    )


def mechanisms(settings: Federation, records: ClientData, model: Path) -> tuple[Mechanism, Mechanism | None]:
    """How activations and gradients were released; behind a narrow release gradients are left out of the attack."""
    policy = policy_for(settings, records)
    assert policy.activations is not None
    encoder = None if settings.release.rank is None else load_release(model).encoder.linear.weight.detach()
    gradients = None if encoder is not None or policy.gradients is None else known(policy.gradients, settings)
    return known(policy.activations, settings, encoder), gradients


def known(mechanism: Released, settings: Federation, encoder: Tensor | None = None) -> Mechanism:
    """A mechanism as the attacker knows it."""
    return Mechanism(mechanism.clip, mechanism.clip_norm, mechanism.sigma, settings.wire.codec, encoder)


def observations(kept: Sequence[Keepsake], records: ClientData, *, with_gradients: bool) -> list[Observed]:
    """Releases record by record, with the truth; records that are not in the data file any more are left out."""
    by_key: defaultdict[bytes, defaultdict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for item in kept:
        by_key[item.key][item.kind].append(decode_tensor(item.payload, CPU, what="a kept release"))
    places = {key: place for place, key in enumerate(records.train_keys)}
    return [
        observed(records, places[key], releases, with_gradients=with_gradients)
        for key, releases in by_key.items()
        if key in places and releases[ReleaseKind.ACTIVATION.value]
    ]


def observed(
    records: ClientData, place: int, releases: Mapping[str, list[Tensor]], *, with_gradients: bool
) -> Observed:
    """One record: its tokens, padded as they were released, and everything that left of it."""
    record, activations = records.train[place], releases[ReleaseKind.ACTIVATION.value]
    time = len(activations[0])
    ids = torch.full((time,), records.pad_token_id)
    ids[: len(record)] = torch.from_numpy(record.input_ids)
    pairs = list(zip(releases.get(ReleaseKind.GRADIENT.value, []), releases.get(RETURNED, []), strict=False))
    gradients = tuple(gradient[:time] for gradient, _ in pairs) if with_gradients else ()
    hidden = tuple(returned[:time] for _, returned in pairs) if with_gradients else ()
    return Observed(ids, len(record), tuple(activations), gradients, hidden)


def updates(vault: Vault, model: Path) -> list[HeadUpdate]:
    """The first update of the output head, where it was kept."""
    found = read_head(vault)
    if found is None:
        return []
    source = CheckpointFolder(model)
    name = f"{source.anatomy.head}.weight"
    before = source.read(name if source.has(name) else embedding_name(source.anatomy))
    return [HeadUpdate(before.float(), *found)]
