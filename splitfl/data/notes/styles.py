"""How a hospital writes its notes: headings, layout and abbreviations. The content comes from ``generator``."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from splitfl.data.notes.patient import Patient, Vitals
from splitfl.data.notes.phrasing import sentence

SECTIONS = (
    "complaint", "history", "past", "medications", "allergies",
    "vitals", "examination", "investigations", "assessment", "plan",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Style:
    """``headings`` are in the order of ``SECTIONS``."""

    headings: tuple[str, ...]
    layout: Literal["inline", "block"]
    plan: Literal["numbered", "dashed", "prose"]
    short_vitals: bool


STYLES: dict[str, Style] = {
    "county": Style(
        ("Chief complaint", "History", "Past history", "Medications", "Allergies",
         "Vitals", "Examination", "Investigations", "Assessment", "Plan"), "inline", "numbered", False),
    "university": Style(
        ("CHIEF COMPLAINT", "HISTORY OF PRESENT ILLNESS", "PAST MEDICAL HISTORY", "MEDICATIONS", "ALLERGIES",
         "VITAL SIGNS", "EXAMINATION", "INVESTIGATIONS", "ASSESSMENT", "PLAN"), "block", "dashed", False),
    "district": Style(
        ("CC", "HPI", "PMH", "Meds", "Allergies", "Obs", "O/E", "Ix", "Imp", "Plan"), "inline", "prose", True),
    "letter": Style(
        ("Presenting complaint", "History", "Background", "Drug history", "Allergies",
         "Observations", "Clinical findings", "Results", "Diagnosis", "Management"), "inline", "dashed", True),
}  # fmt: skip

# Each specialty's hospital has a house style; the public notes come from everywhere.
_HOUSE_STYLE = {"cardiology": "university", "paediatrics": "letter", "oncology": "county"}
_HOUSE_SHARE = 0.6


def draw_style(rng: random.Random, specialty: str) -> Style:
    """The specialty's house style most of the time; any style with equal chance otherwise."""
    house = _HOUSE_STYLE.get(specialty)
    if house is not None and rng.random() < _HOUSE_SHARE:
        return STYLES[house]
    return STYLES[rng.choice(sorted(STYLES))]


def write_vitals(vitals: Vitals, patient: Patient, extra: Sequence[str], short: bool) -> str:
    """One line of vital signs, with the weight and whatever else ``extra`` says at its end."""
    pressure = f"{vitals.systolic}/{vitals.diastolic}"
    if short:
        items = [
            f"HR {vitals.heart_rate}", f"BP {pressure}", f"T {vitals.temperature:.1f}",
            f"RR {vitals.breathing_rate}", f"SpO2 {vitals.saturation}% RA",
        ]  # fmt: skip
    else:
        items = [
            f"heart rate {vitals.heart_rate}/min",
            f"blood pressure {pressure} mmHg",
            f"temperature {vitals.temperature:.1f} C",
            f"respiratory rate {vitals.breathing_rate}/min",
            f"oxygen saturation {vitals.saturation}% on room air",
        ]
    if patient.is_child and patient.age < 5:
        items.pop(1)  # not measured routinely below five
    return sentence(", ".join([*items, *extra]))


def render(header: str, sections: Mapping[str, Sequence[str]], style: Style) -> str:
    """Join header and sections. ``sections`` maps each of ``SECTIONS`` to its sentences, in order."""
    parts = [header]
    for key, heading in zip(SECTIONS, style.headings, strict=True):
        sentences = [sentence(text) for text in sections[key]]
        body = _plan(sentences, style.plan) if key == "plan" else " ".join(sentences)
        gap = "\n" if style.layout == "block" or body.startswith(("1. ", "- ")) else " "
        parts.append(f"{heading}:{gap}{body}")
    return ("\n\n" if style.layout == "block" else "\n").join(parts)


def _plan(sentences: Sequence[str], layout: str) -> str:
    if layout == "numbered":
        return "\n".join(f"{i}. {text}" for i, text in enumerate(sentences, 1))
    return "\n".join(f"- {text}" for text in sentences) if layout == "dashed" else " ".join(sentences)
