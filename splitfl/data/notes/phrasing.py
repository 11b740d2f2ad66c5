"""Fills the slots of a phrase. Every draw comes from the generator that is passed in.

{left|right}   one of the alternatives           {3-7}, {1.2-2.4}   a number with as many decimals as the bounds
{side}         a fact of this note               {kg*20}            20 per kilogram, rounded
{m2*75}        75 per square metre of body surface, rounded to 5
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_SLOT = re.compile(r"\{([^{}]+)\}")
_RANGE = re.compile(r"(\d+(?:\.(\d+))?)-(\d+(?:\.\d+)?)")


def fill(template: str, rng: random.Random, facts: Mapping[str, str]) -> str:
    """Return ``template`` with each slot filled, left to right. A name that ``facts`` lacks raises ``KeyError``."""
    return _SLOT.sub(lambda slot: _value(slot.group(1), rng, facts), template)


def _value(body: str, rng: random.Random, facts: Mapping[str, str]) -> str:
    if "|" in body:
        return rng.choice(body.split("|"))
    if bounds := _RANGE.fullmatch(body):
        return number(rng, float(bounds[1]), float(bounds[3]), len(bounds[2] or ""))
    if "*" in body:
        unit, factor = body.split("*")
        amount = float(facts[unit]) * float(factor)
        step = 5 if unit == "m2" else 10 if amount >= 200 else 1
        return f"{step * round(amount / step)}"
    return facts[body]


def number(rng: random.Random, low: float, high: float, decimals: int = 0) -> str:
    """Draw uniformly from ``[low, high]`` in steps of ``10 ** -decimals``, both ends included."""
    scale = 10**decimals
    return f"{rng.randint(round(low * scale), round(high * scale)) / scale:.{decimals}f}"


def pick(rng: random.Random, phrases: Sequence[str], low: int, high: int) -> list[str]:
    """Draw ``low`` to ``high`` distinct phrases, in the table's order."""
    wanted = min(rng.randint(low, high), len(phrases))
    return [phrases[i] for i in sorted(rng.sample(range(len(phrases)), wanted))]


def pick_with_hallmark(rng: random.Random, phrases: Sequence[str], low: int, high: int) -> list[str]:
    """The first phrase, then ``low`` to ``high`` of the others."""
    return [phrases[0], *pick(rng, phrases[1:], low, high)]


def listed(items: Sequence[str], word: str = "and") -> str:
    """``["a", "b", "c"]`` as ``"a, b and c"``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {word} {items[-1]}"


def sentence(text: str) -> str:
    """Capitalise the first letter and end with a full stop."""
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
