"""From what was typed to the closing report: choose a plan, connect, take part, and end well however it ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from client_model.choices import Choices
from client_model.identity import enrolled
from client_model.resuming import check_same_client, first_words, open_journal, paused_choices
from client_model.telling import print_report
from splitfl.allocator import share_one_heap
from splitfl.channel.joining import JoinString
from splitfl.console import note, print_json
from splitfl.cut import Cut
from splitfl.errors import LinkError, SplitFLError, StorageError
from splitfl.wire.messages import Bye

if TYPE_CHECKING:
    from client_model.link import Link
    from client_model.participant import Participant
    from client_model.scouting import Scouted


def parse_plan(plan: str) -> Choices | None:
    """None for one that is still to be made. Raises ConfigError."""
    if plan == "auto":
        return None
    return Choices() if plan == "federation" else Choices(Cut.parse(plan))


def prepare(name: str, data: Path, state: Path, cache: Path, device: str, threads: int) -> Participant:
    """A participant with its state folder; loads torch."""
    note("loading, which takes some seconds")
    import torch

    from client_model.participant import Participant
    from client_model.store import ClientStore
    from splitfl.split.modes import choose_device

    share_one_heap()
    if threads:
        torch.set_num_threads(threads)
    return Participant(name, data, ClientStore(state), cache.expanduser(), choose_device(device))


def plans_of(
    participant: Participant, choices: Choices | None, url: str, patience: float, invited: JoinString | None
) -> Callable[[], Choices]:
    """What gives the plan to take part with, now and whenever the participant asks for another one."""
    if choices is not None:
        return lambda: choices
    from client_model.replanning import AutoPlan
    from client_model.scouting import Scout

    def visit() -> Scouted:
        check_same_client(participant.name, participant.store)
        tls = enrolled(invited, participant.store.folder, patience) if invited else None
        return Scout(participant.name, url, tls, participant.cache, participant.device, patience, note).look()

    auto = AutoPlan(participant.store, participant.device, visit, note)
    participant.wants_plan = auto.is_stale
    return auto.choose


def run(
    participant: Participant,
    plans: Callable[[], Choices],
    url: str,
    patience: float,
    *,
    as_json: bool,
    invited: JoinString | None,
) -> None:
    """Connect, take part, and end well however it ends. A paused round keeps the plan that it began with."""
    participant.stop = StopSignal(participant).asked
    report: dict[str, Any] = {}
    while not report:
        participant.plan, participant.only_finish = plans(), False
        if (both := paused_choices(participant.store, participant.plan)) is not None:
            participant.plan, participant.only_finish = both[0], True
            before, asked = (choices.cut for choices in both)
            note(f"finishing the round that was paused with cut {before}; after it, this client takes {asked}")
        report = take_part(participant, url, patience, invited)
    print_json({"report": report}) if as_json else print_report(report)


def take_part(participant: Participant, url: str, patience: float, invited: JoinString | None) -> dict[str, Any]:
    """One connection from Hello to goodbye; returns the closing report, {} when another connection is due."""
    from client_model.link import Link
    from client_model.participant import PausedError
    from client_model.shortage import ShortageError

    store = participant.store
    check_same_client(participant.name, store)
    journal = open_journal(store, participant.key_file, participant.plan, floor=repr(participant.floor), url=url)
    hello = first_words(participant.name, store, participant.plan, journal.head, url)
    tls = enrolled(invited, store.folder, patience) if invited else None
    first = 0.0 if store.closing() is not None else patience  # there is little left to wait for
    link = Link(url, hello, journal=journal, patience_s=first, say=note, tls=tls)
    try:
        welcome = link.open()
        link.patience.limit_s = patience
        return participant.run(link, welcome, url)
    except PausedError as paused:
        if not paused.in_round:
            say_goodbye(link, "interrupted")  # between rounds there is nothing that the server should wait for
            journal.drop()
        if not participant.stop():
            return {}
        note(f"paused; the state is in {store.folder}. Run the same command to go on.")
        raise KeyboardInterrupt from None
    except ShortageError:
        if participant.exhausted:  # no goodbye: with more memory it goes on where it is
            raise
        return {}
    except KeyboardInterrupt:
        say_goodbye(link, "interrupted")
        note(f"the state is in {store.folder}. Run the same command to go on.")
        raise
    except SplitFLError as error:
        if not (isinstance(error, StorageError) and journal.head):  # with room again it goes on where it is
            say_goodbye(link, "failed")
        if isinstance(error, LinkError) and (report := store.closing()) is not None:
            note("the server is not there any more; the rounds are over, so this is the report as it was saved")
            return report
        raise
    finally:
        link.close()


class StopSignal:
    """Ctrl-C: the first one ends after the step under way, the second one at once."""

    def __init__(self, participant: Participant) -> None:
        self.participant = participant
        self.count = 0
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1 or not self.participant.in_step:
            raise KeyboardInterrupt
        note("stopping after this step (Ctrl-C again: at once)")

    def asked(self) -> bool:
        return self.count > 0


def say_goodbye(link: Link, reason: Literal["interrupted", "failed"]) -> None:
    """Tell the server not to wait, if it can be told quickly."""
    from concurrent.futures import CancelledError, TimeoutError

    with suppress(SplitFLError, TimeoutError, CancelledError):
        link.request(Bye(0, 0, reason)).result(timeout=2)
