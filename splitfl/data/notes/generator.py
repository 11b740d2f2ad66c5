"""Draws one note: condition, patient, numbers, drugs, background, and the sentences that follow from them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from splitfl.data.notes import cardiology, general, oncology, paediatrics
from splitfl.data.notes.background import ADULT, ALLERGIES, ANTIHYPERTENSIVES, CHILD, CLASHES, Comorbidity
from splitfl.data.notes.condition import Condition
from splitfl.data.notes.formulary import DRUGS, PerKg
from splitfl.data.notes.patient import Lab, Patient, Vitals, draw_labs, draw_patient, draw_vitals, observed
from splitfl.data.notes.phrasing import fill, listed, number, pick, pick_with_hallmark
from splitfl.data.notes.styles import draw_style, render, write_vitals

CONDITIONS: dict[str, tuple[Condition, ...]] = {
    "general": general.CONDITIONS,
    "cardiology": cardiology.CONDITIONS,
    "paediatrics": paediatrics.CONDITIONS,
    "oncology": oncology.CONDITIONS,
}

_SETTINGS = {
    "general": {"home": "General practice surgery", "admit": "Emergency department", "clinic": "Medical clinic"},
    "cardiology": {"home": "Rapid access cardiology", "admit": "Coronary care unit", "clinic": "Cardiology clinic"},
    "paediatrics": {
        "home": "Children's emergency department",
        "admit": "Children's ward",
        "clinic": "Children's clinic",
    },
    "oncology": {"home": "Cancer day unit", "admit": "Acute oncology unit", "clinic": "Oncology clinic"},
}
_TEAMS = {"general": "medical", "cardiology": "cardiology", "paediatrics": "paediatric", "oncology": "oncology"}
_LASTING = {"hours": (2, 18), "days": (2, 6), "weeks": (2, 7), "months": (2, 7)}

# What an abnormal blood result adds to the assessment and to the plan, in every specialty.
_LAB_PROBLEMS = {
    "hb-": ("anaemia", "recheck haemoglobin within one week"),
    "plt-": ("thrombocytopenia", "check platelets daily and avoid intramuscular injections"),
    "k-": ("hypokalaemia", "replace potassium and recheck tomorrow"),
    "na-": ("hyponatraemia", "recheck sodium in the morning"),
    "creat+": ("acute kidney injury", "monitor renal function and avoid nephrotoxic drugs"),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that was drawn before a sentence is written."""

    specialty: str
    condition: Condition
    patient: Patient
    vitals: Vitals
    labs: tuple[Lab, ...]
    treatment: tuple[str, ...]  # "amoxicillin 500 mg orally three times daily for 5 days"
    allergy: str
    comorbidities: tuple[Comorbidity, ...]
    chronic: Mapping[str, str]  # drug name -> dose
    smokes: bool
    facts: Mapping[str, str]


def draw_note(rng: random.Random, specialty: str) -> str:
    """Write one note of ``specialty``, a key of ``CONDITIONS``."""
    case = _draw_case(rng, specialty)
    style = draw_style(rng, specialty)
    complaint, history = _complaint_and_history(rng, case)
    exam, tests = _findings(rng, case)
    sections = {
        "complaint": [complaint],
        "history": history,
        "past": _past(rng, case),
        "medications": [f"{name} {dose}" for name, dose in case.chronic.items()] or ["no regular medication"],
        "allergies": [case.allergy],
        "vitals": [write_vitals(case.vitals, case.patient, _build(case), style.short_vitals)],
        "examination": [_general_look(rng, case), *exam],
        "investigations": [*_blood_results(case), *tests],
        "assessment": _assessment(rng, case, exam[0], tests[0]),
        "plan": _plan(rng, case),
    }
    setting = _SETTINGS[specialty][case.condition.disposition]
    patient = case.patient
    header = f"{setting} note. Patient {patient.initials}, {patient.age_words} {patient.person}."
    return render(header, sections, style)


def _draw_case(rng: random.Random, specialty: str) -> Case:
    table = CONDITIONS[specialty]
    condition = rng.choices(table, weights=[row.weight for row in table])[0]
    patient = draw_patient(rng, condition)
    vitals = draw_vitals(rng, patient, condition.vitals)
    labs = tuple(draw_labs(rng, patient, condition.labs)) if condition.labs or not patient.is_child else ()
    facts = _facts(rng, condition, patient, vitals)
    allergy, names = _allergy_and_drugs(rng, condition)
    comorbidities = _comorbidities(rng, condition, patient, names)
    chronic = {
        name: _dose(rng, name, patient, facts) for name in (rng.choice(illness.drugs) for illness in comorbidities)
    }
    return Case(
        specialty=specialty,
        condition=condition,
        patient=patient,
        vitals=vitals,
        labs=labs,
        treatment=tuple(f"{name.removesuffix(' loading')} {_dose(rng, name, patient, facts)}" for name in names),
        allergy=allergy,
        comorbidities=comorbidities,
        chronic=chronic,
        smokes=not patient.is_child and rng.random() < condition.smoker,
        facts=facts,
    )


