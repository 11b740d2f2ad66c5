"""Writes the reference pages that repeat what the code says: federation.md, simulating.md, commands.md, planning.md.

``make docs`` runs it; tests/unit/test_docs.py fails while a page differs from what the code says now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from splitfl.cli import app
from splitfl.config import Federation, Section, parse_federation
from splitfl.errors import PlanError
from splitfl.lab.simulate.settings import Simulation
from splitfl.planning.machines import Machine
from splitfl.planning.plan import Candidate, gib
from splitfl.planning.planner import candidates, choose
from splitfl.planning.shapes import ModelShape

HERE = Path(__file__).parent
BOUNDS: dict[type, str] = {Ge: ">=", Gt: ">", Le: "<=", Lt: "<"}

FEDERATION_HEAD = """\
# federation.toml

<!-- Written by docs/generate.py from splitfl/config.py; `make docs` writes it anew. -->

What a federation agrees on, in one TOML file, given to `splitfl serve --federation FILE`. The server's settings win:
every client receives them when it joins, so nothing has to be set twice. What is left out takes its default; an
unknown field, or a value out of its range, is refused at start with the field's name. [recipes/](recipes) holds whole
files to start from; [strategies.md](strategies.md) says which `merge.strategy` and which average to choose.

```toml
name = "three-hospitals"

[rounds]
count = 5
local_steps = 20

[optimizer]
learning_rate = 3e-4
```

Some combinations are refused as well: `micro_batches` that does not divide `records`; a default cut outside its own
limits, or with more blocks than the model has; `share = "none"` when clients may differ in `n_top` (personal tops of
different depth cannot be exported); on a model whose head is its embedding, `head` other than `"full"` or
`share = "top"` while that embedding trains; a parameter of `[merge]` that the chosen strategy and average do not use;
SCAFFOLD with AdamW, with robust merging, late updates or where cuts may differ; an `aggregate` other than the mean
with late updates or where cuts may differ; Krum with a `min_clients` below 2 x `byzantine` + 3.
"""

TABLES_BELOW = "<!-- Tables from here on: docs/generate.py, from splitfl/lab/simulate/settings.py -->\n"

COMMANDS_HEAD = """\
# Commands

<!-- Written by docs/generate.py from the commands themselves; `make docs` writes it anew. -->

What `splitfl COMMAND --help` says, on one page. Reports and JSON go to stdout, everything else to stderr. A command
that fails says why and what to do in one line, and ends with the exit code that [errors.md](errors.md) gives for it;
Ctrl-C ends with 130, and what was saved stays saved.
"""


def federation_page() -> str:
    """Every field of federation.toml with its values, default and unit."""
    return "\n".join([FEDERATION_HEAD, *section_tables(Federation, "##")])


def simulating_page() -> str:
    """The page as it was written by hand, and every field of a simulation's file but those of its federation."""
    by_hand = (HERE / "simulating.md").read_text().partition(TABLES_BELOW)[0]
    return "\n".join([by_hand + TABLES_BELOW, *section_tables(Simulation, "###", without=("federation",))])


def section_tables(whole: type[Section], mark: str, *, without: tuple[str, ...] = ()) -> Iterator[str]:
    """A heading and a table for the fields at the top, and for those of each table in the file."""
    yield from [f"{mark} At the top of the file\n", *field_table(whole)]
    for name, field in whole.model_fields.items():
        if is_section(field) and name not in without:
            section: type[Section] = field.annotation  # type: ignore[assignment]
            yield from [f"{mark} [{name}]\n", f"{paragraph(section.__doc__)}\n", *field_table(section)]


def field_table(section: type[Section]) -> Iterator[str]:
    """One row a field; tables inside the section have headings of their own."""
    yield "| field | values | default | meaning, unit |"
    yield "| --- | --- | --- | --- |"
    for name, field in section.model_fields.items():
        if not is_section(field):
            yield f"| `{name}` | {cell(values(field))} | {cell(default(field))} | {cell(field.description or '')} |"
    yield ""


def is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def values(field: FieldInfo) -> str:
    """What a field may hold, for a reader."""
    annotation: Any = field.annotation
    literals = [kind for kind in (annotation, *get_args(annotation)) if get_origin(kind) is Literal]
    if literals:
        return ", ".join(f'`"{choice}"`' for choice in get_args(literals[0]))
    if get_origin(annotation) is tuple:
        return f"list of {listed(get_args(annotation)[0])}"
    annotation = plain(annotation)
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    words = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text", Path: "path"}
    bounds = [f"{BOUNDS[type(m)]} {getattr(m, type(m).__name__.lower())}" for m in field.metadata if type(m) in BOUNDS]
    patterns = [f"`{m.pattern}`" for m in field.metadata if getattr(m, "pattern", None)]
    return ", ".join([words[kinds[0]], *bounds, *patterns])


