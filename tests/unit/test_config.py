"""``federation.toml``: checked once, each field by name, and the same again on the other side."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from splitfl.config import Federation, Section, load_federation, parse_federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError


def parsed(**tables: Any) -> Federation:
    return parse_federation(tables, "federation.toml")


def sections() -> list[type[BaseModel]]:
    return [Federation, *(cls for cls in Section.__subclasses__() if cls is not Federation)]


def test_settings_without_a_file_are_the_defaults() -> None:
    assert load_federation(None) == Federation()


def test_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('name = "wards"\n[rounds]\ncount = 7\n')
    settings = load_federation(path)
    assert (settings.name, settings.rounds.count) == ("wards", 7)
    assert settings.batch == Federation().batch


def test_settings_survive_the_way_to_a_client() -> None:
    settings = parsed(name="wards", rounds={"count": 7}, model={"n_bottom": 2, "max_top": 3})
    assert parse_federation(Federation.model_validate_json(settings.model_dump_json()).model_dump(), "x") == settings


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Federation().rounds.count = 9  # type: ignore[misc]


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_says_what_it_is_and_in_which_unit(section: type[BaseModel]) -> None:
    tables = {cls for cls in sections() if cls is not Federation}
    for name, field in section.model_fields.items():
        if field.annotation not in tables:
            assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("tables", "field"),
    [
        ({"rounds": {"count": 0}}, "rounds.count"),
        ({"rounds": {"count": "three"}}, "rounds.count"),
        ({"rounds": {"client_fraction": 0}}, "rounds.client_fraction"),
        ({"rounds": {"client_fraction": 1.5}}, "rounds.client_fraction"),
        ({"rounds": {"cuont": 3}}, "rounds.cuont"),
        ({"batch": {"records": 4, "micro_batches": 3}}, "batch"),
        ({"batch": {"max_length": 1}}, "batch.max_length"),
        ({"model": {"train": "some"}}, "model.train"),
        ({"model": {"n_bottom": -1}}, "model.n_bottom"),
        ({"optimizer": {"learning_rate": 0}}, "optimizer.learning_rate"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate"),
        ({"batch": {"in_flight": 0}}, "batch.in_flight"),
        ({"optimizer": {"beta2": 1.0}}, "optimizer.beta2"),
        ({"optimizer": {"client_name": "sgd"}}, "optimizer"),
        ({"optimizer": {"client_learning_rate": 0}}, "optimizer.client_learning_rate"),
        ({"merge": {"share": "all"}}, "merge.share"),
        ({"trunk": {"mode": "parallel"}}, "trunk.mode"),
        ({"wire": {"codec": "int4"}}, "wire.codec"),
        ({"evaluation": {"held_out_fraction": 1.0}}, "evaluation.held_out_fraction"),
        ({"privacy": {"mode": "secret"}}, "privacy.mode"),
        ({"privacy": {"mode": "certified"}}, "privacy"),
        ({"privacy": {"epsilon": 8.0}}, "privacy"),
        ({"privacy": {"noise_multiplier": 0.3}}, "privacy"),
        ({"privacy": {"mode": "measured", "delta": 0}}, "privacy.delta"),
        ({"privacy": {"mode": "measured", "clip_norm": float("inf")}}, "privacy.clip_norm"),
        ({"batch": {"buckets": [64, 32]}}, "batch"),
        ({"name": "../wards"}, "name"),
        ({"seed": -1}, "seed"),
        ({"round": {"count": 3}}, "round"),
    ],
)
def test_malformed_field_is_named(tables: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        parsed(**tables)
    assert error.value.message.startswith(f"federation.toml: {field}: ")
    assert "docs/federation.md" in error.value.remedy


@pytest.mark.parametrize(
    ("text", "part"),
    [("[rounds", "is not TOML"), ("count = ", "is not TOML"), ("\xff", "is not TOML")],
)
def test_file_that_is_no_toml_is_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=part):
        load_federation(path)


@pytest.mark.parametrize("what", ["missing.toml", "."])
def test_file_that_cannot_be_read_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot read {re.escape(str(tmp_path / what))}"):
        load_federation(tmp_path / what)


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_table_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="the server's settings"):
        parse_federation(value, "the server's settings")


# cuts


def test_cut_is_the_only_one_unless_limits_say_otherwise() -> None:
    settings = parsed(model={"n_bottom": 2, "n_top": 1})
    assert settings.cut == Cut(2, 1)
    assert (settings.bottoms, settings.tops) == (range(2, 3), range(1, 2))
    assert settings.allows(Cut(2, 1))
    assert not settings.allows(Cut(1, 1))


def test_limits_allow_every_cut_between_them() -> None:
    settings = parsed(model={"n_bottom": 1, "n_top": 1, "min_bottom": 0, "max_bottom": 2, "max_top": 3})
    allowed = {(b, t) for b in range(5) for t in range(5) if settings.allows(Cut(b, t))}
    assert allowed == {(b, t) for b in range(3) for t in range(1, 4)}


def test_what_is_frozen_is_the_deepest_bottom_unless_it_is_said() -> None:
    assert parsed(model={"n_bottom": 1, "max_bottom": 3}).freeze_below == 3
    assert parsed(model={"n_bottom": 1, "freeze_below": 0}).freeze_below == 0


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"min_bottom": 2, "max_bottom": 1}, "a minimum is above its maximum"),
        ({"n_top": 1, "min_top": 2}, "a minimum is above its maximum"),
        ({"n_bottom": 3, "min_bottom": 0, "max_bottom": 2}, "outside its own limits"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(model: dict[str, int], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parsed(model=model)


def test_personal_heads_of_different_depth_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"share = .none."):
        parsed(model={"max_top": 2}, merge={"share": "none"})


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"n_bottom": 3, "n_top": 2}, "keeps 5 blocks but the model has 4"),
        ({"max_bottom": 5}, "above the model's 4 blocks"),
        ({"max_top": 5}, "above the model's 4 blocks"),
        ({"freeze_below": 5}, "freeze_below = 5"),
    ],
)
def test_model_that_is_too_small_is_refused(model: dict[str, int], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parsed(model=model).check_layers(4)


@pytest.mark.parametrize(
    "model", [{"n_bottom": 0, "n_top": 4}, {"n_bottom": 4, "n_top": 0}, {"n_bottom": 2, "n_top": 2}]
)
def test_trunk_may_be_empty(model: dict[str, int]) -> None:
    parsed(model=model).check_layers(4)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"privacy": {"mode": "measured"}, "batch": {"pack": True}}, "batch.pack"),
        ({"privacy": {"mode": "certified", "epsilon": 8.0}}, "privacy.dp_sgd"),
        (
            {"privacy": {"mode": "certified", "epsilon": 8.0, "gradients": "noised"}, "merge": {"share": "none"}},
            "gradients of a top trained without DP",
        ),
        (
            {"privacy": {"mode": "certified", "epsilon": 8.0, "dp_sgd": True}, "model": {"freeze_below": 0}},
            "model.freeze_below",
        ),
        (
            {"privacy": {"mode": "certified", "epsilon": 8.0, "dp_sgd": True}, "model": {"n_bottom": 0}},
            "model.freeze_below",
        ),
        ({"release": {"rank": 16}}, "privacy on"),
    ],
)
def test_privacy_that_cannot_be_had_is_refused_at_the_start(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse_federation(tables, "federation.toml")


def test_records_are_packed_only_where_they_are_not_the_unit_of_privacy() -> None:
    assert Federation().packs
    assert not parse_federation({"privacy": {"mode": "measured"}}, "x").packs
    assert not parse_federation({"batch": {"pack": False}}, "x").packs


def test_public_lengths_are_powers_of_two_up_to_the_longest() -> None:
    assert parse_federation({"batch": {"max_length": 100}}, "x").batch.padded_lengths == (32, 64, 100)
    assert parse_federation({"batch": {"max_length": 16}}, "x").batch.padded_lengths == (16,)
    assert parse_federation({"batch": {"max_length": 100, "buckets": [50, 100]}}, "x").batch.padded_lengths == (50, 100)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"rounds": {"count": True}}, "rounds.count"),
        ({"rounds": {"count": "3"}}, "rounds.count"),
        ({"rounds": {"count": 3.0}}, "rounds.count"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "optimizer.learning_rate"),
        ({"merge": {"clip_norm": True}}, "merge.clip_norm"),
        ({"batch": {"pack": "yes"}}, "batch.pack"),
        ({"batch": {"pack": 1}}, "batch.pack"),
        ({"batch": {"buckets": ["32", 256]}}, "batch.buckets.0"),
        ({"agreement": {"exporters": [7]}}, "agreement.exporters.0"),
        ({"seed": "5"}, "seed"),
    ],
)
def test_value_of_another_type_is_refused_by_its_field(table: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"here: {re.escape(field)}: Input should be a valid"):
        parse_federation(table, "here")


def test_whole_number_is_a_number_and_an_array_a_list() -> None:
    settings = parse_federation({"merge": {"clip_norm": 2}, "batch": {"buckets": [32, 256]}}, "here")
    assert (settings.merge.clip_norm, settings.batch.buckets) == (2.0, (32, 256))


def test_models_beside_the_federation_move_as_the_trunk_does_and_know_no_strategy() -> None:
    own = {"client_name": "sgd", "client_learning_rate": 0.5, "learning_rate": 1e-3}
    merge = {"strategy": "scaffold", "share": "top"}
    settings = parse_federation({"optimizer": own, "merge": merge, "rounds": {"count": 3}}, "the test")
    assert settings.optimizer.of_clients == "sgd"
    alone = settings.alone
    assert (alone.optimizer.of_clients, alone.optimizer.client_learning_rate) == ("adamw", None)
    assert (alone.merge.strategy, alone.merge.share) == ("fedavg", "top")
    assert (alone.rounds, alone.optimizer.learning_rate) == (settings.rounds, 1e-3)


def test_step_size_of_the_same_optimizer_holds_beside_the_federation_too() -> None:
    settings = parse_federation({"optimizer": {"client_learning_rate": 0.02}}, "the test")
    assert settings.alone.optimizer.client_learning_rate == 0.02
