"""Torch tensors to wire bytes and back. The wire knows bytes; whether they are sound numbers is checked here.

``fp32`` is exact. ``bf16`` halves the bytes and rounds to 8 bits of mantissa, ``fp16`` to 11 but ends at 65,504.
``int8`` takes 1.03 bytes a number (``splitfl/codec/groups.py``). A codec is a row in ``CODECS``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from splitfl.codec.groups import pack_groups, unpack_groups
from splitfl.errors import NumericalError, ProtocolError
from splitfl.wire.messages import TensorBytes

# Received bytes are read-only, and nobody here writes to a tensor over them. Torch warns of it once in a process:
# let it do so here, unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

CodecName = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class Codec:
    """``wire`` is the wire's dtype, ``dtype`` torch's where one is sent as it is; ``rounding`` bounds the error of
    usual numbers in units of their root mean square."""

    wire: str
    dtype: torch.dtype | None
    rounding: float


CODECS: dict[str, Codec] = {
    "fp32": Codec("f32", torch.float32, 2.0**-23),
    "bf16": Codec("bf16", torch.bfloat16, 2.0**-7),
    "fp16": Codec("f16", torch.float16, 2.0**-10),
    "int8": Codec("i8g", None, 2.0**-6),
}
BY_WIRE = {codec.wire: codec for codec in CODECS.values()}


def encode_tensor(tensor: Tensor, codec: CodecName) -> TensorBytes:
    """Any float tensor -> bytes. Raises NumericalError for NaN or infinity: they are refused at home first."""
    check_finite(tensor, "what is about to be sent")
    form, shape = CODECS[codec], tuple(tensor.shape)
    at_home = tensor.detach().to(device="cpu")
    if form.dtype is None:
        return TensorBytes(form.wire, shape, as_bytes(pack_groups(at_home.float())))
    sent = at_home.to(form.dtype).contiguous()
    if form.dtype is torch.float16 and not sent.isfinite().all():
        raise NumericalError("what is about to be sent does not fit fp16, which ends at 65,504", "Use the codec bf16.")
    return TensorBytes(form.wire, shape, as_bytes(sent))


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def decode_tensor(payload: TensorBytes, device: torch.device, *, what: str) -> Tensor:
    """Bytes -> an fp32 tensor on ``device``, never to be written to in place. ``what`` names it in errors.

    Raises ProtocolError for bytes that are not floats, NumericalError for NaN or infinity.
    """
    codec = BY_WIRE.get(payload.dtype)
    if codec is None:
        raise ProtocolError(f"{what} came as {payload.dtype}, which is no codec of numbers", field=what)
    if payload.nbytes == 0:
        raise ProtocolError(f"{what} is empty", field=what)
    if codec.dtype is None:
        tensor = unpack_groups(torch.frombuffer(payload.data, dtype=torch.uint8), payload.shape).to(device)
    else:
        view = torch.frombuffer(payload.data, dtype=codec.dtype)
        tensor = view.reshape(payload.shape).to(device=device, dtype=torch.float32)
    check_finite(tensor, what)
    return tensor


def rounded(tensor: Tensor, codec: CodecName) -> Tensor:
    """What arrives of a float tensor: fp32 of the same shape. Raises NumericalError."""
    return decode_tensor(encode_tensor(tensor, codec), torch.device("cpu"), what="a tensor")


def by_record(payload: TensorBytes) -> list[TensorBytes]:
    """A batch's bytes, record by record."""
    view, count = memoryview(payload.data), payload.shape[0]
    size = payload.nbytes // count
    return [TensorBytes(payload.dtype, payload.shape[1:], view[n * size : (n + 1) * size]) for n in range(count)]


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise NumericalError when ``tensor`` holds NaN or infinity."""
    # the sum is NaN or infinite whenever an element is; it can also overflow, so only then look closer
    if not torch.isfinite(tensor.detach().sum()) and not torch.isfinite(tensor.detach()).all():
        raise NumericalError(f"{what} holds NaN or infinity", "Lower the learning rate, or look at the data.")
