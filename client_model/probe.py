"""What this machine can do with this model: memory, pace and link, as one ``Capability`` for the planner.

The pace depends on model and machine alone and is kept in the cache. Memory and link are of the moment: they are
measured every time.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from client_model.bandwidth import LinkGauge
from client_model.memory import Room, measure_room
from client_model.records import open_tokenizer
from client_model.shortage import is_shortage
from client_model.timing import Pace, Spread, measure_pace
from splitfl.allocator import give_back_freed_memory
from splitfl.config import Federation
from splitfl.errors import ConfigError
from splitfl.files import write_file
from splitfl.planning.capability import Arithmetic, Capability
from splitfl.planning.shapes import ModelShape
from splitfl.split.checkpoint import TensorSource

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Probe:
    """What was measured: the tightest limit on memory, the bytes held before any model (``base``, and what of them
    ``ulimit -d`` counts), seconds a token by number format, and the link."""

    device: str
    room: Room
    base: int
    base_data: int
    pace: Mapping[str, Pace]
    link: LinkGauge

    @property
    def capability(self) -> Capability:
        """The medians, for the planner."""
        compute = {
            dtype: Arithmetic(pace.block.median, pace.frozen_block.median, pace.head.median)
            for dtype, pace in self.pace.items()
        }
        return Capability(self.device, self.room.usable, self.base, compute, self.link.speed)


class Prober:
    """Measures for the model ``identity`` (whatever tells models apart) under ``settings``, on ``device``.

    ``folder`` has its config and tokenizer.
    """

    def __init__(self, identity: str, folder: Path, settings: Federation, device: torch.device, cache: Path) -> None:
        self.folder = folder
        self.settings = settings
        self.device = device
        self.kept = cache / "probes" / f"{self._key(identity)}.json"

    def probe(self, open_source: Callable[[], TensorSource], link: LinkGauge, *, refresh: bool) -> Probe:
        """Everything. ``open_source`` is called where the pace is not known yet, or with ``refresh``.

        Raises ConfigError where memory is too short for one block.
        """
        warm_up(self.device)
        tokenizer = open_tokenizer(self.folder)  # some take as much as a small model; a client holds it all the time
        base, base_data = held_bytes(self.device), int(psutil.Process().memory_info().data)
        del tokenizer
        pace = None if refresh else self._known()
        if pace is None:
            pace = self._measured(open_source())
            write_file(self.kept, json.dumps({dtype: asdict(own) for dtype, own in pace.items()}).encode())
        gc.collect()
        give_back_freed_memory()
        return Probe(self.device.type, measure_room(self.device), base, base_data, pace, link)

    def _measured(self, source: TensorSource) -> dict[str, Pace]:
        wanted, room = self.settings.model.compute, measure_room(self.device)
        if specimen_bytes(source, self.settings) > room.left:  # a container's limit would kill without a word
            raise too_small(room)
        try:
            return {
                dtype: measure_pace(source, self.settings, self.device, dtype)
                for dtype in DTYPES
                if wanted in ("auto", dtype)
            }
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            raise too_small(room) from error

    def _known(self) -> dict[str, Pace] | None:
        """What was measured before; None for nothing, or nothing that can be read."""
        try:
            kept = json.loads(self.kept.read_text())
            return {dtype: pace_from(own) for dtype, own in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def _key(self, identity: str) -> str:
        """Of model, machine, and what of the settings the pace depends on."""
        batch, model = self.settings.batch, self.settings.model
        trained = (model.train, model.lora_rank, model.head, model.compute)
        ours = (batch.records, batch.micro_batches, batch.max_length, *trained)
        facts = [identity, fingerprint(self.device), ours, self.settings.optimizer.model_dump()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def specimen_bytes(source: TensorSource, settings: Federation) -> int:
    """What one block and the head take to be trained: in fp32 the weights, and for full training gradients and moments
    beside them."""
    shape, model = ModelShape.of(source.config), settings.model
    parts = ((shape.block_weights, model.train), (shape.head_weights, model.head))
    return sum(4 * weights * (4 if how == "full" else 1) for weights, how in parts)


def too_small(room: Room) -> ConfigError:
    return ConfigError(
        f"one block and the head do not fit into this machine's memory ({room.source})",
        "Use a machine with more of it, or choose a smaller model.",
    )


def pace_from(table: Mapping[str, Mapping[str, float]]) -> Pace:
    """A Pace out of its JSON. Raises TypeError."""
    return Pace(**{name: Spread(**spread) for name, spread in table.items()})


def fingerprint(device: torch.device) -> list[object]:
    """What tells one machine from another, as far as speed goes."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    memory = psutil.virtual_memory().total
    return [processor(), len(os.sched_getaffinity(0)), torch.get_num_threads(), memory, gpu, torch.__version__]


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def held_bytes(device: torch.device) -> int:
    """What this process holds of the memory that counts on ``device``."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(psutil.Process().memory_info().rss)


def warm_up(device: torch.device) -> None:
    """A step of next to nothing: what torch loads and sets aside for its first one is no model's."""
    layer = nn.Linear(64, 64).to(device)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for mixed in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
            layer(torch.ones(64, 64, device=device)).sum().backward()
        optimizer.step()
