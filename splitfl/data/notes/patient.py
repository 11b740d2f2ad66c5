"""Draws the patient and the numbers: age, weight, vitals and blood results, as age, sex and the flags demand.

Words such as *tachycardic* are derived from the numbers afterwards (``observed``), never drawn apart from them,
so that a note cannot contradict itself.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from splitfl.data.notes.condition import Condition
from splitfl.data.notes.phrasing import number

ADULT_FROM = 16.0

# Upper age (years), then the normal range at rest.
_HEART_RATES = ((1, 110, 150), (2, 100, 140), (5, 95, 130), (12, 80, 112), (200, 60, 96))
_BREATHING_RATES = ((1, 30, 40), (2, 25, 34), (5, 24, 30), (12, 18, 24), (200, 12, 19))


@dataclass(frozen=True, slots=True)
class Patient:
    """``age`` is in years; a child's may be a fraction."""

    initials: str
    age: float
    sex: Literal["female", "male"]
    weight_kg: float
    height_cm: int

    @property
    def is_child(self) -> bool:
        return self.age < ADULT_FROM

    @property
    def surface_m2(self) -> float:
        """Body surface after Mosteller (1987)."""
        return math.sqrt(self.weight_kg * self.height_cm / 3600)

    @property
    def age_words(self) -> str:
        if self.age < 2:
            months = round(self.age * 12)
            return f"{months}-month-old"
        return f"{int(self.age)}-year-old"

    @property
    def person(self) -> str:
        if self.is_child:
            return "girl" if self.sex == "female" else "boy"
        return "woman" if self.sex == "female" else "man"


@dataclass(frozen=True, slots=True)
class Vitals:
    heart_rate: int
    systolic: int
    diastolic: int
    temperature: float
    breathing_rate: int
    saturation: int


@dataclass(frozen=True, slots=True)
class Lab:
    """One blood result; ``mark`` is ``+``, ``-`` or empty, as the value stands to its reference range."""

    key: str
    label: str
    value: str
    unit: str
    mark: str


def draw_patient(rng: random.Random, condition: Condition) -> Patient:
    """Draw age and sex as the condition allows, then a weight and height that suit them."""
    low, high = condition.ages
    if high <= ADULT_FROM:
        age = round(rng.uniform(low, high) * 12) / 12
        age = age if age < 2 else float(int(age))
    else:
        age = float(rng.randint(int(low), int(high)))
    sexes: tuple[Literal["female", "male"], ...] = ("female", "male")
    sex = rng.choice(sexes) if condition.sex == "any" else condition.sex
    initials = "".join(f"{rng.choice('ABCDEFGHIJKLMNOPRSTVWYZ')}." for _ in range(2))
    weight, height = _build(rng, age, sex)
    return Patient(initials, age, sex, weight, height)


def expected_weight_kg(age: float) -> float:
    """The usual bedside formulas for a child's weight, from birth to sixteen."""
    if age < 1:
        return 4 + 6 * age
    return 2 * age + 8 if age < 6 else 3 * age + 5


def _build(rng: random.Random, age: float, sex: str) -> tuple[float, int]:
    if age < ADULT_FROM:
        height = 52 + 24 * age if age < 1 else 70 + 6 * age
        return round(expected_weight_kg(age) * rng.uniform(0.9, 1.12), 1), round(height * rng.uniform(0.97, 1.03))
    height_cm = rng.randint(154, 172) if sex == "female" else rng.randint(166, 188)
    return float(round(rng.uniform(20.5, 31.0) * (height_cm / 100) ** 2)), height_cm


def _normal(table: tuple[tuple[int, int, int], ...], age: float) -> tuple[int, int]:
    return next((low, high) for until, low, high in table if age < until)


def draw_vitals(rng: random.Random, patient: Patient, flags: tuple[str, ...]) -> Vitals:
    """Draw within the normal range of the age, except what ``flags`` sets.

    Flags: ``fever tachycardia svt bradycardia hypertension hypotension tachypnoea hypoxia``.
    """
    systolic, diastolic = _pressure(rng, patient.age, flags)
    fever = "fever" in flags
    return Vitals(
        heart_rate=_heart_rate(rng, patient.age, flags),
        systolic=systolic,
        diastolic=diastolic,
        temperature=float(number(rng, 38.1, 39.7, 1) if fever else number(rng, 36.2, 37.3, 1)),
        breathing_rate=_breathing_rate(rng, patient.age, flags),
        saturation=rng.randint(86, 91) if "hypoxia" in flags else rng.randint(96, 99),
    )


