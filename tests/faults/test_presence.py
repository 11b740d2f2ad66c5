"""Who is there: dead links end at the liveness limit, slow ones never, late joiners get the newest merge, and the
operator hears by name whom everybody waits for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from proxy import Proxy
from raw_client import RawClient, blob, right_weights
from serving import ServiceThread

from server_model.store import Store
from server_model.waiting import name_the_awaited
from splitfl.config import Federation, parse_federation
from splitfl.files import sha256_of
from splitfl.wire.messages import Bye, Chunk, Failed, Fetch, Forward, Hidden, NextRound, RoundOpen, TensorBytes

HEAD = "lm_head.weight"


def federation(**rounds: Any) -> Federation:
    return parse_federation(
        {
            "rounds": {"count": 9, "local_steps": 1, **rounds},
            "batch": {"records": 4, "max_length": 32},
            "wire": {"codec": "fp32"},
            "trunk": {"grace_s": 0.3},
        },
        "the test",
    )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as entered:
        yield entered


def update(service: ServiceThread, client: RawClient, round_: int, value: float = 0.01) -> Any:
    weights = right_weights(service.coordinator.source.config, client.settings)
    data = blob({name: torch.full_like(tensor, value) for name, tensor in weights.items()})
    client.upload(data)
    return client.update(round_, data)


def in_round(service: ServiceThread, stack: ExitStack, urls: dict[str, str]) -> list[RawClient]:
    """These clients in round 0."""
    service.coordinator.rounds.machine.present.update(urls)
    clients = [stack.enter_context(RawClient(url, name)) for name, url in urls.items()]
    for client in clients:
        client.send(NextRound(0, 0, -1))
    for client in clients:
        assert isinstance(client.hear(), RoundOpen)
    return clients


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_silent_half_open_connection_is_not_waited_for_beyond_the_liveness_limit(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path, silence_limit_s=0.6))
    proxy = stack.enter_context(Proxy(service.url))
    first, _ = in_round(service, stack, {"a": service.url, "b": proxy.url})
    service.spawn(name_the_awaited(service.coordinator.rounds, after_s=0.2))
    proxy.stall()  # no byte more, and nobody hangs up
    assert isinstance(first.forward(0, 0, torch.randn(4, 5, 64)), Hidden)  # it waited for b's, silent itself but alive
    assert service.named("waiting_for", clients=["b"], missing=0)
    assert service.named("left", client="b")
    assert not service.named("disconnected", client="a")
    first.backward(0, 0, torch.randn(4, 5, 64))
    assert update(service, first, 0).merged


def test_slow_client_is_never_thrown_out(small_model: Path, tmp_path: Path, stack: ExitStack) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path, silence_limit_s=0.4))
    proxy = stack.enter_context(Proxy(service.url))
    first, second = in_round(service, stack, {"a": service.url, "b": proxy.url})
    proxy.pause_s = 0.05  # 80 kB a second: its update takes many times the limit, and no pong overtakes it
    began = time.monotonic()
    first.send(Forward(0, 0, 0, 0, 0, True, 20, (), TensorBytes("f32", (4, 5, 64), bytes(5120))))
    assert isinstance(second.forward(0, 0, torch.randn(4, 5, 64)), Hidden)
    assert isinstance(first.hear(), Hidden)
    weights = blob(right_weights(service.coordinator.source.config, second.settings))
    second.upload(weights)
    assert time.monotonic() - began > 5 * service.service.silence_limit_s
    assert not service.named("disconnected")
    assert not service.named("left")


def test_client_that_joins_in_round_7_gets_the_newest_merge(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path))
    first = stack.enter_context(RawClient(service.url, "a"))
    for round_ in range(7):
        assert isinstance(first.next_round(round_ - 1), RoundOpen)
        assert update(service, first, round_, value=0.01 * round_).merged
    service.coordinator.rounds.machine.present.add("c")  # on its way before the next round opens
    late = stack.enter_context(RawClient(service.url, "c"))
    late.send(NextRound(0, 0, -1))
    assert first.next_round(6).round == 7
    opened = late.hear()
    assert opened.round == 7
    listed = late.ask(Fetch(0, 0, opened.weights, 0, 1 << 20))
    assert isinstance(listed, Chunk)
    newest = Store(tmp_path).load(6).merged[HEAD]
    assert newest.unique().tolist() == [pytest.approx(0.06)]
    assert json.loads(bytes(listed.data.data))[HEAD]["sha256"] == sha256_of(newest.numpy().tobytes())


def test_client_that_leaves_and_returns_goes_on_with_the_newest_merge(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(), tmp_path))
    first, second = in_round(service, stack, {"a": service.url, "b": service.url})
    second.ask(Bye(0, 0, "interrupted"))
    assert update(service, first, 0).merged  # nobody waits for it
    again = stack.enter_context(RawClient(service.url, "b"))
    again.send(NextRound(0, 0, -1))
    until(lambda: "b" in service.coordinator.rounds.machine.waiting or service.named("round_open", round=1))
    first.send(NextRound(0, 0, 0))
    opened = again.hear()
    assert (opened.round, opened.weights) == (1, service.coordinator.rounds.weights)


def test_cohort_below_the_minimum_opens_no_round_and_the_operator_hears_how_many_are_missing(
    small_model: Path, tmp_path: Path, stack: ExitStack
) -> None:
    service = stack.enter_context(ServiceThread(small_model, federation(min_clients=2), tmp_path))
    service.spawn(name_the_awaited(service.coordinator.rounds, after_s=0.1))
    first = stack.enter_context(RawClient(service.url, "a"))
    first.send(NextRound(0, 0, -1))
    until(lambda: service.named("waiting_for", clients=[], missing=1))
    early = first.next_round()
    assert isinstance(early, Failed)
    assert early.code == "wrong_round"
    outside = update(service, first, 0)
    assert isinstance(outside, Failed)
    assert outside.code == "wrong_round"
    assert not service.named("round_open")
    second = stack.enter_context(RawClient(service.url, "b"))
    second.send(NextRound(0, 0, -1))
    assert [client.hear().round for client in (first, second)] == [0, 0]
    second.ask(Bye(0, 0, "failed"))  # a round that is open goes on with those who are left
    assert update(service, first, 0).merged
