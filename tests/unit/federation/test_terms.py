"""The terms: whatever changes what leaves changes their hash, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest

from splitfl.config import Federation, parse_federation
from splitfl.federation.agreement import Terms

MODEL = "ab" * 32
OWNER = {"owner": "Ward A", "contact": "a@example.org", "purpose": "letters", "exporters": ["operator", "ward-b"]}


def terms(manifest: str = MODEL, **tables: Any) -> Terms:
    return Terms(parse_federation({"agreement": OWNER, **tables}, "the test"), manifest)


@pytest.mark.parametrize(
    "changed",
    [
        {"privacy": {"mode": "measured"}},
        {"privacy": {"mode": "measured", "noise_multiplier": 0.31}},
        {"rounds": {"count": 4}},
        {"batch": {"records": 9}},
        {"merge": {"share": "none"}},
        {"model": {"n_bottom": 2}},
        {"agreement": {**OWNER, "exporters": ["operator"]}},
        {"wire": {"codec": "fp32"}},
        {"name": "another"},
    ],
)
def test_whatever_changes_what_leaves_changes_the_hash(changed: dict[str, Any]) -> None:
    assert terms(**changed).sha256 != terms().sha256


def test_another_model_or_tokenizer_changes_the_hash() -> None:
    assert terms("cd" * 32).sha256 != terms().sha256


@pytest.mark.parametrize("changed", [{"optimizer": {"learning_rate": 1e-3}}, {"trunk": {"grace_s": 1.0}}, {"seed": 3}])
def test_what_changes_nothing_that_leaves_keeps_the_hash(changed: dict[str, Any]) -> None:
    assert terms(**changed).sha256 == terms().sha256


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
    assert "gradients   not sent" in measured
    certified = "\n".join(terms(privacy={"mode": "certified", "epsilon": 2.0}, merge={"share": "none"}).lines())
    assert "epsilon = 2, delta = 1e-05, for each record" in certified
    assert "allows 0.045 bits a record on average" in certified
    assert "weights     stay here" in certified


def test_terms_cannot_draw_on_a_terminal() -> None:
    from splitfl.errors import ConfigError

    with pytest.raises(ConfigError, match=r"agreement\.owner"):
        terms(agreement={**OWNER, "owner": "Ward\x1b[2J"})
