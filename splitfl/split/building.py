"""One builder at a time: making modules without memory patches ``torch.nn`` for the whole process meanwhile.

A thread that registers a parameter while another one builds on the meta device would find its own weights on it.
Everything in this package that registers parameters therefore runs ``exclusive``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_building = threading.RLock()


def exclusive(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` while no other thread builds modules."""

    @functools.wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> R:
        with _building:
            return function(*args, **kwargs)

    return locked
