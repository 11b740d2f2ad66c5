"""``splitfl bench NAME``: figures that anyone can print again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitfl.console import command, note, print_json
from splitfl.cut import Cut
from splitfl.errors import ConfigError

if TYPE_CHECKING:
    from splitfl.lab.bench.harness import Result

NAMES = ("federation", "memory", "overhead", "pipe", "planner", "privacy", "scale", "startup", "wan")


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the result as JSON.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Timed steps (overhead; 12), or public steps of every contender (privacy; 1000).")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint to measure on (privacy); none: one is made.")] = None,
    cut: Annotated[str, typer.Option(help="BOTTOM,TOP: blocks that the client keeps (privacy).")] = "1,1",
    seeds: Annotated[int, typer.Option(help="How often everything is repeated (privacy, federation).")] = 3,
    jobs: Annotated[
        int, typer.Option(help="Rows that are measured at once, sharing the cores (privacy, federation).")
    ] = 1,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps what is finished, to go on there (privacy, federation).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure, print a table, and say which bars hold."""
    with command(verbose=verbose):
        if name not in NAMES:
            raise ConfigError(f"there is no benchmark {name!r}", f"Choose one of {', '.join(NAMES)}.")
        result = run_named(name, steps, model, Cut.parse(cut), seeds, jobs, work)
        value = result.as_json()
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
            draw(result, out)
        if as_json:
            print_json(value)
            return
        for row in result.rows:
            print("  ".join(f"{key}={shown(item)}" for key, item in row.items()))
        for bar in result.bars:
            sign = "<=" if bar.better == "lower" else ">="
            print(f"{'holds' if bar.holds else 'FAILS'}: {bar.name} {bar.value:.3f} {sign} {bar.bar:g}")


def run_named(
    name: str, steps: int | None, model: Path | None, cut: Cut, seeds: int, jobs: int, work: Path | None
) -> Result:
    """Run one benchmark."""
    from splitfl.lab.bench import federation, memory, overhead, pipe, planner, privacy, scale, startup, wan
    from splitfl.lab.bench.contenders import Effort
    from splitfl.lab.bench.hospitals import Scale

    match name:
        case "federation":
            return federation.run(scale=Scale(), seeds=seeds, work=work, jobs=jobs, say=note)
        case "memory":
            return memory.run(say=note)
        case "scale":
            return scale.run(say=note)
        case "planner":
            return planner.run(say=note)
        case "startup":
            return startup.run(say=note)
        case "pipe":
            return pipe.run(say=note)
        case "wan":
            return wan.run(say=note)
        case "privacy":
            scope, effort = privacy.Scope(cut, seeds=seeds), Effort(public_steps=steps or Effort.public_steps)
            return privacy.run(model=model, scope=scope, effort=effort, work=work, jobs=jobs, say=note)
        case _:
            return overhead.run(steps=steps or 12, say=note)


def draw(result: Result, out: Path) -> None:
    """The picture that belongs to a benchmark, if it has one."""
    from splitfl.lab.bench.plots import draw_federation, draw_frontier, draw_planner, draw_scale, draw_timeline

    pictures = {
        "federation": draw_federation,
        "planner": draw_planner,
        "privacy": draw_frontier,
        "scale": draw_scale,
        "wan": draw_timeline,
    }
    if result.bench in pictures:
        pictures[result.bench](result, out / f"{result.bench}.png")


def shown(value: object) -> str:
    """A figure or a spread, short."""
    if isinstance(value, dict):
        return "/".join(shown(item) for item in value.values())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
