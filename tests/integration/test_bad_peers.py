"""What strangers send, to a service or as one: a refusal that says why, and nothing lost for the others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Place, Server
from raw_client import RawClient, blob, right_weights
from refusals import SETTINGS, assert_ends, assert_open
from torch import Tensor
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from splitfl.errors import (
    ProtocolError,
)
from splitfl.split.checkpoint import read_config
from splitfl.wire.checksum import checksum
from splitfl.wire.frames import CHECKSUM_BYTES, encode
from splitfl.wire.messages import (
    Failed,
    Forward,
    Hello,
    NextRound,
    Refused,
    RoundDurable,
    RoundOpen,
    TensorBytes,
    Upload,
    Uploaded,
    Welcome,
)

# names and versions


@pytest.mark.parametrize("name", ["../ward", "a/b", ".hidden", "", "x" * 65, "ward\n", "w\x00rd"])
def test_server_refuses_a_name_that_is_a_path(hall: Server, name: str) -> None:
    with RawClient(hall.url, name) as client:
        assert isinstance(client.greeting, Refused)
        assert client.greeting.code == "bad_message"
        assert "'name'" in client.greeting.reason
    assert_open(hall)


def test_server_refuses_a_client_of_another_protocol_version(hall: Server) -> None:
    with RawClient(hall.url, "old", versions=(99,)) as client:
        assert isinstance(client.greeting, Refused)
        assert client.greeting.code == "version"
        assert "[99]" in client.greeting.reason
        assert "same SplitFL release" in client.greeting.remedy


@pytest.mark.parametrize(
    "answer",
    [
        Refused("version", "the client speaks protocol [1], the server [7]", "Install the same release."),
        Welcome(7, "token", False, "incarnation", -1, 1, 1, "{}", "ab" * 32),
    ],
)
def test_join_ends_when_the_server_speaks_another_protocol_version(
    place: Place, wards: dict[str, Path], answer: Refused | Welcome
) -> None:
    with fake_server(lambda _: b"".join(encode(answer))) as url:
        assert_ends(place.join(url, "ward", wards["a"]), ProtocolError, "7")


def test_join_ends_when_the_server_sends_what_is_no_frame(place: Place, wards: dict[str, Path]) -> None:
    with fake_server(lambda _: sealed(b"\xff" * 40)) as url:
        assert_ends(place.join(url, "ward", wards["a"]), ProtocolError, "header")


def test_join_ends_when_its_frame_is_over_the_servers_limit(place: Place, wards: dict[str, Path]) -> None:
    def close(connection: ServerConnection) -> None:
        connection.close(1009, "too big")

    with fake_server(close) as url:
        client = place.join(url, "ward", wards["a"])
        assert_ends(client, ProtocolError, "over the server's limit", "batch.records")


class fake_server:  # noqa: N801 - used as a function
    """Answers Hello with what ``answer`` gives."""

    def __init__(self, answer: Callable[[ServerConnection], bytes | None]) -> None:
        self.answer = answer

    def __enter__(self) -> str:
        self.server = serve(self._serve, "127.0.0.1", 0, compression=None)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return f"ws://127.0.0.1:{self.server.socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()

    def _serve(self, connection: ServerConnection) -> None:
        connection.recv()
        data = self.answer(connection)
        if data is not None:
            connection.send(data)
            connection.recv(timeout=20)


# frames


def test_server_refuses_a_hello_over_the_limit_and_serves_others(hall: Server) -> None:
    with pytest.raises(ConnectionClosed) as closed, RawClient(hall.url, "huge", software="x" * 100_000):
        pass
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    assert_open(hall)


def test_server_refuses_a_frame_over_the_limit_and_keeps_the_session(hall: Server) -> None:
    with RawClient(hall.url, "huge") as client:
        token = client.greeting.session
        data = bytes(40 << 20)
        with pytest.raises(ConnectionClosed) as closed:
            client.ask(Upload(0, 0, "ab" * 32, 0, len(data), TensorBytes("u8", (len(data),), data)))
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009
    with RawClient(hall.url, "huge", resume=token) as client:
        assert client.greeting.resumed


@pytest.mark.parametrize("shape", [(4, 32, 65), (4, 2**20, 2**20), (4, 31, 64)])
def test_server_refuses_a_tensor_whose_shape_lies_and_keeps_the_session(hall: Server, shape: tuple[int, ...]) -> None:
    honest = b"".join(encode(Forward(0, 0, 0, 0, 0, True, 9, (), TensorBytes("f32", (4, 32, 64), bytes(32768)))))
    header_end = 4 + int.from_bytes(honest[:4], "little")
    lie = sealed(with_shape(honest[4:header_end], shape) + honest[-32768 - CHECKSUM_BYTES : -CHECKSUM_BYTES])
    with RawClient(hall.url, "liar") as client:
        token = client.greeting.session
        client.connection.send(lie)
        refusal = client.hear()
    assert isinstance(refusal, Refused)
    assert refusal.code == "bad_message"
    assert "hidden" in refusal.reason or "left over" in refusal.reason
    with RawClient(hall.url, "liar", resume=token) as client:
        assert client.greeting.resumed


def sealed(body: bytes) -> bytes:
    """With the checksum that an honest sender would add."""
    return body + checksum([body]).to_bytes(4, "little")


def with_shape(header: bytes, shape: tuple[int, ...]) -> bytes:
    """The frame's head with another shape in it, padded as the protocol wants."""
    import msgpack

    fields = msgpack.unpackb(header)
    fields["x"] = [["hidden", "f32", list(shape)]]
    packed = msgpack.packb(fields)
    head = len(packed).to_bytes(4, "little") + packed
    return head + bytes(-len(head) % 64)


