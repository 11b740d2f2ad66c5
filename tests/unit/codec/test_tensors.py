"""Tensors to bytes and back: exact or rounded as the codec says, and never a number that is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfl.codec.tensors import CODECS, CodecName, check_finite, decode_tensor, encode_tensor, rounded
from splitfl.errors import NumericalError, ProtocolError
from splitfl.wire.messages import TensorBytes

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def drawn(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(tensor: Tensor, codec: str) -> Tensor:
    payload = encode_tensor(tensor, codec)  # type: ignore[arg-type]
    received = TensorBytes(payload.dtype, payload.shape, memoryview(bytes(payload.data)))
    return decode_tensor(received, CPU, what="hidden")


@given(SHAPES, st.integers(0, 99))
def test_fp32_comes_back_to_the_bit(shape: tuple[int, ...], seed: int) -> None:
    tensor = drawn(shape, seed)
    back = there_and_back(tensor, "fp32")
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e20]))
def test_bf16_comes_back_within_half_a_unit_of_its_mantissa(shape: tuple[int, ...], seed: int, scale: float) -> None:
    tensor = drawn(shape, seed, scale)
    back = there_and_back(tensor, "bf16")
    assert back.shape == tensor.shape
    assert bool(((back - tensor).abs() <= tensor.abs() * 2.0**-8).all())


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e3]))
def test_fp16_comes_back_within_half_a_unit_of_its_mantissa(shape: tuple[int, ...], seed: int, scale: float) -> None:
    tensor = drawn(shape, seed, scale)
    back = there_and_back(tensor, "fp16")
    assert bool(((back - tensor).abs() <= tensor.abs() * 2.0**-11 + 2.0**-25).all())


def test_what_fp16_cannot_hold_is_refused_at_home() -> None:
    with pytest.raises(NumericalError, match="65,504"):
        encode_tensor(torch.tensor([1.0, 70_000.0]), "fp16")


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_codec_does_lose_something_and_only_once(codec: CodecName) -> None:
    tensor = drawn((100,))
    back = rounded(tensor, codec)
    assert not torch.equal(back, tensor)
    torch.testing.assert_close(rounded(back, codec), back, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("codec", CODECS)
def test_rounding_bounds_the_error_of_usual_numbers(codec: CodecName) -> None:
    tensor = drawn((50, 256))
    error = (rounded(tensor, codec) - tensor).square().mean().sqrt() / tensor.square().mean().sqrt()
    assert 0 <= error <= CODECS[codec].rounding


@pytest.mark.parametrize(
    ("codec", "size"), [("fp32", 4 * 7 * 15), ("bf16", 2 * 7 * 15), ("fp16", 2 * 7 * 15), ("int8", (7 + 2) * 15)]
)
def test_codec_takes_as_many_bytes_as_it_says(codec: CodecName, size: int) -> None:
    payload = encode_tensor(drawn((3, 5, 7)), codec)
    assert payload.nbytes == len(memoryview(payload.data)) == size


def test_bytes_are_little_endian_and_row_major() -> None:
    payload = encode_tensor(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "fp32")
    assert bytes(payload.data).hex() == "0000803f000000400000404000008040"
    assert bytes(encode_tensor(torch.tensor([1.0, -2.0]), "bf16").data).hex() == "803f00c0"


@pytest.mark.parametrize(
    "make", [lambda t: t.transpose(0, 1), lambda t: t[::2], lambda t: t.double(), lambda t: t.half()]
)
def test_any_view_and_float_can_be_sent(make: object) -> None:
    tensor = make(drawn((6, 4)))  # type: ignore[operator]
    assert torch.equal(there_and_back(tensor, "fp32"), tensor.float())


def test_tensor_that_asks_for_a_gradient_can_be_sent() -> None:
    tensor = drawn((2, 2)).requires_grad_()
    assert torch.equal(there_and_back(tensor, "fp32"), tensor.detach())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codec", CODECS)
def test_number_that_is_none_is_refused_before_it_leaves(codec: str, value: float) -> None:
    tensor = drawn((4, 4))
    tensor[2, 1] = value
    with pytest.raises(NumericalError, match="NaN or infinity"):
        encode_tensor(tensor, codec)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_number_that_is_none_is_refused_where_it_arrives_and_named(value: float) -> None:
    tensor = drawn((4, 4))
    tensor[2, 1] = value
    payload = TensorBytes("f32", (4, 4), tensor.numpy().tobytes())
    with pytest.raises(NumericalError, match="hidden holds NaN or infinity"):
        decode_tensor(payload, CPU, what="hidden")


def test_number_too_large_for_the_codec_is_refused() -> None:
    with pytest.raises(NumericalError):
        there_and_back(torch.tensor([3.4e38]), "bf16")  # rounds up to infinity


def test_large_numbers_whose_sum_overflows_are_numbers_all_the_same() -> None:
    tensor = torch.full((4,), 3e38)
    check_finite(tensor, "it")
    assert torch.equal(there_and_back(tensor, "fp32"), tensor)


@pytest.mark.parametrize("dtype", ["u8", "i8", "i64", ""])
def test_bytes_that_are_no_float_codec_are_refused(dtype: str) -> None:
    with pytest.raises(ProtocolError) as error:
        decode_tensor(TensorBytes(dtype, (2,), bytes(4)), CPU, what="gradient")
    assert error.value.field == "gradient"


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2)])
def test_tensor_without_a_number_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="hidden is empty"):
        decode_tensor(TensorBytes("f32", shape, b""), CPU, what="hidden")


def test_received_bytes_are_read_where_they_lie() -> None:
    data = bytearray(drawn((4,)).numpy().tobytes())
    tensor = decode_tensor(TensorBytes("f32", (4,), data), CPU, what="hidden")
    data[0:4] = torch.tensor([7.0]).numpy().tobytes()
    assert tensor[0] == 7.0


@pytest.mark.filterwarnings("error")
def test_read_only_bytes_are_read_without_a_word() -> None:
    decode_tensor(TensorBytes("f32", (4,), drawn((4,)).numpy().tobytes()), CPU, what="hidden")
