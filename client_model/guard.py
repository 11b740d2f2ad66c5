"""What stands before the gate, for one client in one federation: key, ledger, what was agreed to, budgets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from client_model.floor import Floor
from client_model.keys import ClientKey, open_key
from client_model.records import ClientData, Spend
from client_model.store import ClientStore
from splitfl.config import Federation
from splitfl.errors import PrivacyError
from splitfl.federation.agreement import Terms
from splitfl.files import write_file
from splitfl.privacy.gate import Gate
from splitfl.privacy.keepsakes import sample
from splitfl.privacy.ledger import Ledger
from splitfl.privacy.noise import open_stream
from splitfl.privacy.policy import Policy, policy_of, workload
from splitfl.privacy.report import privacy_report
from splitfl.privacy.vault import Vault
from splitfl.privacy.witness import Mark, check_not_older

ACCEPTED_FILE = "agreement.txt"  # the terms that were accepted last, in words
Accept = Callable[[Terms], bool]  # shows the terms to whoever decides


class Guard:
    """Opens ledger and vault of a state folder. Raises StorageError, PrivacyError; then nothing leaves."""

    def __init__(
        self, store: ClientStore, key_file: Path | None, *, noise_seed: int | None = None, simulated: bool = False
    ) -> None:
        """``simulated``: all sides are one person, so noise may come from a seed."""
        self.folder = store.folder
        self.seeded = noise_seed is not None
        self.noise = open_stream(seed=noise_seed, simulated=simulated)
        fresh = not (self.folder / "ledger.sqlite").exists()
        self.key: ClientKey = open_key(self.folder, key_file, may_create=fresh)
        self.ledger = Ledger(self.folder / "ledger.sqlite")
        self.vault = Vault(self.folder / "releases.sqlite", self.key.derived("vault"))

    def check_terms(self, terms: Terms, accept: Accept) -> None:
        """Raise PrivacyError unless the terms were accepted, now or before."""
        digest = bytes.fromhex(terms.sha256)
        if self.ledger.accepted(digest):
            return
        if not accept(terms):
            raise PrivacyError(self._unaccepted(terms), f"Read them above; to accept, add --accept {terms.short}.")
        self.ledger.accept(digest)
        write_file(self.folder / ACCEPTED_FILE, "\n".join(terms.lines()).encode())

    def _unaccepted(self, terms: Terms) -> str:
        path = self.folder / ACCEPTED_FILE
        if not path.exists():
            return "this federation's terms are not accepted, and nothing computed from your data has left"
        before = set(path.read_text().split("\n"))
        changed = [line.split("  ")[0] for line in terms.lines()[:-1] if line not in before]  # the last is the hash
        what = ", ".join(changed) or "in detail"
        return f"this federation's terms have changed ({what}), and nothing leaves under the new ones"

    def check_signer(self, signer: str, *, private: bool) -> None:
        """Remember who countersigns. Raises PrivacyError when it is another one, which knows of no earlier row."""
        path = self.folder / "countersigner"
        known = path.read_text() if path.exists() else ""
        if known == signer:
            return
        if not known or not private:
            write_file(path, signer.encode())
        else:
            raise PrivacyError(
                "this server countersigns with another key than before, so it cannot know what left until now",
                "Ask its operator to put back STATE/ledgers; for another federation name another --state.",
            )

    def check_mark(self, mark: Mark, *, private: bool) -> bool:
        """Whether the ledger goes on from what the server countersigned. Raises PrivacyError with privacy on."""
        try:
            check_not_older(self.ledger, mark)
        except PrivacyError:
            if private:
                raise
            return False
        return True

    def check_floor(self, settings: Federation, data: ClientData, floor: Floor) -> None:
        """Raise PrivacyError for settings that protect these records less than the client wants, accepted or not."""
        floor.check(policy_for(settings, data), len(data.train))

    def open_gate(self, settings: Federation, data: ClientData, context: str, *, bottom_trains: bool) -> Gate:
        """The gate for these settings and records. Raises ConfigError for noise that cannot be had."""
        policy = policy_for(settings, data, bottom_trains=bottom_trains)
        if policy.unit == "client" and self.ledger.joint_by_record:
            raise PrivacyError(
                "this ledger counted single records, so epsilon of the whole client is not known any more",
                "Name another --state for a federation whose unit is the client.",
            )
        if policy.private:
            data.name_records(self.key.derived("records"))
        return Gate(
            policy,
            settings.wire.codec,
            self.ledger,
            self.vault,
            self.noise,
            secret=self.key.derived("names"),
            context=context,
            audited=sample(data.train_keys, settings.privacy.audit_records),
        )

    def spend(self, gate: Gate) -> Spend | None:
        """Who may take part in a step: asked record by record, and what it says yes to is set aside. None: all may."""
        return gate.reserve() if gate.policy.private else None

    def report(self, gate: Gate) -> dict[str, Any]:
        """The privacy section of the closing report."""
        return privacy_report(gate.policy, self.ledger, simulated=self.seeded, audit=self._audit())

    def close(self) -> None:
        """Let go of ledger and vault."""
        self.ledger.close()
        self.vault.close()

    def _audit(self) -> dict[str, Any] | None:
        """What an audit found, if it was of all that has left."""
        path = self.folder / "audit.json"
        found = dict(json.loads(path.read_text())) if path.exists() else {}
        return found if (found.get("rows"), found.get("head")) == (self.ledger.count, self.ledger.head.hex()) else None


def policy_for(settings: Federation, data: ClientData, *, bottom_trains: bool = False) -> Policy:
    """What those settings come to for these records. Raises ConfigError for noise that cannot be had."""
    held_out = len(data.held_out) if data.held_out is not None else 0
    work = workload(settings, len(data.train), min(held_out, settings.evaluation.records))
    return policy_of(settings, work, bottom_trains=bottom_trains)
