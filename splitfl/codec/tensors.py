"""Torch tensors to wire bytes and back. The wire knows bytes; whether they are sound numbers is checked here.

``fp32`` is exact. ``bf16`` halves the bytes and rounds to 8 bits of mantissa. A codec is a row in ``CODECS``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from splitfl.errors import NumericalError, ProtocolError
from splitfl.wire.messages import TensorBytes

# Received bytes are read-only, and nobody here writes to a tensor over them. Torch warns of it once in a process:
# let it do so here, unheard.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

CodecName = Literal["fp32", "bf16"]

#: codec -> (torch dtype that is sent, the wire's name of it)
CODECS: dict[str, tuple[torch.dtype, str]] = {"fp32": (torch.float32, "f32"), "bf16": (torch.bfloat16, "bf16")}
WIRE_DTYPES = {wire: dtype for dtype, wire in CODECS.values()}


def encode_tensor(tensor: Tensor, codec: CodecName) -> TensorBytes:
    """Any float tensor -> bytes. Raises NumericalError for NaN or infinity: they are refused at home first."""
    check_finite(tensor, "what is about to be sent")
    dtype, wire = CODECS[codec]
    sent = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return TensorBytes(wire, tuple(sent.shape), sent.reshape(-1).view(torch.uint8).numpy().data)


def decode_tensor(payload: TensorBytes, device: torch.device, *, what: str) -> Tensor:
    """Bytes -> an fp32 tensor on ``device``, never to be written to in place. ``what`` names it in errors.

    Raises ProtocolError for bytes that are not floats, NumericalError for NaN or infinity.
    """
    dtype = WIRE_DTYPES.get(payload.dtype)
    if dtype is None:
        raise ProtocolError(f"{what} came as {payload.dtype}, which is no float codec", field=what)
    if payload.nbytes == 0:
        raise ProtocolError(f"{what} is empty", field=what)
    view = torch.frombuffer(payload.data, dtype=dtype)
    tensor = view.reshape(payload.shape).to(device=device, dtype=torch.float32)
    check_finite(tensor, what)
    return tensor


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
