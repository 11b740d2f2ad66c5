"""Bytes <-> message: ``u32 header length | msgpack header | tensor bytes | u32 checksum``.

The header is a msgpack map: the message's type ``t``, its plain fields, and ``x``, a list of
``[field, dtype, shape]`` for the tensors, whose bytes follow in that order. The first tensor and each further
one start at a multiple of 64 bytes from the frame's start, so that a receiver can use them where they lie.
Lengths are checked before anything is allocated, and a tensor in a decoded message is a view of the received
bytes: never write to it.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from functools import cache
from typing import Any, cast, get_type_hints

import msgpack
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from splitfl.errors import ProtocolError
from splitfl.wire.checksum import checksum
from splitfl.wire.messages import ELEMENT_BYTES, MESSAGE_TYPES, TYPE_NAMES, Message, TensorBytes, expected_bytes

ALIGNMENT = 64  # bytes
CHECKSUM_BYTES = 4
MAX_HEADER_BYTES = 256 << 10
MAX_FRAME_BYTES = 1 << 30
MAX_ARRAY_ITEMS = 4096  # msgpack allocates what an array claims, and nested ones add up
MAX_DIMENSIONS = 8
MAX_TENSORS = 4

Parts = list[bytes | memoryview]


class DamagedError(ProtocolError):
    """Bytes that changed on the way: whoever sent them has them still, and sends them again on a new connection."""


def encode(message: Message) -> Parts:
    """Message -> the frame's bytes, in parts that are to be sent one after another; tensor bytes are not copied."""
    fields: dict[str, Any] = {"t": TYPE_NAMES[type(message)]}
    tensors: list[tuple[str, TensorBytes]] = []
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, TensorBytes):
            tensors.append((field.name, value))
        elif value is not None:
            fields[field.name] = value
    if tensors:
        fields["x"] = [[name, tensor.dtype, tensor.shape] for name, tensor in tensors]
    header = cast(bytes, msgpack.packb(fields))
    parts: Parts = [struct.pack("<I", len(header)) + header]
    position = len(parts[0])
    for name, tensor in tensors:
        view = memoryview(tensor.data)
        view = view.cast("B") if view.nbytes else memoryview(b"")
        if len(view) != tensor.nbytes:
            raise ProtocolError(f"field {name!r} holds {len(view)} bytes for {tensor.nbytes}", field=name)
        padding = -position % ALIGNMENT
        parts += [bytes(padding), view]
        position += padding + len(view)
    return [*parts, struct.pack("<I", checksum(parts))]


def frame_bytes(parts: Parts) -> int:
    """Length of an encoded frame."""
    return sum(len(part) for part in parts)


def decode(data: bytes | memoryview, *, max_bytes: int = MAX_FRAME_BYTES) -> Message:
    """One whole frame -> its message. Raises DamagedError, or ProtocolError that names the offending field."""
    view = memoryview(data).cast("B")
    if len(view) > max_bytes:
        raise ProtocolError(f"a frame of {len(view)} bytes is over the limit of {max_bytes}", field="frame")
    view = undamaged(view)
    fields, position = read_header(view)
    name = fields.pop("t", None)
    cls = MESSAGE_TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise ProtocolError(f"message type {str(name)[:40]!r} is unknown", "Update the older side.", field="t")
    listed = fields.pop("x", ())
    tensors = read_tensors(view, position, listed)
    for field in fields.keys() & tensors.keys():
        raise ProtocolError(f"{name}: field {field!r} comes twice", field=field)
    fields.update(tensors)
    try:
        return cast(Message, cls(**dict(checker(cls)(**fields))))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0])[:64] if first["loc"] else ""
        raise ProtocolError(f"{name}: field {field!r} is wrong: {first['msg']}", field=field) from error


def undamaged(view: memoryview) -> memoryview:
    """A frame without its checksum. Raises DamagedError when the two do not fit."""
    body, end = view[:-CHECKSUM_BYTES], view[-CHECKSUM_BYTES:]
    if len(end) < CHECKSUM_BYTES or struct.unpack("<I", end) != (checksum([body]),):
        raise DamagedError(f"a frame of {len(view)} bytes was damaged on the way", "Send it again.", field="frame")
    return body


@cache
def checker(cls: type) -> type[BaseModel]:
    """A pydantic model with the fields of a message class: strict types, bounds as annotated, nothing extra."""
    hints = get_type_hints(cls, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(cls)
    }
    return create_model(cls.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def read_header(view: memoryview) -> tuple[dict[str, Any], int]:
    """The header's map, and where it ends."""
    if len(view) < 4:
        raise ProtocolError("a frame shorter than its own length field", field="frame")
    (length,) = struct.unpack_from("<I", view)
    if length > MAX_HEADER_BYTES or 4 + length > len(view):
        raise ProtocolError(f"a header of {length} bytes is over the limit or runs past the frame", field="header")
    try:
        fields = msgpack.unpackb(
            view[4 : 4 + length],
            use_list=False,
            strict_map_key=True,
            max_str_len=MAX_HEADER_BYTES,
            max_array_len=MAX_ARRAY_ITEMS,
            max_map_len=64,
            max_bin_len=0,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError("the header is not a msgpack map", field="header") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ProtocolError("the header is not a map of named fields", field="header")
    return fields, 4 + length


def read_tensors(view: memoryview, position: int, listed: Any) -> Mapping[str, TensorBytes]:
    """Slice the tensors out of the frame, checking each shape against the bytes that are there."""
    if not isinstance(listed, tuple) or len(listed) > MAX_TENSORS:
        raise ProtocolError("the tensor list is malformed", field="x")
    tensors: dict[str, TensorBytes] = {}
    for item in listed:
        name, dtype, shape = read_tensor_entry(item)
        if name in tensors:
            raise ProtocolError(f"field {name!r} comes twice", field=name)
        position += -position % ALIGNMENT
        size = expected_bytes(dtype, shape)
        if size > len(view) - position:
            raise ProtocolError(
                f"field {name!r} claims {size} bytes ({dtype} {list(shape)}), the frame has {len(view) - position}",
                field=name,
            )
        tensors[name] = TensorBytes(dtype, shape, view[position : position + size])
        position += size
    if position != len(view):
        raise ProtocolError(f"{len(view) - position} bytes are left over behind the last tensor", field="frame")
    return tensors


def read_tensor_entry(item: Any) -> tuple[str, str, tuple[int, ...]]:
    """Check one ``[field, dtype, shape]``."""
    if not (isinstance(item, tuple) and len(item) == 3 and isinstance(item[0], str) and len(item[0]) <= 64):
        raise ProtocolError("an entry of the tensor list is malformed", field="x")
    name, dtype, shape = item
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ProtocolError(f"field {name!r} has unknown dtype {str(dtype)[:20]!r}", field=name)
    sizes = isinstance(shape, tuple) and len(shape) <= MAX_DIMENSIONS
    if not sizes or not all(type(size) is int and 0 <= size <= 2**40 for size in shape):
        raise ProtocolError(f"field {name!r} has a malformed shape", field=name)
    return name, dtype, shape
