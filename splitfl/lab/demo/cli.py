"""``splitfl demo``. What it needs is imported inside, so that --help stays quick."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from splitfl.console import command, print_json


def demo(
    out: Annotated[Path | None, typer.Option(help="New folder for everything; the default is runs/demo-TIME.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of notes, weights and data order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto; the model is so small that cpu serves well.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Train one model for three hospitals on this machine, over real sockets: a report and a picture."""
    with command(verbose=verbose):
        import time

        from rich.console import Console

        from splitfl.lab.demo.plots import draw
        from splitfl.lab.demo.report import print_report, save_report
        from splitfl.lab.demo.scale import DemoFolder, DemoScale
        from splitfl.lab.demo.stages import Demo
        from splitfl.lab.demo.views import Screen

        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, interrupt)
        folder = (out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")).resolve()
        result = Demo(DemoFolder(folder), DemoScale(), seed, device, Screen(Console(stderr=True))).run()
        picture = folder / "picture.png"
        draw(result, picture)
        save_report(result, folder, picture)
        if as_json:
            print_json(result.summary(str(picture)))
        else:
            print_report(result, folder, picture)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Being asked to end, or losing the terminal, is Ctrl-C: the processes that were started must not stay behind."""
    raise KeyboardInterrupt
