"""Drugs with doses that are right for the drug: fixed for adults, per kilogram with a ceiling for children.

Doses are textbook-like, for synthetic text only. They are no clinical advice.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitfl.data.notes.condition import of


@dataclass(frozen=True, slots=True)
class PerKg:
    """A child's dose: ``amount`` of ``unit`` per kilogram, rounded to ``step``, never above ``cap``."""

    amount: float
    unit: str
    cap: float
    step: float
    how: str

    def total(self, weight_kg: float) -> float:
        """The dose for a child of ``weight_kg``, in ``unit``."""
        return min(self.cap, max(self.step, round(self.amount * weight_kg / self.step) * self.step))

    def written(self, weight_kg: float) -> str:
        """As a note writes it: ``195 mg (15 mg/kg) orally every 6 hours``."""
        total = self.total(weight_kg)
        basis = "maximum dose" if total == self.cap else f"{self.amount:g} {self.unit}/kg"
        return f"{total:g} {self.unit} ({basis}) {self.how}"


@dataclass(frozen=True, slots=True)
class Drug:
    """``adult`` holds alternative doses; ``kind`` is the class by which allergies and clashes are known."""

    adult: tuple[str, ...] = ()
    kind: str = ""
    child: PerKg | tuple[str, ...] = ()


def _adult(doses: str, kind: str = "") -> Drug:
    return Drug(of(doses), kind)


def _both(doses: str, kind: str, child: PerKg) -> Drug:
    return Drug(of(doses), kind, child)


_ANTIMICROBIALS = {
    "amoxicillin": _both(
        "500 mg orally three times daily for 5 days; 1 g orally three times daily for 5 days",
        "penicillin",
        PerKg(30, "mg", 1000, 5, "orally three times daily for 5 days"),
    ),
    "co-amoxiclav": _adult("1.2 g intravenously every 8 hours", "penicillin"),
    "phenoxymethylpenicillin": _both(
        "500 mg orally four times daily for {5|10} days",
        "penicillin",
        PerKg(12.5, "mg", 500, 5, "orally four times daily for 5 days"),
    ),
    "flucloxacillin": _adult(
        "500 mg orally four times daily for 7 days; 1 g orally four times daily for 7 days", "penicillin"
    ),
    "piperacillin-tazobactam": _adult("4.5 g intravenously every 6 hours", "penicillin"),
    "benzylpenicillin": _adult("2.4 g intravenously every 4 hours", "penicillin"),
    "meropenem": _adult("1 g intravenously every 8 hours", "carbapenem"),
    "vancomycin": _adult("{kg*15} mg intravenously every 12 hours adjusted to levels", "glycopeptide"),
    "gentamicin": _adult("{kg*1} mg intravenously every 12 hours adjusted to levels", "aminoglycoside"),
    "doxycycline": _adult("200 mg orally on day one then 100 mg daily for 4 days", "tetracycline"),
    "clarithromycin": _both(
        "500 mg orally twice daily for 5 days", "macrolide", PerKg(7.5, "mg", 500, 2.5, "orally twice daily for 7 days")
    ),
    "nitrofurantoin": _adult("100 mg modified release orally twice daily for 3 days", "nitrofuran"),
    "trimethoprim": _both(
        "200 mg orally twice daily for 3 days", "antifolate", PerKg(4, "mg", 200, 2, "orally twice daily for 7 days")
    ),
    "cefalexin": _both(
        "500 mg orally three times daily for 7 days",
        "cephalosporin",
        PerKg(12.5, "mg", 500, 5, "orally twice daily for 7 days"),
    ),
    "ceftriaxone": _both(
        "2 g intravenously once daily", "cephalosporin", PerKg(80, "mg", 4000, 20, "intravenously once daily")
    ),
    "ciprofloxacin": _adult("500 mg orally twice daily for 7 days", "quinolone"),
    "cefuroxime": _adult("1.5 g intravenously every 8 hours", "cephalosporin"),
    "metronidazole": _adult("500 mg intravenously every 8 hours", "nitroimidazole"),
    "nystatin": _adult("100,000 units by mouth four times daily", "antifungal"),
}

