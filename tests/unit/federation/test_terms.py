"""The terms: whatever changes what leaves changes their hash, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from splitfl.config import LEAVING, Federation, parse_federation
from splitfl.federation.agreement import NOT_AGREED, Terms

MODEL = "ab" * 32
OWNER = {"owner": "Ward A", "contact": "a@example.org", "purpose": "letters", "exporters": ["operator", "ward-b"]}


def terms(manifest: str = MODEL, **tables: Any) -> Terms:
    return Terms(parse_federation({"agreement": OWNER, **tables}, "the test"), manifest)


#: a change in each section of the settings, and whether it is agreed to
CHANGES: dict[str, tuple[Any, bool]] = {
    "name": ("another", True),
    "seed": (3, False),
    "rounds": ({"count": 4}, True),
    "batch": ({"records": 9}, True),
    "model": ({"n_bottom": 2}, True),
    "optimizer": ({"learning_rate": 1e-3}, False),
    "merge": ({"share": "none"}, True),
    "trunk": ({"grace_s": 1.0}, False),
    "wire": ({"codec": "fp32"}, True),
    "evaluation": ({"share_metrics": True}, True),
    "release": ({"rank": 4}, True),
    "privacy": ({"mode": "measured", "noise_multiplier": 0.31}, True),
    "agreement": ({**OWNER, "exporters": ["operator"]}, True),
}


def test_every_section_of_the_settings_is_decided_on() -> None:
    assert set(CHANGES) == set(Federation.model_fields)
    assert {section for section, (_, agreed) in CHANGES.items() if not agreed} == NOT_AGREED


@pytest.mark.parametrize("section", CHANGES)
def test_whatever_changes_what_leaves_changes_the_hash_and_nothing_else_does(section: str) -> None:
    changed, agreed = CHANGES[section]
    private: dict[str, Any] = {"privacy": {"mode": "measured"}}  # a narrow release needs it
    assert (terms(**private | {section: changed}).sha256 != terms(**private).sha256) == agreed


def test_another_model_or_tokenizer_changes_the_hash() -> None:
    assert terms("cd" * 32).sha256 != terms().sha256


def test_both_sides_compute_the_same_hash_from_what_crosses_the_wire() -> None:
    here = terms(privacy={"mode": "certified", "epsilon": 8.0}, merge={"share": "none"})
    there = Terms(Federation.model_validate_json(here.settings.model_dump_json()), MODEL)
    assert there.sha256 == here.sha256


def test_a_hash_is_accepted_whole_or_by_a_long_beginning() -> None:
    agreement = terms()
    assert agreement.named_by(agreement.sha256)
    assert agreement.named_by(agreement.sha256[:12].upper())
    assert not agreement.named_by(agreement.sha256[:11])
    assert not agreement.named_by("")
    assert not agreement.named_by(terms(rounds={"count": 4}).sha256)


def test_terms_say_who_what_and_what_privacy_means() -> None:
    text = "\n".join(terms().lines())
    for said in (
        "Ward A",
        "a@example.org",
        "letters",
        "operator, ward-b",
        "The server can read the text",
        terms().sha256,
    ):
        assert said in text
    measured = "\n".join(terms(privacy={"mode": "measured"}).lines())
    assert "No guarantee" in measured
    assert line("gradients", {"mode": "measured"}).endswith("not sent; the trunk stays as published.")
    assert "of every record, held-out ones too, are sent once, clipped and noised" in measured
    assert "recurrence" in line("told too", {"mode": "measured"})
    assert "are sent as they are" in line("activations", {"mode": "off"})
    certified = "\n".join(terms(privacy={"mode": "certified", "epsilon": 2.0}, merge={"share": "none"}).lines())
    assert "epsilon = 2, delta = 1e-05, for each record" in certified
    assert "allows 0.045 bits a record on average" in certified
    assert "weights      stay here" in certified


@pytest.mark.parametrize(
    ("model", "noised", "plain"),
    [
        ({"n_bottom": 1}, "once, clipped", "; the server keeps them until the federation ends."),
        ({"n_bottom": 0, "freeze_below": 0}, "anew in each step, clipped", "as they are."),
        (
            {"n_bottom": 1, "max_bottom": 2, "freeze_below": 1},
            "once where your bottom is frozen, else anew in each step, clipped",
            "; the server keeps them where your bottom is frozen until the federation ends.",
        ),
    ],
)
def test_terms_say_how_often_activations_leave_and_whether_they_stay(
    model: dict[str, Any], noised: str, plain: str
) -> None:
    assert noised in line("activations", {"mode": "measured"}, model=model)
    assert line("activations", {"mode": "off"}, model=model).endswith(plain)


def test_a_server_that_begins_to_keep_activations_needs_another_yes() -> None:
    none, some, more = (terms(trunk={"cache_gib": gib}) for gib in (0.0, 1.0, 8.0))
    assert none.sha256 != some.sha256 == more.sha256
    assert none.lines() != some.lines()
    assert some.lines() == more.lines()


NOISED = {"mode": "measured", "gradients": "noised", "dp_sgd": True, "clip_norm": 2.0}
SHARED = {"evaluation": {"share_metrics": True}}


def line(name: str, privacy: dict[str, Any], **tables: Any) -> str:
    (found,) = [said for said in terms(privacy=privacy, **tables).lines() if said.startswith(f"{name} ")]
    return found


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("privacy", "noise_multiplier"),
        ("gradients", "gradient_noise_multiplier"),
        ("weights", "dp_noise_multiplier"),
        ("losses", "metric_noise_multiplier"),
    ],
)
def test_terms_say_of_everything_that_can_leave_whether_it_does_and_with_which_noise(name: str, setting: str) -> None:
    """A line for each of ``LEAVING``; the first is the mode's own."""
    assert name in (*LEAVING, "privacy")
    assert "0.37" in line(name, NOISED | {setting: 0.37}, **SHARED)
    if name != "privacy":
        assert "noise: as epsilon asks" in line(name, NOISED | {"mode": "certified", "epsilon": 8.0}, **SHARED)
        assert "sent" in line(name, {"mode": "off"}, **SHARED)
        assert "without noise" in line(name, {"mode": "off"}, **SHARED) or name == "gradients"


