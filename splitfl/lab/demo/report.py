"""The demo's closing report: tables for a terminal, the same tables as Markdown, and all figures as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from splitfl.files import write_file
from splitfl.lab.demo.results import DemoResult, perplexity

PLAIN_WIDTH = 118  # columns, where there is no terminal to ask


@dataclass(frozen=True)
class Section:
    """A table under a title, with sentences below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def sections(result: DemoResult) -> list[Section]:
    """The whole report."""
    return [held_out(result), on_the_union(result), processes(result), whereabouts(result), privacy(result)]


def held_out(result: DemoResult) -> Section:
    rows = tuple(
        (client, *(figure(result.own(model, client)) for model in ("before", client, "federated", "centralised")))
        for client in result.clients
    )
    notes = [
        "Loss in nats per token, and perplexity in brackets, on notes that nobody trained on. local-only: the whole "
        "model on that client's notes alone, with that client's steps: a third of the tokens that the trunk saw. "
        "centralised: all notes together, the same tokens in all. One learning rate for all, tuned for none; "
        "embedding and first block are frozen in all."
    ]
    if all(result.own(client, client) < result.own("federated", client) for client in result.clients):
        notes.append(
            "On its own notes each client's own model is ahead: it spends all of its steps on one specialty. "
            "What it knows of the others' the next table says."
        )
    columns = ("its own held-out notes", "before", "local-only", "federated", "centralised")
    return Section("Held-out loss of each client", columns, rows, tuple(notes))


def on_the_union(result: DemoResult) -> Section:
    rows = [("before", figure(result.union("before")))]
    rows += [(f"{client}, local-only", figure(result.union(client))) for client in result.clients]
    rows += [(model, figure(result.union(model))) for model in ("federated", "centralised")]
    best = result.best_local_only
    verdict = "beats every local-only model" if result.federated_wins else "does NOT beat every local-only model"
    note = (
        f"The federated model {verdict} on the union: {result.union('federated'):.3f} nats per token, "
        f"against {result.union(best):.3f} for the best of them ({best})."
    )
    return Section("Held-out notes of all three together", ("model", "loss (perplexity)"), tuple(rows), (note,))


def processes(result: DemoResult) -> Section:
    rows = [("trunk", megabytes(result.peak_rss["trunk"]), "", "")]
    for client in result.clients:
        traffic = result.traffic(client)
        ways = (megabytes(traffic["sent"]), megabytes(traffic["received"]))
        rows.append((client, megabytes(result.peak_rss[client]), *ways))
    rounds = result.settings["rounds"]
    note = (
        f"{rounds['count']} rounds of {rounds['local_steps']} steps in {result.seconds['federation']:.0f} s. Most "
        "of the memory is PyTorch itself: the model is tiny here."
    )
    return Section("Processes", ("process", "peak memory", "sent", "received"), tuple(rows), (note,))


def whereabouts(result: DemoResult) -> Section:
    count = {part: f"{number / 1e6:.2f} M weights" for part, number in result.parameters.items()}
    model = result.settings["model"]
    bottom, top = model["n_bottom"], model["n_top"]
    rows = (
        (
            "each client",
            f"its notes, labels and losses; bottom, frozen (embedding, {blocks(bottom, 'first')}: {count['bottom']}); "
            f"top, with its moments ({blocks(top, 'last')}, norm, output head: {count['top']})",
        ),
        (
            "the server",
            f"trunk, with its moments (the blocks between: {count['trunk']}); the base model, out of which it hands "
            "the clients their ends; the tops' weights, which it merges",
        ),
        (
            "crossed the link",
            "activations, both ways; gradients, to the server; the tops' weights, both ways; counts of tokens. "
            "No file, no label, no loss",
        ),
    )
    return Section("What stayed where", ("where", "what"), rows)


def privacy(result: DemoResult) -> Section:
    rows = tuple(
        (client, kind, f"{count['releases']:,}", megabytes(count["bytes"]))
        for client in result.clients
        for kind, count in result.reports[client]["privacy"]["left"].items()
    )
    stated = result.reports[result.clients[0]]["privacy"]
    notes = (
        f"Mode {stated['mode']}. {stated['statement']}",
        f"Never left a client: {', '.join(stated['stayed'])}.",
    )
    return Section("Privacy: what left each client", ("client", "what left", "times", "bytes"), rows, notes)


def blocks(count: int, which: str) -> str:
    """``first block`` or ``last 2 blocks``."""
    return f"{which} block" if count == 1 else f"{which} {count} blocks"


def figure(loss: float) -> str:
    return f"{loss:.3f} ({perplexity(loss):.2f})"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def print_report(result: DemoResult, folder: Path, picture: Path) -> None:
    """Everything on stdout: rich tables on a terminal, plain text elsewhere."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=PLAIN_WIDTH, safe_box=True)
    for section in sections(result):
        console.print()
        console.print(section.title, style="bold")
        console.print(as_table(section))
        for note in section.notes:
            console.print(note, markup=False)
    console.print()
    console.print(f"Time: {total_time(result)}.")
    console.print(f"Picture: {picture}", soft_wrap=True)
    console.print(f"Everything else: {folder}", soft_wrap=True)


def as_table(section: Section) -> Table:
    """Text on the left, figures on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(section.columns):
        is_text = number == 0 or column.startswith("what")
        table.add_column(column, justify="left" if is_text else "right", overflow="fold", no_wrap=number == 0)
    for row in section.rows:
        table.add_row(*row, style="bold" if row[0] == "federated" else "")
    return table


def total_time(result: DemoResult) -> str:
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    return f"{sum(result.seconds.values()):.0f} s ({stages})"


def save_report(result: DemoResult, folder: Path, picture: Path) -> None:
    """``report.md`` and ``report.json`` in ``folder``. Raises StorageError."""
    write_file(folder / "report.md", as_markdown(result, picture.name).encode())
    facts = result.summary(picture.name) | {
        "curves": result.curves,
        "parameters": result.parameters,
        "seconds": result.seconds,
        "settings": result.settings,
    }
    write_file(folder / "report.json", (json.dumps(facts, indent=2) + "\n").encode())


def as_markdown(result: DemoResult, picture: str) -> str:
    """The report as a page, with the picture in it."""
    lines = ["# Three hospitals, one model", "", f"![held-out losses]({picture})"]
    for section in sections(result):
        lines += ["", f"## {section.title}", "", markdown_row(section.columns)]
        lines.append(markdown_row(("---",) * len(section.columns)))
        lines += [markdown_row(row) for row in section.rows]
        for note in section.notes:
            lines += ["", note]
    lines += ["", f"Time: {total_time(result)}."]
    return "\n".join(lines) + "\n"


def markdown_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
