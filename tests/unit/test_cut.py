"""A cut is two counts of blocks; everything else about it follows from the number of blocks of the model."""

from __future__ import annotations

import pytest

from splitfl.cut import Cut
from splitfl.errors import ConfigError


@pytest.mark.parametrize(("text", "cut"), [("1,1", Cut(1, 1)), ("0,24", Cut(0, 24)), (" 2 , 3 ", Cut(2, 3))])
def test_cut_reads_two_numbers(text: str, cut: Cut) -> None:
    assert Cut.parse(text) == cut
    assert Cut.parse(str(cut)) == cut


@pytest.mark.parametrize("text", ["", "1", "1,", "1,2,3", "-1,2", "a,b", "1.5,2", "²,1", "1;2"])
def test_cut_refuses_what_is_not_two_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match="BOTTOM,TOP"):
        Cut.parse(text)


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1)])
def test_cut_refuses_negative_counts(numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="0 or more"):
        Cut(*numbers)


@pytest.mark.parametrize("layers", [4, 6, 32])
@pytest.mark.parametrize("cut", [Cut(0, 0), Cut(1, 1), Cut(2, 2), Cut(0, 4), Cut(4, 0)])
def test_cut_gives_every_block_to_one_part(cut: Cut, layers: int) -> None:
    bottom = range(cut.n_bottom)
    assert [*bottom, *cut.trunk(layers), *cut.top(layers)] == list(range(layers))
    assert len(cut.top(layers)) == cut.n_top


def test_cut_that_keeps_every_block_leaves_an_empty_trunk() -> None:
    assert len(Cut(0, 6).trunk(6)) == len(Cut(2, 4).trunk(6)) == 0


def test_cut_refuses_a_model_with_fewer_blocks() -> None:
    cut = Cut(2, 3)
    cut.check(5)
    for use in (cut.check, cut.trunk, cut.top):
        with pytest.raises(ConfigError, match="at most 4"):
            use(4)
