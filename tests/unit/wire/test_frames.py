"""Frames, byte for byte: golden ones both ways, and each limit, whose error names the field at fault."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any

import msgpack
import pytest

from splitfl.errors import ProtocolError
from splitfl.wire.checksum import BLOCK_BYTES
from splitfl.wire.frames import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    MAX_ARRAY_ITEMS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    DamagedError,
    decode,
    encode,
    frame_bytes,
)
from splitfl.wire.messages import (
    MESSAGE_TYPES,
    AskAuthority,
    AskHeld,
    Authority,
    Backward,
    Bye,
    Chunk,
    Countersign,
    Countersigned,
    Echo,
    Echoed,
    Enrol,
    Enrolled,
    Failed,
    Farewell,
    Fetch,
    Finished,
    Forward,
    Gradient,
    Held,
    Hello,
    Hidden,
    Message,
    Missing,
    NextRound,
    Refused,
    Release,
    RoundDurable,
    RoundOpen,
    SitOut,
    StepMissed,
    TensorBytes,
    Update,
    Upload,
    Uploaded,
    Welcome,
)

HASH = "ab" * 32
RECORD = "cd" * 16
SIGNATURE = "ef" * 64
# the same as 2 + 64 bytes of msgpack: a string of up to 255 bytes, and 64 of them
HASH_HEX = "d940" + "6162" * 32
ABC = TensorBytes("u8", (3,), b"abc")
PEM = "-----BEGIN X-----\nYWJj\n-----END X-----\n"
PEM_HEX = "d927" + PEM.encode().hex()
FLOATS = TensorBytes("f32", (1, 1, 2), bytes.fromhex("0000803f 000000c0"))  # 1.0, -2.0

#: messages and their frames, but for the checksum at the end
GOLDEN: list[tuple[Message, str]] = [
    (
        Hello((1,), "ward-a"),
        "67000000 8b a174a568656c6c6f a876657273696f6e739101 a46e616d65a6776172642d61 a6726573756d65a0"
        "a56672657368c2 a5726f756e64ff a86e5f626f74746f6dff a56e5f746f70ff a8736f667477617265a0"
        "ad6d6963726f5f6261746368657300 a5636f646563a0",
    ),
    (
        Welcome(1, "s1", False, "i1", -1, 2, 1, "{}", HASH, HASH),
        "4a0100008da174a777656c636f6d65a776657273696f6e01a773657373696f6ea27331a7726573756d6564c2ab"
        "696e6361726e6174696f6ea26931a5726f756e64ffa86e5f626f74746f6d02a56e5f746f7001a873657474696e"
        "6773a27b7da86d616e6966657374"
        + HASH_HEX
        + "a67369676e6572"
        + HASH_HEX
        + "ab6c65646765725f726f777300ab6c65646765725f68656164d940303030303030303030303030303030303030"
        "303030303030303030303030303030303030303030303030303030303030303030303030303030303030303030"
        "30",
    ),
    (
        Refused("version", "old", "update"),
        "31000000 84 a174a772656675736564 a4636f6465a776657273696f6e a6726561736f6ea36f6c64"
        "a672656d656479a6757064617465",
    ),
    (AskAuthority(), "11000000 81 a174ad61736b5f617574686f72697479"),
    (Authority(PEM), "42000000 82 a174a9617574686f72697479 ab6365727469666963617465" + PEM_HEX),
    (
        Enrol("ward-a", "t1", PEM),
        "4f000000 84 a174a5656e726f6c a46e616d65a6776172642d61 a5746f6b656ea27431 a772657175657374" + PEM_HEX,
    ),
    (Enrolled(PEM), "41000000 82 a174a8656e726f6c6c6564 ab6365727469666963617465" + PEM_HEX),
    (
        Fetch(0, 0, HASH, 0, 1024),
        "6d000000 86 a174a56665746368 a373657100 a361636b00 a6736861323536"
        + HASH_HEX
        + "a66f666673657400 a56c696d6974cd0400",
    ),
    (NextRound(1, 1, -1), "1f000000 84 a174aa6e6578745f726f756e64 a373657101 a361636b01 a56166746572ff"),
    (
        Echo(8, 8, ABC, 2),
        "26000000 85 a174a46563686f a373657108 a361636b08 a477616e7402 a178 91 93a464617461a27538 9103"
        + "00" * 22
        + "616263",
    ),
    (
        AskHeld(7, 7, (RECORD,)),
        "4100000084a174a861736b5f68656c64a373657107a361636b07a77265636f72647391d9206364636463646364"
        "636463646364636463646364636463646364636463646364",
    ),
    (
        Release(8, 7, (RECORD,), TensorBytes("bf16", (1, 1, 2), bytes(range(4)))),
        "5400000085a174a772656c65617365a373657108a361636b07a77265636f72647391d920636463646364636463"
        "6463646364636463646364636463646364636463646364a1789193a668696464656ea462663136930101020000"
        "000000000000000000000000000000000000000000000000000000000000000000000000000000010203",
    ),
    (
        Countersign(9, 7, 5, HASH),
        "6600000085a174ab636f756e7465727369676ea373657109a361636b07a4726f777305a468656164" + HASH_HEX,
    ),
    (
        Forward(2, 2, 0, 0, 0, True, 7, (2,), TensorBytes("bf16", (1, 2, 2), bytes(range(8)))),
        "650000008ba174a7666f7277617264a373657102a361636b02a5726f756e6400a47374657000a56d6963726f00"
        "a5747261696ec3ac6c6162656c5f746f6b656e7307a76c656e677468739102a77265636f72647390a1789193a6"
        "68696464656ea46266313693010202000000000000000000000000000000000000000000000000010203040506"
        "07",
    ),
    (
        Forward(2, 2, 0, 0, 0, False, 7, (), None, (RECORD,)),
        "720000008aa174a7666f7277617264a373657102a361636b02a5726f756e6400a47374657000a56d6963726f00"
        "a5747261696ec2ac6c6162656c5f746f6b656e7307a76c656e6774687390a77265636f72647391d92063646364"
        "63646364636463646364636463646364636463646364636463646364",
    ),
    (
        Backward(3, 3, 0, 0, 0, FLOATS),
        "3f000000 87 a174a86261636b77617264 a373657103 a361636b03 a5726f756e6400 a47374657000 a56d6963726f00"
        "a178 91 93a86772616469656e74a3663332 93010102" + "00" * 61 + "0000803f 000000c0",
    ),
    (SitOut(4, 4, 0, 1), "22000000 85 a174a77369745f6f7574 a373657104 a361636b04 a5726f756e6400 a47374657001"),
    (
        Upload(4, 4, HASH, 0, 3, ABC),
        "7a000000 87 a174a675706c6f6164 a373657104 a361636b04 a6736861323536"
        + HASH_HEX
        + "a66f666673657400 a5746f74616c03 a178 91 93a464617461a27538 9103 0000 616263",
    ),
    (
        Update(5, 5, 0, 7, HASH),
        "6c000000 86 a174a6757064617465 a373657105 a361636b05 a5726f756e6400 a6746f6b656e7307 a6736861323536"
        + HASH_HEX,
    ),
    (
        Bye(6, 6, "finished"),
        "21000000 84 a174a3627965 a373657106 a361636b06 a6726561736f6ea866696e6973686564",
    ),
    (
        Chunk(0, HASH, 0, 3, ABC),
        "74000000 86 a174a56368756e6b a373657100 a6736861323536"
        + HASH_HEX
        + "a66f666673657400 a5746f74616c03 a178 91 93a464617461a27538 9103 0000000000000000 616263",
    ),
    (
        RoundOpen(1, 0, ""),
        "23000000 84 a174aa726f756e645f6f70656e a373657101 a5726f756e6400 a777656967687473a0",
    ),
    (
        Finished(1, 3, HASH),
        "62000000 84 a174a866696e6973686564 a373657101 a5726f756e6403 a777656967687473" + HASH_HEX,
    ),
    (
        Echoed(8, ABC),
        "1d000000 83 a174a66563686f6564 a373657108 a178 91 93a464617461a27538 9103" + "00" * 31 + "616263",
    ),
    (
        Held(7, (True, False)),
        "1500000083a174a468656c64a373657107a468656c6492c3c2",
    ),
    (
        Missing(2, 0, 0, 0, (RECORD,)),
        "4f00000086a174a76d697373696e67a373657102a5726f756e6400a47374657000a56d6963726f00a77265636f"
        "72647391d9206364636463646364636463646364636463646364636463646364636463646364",
    ),
    (
        Countersigned(9, 5, HASH, SIGNATURE),
        "ef00000085a174ad636f756e7465727369676e6564a373657109a4726f777305a468656164"
        + HASH_HEX
        + "a97369676e6174757265d980656665666566656665666566656665666566656665666566656665666566656665"
        "666566656665666566656665666566656665666566656665666566656665666566656665666566656665666566"
        "656665666566656665666566656665666566656665666566656665666566656665666566656665666566656665"
        "6665666566",
    ),
    (
        Hidden(2, 0, 0, 0, TensorBytes("f16", (1, 1, 1), bytes.fromhex("003c"))),  # 1.0
        "36000000 86 a174a668696464656e a373657102 a5726f756e6400 a47374657000 a56d6963726f00"
        "a178 91 93a668696464656ea3663136 93010101 000000000000 003c",
    ),
    (
        Gradient(3, 0, 0, 0, FLOATS),
        "3a000000 86 a174a86772616469656e74 a373657103 a5726f756e6400 a47374657000 a56d6963726f00"
        "a178 91 93a86772616469656e74a3663332 93010102 0000 0000803f 000000c0",
    ),
    (
        Gradient(3, 0, 0, 0, None),
        "25000000 85 a174a86772616469656e74 a373657103 a5726f756e6400 a47374657000 a56d6963726f00",
    ),
    (StepMissed(2, 0, 0), "21000000 84 a174ab737465705f6d6973736564 a373657102 a5726f756e6400 a47374657000"),
    (
        Uploaded(4, HASH, 3),
        "64000000 84 a174a875706c6f61646564 a373657104 a6736861323536" + HASH_HEX + "a8726563656976656403",
    ),
    (
        RoundDurable(5, 0, HASH, True),
        "6f000000 85 a174ad726f756e645f64757261626c65 a373657105 a5726f756e6400 a777656967687473"
        + HASH_HEX
        + "a66d6572676564c3",
    ),
    (Farewell(6), "11000000 82 a174a86661726577656c6c a373657106"),
    (
        Failed(2, "bad_tensor", "NaN", "look", "hidden"),
        "43000000 86 a174a66661696c6564 a373657102 a4636f6465aa6261645f74656e736f72 a6726561736f6ea34e614e"
        "a672656d656479a46c6f6f6b a56669656c64a668696464656e",
    ),
]
NAMED = [pytest.param(message, text, id=type(message).__name__) for message, text in GOLDEN]
MESSAGES = [pytest.param(message, id=type(message).__name__) for message, _ in GOLDEN]
BODIES = [pytest.param(bytes.fromhex(text), id=type(message).__name__) for message, text in GOLDEN]


def sealed(body: bytes) -> bytes:
    """A frame: its body and the checksum, computed the slow way."""
    folded = body[:BLOCK_BYTES]
    for start in range(BLOCK_BYTES, len(body), BLOCK_BYTES):
        block = body[start : start + BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        folded = bytes(one ^ other for one, other in zip(folded, block, strict=True))
    return body + struct.pack("<I", zlib.crc32(folded))


FORWARD = sealed(bytes.fromhex(next(text for message, text in GOLDEN if isinstance(message, Forward))))


def frame(header: Any, tail: bytes = b"") -> bytes:
    """``header`` as msgpack; ``tail`` begins at the first aligned position behind it."""
    packed = header if isinstance(header, bytes) else msgpack.packb(header)
    head = struct.pack("<I", len(packed)) + packed
    return sealed(head + (bytes(-len(head) % ALIGNMENT) + tail if tail else b""))


def taken_apart(message: Message) -> tuple[dict[str, Any], bytes]:
    """The header of a message of at most one tensor, and that tensor's bytes: what ``frame`` puts together again."""
    head, *rest, _ = encode(message)
    return msgpack.unpackb(head[4:]), bytes(rest[-1]) if rest else b""


