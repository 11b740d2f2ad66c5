"""The one door out: what passes is counted by kind; what is not a number does not pass and is not counted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from splitfl.codec.tensors import CodecName, decode_tensor
from splitfl.errors import NumericalError
from splitfl.privacy.gate import STATEMENT, Gate, ReleaseKind

BAD = [float("nan"), float("inf"), -float("inf")]


def hidden(seed: int = 0) -> Tensor:
    return torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))  # (B, T, D)


@pytest.mark.parametrize(("codec", "element_bytes"), [("fp32", 4), ("bf16", 2)])
def test_gate_counts_each_release_and_its_bytes(codec: CodecName, element_bytes: int) -> None:
    gate = Gate(codec)
    for seed in range(3):
        gate.release(ReleaseKind.ACTIVATION, hidden(seed))
    gate.release(ReleaseKind.GRADIENT, hidden())
    assert gate.report()["left"] == {
        "activations": {"releases": 3, "bytes": 3 * 40 * element_bytes},
        "gradients": {"releases": 1, "bytes": 40 * element_bytes},
    }


def test_gate_tells_held_out_records_from_the_others() -> None:
    gate = Gate("fp32")
    gate.release(ReleaseKind.ACTIVATION, hidden())
    gate.release(ReleaseKind.HELD_OUT_ACTIVATION, hidden())
    assert gate.releases == {"activations": 1, "activations of held-out records": 1}


def test_what_leaves_is_the_tensor_itself() -> None:
    payload = Gate("fp32").release(ReleaseKind.ACTIVATION, hidden())
    assert torch.equal(decode_tensor(payload, torch.device("cpu"), what="hidden"), hidden())


@pytest.mark.parametrize("kind", ReleaseKind)
@pytest.mark.parametrize("bad", BAD)
def test_tensor_that_is_not_finite_does_not_leave_and_is_not_counted(kind: ReleaseKind, bad: float) -> None:
    gate, tensor = Gate("bf16"), hidden()
    tensor[1, 2, 3] = bad
    with pytest.raises(NumericalError):
        gate.release(kind, tensor)
    assert gate.report()["left"] == {}


def test_weights_leave_exact_whatever_the_codec_and_are_counted() -> None:
    gate = Gate("bf16")
    weights = {"head": hidden()[0], "transposed": hidden()[0].t()}  # the second is not contiguous
    data = gate.release_weights(weights)
    got = load(data)
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)
    assert gate.report()["left"] == {"weights": {"releases": 1, "bytes": len(data)}}


@pytest.mark.parametrize("bad", BAD)
def test_weights_that_are_not_finite_do_not_leave_and_are_named(bad: float) -> None:
    gate = Gate("fp32")
    with pytest.raises(NumericalError, match="weight 'b'"):
        gate.release_weights({"a": torch.ones(2), "b": torch.tensor([0.0, bad])})
    assert gate.report()["left"] == {}


def test_report_of_a_gate_through_which_nothing_went_says_what_off_means() -> None:
    report = Gate("fp32").report()
    assert report["mode"] == "off"
    assert report["statement"] == STATEMENT
    assert report["left"] == {}
    assert "the data file" in report["stayed"]  # type: ignore[operator]
    assert "this client's name" in report["told"]  # type: ignore[operator]


def test_report_counts_nothing_by_being_read() -> None:
    gate = Gate("fp32")
    gate.release(ReleaseKind.GRADIENT, hidden())
    assert gate.report() == gate.report()
