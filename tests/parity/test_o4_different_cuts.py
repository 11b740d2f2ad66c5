"""O4: O3 holds with every client on a different cut, nothing frozen, also when cuts change between rounds.

A block is merged over all that trained a copy of it, the server's copy with the tokens that went through it.
"""

from __future__ import annotations

import pytest

from splitfl.cut import Cut
from tests.parity.centralised import assert_equals_centralised, sgd_settings
from tests.parity.federating import federate

ANY_CUT = {"n_bottom": 0, "n_top": 0, "max_bottom": 2, "max_top": 5, "freeze_below": 0}
DIFFERENT = [Cut(0, 0), Cut(2, 1), Cut(1, 3)]
ONE_WITHOUT_TRUNK = [Cut(0, 0), Cut(0, 5), Cut(2, 1)]


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama"])
def test_round_of_three_cuts_equals_one_centralised_step(checkpoint, rounds, notes, tmp_path, request):
    model = request.getfixturevalue(checkpoint)
    settings = sgd_settings(rounds, model=ANY_CUT)
    outcome = federate(model, notes, settings, tmp_path, dict(zip(sorted(notes), DIFFERENT, strict=True)))
    assert_equals_centralised(model, notes, settings, outcome, tmp_path / "out")


def test_round_with_a_client_that_holds_all_blocks_equals_one_centralised_step(llama, notes, tmp_path):
    settings = sgd_settings(2, model=ANY_CUT)
    outcome = federate(llama, notes, settings, tmp_path, dict(zip(sorted(notes), ONE_WITHOUT_TRUNK, strict=True)))
    assert_equals_centralised(llama, notes, settings, outcome, tmp_path / "out")


def test_clients_that_change_their_cut_between_rounds_equal_centralised_steps(llama, notes, tmp_path):
    settings = sgd_settings(4, model=ANY_CUT)
    plans = [
        [Cut(0, 0), Cut(2, 2), Cut(1, 0), Cut(1, 0)],  # takes blocks on, gives some back, stops and keeps its cut
        [Cut(2, 1), Cut(0, 3), Cut(0, 5)],  # from a deep bottom to a deep top to no trunk at all
        Cut(1, 3),
    ]
    outcome = federate(llama, notes, settings, tmp_path, dict(zip(sorted(notes), plans, strict=True)))
    assert_equals_centralised(llama, notes, settings, outcome, tmp_path / "out")
    reports = [outcome.reports[name] for name in sorted(notes)]
    assert [report["starts"] for report in reports] == [4, 3, 1]
    assert [report["rounds_taken"] for report in reports] == [4, 4, 4]
    assert all(report["uncounted_starts"] == 0 for report in reports)
