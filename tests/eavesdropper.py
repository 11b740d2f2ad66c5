"""Somebody in the middle: takes TLS connections with a certificate of its own, notes all it hears, plays the server."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from server_model.authority import open_authority
from splitfl.wire.frames import encode
from splitfl.wire.messages import Authority


class Eavesdropper:
    """Listens on a free loopback port. ``shown`` is the authority that it claims to be of; its own one without."""

    def __init__(self, folder: Path, shown: str | None = None) -> None:
        authority = open_authority(folder / "eavesdropper")
        self.shown = shown if shown is not None else authority.pem
        self.heard = b""
        self.connections = 0
        self._server = serve(self._answer, "127.0.0.1", 0, ssl=authority.server_context(), compression=None)
        self._accept = self._server.socket.accept
        self._server.socket.accept = self._count  # type: ignore[method-assign]
        self.port = int(self._server.socket.getsockname()[1])

    def _count(self):  # type: ignore[no-untyped-def]
        accepted = self._accept()
        self.connections += 1
        return accepted

    def _answer(self, connection: ServerConnection) -> None:
        try:
            for data in connection:
                assert isinstance(data, bytes)
                self.heard += data
                connection.send(b"".join(encode(Authority(self.shown))))
        except ConnectionClosed:
            pass

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
