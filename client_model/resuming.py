"""What of an earlier start a new one goes on with: its cut, its journal, its session. Torch is imported inside."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from splitfl.config import parse_federation
from splitfl.console import note
from splitfl.cut import Cut
from splitfl.errors import ConfigError, StorageError
from splitfl.wire.messages import PROTOCOL_VERSIONS, Hello

if TYPE_CHECKING:
    from client_model.journal import Head, Journal
    from client_model.store import ClientStore


def cuts_of_pause(store: ClientStore, plan: Cut | None) -> tuple[Cut, Cut] | None:
    """The cut of a round that was paused and the one that ``plan`` asks for now, where they differ."""
    if not store.pause_folder.exists():
        return None
    _, held = store.federation()
    before, asked = Cut(*held), asked_cut(store, plan)
    return (before, asked) if before != asked else None


def asked_cut(store: ClientStore, plan: Cut | None) -> Cut:
    """The cut that ``plan`` asks for; None is the federation's own, as the state folder knows it."""
    return plan or parse_federation(json.loads(store.federation()[0]), str(store.folder)).cut


def check_same_client(name: str, store: ClientStore) -> None:
    """Raise ConfigError when the state folder is another client's."""
    record = store.session()
    if record is not None and record.name != name:
        raise ConfigError(
            f"{store.folder} holds the state of client {record.name!r}", "Name another --state, or join as that one."
        )


def open_journal(
    store: ClientStore, key_file: Path | None, cut: Cut | None, *, floor: str = "", url: str = ""
) -> Journal:
    """The journal of a state folder; one that is damaged, or of another ``cut`` or ``floor``, is begun anew.

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
    if not is_same_server(head.url, url) or (head.cut, head.floor) != (str(asked_cut(store, cut)), floor):
        journal.drop()
    return journal


def is_same_server(before: str, url: str) -> bool:
    """Whether ``url`` leads to the server that ``before`` led to: by TLS it has to prove that, whatever its address."""
    return before == url or url.startswith("wss:")


def first_words(name: str, store: ClientStore, cut: Cut | None, head: Head | None, url: str) -> Hello:
    """Hello for a new session, for one that the journal ``head`` goes on with, or for one whose state is lost.

    The session's token is for the server at ``url`` that gave it.
    """
    record = store.session()
    last = record.token if record is not None and is_same_server(record.url, url) else ""
    return Hello(
        versions=PROTOCOL_VERSIONS,
        name=name,
        resume=last if head is None else head.token,
        fresh=head is None,
        round=max(store.rounds(), default=-1),
        software=f"splitfl {version('splitfl')}",
        n_bottom=cut.n_bottom if cut else -1,
        n_top=cut.n_top if cut else -1,
    )