def hidden(entry: Any, tail: bytes = b"", **extra: Any) -> bytes:
    """A frame of Hidden whose tensor list holds ``entry``."""
    fields = {"t": "hidden", "seq": 0, "round": 0, "step": 0, "micro": 0}
    return frame({**fields, "x": [entry], **extra}, tail)


def refusal(data: bytes, **limits: int) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decode(data, **limits)
    return caught.value


# golden bytes


@pytest.mark.parametrize(("message", "text"), NAMED)
def test_encoder_writes_the_golden_bytes(message: Message, text: str) -> None:
    parts = encode(message)
    frame_ = sealed(bytes.fromhex(text))
    assert b"".join(parts).hex() == frame_.hex()
    assert frame_bytes(parts) == len(frame_)


@pytest.mark.parametrize(("message", "text"), NAMED)
def test_decoder_reads_the_golden_bytes(message: Message, text: str) -> None:
    assert decode(sealed(bytes.fromhex(text))) == message


def test_golden_bytes_cover_every_message() -> None:
    assert {type(message) for message, _ in GOLDEN} == set(MESSAGE_TYPES.values())


@pytest.mark.parametrize("body", BODIES)
def test_decoder_refuses_a_golden_frame_cut_at_any_byte(body: bytes) -> None:
    for length in range(len(body)):
        assert refusal(sealed(body[:length])).field
        assert isinstance(refusal(sealed(body)[:length]), DamagedError)


