"""A client that is cut off after the last round has all it needs: its report comes with the server and without it."""

from __future__ import annotations

from pathlib import Path

from processes import Place

SETTINGS = {
    "rounds": {"count": 1, "local_steps": 25},
    "batch": {"records": 2, "max_length": 32},
    "evaluation": {"records": 4},
    "privacy": {"mode": "measured"},
}


def test_plug_pulled_during_the_baselines_costs_no_more_than_the_baselines(
    place: Place, wards: dict[str, Path]
) -> None:
    server = place.serve(SETTINGS)
    client = place.join(server.url, "a", wards["a"])
    client.wait_for("baselines")
    client.kill()
    server.command.kill()

    alone = place.join(server.url, "a", wards["a"])
    assert alone.wait() == 0, alone.story()
    assert "the rounds are over" in alone.stderr
    report = alone.report
    assert (report["rounds_taken"], report["baselines"], report["uncounted_starts"]) == (1, None, 1)
    assert report["privacy"]["left"]["activations"]["releases"]
    assert Path(report["weights"]).exists()

    again = server.again()
    client = place.join(again.url, "a", wards["a"])
    assert client.wait() == 0, client.story()
    assert client.report["baselines"]["top_only"] is not None
    assert client.report["held_out_losses"][-1] == report["held_out_losses"][-1]
