"""Whatever the bytes, decoding ends in a message or a ProtocolError; any message arrives as it was sent."""

from __future__ import annotations

import struct
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitfl.errors import ProtocolError
from splitfl.wire.checksum import checksum
from splitfl.wire.frames import ALIGNMENT, CHECKSUM_BYTES, DamagedError, decode, encode
from splitfl.wire.messages import (
    ELEMENT_BYTES,
    MESSAGE_TYPES,
    Hello,
    Message,
    TensorBytes,
    expected_bytes,
)
from splitfl.wire.session import ClientSession, ServerSession

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FEW, max_examples=200)


@st.composite
def tensors(draw: st.DrawFn) -> TensorBytes:
    dtype = draw(st.sampled_from(sorted(ELEMENT_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = expected_bytes(dtype, shape)
    return TensorBytes(dtype, shape, draw(st.binary(min_size=size, max_size=size)))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Every value that a field's annotation allows, bounds included."""
    base, *notes = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if base is TensorBytes:
        return tensors()
    if get_origin(base) is Literal:
        return st.sampled_from(get_args(base))
    if get_origin(base) is tuple:
        return st.lists(values(get_args(base)[0]), max_size=4).map(tuple)
    if get_args(base):  # a union
        return st.one_of(*(values(member) for member in get_args(base)))
    if base is type(None):
        return st.none()
    if base is bool:
        return st.booleans()
    bounds = [bound for note in notes for bound in note.metadata]
    limit = {
        name: getattr(b, name) for b in bounds for name in ("ge", "le", "max_length", "pattern") if hasattr(b, name)
    }
    if base is int:
        return st.integers(limit["ge"], limit["le"]) | st.sampled_from([limit["ge"], limit["le"]])
    if base is float:
        return st.floats(limit["ge"], limit["le"])
    assert base is str
    if "pattern" in limit:
        return st.from_regex(limit["pattern"].removeprefix("^").removesuffix("$"), fullmatch=True)
    return st.text(max_size=min(limit["max_length"], 40))


def messages_of(cls: type) -> st.SearchStrategy[Message]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{name: values(hint) for name, hint in hints.items()})


MESSAGES = st.one_of(*(messages_of(cls) for cls in MESSAGE_TYPES.values()))
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = sorted({field for cls in MESSAGE_TYPES.values() for field in cls.__dataclass_fields__})
ENTRIES = st.tuples(
    st.sampled_from(FIELDS) | PLAIN,
    st.sampled_from(sorted(ELEMENT_BYTES)) | PLAIN,
    st.lists(st.integers(0, 3) | st.integers(), max_size=3).map(lambda sizes: [s % 2**63 for s in sizes]) | PLAIN,
)


def frame_of(message: Message) -> bytes:
    return b"".join(encode(message))


def sealed(body: bytes) -> bytes:
    """With the right checksum, so that what is behind it is looked at."""
    return body + struct.pack("<I", checksum([body]))


def survives(data: bytes) -> None:
    """Decode by hand and through both sessions: a message that round-trips, or ProtocolError."""
    try:
        message = decode(data)
    except ProtocolError as error:
        assert error.field  # noqa: PT017
        assert len(error.message) < 1000  # noqa: PT017
    else:
        assert decode(frame_of(message)) == message
    for session in (ClientSession(Hello((1,), "a")), ServerSession()):
        try:
            session.receive(data)
        except ProtocolError as error:
            assert error.field  # noqa: PT017


@pytest.mark.parametrize("cls", MESSAGE_TYPES.values(), ids=MESSAGE_TYPES)
def test_any_message_arrives_as_it_was_sent(cls: type) -> None:
    @FEW
    @given(messages_of(cls))
    def arrives(message: Message) -> None:
        data = frame_of(message)
        assert decode(data) == message
        assert frame_of(decode(memoryview(data))) == data

    arrives()


@MANY
@given(st.binary(max_size=300))
def test_decoder_survives_any_bytes(data: bytes) -> None:
    survives(data)
    survives(sealed(data))


@MANY
@given(st.binary(max_size=60), st.binary(max_size=40))
def test_decoder_survives_any_header_bytes(header: bytes, tail: bytes) -> None:
    survives(sealed(struct.pack("<I", len(header)) + header + tail))


@MANY
@given(
    st.sampled_from(sorted(MESSAGE_TYPES)) | PLAIN,
    st.dictionaries(st.sampled_from(FIELDS), PLAIN | st.integers(0, 3), max_size=8),
    st.none() | st.lists(ENTRIES, max_size=6) | PLAIN,
    st.binary(max_size=200),
)
def test_decoder_survives_any_fields(name: Any, fields: dict[str, Any], listed: Any, tail: bytes) -> None:
    header = msgpack.packb({"t": name, **fields, **({} if listed is None else {"x": listed})})
    survives(sealed(struct.pack("<I", len(header)) + header + tail))


@MANY
@given(MESSAGES, st.data())
def test_decoder_survives_flipped_bits(message: Message, choice: st.DataObject) -> None:
    data = bytearray(frame_of(message))
    for bit in choice.draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=4, unique=True)):
        data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedError):
        decode(bytes(data))
    survives(sealed(bytes(data[:-CHECKSUM_BYTES])))


@MANY
@given(MESSAGES, MESSAGES, st.data())
def test_decoder_survives_frames_cut_and_joined(one: Message, other: Message, choice: st.DataObject) -> None:
    first, second = frame_of(one), frame_of(other)
    cut = choice.draw(st.integers(0, len(first)))
    joined = first[:cut] + second[choice.draw(st.integers(0, len(second))) :]
    survives(joined)
    survives(sealed(joined))


@FEW
@given(tensors(), st.integers(0, 200))
def test_tensors_of_any_message_lie_aligned(tensor: TensorBytes, reason: int) -> None:
    parts = encode(MESSAGE_TYPES["hidden"](reason, 0, 0, 0, tensor))
    *head, _, _ = parts
    assert sum(len(part) for part in head) % ALIGNMENT == 0
