"""Long-standing illness with its usual drug, allergies, and what must not go together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Comorbidity:
    """A long-standing illness, the drugs of which one is taken, and the ages (years) at which it is plausible."""

    name: str
    drugs: tuple[str, ...]
    from_age: float
    chance: float
    until_age: float = 120.0


ADULT = (
    Comorbidity("hypertension", ("amlodipine", "ramipril", "losartan", "indapamide"), 40, 0.35),
    Comorbidity("type 2 diabetes", ("metformin", "gliclazide"), 40, 0.18),
    Comorbidity("hypercholesterolaemia", ("simvastatin", "atorvastatin"), 40, 0.2),
    Comorbidity("ischaemic heart disease", ("aspirin", "bisoprolol"), 55, 0.12),
    Comorbidity("hypothyroidism", ("levothyroxine",), 30, 0.1),
    Comorbidity("asthma", ("beclometasone inhaler",), 16, 0.1),
    Comorbidity("chronic obstructive pulmonary disease", ("tiotropium inhaler",), 55, 0.08),
    Comorbidity("atrial fibrillation", ("apixaban", "edoxaban"), 65, 0.12),
    Comorbidity("reflux disease", ("lansoprazole", "omeprazole"), 25, 0.14),
    Comorbidity("depression", ("sertraline",), 18, 0.12),
    Comorbidity("hay fever", ("cetirizine",), 16, 0.08),
    Comorbidity("osteopenia", ("vitamin D",), 60, 0.12),
)

CHILD = (
    Comorbidity("eczema", ("emollient",), 0.3, 0.2),
    Comorbidity("viral-induced wheeze", ("salbutamol inhaler",), 1.0, 0.15, until_age=7.0),
    Comorbidity("asthma", ("beclometasone inhaler",), 6.0, 0.08),
    Comorbidity("hay fever", ("cetirizine",), 2.0, 0.1),
    Comorbidity("vitamin D deficiency", ("vitamin D",), 0.3, 0.1),
)

# A new drug of this kind is not given to a patient with these illnesses.
CLASHES: dict[str, frozenset[str]] = {
    "beta-blocker": frozenset({"asthma"}),
    "nsaid": frozenset({"asthma", "ischaemic heart disease", "atrial fibrillation"}),
    "triptan": frozenset({"ischaemic heart disease", "hypertension"}),
    "adenosine": frozenset({"asthma", "chronic obstructive pulmonary disease"}),
    "rate-limiting calcium blocker": frozenset({"ischaemic heart disease", "asthma"}),
    "macrolide": frozenset({"hypercholesterolaemia"}),
    "colchicine": frozenset({"hypercholesterolaemia"}),
    "antiplatelet": frozenset({"atrial fibrillation"}),
    "p2y12 inhibitor": frozenset({"atrial fibrillation"}),
    "mra": frozenset({"type 2 diabetes"}),
}

# How an allergy is written, and the kind of drug that it rules out.
ALLERGIES = (
    ("penicillin (rash)", "penicillin"),
    ("penicillin (anaphylaxis)", "penicillin"),
    ("ibuprofen (wheeze)", "nsaid"),
    ("trimethoprim (rash)", "antifolate"),
    ("latex (contact rash)", ""),
    ("peanut (urticaria)", ""),
    ("shellfish (swelling)", ""),
)

ANTIHYPERTENSIVES = frozenset({"amlodipine", "ramipril", "losartan", "indapamide", "bisoprolol"})
