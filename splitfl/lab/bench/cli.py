"""``splitfl bench NAME``: figures that anyone can print again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from splitfl.console import command, note, print_json
from splitfl.errors import ConfigError

if TYPE_CHECKING:
    from splitfl.lab.bench.harness import Result

NAMES = ("memory", "overhead", "startup")


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of {', '.join(NAMES)}.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the result as JSON.")] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, where the benchmark takes steps.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Measure, print a table, and say which bars hold."""
    with command(verbose=verbose):
        if name not in NAMES:
            raise ConfigError(f"there is no benchmark {name!r}", f"Choose one of {', '.join(NAMES)}.")
        result = run_named(name, steps)
        value = result.as_json()
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
        if as_json:
            print_json(value)
            return
        for row in result.rows:
            print("  ".join(f"{key}={shown(item)}" for key, item in row.items()))
        for bar in result.bars:
            sign = "<=" if bar.better == "lower" else ">="
            print(f"{'holds' if bar.holds else 'FAILS'}: {bar.name} {bar.value:.3f} {sign} {bar.bar:g}")


def run_named(name: str, steps: int) -> Result:
    """Run one benchmark."""
    from splitfl.lab.bench import memory, overhead, startup

    match name:
        case "memory":
            return memory.run(say=note)
        case "startup":
            return startup.run(say=note)
        case _:
            return overhead.run(steps=steps, say=note)


def shown(value: object) -> str:
    """A figure or a spread, short."""
    if isinstance(value, dict):
        return "/".join(shown(item) for item in value.values())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
