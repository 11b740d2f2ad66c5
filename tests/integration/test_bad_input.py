"""What users get wrong: one line that names it, the remedy, a documented exit code, and nothing lost."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from processes import Place, Server, with_settings
from refusals import GATHERING, SETTINGS, assert_ends, assert_open

from splitfl.data.readers import FIRST_ROWS
from splitfl.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LinkError,
    RefusedError,
)

# data


BROKEN = {
    "empty.jsonl": ("", ["empty.jsonl is empty", "at least one row"]),
    "broken.jsonl": ('{"text": "one"}\n{"text": "two"}\n{"text": "three\n', ["broken.jsonl, line 3", "--skip-bad"]),
    "textless.csv": ("id,note\n1,cough\n", ["textless.csv has no text column", "text"]),
    "notes.docx": ("anything", ["notes.docx is not of a known format", ".jsonl"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_join_refuses_data_that_is_broken_at_its_beginning_before_it_connects(place: Place, name: str) -> None:
    text, parts = BROKEN[name]
    data = place.folder / name
    data.write_text(text)
    command = place.join("ws://127.0.0.1:9", "ward", data)
    assert_ends(command, DataError, *parts)
    assert "waiting" not in command.stderr
    assert "NOT encrypted" not in command.stderr  # of the link there is nothing to say yet
    assert not (place.folder / "client-ward").exists()


@pytest.mark.parametrize(
    ("rows", "flags", "parts"),
    [
        ('{"text": "one"}\n' * FIRST_ROWS + "not json\n", [], ["data.jsonl, line 101", "--skip-bad"]),
        ('{"note": "one"}\nnot json\n', ["--skip-bad"], ["data.jsonl", "2 bad rows were skipped", "at least one row"]),
    ],
)
def test_join_refuses_data_that_it_cannot_train_on(
    place: Place, hall: Server, rows: str, flags: list[str], parts: list[str]
) -> None:
    data = place.folder / "data.jsonl"
    data.write_text(rows)
    assert_ends(place.join(hall.url, "ward", data, *flags), DataError, *parts)
    hall.command.wait_for("left", client="ward")  # it said so: its name is free again at once
    assert data.read_text() == rows


@pytest.mark.parametrize("fresh", [True, False])
def test_join_refuses_a_missing_data_file_before_it_connects(place: Place, fresh: bool) -> None:
    command = place.join("ws://127.0.0.1:9", "ward", place.folder / "nowhere.jsonl", fresh=fresh)
    assert_ends(command, DataError, "there is no", "nowhere.jsonl", "Name a data file")
    assert not (place.folder / "client-ward").exists()


def test_join_with_skip_bad_counts_the_rows_it_left_out(place: Place, wards: dict[str, Path]) -> None:
    data = place.folder / "some.jsonl"
    data.write_text("not json\n" + wards["a"].read_text() + '{"note": "no text"}\n')
    server = place.serve(SETTINGS)
    client = place.join(server.url, "ward", data, "--skip-bad")
    assert client.wait_for("data")["skipped_rows"] == 2
    assert [client.wait(), server.command.wait()] == [0, 0]
    assert client.report["data"]["skipped_rows"] == 2


def test_join_with_too_few_records_ends_before_anything_leaves_or_a_round_opens(
    place: Place, wards: dict[str, Path]
) -> None:
    data = place.folder / "short.jsonl"
    data.write_text("".join(wards["a"].read_text().splitlines(keepends=True)[:3]))
    server = place.serve(with_settings(SETTINGS, privacy={"mode": "measured"}))
    client = place.join(server.url, "ward", data)
    assert_ends(client, DataError, "too few records to train on: 2", "takes 4 different ones", "more rows")
    server.command.wait_for("left", client="ward")
    assert client.named("data")
    assert not client.named("privacy")
    assert not server.command.named("round_open")


def test_join_refuses_data_that_changed_under_a_paused_client(place: Place, wards: dict[str, Path]) -> None:
    data = place.folder / "ward.jsonl"
    shutil.copy(wards["a"], data)
    server = place.serve(with_settings(SETTINGS, rounds={"local_steps": 400, "min_clients": 1}))
    client = place.join(server.url, "ward", data)
    client.wait_for("step", step=20)
    client.interrupt()
    assert client.wait() == 130
    data.write_text(wards["a"].read_text().splitlines()[0] + "\n")
    assert_ends(place.join(server.url, "ward", data), DataError, "records now", "Put back the data")


# models, cuts and settings


def test_serve_refuses_a_checkpoint_without_safetensors(place: Place) -> None:
    model = place.folder / "pickled"
    shutil.copytree(place.model, model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    command = place.run("serve", "serve", model, "--state", place.folder / "server", "--listen", "127.0.0.1:0")
    assert_ends(command, CheckpointError, "model.safetensors", "save_pretrained")


def test_serve_refuses_a_folder_that_is_no_checkpoint(place: Place) -> None:
    command = place.run("serve", "serve", place.folder, "--state", place.folder / "server")
    assert_ends(command, CheckpointError, "config.json", "splitfl init")


def test_join_refuses_a_local_model_without_safetensors(place: Place, hall: Server, wards: dict[str, Path]) -> None:
    model = place.folder / "pickled"
    shutil.copytree(place.model, model)
    (model / "model.safetensors").unlink()
    assert_ends(place.join(hall.url, "ward", wards["a"], "--model", model), CheckpointError, "save_pretrained")


def test_serve_refuses_a_cut_larger_than_the_model(place: Place) -> None:
    server = place.serve(with_settings(SETTINGS, model={"n_bottom": 2, "n_top": 2}), wait=False)
    assert_ends(server.command, ConfigError, "cut 2,2 keeps 4 blocks but the model has 3", "at most 3")


@pytest.mark.parametrize("plan", ["2,2", "0,1"])
def test_join_with_a_plan_that_the_federation_does_not_have_is_refused(
    place: Place, hall: Server, wards: dict[str, Path], plan: str
) -> None:
    client = place.join(hall.url, "ward", wards["a"], "--plan", plan)
    assert_ends(client, RefusedError, f"cut {plan} is not allowed", "--plan")


@pytest.mark.parametrize("plan", ["many", "1", "-1,2", "1,2,3"])
def test_join_refuses_a_plan_that_is_no_cut(place: Place, wards: dict[str, Path], plan: str) -> None:
    client = place.join("ws://127.0.0.1:9", "ward", wards["a"], f"--plan={plan}")
    assert_ends(client, ConfigError, "not two numbers", "for example 1,1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[rounds]\ncount = 0\n", ["rounds.count", "greater than or equal to 1"]),
        ("[rounds]\ncuont = 3\n", ["rounds.cuont", "Extra inputs"]),
        ("[batch]\nrecords = 4\nmicro_batches = 3\n", ["micro_batches = 3 does not divide records = 4"]),
        ("[optimizer]\nname = 'lion'\n", ["optimizer.name", "'adamw' or 'sgd'"]),
        ("rounds = 3\n", ["rounds", "federation.md"]),
        ("[rounds\n", ["is not TOML", "line 1"]),
    ],
)
def test_serve_names_the_field_of_a_malformed_federation_toml(place: Place, text: str, parts: list[str]) -> None:
    path = place.folder / "federation.toml"
    path.write_text(text)
    command = place.run(
        "serve",
        "serve",
        place.model,
        "--state",
        place.folder / "server",
        "--federation",
        path,
        "--listen",
        "127.0.0.1:0",
    )
    assert_ends(command, ConfigError, "federation.toml", *parts)
    assert not (place.folder / "server/federation.json").exists()


def test_serve_refuses_a_federation_toml_that_is_missing(place: Place) -> None:
    command = place.run("serve", "serve", place.model, "--state", place.folder / "s", "--federation", "no.toml")
    assert_ends(command, ConfigError, "cannot read no.toml", "Name an existing TOML file")


# state folders


def test_export_before_any_round_says_when_to_come_back(place: Place) -> None:
    place.serve(GATHERING)
    command = place.run("export", "export", place.folder / "out", "--state", place.folder / "server")
    assert_ends(command, ConfigError, "no finished round yet", "first round has been merged")
    assert not (place.folder / "out").exists()


def test_export_of_a_folder_that_is_no_state_is_refused(place: Place) -> None:
    command = place.run("export", "export", place.folder / "out", "--state", place.model)
    assert_ends(command, ConfigError, "is not a state folder", "--state")


def test_serve_refuses_a_state_folder_in_use(place: Place) -> None:
    server = place.serve(GATHERING)
    for flags in ([], ["--resume"]):
        second = place.serve(GATHERING, *flags, wait=False)
        assert_ends(second.command, ConfigError, "in use by another process", "--state")
    assert_open(server)


def test_serve_refuses_the_state_of_a_federation_without_resume(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    assert place.join(server.url, "ward", wards["a"]).wait() == 0
    assert server.command.wait() == 0
    rounds = sorted(path.name for path in (place.folder / "server/rounds").iterdir())
    assert_ends(place.serve(SETTINGS, wait=False).command, ConfigError, "already holds a federation", "--resume")
    changed = with_settings(SETTINGS, model={"head": "frozen"})
    assert_ends(place.serve(changed, "--resume", wait=False).command, ConfigError, "model differs", "--federation")
    assert sorted(path.name for path in (place.folder / "server/rounds").iterdir()) == rounds


def test_serve_with_resume_refuses_another_model(place: Place, wards: dict[str, Path], small_model: Path) -> None:
    from splitfl.split.create import create_checkpoint

    server = place.serve(SETTINGS)
    assert place.join(server.url, "ward", wards["a"]).wait() == 0
    server.command.wait()
    place.model = place.folder / "other"
    create_checkpoint(
        place.model, family="llama", layers=3, hidden=128, vocab=300, corpus=["some words, few of them"] * 9, seed=0
    )
    assert_ends(place.serve(None, "--resume", wait=False).command, ConfigError, "is not the model that", "--state")
    place.model = small_model
    again = place.serve(None, "--resume")  # what is durable is still there
    assert again.command.wait_for("listening")["durable_round"] == 0


def test_serve_with_resume_refuses_a_folder_that_is_no_state(place: Place) -> None:
    assert_ends(place.serve(None, "--resume", wait=False).command, ConfigError, "is not a state folder", "--state")


def test_join_refuses_the_state_folder_of_another_client(place: Place, hall: Server, wards: dict[str, Path]) -> None:
    first = place.join(hall.url, "ward-a", wards["a"], state="shared")
    first.wait_for("waiting")
    first.interrupt()
    first.wait()
    second = place.join(hall.url, "ward-b", wards["b"], state="shared")
    assert_ends(second, ConfigError, "holds the state of client 'ward-a'", "--state")


def test_join_refuses_a_state_folder_that_is_a_file(place: Place, wards: dict[str, Path]) -> None:
    (place.folder / "client-ward").write_text("not a folder")
    client = place.join("ws://127.0.0.1:9", "ward", wards["a"])
    assert_ends(client, ConfigError, "client-ward is a file", "Name a folder with --state")


# addresses


@pytest.mark.parametrize("fresh", [True, False])
def test_serve_refuses_a_port_in_use(place: Place, hall: Server, fresh: bool) -> None:
    server = place.serve(SETTINGS, port=hall.port, wait=False, fresh=fresh)
    assert_ends(server.command, ConfigError, f"cannot listen on 127.0.0.1:{hall.port}", "--listen")
    assert place.serve(SETTINGS).port  # the same command with another port needs no --resume: nothing had begun


def test_join_refuses_a_network_address_without_insecure(place: Place, wards: dict[str, Path]) -> None:
    assert_ends(place.join("ws://192.0.2.1:7000", "ward", wards["a"]), ConfigError, "192.0.2.1", "--insecure")


@pytest.mark.parametrize("address", ["127.0.0.1:7000", "http://127.0.0.1:7000", "ws://", "ws://127.0.0.1:7000/a"])
def test_join_refuses_what_is_no_address(place: Place, wards: dict[str, Path], address: str) -> None:
    assert_ends(place.join(address, "ward", wards["a"]), ConfigError, "no address to join", "ws://HOST:PORT")


def test_join_gives_up_on_an_unreachable_server_when_its_patience_ends(place: Place, wards: dict[str, Path]) -> None:
    url = f"ws://127.0.0.1:{free_port()}"
    client = place.join(url, "ward", wards["a"], "--patience", 1)
    assert_ends(client, LinkError, f"the server at {url} was not reached in", "Connection refused", "host and port")
    assert client.stderr.count(f"waiting for the server at {url}") >= 2
    assert "next try in 0.5 s" in client.stderr


def test_join_waits_for_a_server_that_comes_late(place: Place, wards: dict[str, Path]) -> None:
    port = free_port()
    place.serve(SETTINGS, state="earlier").command.kill()  # to know the terms
    client = place.join(f"ws://127.0.0.1:{port}", "ward", wards["a"])
    client.wait_for_stderr("waiting for the server")
    server = place.serve(SETTINGS, port=port)
    assert [client.wait(), server.command.wait()] == [0, 0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# names and versions


def test_second_client_of_a_name_is_refused_and_the_first_goes_on(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(with_settings(SETTINGS, rounds={"min_clients": 2}))
    first = place.join(server.url, "ward", wards["a"])
    first.wait_for("waiting")
    second = place.join(server.url, "ward", wards["b"], state="elsewhere")
    assert_ends(second, RefusedError, "a client named 'ward' is connected already", "--name")
    third = place.join(server.url, "ward-2", wards["b"])
    assert [first.wait(), third.wait(), server.command.wait()] == [0, 0, 0]


@pytest.mark.parametrize("name", ["../ward", "a/b", ".hidden", "", "x" * 65, "ward\n", "wärd"])
def test_join_refuses_a_name_that_is_a_path(place: Place, wards: dict[str, Path], name: str) -> None:
    client = place.join("ws://127.0.0.1:9", name, wards["a"], state="state")
    assert_ends(client, ConfigError, "is no client name", "letters, digits")
    assert not (place.folder / "state").exists()
