"""The documentation says what the code does: generated pages, commands, recipes, paths, links, the privacy sentence."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer.main

from splitfl.cli import app
from splitfl.config import Federation, Merge, load_federation, parse_federation
from splitfl.federation.merging import Merger, choose_strategy
from splitfl.federation.robust import Contribution
from splitfl.federation.strategies import STRATEGIES, FedAvg, RoundFacts
from splitfl.privacy.report import OFF
from splitfl.split.families import FAMILIES, small_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.toml"))
TREES = ("splitfl/", "client_model/", "server_model/", "tests/", "docs/", "notebooks/")


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
COMMANDS: dict[str, Any] = dict(GENERATOR.commands(typer.main.get_command(app), "splitfl"))


def flat(path: Path) -> str:
    """A page without line breaks and quotation marks of its markup."""
    return " ".join(path.read_text().replace("\n> ", "\n").replace("**", "").split())


@pytest.mark.parametrize("name", GENERATOR.PAGES)
def test_generated_page_is_what_the_generator_writes(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == GENERATOR.PAGES[name](), "run `make docs`"


def test_federation_page_gives_every_field_with_its_unit() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \|$", GENERATOR.federation_page(), re.MULTILINE)
    tables = [field.annotation for field in Federation.model_fields.values() if GENERATOR.is_section(field)]
    fields = [name for table in tables for name in table.model_fields]
    fields += [name for name, field in Federation.model_fields.items() if not GENERATOR.is_section(field)]
    assert sorted(name for name, *_ in rows) == sorted(fields)
    assert all(value and default and meaning.strip() for _, value, default, meaning in rows)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_every_command(command: str) -> None:
    assert f"| `{command}" in README.read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_documentation_gives_every_option_of_a_command(command: str) -> None:
    page = (ROOT / "docs" / "commands.md").read_text().split(f"## {command}\n")[1].split("\n## ")[0]
    for parameter in COMMANDS[command].params:
        for word in parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]:
            assert re.search(rf"`{re.escape(word)}[ `]", page), f"{command} {word}: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_uses_no_option_that_does_not_exist(page: Path) -> None:
    for line in page.read_text().splitlines():
        for command, rest in re.findall(r"\bsplitfl ([a-z]+)((?: +[^`|]*)?)", line):
            known = COMMANDS.get(f"splitfl {command}")
            if known is not None:
                options = {word for parameter in known.params for word in parameter.opts}
                for option in re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0]):
                    assert option in options | {"--help"}, f"{page.name}: splitfl {command} {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_to_files_that_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_architecture_names_paths_that_exist() -> None:
    missing = [path for path in architecture_paths() if not (ROOT / path).exists()]
    assert not missing


def architecture_paths() -> set[str]:
    """Repository paths in the page: spelled out anywhere, or given in the table by folder and file."""
    text = ARCHITECTURE.read_text()
    paths = {path for path in re.findall(r"[\w./-]+", text) if path.startswith(TREES)}
    folder = ""
    for first, files in re.findall(r"^\| (`[\w/]+`)? ?\| (`[^|]+`) \|", text, re.MULTILINE):
        folder = first.strip("`") or folder
        paths |= {f"{folder}/{name}" for name in re.findall(r"`([^`]+)`", files)}
    return {path.rstrip(".") for path in paths}


def test_architecture_names_every_module_of_the_two_ends() -> None:
    named = architecture_paths()
    modules = {
        f"{path.parent.name}/{path.name}"
        for end in ("client_model", "server_model")
        for path in (ROOT / end).glob("*.py")
    }
    assert {path for path in modules if not path.endswith("/__init__.py")} <= named


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipe_loads_and_fits_a_model(recipe: Path) -> None:
    settings = load_federation(recipe)
    assert settings.name == recipe.stem
    settings.check_layers(small_config("llama", layers=8, hidden=64, vocab=300).num_hidden_layers)


def test_federated_only_recipe_leaves_no_trunk() -> None:
    settings = load_federation(ROOT / "docs" / "recipes" / "federated-only.toml")
    assert len(settings.cut.trunk(8)) == 0


def test_readme_says_what_privacy_mode_off_means() -> None:
    assert OFF.partition(": ")[2].rstrip(".") in flat(README)
    assert Federation().privacy.mode == "off"


def test_readme_and_changelog_name_the_families_there_are() -> None:
    assert f"{len(FAMILIES)} decoder families" in flat(README)
    changelog = flat(ROOT / "CHANGELOG.md")
    assert all(family.removesuffix("_text") in changelog for family in FAMILIES)


def test_changelog_opens_with_the_version_that_is_built() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == version


def test_readme_shows_the_two_commands_before_anything_else() -> None:
    first = README.read_text().split("## ")[1]
    assert "make demo" in first
    assert "make test" in first


def test_strategy_of_the_documentation_is_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's one block of Python makes a strategy that settings may name and a merge uses, without another file."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "strategies.md").read_text(), re.DOTALL)
    monkeypatch.setitem(STRATEGIES, "halfway", FedAvg)  # so that what the page adds goes again
    page: dict[str, Any] = {}
    exec(code, page)
    merger = Merger(choose_strategy(page["settings"]), RoundFacts())
    merged, kept, _ = merger("w", torch.tensor([1.0]), [Contribution(torch.tensor([3.0]), 7)], {})
    assert merged.item() == 2.0
    assert kept["last_step"].item() == 1.0


def test_strategies_page_names_every_strategy_and_parameter() -> None:
    page = (ROOT / "docs" / "strategies.md").read_text()
    fields = [name for name in Merge.model_fields if name != "share"]
    assert [name for name in (*STRATEGIES, *fields) if f"`{name}" not in page] == []


@pytest.mark.parametrize("page", ["federation.md", "strategies.md"])
def test_settings_that_a_page_shows_are_taken(page: str) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        choose_strategy(parse_federation(tomllib.loads(block), page))
