"""``splitfl audit``. Torch is imported inside, so that --help stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from splitfl.console import command, note, print_json


def audit(
    state: Annotated[Path, typer.Option(help="The client's state folder, whose kept releases are attacked.")],
    model: Annotated[Path, typer.Option(help="Folder of the public base model, with its tokenizer.")],
    data: Annotated[Path, typer.Option(help="The client's own text, to compare with: it stays here.")],
    key: Annotated[Path | None, typer.Option(help="The client's key file, where join was given one.")] = None,
    prior: Annotated[
        Path | None,
        typer.Option(help="The attacker's language model, where --model was adapted to a narrow release."),
    ] = None,
    public: Annotated[
        Path | None,
        typer.Option(help="Public text that the attacker learns from; the default is Python's help topics."),
    ] = None,
    exported: Annotated[Path | None, typer.Option(help="A trained model to look for canaries in.")] = None,
    canaries: Annotated[
        Path | None, typer.Option(help="Planted texts with digits, one a line; goes with --exported.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for all attacks together.")] = 150.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the attacks.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Picture (PNG) to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Attack what a run really released, as its server could: how much of the text comes back?"""
    with command(verbose=verbose):
        from splitfl.lab.audit.command import Inputs, audit_state, exposures, remember
        from splitfl.lab.audit.picture import draw

        inputs = Inputs(state, model, data, key, prior, public, exported, canaries)
        report = audit_state(inputs, seconds, seed, say=note)
        remember(state, report)
        found = exposures(inputs, seed)
        if out is not None:
            draw(report, out)
        if as_json:
            print_json({**report.to_dict(), "canaries": found, "picture": str(out) if out else None})
            return
        print("\n".join(report.lines()))
        for text, bits in found.items():
            print(f"canary {text!r}: exposure {bits:.1f} bits of at most 10; about 1.4 if not remembered")
