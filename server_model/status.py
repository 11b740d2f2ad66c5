"""What the service is doing right now: one JSON object at ``http://127.0.0.1:PORT/status``, for whoever runs it.

Answered on the service's own port, on the event loop, from what lies in memory: it neither waits for the trunk nor
keeps it from training. Only for this machine: the address must be a loopback one, and named as one, so that no web page
in a browser here can have it fetched under a name of its own.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from server_model.coordinator import Coordinator
from server_model.members import Member
from splitfl.console import is_loopback

PATH = "/status"


def status(coordinator: Coordinator) -> dict[str, Any]:
    """The state of the federation: no weights, no losses, nothing of a record."""
    rounds = coordinator.rounds
    awaited, missing = rounds.awaited()
    machine = rounds.machine
    return {
        "federation": coordinator.settings.name,
        "phase": machine.phase.value,
        "round": machine.round,
        "rounds": coordinator.settings.rounds.count,
        "durable_round": rounds.durable,
        "steps_applied": coordinator.engine.steps_applied,
        "cohort": sorted(machine.cohort),
        "updates": sorted(machine.updates),
        "waiting_for": awaited,
        "missing": missing,
        "held_up": rounds.trouble,
        "clients": [
            describe(member, takes_part=member.name in machine.present)
            for member in sorted(coordinator.members, key=lambda member: member.name)
        ],
    }


def describe(member: Member, *, takes_part: bool) -> dict[str, Any]:
    """One client's session; bytes are those of its frames. Who has asked for no round yet takes no part: it may be
    here to measure."""
    return {
        "name": member.name,
        "connected": member.connected,
        "takes_part": takes_part,
        "cut": str(member.cut),
        "codec": member.codec,
        "bytes_in": member.bytes_in,
        "bytes_out": member.bytes_out,
    }


def answer(coordinator: Coordinator, path: str, host: str, peer: str) -> tuple[HTTPStatus, str] | None:
    """What a plain GET of ``path`` gets; None where it asks for something else.

    ``host`` is the request's Host header, ``peer`` the address that it came from.
    """
    if path.partition("?")[0] != PATH:
        return None
    if not (is_loopback(peer) and is_loopback(host_name(host))):
        return HTTPStatus.FORBIDDEN, "the status is for the machine that the service runs on\n"
    return HTTPStatus.OK, json.dumps(status(coordinator)) + "\n"


def host_name(header: str) -> str:
    """The name in a Host header, without its port; "" for what is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
