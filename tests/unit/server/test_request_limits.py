"""What a client's Forward may say: within the settings that the server sent, or it is refused before anything runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server_model.coordinator import Coordinator
from splitfl.config import parse_federation
from splitfl.errors import ProtocolError, RefusedError
from splitfl.wire.messages import Forward

SETTINGS = parse_federation(
    {"batch": {"records": 8, "max_length": 32, "micro_batches": 2}, "rounds": {"local_steps": 5}}, "the test"
)
FORWARD = Forward(0, 0, 0, 4, 1, True, 4 * 32, (), None)  # the last micro-batch of the last step, as large as can be


def check(request: Forward, batch: int = 4, time: int = 32, lengths: tuple[int, ...] = ()) -> None:
    coordinator, member = SimpleNamespace(settings=SETTINGS), SimpleNamespace(micro_batches=2)
    Coordinator._check_size(cast(Any, coordinator), cast(Any, member), request, batch, time, lengths)


def test_largest_micro_batch_of_the_last_step_is_taken() -> None:
    check(FORWARD)
    check(FORWARD, lengths=(32, 1, 7, 7))


@pytest.mark.parametrize("size", [(5, 32), (4, 33)])
def test_larger_micro_batch_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(RefusedError, match="where 4 x 32 is the most") as refused:
        check(FORWARD, *size)
    assert refused.value.code == "over_limit"


@pytest.mark.parametrize("lengths", [(32, 32, 32), (32, 32, 32, 0), (32, 32, 32, 33)])
def test_lengths_that_do_not_fit_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="lengths do not fit"):
        check(FORWARD, lengths=lengths)


@pytest.mark.parametrize("wrong", [{"label_tokens": 4 * 32 + 1}, {"step": 5}, {"micro": 2}])
def test_step_that_nobody_has_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ProtocolError) as refused:
        check(replace(FORWARD, **wrong))
    assert refused.value.field == next(iter(wrong))


def test_evaluation_has_as_many_batches_as_it_likes() -> None:
    check(replace(FORWARD, train=False, step=0, micro=99))
