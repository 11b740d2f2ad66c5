"""Early breast cancer for the oncology notes: the receptor decides the drugs."""

from __future__ import annotations

from dataclasses import replace

from splitfl.data.notes.condition import Condition, of

_TRIPLE_NEGATIVE = Condition(
    name="early {side} breast cancer, triple negative, stage {stage}",
    ages=(34, 76),
    sex="female",
    course="weeks",
    complaints=of("a {side} breast lump; review before adjuvant chemotherapy"),
    symptoms=of(
        "a healed wound after wide local excision; mild fatigue; anxiety about treatment; stiffness of the {side} "
        "shoulder; tingling near the scar; poor sleep"
    ),
    denies=of("bone pain; breathlessness; headache; weight loss"),
    exam=of(
        "healed scar in the upper outer quadrant of the {side} breast; no palpable axillary nodes; performance status "
        "{0|1}; no lymphoedema"
    ),
    tests=of(
        "histology shows a {14-38} mm grade {2|3} ductal carcinoma, triple negative; sentinel node biopsy shows {0|1} "
        "of {2|3|4} nodes involved; staging CT shows no metastases; ejection fraction {58-66}%"
    ),
    drugs=of("epirubicin; cyclophosphamide; paclitaxel or docetaxel"),
    plan=of(
        "leave three weeks between cycles with bloods before each; refer for scalp cooling and wig advice; plan "
        "radiotherapy after chemotherapy; repeat echocardiogram before cycle 4"
    ),
    disposition="clinic",
    facts={"stage": "{IIA|IIB}"},
    weight=0.6,
)
_HER2_POSITIVE = replace(
    _TRIPLE_NEGATIVE,
    name="early {side} breast cancer, HER2 positive, stage {stage}",
    tests=of(
        "histology shows a {14-38} mm grade {2|3} ductal carcinoma, HER2 positive; ejection fraction {58-66}%; "
        "sentinel node biopsy shows {0|1} of {2|3|4} nodes involved; staging CT shows no metastases"
    ),
    drugs=of("docetaxel; carboplatin; trastuzumab"),
)
_HORMONE_POSITIVE = replace(
    _TRIPLE_NEGATIVE,
    name="early {side} breast cancer, oestrogen receptor positive, stage {stage}",
    ages=(54, 82),
    complaints=of("review on hormone treatment; review after breast surgery"),
    symptoms=of(
        "hot flushes; stiff fingers in the morning; mild fatigue; a healed wound after wide local excision; low mood; "
        "stiffness of the {side} shoulder"
    ),
    tests=of(
        "histology shows a {9-24} mm grade {1|2} ductal carcinoma, oestrogen receptor positive; bone density T-score "
        "-{0.6-1.9}; recurrence score {4-18}; mammogram shows no new lesion"
    ),
    drugs=of("letrozole"),
    plan=of(
        "continue hormone treatment for five years; plan breast radiotherapy; arrange a yearly mammogram; take regular "
        "exercise and vitamin D; repeat bone density in two years"
    ),
)

BREAST_CANCERS = (_TRIPLE_NEGATIVE, _HER2_POSITIVE, _HORMONE_POSITIVE)
