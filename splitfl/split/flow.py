"""Where gradients flow under given settings and a cut. No torch: the planner asks as well as the modules that train."""

from __future__ import annotations

from splitfl.config import Federation
from splitfl.cut import Cut


def embedding_trains(settings: Federation) -> bool:
    """Whether the embedding moves."""
    return settings.freeze_below == 0 and settings.model.train == "full"


def bottom_trains(settings: Federation, cut: Cut) -> bool:
    """Whether anything below the trunk trains, so that the trunk owes the client a gradient."""
    return embedding_trains(settings) or cut.n_bottom > settings.freeze_below


def trunk_needs_backward(settings: Federation, cut: Cut, layers: int) -> bool:
    """Whether a step runs backward through the trunk: gradients may be sent, and something in it or below it trains."""
    trunk = cut.trunk(layers)
    return (
        settings.trains_trunk
        and len(trunk) > 0
        and (trunk.stop > settings.freeze_below or bottom_trains(settings, cut))
    )
