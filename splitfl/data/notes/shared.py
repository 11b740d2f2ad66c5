"""Conditions that more than one adult specialty sees: they tie the specialties' texts together."""

from __future__ import annotations

from splitfl.data.notes.condition import Condition, of

HYPERTENSION = Condition(
    name="essential hypertension",
    ages=(38, 84),
    course="weeks",
    complaints=of("raised blood pressure readings; headache and raised home blood pressure"),
    symptoms=of(
        "home readings around {158-176}/{94-102}; occasional morning headache; little exercise; a mother with high "
        "blood pressure; a high salt intake; poor sleep"
    ),
    denies=of("chest pain; breathlessness; visual disturbance; palpitations"),
    exam=of(
        "fundi show {arteriovenous nipping|silver wiring} without haemorrhage; apex beat is not displaced; no renal "
        "bruit; peripheral pulses equal; no ankle oedema"
    ),
    tests=of(
        "ECG shows {voltage criteria for left ventricular hypertrophy|sinus rhythm with left axis deviation}; urine "
        "dipstick shows trace protein; urine albumin-creatinine ratio {4-18} mg/mmol; HbA1c {34-41} mmol/mol; total "
        "cholesterol {4.9-6.8} mmol/L"
    ),
    drugs=of("amlodipine or indapamide; ramipril or losartan"),
    plan=of(
        "arrange ambulatory blood pressure monitoring; advise on salt, weight and exercise; check renal function two "
        "weeks after the new tablet; aim for a clinic pressure below 140/90"
    ),
    disposition="home",
    vitals=of("hypertension"),
    excludes=of("hypertension; ischaemic heart disease"),
)

ATRIAL_FIBRILLATION = Condition(
    name="atrial fibrillation with fast ventricular response",
    ages=(54, 88),
    course="hours",
    complaints=of("palpitations; palpitations and light-headedness; a fast irregular heartbeat"),
    symptoms=of(
        "a fluttering in the chest; fatigue on climbing stairs; mild breathlessness; a recent cold; more alcohol than "
        "usual at the weekend; light-headedness on standing"
    ),
    denies=of("chest pain; syncope; focal weakness; fever"),
    exam=of(
        "pulse irregularly irregular; no murmur; jugular venous pressure not raised; no goitre or tremor; chest clear"
    ),
    tests=of(
        "ECG shows atrial fibrillation at {hr}/min without ischaemia; thyroid function normal; echocardiogram shows a "
        "dilated left atrium of {42-52} mm; magnesium {0.78-0.96} mmol/L; troponin negative"
    ),
    drugs=of("bisoprolol or metoprolol; apixaban or edoxaban"),
    plan=of(
        "aim for a resting rate below 110/min; discuss stroke risk and bleeding risk; request an outpatient "
        "echocardiogram; consider cardioversion after three weeks of anticoagulation"
    ),
    disposition="admit",
    vitals=of("tachycardia"),
    excludes=of("atrial fibrillation; hypothyroidism"),
)

PNEUMONIA = Condition(
    name="community-acquired pneumonia",
    ages=(24, 90),
    course="days",
    complaints=of("productive cough and fever; cough and breathlessness; fever with pleuritic chest pain"),
    symptoms=of(
        "{green|rusty|yellow} sputum; rigors; pleuritic pain on the {side}; poor appetite; fatigue; breathlessness on "
        "exertion"
    ),
    denies=of("haemoptysis; leg swelling; recent travel; weight loss"),
    exam=of(
        "coarse crackles and bronchial breathing at the {side} base; dullness to percussion at the {side} base; "
        "increased vocal resonance; speaking in short sentences"
    ),
    tests=of(
        "chest X-ray shows consolidation of the {side} lower lobe; urea {4.1-7.8} mmol/L; blood cultures sent; urinary "
        "antigens for legionella and pneumococcus negative; lactate {1.2-2.1} mmol/L"
    ),
    drugs=of("amoxicillin or doxycycline or clarithromycin; paracetamol"),
    plan=of("send sputum for culture; encourage oral fluids; repeat chest X-ray in six weeks; repeat CRP in 48 hours"),
    disposition="admit",
    vitals=of("fever; tachycardia; tachypnoea; hypoxia"),
    labs=of("wcc+; crp+"),
    smoker=0.35,
    weight=1.3,
)

