"""What the ends take of a strategy: tensors that fit the shared weights, and none where nothing is added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client_model.ends import Ends
from splitfl.config import parse_federation
from splitfl.cut import Cut
from splitfl.errors import ProtocolError
from splitfl.split.checkpoint import CheckpointFolder


def ends_with(model: Path, **merge: Any) -> Ends:
    settings = parse_federation({"merge": merge, "optimizer": {"name": "sgd"}}, "the test")
    return Ends(CheckpointFolder(model), settings, Cut(1, 1), torch.device("cpu"))


def test_variate_of_another_shape_than_its_weight_is_refused(small_model: Path) -> None:
    ends = ends_with(small_model, strategy="scaffold")
    name = ends.beside[0]
    assert name == f"{ends.shared[0]}/control"
    with pytest.raises(ProtocolError, match="another shape"):
        ends.begin_round({name: torch.zeros(1)})


def test_start_of_a_round_is_a_copy(small_model: Path) -> None:
    ends = ends_with(small_model, strategy="fedprox")
    ends.begin_round({})
    start = {name: tensor.clone() for name, tensor in ends.correction_tensors().items()}
    ends.load_weights({name: weight + 1 for name, weight in ends.weights().items()})
    assert all(torch.equal(ends.correction_tensors()[name], tensor) for name, tensor in start.items())
    assert start.keys() == {f"{name}/start" for name in ends.shared}


def test_fedavg_keeps_and_asks_for_nothing(small_model: Path) -> None:
    ends = ends_with(small_model)
    ends.begin_round({})
    ends.end_round(1.0)
    assert (ends.correction_tensors(), ends.beside) == ({}, [])
