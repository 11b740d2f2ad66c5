"""A capability is measured once and kept as JSON: it must come back as it was, and nothing else may pass for one."""

from __future__ import annotations

import pytest

from splitfl.errors import ConfigError
from splitfl.planning.capability import Arithmetic, Capability, LinkSpeed

HERE = Capability("cpu", 8 << 30, 600 << 20, {"fp32": Arithmetic(3e-4, 1e-4, 2e-4)}, LinkSpeed(0.05, 2.5e6, 1.25e7))


def test_capability_comes_back_from_its_json_as_it_was() -> None:
    assert Capability.from_json(HERE.as_json()) == HERE


@pytest.mark.parametrize("text", ["", "[]", "{}", HERE.as_json().replace("0.05", "NaN"), HERE.as_json()[:-9]])
def test_capability_refuses_text_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="no recorded capability"):
        Capability.from_json(text)
