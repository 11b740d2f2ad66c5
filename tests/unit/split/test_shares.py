"""Which weights are merged, and when blocks may change hands."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import tiny_config

from splitfl.config import Federation, parse_federation
from splitfl.cut import Cut
from splitfl.errors import ConfigError
from splitfl.split.shares import check_handover, shared_shapes


def settings(share: str, **model: Any) -> Federation:
    return parse_federation({"merge": {"share": share}, "model": {"max_bottom": 3, **model}}, "the test")


@pytest.mark.parametrize("now", [Cut(2, 1), Cut(0, 1)])
@pytest.mark.parametrize("share", ["top", "none"])
def test_trained_bottom_that_is_personal_cannot_change_hands(share: str, now: Cut) -> None:
    with pytest.raises(ConfigError, match="its bottom is personal") as error:
        check_handover(settings(share, min_bottom=0, freeze_below=0), Cut(1, 1), now)
    assert "--plan 1,1" in error.value.remedy


@pytest.mark.parametrize(
    ("chosen", "now"),
    [
        (settings("ends", freeze_below=0), Cut(3, 1)),  # merged: the same for all who hold it
        (settings("top", freeze_below=0, max_top=2), Cut(1, 2)),
        (settings("top"), Cut(3, 1)),  # frozen: nobody has anything of his own in it
        (settings("none"), Cut(3, 1)),
        (settings("none", freeze_below=2), Cut(2, 1)),
    ],
)
def test_blocks_that_are_merged_or_frozen_change_hands(chosen: Federation, now: Cut) -> None:
    check_handover(chosen, Cut(1, 1), now)


def test_lora_sends_b_alone_of_whatever_a_client_may_hold() -> None:
    chosen = settings("ends", train="lora", head="lora", freeze_below=0, max_top=2)
    for cut in (Cut(1, 1), Cut(3, 1), Cut(1, 2)):
        names = shared_shapes(tiny_config("llama"), chosen, cut)
        assert names
        assert all(".lora_B." in name for name in names)
