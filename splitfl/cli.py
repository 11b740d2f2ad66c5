"""The command ``splitfl``: every subcommand under one roof."""

from __future__ import annotations

import os

from splitfl.spinning import brief_spins

os.environ.update(brief_spins(os.environ))
# numpy computes nothing large here, and its threads' buffers are memory; without room for them it sends a SIGINT.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Nothing is ever downloaded behind the user's back.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer

from client_model.cli import join
from client_model.probe_cli import probe
from server_model.cli import export, serve
from server_model.clients_cli import clients, invite, revoke
from splitfl.lab.audit.cli import audit
from splitfl.lab.bench.cli import bench
from splitfl.lab.cli import adapt, evaluate, init
from splitfl.lab.demo.cli import demo
from splitfl.lab.simulate.cli import simulate

app = typer.Typer(
    name="splitfl",
    help="Fine-tune large language models on text that must not leave the places that own it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(init)
app.command()(serve)
app.command()(invite)
app.command()(clients)
app.command()(revoke)
app.command()(probe)
app.command()(join)
app.command("eval")(evaluate)
app.command()(adapt)
app.command()(audit)
app.command()(export)
app.command()(simulate)
app.command()(bench)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
