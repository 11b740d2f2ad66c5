"""The synthetic notes: deterministic, distinct, unlike between specialties, and free of contradictions."""

from __future__ import annotations

import json
import math
import random
import re
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from splitfl.data.notes import SPECIALTIES, generate_notes, write_notes
from splitfl.data.notes.background import ADULT, CHILD
from splitfl.data.notes.formulary import DRUGS, PerKg
from splitfl.data.notes.generator import CONDITIONS
from splitfl.data.notes.patient import expected_weight_kg
from splitfl.data.notes.phrasing import fill
from splitfl.data.notes.styles import STYLES
from splitfl.errors import ConfigError, StorageError

SEED = 7
SAMPLE = {specialty: list(generate_notes(specialty, 600, SEED)) for specialty in SPECIALTIES}
EVERY_NOTE = [note for notes in SAMPLE.values() for note in notes]


def words(notes: list[str]) -> Counter[str]:
    return Counter(re.findall(r"[a-z]+", " ".join(notes).lower()))


def divergence(left: Counter[str], right: Counter[str]) -> float:
    """Jensen-Shannon divergence in bits: 0 for equal word frequencies, 1 for no word in common."""
    total = 0.0
    for counts in (left, right):
        for word, count in counts.items():
            share = count / counts.total()
            middle = (left[word] / left.total() + right[word] / right.total()) / 2
            total += share * math.log2(share / middle) / 2
    return total


def numbers(pattern: str, note: str) -> tuple[float, ...]:
    """The groups of the one match of ``pattern`` in ``note``; no match, no numbers."""
    match = re.search(pattern, note, re.IGNORECASE)
    return tuple(map(float, match.groups())) if match else ()


# --- the streams ---


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_generator_repeats_itself_for_the_same_seed(specialty: str) -> None:
    assert list(generate_notes(specialty, 600, SEED)) == SAMPLE[specialty]


def test_generator_gives_the_first_notes_of_a_longer_run_for_a_smaller_count() -> None:
    assert list(generate_notes("general", 10, SEED)) == SAMPLE["general"][:10]


def test_generator_gives_other_notes_for_another_seed() -> None:
    assert not set(generate_notes("oncology", 600, SEED + 1)) & set(SAMPLE["oncology"])


def test_generator_leaves_the_global_generator_alone() -> None:
    state = random.getstate()
    list(generate_notes("cardiology", 5, SEED))
    assert random.getstate() == state


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_generator_gives_five_thousand_distinct_notes_in_seconds(specialty: str) -> None:
    start = time.perf_counter()
    notes = list(generate_notes(specialty, 5000, SEED))
    assert time.perf_counter() - start < 15  # half a second on one idle core
    assert len(set(notes)) == 5000


def test_generator_refuses_an_unknown_specialty_and_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="general, cardiology, paediatrics, oncology"):
        generate_notes("astrology", 1, SEED)


def test_generator_refuses_a_negative_count() -> None:
    with pytest.raises(ConfigError, match="-1"):
        generate_notes("general", -1, SEED)


# --- form ---


def test_every_note_has_the_headings_of_one_style_in_order() -> None:
    for note in EVERY_NOTE:
        fits = [
            style
            for style in STYLES.values()
            if re.search("".join(rf"^{re.escape(h)}:\s+\S[\s\S]*?" for h in style.headings), note, re.MULTILINE)
        ]
        assert len(fits) == 1, note


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_every_style_occurs_in_every_specialty(specialty: str) -> None:
    for style in STYLES.values():
        assert any(f"\n{style.headings[1]}:" in note for note in SAMPLE[specialty])


def test_notes_are_about_80_to_220_words() -> None:
    lengths = sorted(len(note.split()) for note in EVERY_NOTE)
    assert lengths[0] >= 80
    assert lengths[int(0.95 * len(lengths))] <= 220
    assert lengths[-1] <= 260


def test_no_note_shows_a_slot_or_a_doubled_stop() -> None:
    for note in EVERY_NOTE:
        assert not re.search(r"[{}]|\.\.|  |None|\bnan\b", note), note


# --- specialties ---


@pytest.mark.parametrize(("one", "other"), list(combinations(SPECIALTIES, 2)))
def test_specialties_differ_in_words_and_share_a_language(one: str, other: str) -> None:
    left, right = words(SAMPLE[one]), words(SAMPLE[other])
    assert divergence(left, right) > 0.1
    shared = left.keys() & right.keys()
    assert len(shared) / len(left.keys() | right.keys()) > 0.2
    for counts in (left, right):
        assert sum(counts[word] for word in shared) / counts.total() > 0.65


