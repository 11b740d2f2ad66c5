"""The websocket shell of a client: keeps one connection up, feeds frames in and out, decides nothing.

The trainer is ordinary blocking code; the link runs an event loop in a thread of its own, so bytes go on moving
while torch computes. Requests return futures. When the connection breaks, the link reconnects with backoff and
repeats what is unanswered; when the server comes back without the session, the futures raise SessionLostError, and so
does every request until that is acknowledged: what was meant for the old session is not for the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidURI

from client_model.asking import settle
from client_model.identity import tls_error
from client_model.journal import Journal
from client_model.patience import Patience
from splitfl.channel.certificates import SERVER_NAME
from splitfl.errors import ConfigError, LinkError, ProtocolError, RefusedError, SplitFLError
from splitfl.pipe import send_frame, watch
from splitfl.wire.frames import MAX_FRAME_BYTES, DamagedError, Parts, decode, encode, frame_bytes
from splitfl.wire.messages import Answer, Backward, Forward, Hello, Message, Refused, Request, Welcome
from splitfl.wire.session import Answered, ClientSession, Connected, Rejected

log = logging.getLogger("splitfl.client.link")

CLOSE_TIMEOUT_S = 2.0  # for the server's part in an orderly end; nothing is lost without it
LONG_WAIT_S = 30.0  # after which a person wants to know why nothing happens
ANSWER_S, ANSWER_BYTES = 60.0, 64 << 10  # most that one question may take; whoever answers may be a stranger
TOO_BIG = 1009  # websocket close code: a message over the receiver's limit


class SessionLostError(LinkError):
    """The server is back without this session: go back to the last durable round that ``welcome`` names."""

    def __init__(self, welcome: Welcome) -> None:
        super().__init__("the server restarted", "Going back to its last durable round.")
        self.welcome = welcome


class CountingConnection(ClientConnection):
    """A connection that counts what comes off its socket: bytes that move are a sign of life."""

    bytes_received = 0
    lost_by: Exception | None = None

    def data_received(self, data: bytes) -> None:
        self.bytes_received += len(data)
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost_by = exc
        super().connection_lost(exc)

    async def handshake(self, *arguments: Any, **options: Any) -> None:
        """The websocket's; a TLS alert in the middle of it (our certificate is not taken) is raised as what it is."""
        try:
            await super().handshake(*arguments, **options)
        except Exception as error:
            if isinstance(self.lost_by, ssl.SSLError):
                raise self.lost_by from error
            raise