@pytest.mark.parametrize("body", BODIES)
def test_decoder_refuses_a_golden_frame_with_a_byte_behind_it(body: bytes) -> None:
    assert refusal(sealed(body + b"\0")).field == "frame"


@pytest.mark.parametrize("body", BODIES)
def test_decoder_notices_every_flipped_bit(body: bytes) -> None:
    data = bytearray(sealed(body))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert isinstance(refusal(bytes(data)), DamagedError)
        data[bit // 8] ^= 1 << bit % 8


# tensors


@pytest.mark.parametrize("name_length", range(1, 64, 7))
def test_tensor_starts_at_a_multiple_of_64_behind_any_header(name_length: int) -> None:
    parts = encode(Upload(0, 0, HASH, 0, 10**name_length % 2**53, ABC))
    assert (frame_bytes(parts[:-1]) - 3) % ALIGNMENT == 0


def test_decoder_aligns_each_further_tensor_too() -> None:
    data = frame({"t": "hidden", "x": [["hidden", "u8", [3]], ["more", "u8", [2]]]}, b"abc" + bytes(61) + b"de")
    assert refusal(sealed(data[: -CHECKSUM_BYTES - 1])).field == "more"
    assert refusal(data).field not in {"hidden", "frame"}  # both fit; Hidden has no field "more"


def test_encoder_does_not_copy_a_tensor() -> None:
    data = bytearray(b"abc")
    parts = encode(Upload(0, 0, HASH, 0, 3, TensorBytes("u8", (3,), memoryview(data))))
    data[0] = ord("z")
    assert bytes(parts[-2]) == b"zbc"


def test_decoder_does_not_copy_a_tensor() -> None:
    data = bytearray(FORWARD)
    message = decode(memoryview(data))
    assert isinstance(message, Forward)
    data[-CHECKSUM_BYTES - 1] = 0xEE
    assert message.hidden.data[-1] == 0xEE
    assert isinstance(message.hidden.data, memoryview)
    assert message.hidden.data.obj is data


def test_empty_tensor_takes_no_bytes() -> None:
    message = Hidden(0, 0, 0, 0, TensorBytes("bf16", (0, 2**40), b""))
    data = b"".join(encode(message))
    assert len(data) % ALIGNMENT == CHECKSUM_BYTES
    assert decode(data) == message


@pytest.mark.parametrize(("shape", "data"), [((2,), b"abc"), ((4,), b"abc"), ((0,), b"abc")])
def test_encoder_refuses_a_shape_that_lies(shape: tuple[int, ...], data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        encode(Upload(0, 0, HASH, 0, 3, TensorBytes("u8", shape, data)))
    assert caught.value.field == "data"


@pytest.mark.parametrize("shape", [[2], [4], [2, 2], [1, 2]])
def test_decoder_refuses_a_shape_that_lies(shape: list[int]) -> None:
    assert refusal(hidden(["hidden", "u8", shape], b"abc")).field in {"hidden", "frame"}


def test_decoder_says_which_tensor_claims_too_much() -> None:
    error = refusal(hidden(["hidden", "f32", [1, 2, 3]], b"abc"))
    assert error.field == "hidden"
    assert "24 bytes" in error.message
    assert "[1, 2, 3]" in error.message


@pytest.mark.parametrize(
    "shape",
    [[-1], [3, -1], [True], [False, 3], [2**40 + 1], [2**63], [1.0], ["3"], [None], 3, None, "3", {"a": 1}, [1] * 9],
)
def test_decoder_refuses_a_malformed_shape(shape: Any) -> None:
    assert refusal(hidden(["hidden", "u8", shape], b"a")).field == "hidden"


@pytest.mark.parametrize("dtype", ["f64", "", "U8", "u8 ", 8, None, True, ["u8"]])
def test_decoder_refuses_an_unknown_dtype(dtype: Any) -> None:
    assert refusal(hidden(["hidden", dtype, [1]], b"a")).field == "hidden"


@pytest.mark.parametrize("entry", [None, 3, "hidden", [], ["hidden"], ["hidden", "u8"], ["hidden", "u8", [1], 0]])
def test_decoder_refuses_a_malformed_tensor_entry(entry: Any) -> None:
    assert refusal(hidden(entry, b"a")).field == "x"


@pytest.mark.parametrize("name", [3, None, "n" * 65])
def test_decoder_refuses_a_malformed_tensor_name(name: Any) -> None:
    assert refusal(hidden([name, "u8", [1]], b"a")).field == "x"


@pytest.mark.parametrize("listed", [None, 3, "x", {"hidden": "u8"}, [["hidden", "u8", [0]]] * (MAX_TENSORS + 1)])
def test_decoder_refuses_a_malformed_tensor_list(listed: Any) -> None:
    assert refusal(frame({"t": "hidden", "x": listed})).field == "x"


def test_decoder_refuses_a_field_that_comes_twice() -> None:
    entry = ["hidden", "u8", [1]]
    assert isinstance(decode(hidden(entry, b"a")), Hidden)
    assert refusal(hidden(entry, b"a", hidden=0)).field == "hidden"
    assert refusal(hidden(entry, b"a" + bytes(63) + b"b", x=[entry, entry])).field == "hidden"


def test_decoder_refuses_a_tensor_where_a_number_belongs() -> None:
    assert refusal(frame({"t": "farewell", "x": [["seq", "u8", [1]]]}, b"a")).field == "seq"


def test_decoder_refuses_a_number_where_a_tensor_belongs() -> None:
    fields = {"t": "gradient", "seq": 0, "round": 0, "step": 0, "micro": 0, "gradient": 1}
    assert refusal(frame(fields)).field == "gradient"


# the header


def test_decoder_refuses_a_frame_over_its_limit() -> None:
    assert decode(FORWARD, max_bytes=len(FORWARD))
    error = refusal(FORWARD, max_bytes=len(FORWARD) - 1)
    assert error.field == "frame"
    assert str(len(FORWARD)) in error.message


@pytest.mark.parametrize("length", [18, MAX_HEADER_BYTES + 1, 2**31, 2**32 - 1])
def test_decoder_refuses_a_header_past_the_frame_or_the_limit(length: int) -> None:
    data = b"".join(encode(Farewell(6)))
    assert len(data) == 25
    assert refusal(sealed(struct.pack("<I", length) + data[4:-CHECKSUM_BYTES])).field == "header"


def test_decoder_refuses_a_header_over_the_limit_that_is_all_there() -> None:
    header = msgpack.packb({"t": "farewell", "seq": 0, "pad": "p" * MAX_HEADER_BYTES})
    assert refusal(frame(header)).field == "header"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",  # never used in msgpack
        msgpack.packb([1, 2]),
        msgpack.packb("hello"),
        msgpack.packb(None),
        msgpack.packb({1: 2}),
        msgpack.packb({b"t": "farewell"}),
        msgpack.packb({"t": b"farewell"}),
        msgpack.packb({"t": "farewell", "seq": 0}) + b"\xc0",
        msgpack.packb({"t": "farewell", "seq": msgpack.ExtType(5, b"abc")}),
        msgpack.packb({"t": "farewell", "seq": msgpack.Timestamp(5)}),
        msgpack.packb({str(key): 0 for key in range(65)}),
        b"\x81\xa1t\xa1\xff",  # not UTF-8
    ],
)
def test_decoder_refuses_a_header_that_is_no_map_of_plain_fields(header: bytes) -> None:
    assert refusal(frame(header)).field == "header"