IRON_DEFICIENCY = Condition(
    name="iron-deficiency anaemia",
    ages=(28, 82),
    course="months",
    complaints=of("tiredness; fatigue and breathlessness on exertion; low energy and light-headedness"),
    symptoms=of(
        "palpitations on climbing stairs; craving for ice; hair thinning; breathlessness on hills; restless legs at "
        "night; poor concentration"
    ),
    denies=of("rectal bleeding; weight loss; chest pain; night sweats"),
    exam=of(
        "conjunctival pallor; koilonychia; angular stomatitis; soft systolic flow murmur; abdomen soft with no mass"
    ),
    tests=of(
        "ferritin {3-11} micrograms/L; mean cell volume {66-76} fL; transferrin saturation {4-11}%; coeliac serology "
        "negative; faecal immunochemical test {2-9} micrograms/g"
    ),
    drugs=of("ferrous sulfate"),
    plan=of(
        "advise on dietary iron; repeat full blood count in four weeks; refer for gastroscopy and colonoscopy; "
        "continue iron for three months after haemoglobin is normal"
    ),
    disposition="clinic",
    labs=of("hb-; plt+"),
)

PULMONARY_EMBOLISM = Condition(
    name="acute pulmonary embolism",
    ages=(34, 84),
    course="hours",
    complaints=of("sudden breathlessness; pleuritic chest pain and breathlessness; breathlessness and near-collapse"),
    symptoms=of(
        "pleuritic pain on the {side}; a swollen {side} calf last week; a small haemoptysis; a recent long-haul "
        "flight; immobility after recent surgery; palpitations"
    ),
    denies=of("fever; productive cough; previous clots; orthopnoea"),
    exam=of(
        "clear chest with {side} calf swelling of {2-5} cm; loud pulmonary second sound; pleural rub on the {side}; "
        "jugular venous pressure slightly raised"
    ),
    tests=of(
        "CT pulmonary angiogram shows {segmental|lobar} embolus in the {side} lower lobe; D-dimer {1400-6800} ng/ml; "
        "ECG shows sinus tachycardia at {hr}/min; troponin {18-64} ng/L; right ventricle not dilated on echocardiogram"
    ),
    drugs=of("apixaban loading or rivaroxaban"),
    plan=of(
        "anticoagulate for at least three months; give written anticoagulant advice; look for a provoking factor; "
        "refer to the thrombosis clinic"
    ),
    disposition="admit",
    vitals=of("tachycardia; tachypnoea; hypoxia"),
    excludes=of("atrial fibrillation"),
)

DEEP_VEIN_THROMBOSIS = Condition(
    name="deep vein thrombosis of the {side} leg",
    ages=(30, 84),
    course="days",
    complaints=of("{side} leg swelling; a painful swollen {side} calf"),
    symptoms=of(
        "calf tenderness on walking; a recent flight; a plaster cast last month; tightness of the {side} calf; warmth "
        "of the leg; reduced mobility after a cold"
    ),
    denies=of("breathlessness; chest pain; fever; haemoptysis"),
    exam=of(
        "{side} calf {3-6} cm larger than the other side; pitting oedema of the {side} leg; tenderness along the deep "
        "veins; distal pulses present"
    ),
    tests=of(
        "compression ultrasound shows thrombus in the {side} {popliteal|femoral} vein; D-dimer {1100-5200} ng/ml; "
        "Wells score {2-4}; clotting screen normal"
    ),
    drugs=of("apixaban loading or rivaroxaban; paracetamol"),
    plan=of(
        "anticoagulate for three months; advise on bleeding risk; review in the thrombosis clinic; encourage walking"
    ),
    disposition="home",
    excludes=of("atrial fibrillation"),
)
