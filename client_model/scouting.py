"""A first visit to the server, to plan with: its settings, one block and the head of its model, and the link.

It is a session of its own that asks for no round and says goodbye; nothing computed from data exists yet.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from ssl import SSLContext

import torch

from client_model.assets import Assets, RemoteSource
from client_model.bandwidth import measure_link
from client_model.candidate import parse_federation_json
from client_model.choices import Choices
from client_model.link import Link
from client_model.probe import Probe, Prober
from client_model.resuming import new_hello
from splitfl.config import Federation
from splitfl.planning.shapes import ModelShape
from splitfl.wire.messages import Bye


@dataclass(frozen=True)
class Scouted:
    """What a plan is made of. ``manifest`` is the model's, by hash."""

    manifest: str
    settings: Federation
    shape: ModelShape
    probe: Probe


@dataclass(frozen=True)
class Scout:
    """Where to go as whom, and what to measure with; ``refresh`` measures what is known as well."""

    name: str
    url: str
    tls: SSLContext | None
    cache: Path
    device: torch.device
    patience_s: float
    say: Callable[[str], None]
    refresh: bool = False

    def look(self) -> Scouted:
        """Visit the server and measure. Raises SplitFLError."""
        link = Link(self.url, new_hello(self.name, Choices()), patience_s=self.patience_s, say=self.say, tls=self.tls)
        with closing(link):
            welcome = link.open()
            settings = parse_federation_json(welcome.settings)
            assets = Assets(link, self.cache, self.cache / "models" / welcome.manifest, self.say)
            assets.open(welcome.manifest)
            source = RemoteSource(assets)
            prober = Prober(welcome.manifest, assets.folder, settings, self.device, self.cache)
            probe = prober.probe(lambda: source, measure_link(link), refresh=self.refresh)
            link.ask(Bye(0, 0, "interrupted"))
        return Scouted(welcome.manifest, settings, ModelShape.of(source.config), probe)
