"""``splitfl demo`` as a whole at a tiny size: the same processes, sockets and baselines, in seconds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tomllib
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from splitfl.config import parse_federation
from splitfl.errors import INTERRUPTED_EXIT_CODE, ConfigError
from splitfl.lab.demo.plots import draw
from splitfl.lab.demo.report import save_report
from splitfl.lab.demo.results import ENDS_ONLY, TOP_ONLY, DemoResult, alone
from splitfl.lab.demo.scale import CLIENTS, DemoFolder, DemoScale
from splitfl.lab.demo.stages import Demo
from splitfl.lab.demo.views import Screen
from splitfl.split.narrow import read_description

TINY = DemoScale(
    notes=60,
    public_notes=60,
    layers=3,
    hidden=64,
    vocab=400,
    record_tokens=32,
    records=2,
    base_steps=20,
    ends_steps=10,
    adapt_steps=10,
    adapt_records=2,
    rounds=2,
    local_steps=3,
    held_out_fraction=0.1,
    curve_records=4,
)


def tiny_demo(folder: Path, progress: StringIO | None = None) -> Demo:
    console = Console(file=progress if progress is not None else StringIO(), width=120)
    return Demo(DemoFolder(folder), TINY, 0, "cpu", Screen(console))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, str]:
    folder, progress = tmp_path_factory.mktemp("demo") / "run", StringIO()
    return tiny_demo(folder, progress).run(), folder, progress.getvalue()


def test_demo_measures_every_model_on_every_set(finished: tuple[DemoResult, Path, str]) -> None:
    result, folder, _ = finished
    summary = result.summary(str(folder / "picture.png"))
    assert set(summary) == {"clients", "union", "bytes", "peak_rss", "privacy", "picture"}
    each = {"local_only", "ends_only", "top_only"}
    kinds = {"before", "federated", "merged_ends", "centralised", *each}
    assert {client: set(of) for client, of in summary["clients"].items()} == dict.fromkeys(CLIENTS, kinds)
    assert set(summary["union"]) == kinds
    assert all(set(summary["union"][kind]) == set(CLIENTS) for kind in each)
    assert set(summary["peak_rss"]) == {"trunk", *CLIENTS}
    assert all(count > 100_000_000 for count in summary["peak_rss"].values())  # torch alone is more
    assert all(of["sent"] > 10_000 and of["received"] > 10_000 for of in summary["bytes"].values())
    assert summary["privacy"]["mode"] == "measured"
    assert summary["privacy"]["statement"].startswith("No guarantee.")
    assert all("gradients" not in left for left in summary["privacy"]["left"].values())


def test_demo_trains(finished: tuple[DemoResult, Path, str]) -> None:
    result, _, _ = finished
    assert result.union("federated") < result.union("published")
    assert result.union("centralised") < result.union("before")
    for kind in (ENDS_ONLY, TOP_ONLY):
        for client in CLIENTS:
            assert result.own(alone(kind, client), client) < result.own("published", client)


def test_curves_begin_with_the_base_model_or_the_published_one(finished: tuple[DemoResult, Path, str]) -> None:
    result, _, _ = finished
    for client in CLIENTS:
        curves = {kind: result.curves[kind][client] for kind in ("federated", "local_only", "centralised")}
        assert {len(curve) for curve in curves.values()} == {TINY.rounds + 1}
        assert curves["local_only"][0] == curves["centralised"][0]
        published = result.own("published", client)  # on all records, with other noise
        assert curves["federated"][0] == pytest.approx(published, rel=0.1)


def test_federated_model_is_exported_with_its_release(finished: tuple[DemoResult, Path, str]) -> None:
    _, folder, _ = finished
    places = DemoFolder(folder)
    assert read_description(places.exported) == read_description(places.published)


def test_demo_leaves_a_report_a_picture_and_a_recipe(finished: tuple[DemoResult, Path, str]) -> None:
    result, folder, _ = finished
    picture = folder / "picture.png"
    draw(result, picture)
    save_report(result, folder, picture)
    assert picture.stat().st_size > 20_000
    assert json.loads((folder / "report.json").read_text())["picture"] == "picture.png"
    recipe = tomllib.loads((folder / "federation.toml").read_text())
    assert parse_federation(recipe, "federation.toml") == TINY.federation(0)


def test_progress_without_a_terminal_is_lines(finished: tuple[DemoResult, Path, str]) -> None:
    _, _, progress = finished
    assert "\x1b" not in progress
    for expected in (
        "the trunk listens on ws://",
        "after round 2/2",
        "oncology alone",
        "oncology, top-only",
        "all notes in one place",
    ):
        assert expected in progress


def test_demo_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        tiny_demo(tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_interrupted_demo_leaves_no_process_behind(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "splitfl.cli", "demo", "--out", str(tmp_path / "run"), "--json"]
    demo = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stderr is not None
    assert next(line for line in demo.stderr if "Base model and its narrow release" in line)
    worker = first_child(demo.pid)
    demo.send_signal(signal.SIGINT)
    output, _ = demo.communicate(timeout=30)
    assert demo.returncode == INTERRUPTED_EXIT_CODE
    assert output == ""
    assert not worker.is_running()


def first_child(pid: int) -> psutil.Process:
    """The first process that ``pid`` starts."""
    while True:
        children = psutil.Process(pid).children()
        if children:
            return children[0]
