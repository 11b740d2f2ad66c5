"""What a client takes from the trunk: tensors of its own batch's shape, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from client_model.trainer import Trainer
from splitfl.errors import ProtocolError
from splitfl.wire.messages import Gradient, Hidden, TensorBytes

BATCH = SimpleNamespace(input_ids=np.zeros((2, 3), dtype=np.int64))
TRAINER = cast(Trainer, SimpleNamespace(ends=SimpleNamespace(width=4, device=torch.device("cpu"))))


def payload(*shape: int) -> TensorBytes:
    return TensorBytes("f32", shape, bytes(4 * int(np.prod(shape))))


def test_tensor_of_the_batch_is_taken() -> None:
    assert Trainer._like(TRAINER, BATCH, payload(2, 3, 4), "it").shape == (2, 3, 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 3, 4), (2, 4, 4), (6, 4), (2, 3, 4, 1)])
def test_tensor_of_another_shape_is_not(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"it has shape .* not \(2, 3, 4\)"):
        Trainer._like(TRAINER, BATCH, payload(*shape), "it")  # type: ignore[arg-type]


def test_answer_of_another_kind_is_not() -> None:
    assert Hidden is not Gradient
    with pytest.raises(ProtocolError, match="Gradient instead of hidden states"):
        Trainer._decoded(TRAINER, Gradient(0, 0, 0, 0, None), BATCH)  # type: ignore[arg-type]
