"""A trunk service and links to it in one process: the same frames and sessions as on a websocket, and no socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from client_model.asking import settle
from client_model.journal import Journal
from server_model.coordinator import Coordinator
from server_model.members import Member
from server_model.tasks import spawn
from splitfl.errors import LinkError, ProtocolError, SplitFLError
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import Answer, Hello, Request, Welcome
from splitfl.wire.session import Answered, ClientSession, Connected

URL = "memory:"  # what a client writes down as its server's address


class MemoryService:
    """Serves a coordinator to links in this process, on an event loop in a thread, for the length of a ``with``.

    At its end the coordinator is closed, every open link raises LinkError, and the thread is gone.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._failure: BaseException | None = None
        self._links: dict[str, MemoryLink] = {}  # by session token
        self._ended = asyncio.Event()
        self._started: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="service", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._loop = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.fail(LinkError("the service in this process has ended", "Do all requests inside its with block."))
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._background_failure)
        self._started.set_result(loop)
        await self._ended.wait()
        self.coordinator.close()

    def fail(self, error: BaseException) -> None:
        """From now on every request of every link raises ``error``, the unanswered ones included; the first one counts.

        May be called from any thread.
        """
        self._failure = self._failure or error
        for link in list(self._links.values()):
            link.fail(self._failure)

    def connect(self, link: MemoryLink, frame: bytes) -> tuple[Member, bytes]:
        """Answer Hello: the session, and the frame of Welcome. Raises ProtocolError, RefusedError."""

        async def connect() -> tuple[Member, bytes]:
            hello = decode(frame)
            if not isinstance(hello, Hello):
                raise ProtocolError("the first message must be hello", field="t")
            member, welcome = self.coordinator.hello(hello)
            return member, b"".join(encode(welcome))

        if self._failure is not None:
            raise self._failure
        opened = asyncio.run_coroutine_threadsafe(connect(), self._loop).result()
        self._links[opened[0].token] = link
        return opened

    def disconnect(self, link: MemoryLink, member: Member) -> None:
        """The link is gone without a goodbye; its session lives on for the grace period."""
        if self._links.get(member.token) is link:
            del self._links[member.token]
        if self._failure is None:
            self._loop.call_soon_threadsafe(self.coordinator.disconnected, member)

    def send(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        """Take a client's frame; what there is to answer comes back through ``link.deliver``."""
        self._loop.call_soon_threadsafe(self._receive, link, member, frame)

    def _receive(self, link: MemoryLink, member: Member, frame: bytes) -> None:
        member.bytes_in += len(frame)
        try:
            request, repeated = member.wire.receive(frame)
        except ProtocolError as error:
            link.fail(error)
            return
        if repeated is not None:
            link.deliver(b"".join(repeated))
        elif request is not None:
            spawn(self._answer(member, request))

    async def _answer(self, member: Member, request: Request) -> None:
        """Work on a request and answer on whatever link the client has by then."""
        answer = await self.coordinator.handle(member, request)
        frame = b"".join(member.wire.answer(answer))
        member.bytes_out += len(frame)
        if (link := self._links.get(member.token)) is not None:
            link.deliver(frame)

    def _background_failure(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A task that nobody waits for has failed: a merge, a step of the trunk."""
        self.fail(context.get("exception") or RuntimeError(context["message"]))


class MemoryLink:
    """A client's link to a ``MemoryService``: what ``client_model.link.Link`` is to a websocket.

    ``bytes_sent`` and ``bytes_received`` count whole frames, as they would travel. ``journal`` as there.
    """

    def __init__(self, service: MemoryService, hello: Hello, journal: Journal | None = None) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._service = service
        self.journal = Journal() if journal is None else journal
        self._session = ClientSession(
            hello, next_seq=self.journal.next_seq, unanswered=self.journal.unanswered, keeper=self.journal
        )
        self._member: Member | None = None
        self._futures = dict(self.journal.waiting)
        self._failure: BaseException | None = None
        self._lock = threading.Lock()  # requests come from the client's thread, answers from the service's

    def open(self) -> Welcome:
        """Say Hello; returns the service's Welcome. Raises RefusedError, ProtocolError."""
        self._member, frame = self._service.connect(self, self._counted(self._session.hello()))
        self.bytes_received += len(frame)
        (event,) = self._session.receive(frame)
        assert isinstance(event, Connected)
        if not event.welcome.resumed:
            self._futures.clear()
        return event.welcome

    def go_on(self) -> None:
        """Repeat what an earlier start has sent and heard no answer to."""
        assert self._member is not None
        for parts in self._session.unanswered():
            self._service.send(self, self._member, self._counted(parts))

    def acknowledge(self, welcome: Welcome) -> None:
        """Nothing to acknowledge: a session lives as long as the service."""

    def request(self, message: Request) -> Future[Answer]:
        """Send a request; its future gives the answer, or raises RefusedError, or why the federation was stopped."""
        if (asked := self.again(message)) is not None:
            return asked
        future: Future[Answer] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            if self._member is None:
                raise LinkError("this link is not open", "Call open() first.")
            seq, parts = self._session.request(message)
            self._futures[seq] = future
            self._service.send(self, self._member, self._counted(parts))
        return future

    def again(self, message: Request) -> Future[Answer] | None:
        """The answer to a request that an earlier start of this round has sent, tensors aside."""
        return self.journal.take(message)

    def ask(self, message: Request) -> Answer:
        """Send a request and wait for its answer."""
        return self.request(message).result()

    @property
    def next_seq(self) -> int:
        """The number of the next request."""
        return self._session.next_seq

    def close(self) -> None:
        """Hang up without a goodbye, as a connection that breaks."""
        self.fail(LinkError("this link is closed", "Open another one."))
        if self._member is not None:
            self._service.disconnect(self, self._member)

    def deliver(self, frame: bytes) -> None:
        """A frame from the service has arrived."""
        with self._lock:
            self.bytes_received += len(frame)
            if self._failure is not None:
                return
            try:
                events = self._session.receive(frame)
            except SplitFLError as error:  # it cannot be written down, so nobody may have it
                self._failure = error
                events = []
            answers = [event.answer for event in events if isinstance(event, Answered)]
            waiting = [(self._futures.pop(answer.seq, None), answer) for answer in answers]
        for future, answer in waiting:
            if future is not None:
                settle(future, answer)
        if self._failure is not None:
            self.fail(self._failure)

    def fail(self, error: BaseException) -> None:
        """Every request raises ``error`` from now on, the unanswered ones included; the first one counts."""
        with self._lock:
            self._failure = self._failure or error
            futures, self._futures = self._futures, {}
        for future in futures.values():
            future.set_exception(error)

    def _counted(self, parts: Sequence[bytes | memoryview]) -> bytes:
        """The frame as one piece: a copy, as a socket would make, so that no two sides share memory."""
        frame = b"".join(parts)
        self.bytes_sent += len(frame)
        return frame
