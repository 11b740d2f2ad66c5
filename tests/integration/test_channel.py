"""The encrypted channel between real processes: invited once, known from then on, and everybody else kept out."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import refusals
from eavesdropper import Eavesdropper
from processes import Command, Place, Server, with_settings
from proxy import Proxy, every
from raw_client import RawClient
from refusals import GATHERING, assert_ends
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from client_model.identity import client_context
from server_model.authority import open_authority
from server_model.invitations import invite
from splitfl.channel.certificates import certificate_pem, key_pem, new_key
from splitfl.channel.joining import JoinString
from splitfl.errors import ConfigError, DataError, RefusedError, TrustError
from splitfl.wire.messages import Refused, Welcome

SETTINGS = with_settings(refusals.SETTINGS, rounds={"count": 2, "local_steps": 3}, trunk={"grace_s": 20.0})


def invited(server: Server, name: str, *flags: object, state: str = "server") -> str:
    """The join string that the command prints."""
    command = server.place.run("invite", "invite", name, "--state", server.place.folder / state, *flags)
    assert command.wait() == 0, command.story()
    line, nothing = command.stdout.split("\n")
    assert nothing == ""
    return line


def joining(here: Place, line: str, data: Path, *flags: object, state: str) -> Command:
    """A client with a join string, and no name."""
    places = ("--state", here.folder / state, "--cache", here.folder / "cache")
    consent = ("--accept", here.agreement) if here.agreement else ()
    usual = ("--plan", "federation", "--threads", 1, "--json")
    return here.run("join", "join", line, "--data", data, *places, *consent, *usual, *flags)


def table(server: Server) -> dict[str, dict[str, Any]]:
    """``splitfl clients --json``, by name."""
    command = server.place.run("clients", "clients", "--state", server.place.folder / "server", "--json")
    assert command.wait() == 0, command.story()
    return {client["name"]: client for client in json.loads(command.stdout)["clients"]}


def identity(folder: Path) -> Path:
    """The one identity in a client's state folder."""
    (found,) = (folder / "identity").iterdir()
    return found


# the whole path


