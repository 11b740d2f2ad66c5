"""What a client has sent and heard since the state it would go on from, so that a crash in a round loses nothing.

Every request is written down before it is sent, every answer before it is handed on and can be acknowledged, and
what was decided from budgets or by chance before anything that follows from it leaves. A client that was killed takes
up its session again, loads the state before the round, and does the round again: a request that was sent is not sent
anew but answered from here, so nothing is drawn, charged or applied twice; what was unanswered is repeated byte for
byte; where the journal ends, life goes on. It needs that the same state and answers make the same requests.

Pieces of blobs are not kept, for they can be fetched again. Everything is encrypted (``client_model.sealed``).
"""

from __future__ import annotations

import json
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from client_model.asking import settle
from client_model.sealed import SealedFile, damage
from splitfl.errors import ProtocolError
from splitfl.wire.frames import Parts, decode
from splitfl.wire.messages import (
    Answer,
    Backward,
    Chunk,
    Forward,
    NextRound,
    Request,
    SitOut,
    TensorBytes,
    Update,
    Upload,
)

HEAD, SENT, ANSWER, NOTE = b"HSAN"  # kinds of entries
SEQ = struct.Struct("<BQ")

#: what a round that is done again asks again, in the same order; the rest is for the moment and asked anew
DONE_AGAIN = (NextRound, Forward, Backward, SitOut, Upload, Update)

Key = tuple[object, ...]


@dataclass(frozen=True)
class Head:
    """Where a journal begins: the state folder's ``base`` ("" = the published weights) in the session ``token``.

    ``in_round``: the base is in the middle of its round, which is to be finished; else the next one is asked for.
    ``next_seq`` is the first request's number; ``data`` and ``plan`` are what the round must be done again with.
    ``terms`` (SHA-256), the server's ``signer`` and ``url`` and the client's own ``floor`` are what everything was sent
    under: to others, or under others, nothing of it leaves.
    """

    base: str
    in_round: bool
    token: str
    next_seq: int
    data: str = ""
    plan: str = ""
    terms: str = ""
    signer: str = ""
    floor: str = ""
    url: str = ""


class Journal:
    """The journal at ``path``, None keeps nothing. Raises StorageError when it is damaged or cannot be written.

    It is the session's ``Keeper``. Requests are answered on the link's thread and asked on the trainer's.
    """

    def __init__(self, path: Path | None = None, key: bytes = b"") -> None:
        self.path = path
        self._key = key
        self._lock = threading.Lock()
        self._file: SealedFile | None = None
        self._forget()
        if path is not None and path.exists():
            self._file = SealedFile(path, key)
            try:
                self._read(self._file)
            except (TypeError, ValueError, KeyError, IndexError, struct.error, ProtocolError) as error:
                raise damage(path) from error  # or of another release

    def _forget(self) -> None:
        self.head: Head | None = None
        self.next_seq = 0
        self.unanswered: dict[int, bytes] = {}  # frames by number
        self.waiting: dict[int, Future[Answer]] = {}  # for the answers to those
        self._asked: dict[Key, deque[int]] = defaultdict(deque)  # numbers of requests that were not asked again yet
        self._answers: dict[int, int] = {}  # request -> entry
        self._notes: dict[str, Any] = {}
        self._only_head = False

    # -- written as it happens ---------------------------------------------------------------------------------

    def begin(self, head: Head, *, only_head: bool = False) -> None:
        """From now on ``head`` is where to go on from, and what was kept before is gone.

        ``only_head``: what follows cannot be done again (noise that is not kept), so this holds until the next request.
        """
        with self._lock:
            self._forget()
            if self.path is None:
                return
            first = bytes([HEAD]) + json.dumps(asdict(head)).encode()
            self._close()
            self._file = SealedFile.create(self.path, self._key, first)
            self.head, self.next_seq, self._only_head = head, head.next_seq, only_head

    def drop(self) -> None:
        """There is nothing to go on from."""
        with self._lock:
            self._forget()
            self._close()
            if self.path is not None:
                self.path.unlink(missing_ok=True)

    def sent(self, seq: int, parts: Parts) -> None:
        """Write a request down."""
        if self._only_head:
            self.drop()
        self._append(SEQ.pack(SENT, seq), *parts)

    def answered(self, answer: Answer, frame: bytes | memoryview) -> None:
        """Write an answer down."""
        self._append(SEQ.pack(ANSWER, answer.seq), b"" if isinstance(answer, Chunk) else frame)

    def lost(self) -> None:
        """The server knows the session no more."""
        self.drop()

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gave (JSON) when this round came here first; else it is made and written down now."""
        notes = self._notes  # the link's thread forgets them when the session is lost
        if name not in notes:
            made = notes[name] = make()
            self._append(bytes([NOTE]), json.dumps([name, made]).encode())
        return notes[name]

    # -- done again --------------------------------------------------------------------------------------------

    def take(self, message: Request) -> Future[Answer] | None:
        """The answer to a request that an earlier start has sent, tensors aside; None when it is a new one."""
        with self._lock:
            numbers = self._asked.get(key_of(message))
            if not numbers or self._file is None:
                return None
            seq = numbers.popleft()
            if seq in self.waiting:
                return self.waiting[seq]
            frame = self._file.read(self._answers[seq])[SEQ.size :]
        reply: Future[Answer] = Future()
        settle(reply, decode(frame))  # type: ignore[arg-type]
        return reply

    @property
    def doing_again(self) -> bool:
        """Whether something that was sent before is still to come."""
        return any(self._asked.values())

    @property
    def last_step(self) -> tuple[int, int] | None:
        """Round and number of the step that was begun last, None before the first one."""
        steps = [name.split()[1:] for name in self._notes if name.startswith("step ")]
        return (int(steps[-1][0]), int(steps[-1][1])) if steps else None

    # -- the file ----------------------------------------------------------------------------------------------

    def _read(self, file: SealedFile) -> None:
        for number, entry in enumerate(file):
            kind, rest = entry[0], entry[1:]
            if kind == HEAD:
                self.head = Head(**json.loads(rest))
                self.next_seq = self.head.next_seq
            elif kind == NOTE:
                name, made = json.loads(rest)
                self._notes[name] = made
            else:
                self._read_frame(number, entry)
        self.waiting = {seq: Future() for seq in self.unanswered}

    def _read_frame(self, number: int, entry: bytes) -> None:
        (kind, seq), frame = SEQ.unpack_from(entry), entry[SEQ.size :]
        if kind == SENT:
            self.unanswered[seq], self.next_seq = frame, seq + 1
            message = decode(frame)
            if isinstance(message, DONE_AGAIN):
                self._asked[key_of(message)].append(seq)
        else:
            self.unanswered.pop(seq, None)
            self._answers[seq] = number

    def _append(self, *parts: bytes | memoryview) -> None:
        with self._lock:
            if self._file is not None:
                self._file.append(b"".join(parts))

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def key_of(message: Request) -> Key:
    """What makes a request the same one as in an earlier start: its kind and all fields but numbers and tensors."""
    said = [getattr(message, field.name) for field in fields(message) if field.name not in ("seq", "ack")]
    return (type(message), *(None if isinstance(value, TensorBytes) else value for value in said))