def plain(annotation: Any) -> Any:
    """A type without its bounds."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def listed(annotation: Any) -> str:
    """What the items of a list are."""
    return {int: "whole numbers", str: "texts", Path: "paths"}[plain(annotation)]


def default(field: FieldInfo) -> str:
    if field.default is None:
        return "none"
    return f"`{str(field.default).lower()}`" if isinstance(field.default, bool) else toml(field.default)


def toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"`{json.dumps(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


PLANNED = "<!-- Tables from here on: docs/generate.py, from docs/planning/ -->\n"
MODELS = ("Qwen2.5-0.5B", "TinyLlama-1.1B", "Llama-2-7B", "GLM-4-9B")
MACHINES = ("edge-box-1gb", "node-2-core-4gb", "laptop-gpu-8gb", "office-pc-16gb", "workstation")


def planning_page() -> str:
    """The page as it was written by hand, and what five machines would keep of four models."""
    by_hand = (HERE / "planning.md").read_text().partition(PLANNED)[0]
    parts = [by_hand + PLANNED]
    for train in ("lora", "full"):
        parts += [f'### train = "{train}"\n', f"| | {' | '.join(MODELS)} |", "| --- " * (1 + len(MODELS)) + "|"]
        for name in MACHINES:
            machine = Machine.read(HERE / "planning/machines" / f"{name}.json")
            parts.append(f"| {machine.about} | {' | '.join(planned(machine, model, train) for model in MODELS)} |")
        parts.append("")
    return "\n".join(parts)


def planned(machine: Machine, model: str, train: str) -> str:
    """What a machine would keep of a model, as a cell."""
    shape = ModelShape.of(json.loads((HERE / "planning/models" / f"{model}.json").read_text()))
    try:
        chosen = choose(candidates(machine.with_model(shape), shape, roomy_federation(shape, train)))
    except PlanError as error:
        return f"nothing: {gib(error.missing)} short"
    return in_a_cell(chosen)


def in_a_cell(chosen: Candidate) -> str:
    """Cut, formats, pieces, peak and pace."""
    plan, takes = chosen.plan, f"{gib(chosen.peak_bytes)}, {chosen.pace_s:.1f} s a step"
    if not chosen.trunk_blocks:
        return f"whole model, {plan.dtype}: {takes}"
    wire = f"{plan.codec} on the wire, {plan.in_flight} of {plan.micro_batches} under way"
    return f"**{plan.cut}**, {plan.dtype}, {wire}: {takes}"


def roomy_federation(shape: ModelShape, train: str) -> Federation:
    """The settings that planning.md shows."""
    table = {
        "rounds": {"local_steps": 50},
        "batch": {"records": 8, "max_length": 512, "in_flight": 4},
        "model": {"max_bottom": 4, "max_top": shape.layers - 1, "train": train, "head": train},
    }
    return parse_federation(table, "docs/generate.py")


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = [COMMANDS_HEAD]
    for path, command in commands(typer.main.get_command(app), "splitfl"):
        parts += [f"## {path}\n", f"{paragraph(command.help)}\n", *parameter_table(command)]
    return "\n".join(parts)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(name, command) of every command that does something, groups opened."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, child in inner.items():
        yield from commands(child, f"{path} {name}")


def parameter_table(command: Any) -> Iterator[str]:
    """One row an argument or option."""
    hints = get_type_hints(command.callback)
    yield "| | default | meaning |"
    yield "| --- | --- | --- |"
    for parameter in command.params:
        name = signature(parameter, hints[parameter.name])
        yield f"| {name} | {cell(parameter_default(parameter))} | {cell(parameter.help or '')} |"
    yield ""


def signature(parameter: Any, hint: Any) -> str:
    """How a parameter is written: ``DIR``, ``--layers N``, ``--json``, ``--verbose``, ``-v``."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    word = {Path: " PATH", int: " N", float: " N", str: " TEXT"}.get(kinds[0], "")
    return ", ".join(f"`{flag}{word}`" for flag in parameter.opts)


def parameter_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    nothing = parameter.default is None or parameter.default is False or parameter.default == ""
    return "" if nothing else f"`{parameter.default}`"


def paragraph(text: str | None) -> str:
    """A docstring as one line of Markdown."""
    return " ".join((text or "").split()).replace("``", "`")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


PAGES = {
    "federation.md": federation_page,
    "simulating.md": simulating_page,
    "commands.md": commands_page,
    "planning.md": planning_page,
}


def main() -> None:
    """Write every page anew."""
    for name, page in PAGES.items():
        (HERE / name).write_text(page())


if __name__ == "__main__":
    main()