def _facts(rng: random.Random, condition: Condition, patient: Patient, vitals: Vitals) -> dict[str, str]:
    facts = {
        "side": rng.choice(("left", "right")),
        "hr": str(vitals.heart_rate),
        "kg": str(patient.weight_kg),
        "m2": str(round(patient.surface_m2, 2)),
    }
    for name, template in condition.facts.items():
        facts[name] = fill(template, rng, facts)
    return facts


def _allergy_and_drugs(rng: random.Random, condition: Condition) -> tuple[str, list[str]]:
    """Choose the treatment around an allergy; a patient whom no listed drug would suit has no allergy."""
    text, kind = rng.choice(ALLERGIES) if rng.random() < 0.25 else ("no known drug allergies", "")
    slots = [slot.split(" or ") for slot in condition.drugs]
    suited = [[name for name in slot if not kind or DRUGS[name].kind != kind] for slot in slots]
    if not all(suited):
        text, suited = "no known drug allergies", slots
    return text, [_mostly_first(rng, slot) for slot in suited]


def _mostly_first(rng: random.Random, names: list[str]) -> str:
    return names[0] if rng.random() < 0.6 else rng.choice(names)


def _comorbidities(
    rng: random.Random, condition: Condition, patient: Patient, treatment: list[str]
) -> tuple[Comorbidity, ...]:
    """The illness that the diagnosis presupposes, and others that suit age, diagnosis and treatment; two at most."""
    kinds = {DRUGS[name].kind for name in treatment}
    barred = set(condition.excludes).union(*(CLASHES.get(kind, frozenset()) for kind in kinds))
    table = CHILD if patient.is_child else ADULT
    known = [illness for illness in table if illness.name in condition.known]
    fitting = [
        illness
        for illness in table
        if illness not in known
        and illness.from_age <= patient.age < illness.until_age
        and illness.name not in barred
        and not kinds & {DRUGS[name].kind for name in illness.drugs}
    ]
    return tuple([*known, *(illness for illness in fitting if rng.random() < illness.chance)][:2])


def _dose(rng: random.Random, name: str, patient: Patient, facts: Mapping[str, str]) -> str:
    drug = DRUGS[name]
    if not patient.is_child:
        return fill(rng.choice(drug.adult), rng, facts)
    if isinstance(drug.child, PerKg):
        return drug.child.written(patient.weight_kg)
    return fill(rng.choice(drug.child), rng, facts)


def _complaint_and_history(rng: random.Random, case: Case) -> tuple[str, list[str]]:
    condition = case.condition
    complaint = fill(rng.choice(condition.complaints), rng, case.facts)
    count = number(rng, *(condition.lasting or _LASTING[condition.course]))
    when = f"{count} {condition.course}"
    timed = f"{complaint}, onset {when} ago" if condition.course == "hours" else f"{complaint} for {when}"
    if complaint.startswith("review"):
        timed = complaint
    symptoms = [fill(text, rng, case.facts) for text in pick(rng, condition.symptoms, 2, 3)]
    denies = pick(rng, condition.denies, 1, 2)
    tell = _child_history if case.patient.is_child else _adult_history
    return timed, tell(rng, case, timed, listed(symptoms), listed(denies, "or"))


def _a(words: str) -> str:
    return f"{'an' if words.startswith(('8', '11-', '18-')) else 'a'} {words}"


def _adult_history(rng: random.Random, case: Case, timed: str, symptoms: str, denies: str) -> list[str]:
    patient = case.patient
    he = "she" if patient.sex == "female" else "he"
    comes = "attends for" if timed.startswith("review") else rng.choice(("presents with", "is seen with"))
    return [
        f"{_a(patient.age_words)} {patient.person} {comes} {timed}",
        rng.choice((f"{he} reports {symptoms}", f"{he} describes {symptoms}", f"also noted: {symptoms}")),
        rng.choice((f"{he} denies {denies}", f"no {denies}", f"there is no history of {denies}")),
    ]


def _child_history(rng: random.Random, case: Case, timed: str, symptoms: str, denies: str) -> list[str]:
    patient = case.patient
    parent = rng.choice(("mother", "father", "parents", "grandmother"))
    reports = "report" if parent == "parents" else "reports"
    return [
        f"{_a(patient.age_words)} {patient.person} is brought by the {parent} with {timed}",
        rng.choice((f"the {parent} {reports} {symptoms}", f"also noted: {symptoms}")),
        rng.choice((f"no {denies}", f"there is no history of {denies}")),
    ]


