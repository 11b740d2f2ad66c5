"""Oncology: a cancer centre. Chemotherapy is dosed by body surface."""

from __future__ import annotations

from splitfl.data.notes import shared
from splitfl.data.notes.breast_cancer import BREAST_CANCERS
from splitfl.data.notes.condition import Condition, of

_TUMOUR = "{colorectal cancer|lung cancer|lymphoma|gastric cancer|bladder cancer}"

CONDITIONS: tuple[Condition, ...] = (
    shared.PNEUMONIA,
    shared.IRON_DEFICIENCY,
    shared.PULMONARY_EMBOLISM,
    Condition(
        name="neutropenic sepsis after chemotherapy for {tumour}",
        ages=(30, 80),
        course="hours",
        complaints=of("fever after chemotherapy; fever and rigors"),
        symptoms=of(
            "shivering at home; sore mouth; day {7-12} after cycle {2-5} of chemotherapy; tenderness around the "
            "central line; loose stools; fatigue"
        ),
        denies=of("cough; dysuria; neck stiffness; rash"),
        exam=of(
            "warm peripheries without focal source of infection; central line site clean; mild oral mucositis; chest "
            "clear; abdomen soft"
        ),
        tests=of(
            "neutrophils {0.0-0.4} x10^9/L; lactate {1.6-3.2} mmol/L; blood cultures from line and periphery sent; "
            "chest X-ray clear; MASCC score {14-24}"
        ),
        drugs=of("piperacillin-tazobactam or meropenem; sodium chloride 0.9%; filgrastim"),
        plan=of(
            "give antibiotics within one hour; delay the next cycle by one week; isolate in a side room; daily full "
            "blood count; reduce chemotherapy dose by 20%"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia; hypotension"),
        labs=of("wcc-; crp+; plt-"),
        weight=1.5,
        facts={"tumour": _TUMOUR},
        excludes=of("atrial fibrillation"),
    ),
    *BREAST_CANCERS,
    Condition(
        name="stage {stage} colorectal adenocarcinoma",
        ages=(42, 80),
        course="weeks",
        complaints=of("review before chemotherapy; change in bowel habit and weight loss"),
        symptoms=of(
            "tingling of the fingers in the cold; fatigue for {2-4} days after each cycle; looser stools; weight loss "
            "of {2-5} kg; a well-functioning stoma; mild nausea"
        ),
        denies=of("rectal bleeding; fever; abdominal pain; vomiting"),
        exam=of(
            "healed midline scar with no palpable mass; performance status {0|1}; no enlarged liver; mild sensory loss "
            "of the fingertips"
        ),
        tests=of(
            "histology shows moderately differentiated adenocarcinoma with {4-7} of {16-24} nodes involved; CEA "
            "{4.2-38.6} micrograms/L; CT shows no distant metastases; DPYD genotype normal"
        ),
        drugs=of("oxaliplatin; fluorouracil or capecitabine; ondansetron"),
        plan=of(
            "check bloods before each cycle; reduce oxaliplatin if neuropathy persists between cycles; flush the PICC "
            "line weekly; repeat CT after cycle 6; give the 24-hour helpline number"
        ),
        disposition="clinic",
        facts={"stage": "{IIIB|IIIC}"},
    ),
    Condition(
        name="metastatic non-small cell lung cancer",
        ages=(48, 80),
        course="months",
        complaints=of("persistent cough and weight loss; review before immunotherapy"),
        symptoms=of(
            "fatigue; reduced appetite; breathlessness on hills; weight loss of {4-9} kg; hoarse voice; dull "
            "{side}-sided chest ache"
        ),
        denies=of("headache; haemoptysis; diarrhoea; rash"),
        exam=of(
            "reduced breath sounds at the {side} apex with finger clubbing; performance status {1|2}; no palpable "
            "supraclavicular nodes; no rash"
        ),
        tests=of(
            "biopsy shows adenocarcinoma with PD-L1 {55-90}%; CT shows a {38-66} mm {side} upper lobe mass with "
            "{liver|adrenal|bone} metastases; no EGFR, ALK or ROS1 alteration; brain MRI clear; thyroid function and "
            "cortisol normal"
        ),
        drugs=of("pembrolizumab"),
        plan=of(
            "check thyroid function, cortisol and liver tests before each dose; warn about rash, diarrhoea and "
            "breathlessness; repeat CT after 12 weeks; refer to the lung cancer nurse; offer palliative care review"
        ),
        disposition="clinic",
        smoker=0.45,
        excludes=of("hypothyroidism"),
    ),
    Condition(
        name="diffuse large B-cell lymphoma, stage {stage}",
        ages=(40, 80),
        course="weeks",
        complaints=of("neck lumps and night sweats; review before immunochemotherapy"),
        symptoms=of("drenching night sweats; weight loss of {5-10} kg; fatigue; itching; early fullness after meals"),
        denies=of("cough; bleeding; pain in the nodes; headache"),
        exam=of(
            "rubbery {side} cervical nodes up to {3-6} cm; spleen palpable {2-5} cm below the costal margin; "
            "performance status {1|2}; tonsils normal"
        ),
        tests=of(
            "node biopsy shows CD20-positive diffuse large B-cell lymphoma; PET-CT shows stage {stage} disease; LDH "
            "{420-980} U/L; hepatitis B serology negative; ejection fraction {56-64}%"
        ),
        drugs=of("rituximab; cyclophosphamide; doxorubicin; allopurinol"),
        plan=of(
            "give six cycles at 21-day intervals; interim PET-CT after cycle 2; monitor for tumour lysis in cycle 1; "
            "offer fertility and dental review; give growth factor from day 4"
        ),
        disposition="clinic",
        labs=of("hb-"),
        facts={"stage": "{II|III|IV}"},
    ),
    Condition(
        name="painful bone metastases from {tumour}",
        ages=(46, 84),
        course="weeks",
        complaints=of("{side} hip pain; worsening back pain; rib pain at night"),
        symptoms=of(
            "pain score {6-9} of 10 at night; pain on weight bearing; poor sleep; constipation on codeine; reduced "
            "mobility; low mood"
        ),
        denies=of("leg weakness; saddle numbness; bladder change; fever"),
        exam=of("local bony tenderness with normal power; performance status {2|3}; reflexes normal; no sensory level"),
        tests=of(
            "MRI shows metastases of the {lumbar spine|pelvis|ribs} without cord compression; alkaline phosphatase "
            "{180-460} U/L; corrected calcium {2.24-2.52} mmol/L; bone scan shows {4-9} sites of uptake"
        ),
        drugs=of("morphine or oxycodone; paracetamol; senna; zoledronic acid"),
        plan=of(
            "refer for a single 8 Gy fraction of radiotherapy; titrate opioid by the breakthrough need; ask the "
            "palliative care team to review; warn about symptoms of cord compression; check teeth before bone "
            "treatment"
        ),
        disposition="clinic",
        facts={"tumour": "{lung cancer|kidney cancer|thyroid cancer}"},
    ),
    Condition(
        name="chemotherapy-induced nausea and vomiting",
        ages=(30, 76),
        course="days",
        complaints=of("vomiting after chemotherapy; persistent nausea"),
        symptoms=of(
            "{4-7} vomits a day since cycle {1-3} of cisplatin; poor oral intake; weight loss of {1-3} kg; fatigue; "
            "light-headedness on standing; taste change"
        ),
        denies=of("fever; abdominal pain; headache; diarrhoea"),
        exam=of(
            "dry mucous membranes with a soft abdomen; no papilloedema; bowel sounds present; performance status {1|2}"
        ),
        tests=of(
            "urea {8.2-13.4} mmol/L; magnesium {0.58-0.72} mmol/L; abdominal X-ray without obstruction; corrected "
            "calcium {2.22-2.48} mmol/L"
        ),
        drugs=of("sodium chloride 0.9%; ondansetron; aprepitant or olanzapine; dexamethasone"),
        plan=of(
            "replace potassium and magnesium; strengthen prophylaxis for the next cycle; refer to the dietitian; give "
            "the 24-hour helpline number"
        ),
        disposition="admit",
        vitals=of("tachycardia"),
        labs=of("k-"),
        excludes=of("type 2 diabetes"),
    ),
    Condition(
        name="chemotherapy-related anaemia in {tumour}",
        ages=(36, 82),
        course="weeks",
        complaints=of("fatigue and breathlessness on exertion; tiredness during chemotherapy"),
        symptoms=of(
            "palpitations on climbing stairs; light-headedness; cycle {3-6} of chemotherapy last week; poor "
            "concentration; cold hands"
        ),
        denies=of("bleeding; chest pain; fever; black stools"),
        exam=of("conjunctival pallor; soft systolic flow murmur; no bruising; performance status {1|2}; chest clear"),
        tests=of(
            "ferritin {180-620} micrograms/L with normal B12 and folate; blood film without haemolysis; reticulocytes "
            "{18-34} x10^9/L; group and save sent"
        ),
        drugs=of("red cells"),
        plan=of(
            "transfuse aiming for haemoglobin above 90 g/L; watch for fluid overload; repeat full blood count before "
            "the next cycle; consider dose reduction"
        ),
        disposition="clinic",
        labs=of("hb-"),
        facts={"tumour": _TUMOUR},
    ),
    Condition(
        name="malignant hypercalcaemia in {tumour}",
        ages=(46, 84),
        course="days",
        complaints=of("confusion and thirst; drowsiness and constipation"),
        symptoms=of("passing large amounts of urine; constipation; nausea; low mood; bone pain; poor appetite"),
        denies=of("headache; fever; seizures; falls"),
        exam=of("drowsy with dry mucous membranes; abdomen soft; no focal neurology; reflexes sluggish"),
        tests=of(
            "corrected calcium {3.02-3.68} mmol/L; parathyroid hormone suppressed; ECG shows a short QT interval; "
            "phosphate {0.62-0.84} mmol/L"
        ),
        drugs=of("sodium chloride 0.9%; zoledronic acid"),
        plan=of(
            "rehydrate before the bisphosphonate; recheck calcium daily; stop vitamin D and calcium tablets; review "
            "systemic treatment; measure fluid balance"
        ),
        disposition="admit",
        labs=of("creat+"),
        excludes=of("osteopenia; type 2 diabetes; hypertension"),
        facts={"tumour": "{lung cancer|kidney cancer|myeloma|bladder cancer}"},
    ),
    Condition(
        name="metastatic spinal cord compression at {level}",
        ages=(48, 84),
        course="days",
        complaints=of("back pain and leg weakness; difficulty walking"),
        symptoms=of(
            "band-like pain around the chest; numbness of both legs; urinary hesitancy; pain worse on coughing; "
            "unsteadiness on stairs"
        ),
        denies=of("fever; trauma; arm weakness; headache"),
        exam=of(
            "leg power {3|4} of 5 with a sensory level below {level}; brisk knee reflexes; extensor plantars; tender "
            "spine at {level}"
        ),
        tests=of(
            "MRI of the whole spine shows cord compression at {level}; bladder scan {280-620} ml; PSA or primary "
            "markers sent; corrected calcium {2.26-2.54} mmol/L"
        ),
        drugs=of("dexamethasone; omeprazole; morphine"),
        plan=of(
            "refer urgently for radiotherapy within 24 hours; discuss with the spinal surgeons; nurse flat until "
            "stability is known; insert a urinary catheter; start physiotherapy"
        ),
        disposition="admit",
        facts={"level": "{T5|T6|T8|T10|T11}"},
        excludes=of("reflux disease; type 2 diabetes"),
    ),
    Condition(
        name="metastatic prostate cancer",
        ages=(58, 88),
        sex="male",
        course="months",
        complaints=of("review on hormone treatment; bone ache and poor stream"),
        symptoms=of("hot flushes; fatigue; waking {2-4} times at night to pass urine; dull pelvic ache; low libido"),
        denies=of("leg weakness; fever; weight loss; falls"),
        exam=of(
            "hard irregular prostate on rectal examination; no spinal tenderness; performance status {0|1}; mild "
            "gynaecomastia"
        ),
        tests=of(
            "PSA {14-186} micrograms/L; bone scan shows {3-8} sites of uptake; alkaline phosphatase {140-380} U/L; "
            "testosterone below 0.7 nmol/L"
        ),
        drugs=of("goserelin; enzalutamide or docetaxel"),
        plan=of(
            "repeat PSA every three months; check bone density; monitor blood pressure; advise exercise for fatigue; "
            "discuss genetic testing"
        ),
        disposition="clinic",
    ),
    Condition(
        name="immune-related colitis on pembrolizumab",
        ages=(40, 80),
        course="days",
        complaints=of("diarrhoea; diarrhoea and crampy abdominal pain"),
        symptoms=of(
            "{7-11} loose stools a day; urgency at night; dose {3-6} of pembrolizumab three weeks ago for "
            "{melanoma|lung cancer}; mucus in the stool; fatigue; poor appetite"
        ),
        denies=of("vomiting; fever; recent antibiotics; foreign travel"),
        exam=of("mild diffuse tenderness without guarding; dry mucous membranes; no rash; performance status {1|2}"),
        tests=of(
            "faecal calprotectin {680-1900} micrograms/g; stool culture and Clostridioides difficile negative; CT "
            "shows diffuse colonic wall thickening; sigmoidoscopy shows erythema and ulcers"
        ),
        drugs=of("methylprednisolone; sodium chloride 0.9%; omeprazole"),
        plan=of(
            "withhold pembrolizumab; taper steroids over six weeks; start infliximab if there is no response by day 3; "
            "keep a stool chart; screen for tuberculosis and hepatitis"
        ),
        disposition="admit",
        vitals=of("tachycardia"),
        labs=of("crp+; k-"),
        excludes=of("type 2 diabetes"),
    ),
    Condition(
        name="multiple myeloma",
        ages=(52, 84),
        course="months",
        complaints=of("back pain and fatigue; review before induction treatment"),
        symptoms=of(
            "recurrent chest infections; thirst; rib pain; weight loss of {3-6} kg; breathlessness on exertion"
        ),
        denies=of("leg weakness; fever; bleeding; rash"),
        exam=of(
            "pallor with tenderness over the lumbar spine; no enlarged nodes; no neurological deficit; performance "
            "status {1|2}"
        ),
        tests=of(
            "paraprotein {32-58} g/L with {30-70}% marrow plasma cells; whole-body MRI shows lytic lesions; beta-2 "
            "microglobulin {3.6-7.2} mg/L; kappa to lambda ratio {18-140}"
        ),
        drugs=of("bortezomib; lenalidomide; zoledronic acid"),
        plan=of(
            "start aciclovir and thrombosis prophylaxis; monitor renal function weekly; assess for stem cell "
            "transplant; watch for neuropathy; avoid anti-inflammatory drugs"
        ),
        disposition="clinic",
        labs=of("hb-"),
        excludes=of("type 2 diabetes; atrial fibrillation"),
    ),
    Condition(
        name="oral mucositis, grade {grade}",
        ages=(38, 80),
        course="days",
        complaints=of("a sore mouth; painful mouth ulcers"),
        symptoms=of(
            "pain on swallowing; a soft diet only; week {3-6} of head and neck radiotherapy; dry mouth; weight loss of "
            "{2-4} kg; taste change"
        ),
        denies=of("fever; bleeding; breathlessness; neck swelling"),
        exam=of(
            "confluent ulcers of the buccal mucosa and tongue; white plaques of candida; moist pink throat; "
            "performance status {1|2}"
        ),
        tests=of("mouth swab grows Candida albicans; albumin {30-35} g/L; herpes simplex PCR negative"),
        drugs=of("benzydamine mouthwash; nystatin; morphine"),
        plan=of(
            "refer to the dietitian for a soft high-energy diet; use a soft toothbrush and saline rinses; consider "
            "nasogastric feeding if weight falls further; review weekly during radiotherapy"
        ),
        disposition="clinic",
        facts={"grade": "{2|3}"},
    ),
)
