"""``splitfl simulate``. What it needs is imported inside, so that --help stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from splitfl.console import command, note, print_json


def simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="What is simulated: docs/simulating.md.")],
    out: Annotated[Path, typer.Option(help="New folder for results and state.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the simulation in --out, if it holds one.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "cpu",
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each client: with many clients 1 is fastest.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, and nothing else.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens inside.")] = False,
) -> None:
    """Run a federation of many clients in this process, its data dealt alike or unlike, from one TOML file."""
    with command(verbose=verbose):
        from splitfl.lab.simulate.settings import load_simulation

        simulation = load_simulation(file)

        import torch
        from rich.console import Console

        from splitfl.lab.simulate.plots import draw
        from splitfl.lab.simulate.results import read_results, write_results
        from splitfl.lab.simulate.run import simulate as run
        from splitfl.lab.simulate.view import RoundBar

        found = read_results(simulation, out)
        if found is not None:
            note(f"the simulation in {out} is finished; this is what came out")
        else:
            torch.set_num_threads(threads)
            with RoundBar(simulation.federation, Console(stderr=True, quiet=as_json)) as bar:
                result = run(simulation, out, resume=resume, device=device, report=bar.hear)
            draw(result, out / "curves.png")
            found = write_results(result)
        if as_json:
            print_json({name: value for name, value in found.items() if name not in ("settings", "clients")})
        else:
            print_summary(found)


def print_summary(found: dict[str, Any]) -> None:
    """The end of a simulation for a person, on stdout."""
    first, last = found["rounds"][0], found["rounds"][-1]
    print(f"{len(found['clients'])} clients, {last['round']} rounds, {found['seconds']:.0f} s")
    if first["held_out_loss"] is not None and last["held_out_loss"] is not None:
        each = found["clients_held_out_loss"]
        print(
            f"  held-out loss {first['held_out_loss']:.3f} before ({first['held_out_clients']} clients), "
            f"{last['held_out_loss']:.3f} after ({last['held_out_clients']}); "
            f"by client {each['best']:.3f} to {each['worst']:.3f} (nats per token)"
        )
    sent, received = (found["bytes"][way] / 1e6 for way in ("sent", "received"))
    print(f"  links: {sent:.1f} MB sent by clients, {received:.1f} MB received")
    mode = found["settings"]["federation"]["privacy"]["mode"]
    print(f"  privacy: {mode}; what may be said of each client is in results.json")
    print(f"  memory of this process: {found['peak_rss'] / 2**20:.0f} MiB at most")
    print(f"  results: {found['folder']}; model: {found['exported'] or 'each client has its own'}")
