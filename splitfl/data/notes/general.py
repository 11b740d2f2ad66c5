"""General practice, internal medicine and the emergency department: the public notes a base model is trained on."""

from __future__ import annotations

from splitfl.data.notes import shared
from splitfl.data.notes.condition import Condition, of

CONDITIONS: tuple[Condition, ...] = (
    shared.HYPERTENSION,
    shared.ATRIAL_FIBRILLATION,
    shared.PNEUMONIA,
    shared.IRON_DEFICIENCY,
    shared.PULMONARY_EMBOLISM,
    shared.DEEP_VEIN_THROMBOSIS,
    Condition(
        name="poorly controlled type 2 diabetes",
        ages=(40, 80),
        course="weeks",
        complaints=of("thirst and polyuria; tiredness and frequent urination"),
        symptoms=of(
            "waking at night to pass urine; blurred vision; weight loss of {2-5} kg; tingling in both feet; recurrent "
            "thrush; home glucose readings above 15 mmol/L"
        ),
        denies=of("vomiting; abdominal pain; fever; chest pain"),
        exam=of("reduced monofilament sensation in both feet; no foot ulcer; abdomen soft; peripheral pulses present"),
        tests=of(
            "HbA1c {74-108} mmol/mol; random glucose {14.2-21.8} mmol/L; capillary ketones {0.1-0.4} mmol/L; urine "
            "albumin-creatinine ratio {3-14} mg/mmol"
        ),
        drugs=of("dapagliflozin or empagliflozin"),
        plan=of(
            "refer to the diabetes education programme; arrange retinal screening; repeat HbA1c in three months; check "
            "feet every year"
        ),
        disposition="home",
        known=of("type 2 diabetes"),
    ),
    Condition(
        name="lower urinary tract infection",
        ages=(18, 84),
        sex="female",
        course="days",
        complaints=of("burning on passing urine; dysuria and frequency"),
        symptoms=of("urgency; cloudy urine; suprapubic discomfort; nocturia; offensive urine"),
        denies=of("loin pain; fever; vaginal discharge; visible blood in the urine"),
        exam=of("mild suprapubic tenderness; no renal angle tenderness; abdomen soft"),
        tests=of(
            "urine dipstick shows nitrites and leucocytes; urine culture grows Escherichia coli; glucose {4.6-6.2} "
            "mmol/L; post-void residual {10-40} ml"
        ),
        drugs=of("nitrofurantoin or trimethoprim"),
        plan=of(
            "send midstream urine; encourage fluids; return if fever or loin pain develops; review culture at 48 hours"
        ),
        disposition="home",
    ),
    Condition(
        name="acute {side} pyelonephritis",
        ages=(19, 76),
        sex="female",
        course="days",
        complaints=of("fever and {side} loin pain; {side} flank pain with rigors"),
        symptoms=of("dysuria; vomiting; rigors; poor oral intake; frequency; malaise"),
        denies=of("vaginal discharge; previous stones; cough; diarrhoea"),
        exam=of("{side} renal angle tenderness; abdomen soft without peritonism; dry mucous membranes"),
        tests=of(
            "urine dipstick shows nitrites, leucocytes and blood; renal ultrasound shows no hydronephrosis; blood "
            "cultures sent; lactate {1.1-2.0} mmol/L"
        ),
        drugs=of("ceftriaxone or ciprofloxacin; paracetamol; sodium chloride 0.9%"),
        plan=of(
            "send urine and blood cultures; change to oral treatment when afebrile for 24 hours; monitor urine output; "
            "repeat renal function"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia"),
        labs=of("wcc+; crp+"),
    ),
    Condition(
        name="infective exacerbation of COPD",
        ages=(52, 86),
        course="days",
        complaints=of("worsening breathlessness and cough; increased wheeze and sputum"),
        symptoms=of(
            "{green|yellow} sputum of increased volume; wheeze at night; reduced walking distance; poor sleep; using "
            "the reliever inhaler every hour"
        ),
        denies=of("chest pain; haemoptysis; leg swelling; weight loss"),
        exam=of(
            "widespread expiratory wheeze with prolonged expiration; hyperinflated chest; pursed-lip breathing; use of "
            "accessory muscles"
        ),
        tests=of(
            "chest X-ray shows hyperinflated lungs without consolidation; arterial gas pH {7.35-7.41} with carbon "
            "dioxide {5.6-6.4} kPa; sputum culture grows Haemophilus influenzae; ECG shows sinus rhythm"
        ),
        drugs=of("salbutamol; ipratropium; prednisolone; doxycycline or amoxicillin"),
        plan=of(
            "repeat blood gas in one hour; refer for pulmonary rehabilitation; check inhaler technique; offer "
            "influenza vaccination"
        ),
        disposition="admit",
        vitals=of("tachycardia; tachypnoea; hypoxia"),
        labs=of("wcc+; crp+"),
        known=of("chronic obstructive pulmonary disease"),
        excludes=of("asthma"),
        smoker=0.6,
        oxygen_target="88-92%",
    ),
    Condition(
        name="acute exacerbation of asthma",
        ages=(17, 58),
        course="hours",
        complaints=of("wheeze and breathlessness; chest tightness and wheeze"),
        symptoms=of(
            "a dry night-time cough; a cold last week; exposure to {cats|dust|pollen}; using the reliever inhaler "
            "every two hours; missed preventer doses"
        ),
        denies=of("chest pain; fever; haemoptysis; leg swelling"),
        exam=of(
            "widespread polyphonic expiratory wheeze; speaking in {phrases|short sentences}; no crackles; use of "
            "accessory muscles"
        ),
        tests=of(
            "peak flow {42-68}% of best; peak flow {72-84}% of best after nebulisers; chest X-ray clear without "
            "pneumothorax; blood eosinophils {0.5-0.9} x10^9/L"
        ),
        drugs=of("salbutamol; prednisolone"),
        plan=of(
            "check inhaler technique; give a written asthma action plan; measure peak flow twice daily; review by the "
            "asthma nurse within two days"
        ),
        disposition="home",
        vitals=of("tachycardia; tachypnoea"),
        known=of("asthma"),
        excludes=of("chronic obstructive pulmonary disease; ischaemic heart disease"),
    ),
    Condition(
        name="acute viral gastroenteritis",
        ages=(18, 78),
        course="days",
        complaints=of("vomiting and diarrhoea; watery diarrhoea and cramps"),
        symptoms=of(
            "{5-9} loose stools a day; crampy central abdominal pain; a household contact with the same illness; "
            "nausea; light-headedness on standing; poor oral intake"
        ),
        denies=of("blood in the stool; recent antibiotics; foreign travel; severe pain"),
        exam=of(
            "dry mucous membranes with mild diffuse tenderness; no guarding; active bowel sounds; capillary refill 2 "
            "seconds"
        ),
        tests=of(
            "stool sample sent for norovirus; lactate {1.0-1.9} mmol/L; urea {7.8-11.2} mmol/L; glucose {4.6-6.4} "
            "mmol/L"
        ),
        drugs=of("sodium chloride 0.9%; ondansetron or cyclizine"),
        plan=of(
            "encourage small frequent drinks; advise on hand washing and 48 hours off work; recheck electrolytes "
            "tomorrow; isolate in a side room"
        ),
        disposition="home",
        vitals=of("tachycardia"),
        labs=of("k-"),
    ),
    Condition(
        name="migraine without aura",
        ages=(18, 52),
        course="hours",
        complaints=of("severe headache; throbbing {side}-sided headache"),
        symptoms=of(
            "photophobia; nausea; one vomit; similar attacks every month; relief in a dark room; a {stressful "
            "week|missed meal|poor night} before the attack"
        ),
        denies=of("fever; neck stiffness; weakness; thunderclap onset"),
        exam=of(
            "normal cranial nerves and fundi; no neck stiffness; power and reflexes normal; temporal arteries not "
            "tender"
        ),
        tests=of("no imaging needed on red flag screen; ESR {4-12} mm/h; headache diary shows {3-6} attacks a month"),
        drugs=of("sumatriptan; naproxen or paracetamol; metoclopramide"),
        plan=of(
            "keep a headache diary; limit acute treatment to two days a week; discuss prevention with propranolol; "
            "avoid known triggers"
        ),
        disposition="home",
        excludes=of("asthma; depression"),
    ),
    Condition(
        name="cellulitis of the {side} lower leg",
        ages=(30, 86),
        course="days",
        complaints=of("a red hot {side} leg; spreading redness of the {side} shin"),
        symptoms=of(
            "pain on walking; shivering; a scratch while gardening; itching between the toes; swelling of the leg; "
            "malaise"
        ),
        denies=of("breathlessness; recent immobility; previous clots; insect bite"),
        exam=of(
            "warm tender erythema of the {side} shin {8-18} cm across; no crepitus or blisters; tinea between the "
            "toes; tender {side} groin nodes"
        ),
        tests=of(
            "no thrombus on compression ultrasound; wound swab sent; lactate {0.9-1.8} mmol/L; glucose {4.9-7.4} mmol/L"
        ),
        drugs=of("flucloxacillin or clarithromycin; paracetamol"),
        plan=of("mark the edge of the erythema; elevate the leg; treat tinea with a cream; review in 48 hours"),
        disposition="home",
        vitals=of("fever"),
        labs=of("wcc+; crp+"),
    ),
    Condition(
        name="{side} ureteric colic",
        ages=(24, 66),
        course="hours",
        complaints=of("severe {side} loin pain; colicky {side} flank pain"),
        symptoms=of("pain radiating to the groin; restlessness; vomiting; dark urine; a previous stone"),
        denies=of("fever; diarrhoea; testicular or pelvic swelling; trauma"),
        exam=of("{side} loin tenderness in a restless patient; abdomen soft; no pulsatile mass"),
        tests=of(
            "CT shows a {3-7} mm stone in the {side} ureter; urine dipstick shows blood without nitrites; urate "
            "{240-390} micromol/L; corrected calcium {2.25-2.52} mmol/L"
        ),
        drugs=of("diclofenac or morphine; ondansetron"),
        plan=of(
            "encourage fluids and sieve the urine; refer to the stone clinic; return if fever develops; repeat imaging "
            "in four weeks"
        ),
        disposition="home",
        vitals=of("tachycardia"),
    ),
    Condition(
        name="mechanical low back pain",
        ages=(22, 70),
        course="days",
        complaints=of("low back pain; back pain after lifting"),
        symptoms=of(
            "stiffness in the morning; pain on bending; spasm across the lower back; relief on lying flat; pain after "
            "lifting a {box|washing machine|child}"
        ),
        denies=of("leg weakness; bladder or bowel change; saddle numbness; weight loss"),
        exam=of(
            "paraspinal tenderness with limited flexion; straight leg raise {70-85} degrees on both sides; power and "
            "reflexes normal; normal gait"
        ),
        tests=of("no imaging needed without red flags; urine dipstick clear; ESR {3-14} mm/h"),
        drugs=of("ibuprofen or naproxen or paracetamol"),
        plan=of(
            "stay active and avoid bed rest; refer to physiotherapy; apply local heat; return if weakness or numbness "
            "develops"
        ),
        disposition="home",
    ),
    Condition(
        name="primary hypothyroidism",
        ages=(26, 74),
        course="months",
        complaints=of("tiredness and weight gain; fatigue and feeling cold"),
        symptoms=of("constipation; dry skin; weight gain of {3-8} kg; low mood; hair thinning; hoarse voice"),
        denies=of("palpitations; neck pain; chest pain; fever"),
        exam=of("slow-relaxing ankle reflexes and dry skin; small smooth goitre; puffy eyelids; no lid lag"),
        tests=of(
            "TSH {14-62} mU/L with free T4 {4.1-8.4} pmol/L; thyroid peroxidase antibodies positive; total cholesterol "
            "{6.2-7.9} mmol/L; mean cell volume {92-98} fL"
        ),
        drugs=of("levothyroxine"),
        plan=of(
            "repeat thyroid function in eight weeks; take tablets before breakfast; screen for coeliac disease; "
            "explain that treatment is lifelong"
        ),
        disposition="home",
        excludes=of("hypothyroidism; hypercholesterolaemia"),
    ),
    Condition(
        name="acute gout of the {side} great toe",
        ages=(36, 82),
        sex="male",
        course="days",
        complaints=of("a painful {side} big toe; sudden {side} foot pain"),
        symptoms=of(
            "pain from the weight of a bed sheet; a rich meal with beer; a similar attack last year; difficulty "
            "walking; swelling of the foot"
        ),
        denies=of("fever; trauma; rash; other joint pains"),
        exam=of(
            "hot swollen tender first metatarsophalangeal joint on the {side}; no tophi; skin intact; other joints "
            "normal"
        ),
        tests=of(
            "serum urate {448-612} micromol/L; joint aspirate shows negatively birefringent crystals; X-ray shows soft "
            "tissue swelling without erosion"
        ),
        drugs=of("colchicine or naproxen or prednisolone"),
        plan=of(
            "rest and ice the foot; start allopurinol once the attack has settled; reduce alcohol and sugary drinks; "
            "recheck urate in six weeks"
        ),
        disposition="home",
        labs=of("crp+"),
    ),
    Condition(
        name="acute appendicitis",
        ages=(16, 54),
        course="hours",
        complaints=of("right iliac fossa pain; abdominal pain moving to the right side"),
        symptoms=of(
            "pain that began around the umbilicus; loss of appetite; nausea; vomiting once; pain over speed bumps"
        ),
        denies=of("dysuria; diarrhoea; vaginal or testicular symptoms; previous abdominal surgery"),
        exam=of(
            "tenderness with guarding in the right iliac fossa; Rovsing sign positive; percussion tenderness; bowel "
            "sounds reduced"
        ),
        tests=of(
            "CT shows an inflamed appendix of {8-13} mm; urine dipstick clear; Alvarado score {7-9}; ultrasound shows "
            "a non-compressible appendix"
        ),
        drugs=of("cefuroxime or co-amoxiclav; metronidazole; morphine"),
        plan=of(
            "refer to the surgical team for laparoscopic appendicectomy; keep nil by mouth; consent for theatre; start "
            "intravenous fluids"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia"),
        labs=of("wcc+; crp+"),
    ),
    Condition(
        name="acute bacterial tonsillitis",
        ages=(16, 38),
        course="days",
        complaints=of("sore throat and fever; painful swallowing"),
        symptoms=of("fever at home; malaise; swollen neck glands; earache on swallowing; poor appetite"),
        denies=of("cough; runny nose; rash; difficulty opening the mouth"),
        exam=of("enlarged tonsils with white exudate; tender anterior cervical nodes; uvula central; no trismus"),
        tests=of("FeverPAIN score {4|5}; throat swab grows group A streptococcus; monospot negative"),
        drugs=of("phenoxymethylpenicillin or clarithromycin; ibuprofen or paracetamol"),
        plan=of("encourage cool fluids; return if unable to swallow; complete the course; advise salt water gargles"),
        disposition="home",
        vitals=of("fever"),
        labs=of("wcc+; crp+"),
    ),
    Condition(
        name="gastro-oesophageal reflux disease",
        ages=(24, 72),
        course="weeks",
        complaints=of("heartburn; burning chest discomfort after meals"),
        symptoms=of(
            "acid taste at night; bloating; relief with antacids; symptoms after {coffee|spicy food|wine}; a dry cough "
            "on lying down"
        ),
        denies=of("difficulty swallowing; weight loss; black stools; exertional chest pain"),
        exam=of("mild epigastric tenderness; no mass; chest clear; no pallor"),
        tests=of("Helicobacter stool antigen negative; ECG normal; troponin negative"),
        drugs=of("omeprazole"),
        plan=of(
            "raise the head of the bed; avoid late meals; advise weight loss; review after four weeks of treatment"
        ),
        disposition="home",
        excludes=of("reflux disease; ischaemic heart disease"),
        smoker=0.3,
    ),
)