def _heart_rate(rng: random.Random, age: float, flags: tuple[str, ...]) -> int:
    low, high = _normal(_HEART_RATES, age)
    if "svt" in flags:
        return rng.randint(164, 204)
    if "bradycardia" in flags:
        return rng.randint(30, 46)
    return rng.randint(high + 6, high + 34) if "tachycardia" in flags else rng.randint(low, high)


def _breathing_rate(rng: random.Random, age: float, flags: tuple[str, ...]) -> int:
    low, high = _normal(_BREATHING_RATES, age)
    return rng.randint(high + 3, high + 14) if "tachypnoea" in flags else rng.randint(low, high)


def _pressure(rng: random.Random, age: float, flags: tuple[str, ...]) -> tuple[int, int]:
    if "hypertension" in flags:
        return rng.randint(156, 198), rng.randint(94, 114)
    if age < ADULT_FROM:
        systolic = round(86 + 1.8 * age) + rng.randint(-5, 8)
        return systolic, round(systolic * rng.uniform(0.56, 0.66))
    if "hypotension" in flags:
        return rng.randint(80, 97), rng.randint(44, 59)
    return rng.randint(108, 138), rng.randint(62, 86)


def observed(vitals: Vitals, age: float) -> list[str]:
    """The adjectives that the numbers earn, the most telling first; empty where all is normal."""
    low, high = _normal(_HEART_RATES, age)
    words = [
        ("febrile", vitals.temperature >= 38.0),
        ("tachycardic", vitals.heart_rate > high),
        ("bradycardic", vitals.heart_rate < low),
        ("hypotensive", age >= ADULT_FROM and vitals.systolic < 100),
        ("hypertensive", vitals.systolic >= 150),
        ("tachypnoeic", vitals.breathing_rate > _normal(_BREATHING_RATES, age)[1]),
        ("hypoxic on room air", vitals.saturation < 94),
    ]
    return [word for word, holds in words if holds]


# key, label, unit, decimals, then ranges: low, normal, high
_LABS = (
    ("hb", "haemoglobin", "g/L", 0, (72, 98), (126, 152), (176, 190)),
    ("wcc", "white cells", "x10^9/L", 1, (0.6, 1.8), (4.6, 9.8), (12.4, 21.5)),
    ("plt", "platelets", "x10^9/L", 0, (38, 92), (172, 364), (468, 690)),
    ("crp", "CRP", "mg/L", 0, (1, 4), (1, 5), (46, 240)),
    ("na", "sodium", "mmol/L", 0, (122, 131), (136, 144), (148, 156)),
    ("k", "potassium", "mmol/L", 1, (2.7, 3.2), (3.7, 4.8), (5.6, 6.6)),
    ("creat", "creatinine", "micromol/L", 0, (40, 50), (58, 98), (138, 262)),
)


def draw_labs(rng: random.Random, patient: Patient, flags: tuple[str, ...]) -> list[Lab]:
    """Draw every blood result that ``flags`` names (``hb-``, ``crp+``), and up to two normal ones beside them."""
    marks = {flag[:-1]: flag[-1] for flag in flags}
    normal = [row[0] for row in _LABS if row[0] not in marks]
    shown = {*marks, *rng.sample(normal, rng.randint(0, 2 if len(marks) < 2 else 1))}
    return [_lab(rng, patient, row, marks.get(row[0], "")) for row in _LABS if row[0] in shown]


def _lab(
    rng: random.Random,
    patient: Patient,
    row: tuple[str, str, str, int, tuple[float, float], tuple[float, float], tuple[float, float]],
    mark: str,
) -> Lab:
    key, label, unit, decimals, low, normal, high = row
    bounds = {"-": low, "": normal, "+": high}[mark]
    if patient.is_child and key == "creat":
        bounds = (84, 140) if mark == "+" else (22, 48)
    if patient.is_child and key == "hb" and not mark:
        bounds = (112, 134)
    return Lab(key, label, number(rng, *bounds, decimals), unit, mark)
