"""What of an earlier start a new one goes on with: its cut, its journal, its session. Torch is imported inside."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from client_model.choices import Choices
from splitfl.config import parse_federation
from splitfl.console import note
from splitfl.cut import Cut
from splitfl.errors import ConfigError, StorageError
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

if TYPE_CHECKING:
    from client_model.journal import Head, Journal
    from client_model.store import ClientStore


def paused_choices(store: ClientStore, plan: Choices) -> tuple[Choices, Choices] | None:
    """What a round that was paused began with and what ``plan`` asks for now, where they differ."""
    if not store.pause_folder.exists():
        return None
    before, asked = held_choices(store), settled(store, plan)
    return (before, asked) if before != asked else None


def held_choices(store: ClientStore) -> Choices:
    """What this client took part with last, nothing left open. Raises StorageError when it never did."""
    table, (n_bottom, n_top) = store.choices(), store.federation()[1]
    return settled(store, replace(Choices.from_table(table) if table else Choices(), cut=Cut(n_bottom, n_top)))


def settled(store: ClientStore, plan: Choices) -> Choices:
    """``plan`` with what it leaves open as the federation has it, which the state folder knows."""
    return plan.settled(parse_federation(json.loads(store.federation()[0]), str(store.folder)))


def check_same_client(name: str, store: ClientStore) -> None:
    """Raise ConfigError when the state folder is another client's."""
    record = store.session()
    if record is not None and record.name != name:
        raise ConfigError(
            f"{store.folder} holds the state of client {record.name!r}", "Name another --state, or join as that one."
        )


def open_journal(
    store: ClientStore, key_file: Path | None, plan: Choices, *, floor: str = "", url: str = ""
) -> Journal:
    """The journal of a state folder; one that is damaged, or of another ``plan`` or ``floor``, is begun anew.

    So is one of another ``url``, unless TLS proves that it is the same server. Raises PrivacyError.
    """
    from client_model.journal import Journal
    from client_model.keys import open_key

    key = open_key(store.folder, key_file, may_create=not (store.folder / "ledger.sqlite").exists()).derived("journal")
    try:
        journal = Journal(store.journal, key)
    except StorageError as error:
        note(f"{error.message}: this client's part of the round is lost, and it goes on from its last snapshot")
        store.journal.unlink(missing_ok=True)
        return Journal(store.journal, key)
    head = journal.head
    if head is None:
        return journal
    if not is_same_server(head.url, url) or (head.plan, head.floor) != (str(settled(store, plan)), floor):
        journal.drop()
    return journal


def is_same_server(before: str, url: str) -> bool:
    """Whether ``url`` leads to the server that ``before`` led to: by TLS it has to prove that, whatever its address."""
    return before == url or url.startswith("wss:")


def first_words(name: str, store: ClientStore, plan: Choices, head: Head | None, url: str) -> Hello:
    """Hello for a new session, for one that the journal ``head`` goes on with, or for one whose state is lost.

    The session's token is for the server at ``url`` that gave it.
    """
    record = store.session()
    last = record.token if record is not None and is_same_server(record.url, url) else ""
    return replace(
        new_hello(name, plan),
        resume=last if head is None else head.token,
        fresh=head is None,
        round=max(store.rounds(), default=-1),
    )


def new_hello(name: str, plan: Choices) -> Hello:
    """Hello of a client that begins."""
    software = f"splitfl {version('splitfl')}"
    return Hello(PROTOCOL_VERSIONS, name, fresh=True, software=software, **plan.announced())
