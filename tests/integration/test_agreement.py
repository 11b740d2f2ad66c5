"""Nothing leaves before the terms are accepted; a change of them stops the client; export obeys them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Place, Settings, agreements, place, with_settings

SETTINGS: Settings = {
    "rounds": {"count": 1, "local_steps": 2},
    "batch": {"records": 4, "max_length": 32},
    "evaluation": {"records": 2},
    "privacy": {"mode": "measured"},
    "agreement": {"owner": "Ward A", "exporters": ["research-office"]},
}
REFUSED = 10  # exit code of PrivacyError


@pytest.fixture
def here(tmp_path: Path, small_model: Path) -> Iterator[Place]:
    with place(tmp_path, small_model) as made:
        yield made


def test_nothing_leaves_before_the_terms_are_accepted(here: Place, wards: dict[str, Path]) -> None:
    server = here.serve(SETTINGS)
    agreement, here.agreement = here.agreement, ""
    agreements.clear()
    client = here.join(server.url, "a", wards["a"])
    assert client.wait() == REFUSED
    assert re.search(r"owner +Ward A\n", client.stderr)
    assert f"--accept {agreement[:12]}" in client.error
    assert not client.named("step")
    wrong = here.join(server.url, "a", wards["a"], "--accept", "0" * 64)
    assert wrong.wait() == REFUSED
    assert f"is not the hash of these terms ({agreement[:12]}...)" in wrong.error
    assert not wrong.named("step")
    accepted = here.join(server.url, "a", wards["a"], "--accept", agreement[:12])
    assert accepted.wait() == 0
    assert accepted.report["privacy"]["mode"] == "measured"
    assert server.command.wait() == 0
    refused = here.run("export", "export", here.folder / "out", "--state", here.folder / "server")
    assert refused.wait() == REFUSED
    assert "research-office" in refused.error
    allowed = ("--state", here.folder / "server", "--as", "research-office")
    assert here.run("export", "export", here.folder / "out", *allowed).wait() == 0
    assert "measured" in (here.folder / "out" / "README.md").read_text()


def test_a_change_of_the_terms_stops_the_client_until_they_are_accepted_again(
    here: Place, wards: dict[str, Path]
) -> None:
    two = with_settings(SETTINGS, rounds={"min_clients": 2})
    server = here.serve(two)
    client = here.join(server.url, "a", wards["a"])
    client.wait_for("waiting")
    server.command.kill()
    shutil.rmtree(here.folder / "server")
    weaker = with_settings(two, privacy={"noise_multiplier": 0.01})
    agreed, _ = here.agreement, here.serve(weaker, port=server.port)
    assert client.wait() == REFUSED
    assert here.agreement != agreed
    assert f"--accept {here.agreement[:12]}" in client.error


def test_client_with_a_floor_takes_part_in_nothing_weaker(here: Place, wards: dict[str, Path]) -> None:
    server = here.serve(SETTINGS)
    client = here.join(server.url, "a", wards["a"], "--privacy", "certified:8")
    assert client.wait() == REFUSED
    assert '"measured"' in client.error
    plain_weights = here.join(server.url, "a", wards["a"], "--privacy", "measured:0.3")
    assert plain_weights.wait() == REFUSED
    assert "the noise of its weights is 0" in plain_weights.error
    assert here.join(server.url, "a", wards["a"], "--privacy", "measured").wait() == 0


def test_client_with_an_older_ledger_is_stopped(here: Place, wards: dict[str, Path]) -> None:
    server = here.serve(with_settings(SETTINGS, rounds={"count": 3, "local_steps": 4}))
    client = here.join(server.url, "a", wards["a"])
    client.wait_for("step", count=2)
    state = here.folder / "client-a"
    client.kill()
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    again = here.join(server.url, "a", wards["a"])
    assert again.wait() == REFUSED
    assert "countersigned" in again.error
    assert not again.named("step")