class Link:
    """One client's link to ``url``. ``say`` receives one line whenever the link waits for something.

    ``journal`` is what an earlier start left and where this one writes; None keeps nothing. ``patience_s`` is how long
    the server may be away before the link gives up; ``tls`` how to encrypt, None not at all.
    """

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        journal: Journal | None = None,
        patience_s: float = 600.0,
        say: Callable[[str], None],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.url = url
        self.tls = tls
        self.patience = Patience(url, patience_s, say, met=hello.resume != "")
        self.say = say
        self.bytes_sent = 0
        self.bytes_received = 0
        self.journal = Journal() if journal is None else journal
        self._session = ClientSession(
            hello, next_seq=self.journal.next_seq, unanswered=self.journal.unanswered, keeper=self.journal
        )
        self._futures = dict(self.journal.waiting)
        self._trusted = not self.journal.unanswered  # until somebody has looked at Welcome, nothing of those leaves
        self._ready: asyncio.Queue[Parts] | None = None  # of the connection that stands
        self._backlog: deque[tuple[Request, Future[Answer]]] = deque()  # beyond the credit window
        self._welcome: Future[Welcome] = Future()
        self._loop = asyncio.new_event_loop()
        self._outgoing: asyncio.Queue[Parts] | None = None
        self._fatal: SplitFLError | None = None
        self._lost: SessionLostError | None = None
        self._said_why = False
        self._thread = threading.Thread(target=self._run_thread, name="link", daemon=True)

    # -- called from the trainer's thread ----------------------------------------------------------------------

    def open(self) -> Welcome:
        """Connect and say Hello; returns the server's Welcome. Raises LinkError, RefusedError, ProtocolError."""
        self._thread.start()
        return self._welcome.result()

    def go_on(self) -> None:
        """Welcome is one to go on with: repeat what an earlier start has sent and heard no answer to."""
        self._loop.call_soon_threadsafe(self._go_on)

    def acknowledge(self, welcome: Welcome) -> None:
        """Whoever asks has gone back to where the new session's ``welcome`` says: requests leave again."""
        self._loop.call_soon_threadsafe(self._acknowledge, welcome)

    def request(self, message: Request) -> Future[Answer]:
        """Send a request, unless an earlier start of this round has sent it; its future gives the answer.

        The future raises RefusedError when the server refuses, SessionLostError after a server's restart, and
        LinkError when the server stays away.
        """
        if (asked := self.again(message)) is not None:
            return asked
        future: Future[Answer] = Future()
        self._loop.call_soon_threadsafe(self._send_request, message, future)
        return future

    def again(self, message: Request) -> Future[Answer] | None:
        """The answer to a request that an earlier start of this round has sent, tensors aside."""
        return self.journal.take(message)

    def ask(self, message: Request) -> Answer:
        """Send a request and wait for its answer, as long as the link lives."""
        return self.request(message).result()

    def close(self) -> None:
        """Hang up."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._cancel)
            self._thread.join(timeout=5)

    @property
    def next_seq(self) -> int:
        """The number of the next request, to go on with a paused session."""
        return self._session.next_seq

    # -- on the link's thread ----------------------------------------------------------------------------------

    def _run_thread(self) -> None:
        asyncio.set_event_loop(self._loop)
        with contextlib.suppress(asyncio.CancelledError):
            self._main = self._loop.create_task(self._stay_connected())
            self._loop.run_until_complete(self._main)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    def _cancel(self) -> None:
        self._main.cancel()  # and no other task: the loop's own ending is one

    async def _stay_connected(self) -> None:
        try:
            await self._connect_forever()
        except SplitFLError as error:
            self._give_up(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, nobody must wait for ever
            self._give_up(LinkError(f"the link failed: {error!r}", "Start the client again; it goes on."))
        await asyncio.Event().wait()  # whoever asks from now on is told why it gave up, until close()

    async def _connect_forever(self) -> None:
        while True:
            try:
                async with dial(self.url, self.tls) as connection:
                    if await self._converse(as_any(connection)):
                        self.patience.renew()
                    reason = "the connection ended"
            except ConnectionClosed as closed:
                reason = str(closed)
                if closed.rcvd is not None and closed.rcvd.code == TOO_BIG:
                    raise ProtocolError(
                        "a frame was over the server's limit", "Lower batch.records or batch.max_length."
                    ) from closed
            except (OSError, InvalidHandshake, TimeoutError, DamagedError) as error:
                reason = why_not(error, self.patience)
            await self.patience.wait(reason)

    async def _converse(self, connection: CountingConnection) -> bool:
        """Hello, then frames until the connection ends; whether the server welcomed us."""
        outgoing: asyncio.Queue[Parts] = asyncio.Queue()
        helpers = [asyncio.create_task(watch(as_any(connection)))]
        welcomed = False
        try:
            await send_frame(as_any(connection), self._session.hello())
            async for data in connection:
                self.bytes_received += len(data)
                for event in self._session.receive(data if isinstance(data, bytes) else data.encode()):
                    if isinstance(event, Connected):
                        self._connected(event.welcome, outgoing)
                        helpers.append(asyncio.create_task(self._write(connection, outgoing)))
                        welcomed = True
                    elif isinstance(event, Rejected):
                        raise refusal_error(event.refusal)
                    else:
                        self._answered(event)
        except ConnectionClosed:
            if not welcomed:
                raise
            self._raise_if_too_big(connection)
        except DamagedError as damaged:
            if not welcomed:
                raise
            self.say(f"the link to {self.url}: {damaged.message}")
        finally:
            self._outgoing = self._ready = None
            for helper in helpers:
                helper.cancel()
        return welcomed

    def _raise_if_too_big(self, connection: CountingConnection) -> None:
        if connection.close_code == TOO_BIG:
            raise ProtocolError("a frame was over the server's limit", "Lower batch.records or batch.max_length.")

    def _connected(self, welcome: Welcome, outgoing: asyncio.Queue[Parts]) -> None:
        if not self._welcome.done():
            if not welcome.resumed:
                self._futures.clear()  # those of an earlier start: nobody waits for them
            self._welcome.set_result(welcome)
        elif not welcome.resumed:
            self._lost = SessionLostError(welcome)
            self._void_requests(self._lost)
        self._ready = outgoing
        if self._trusted:
            self._repeat()

    def _go_on(self) -> None:
        if not self._trusted:
            self._trusted = True
            self._repeat()

    def _acknowledge(self, welcome: Welcome) -> None:
        if self._lost is not None and self._lost.welcome is welcome:  # else it was lost again meanwhile
            self._lost = None

    def _repeat(self) -> None:
        """Send what is unanswered, if there is a connection; from then on requests leave as they come."""
        if self._ready is None:
            return
        for parts in self._session.unanswered():
            self._ready.put_nowait(parts)
        self._outgoing = self._ready

    def _answered(self, event: Answered) -> None:
        self._said_why = False
        future = self._futures.pop(event.answer.seq, None)
        if future is None:
            return
        settle(future, event.answer)
        self._send_backlog()

    async def _write(self, connection: CountingConnection, outgoing: asyncio.Queue[Parts]) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                parts = await outgoing.get()
                await send_frame(as_any(connection), parts)
                self.bytes_sent += frame_bytes(parts)

    def _send_request(self, message: Request, future: Future[Answer]) -> None:
        if self._fatal is not None:
            future.set_exception(self._fatal)
            return
        if self._lost is not None:
            future.set_exception(SessionLostError(self._lost.welcome))
            return
        self._backlog.append((message, future))
        self._send_backlog()
        if isinstance(message, Forward | Backward):
            self._loop.call_later(LONG_WAIT_S, self._say_why_it_waits, future)

    def _say_why_it_waits(self, future: Future[Answer]) -> None:
        """Once for each wait: the trunk has been asked for a while, the connection stands, and no answer comes."""
        if future.done() or self._outgoing is None or self._said_why:
            return
        self._said_why = True
        self.say(
            f"no answer from the trunk for {LONG_WAIT_S:.0f} s: it may wait for another client of this round, and goes "
            "on without it when that one's grace time is over"
        )

    def _send_backlog(self) -> None:
        """Send what waits, as far as the credit window lets it."""
        while self._backlog and self._session.credit > 0:
            message, future = self._backlog.popleft()
            try:
                seq, parts = self._session.request(message)
            except SplitFLError as error:  # it cannot be written down, so it must not leave
                self._give_up(error)
                future.set_exception(error)
                return
            self._futures[seq] = future
            if self._outgoing is not None:
                self._outgoing.put_nowait(parts)

    def _give_up(self, error: SplitFLError) -> None:
        self._fatal = error
        if not self._welcome.done():
            self._welcome.set_exception(error)
        self._void_requests(error)

    def _void_requests(self, error: SplitFLError) -> None:
        """Fail every request that waits."""
        futures = [*self._futures.values(), *(future for _, future in self._backlog)]
        self._futures.clear()
        self._backlog.clear()
        for future in futures:
            future.set_exception(error)


def dial(url: str, tls: ssl.SSLContext | None, max_bytes: int = MAX_FRAME_BYTES) -> connect:
    """A websocket to ``url``, which is wss:// with ``tls`` and ws:// without. Raises ConfigError."""
    secured: dict[str, Any] = {} if tls is None else {"ssl": tls, "server_hostname": SERVER_NAME}
    try:
        return connect(
            url,
            compression=None,
            ping_interval=None,
            close_timeout=CLOSE_TIMEOUT_S,
            max_size=max_bytes,
            proxy=None,
            create_connection=CountingConnection,
            user_agent_header=None,
            **secured,
        )
    except InvalidURI as error:
        raise ConfigError(f"{url!r} is no websocket address", "Write it as ws://HOST:PORT.") from error