def test_one_specialty_agrees_with_itself() -> None:
    """The bound above means something: two halves of one specialty are far nearer than two specialties."""
    notes = SAMPLE["general"]
    assert divergence(words(notes[::2]), words(notes[1::2])) < 0.02


def test_common_problems_cross_specialties() -> None:
    for term in ("hypertension", "pneumonia", "anaemia", "fever", "pain", "wheeze"):
        assert sum(any(term in note.lower() for note in SAMPLE[s]) for s in SPECIALTIES) >= 3, term


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_each_specialty_has_conditions_enough_and_each_occurs(specialty: str) -> None:
    table = CONDITIONS[specialty]
    assert len(table) >= 13
    text = "\n".join(SAMPLE[specialty]).lower()
    for row in table:
        pattern = re.sub(r"\\\{.*?\\\}", r"[\\w ]+", re.escape(row.name.lower()))
        assert re.search(pattern, text), row.name


# --- no note contradicts itself ---


def test_every_drug_that_a_table_names_has_a_dose_for_its_patients() -> None:
    for row in (row for table in CONDITIONS.values() for row in table):
        for name in (name for slot in row.drugs for name in slot.split(" or ")):
            assert DRUGS[name].child if row.ages[1] < 16 else DRUGS[name].adult, (row.name, name)
    for illness in CHILD:
        assert all(DRUGS[name].child for name in illness.drugs)
    for illness in ADULT:
        assert all(DRUGS[name].adult for name in illness.drugs)


def test_no_drug_is_listed_without_a_use() -> None:
    used = {name for illness in (*ADULT, *CHILD) for name in illness.drugs}
    for row in (row for table in CONDITIONS.values() for row in table):
        used.update(name for slot in row.drugs for name in slot.split(" or "))
    assert used == set(DRUGS)


def test_no_condition_denies_the_fever_that_it_has() -> None:
    for row in (row for table in CONDITIONS.values() for row in table):
        assert not ("fever" in row.vitals and "fever" in row.denies), row.name


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_words_of_the_examination_follow_from_the_numbers(specialty: str) -> None:
    for note in SAMPLE[specialty]:
        (rate,) = numbers(r"(?:heart rate|HR) (\d+)", note)
        (temperature,) = numbers(r"(?:temperature|\bT) (\d+\.\d)", note)
        (saturation,) = numbers(r"(?:oxygen saturation|SpO2) (\d+)%", note)
        feverish = bool(re.search(r"(examination|O/E|findings):\s+[^.]*\bfebrile", note, re.IGNORECASE))
        assert feverish == (temperature >= 38), note
        assert ("hypoxic on room air" in note) == (saturation < 94), note
        assert ("xygen to keep saturation" in note) == (saturation < 94), note
        if specialty != "paediatrics":
            assert bool(re.search("tachycardic", note, re.IGNORECASE)) == (rate > 96), note
            assert bool(re.search("bradycardic", note, re.IGNORECASE)) == (rate < 60), note


def test_electrocardiogram_repeats_the_measured_rate() -> None:
    seen = 0
    for note in SAMPLE["cardiology"]:
        traced = numbers(r"(?:atrial fibrillation|narrow-complex tachycardia|ventricular escape) at (\d+)/min", note)
        if traced:
            assert traced == numbers(r"(?:heart rate|HR) (\d+)", note)
            seen += 1
    assert seen > 20


@pytest.mark.parametrize("specialty", SPECIALTIES)
def test_no_patient_is_given_the_penicillin_that_they_are_allergic_to(specialty: str) -> None:
    penicillins = [name for name, drug in DRUGS.items() if drug.kind == "penicillin"]
    for note in SAMPLE[specialty]:
        if re.search(r"Allergies:\s+Penicillin", note, re.IGNORECASE):
            assert not any(name in note for name in penicillins), note


def test_children_are_children_with_weights_of_their_age() -> None:
    for note in SAMPLE["paediatrics"]:
        (age,) = numbers(r"(\d+)-(?:year|month)-old", note)
        age = age / 12 if "-month-old" in note else age
        assert 0 < age < 16
        (weight,) = numbers(r"weight (\d+(?:\.\d)?) kg", note)
        assert 0.85 * expected_weight_kg(age) <= weight <= 1.2 * expected_weight_kg(age), note


