"""O3: with SGD and one local step, a round of C clients is one centralised step on the union batch, to 1e-5."""

from __future__ import annotations

import pytest

from tests.parity.centralised import assert_equals_centralised, sgd_settings
from tests.parity.federating import federate


@pytest.mark.parametrize("checkpoint", ["llama", "tied_llama"])
def test_round_of_three_clients_equals_one_centralised_step(checkpoint, notes, tmp_path, request):
    model = request.getfixturevalue(checkpoint)
    settings = sgd_settings(3)
    outcome = federate(model, notes, settings, tmp_path)
    assert_equals_centralised(model, notes, settings, outcome, tmp_path / "out")