@pytest.mark.parametrize("name", ["", "Hello", "nonsense", "x" * 1000, None, 7, ["hello"]])
def test_decoder_refuses_an_unknown_type(name: Any) -> None:
    assert refusal(frame({"t": name, "seq": 0})).field == "t"


def test_decoder_refuses_a_frame_without_type() -> None:
    assert refusal(frame({"seq": 0})).field == "t"


# fields


@pytest.mark.parametrize("message", MESSAGES)
def test_decoder_refuses_an_extra_field(message: Message) -> None:
    fields, tail = taken_apart(message)
    assert decode(frame(fields, tail)) == message
    assert refusal(frame({**fields, "extra": 1}, tail)).field == "extra"


REQUIRED = [
    (name, field)
    for name, cls in MESSAGE_TYPES.items()
    for field, info in cls.__dataclass_fields__.items()
    if info.default is info.default_factory  # neither is given: both are MISSING
]


@pytest.mark.parametrize(("name", "field"), REQUIRED)
def test_decoder_names_a_missing_field(name: str, field: str) -> None:
    fields, tail = taken_apart(next(message for message, _ in GOLDEN if type(message) is MESSAGE_TYPES[name]))
    if field in fields:
        del fields[field]
    else:
        del fields["x"]  # the field is the message's only tensor
        tail = b""
    assert refusal(frame(fields, tail)).field == field


