"""A client comes back with another --plan: what it trained goes on, as if its cut had always been that one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import Place, place
from safetensors.torch import load_file
from torch import Tensor

SETTINGS = {
    "rounds": {"count": 3, "local_steps": 8},
    "batch": {"records": 4, "max_length": 32},
    "model": {"max_bottom": 2, "freeze_below": 0, "compute": "fp32"},
    "optimizer": {"name": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0},  # each part is clipped by its own norm
    "wire": {"codec": "fp32"},
    "evaluation": {"records": 4},
}


def trained(server: Path) -> dict[str, Tensor]:
    """All weights of the newest round, by name."""
    newest = max((server / "rounds").glob("round-*"))
    return load_file(newest / "trunk.safetensors") | load_file(newest / "merged.safetensors")


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]) -> dict[str, Tensor]:
    """What one client comes to that never stops and keeps its cut."""
    with place(tmp_path_factory.mktemp("steady"), small_model) as here:
        server = here.serve(SETTINGS)
        client = here.join(server.url, "a", wards["a"])
        assert [client.wait(), server.command.wait()] == [0, 0], client.story()
        return trained(here.folder / "server")


@pytest.mark.parametrize("way", ["interrupted", "killed"])
def test_client_that_comes_back_with_another_plan_goes_on(
    place: Place, wards: dict[str, Path], steady: dict[str, Tensor], way: str
) -> None:
    server = place.serve(SETTINGS)
    first = place.join(server.url, "a", wards["a"])
    first.wait_for("step", round=1, step=2)
    if way == "killed":
        first.kill()
    else:
        first.interrupt()
        assert first.wait() == 130, first.story()
    again = place.join(server.url, "a", wards["a"], "--plan", "2,1")
    assert [again.wait(), server.command.wait()] == [0, 0], again.story()
    if way == "interrupted":  # nothing of the round that it stood in is done twice
        assert again.named("resumed", round=1)
        assert "finishing the round that was paused with cut 1,1" in again.stderr
        steps = [(event["round"], event["step"]) for part in (first, again) for event in part.named("step")]
        assert steps == [(round_, step) for round_ in range(3) for step in range(8)]
        assert again.report["starts"] == 2
        received = sum(event["bytes_in"] for event in server.command.named("left", client="a"))
        assert again.report["bytes"]["bytes_sent"] == pytest.approx(received, rel=0.01)  # over both sessions
    (changed,) = again.named("cut_changed")
    assert (changed["before"], changed["now"]) == ("1,1", "2,1")
    assert again.report["cut"] == "2,1"
    assert again.report["rounds_taken"] == 3
    found = trained(place.folder / "server")
    assert found.keys() == steady.keys()
    for name, weight in steady.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


def test_plan_that_is_not_allowed_is_one_error_and_costs_nothing(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    first = place.join(server.url, "a", wards["a"])
    first.wait_for("round_durable", round=0)
    first.kill()
    mistaken = place.join(server.url, "a", wards["a"], "--plan", "3,1")
    assert mistaken.wait() != 0
    assert "cut 3,1 is not allowed here (bottom 1 to 2, top 1 to 1" in mistaken.error
    again = place.join(server.url, "a", wards["a"])
    assert [again.wait(), server.command.wait()] == [0, 0], again.story()
    assert again.report["rounds_taken"] == 3