def test_childrens_doses_follow_from_their_weight() -> None:
    seen = 0
    for note in SAMPLE["paediatrics"]:
        (weight,) = numbers(r"weight (\d+(?:\.\d)?) kg", note)
        for name, drug in DRUGS.items():
            if not isinstance(drug.child, PerKg):
                continue
            given = numbers(rf"{re.escape(name)} (\d+(?:\.\d+)?) {drug.child.unit} \(", note)
            if given:
                exact = min(drug.child.amount * weight, drug.child.cap)
                assert abs(given[0] - exact) <= drug.child.step, (name, note)
                seen += 1
    assert seen > 300


def test_chemotherapy_doses_follow_from_body_surface() -> None:
    seen = 0
    for note in SAMPLE["oncology"]:
        for per_m2, total in re.findall(r"([\d.]+) mg/m2 \((\d+) mg\)", note):
            (surface,) = numbers(r"body surface (\d\.\d+) m2", note)
            weight, height = numbers(r"weight (\d+) kg, height (\d+) cm", note)
            assert surface == pytest.approx(math.sqrt(weight * height / 3600), abs=0.006)
            assert abs(float(total) - float(per_m2) * surface) <= 2.51, note
            seen += 1
    assert seen > 100


def test_results_are_marked_as_they_stand_to_the_reference_range() -> None:
    for note in EVERY_NOTE:
        for value, mark in re.findall(r"white cells ([\d.]+) x10\^9/L(?: \((\w+)\))?", note, re.IGNORECASE):
            assert mark == ("high" if float(value) > 11 else "low" if float(value) < 4 else ""), note
        for value, mark in re.findall(r"haemoglobin (\d+) g/L(?: \((low)\))", note, re.IGNORECASE):
            assert (float(value) < 110) == (mark == "low"), note


def test_plan_names_the_drug_that_the_diagnosis_calls_for() -> None:
    calls = {
        "cardiology": {"heart failure": "furosemide", "supraventricular": "adenosine"},
        "paediatrics": {"Kawasaki": "immunoglobulin", "croup": "dexamethasone"},
        "oncology": {"HER2 positive": "trastuzumab", "small cell lung": "pembrolizumab"},
        "general": {"hypothyroidism": "levothyroxine", "pyelonephritis": "c(eftriaxone|iprofloxacin)"},
    }
    for specialty, drugs in calls.items():
        for diagnosis, drug in drugs.items():
            heading = rf"(?:Assessment|Imp|Diagnosis):\s+[^.]*{diagnosis}"
            notes = [note for note in SAMPLE[specialty] if re.search(heading, note, re.IGNORECASE)]
            assert len(notes) > 5, diagnosis
            assert all(re.search(drug, note) for note in notes), diagnosis


def test_flare_of_a_long_standing_illness_has_its_history_and_its_drug() -> None:
    seen = 0
    for note in [*SAMPLE["general"], *SAMPLE["paediatrics"]]:
        if "exacerbation of asthma" in note:
            assert re.search(r"(Past history|PAST MEDICAL HISTORY|PMH|Background):\s+Asthma", note), note
            assert "eclometasone inhaler" in note
            seen += 1
    assert seen > 20


def test_sides_agree_within_a_note() -> None:
    for note in EVERY_NOTE:
        if re.search("pyelonephritis|cellulitis|otitis media|lower lobe", note):
            sides = re.findall(r"\b(left|right)\b(?! ventric)", note.split("\n", 1)[1].lower())
            if "pulmonary embol" not in note.lower():
                assert len(set(sides)) == 1, note


# --- slots ---


def test_fill_draws_numbers_between_both_bounds_with_their_decimals() -> None:
    rng = random.Random(SEED)
    drawn = {fill("{1.2-1.4}", rng, {}) for _ in range(100)}
    assert drawn == {"1.2", "1.3", "1.4"}


def test_fill_raises_for_a_name_that_the_note_lacks() -> None:
    with pytest.raises(KeyError, match="stage"):
        fill("stage {stage}", random.Random(SEED), {})


# --- files ---


def test_writer_writes_one_text_a_row(tmp_path: Path) -> None:
    path = tmp_path / "hospital" / "notes.jsonl"
    write_notes(path, "oncology", 25, SEED)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"text": note} for note in SAMPLE["oncology"][:25]]
    assert [entry.name for entry in path.parent.iterdir()] == ["notes.jsonl"]


def test_writer_leaves_the_old_file_and_no_draft_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("old", encoding="utf-8")

    def full_disk(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(StorageError, match="no space left"):
        write_notes(path, "general", 3, SEED)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.jsonl"]
    assert path.read_text(encoding="utf-8") == "old"


def test_writer_refuses_an_unknown_specialty_before_it_touches_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        write_notes(tmp_path / "new" / "notes.jsonl", "astrology", 3, SEED)
    assert not (tmp_path / "new").exists()
