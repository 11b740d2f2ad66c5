"""Cardiology: a heart centre's wards and clinics."""

from __future__ import annotations

from splitfl.data.notes import shared
from splitfl.data.notes.condition import Condition, of

CONDITIONS: tuple[Condition, ...] = (
    shared.HYPERTENSION,
    shared.ATRIAL_FIBRILLATION,
    shared.PULMONARY_EMBOLISM,
    Condition(
        name="non-ST-elevation myocardial infarction",
        ages=(44, 86),
        course="hours",
        complaints=of("central chest pain; chest tightness at rest; chest pain radiating to the left arm"),
        symptoms=of(
            "sweating; nausea; pain radiating to the jaw; breathlessness; pain not relieved by nitrate spray; milder "
            "pain on exertion last week"
        ),
        denies=of("pleuritic pain; syncope; fever; calf swelling"),
        exam=of(
            "heart sounds normal without murmur in a clammy patient; jugular venous pressure not raised; chest clear; "
            "no radio-femoral delay"
        ),
        tests=of(
            "high-sensitivity troponin {62-240} ng/L rising to {610-2900} ng/L; ECG shows ST depression in {V4 to "
            "V6|the inferior leads|the lateral leads}; echocardiogram shows {inferior|lateral|apical} hypokinesia with "
            "ejection fraction {46-54}%; GRACE score {118-164}; LDL cholesterol {3.1-4.8} mmol/L"
        ),
        drugs=of("aspirin loading; ticagrelor or clopidogrel; fondaparinux; atorvastatin; bisoprolol"),
        plan=of(
            "arrange inpatient coronary angiography within 72 hours; monitor on telemetry; repeat ECG with pain; refer "
            "to cardiac rehabilitation"
        ),
        disposition="admit",
        vitals=of("tachycardia"),
        smoker=0.4,
        weight=1.4,
        excludes=of("ischaemic heart disease; atrial fibrillation; asthma"),
    ),
    Condition(
        name="{wall} ST-elevation myocardial infarction",
        ages=(40, 82),
        course="hours",
        complaints=of("crushing central chest pain; sudden severe chest pain"),
        symptoms=of(
            "profuse sweating; vomiting; pain radiating to both arms; a feeling of dread; breathlessness; "
            "light-headedness"
        ),
        denies=of("tearing back pain; pleuritic pain; recent surgery; previous stroke"),
        exam=of("grey and clammy with a fourth heart sound; chest clear; no murmur; peripheral pulses equal"),
        tests=of(
            "ECG shows ST elevation in the {wall} leads with reciprocal change; troponin {1400-9800} ng/L; angiogram "
            "shows an occluded {proximal|mid} {artery} artery treated with one drug-eluting stent; ejection fraction "
            "{36-48}%; door-to-balloon time {42-78} minutes"
        ),
        drugs=of("aspirin loading; prasugrel or ticagrelor; atorvastatin; ramipril"),
        plan=of(
            "continue dual antiplatelet therapy for 12 months; monitor on the coronary care unit; start bisoprolol "
            "when stable; echocardiogram before discharge; advise no driving for one week"
        ),
        disposition="admit",
        vitals=of("tachycardia"),
        smoker=0.5,
        facts={"wall": "{anterior|anterolateral}", "artery": "left anterior descending"},
        excludes=of("ischaemic heart disease; atrial fibrillation; asthma"),
    ),
    Condition(
        name="stable angina",
        ages=(46, 82),
        course="weeks",
        complaints=of("exertional chest tightness; chest discomfort on walking uphill"),
        symptoms=of(
            "relief within {2-5} minutes of rest; tightness after {100-400} metres on the flat; worsening in cold "
            "weather; tightness after heavy meals; breathlessness with the pain"
        ),
        denies=of("pain at rest; syncope; palpitations; orthopnoea"),
        exam=of("normal heart sounds with xanthelasma; no murmur; no carotid bruit; femoral pulses present"),
        tests=of(
            "CT coronary angiogram shows {50-75}% stenosis of the {left anterior descending|circumflex|right coronary} "
            "artery; resting ECG normal; calcium score {140-620}; LDL cholesterol {2.9-4.4} mmol/L; stress "
            "echocardiogram shows inducible {inferior|anterior} hypokinesia"
        ),
        drugs=of("aspirin; atorvastatin; bisoprolol or isosorbide mononitrate; glyceryl trinitrate spray"),
        plan=of(
            "call an ambulance for pain beyond 15 minutes; consider elective angiography if symptoms persist; refer to "
            "the smoking and lifestyle service; recheck lipids in three months"
        ),
        disposition="clinic",
        smoker=0.35,
        excludes=of("ischaemic heart disease; asthma; atrial fibrillation"),
    ),
    Condition(
        name="decompensated heart failure with reduced ejection fraction",
        ages=(52, 90),
        course="weeks",
        complaints=of("worsening breathlessness and leg swelling; orthopnoea and ankle oedema"),
        symptoms=of(
            "waking breathless at night; sleeping on {3|4} pillows; weight gain of {4-9} kg; reduced exercise "
            "tolerance; abdominal bloating; a cold two weeks ago"
        ),
        denies=of("chest pain; fever; productive cough; palpitations"),
        exam=of(
            "jugular venous pressure raised {4-8} cm with bibasal crackles; pitting oedema to the "
            "{knees|thighs|sacrum}; third heart sound; displaced apex beat; pansystolic murmur at the apex"
        ),
        tests=of(
            "NT-proBNP {2800-14500} ng/L; echocardiogram shows ejection fraction {20-35}% with a dilated left "
            "ventricle; chest X-ray shows pulmonary congestion with small effusions; ECG shows left bundle branch "
            "block of {138-168} ms"
        ),
        drugs=of("furosemide; sacubitril-valsartan or ramipril; spironolactone; dapagliflozin or empagliflozin"),
        plan=of(
            "restrict fluid to 1.5 litres a day; weigh daily aiming for a loss of 1 kg a day; monitor renal function "
            "and potassium; refer to the heart failure nurse; assess for cardiac resynchronisation"
        ),
        disposition="admit",
        vitals=of("tachypnoea; hypoxia"),
        labs=of("creat+; na-"),
        weight=1.5,
        excludes=of("type 2 diabetes; hypertension"),
    ),
    Condition(
        name="complete heart block",
        ages=(66, 92),
        course="days",
        complaints=of("recurrent collapse; dizziness and a slow pulse; recurrent blackouts"),
        symptoms=of(
            "sudden loss of consciousness without warning; fatigue; breathlessness on exertion; a facial bruise from "
            "the fall; dizziness on standing"
        ),
        denies=of("chest pain; tongue biting; fever; new tablets"),
        exam=of(
            "cannon waves in the neck with a slow regular pulse; variable first heart sound; chest clear; no focal "
            "neurology"
        ),
        tests=of(
            "ECG shows complete heart block with a ventricular escape at {hr}/min; echocardiogram shows ejection "
            "fraction {50-60}%; troponin negative; thyroid function normal; telemetry shows pauses of {3.2-6.4} "
            "seconds"
        ),
        drugs=of("atropine"),
        plan=of(
            "arrange dual-chamber pacemaker; keep transcutaneous pacing pads on; stop rate-slowing drugs; advise no "
            "driving until one week after pacing"
        ),
        disposition="admit",
        vitals=of("bradycardia"),
        excludes=of("ischaemic heart disease; atrial fibrillation; hypothyroidism"),
    ),
    Condition(
        name="severe aortic stenosis",
        ages=(64, 92),
        course="months",
        complaints=of(
            "exertional breathlessness; exertional dizziness; chest tightness and breathlessness on exertion"
        ),
        symptoms=of(
            "near-syncope on climbing stairs; reduced exercise tolerance; ankle swelling; fatigue; chest tightness on "
            "hills"
        ),
        denies=of("fever; weight loss; palpitations; pain at rest"),
        exam=of(
            "ejection systolic murmur radiating to the carotids with a slow-rising pulse; soft second heart sound; "
            "heaving apex; chest clear"
        ),
        tests=of(
            "echocardiogram shows peak velocity {4.1-5.2} m/s, mean gradient {42-64} mmHg and valve area {0.6-0.9} "
            "cm2; ECG shows left ventricular hypertrophy with strain; CT shows suitable femoral access; NT-proBNP "
            "{900-3400} ng/L; coronary angiogram shows no significant disease"
        ),
        drugs=of("furosemide"),
        plan=of(
            "discuss at the heart team for valve replacement; refer for dental review; avoid nitrates and "
            "vasodilators; repeat echocardiogram if listing is delayed"
        ),
        disposition="clinic",
        excludes=of("ischaemic heart disease; hypertension"),
    ),
    Condition(
        name="acute pericarditis",
        ages=(18, 56),
        course="days",
        complaints=of("sharp chest pain; chest pain worse on lying flat"),
        symptoms=of(
            "relief on sitting forward; a viral illness two weeks ago; pain on deep breathing; pain radiating to the "
            "shoulder; low energy"
        ),
        denies=of("calf swelling; syncope; weight loss; exertional pain"),
        exam=of(
            "pericardial rub at the left sternal edge; jugular venous pressure not raised; no pulsus paradoxus; chest "
            "clear"
        ),
        tests=of(
            "ECG shows widespread saddle-shaped ST elevation with PR depression; echocardiogram shows a {3-8} mm "
            "pericardial effusion without tamponade; troponin {4-13} ng/L; chest X-ray normal"
        ),
        drugs=of("ibuprofen or naproxen; colchicine; omeprazole"),
        plan=of(
            "avoid strenuous exercise until symptoms settle; repeat CRP weekly; continue colchicine for three months; "
            "repeat echocardiogram in two weeks"
        ),
        disposition="home",
        vitals=of("fever"),
        labs=of("crp+"),
        excludes=of("reflux disease"),
    ),
    Condition(
        name="infective endocarditis of the {valve} valve",
        ages=(32, 80),
        course="weeks",
        complaints=of("fever and night sweats; fever and malaise"),
        symptoms=of(
            "weight loss of {3-8} kg; rigors; a recent dental extraction; joint pains; poor appetite; breathlessness"
        ),
        denies=of("cough; dysuria; rash; recent travel"),
        exam=of(
            "new regurgitant murmur over the {valve} area; splinter haemorrhages; Janeway lesions on the palms; "
            "palpable spleen tip; chest clear"
        ),
        tests=of(
            "transoesophageal echocardiogram shows a {6-16} mm vegetation on the {valve} valve; three blood cultures "
            "grow {Streptococcus viridans|Enterococcus faecalis|Streptococcus gallolyticus}; ECG shows a normal PR "
            "interval; urine dipstick shows blood; ESR {62-108} mm/h"
        ),
        drugs=of("benzylpenicillin or vancomycin; gentamicin"),
        plan=of(
            "continue intravenous antibiotics for four to six weeks; repeat blood cultures at 48 hours; discuss with "
            "the cardiac surgeons; perform a daily ECG for PR interval; request dental review"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia"),
        labs=of("wcc+; crp+; hb-"),
        facts={"valve": "{mitral|aortic}"},
    ),
    Condition(
        name="paroxysmal supraventricular tachycardia",
        ages=(18, 60),
        course="hours",
        complaints=of("sudden palpitations; a racing heart"),
        symptoms=of(
            "abrupt onset at rest; light-headedness; chest fluttering; polyuria after the attack; similar episodes "
            "since the teens; a pounding in the neck"
        ),
        denies=of("syncope; chest pain; drug use; fever"),
        exam=of("regular fast pulse with normal heart sounds; no murmur; chest clear; no goitre"),
        tests=of(
            "ECG shows a regular narrow-complex tachycardia at {hr}/min; ECG after treatment shows sinus rhythm at "
            "{72-92}/min without pre-excitation; thyroid function normal; echocardiogram structurally normal"
        ),
        drugs=of("adenosine; verapamil or bisoprolol"),
        plan=of(
            "teach the modified Valsalva manoeuvre; refer to electrophysiology for ablation; limit caffeine; observe "
            "for two hours after cardioversion"
        ),
        disposition="home",
        vitals=of("svt"),
        excludes=of("asthma; ischaemic heart disease; hypertension"),
    ),
    Condition(
        name="vasovagal syncope",
        ages=(18, 64),
        course="hours",
        complaints=of("a faint; loss of consciousness while standing"),
        symptoms=of(
            "feeling hot and sweaty before the event; tunnel vision; nausea; recovery within one minute; {a crowded "
            "train|a hot shower|blood taking|a long church service} as the trigger"
        ),
        denies=of("palpitations; chest pain; tongue biting; family history of sudden death"),
        exam=of("normal heart sounds with no postural drop; no murmur; no focal neurology; no injury"),
        tests=of(
            "ECG shows sinus rhythm with normal PR and QT intervals; lying and standing blood pressure without "
            "significant drop; glucose {4.8-6.2} mmol/L; tilt test reproduces symptoms with a vasodepressor response"
        ),
        drugs=(),
        plan=of(
            "reassure and explain the benign cause; increase fluid and salt intake; teach counter-pressure manoeuvres; "
            "no driving restriction for a simple faint; no cardiac monitoring needed"
        ),
        disposition="home",
        excludes=of("hypertension; ischaemic heart disease; atrial fibrillation"),
    ),
    Condition(
        name="hypertrophic cardiomyopathy",
        ages=(20, 60),
        course="months",
        complaints=of("exertional breathlessness; exertional light-headedness; palpitations on exercise"),
        symptoms=of(
            "a cousin with sudden cardiac death; chest tightness on exertion; near-syncope on sprinting; fatigue; "
            "palpitations at night"
        ),
        denies=of("fever; ankle swelling; orthopnoea; cough"),
        exam=of(
            "ejection systolic murmur louder on Valsalva with a jerky pulse; double apical impulse; fourth heart "
            "sound; chest clear"
        ),
        tests=of(
            "echocardiogram shows septal thickness {17-26} mm with outflow gradient {34-82} mmHg; ECG shows deep "
            "T-wave inversion in V3 to V6; cardiac MRI shows patchy late enhancement; Holter shows {no|two|three} runs "
            "of non-sustained ventricular tachycardia"
        ),
        drugs=of("bisoprolol or verapamil"),
        plan=of(
            "offer family screening and genetic testing; avoid competitive sport and dehydration; calculate sudden "
            "death risk for a defibrillator; repeat Holter yearly"
        ),
        disposition="clinic",
        excludes=of("hypertension; ischaemic heart disease; asthma"),
    ),
)
