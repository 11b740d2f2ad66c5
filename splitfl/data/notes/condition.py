"""What a table of conditions is made of: one diagnosis, and everything in a note that follows from it.

The diagnosis is drawn first; complaint, symptoms, vitals, findings, laboratory values, drugs and plan are then drawn
from its row, so that a language model has something to learn within a note. Phrases may hold slots (see phrasing.py):
``{left|right}`` chooses, ``{12-18}`` draws a number, ``{side}`` or a name from ``facts`` repeats one draw of this note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Course = Literal["hours", "days", "weeks", "months"]
Disposition = Literal["home", "admit", "clinic"]


def of(text: str) -> tuple[str, ...]:
    """Split ``"a; b; c"`` into its phrases: tables of short phrases read better as running text."""
    return tuple(phrase.strip() for phrase in text.split(";") if phrase.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One diagnosis. The first phrase of ``exam`` and of ``tests`` is its hallmark, and always appears."""

    name: str
    ages: tuple[float, float]  # years; a child's may be a fraction
    course: Course
    complaints: tuple[str, ...]  # noun phrases: "presents with ..."
    symptoms: tuple[str, ...]  # noun phrases: "reports ..."
    denies: tuple[str, ...]
    exam: tuple[str, ...]
    tests: tuple[str, ...]
    drugs: tuple[str, ...]  # formulary names; "a or b" where allergy or habit decides
    plan: tuple[str, ...]  # imperatives
    disposition: Disposition
    sex: Literal["any", "female", "male"] = "any"
    vitals: tuple[str, ...] = ()  # flags of patient.draw_vitals, e.g. "fever"
    labs: tuple[str, ...] = ()  # flags of patient.draw_labs, e.g. "crp+"
    known: tuple[str, ...] = ()  # comorbidities that the row takes for granted
    excludes: tuple[str, ...] = ()  # comorbidities that would contradict the row
    facts: Mapping[str, str] = field(default_factory=dict)  # drawn once a note, repeated wherever named
    lasting: tuple[int, int] | None = None  # in units of ``course``; its usual length where None
    smoker: float = 0.2  # probability that an adult smokes now
    oxygen_target: str = "94-98%"
    weight: float = 1.0  # relative frequency within the specialty