@pytest.mark.parametrize("place", [0, 40, -100, -1])  # length, header, tensor, checksum
def test_server_refuses_a_damaged_frame_and_keeps_the_session(hall: Server, place: int) -> None:
    data = bytearray(b"".join(encode(Forward(0, 0, 0, 0, 0, True, 9, (), TensorBytes("f32", (1, 1, 64), bytes(256))))))
    data[place] ^= 4
    with RawClient(hall.url, "noisy") as client:
        token = client.greeting.session
        client.connection.send(bytes(data))
        refusal = client.hear()
    assert isinstance(refusal, Refused)
    assert refusal.code == "damaged"
    with RawClient(hall.url, "noisy", resume=token) as client:
        assert client.greeting.resumed


def test_server_refuses_text_messages_and_keeps_the_session(hall: Server) -> None:
    with RawClient(hall.url, "chatty") as client:
        client.connection.send("hello?")
        refusal = client.hear()
    assert isinstance(refusal, Refused)
    assert "text instead of binary" in refusal.reason
    assert_open(hall)


@pytest.mark.parametrize(
    ("shape", "changes", "code"),
    [
        ((4, 32, 63), {}, "bad_message"),
        ((4, 32), {}, "bad_message"),
        ((0, 32, 64), {}, "bad_message"),
        ((5, 32, 64), {}, "over_limit"),
        ((4, 33, 64), {}, "over_limit"),
        ((4, 32, 64), {"lengths": (32, 32, 32)}, "bad_message"),
        ((4, 32, 64), {"lengths": (33, 1, 1, 1)}, "bad_message"),
        ((4, 32, 64), {"lengths": (0, 1, 1, 1)}, "bad_message"),
        ((4, 32, 64), {"label_tokens": 129}, "bad_message"),
        ((4, 32, 64), {"micro": 1}, "bad_message"),
    ],
)
def test_server_refuses_a_micro_batch_that_does_not_fit(
    hall: Server, shape: tuple[int, ...], changes: dict[str, Any], code: str
) -> None:
    fields: dict[str, Any] = {"label_tokens": 1, "lengths": (), "micro": 0, **changes}
    tensor = TensorBytes("f32", shape, bytes(4 * torch.Size(shape).numel()))
    with RawClient(hall.url, "odd") as client:
        answer = client.ask(
            Forward(0, 0, 0, 0, fields["micro"], True, fields["label_tokens"], fields["lengths"], tensor)
        )
        assert isinstance(answer, Failed)
        assert answer.code == code