_PAIN_AND_STOMACH = {
    "paracetamol": _both(
        "1 g orally every 6 hours as needed", "paracetamol", PerKg(15, "mg", 1000, 5, "orally every 6 hours as needed")
    ),
    "ibuprofen": _both(
        "400 mg orally three times daily with food", "nsaid", PerKg(10, "mg", 400, 5, "orally every 8 hours with food")
    ),
    "naproxen": _adult("500 mg orally twice daily with food; 250 mg orally three times daily with food", "nsaid"),
    "diclofenac": _adult("75 mg intramuscularly once; 100 mg rectally once", "nsaid"),
    "colchicine": _adult("500 micrograms orally twice daily", "colchicine"),
    "morphine": _adult(
        "2.5 mg orally every 4 hours; 5 mg orally every 4 hours; 10 mg modified release orally twice daily with 2.5 "
        "mg for breakthrough pain",
        "opioid",
    ),
    "oxycodone": _adult("5 mg modified release orally twice daily", "opioid"),
    "senna": _adult("15 mg orally at night", "laxative"),
    "sumatriptan": _adult("50 mg orally at onset; 100 mg orally at onset", "triptan"),
    "ondansetron": _both(
        "8 mg orally twice daily; 4 mg intravenously every 8 hours",
        "antiemetic",
        PerKg(0.1, "mg", 8, 0.1, "orally once"),
    ),
    "metoclopramide": _adult("10 mg orally three times daily for 5 days", "antiemetic"),
    "aprepitant": _adult("125 mg orally on day 1 then 80 mg on days 2 and 3", "antiemetic"),
    "olanzapine": _adult("5 mg orally at night for 4 days", "antiemetic"),
    "cyclizine": _adult("50 mg orally three times daily", "antiemetic"),
    "omeprazole": _both(
        "20 mg orally once daily; 40 mg orally once daily", "ppi", PerKg(1, "mg", 20, 1, "orally once daily")
    ),
    "macrogol": Drug(
        of("one sachet orally twice daily"),
        "laxative",
        of("two paediatric sachets daily, increasing every other day until clear"),
    ),
    "benzydamine mouthwash": _adult("15 ml every 3 hours", "mouthwash"),
}

_CHEST_AND_HORMONES = {
    "salbutamol": Drug(
        of("5 mg nebulised every 4 hours; 10 puffs by spacer every 4 hours"),
        "beta-agonist",
        of("10 puffs by spacer every {2|3|4} hours; 6 puffs by spacer every {3|4} hours"),
    ),
    "ipratropium": Drug(
        of("500 micrograms nebulised every 6 hours"),
        "antimuscarinic",
        of("250 micrograms nebulised every 20 minutes for three doses"),
    ),
    "prednisolone": _both(
        "40 mg orally once daily for 5 days; 30 mg orally once daily for 5 days",
        "steroid",
        PerKg(1, "mg", 40, 1, "orally once daily for 3 days"),
    ),
    "methylprednisolone": _adult("{kg*1} mg intravenously once daily (1 mg/kg)", "steroid"),
    "dexamethasone": _both("8 mg orally twice daily", "steroid", PerKg(0.15, "mg", 12, 0.1, "orally once")),
    "beclometasone inhaler": Drug(
        of("200 micrograms twice daily"), "inhaled steroid", of("100 micrograms twice daily by spacer")
    ),
    "levothyroxine": _adult("50 micrograms once daily; 75 micrograms once daily; 100 micrograms once daily", "thyroid"),
    "metformin": _adult("500 mg twice daily; 1 g twice daily", "biguanide"),
    "empagliflozin": _adult("10 mg once daily", "sglt2"),
    "dapagliflozin": _adult("10 mg once daily", "sglt2"),
    "gliclazide": _adult("40 mg once daily; 80 mg twice daily", "sulfonylurea"),
    "insulin": Drug(child=PerKg(0.05, "units", 5, 0.1, "per hour intravenously"), kind="insulin"),
    "ferrous sulfate": _adult("200 mg orally once daily for three months", "iron"),
    "sodium feredetate": Drug(kind="iron", child=PerKg(3, "mg", 200, 1, "of elemental iron orally daily")),
    "allopurinol": _adult("100 mg once daily; 300 mg once daily", "urate"),
    "zoledronic acid": _adult("4 mg intravenously over 15 minutes", "bisphosphonate"),
    "filgrastim": _adult("300 micrograms subcutaneously once daily", "growth factor"),
    "red cells": _adult("{1|2} units transfused over 3 hours each", "transfusion"),
    "sodium chloride 0.9%": _both(
        "1 litre intravenously over {4|6|8} hours", "fluid", PerKg(10, "ml", 500, 5, "intravenously over 30 minutes")
    ),
}

_CHILDREN_ONLY = {
    "oral rehydration solution": Drug(child=PerKg(50, "ml", 2500, 10, "orally over 4 hours"), kind="fluid"),
    "immunoglobulin": Drug(child=PerKg(2, "g", 100, 1, "intravenously over 12 hours"), kind="immunoglobulin"),
    "aspirin (anti-inflammatory)": Drug(child=PerKg(10, "mg", 500, 5, "orally every 6 hours"), kind="salicylate"),
    "emollient": Drug(kind="emollient", child=of("liberally at least four times daily")),
}

