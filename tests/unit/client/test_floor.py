"""The client's own floor: compared with the noise that is really drawn, for every kind that leaves."""

from __future__ import annotations

from typing import Any

import pytest

from client_model.floor import Floor
from splitfl.config import Federation, parse_federation
from splitfl.errors import ConfigError, PrivacyError
from splitfl.privacy.policy import Workload, policy_of

RECORDS = 200
WORK = Workload(records=RECORDS, held_out=20, draws=800, steps=200, padded_length=64)
CERTIFIED = {"mode": "certified", "epsilon": 8.0, "dp_sgd": True}


def offered(privacy: dict[str, Any], **tables: Any) -> Federation:
    chosen = privacy if privacy["mode"] == "off" else {"clip_norm": 2.5} | privacy
    return parse_federation({"privacy": chosen, **tables}, "the test")


def check(floor: str, privacy: dict[str, Any], records: int = RECORDS, **tables: Any) -> None:
    Floor.parse(floor).check(policy_of(offered(privacy, **tables), WORK), records)


PERSONAL: dict[str, Any] = {"merge": {"share": "none"}}
NOISY = {"mode": "measured", "noise_multiplier": 0.5}


@pytest.mark.parametrize(
    ("floor", "privacy", "tables"),
    [
        ("off", {"mode": "off"}, {}),
        ("measured", {"mode": "measured", "level": "light"}, {}),
        ("measured", {"mode": "measured", "gradients": "noised"}, {}),
        ("measured:0.5", NOISY, PERSONAL),
        ("measured:0.5,weights:0", NOISY, {}),
        ("measured:0.5", NOISY | {"dp_sgd": True, "dp_noise_multiplier": 0.5}, {}),
        ("measured:0.5,gradients:0.02", NOISY | {"gradients": "noised"}, PERSONAL),
        (
            "measured:0.5,losses:2",
            NOISY | {"metric_noise_multiplier": 2.0},
            PERSONAL | {"evaluation": {"share_metrics": True}},
        ),
        ("measured:0.3", CERTIFIED | {"gradients": "noised"}, {}),
        ("certified:8", CERTIFIED, {}),
        ("certified:8", CERTIFIED | {"epsilon": 2.0, "unit": "client", "delta": 1e-7}, {}),
    ],
)
def test_an_offer_that_is_no_weaker_is_taken(floor: str, privacy: dict[str, Any], tables: dict[str, Any]) -> None:
    check(floor, privacy, **tables)


@pytest.mark.parametrize(
    ("floor", "privacy", "tables", "why"),
    [
        ("measured", {"mode": "off"}, {}, "noise of its activations is 0"),
        ("measured", {"mode": "measured", "noise_multiplier": 1e-12}, {}, "activations"),
        ("measured", {"mode": "measured", "gradients": "noised", "gradient_noise_multiplier": 1e-9}, {}, "gradients"),
        ("measured:0.5", {"mode": "measured", "noise_multiplier": 0.4}, PERSONAL, "activations is 0.4"),
        ("measured:0.5", NOISY | {"gradients": "noised"}, PERSONAL, "gradients is 0.02"),
        ("measured:0.5,gradients:inf", NOISY | {"gradients": "noised"}, PERSONAL, "gradients"),
        ("measured:0.5", NOISY, {}, "noise of its weights is 0"),
        ("measured:0.5", NOISY | {"dp_sgd": True, "dp_noise_multiplier": 0.4}, {}, "weights is 0.4"),
        (
            "measured:0.5",
            NOISY | {"metric_noise_multiplier": 0.1},
            PERSONAL | {"evaluation": {"share_metrics": True}},
            "losses is 0.1",
        ),
        ("measured:0.3", CERTIFIED | {"epsilon": 1e8}, {}, "activations"),
        ("certified:8", {"mode": "measured"}, {}, '"measured"'),
        ("certified:8", {"mode": "off"}, {}, '"off"'),
        ("certified:8", CERTIFIED | {"epsilon": 9.0}, {}, "epsilon is 9"),
        ("certified:8", CERTIFIED | {"epsilon": 1e8}, {}, "epsilon is 1e"),
        ("certified:8", CERTIFIED | {"delta": 0.99}, {}, "delta is 0.99"),
    ],
)
def test_a_weaker_offer_is_refused_and_the_reason_is_named(
    floor: str, privacy: dict[str, Any], tables: dict[str, Any], why: str
) -> None:
    with pytest.raises(PrivacyError, match=f"floor: .*{why}"):
        check(floor, privacy, **tables)


@pytest.mark.parametrize(("records", "refused"), [(10, False), (2000, True)])
def test_delta_stays_below_one_record_of_this_client(records: int, refused: bool) -> None:
    privacy = CERTIFIED | {"delta": 1e-3}
    if refused:
        with pytest.raises(PrivacyError, match=r"wants 0\.0005"):
            check("certified:8", privacy, records)
    else:
        check("certified:8", privacy, records)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "secret",
        "off:1",
        "measured:",
        "measured:-1",
        "measured:inf",
        "measured:0.3,letters:1",
        "measured:0.3,gradients:-1",
        "measured:0.3,gradients",
        "certified",
        "certified:nan",
        "certified:inf",
        "certified:8,gradients:1",
    ],
)
def test_floor_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="privacy floor"):
        Floor.parse(text)


def test_a_client_without_a_floor_takes_what_its_people_accepted() -> None:
    Floor().check(policy_of(Federation(), WORK), RECORDS)
