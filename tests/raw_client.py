"""A client that is no SplitFL client: it speaks the protocol by hand, so that it can also speak it wrongly."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor
from websockets.sync.client import ClientConnection, connect

from splitfl.channel.certificates import SERVER_NAME
from splitfl.config import Federation
from splitfl.cut import Cut
from splitfl.split.shares import shared_shapes
from splitfl.wire.frames import decode, encode
from splitfl.wire.messages import (
    PROTOCOL_VERSIONS,
    Answer,
    Backward,
    Forward,
    Hello,
    Message,
    NextRound,
    Request,
    TensorBytes,
    Update,
    Upload,
    Welcome,
)

WAIT_S = 60.0


class RawClient:
    """One connection; ``greeting`` is what the server said to Hello."""

    def __init__(self, url: str, name: str, tls: ssl.SSLContext | None = None, **hello: Any) -> None:
        secured: dict[str, Any] = {} if tls is None else {"ssl": tls, "server_hostname": SERVER_NAME}
        self._connecting = connect(url, compression=None, max_size=None, proxy=None, close_timeout=1.0, **secured)
        self.connection: ClientConnection = self._connecting.__enter__()
        self.name = name
        self.seq = 0
        self.greeting = self.say(replace(Hello(PROTOCOL_VERSIONS, name), **hello))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connecting.__exit__(kind, error, trace)

    @property
    def settings(self) -> Federation:
        assert isinstance(self.greeting, Welcome), self.greeting
        return Federation.model_validate_json(self.greeting.settings)

    def hear(self) -> Any:
        """The next message."""
        return decode(bytes(self.connection.recv(timeout=WAIT_S)))  # type: ignore[arg-type]

    def say(self, message: Message) -> Any:
        """Send a message as it is; returns what comes back."""
        self.connection.send(b"".join(encode(message)))
        return self.hear()

    def send(self, request: Request) -> int:
        """Number a request and send it without waiting; returns its number."""
        seq, self.seq = self.seq, self.seq + 1
        self.connection.send(b"".join(encode(replace(request, seq=seq, ack=0))))
        return seq

    def ask(self, request: Request) -> Answer:
        """Number a request, send it, and wait for its answer."""
        seq = self.send(request)
        answer: Answer = self.hear()
        assert getattr(answer, "seq", seq) == seq, answer
        return answer

    def next_round(self, after: int = -1) -> Answer:
        return self.ask(NextRound(0, 0, after))

    def forward(self, round_: int, step: int, hidden: Tensor, *, micro: int = 0, train: bool = True) -> Answer:
        tokens = hidden.shape[0] * hidden.shape[1] if hidden.dim() == 3 else 1
        return self.ask(Forward(0, 0, round_, step, micro, train, tokens, (), wire(hidden)))

    def backward(self, round_: int, step: int, gradient: Tensor, *, micro: int = 0) -> Answer:
        return self.ask(Backward(0, 0, round_, step, micro, wire(gradient)))

    def upload(self, data: bytes, digest: str | None = None) -> Answer:
        """One piece that is the whole blob."""
        digest = digest or hashlib.sha256(data).hexdigest()
        return self.ask(Upload(0, 0, digest, 0, len(data), TensorBytes("u8", (len(data),), data)))

    def update(self, round_: int, data: bytes, tokens: int = 100) -> Answer:
        return self.ask(Update(0, 0, round_, tokens, hashlib.sha256(data).hexdigest()))


def wire(tensor: Tensor) -> TensorBytes:
    """fp32 bytes, whatever the numbers are: the library's own encoder refuses NaN."""
    return TensorBytes("f32", tuple(tensor.shape), tensor.float().numpy().tobytes())


def right_weights(config: Any, settings: Federation, cut: Cut = Cut(1, 1)) -> dict[str, Tensor]:  # noqa: B008
    """Weights of the names and shapes that the server expects of a client."""
    return {name: torch.full(shape, 0.01) for name, shape in shared_shapes(config, settings, cut).items()}


def blob(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})
