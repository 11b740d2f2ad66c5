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
from splitfl.lab.demo.results import ENDS_ONLY, MERGED_ENDS, TOP_ONLY, DemoResult, alone, perplexity

PLAIN_WIDTH = 118  # columns, where there is no terminal to ask

LOSSES = (
    "Loss in nats per token on notes that nobody trained on. local-only: the whole model "
    "on that client's notes alone, with that client's steps. centralised: all notes together, the same tokens in all. "
    "One learning rate for all, tuned for none; embedding and first block are frozen in all."
)
ALONE = (
    "What a client can do with the published model alone, its top trained with its own steps. ends-only: without the "
    "trunk, so nothing leaves. top-only: with the trunk, each record released once through the noise: the federation "
    "without merging. merged ends: ends-only, with the tops averaged after every round: the federation without any "
    "activation leaving."
)
ADAPTED = (
    "federated and top-only are measured as they are used: through the release, with fresh noise. They, ends-only and "
    "merged ends began with the published model, which had {steps} more steps on the public notes than the base model; "
    "before, local-only and centralised had no such help. The exported folder opens anywhere, but without its release "
    "(release.json, release.safetensors) it is a worse model than measured here."
)
AUDIT = """    splitfl audit --state clients/{client}/state --key clients/{client}/key \\
        --model published --prior base --data notes/{client}.jsonl --public notes/general.jsonl"""


@dataclass(frozen=True)
class Section:
    """A table under a title, with sentences below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def verdict(result: DemoResult) -> str:
    """The report's first line: whether the leak was earned."""
    losses = {kind: result.own_mean(kind) for kind in ("federated", ENDS_ONLY, TOP_ONLY, MERGED_ENDS)}
    said = "Splitting paid off" if result.splitting_pays else "Splitting did NOT pay off"
    return (
        f"{said}: on the clients' own held-out notes the federated model has {losses['federated']:.3f} nats per token "
        f"on average, ends-only {losses[ENDS_ONLY]:.3f}, top-only {losses[TOP_ONLY]:.3f}, merged ends "
        f"{losses[MERGED_ENDS]:.3f}."
    )


def sections(result: DemoResult) -> list[Section]:
    """The whole report."""
    parts = (held_out, on_the_union, processes, whereabouts, privacy, parties)
    return [part(result) for part in parts]


def held_out(result: DemoResult) -> Section:
    def models(client: str) -> tuple[str, ...]:
        own = (alone(ENDS_ONLY, client), alone(TOP_ONLY, client))
        return "before", client, *own, MERGED_ENDS, "federated", "centralised"

    rows = tuple(
        (client, *(f"{result.own(model, client):.3f}" for model in models(client))) for client in result.clients
    )
    notes = [LOSSES, ALONE, ADAPTED.format(steps=result.adapted_steps)]
    if all(result.own(client, client) < result.own("federated", client) for client in result.clients):
        notes.append(
            "On its own notes each client's own whole model is ahead: it spends all of its steps on one specialty. "
            "What it knows of the others' the next table says."
        )
    models_shown = ("before", "local-only", "ends-only", "top-only", "merged ends", "federated", "centralised")
    return Section("Held-out loss of each client", ("its own notes", *models_shown), rows, tuple(notes))


def on_the_union(result: DemoResult) -> Section:
    rows = [(model, figure(result.union(model))) for model in ("before", "published")]
    rows += [(f"{client}, local-only", figure(result.union(client))) for client in result.clients]
    for kind, name in ((ENDS_ONLY, "ends-only"), (TOP_ONLY, "top-only")):
        rows += [(f"{client}, {name}", figure(result.union(alone(kind, client)))) for client in result.clients]
    rows.append(("merged ends", figure(result.union(MERGED_ENDS))))
    rows += [(model, figure(result.union(model))) for model in ("federated", "centralised")]
    gain = result.union(MERGED_ENDS) - result.union("federated")
    best = result.best_local_only
    beats = "beats every local-only model" if result.federated_wins else "does NOT beat every local-only model"
    notes = (
        f"The federated model {beats} on the union: {result.union('federated'):.3f} nats per token, "
        f"against {result.union(best):.3f} for the best of them ({best}).",
        f"Merging the tops alone gives {result.union(MERGED_ENDS):.3f}, and no activation leaves: the activations are "
        f"worth {gain:+.3f} nats per token.",
    )
    return Section("Held-out notes of all three together", ("model", "loss (perplexity)"), tuple(rows), notes)


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
    model, release = result.settings["model"], result.settings["release"]
    bottom, top = model["n_bottom"], model["n_top"]
    rows = (
        (
            "each client",
            f"its notes, labels and losses; bottom, frozen (embedding, {blocks(bottom, 'first')}: {count['bottom']}); "
            f"encoder and local skip, frozen; top, with its moments ({blocks(top, 'last')}, norm, output head: "
            f"{count['top']})",
        ),
        (
            "the server",
            f"decoder and trunk, as published (the blocks between: {count['trunk']}); the published model, out of "
            "which it hands the clients their ends; the tops' weights, which it merges",
        ),
        (
            "crossed the link",
            f"activations: {release['rank']} noised numbers a token, each record once, and what the trunk makes of "
            "them; the tops' weights, both ways. No file, no label, no loss, no gradient",
        ),
    )
    return Section("What stayed where", ("where", "what"), rows)


def privacy(result: DemoResult) -> Section:
    rows = tuple(
        (client, kind, f"{count['releases']:,}", megabytes(count["bytes"]))
        for client in result.clients
        for kind, count in result.reports[client]["privacy"]["left"].items()
    )
    stated = result.stated_privacy
    notes = (
        f"Mode {stated['mode']}. {stated['statement']}",
        f"Never left a client: {', '.join(stated['stayed'])}.",
        "How much of the text can be read out of it? In this demo's folder:",
        AUDIT.format(client=result.clients[0]),
    )
    return Section("Privacy: what left each client", ("client", "what left", "times", "bytes"), rows, notes)


def parties(result: DemoResult) -> Section:
    rows = tuple((party["party"], party["sees"], party["protection"]) for party in result.stated_privacy["parties"])
    columns = ("who", "what they see of a client", "what protects a record")
    return Section("Privacy: against whom", columns, rows)


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
    console.print(verdict(result), style="bold")
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
    lines = [verdict(result), "", "# Three hospitals, one model", "", f"![held-out losses]({picture})"]
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