def test_terms_name_every_kind_that_can_leave() -> None:
    names = {said.split(" ")[0] for said in terms(privacy=NOISED, **SHARED).lines()}
    assert {"privacy", *LEAVING[1:]} <= names


@pytest.mark.parametrize(
    ("name", "tables"),
    [("gradients", {"privacy": {"mode": "measured"}}), ("weights", {"merge": {"share": "none"}}), ("losses", {})],
)
def test_terms_say_what_stays(name: str, tables: dict[str, Any]) -> None:
    (found,) = [said for said in terms(**tables).lines() if said.startswith(f"{name} ")]
    assert "stay here" in found or "not sent" in found


def test_terms_do_not_promise_that_losses_stay_where_they_are_shared() -> None:
    (stays,) = [said for said in terms(**SHARED).lines() if said.startswith("stays here")]
    assert "loss" not in stays


def test_terms_do_not_promise_that_what_stays_cannot_be_told_from_what_is_sent() -> None:
    (stays,) = [said for said in terms().lines() if said.startswith("stays here")]
    assert "what is computed from them and sent tells of them" in stays


def test_weights_that_leave_without_dp_are_said_to() -> None:
    assert "without noise" in line("weights", {"mode": "measured"})


def test_terms_cannot_draw_on_a_terminal() -> None:
    from splitfl.errors import ConfigError

    with pytest.raises(ConfigError, match=r"agreement\.owner"):
        terms(agreement={**OWNER, "owner": "Ward\x1b[2J"})