WRONG = [
    ("farewell", {"seq": -1}, "seq"),
    ("farewell", {"seq": 2**53 + 1}, "seq"),
    ("farewell", {"seq": 2**64 - 1}, "seq"),
    ("farewell", {"seq": True}, "seq"),
    ("farewell", {"seq": 1.0}, "seq"),
    ("farewell", {"seq": "1"}, "seq"),
    ("farewell", {"seq": None}, "seq"),
    ("farewell", {"seq": [1]}, "seq"),
    ("farewell", {"seq": {"a": 1}}, "seq"),
    ("next_round", {"seq": 0, "ack": -1, "after": 0}, "ack"),
    ("next_round", {"seq": 0, "ack": 0, "after": -2}, "after"),
    ("next_round", {"seq": 0, "ack": 0, "after": 2**31 + 1}, "after"),
    ("fetch", {"seq": 0, "ack": 0, "sha256": HASH, "offset": 0, "limit": 0}, "limit"),
    ("fetch", {"seq": 0, "ack": 0, "sha256": HASH, "offset": 0, "limit": (1 << 20) + 1}, "limit"),
    ("fetch", {"seq": 0, "ack": 0, "sha256": HASH.upper(), "offset": 0, "limit": 1}, "sha256"),
    ("fetch", {"seq": 0, "ack": 0, "sha256": HASH + "\n", "offset": 0, "limit": 1}, "sha256"),
    ("fetch", {"seq": 0, "ack": 0, "sha256": "", "offset": 0, "limit": 1}, "sha256"),
    ("update", {"seq": 0, "ack": 0, "round": 0, "tokens": 0, "sha256": HASH[:-1]}, "sha256"),
    ("bye", {"seq": 0, "ack": 0, "reason": "bored"}, "reason"),
    ("failed", {"seq": 0, "code": "no_such_code", "reason": ""}, "code"),
    ("failed", {"seq": 0, "code": "storage", "reason": "r" * 2001}, "reason"),
    ("refused", {"code": "storage", "reason": b"bytes"}, "header"),
    ("hello", {"versions": [0], "name": "a"}, "versions"),
    ("hello", {"versions": 1, "name": "a"}, "versions"),
    ("hello", {"versions": [1, "2"], "name": "a"}, "versions"),
    ("hello", {"versions": [1], "name": ""}, "name"),
    ("hello", {"versions": [1], "name": "../etc"}, "name"),
    ("hello", {"versions": [1], "name": "n" * 65}, "name"),
    ("hello", {"versions": [1], "name": "a", "resume": "no spaces"}, "resume"),
    ("hello", {"versions": [1], "name": "a", "software": "s" * 65}, "software"),
    ("round_durable", {"seq": 0, "round": 0, "weights": "", "merged": 1}, "merged"),
    ("round_durable", {"seq": 0, "round": 0, "weights": None, "merged": True}, "weights"),
]