def test_client_is_invited_once_and_known_from_then_on(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    line = invited(server, "ward-a")
    first = joining(place, line, wards["a"], state="a")
    first.wait_for("round_durable")
    first.interrupt()
    assert first.wait() == 130, first.story()
    again = joining(place, line, wards["a"], state="a")
    assert again.wait() == 0, again.story()
    assert server.command.wait() == 0, server.command.story()
    assert table(server)["ward-a"]["status"] == "enrolled"
    assert not server.command.named("unencrypted")
    assert again.report["client"] == "ward-a"


def test_client_that_has_enrolled_needs_no_token_any_more(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "tokenless")
    client = joining(hall.place, line, wards["a"], state="tokenless")
    client.wait_for("waiting")
    client.kill()
    join = JoinString.parse(line)
    without = JoinString(join.host, join.port, join.name, join.authority)
    again = joining(hall.place, str(without), wards["a"], state="tokenless")
    again.wait_for("waiting")
    again.kill()


def test_keys_are_for_their_owners_eyes_alone_and_tokens_are_nowhere(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "secretive")
    client = joining(hall.place, line, wards["a"], "--verbose", state="secretive")
    client.wait_for("waiting")
    client.kill()
    token = JoinString.parse(line).token
    assert token not in client.stderr + client.stdout + hall.command.stderr + hall.command.stdout
    tls = hall.place.folder / "server" / "tls"
    for folder in (tls, identity(hall.place.folder / "secretive")):
        for file in folder.iterdir():
            assert token.encode() not in file.read_bytes(), file
            if b"PRIVATE" in file.read_bytes():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(tls.stat().st_mode) == 0o700
    key = (identity(hall.place.folder / "secretive") / "key.pem").read_bytes()
    assert all(key not in file.read_bytes() for file in tls.iterdir())


def test_connections_cut_in_the_middle_lose_neither_token_nor_session(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    budgets = every(iter([200, 900, 1500, 3000, 4500, 80_000]).__next__, cuts=6)
    with Proxy(server.url, budgets=budgets) as proxy:
        line = invited(server, "ward-a", "--address", proxy.url.partition("://")[2])
        client = joining(place, line, wards["a"], state="a")
        assert client.wait() == 0, client.story()
        assert proxy.cuts >= 4
    assert server.command.wait() == 0, server.command.story()


def test_restarted_server_is_the_same_server(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(SETTINGS)
    client = joining(place, invited(server, "ward-a"), wards["a"], state="a")
    client.wait_for("round_durable")
    server.command.kill()
    again = server.again()
    assert client.wait() == 0, client.story()
    assert again.command.wait() == 0, again.command.story()


def test_invitation_may_come_before_the_first_start(place: Place, wards: dict[str, Path]) -> None:
    state = place.folder / "server"
    state.mkdir()
    join = invite(state, "early", address="127.0.0.1:1", valid_s=60)
    server = place.serve(GATHERING)
    line = JoinString("127.0.0.1", server.port, join.name, join.authority, join.token)
    joining(place, str(line), wards["a"], state="early").wait_for("waiting")


# who is kept out


def test_join_string_works_for_one_state_folder_alone(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "once")
    first = joining(hall.place, line, wards["a"], state="once")
    first.wait_for("waiting")
    second = joining(hall.place, line, wards["a"], state="thief")
    assert_ends(second, RefusedError, "has been used already", "splitfl invite")
    first.kill()


def test_invitation_that_is_over_is_refused(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "late", "--valid-hours", 1e-7)
    assert_ends(joining(hall.place, line, wards["a"], state="late"), RefusedError, "is over", "splitfl invite")


def test_unknown_token_is_refused(hall: Server, wards: dict[str, Path]) -> None:
    join = JoinString.parse(invited(hall, "guess"))
    line = JoinString(join.host, join.port, join.name, join.authority, "x" * 43)
    assert_ends(joining(hall.place, str(line), wards["a"], state="guess"), RefusedError, "no invitation", "invite")


def test_wrong_fingerprint_ends_the_client_before_it_says_anything(hall: Server, wards: dict[str, Path]) -> None:
    join = JoinString.parse(invited(hall, "careful"))
    line = JoinString(join.host, join.port, join.name, "ab" * 32, join.token)
    command = joining(hall.place, str(line), wards["a"], state="careful")
    assert_ends(command, TrustError, "is not the one that this join string is for", "Nothing was sent")
    assert table(hall)["careful"]["status"] == "invited"


def test_revoked_client_is_cut_off_and_the_others_go_on(place: Place, wards: dict[str, Path]) -> None:
    settings = with_settings(SETTINGS, rounds={"count": 2, "local_steps": 40, "min_clients": 2}, trunk={"grace_s": 300})
    server = place.serve(settings)
    bad = joining(place, line := invited(server, "bad"), wards["a"], state="bad")
    good = joining(place, invited(server, "good"), wards["b"], state="good")
    bad.wait_for("step")
    assert place.run("revoke", "revoke", "bad", "--state", place.folder / "server").wait() == 0
    assert_ends(bad, RefusedError, "has revoked this client", "splitfl invite")
    assert_ends(joining(place, line, wards["a"], state="bad"), RefusedError, "has revoked this client")
    good.wait_for("round_durable")  # long before the grace time of a client that may come back
    assert table(server)["bad"]["status"] == "revoked"
    back = joining(place, invited(server, "bad"), wards["a"], state="bad")
    assert [good.wait(), back.wait()] == [0, 0], good.story() + back.story()


def test_newer_invitation_replaces_the_client_of_the_older_one(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "moved")
    old = joining(hall.place, line, wards["a"], state="old-machine")
    old.wait_for("waiting")
    new = joining(hall.place, invited(hall, "moved"), wards["a"], state="new-machine")
    assert_ends(old, RefusedError, "replaced by a newer one")
    new.wait_for("waiting")
    new.kill()


def test_client_cannot_take_another_name(hall: Server, wards: dict[str, Path]) -> None:
    client = joining(hall.place, invited(hall, "modest"), wards["a"], state="modest")
    client.wait_for("waiting")
    client.kill()
    with RawClient(f"wss://127.0.0.1:{hall.port}", "other", tls=certified(hall, "modest")) as raw:
        assert isinstance(raw.greeting, Refused)
        assert raw.greeting.code == "name_mismatch"


def certified(server: Server, name: str) -> Any:
    """TLS settings with the certificate that the client in state folder ``name`` has."""
    folder = identity(server.place.folder / name)
    context = client_context()
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_tls_without_a_certificate_does_not_say_hello(hall: Server) -> None:
    context = client_context()
    context.load_verify_locations(hall.place.folder / "server" / "tls" / "ca.pem")
    with RawClient(f"wss://127.0.0.1:{hall.port}", "anybody", tls=context) as raw:
        assert isinstance(raw.greeting, Refused)
        assert raw.greeting.code == "certificate_missing"


def test_certificate_of_another_authority_is_not_taken(hall: Server, wards: dict[str, Path], tmp_path: Path) -> None:
    client = joining(hall.place, line := invited(hall, "foreign"), wards["a"], state="foreign")
    client.wait_for("waiting")
    client.kill()
    other, key = open_authority(tmp_path / "other"), new_key()
    folder = identity(hall.place.folder / "foreign")
    good_until = open_authority(hall.place.folder / "server").certificate.not_valid_before_utc
    (folder / "key.pem").write_bytes(key_pem(key))
    forged = other.sign_client(key.public_key(), "foreign", good_until)
    (folder / "certificate.pem").write_text(certificate_pem(forged))
    command = joining(hall.place, line, wards["a"], state="foreign")
    assert_ends(command, TrustError, "is of another authority", "splitfl invite")
    with pytest.raises((OSError, InvalidHandshake, ConnectionClosed)):
        RawClient(f"wss://127.0.0.1:{hall.port}", "foreign", tls=certified(hall, "foreign"))


def test_certificate_that_is_not_in_the_books_is_not_taken(hall: Server, wards: dict[str, Path]) -> None:
    client = joining(hall.place, line := invited(hall, "unbooked"), wards["a"], state="unbooked")
    client.wait_for("waiting")
    client.kill()
    authority, key = open_authority(hall.place.folder / "server"), new_key()
    folder = identity(hall.place.folder / "unbooked")
    (folder / "key.pem").write_bytes(key_pem(key))
    unbooked = authority.sign_client(key.public_key(), "unbooked", authority.certificate.not_valid_before_utc)
    (folder / "certificate.pem").write_text(certificate_pem(unbooked))
    assert_ends(joining(hall.place, line, wards["a"], state="unbooked"), RefusedError, "no record of the client's")


def test_server_with_another_authority_is_not_trusted(place: Place, wards: dict[str, Path]) -> None:
    server = place.serve(GATHERING)
    client = joining(place, line := invited(server, "ward-a"), wards["a"], state="a")
    client.wait_for("waiting")
    client.kill()
    server.command.kill()
    shutil.rmtree(place.folder / "server" / "tls")
    place.serve(GATHERING, port=server.port)
    command = joining(place, line, wards["a"], state="a")
    assert_ends(command, TrustError, "no certificate of the expected authority", "another way")


@pytest.mark.parametrize("shows_the_real_authority", [False, True])
def test_token_is_never_told_to_somebody_in_the_middle(
    hall: Server, wards: dict[str, Path], tmp_path: Path, shows_the_real_authority: bool
) -> None:
    name = f"wiretapped-{shows_the_real_authority}"
    real = open_authority(hall.place.folder / "server").pem
    with Eavesdropper(tmp_path, shown=real if shows_the_real_authority else None) as middle:
        line = invited(hall, name, "--address", f"127.0.0.1:{middle.port}")
        command = joining(hall.place, line, wards["a"], state=name)
        expected = "no certificate of the expected authority" if shows_the_real_authority else "is not the one"
        assert_ends(command, TrustError, expected)
        assert middle.connections == 1 + shows_the_real_authority
        assert b"ask_authority" in middle.heard
        assert JoinString.parse(line).token.encode() not in middle.heard
        assert b"enrol" not in middle.heard


# plain sockets


def test_plain_client_on_this_machine_may_come_and_both_ends_say_that_it_is_not_encrypted(
    place: Place, wards: dict[str, Path]
) -> None:
    server = place.serve(GATHERING)
    client = place.join(server.url, "plain", wards["a"])
    client.wait_for("waiting")
    assert "NOT encrypted" in client.stderr
    assert server.command.wait_for("unencrypted")["client"] == "plain"


def test_name_of_an_invited_client_cannot_be_had_without_its_certificate(hall: Server, wards: dict[str, Path]) -> None:
    invited(hall, "reserved")
    command = hall.place.join(hall.url, "reserved", wards["a"])
    assert_ends(command, RefusedError, "takes a certificate", "splitfl invite")


def test_beyond_this_machine_plain_clients_are_refused(place: Place, wards: dict[str, Path]) -> None:
    arguments = ("--state", place.folder / "server", "--federation", written(place), "--listen", "0.0.0.0:0")
    command = place.run("serve", "serve", place.model, *arguments, "--json")
    server = Server(place, command)
    assert server.url.startswith("wss://0.0.0.0:")
    assert_ends(
        place.join(f"ws://127.0.0.1:{server.port}", "plain", wards["a"]), RefusedError, "encrypted connections only"
    )
    assert_ends(
        place.run("invite", "invite", "ward", "--state", place.folder / "server"), ConfigError, "0.0.0.0", "--address"
    )
    line = invited(server, "ward-a", "--address", f"localhost:{server.port}")
    joining(place, line, wards["a"], state="a").wait_for("waiting")


def test_insecure_server_takes_both_and_says_so(place: Place, wards: dict[str, Path]) -> None:
    arguments = ("--state", place.folder / "server", "--federation", written(place), "--listen", "0.0.0.0:0")
    command = place.run("serve", "serve", place.model, *arguments, "--insecure")
    command.wait_for_stderr("WARNING: --insecure")
    port = int(command.stderr.partition("listening on 0.0.0.0:")[2].partition(",")[0])
    server = Server(place, command, url=f"ws://127.0.0.1:{port}")
    place.agreement = (place.folder / "server" / "agreement.txt").read_text().split()[-1]
    place.join(server.url, "plain", wards["a"]).wait_for("waiting")
    line = invited(server, "ward-b", "--address", f"127.0.0.1:{port}")
    joining(place, line, wards["b"], state="b").wait_for("waiting")
    command.wait_for_stderr("WARNING: the link to plain is NOT encrypted")
    assert "link to ward-b" not in command.stderr


def written(place: Place) -> Path:
    from processes import write_settings

    return write_settings(place.folder / "federation.toml", GATHERING)


def test_strangers_do_not_keep_clients_out(hall: Server, wards: dict[str, Path]) -> None:
    import socket

    from server_model.door import MAX_STRANGERS

    silent = [socket.create_connection(("127.0.0.1", hall.port)) for _ in range(MAX_STRANGERS + 20)]
    client = joining(hall.place, invited(hall, "patient"), wards["a"], state="patient")
    client.wait_for("waiting")
    client.kill()
    deadline = time.monotonic() + 20
    silent[0].settimeout(max(0.0, deadline - time.monotonic()))
    assert silent[0].recv(1) == b""  # the oldest was thrown out
    for stranger in silent:
        stranger.close()


# the commands


def test_invite_without_an_address_says_what_to_do(place: Place) -> None:
    (place.folder / "new").mkdir()
    command = place.run("invite", "invite", "ward", "--state", place.folder / "new")
    assert_ends(command, ConfigError, "does not know the server's address", "--address HOST:PORT")


@pytest.mark.parametrize("name", ["../x", "a b", "-"])
def test_invite_refuses_what_is_no_name(hall: Server, name: str) -> None:
    command = hall.place.run("invite", "invite", "--state", hall.place.folder / "server", "--", name)
    assert_ends(command, ConfigError, "is no client name")


def test_commands_refuse_a_state_folder_that_is_not_there(place: Place) -> None:
    for arguments in (("invite", "ward"), ("revoke", "ward"), ("clients",)):
        command = place.run(arguments[0], *arguments, "--state", place.folder / "nowhere")
        assert_ends(command, ConfigError, "there is no folder", "--state")


def test_revoking_somebody_unknown_says_so(hall: Server) -> None:
    command = hall.place.run("revoke", "revoke", "nobody", "--state", hall.place.folder / "server")
    assert_ends(command, ConfigError, "no client 'nobody'", "splitfl clients")


def test_clients_are_listed_for_a_person_too(hall: Server) -> None:
    invited(hall, "listed")
    command = hall.place.run("clients", "clients", "--state", hall.place.folder / "server")
    assert command.wait() == 0
    (row,) = [text for text in command.stdout.splitlines() if "listed" in text]
    assert "invited" in row


def test_join_does_not_repeat_the_token_of_a_line_that_is_cut_off(hall: Server, wards: dict[str, Path]) -> None:
    line = invited(hall, "cut-off")
    for broken in (line[:-5], line.replace("splitfl://", "plitfl://"), line.replace(":", "", 1)):
        command = joining(hall.place, broken, wards["a"], state="cut-off")
        assert command.wait() == ConfigError.exit_code, command.story()
        assert JoinString.parse(line).token not in command.stderr


def test_damaged_authority_stops_the_start(place: Place) -> None:
    server = place.serve(GATHERING)
    server.command.kill()
    (place.folder / "server" / "tls" / "ca.key").write_text("gone")
    command = place.serve(GATHERING, wait=False).command
    assert command.wait() == 9, command.story()
    assert "cannot be read" in command.error
    assert "backup" in command.error


def test_welcome_goes_to_certified_clients(hall: Server, wards: dict[str, Path]) -> None:
    client = joining(hall.place, invited(hall, "guest"), wards["a"], state="guest")
    client.wait_for("waiting")
    client.kill()
    with RawClient(f"wss://127.0.0.1:{hall.port}", "guest", tls=certified(hall, "guest"), fresh=True) as raw:
        assert isinstance(raw.greeting, Welcome | Refused)  # refused only while the dead one counts as connected
        assert not isinstance(raw.greeting, Refused) or raw.greeting.code == "name_taken"


def test_books_that_break_while_it_runs_let_nobody_in_and_tell_strangers_no_path(
    place: Place, wards: dict[str, Path]
) -> None:
    server = place.serve(GATHERING)
    line = invited(server, "ward-a")
    (place.folder / "server" / "tls" / "clients.sqlite").write_bytes(b"no database, " * 1000)
    command = joining(place, line, wards["a"], state="a")
    assert_ends(command, RefusedError, "cannot use its books", "operator")
    assert str(place.folder / "server") not in command.stderr
    server.command.wait_for_stderr("clients.sqlite")


def test_line_is_read_from_stdin(hall: Server) -> None:
    line = invited(hall, "quiet")
    command = [sys.executable, "-m", "splitfl.cli", "join", "-", "--data", "nowhere.jsonl"]
    done = subprocess.run(command, input=f"{line}\n", capture_output=True, text=True, check=False)
    assert done.returncode == DataError.exit_code, done.stderr
    assert "there is no nowhere.jsonl" in done.stderr
    assert table(hall)["quiet"]["status"] == "invited"  # what is wrong here is said before the token is used