_HEART_AND_VESSELS = {
    "amlodipine": _adult("5 mg once daily; 10 mg once daily", "calcium blocker"),
    "ramipril": _adult("2.5 mg once daily; 5 mg once daily; 10 mg once daily", "ace inhibitor"),
    "losartan": _adult("50 mg once daily", "ace inhibitor"),
    "indapamide": _adult("2.5 mg once daily", "thiazide"),
    "spironolactone": _adult("25 mg once daily", "mra"),
    "bisoprolol": _adult("1.25 mg once daily; 2.5 mg once daily; 5 mg once daily", "beta-blocker"),
    "metoprolol": _adult("25 mg orally twice daily", "beta-blocker"),
    "verapamil": _adult("80 mg three times daily", "rate-limiting calcium blocker"),
    "adenosine": _adult("6 mg rapid intravenous bolus followed by 12 mg", "adenosine"),
    "atropine": _adult("500 micrograms intravenously, repeated to 3 mg", "antimuscarinic"),
    "furosemide": _adult(
        "40 mg intravenously twice daily; 80 mg intravenously twice daily; 40 mg orally once daily", "loop diuretic"
    ),
    "sacubitril-valsartan": _adult("49/51 mg twice daily; 24/26 mg twice daily", "ace inhibitor"),
    "aspirin": _adult("75 mg once daily", "antiplatelet"),
    "aspirin loading": _adult("300 mg once then 75 mg daily", "antiplatelet"),
    "ticagrelor": _adult("180 mg loading then 90 mg twice daily", "p2y12 inhibitor"),
    "clopidogrel": _adult("75 mg once daily", "p2y12 inhibitor"),
    "prasugrel": _adult("60 mg loading then 10 mg once daily", "p2y12 inhibitor"),
    "fondaparinux": _adult("2.5 mg subcutaneously once daily", "anticoagulant"),
    "apixaban": _adult("5 mg twice daily", "anticoagulant"),
    "apixaban loading": _adult("10 mg twice daily for 7 days then 5 mg twice daily", "anticoagulant"),
    "rivaroxaban": _adult("15 mg twice daily with food for 21 days then 20 mg daily", "anticoagulant"),
    "edoxaban": _adult("60 mg once daily", "anticoagulant"),
    "glyceryl trinitrate spray": _adult("400 micrograms under the tongue as needed", "nitrate"),
    "isosorbide mononitrate": _adult("30 mg modified release once daily", "nitrate"),
    "atorvastatin": _adult("80 mg at night; 40 mg at night", "statin"),
}

_CANCER = {
    "docetaxel": _adult("75 mg/m2 ({m2*75} mg) intravenously on day 1 of a 21-day cycle", "taxane"),
    "paclitaxel": _adult(
        "80 mg/m2 ({m2*80} mg) intravenously weekly; 175 mg/m2 ({m2*175} mg) intravenously every 21 days", "taxane"
    ),
    "carboplatin": _adult("AUC 5 intravenously every 21 days", "platinum"),
    "oxaliplatin": _adult("85 mg/m2 ({m2*85} mg) intravenously every 14 days", "platinum"),
    "fluorouracil": _adult("2400 mg/m2 ({m2*2400} mg) by infusion over 46 hours", "fluoropyrimidine"),
    "capecitabine": _adult("1250 mg/m2 ({m2*1250} mg) orally twice daily for 14 of 21 days", "fluoropyrimidine"),
    "epirubicin": _adult("90 mg/m2 ({m2*90} mg) intravenously every 21 days", "anthracycline"),
    "doxorubicin": _adult("50 mg/m2 ({m2*50} mg) intravenously on day 1", "anthracycline"),
    "cyclophosphamide": _adult(
        "600 mg/m2 ({m2*600} mg) intravenously every 21 days; 750 mg/m2 ({m2*750} mg) intravenously on day 1",
        "alkylator",
    ),
    "rituximab": _adult("375 mg/m2 ({m2*375} mg) intravenously on day 1 of each cycle", "antibody"),
    "trastuzumab": _adult("{kg*6} mg intravenously every 21 days (6 mg/kg)", "antibody"),
    "pembrolizumab": _adult("200 mg intravenously every 3 weeks; 400 mg intravenously every 6 weeks", "checkpoint"),
    "bortezomib": _adult("1.3 mg/m2 subcutaneously on days 1, 8, 15 and 22", "proteasome"),
    "lenalidomide": _adult("25 mg orally on days 1 to 21 of each 28-day cycle", "imid"),
    "letrozole": _adult("2.5 mg once daily", "aromatase"),
    "goserelin": _adult("10.8 mg subcutaneously every 12 weeks", "lhrh"),
    "enzalutamide": _adult("160 mg once daily", "androgen"),
}

_CHRONIC_ONLY = {
    "tiotropium inhaler": _adult("18 micrograms once daily", "antimuscarinic"),
    "sertraline": _adult("50 mg once daily; 100 mg once daily", "ssri"),
    "lansoprazole": _adult("15 mg once daily; 30 mg once daily", "ppi"),
    "simvastatin": _adult("20 mg at night; 40 mg at night", "statin"),
    "salbutamol inhaler": Drug(of("two puffs as needed"), "reliever", of("two puffs by spacer as needed")),
    "cetirizine": Drug(of("10 mg once daily"), "antihistamine", of("2.5 mg twice daily")),
    "vitamin D": Drug(of("800 units once daily"), "vitamin", of("400 units once daily")),
}

DRUGS: dict[str, Drug] = {
    **_ANTIMICROBIALS,
    **_PAIN_AND_STOMACH,
    **_CHEST_AND_HORMONES,
    **_CHILDREN_ONLY,
    **_HEART_AND_VESSELS,
    **_CANCER,
    **_CHRONIC_ONLY,
}