@pytest.mark.parametrize(("name", "fields", "field"), WRONG)
def test_decoder_names_a_field_that_is_wrong(name: str, fields: dict[str, Any], field: str) -> None:
    error = refusal(frame({"t": name, **fields}))
    assert error.field == field
    assert error.exit_code == 6


def test_refusal_stays_short_whatever_was_sent() -> None:
    for data in (
        frame({"t": "farewell", "seq": 0, "e" * 200_000: 0}),
        frame({"t": "t" * 200_000}),
        hidden(["hidden", "d" * 200_000, [1]]),
        hidden(["\U0010ffff" * 64, "u8", [2**40] * 8]),
    ):
        error = refusal(data)
        assert len(error.message) < 1000  # fits Refused.reason, at most 2000 characters
        assert len(error.field) <= 64  # fits Failed.field


# memory


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        pytest.param(hidden(["hidden", "f32", [2**40] * 8], b"a"), 256 << 10, id="shape"),
        pytest.param(hidden(["hidden", "u8", [2**30]], b"a"), 256 << 10, id="shape just under the limit"),
        pytest.param(frame(b"\x81\xa1t\xdb\xff\xff\xff\xff"), 256 << 10, id="string"),
        pytest.param(frame(b"\x81\xa1t\xdd\xff\xff\xff\xff"), 256 << 10, id="array"),
        pytest.param(frame(b"\x81\xa1t\xdf\xff\xff\xff\xff"), 256 << 10, id="map"),
        pytest.param(frame(b"\x81\xa1t\xc9\xff\xff\xff\xff\x05"), 256 << 10, id="extension"),
        pytest.param(frame(b"\x81\xa1t" + b"\xdc\xff\xff" * 5000), 256 << 10, id="nested arrays"),
        pytest.param(
            frame(b"\x81\xa1t" + struct.pack(">BH", 0xDC, MAX_ARRAY_ITEMS) * 5000),
            48 << 20,
            id="nested arrays just under the limit",
        ),
    ],
)
def test_decoder_allocates_nothing_for_a_huge_claim(data: bytes, limit: int) -> None:
    refusal(data)  # imports and caches come first
    tracemalloc.start()
    try:
        refusal(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit
