"""The demo's report and picture, from canned figures: no model is trained here."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from splitfl.lab.demo.plots import draw
from splitfl.lab.demo.report import as_markdown, print_report, save_report
from splitfl.lab.demo.results import ENDS_ONLY, MERGED_ENDS, TOP_ONLY, DemoResult, Measured, alone, perplexity
from splitfl.lab.demo.scale import DemoScale

EACH = {"local_only", "ends_only", "top_only"}  # models that each client has of its own
CLIENTS = ("cardiology", "oncology", "paediatrics")
LEFT = {"activations": {"releases": 384, "bytes": 1_500_000}, "weights": {"releases": 6, "bytes": 10_700_000}}
STATEMENT = "No guarantee. Not audited yet: `splitfl audit` attacks what left."


def client_report(number: int) -> dict[str, Any]:
    return {
        "bytes": {"bytes_sent": 60_000_000 + number, "bytes_received": 40_000_000 + number},
        "privacy": {
            "mode": "measured",
            "statement": f"{STATEMENT} Activations alone: epsilon = {700 + number}; whole transcript: none.",
            "epsilon_activations": 700.0 + number,
            "stayed": ["the data file", "label ids"],
            "left": LEFT,
            "parties": [{"party": "other clients", "sees": "merged weights", "protection": "nothing but averaging"}],
        },
    }


def losses(*means: float) -> dict[str, Measured]:
    """Clients with different counts of tokens, so that a mean of means would show."""
    counts = (100, 200, 300)
    return {client: Measured(mean * count, count) for client, mean, count in zip(CLIENTS, means, counts, strict=True)}


@pytest.fixture
def result() -> DemoResult:
    falling = [3.5, 2.0, 1.5]
    return DemoResult(
        clients=CLIENTS,
        held_out={
            "before": losses(3.5, 3.7, 4.2),
            "cardiology": losses(0.9, 3.0, 3.9),
            "oncology": losses(2.9, 1.1, 3.3),
            "paediatrics": losses(2.8, 2.9, 0.9),
            "published": losses(3.4, 3.6, 4.0),
            **{alone(ENDS_ONLY, client): losses(1.8, 1.9, 2.0) for client in CLIENTS},
            **{alone(TOP_ONLY, client): losses(1.7, 1.8, 1.9) for client in CLIENTS},
            MERGED_ENDS: losses(1.6, 1.7, 1.6),
            "federated": losses(1.4, 1.6, 1.4),
            "centralised": losses(1.2, 1.4, 1.2),
        },
        curves={kind: dict.fromkeys(CLIENTS, falling) for kind in ("federated", "local_only", "centralised")},
        reports={client: client_report(n) for n, client in enumerate(CLIENTS)},
        peak_rss={"trunk": 590_000_000} | dict.fromkeys(CLIENTS, 480_000_000),
        parameters={"bottom": 450_000, "trunk": 740_000, "top": 450_000},
        seconds={"notes": 1.0, "base model": 50.0, "federation": 45.0, "baselines": 70.0},
        settings=DemoScale().federation(0).model_dump(mode="json"),
        adapted_steps=350,
    )


def test_summary_has_the_keys_that_are_promised(result: DemoResult) -> None:
    summary = result.summary("picture.png")
    assert set(summary) == {"clients", "union", "bytes", "peak_rss", "privacy", "picture"}
    assert summary["clients"]["oncology"] == pytest.approx(
        {
            "before": 3.7,
            "local_only": 1.1,
            "ends_only": 1.9,
            "top_only": 1.8,
            "merged_ends": 1.7,
            "federated": 1.6,
            "centralised": 1.4,
        }
    )
    assert set(summary["union"]) == {"before", "federated", "merged_ends", "centralised", *EACH}
    assert all(set(summary["union"][kind]) == set(CLIENTS) for kind in EACH)
    assert summary["bytes"]["oncology"] == {"sent": 60_000_001, "received": 40_000_001}
    assert summary["peak_rss"]["trunk"] == 590_000_000
    assert summary["privacy"]["mode"] == "measured"
    assert "epsilon = 702" in summary["privacy"]["statement"]  # the client that spent most
    assert summary["privacy"]["left"]["cardiology"] == LEFT
    json.dumps(summary)


def test_union_counts_every_token_once(result: DemoResult) -> None:
    assert result.union("federated") == pytest.approx((1.4 * 100 + 1.6 * 200 + 1.4 * 300) / 600)


def test_best_local_only_is_judged_on_the_union(result: DemoResult) -> None:
    assert result.best_local_only == "paediatrics"
    assert result.federated_wins


def test_report_says_so_when_federated_loses(result: DemoResult) -> None:
    worse = replace(result, held_out={**result.held_out, "federated": losses(4.0, 4.0, 4.0)})
    assert not worse.federated_wins
    assert "does NOT beat every local-only model" in as_markdown(worse, "picture.png")
    assert "beats every local-only model" in as_markdown(result, "picture.png")


def test_report_says_what_activations_add_to_merging(result: DemoResult) -> None:
    assert "the activations are worth +0.167 nats per token" in as_markdown(result, "picture.png")


def test_first_line_says_whether_the_leak_was_earned(result: DemoResult, capsys: pytest.CaptureFixture[str]) -> None:
    figures = "federated model has 1.467 nats per token on average, ends-only 1.900, top-only 1.800, merged ends 1.633."
    assert as_markdown(result, "picture.png").splitlines()[0].startswith("Splitting paid off: ")
    assert as_markdown(result, "picture.png").splitlines()[0].endswith(figures)
    print_report(result, Path("/runs/demo"), Path("/runs/demo/picture.png"))
    assert capsys.readouterr().out.startswith("Splitting paid off: ")


@pytest.mark.parametrize("kind", [ENDS_ONLY, TOP_ONLY, MERGED_ENDS])
def test_first_line_says_so_when_one_of_them_is_better(result: DemoResult, kind: str) -> None:
    names = [kind] if kind == MERGED_ENDS else [alone(kind, client) for client in CLIENTS]
    better = dict.fromkeys(names, losses(1.4, 1.5, 1.4))
    lost = replace(result, held_out={**result.held_out, **better})
    assert not lost.splitting_pays
    assert as_markdown(lost, "picture.png").startswith("Splitting did NOT pay off: ")


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    assert perplexity(1.0) == pytest.approx(math.e)
    assert math.isfinite(perplexity(1e9))


def test_printed_report_is_plain_text_away_from_a_terminal(
    result: DemoResult, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report(result, Path("/runs/demo"), Path("/runs/demo/picture.png"))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 118
    for expected in (
        "1.467 (4.33)",
        "590.0 MB",
        "No guarantee.",
        "16 noised numbers a token",
        "splitfl audit --state clients/cardiology/state --key clients/cardiology/key",
        "nothing but averaging",
        "/runs/demo/picture.png",
        "0.74 M weights",
    ):
        assert expected in text


def test_saved_report_holds_the_summary_and_the_curves(result: DemoResult, tmp_path: Path) -> None:
    save_report(result, tmp_path, tmp_path / "picture.png")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert result.summary("picture.png").items() <= facts.items()
    assert facts["curves"]["federated"]["oncology"] == [3.5, 2.0, 1.5]
    page = (tmp_path / "report.md").read_text()
    assert "![held-out losses](picture.png)" in page
    assert "| oncology | 3.700 | 1.100 | 1.900 | 1.800 | 1.700 | 1.600 | 1.400 |" in page


def test_picture_is_a_png_large_enough_to_read(result: DemoResult, tmp_path: Path) -> None:
    draw(result, tmp_path / "picture.png")
    head = (tmp_path / "picture.png").read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    assert width >= 1200
    assert height >= 800