def _past(rng: random.Random, case: Case) -> list[str]:
    illnesses = listed([i.name for i in case.comorbidities]) if case.comorbidities else "no previous illness"
    if case.patient.is_child:
        return [illnesses, *pick(rng, (
            f"born at {rng.choice(('term', '38 weeks', '39 weeks', '41 weeks'))}",
            "immunisations up to date", "no smokers at home", "normal development",
        ), 1, 2)]  # fmt: skip
    if case.smokes:
        return [illnesses, f"smokes {rng.choice((5, 10, 15, 20, 30))} cigarettes a day"]
    former = f"stopped smoking {number(rng, 3, 15)} years ago"
    never = "never smoked"
    return [illnesses, rng.choice((former, never)) if case.patient.age > 40 else never]


def _build(case: Case) -> list[str]:
    """Weight, height and surface, where a dose depends on them."""
    patient, doses = case.patient, " ".join(case.treatment)
    if "/m2" in doses:
        surface = f"body surface {case.facts['m2']} m2"
        return [f"weight {patient.weight_kg:g} kg", f"height {patient.height_cm} cm", surface]
    by_weight = patient.is_child or "kg" in doses or case.specialty == "oncology"
    return [f"weight {patient.weight_kg:g} kg"] if by_weight else []


def _general_look(rng: random.Random, case: Case) -> str:
    words = observed(case.vitals, case.patient.age)
    who = "child" if case.patient.is_child else "patient"
    if words:
        return rng.choice((f"the {who} is {listed(words)}", listed(words)))
    return rng.choice((f"the {who} is stable with normal observations", "observations within normal limits"))


def _findings(rng: random.Random, case: Case) -> tuple[list[str], list[str]]:
    exam = [fill(text, rng, case.facts) for text in pick_with_hallmark(rng, case.condition.exam, 1, 1)]
    tests = [fill(text, rng, case.facts) for text in pick_with_hallmark(rng, case.condition.tests, 0, 1)]
    return exam, tests


def _blood_results(case: Case) -> list[str]:
    words = {"+": " (high)", "-": " (low)", "": ""}
    results = [f"{lab.label} {lab.value} {lab.unit}{words[lab.mark]}" for lab in case.labs]
    return [", ".join(results)] if results else []


def _problems(case: Case) -> list[tuple[str, str, Lab]]:
    """Problem, action and result for each abnormal blood result that the diagnosis does not already name."""
    return [
        (*_LAB_PROBLEMS[lab.key + lab.mark], lab)
        for lab in case.labs
        if lab.key + lab.mark in _LAB_PROBLEMS and _LAB_PROBLEMS[lab.key + lab.mark][0] not in case.condition.name
    ]


def _assessment(rng: random.Random, case: Case, sign: str, test: str) -> list[str]:
    name = fill(case.condition.name, rng, case.facts)
    lines = rng.choice((
        [name, f"supported by {sign}; {test}"],
        [f"{rng.choice(('findings are', 'picture is'))} in keeping with {name}", test],
        [f"{name} on the basis of {sign}"],
    ))  # fmt: skip
    also = [f"{problem} ({lab.label} {lab.value} {lab.unit})" for problem, _, lab in _problems(case)]
    return [*lines, f"also {listed(also)}"] if also else lines


def _plan(rng: random.Random, case: Case) -> list[str]:
    verb = rng.choice(("start", "give", "start", "prescribe"))
    steps = [f"{verb} {drug}" for drug in case.treatment]
    if case.vitals.saturation < 94:
        steps.insert(0, f"oxygen to keep saturation {case.condition.oxygen_target}")
    held = [name for name in case.chronic if name in ANTIHYPERTENSIVES]
    if held and case.vitals.systolic < 100:
        steps.append(f"withhold {listed(held)} while hypotensive")
    steps += [action for _, action, _ in _problems(case)]
    steps += [fill(text, rng, case.facts) for text in pick(rng, case.condition.plan, 1, 2 if len(steps) < 3 else 1)]
    if case.smokes:
        steps.append("offer help to stop smoking")
    return [*steps, _follow_up(rng, case)]


def _follow_up(rng: random.Random, case: Case) -> str:
    team = _TEAMS[case.specialty]
    options = {
        "home": ("return if symptoms worsen", "home with written advice", "review in {3-10} days if not better"),
        "admit": (f"admit under the {team} team", f"admit to the {team} ward with observations every {{2|4}} hours"),
        "clinic": (f"{team} clinic review in {{2-8}} weeks", "clinic review in {2-8} weeks with blood tests"),
    }
    return fill(rng.choice(options[case.condition.disposition]), rng, {})
