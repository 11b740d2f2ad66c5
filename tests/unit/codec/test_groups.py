"""Eight bits a number: bounded by each group's own largest, and by nobody else's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from splitfl.codec.groups import LEVELS, pack_groups, unpack_groups
from splitfl.codec.tensors import by_record, decode_tensor, encode_tensor
from splitfl.errors import ProtocolError
from splitfl.wire.messages import GROUP, expected_bytes

SHAPES = st.lists(st.integers(1, 4), max_size=3).flatmap(lambda head: st.integers(1, 200).map(lambda d: (*head, d)))


def drawn(shape: tuple[int, ...], seed: int, scale: float) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group_maxima(tensor: Tensor) -> Tensor:
    """For each number the largest magnitude of its group, the slow way."""
    most = torch.empty_like(tensor)
    for start in range(0, tensor.shape[-1], GROUP):
        piece = tensor[..., start : start + GROUP]
        most[..., start : start + GROUP] = piece.abs().amax(-1, keepdim=True)
    return most


@given(SHAPES, st.integers(0, 99), st.sampled_from([1e-20, 1.0, 1e20]))
def test_each_number_is_within_half_a_step_of_its_group(shape: tuple[int, ...], seed: int, scale: float) -> None:
    tensor = drawn(shape, seed, scale)
    packed = pack_groups(tensor)
    assert packed.numel() == expected_bytes("i8g", shape)
    back = unpack_groups(packed.flatten(), shape)
    step = group_maxima(tensor) / LEVELS * (1 + 2.0**-7)  # scales are rounded up to bf16
    assert back.shape == tensor.shape
    assert bool(((back - tensor).abs() <= 0.5 * step * (1 + 1e-5)).all())


def test_an_outlier_costs_its_own_group_alone() -> None:
    tensor = drawn((1, 2 * GROUP), 0, 1.0)
    tensor[0, 0] = 1000.0
    error = (unpack_groups(pack_groups(tensor).flatten(), (1, 2 * GROUP)) - tensor).abs()[0]
    assert error[GROUP:].max() < 0.02
    assert error[1:GROUP].max() > 0.5


@pytest.mark.parametrize("tensor", [torch.zeros(3, 70), torch.tensor(2.5), torch.full((1, 1), -1e-42)])
def test_zeros_scalars_and_the_smallest_numbers_pass(tensor: Tensor) -> None:
    payload = encode_tensor(tensor, "int8")
    back = decode_tensor(payload, torch.device("cpu"), what="hidden")
    assert back.shape == tensor.shape
    torch.testing.assert_close(back, tensor, rtol=0.01, atol=1e-40)


def test_records_of_a_batch_are_whole_on_their_own() -> None:
    batch = drawn((3, 5, 70), 0, 1.0)
    together = decode_tensor(encode_tensor(batch, "int8"), torch.device("cpu"), what="hidden")
    for number, payload in enumerate(by_record(encode_tensor(batch, "int8"))):
        assert torch.equal(decode_tensor(payload, torch.device("cpu"), what="hidden"), together[number])


def test_a_scale_below_zero_is_refused() -> None:
    packed = pack_groups(torch.ones(1, 4)).flatten()
    packed[1] |= 0x80  # the sign of the scale, little-endian
    with pytest.raises(ProtocolError, match="scale"):
        unpack_groups(packed, (1, 4))
