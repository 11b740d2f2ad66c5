"""One federation of two clients that nothing disturbs: what every disturbed one must equal, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from disturbing import SETTINGS, assert_same, final_weights
from processes import Place, place
from torch import Tensor


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, wards: dict[str, Path]
) -> dict[str, Tensor]:
    """Weights after the last round of ``SETTINGS`` when nothing goes wrong."""
    with place(tmp_path_factory.mktemp("undisturbed"), small_model) as here:
        server = here.serve(SETTINGS)
        clients = [here.join(server.url, name, data) for name, data in wards.items()]
        assert [client.wait() for client in clients] == [0, 0], clients[0].story()
        assert server.command.wait() == 0, server.command.story()
        return final_weights(here.folder / "server")


@pytest.fixture
def finish(place: Place, undisturbed: dict[str, Tensor]) -> Callable[..., None]:
    """Wait until all commands end well, and compare what they leave with the undisturbed run."""

    def wait_and_compare(*commands: object) -> None:
        for command in commands:
            assert command.wait() == 0, command.story()  # type: ignore[attr-defined]
        assert_same(final_weights(place.folder / "server"), undisturbed)

    return wait_and_compare
