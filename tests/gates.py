"""Gates for tests: a policy by mode, a ledger and a vault in a folder, and noise that comes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from splitfl.codec.tensors import CodecName
from splitfl.config import Federation, parse_federation
from splitfl.privacy.charges import RecordRef
from splitfl.privacy.gate import Gate
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.noise import NoiseStream
from splitfl.privacy.policy import Policy, Workload, policy_of
from splitfl.privacy.vault import Vault

KEY = bytes(range(32))
WORK = Workload(records=4, held_out=0, draws=4, steps=2, padded_length=8)


def private_settings(mode: str = "measured", **privacy: Any) -> Federation:
    """Settings with noise; records of 8 tokens at most."""
    chosen = {"mode": mode, "clip_norm": 1.0} | ({"epsilon": 8.0} if mode == "certified" else {}) | privacy
    tables: dict[str, Any] = {"privacy": chosen, "batch": {"max_length": 8, "records": 2, "buckets": (4, 8)}}
    if mode == "certified" and not chosen.get("dp_sgd"):
        tables["merge"] = {"share": "none"}
    return parse_federation(tables, "the test")


def policy(mode: str, work: Workload = WORK, *, bottom_trains: bool = False, **privacy: Any) -> Policy:
    """What those settings make of ``work``."""
    settings = Federation() if mode == "off" else private_settings(mode, **privacy)
    return policy_of(settings, work, bottom_trains=bottom_trains)


def open_gate(
    folder: Path,
    mode: str = "off",
    codec: CodecName = "fp32",
    *,
    work: Workload = WORK,
    context: str = "",
    bottom_trains: bool = False,
    **privacy: Any,
) -> Gate:
    """A gate on the ledger and vault in ``folder``; what is there already counts."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = policy(mode, work, bottom_trains=bottom_trains, **privacy)
    ledger, vault = Ledger(folder / "ledger.sqlite"), Vault(folder / "releases.sqlite", KEY)
    return Gate(chosen, codec, ledger, vault, NoiseStream(KEY), secret=KEY, context=context, audited=AUDITED)


AUDITED = frozenset({bytes([1]) * 16})


def agree(_: object) -> bool:
    """What a client in a test says to any terms."""
    return True


def ref(number: int, padded_length: int = 8) -> RecordRef:
    """A record by number."""
    return RecordRef(bytes([number]) * 16, padded_length)