def test_server_refuses_activations_that_are_no_floats(hall: Server) -> None:
    with RawClient(hall.url, "odd") as client:
        answer = client.ask(Forward(0, 0, 0, 0, 0, True, 1, (), TensorBytes("u8", (1, 1, 64), bytes(64))))
        assert isinstance(answer, Failed)
        assert answer.code == "bad_message"
        assert answer.field == "hidden"


def test_server_refuses_to_open_two_next_rounds_for_one_client(hall: Server) -> None:
    with RawClient(hall.url, "eager") as client:
        client.send(NextRound(0, 0, -1))
        answer = client.ask(NextRound(0, 0, -1))
        assert isinstance(answer, Failed)
        assert answer.code == "wrong_round"


# uploads


def in_a_round(server: Server, name: str) -> RawClient:
    client = RawClient(server.url, name)
    assert isinstance(client.next_round(), RoundOpen)
    return client


def misnamed(weights: dict[str, Tensor]) -> bytes:
    return blob({f"{name}.x" if name == min(weights) else name: tensor for name, tensor in weights.items()})


def misshapen(weights: dict[str, Tensor]) -> bytes:
    return blob({name: tensor.reshape(-1) for name, tensor in weights.items()})


def with_nan(weights: dict[str, Tensor]) -> bytes:
    return blob({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()})


def in_half(weights: dict[str, Tensor]) -> bytes:
    return blob({name: tensor.half() for name, tensor in weights.items()})


def with_one_missing(weights: dict[str, Tensor]) -> bytes:
    return blob({name: tensor for name, tensor in weights.items() if name != min(weights)})


def truncated(weights: dict[str, Tensor]) -> bytes:
    return blob(weights)[:-64]


def no_safetensors(_: dict[str, Tensor]) -> bytes:
    return json.dumps({"weights": "none"}).encode()


def test_server_refuses_bad_uploads_and_then_takes_the_right_one(place: Place, small_model: Path) -> None:
    server = place.serve(SETTINGS)
    weights = right_weights(read_config(small_model), in_settings(server))
    with in_a_round(server, "mallory") as client:
        for spoil in (misnamed, misshapen, with_nan, in_half, with_one_missing, truncated, no_safetensors):
            data = spoil(weights)
            assert isinstance(client.upload(data), Uploaded)
            answer = client.update(0, data)
            assert isinstance(answer, Failed), spoil
            assert answer.code == "bad_tensor", (spoil, answer)
            assert answer.remedy
        right = blob(weights)
        client.upload(right)
        wrong = client.update(0, right + b"x")  # the hash of something else
        assert isinstance(wrong, Failed)
        assert wrong.code == "not_found"
        oversize = client.ask(Upload(0, 0, "ab" * 32, 0, 1 << 40, TensorBytes("u8", (1,), b"x")))
        assert isinstance(oversize, Failed)
        assert oversize.code == "over_limit"
        gap = client.ask(Upload(0, 0, "ab" * 32, len(right) + 9, len(right) + 99, TensorBytes("u8", (1,), b"x")))
        assert isinstance(gap, Failed)
        client.upload(right)
        greedy = client.update(0, right, tokens=10**9)  # more than a round has
        assert isinstance(greedy, Failed)
        assert greedy.code == "over_limit"
        assert not list((place.folder / "server").glob("rounds/*"))
        client.upload(right)
        merged = client.update(0, right)
        assert isinstance(merged, RoundDurable)
        assert merged.merged
    server.command.wait_for("round_durable", round=0)


def test_server_refuses_an_upload_before_any_round(hall: Server, small_model: Path) -> None:
    weights = blob(right_weights(read_config(small_model), in_settings(hall)))
    with RawClient(hall.url, "early") as client:
        client.upload(weights)
        answer = client.update(0, weights)
        assert isinstance(answer, Failed)
        assert answer.code == "wrong_round"


def in_settings(server: Server) -> Any:
    with RawClient(server.url, "reader") as client:
        return client.settings


def test_server_refuses_what_is_no_request_and_keeps_the_session(hall: Server) -> None:
    with RawClient(hall.url, "twice") as client:
        token = client.greeting.session
        refusal = client.say(Hello((1,), "twice"))
        assert isinstance(refusal, Refused)
    with RawClient(hall.url, "twice", resume=token) as client:
        assert client.greeting.resumed