def why_not(error: BaseException, patience: Patience) -> str:
    """Why there is no connection, in a few words. Raises TrustError and LinkError for what waiting does not mend."""
    url = patience.url
    if (distrust := tls_error(error, url)) is not None:
        raise distrust from error
    if isinstance(error, socket.gaierror):
        if not patience.met:
            raise LinkError(f"no machine is known by the name in {url}", "Check host and port.") from error
        return "its name does not resolve"
    if isinstance(error, InvalidMessage) and url.startswith("wss:"):  # asyncio closes without the alert that says why
        return "it hung up after the TLS handshake: busy, or it does not take this client's certificate"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return one_line(error)


def ask_once(
    url: str, message: Message, tls: ssl.SSLContext, *, patience_s: float, say: Callable[[str], None]
) -> Message:
    """Ask one thing on a connection of its own. Raises LinkError, RefusedError, ProtocolError, TrustError."""
    return asyncio.run(_ask_patiently(url, message, tls, Patience(url, patience_s, say)))


async def _ask_patiently(url: str, message: Message, tls: ssl.SSLContext, patience: Patience) -> Message:
    while True:
        try:
            async with asyncio.timeout(ANSWER_S), dial(url, tls, ANSWER_BYTES) as connection:
                await send_frame(as_any(connection), encode(message))
                answer = decode(await connection.recv(decode=False))
            if isinstance(answer, Refused):
                raise refusal_error(answer)
            return answer
        except (OSError, InvalidHandshake, TimeoutError, ConnectionClosed) as error:
            reason = why_not(error, patience)
        await patience.wait(reason)


def refusal_error(refusal: Refused) -> SplitFLError:
    """The error that a Refused means for the person at the client."""
    if refusal.code == "damaged":
        return DamagedError(refusal.reason, refusal.remedy, field="frame")
    if refusal.code in ("version", "bad_message"):
        return ProtocolError(f"the server refuses: {refusal.reason}", refusal.remedy)
    return RefusedError(f"the server refuses: {refusal.reason}", refusal.remedy, code=refusal.code)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def as_any(connection: ClientConnection) -> Any:
    return connection
