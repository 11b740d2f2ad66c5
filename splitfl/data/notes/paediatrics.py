"""Paediatrics: a children's hospital. Ages decide weights, weights decide doses."""

from __future__ import annotations

from splitfl.data.notes.condition import Condition, of

CONDITIONS: tuple[Condition, ...] = (
    Condition(
        name="acute bronchiolitis",
        ages=(0.15, 1.0),
        course="days",
        complaints=of("cough and poor feeding; noisy breathing and reduced feeds"),
        symptoms=of(
            "a runny nose; feeding {half|two thirds} of normal volumes; {2-4} wet nappies today; a sibling with a "
            "cold; wheeze at night; irritability"
        ),
        denies=of("apnoea; cyanosis; vomiting; choking"),
        exam=of(
            "subcostal recession with fine crackles throughout; wheeze on both sides; nasal flaring; soft fontanelle; "
            "moist mucous membranes"
        ),
        tests=of(
            "nasopharyngeal aspirate positive for RSV; capillary gas pH {7.34-7.40}; no chest X-ray indicated; blood "
            "glucose {4.1-5.8} mmol/L"
        ),
        drugs=(),
        plan=of(
            "give small frequent feeds by nasogastric tube; minimal handling; suction the nose before feeds; no "
            "bronchodilators or antibiotics; consider high-flow if work of breathing increases"
        ),
        disposition="admit",
        vitals=of("tachypnoea; tachycardia; hypoxia"),
        weight=1.4,
        oxygen_target="92% or above",
    ),
    Condition(
        name="viral croup",
        ages=(0.6, 5),
        course="hours",
        complaints=of("a barking cough; barking cough and noisy breathing"),
        symptoms=of(
            "a hoarse voice; symptoms worse at night; a runny nose; stridor when upset; a fever at home; poor sleep"
        ),
        denies=of("drooling; choking; rash; cyanosis"),
        exam=of(
            "barking cough with inspiratory stridor when upset; mild sternal recession; good air entry; throat mildly "
            "red; well perfused"
        ),
        tests=of("Westley croup score {2-4}; no blood tests or throat examination forced; no chest X-ray indicated"),
        drugs=of("dexamethasone"),
        plan=of(
            "observe for two to four hours; keep the child calm on a parent's lap; give nebulised adrenaline if "
            "stridor at rest; return if breathing worsens"
        ),
        disposition="home",
        vitals=of("fever"),
    ),
    Condition(
        name="viral-induced wheeze",
        ages=(1, 5),
        course="days",
        complaints=of("wheeze and cough; fast breathing and wheeze"),
        symptoms=of(
            "a cold since the weekend; night-time cough; eating less than usual; needing the reliever every two hours; "
            "noisy breathing on running"
        ),
        denies=of("choking; cyanosis; rash; vomiting"),
        exam=of(
            "expiratory wheeze throughout with subcostal recession; prolonged expiration; able to speak in short "
            "phrases; clear nasal discharge"
        ),
        tests=of(
            "saturation {95-98}% after three rounds of bronchodilator; nasopharyngeal swab positive for rhinovirus; "
            "chest X-ray not indicated"
        ),
        drugs=of("salbutamol; ipratropium"),
        plan=of(
            "space bronchodilators as tolerated; give a written wheeze plan; check spacer technique; advise a "
            "smoke-free home"
        ),
        disposition="admit",
        vitals=of("tachypnoea; tachycardia; hypoxia"),
        excludes=of("viral-induced wheeze"),
        oxygen_target="94% or above",
    ),
    Condition(
        name="acute exacerbation of asthma",
        ages=(6, 15),
        course="hours",
        complaints=of("wheeze and breathlessness; chest tightness and wheeze"),
        symptoms=of(
            "a dry night-time cough; a cold last week; missed preventer doses; using the reliever inhaler every two "
            "hours; breathlessness during {football|swimming|school games}"
        ),
        denies=of("chest pain; fever; choking; rash"),
        exam=of(
            "widespread polyphonic expiratory wheeze; speaking in {phrases|short sentences}; use of accessory muscles; "
            "no crackles"
        ),
        tests=of(
            "peak flow {40-66}% of predicted; peak flow {74-86}% of predicted after treatment; chest X-ray not "
            "indicated"
        ),
        drugs=of("salbutamol; prednisolone"),
        plan=of(
            "check inhaler technique; give a written asthma action plan; review by the asthma nurse within two days; "
            "inform the school nurse"
        ),
        disposition="home",
        vitals=of("tachypnoea; tachycardia"),
        known=of("asthma"),
        excludes=of("viral-induced wheeze"),
    ),
    Condition(
        name="acute otitis media of the {side} ear",
        ages=(0.6, 6),
        course="days",
        complaints=of("{side} ear pain; fever and pulling at the {side} ear"),
        symptoms=of("disturbed sleep; a runny nose; irritability; reduced hearing; eating less than usual; one vomit"),
        denies=of("ear discharge; neck stiffness; rash; swelling behind the ear"),
        exam=of("red bulging {side} tympanic membrane; no mastoid tenderness; throat pink; no neck stiffness"),
        tests=of("no blood tests indicated; urine dipstick clear; ear swab not needed with an intact drum"),
        drugs=of("paracetamol; amoxicillin or clarithromycin; ibuprofen"),
        plan=of(
            "give regular analgesia; return if swelling behind the ear develops; recheck the drum in four weeks; "
            "finish the antibiotic course"
        ),
        disposition="home",
        vitals=of("fever"),
    ),
    Condition(
        name="acute bacterial tonsillitis",
        ages=(3, 15),
        course="days",
        complaints=of("sore throat and fever; painful swallowing and fever"),
        symptoms=of("tummy pain; poor appetite; swollen neck glands; headache; one vomit"),
        denies=of("cough; runny nose; drooling; neck stiffness"),
        exam=of("enlarged tonsils with white exudate; tender anterior cervical nodes; uvula central; no rash"),
        tests=of("throat swab grows group A streptococcus; FeverPAIN score {4|5}; urine dipstick clear"),
        drugs=of("phenoxymethylpenicillin or clarithromycin; paracetamol"),
        plan=of(
            "encourage cool fluids; return if unable to swallow; complete the course; stay off school for 24 hours "
            "after the first dose"
        ),
        disposition="home",
        vitals=of("fever; tachycardia"),
    ),
    Condition(
        name="viral gastroenteritis with {grade} dehydration",
        ages=(0.5, 8),
        course="days",
        complaints=of("vomiting and diarrhoea; watery diarrhoea and vomiting"),
        symptoms=of(
            "{4-8} loose stools today; {3-6} vomits today; fewer wet nappies or less urine; thirst; a nursery "
            "outbreak; tiredness"
        ),
        denies=of("blood in the stool; bilious vomiting; foreign travel; severe pain"),
        exam=of("dry lips and slightly sunken eyes; capillary refill 2 seconds; soft abdomen; normal skin turgor"),
        tests=of(
            "stool sample positive for {rotavirus|norovirus|adenovirus}; blood glucose {3.9-5.4} mmol/L; capillary gas "
            "bicarbonate {17-21} mmol/L; ketones {0.8-2.4} mmol/L"
        ),
        drugs=of("oral rehydration solution; ondansetron"),
        plan=of(
            "weigh again after four hours; continue breast milk or usual milk; replace each loose stool; wash hands "
            "and stay off nursery for 48 hours; start nasogastric rehydration if vomiting persists"
        ),
        disposition="home",
        vitals=of("tachycardia"),
        facts={"grade": "{mild|moderate}"},
    ),
    Condition(
        name="simple febrile convulsion",
        ages=(0.7, 5),
        course="hours",
        complaints=of("a seizure with fever; a convulsion at home"),
        symptoms=of(
            "generalised jerking for {1-4} minutes; eye rolling; sleepiness for {10-30} minutes afterwards; a runny "
            "nose since yesterday; a father with febrile convulsions in childhood"
        ),
        denies=of("focal jerking; a second seizure; head injury; rash"),
        exam=of(
            "alert with normal tone and a red throat; soft neck; normal pupils; no petechiae; moves all limbs equally"
        ),
        tests=of(
            "blood glucose {4.6-6.8} mmol/L; urine dipstick clear; no lumbar puncture or imaging indicated; "
            "respiratory swab positive for influenza"
        ),
        drugs=of("paracetamol"),
        plan=of(
            "explain that the risk of epilepsy is low; teach seizure first aid; call an ambulance for a seizure beyond "
            "five minutes; observe for six hours"
        ),
        disposition="home",
        vitals=of("fever; tachycardia"),
    ),
    Condition(
        name="upper urinary tract infection",
        ages=(0.4, 9),
        sex="female",
        course="days",
        complaints=of("fever and vomiting; fever and tummy pain"),
        symptoms=of("offensive urine; crying on passing urine; poor appetite; irritability; shivering"),
        denies=of("cough; diarrhoea; rash; neck stiffness"),
        exam=of(
            "mild suprapubic and loin tenderness; soft abdomen without mass; normal genitalia and spine; good colour "
            "and perfusion"
        ),
        tests=of(
            "clean-catch urine shows nitrites and leucocytes; urine culture grows Escherichia coli; renal ultrasound "
            "shows no hydronephrosis; blood culture negative at 48 hours"
        ),
        drugs=of("cefalexin or trimethoprim; paracetamol"),
        plan=of(
            "send urine for culture before antibiotics; encourage fluids and regular toileting; treat constipation; "
            "arrange renal ultrasound within six weeks"
        ),
        disposition="home",
        vitals=of("fever; tachycardia"),
        labs=of("wcc+; crp+"),
    ),
    Condition(
        name="community-acquired pneumonia",
        ages=(1, 14),
        course="days",
        complaints=of("cough and fever; fever and fast breathing"),
        symptoms=of(
            "tummy pain; poor appetite; fatigue; pain on the {side} side of the chest; a cold the week before; less "
            "drinking than usual"
        ),
        denies=of("choking; wheeze; rash; weight loss"),
        exam=of(
            "coarse crackles and bronchial breathing at the {side} base; dullness to percussion at the {side} base; "
            "intercostal recession; well perfused"
        ),
        tests=of(
            "chest X-ray shows consolidation of the {side} lower lobe; blood cultures sent; chest ultrasound shows no "
            "effusion; mycoplasma PCR negative"
        ),
        drugs=of("amoxicillin or clarithromycin; paracetamol"),
        plan=of(
            "encourage oral fluids; review at 48 hours; change to intravenous treatment if vomiting; no repeat chest "
            "X-ray if well"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia; tachypnoea; hypoxia"),
        labs=of("wcc+; crp+"),
        oxygen_target="92% or above",
    ),
    Condition(
        name="Kawasaki disease",
        ages=(0.6, 5),
        course="days",
        lasting=(5, 8),
        complaints=of("prolonged fever and rash; fever with red eyes"),
        symptoms=of(
            "marked irritability; cracked red lips; peeling fingertips; poor appetite; a red rash of the trunk; sore "
            "hands and feet"
        ),
        denies=of("cough; eye discharge; travel; tick bite"),
        exam=of(
            "bilateral non-purulent conjunctivitis with a strawberry tongue; {side} cervical node of {1.6-2.8} cm; "
            "polymorphous rash; swollen hands and feet"
        ),
        tests=of(
            "echocardiogram shows {normal coronary arteries|a left anterior descending z-score of 2.6}; ESR {58-102} "
            "mm/h; sterile pyuria on microscopy; alanine transaminase {62-140} U/L"
        ),
        drugs=of("immunoglobulin; aspirin (anti-inflammatory)"),
        plan=of(
            "reduce aspirin once afebrile for 48 hours; repeat echocardiogram at two and six weeks; delay live "
            "vaccines for 11 months; advise influenza vaccination"
        ),
        disposition="admit",
        vitals=of("fever; tachycardia"),
        labs=of("wcc+; crp+; plt+; hb-"),
        weight=0.7,
    ),
    Condition(
        name="new type 1 diabetes with mild ketoacidosis",
        ages=(3, 15),
        course="weeks",
        complaints=of("thirst and weight loss; polyuria and tiredness"),
        symptoms=of(
            "new bed wetting; weight loss of {2-4} kg; tummy pain; vomiting today; drinking through the night; an aunt "
            "with thyroid disease"
        ),
        denies=of("diarrhoea; fever; headache; drowsiness"),
        exam=of(
            "deep sighing breathing with dry lips; breath smells of ketones; soft abdomen; alert and orientated; "
            "capillary refill 2 seconds"
        ),
        tests=of(
            "blood glucose {19.2-31.6} mmol/L with ketones {3.4-5.6} mmol/L; venous pH {7.21-7.29}; bicarbonate "
            "{10-14} mmol/L; HbA1c {88-124} mmol/mol; coeliac and thyroid antibodies sent"
        ),
        drugs=of("sodium chloride 0.9%; insulin"),
        plan=of(
            "start insulin one hour after fluids; hourly glucose, ketones and neurological observations; add potassium "
            "to maintenance fluids; teach the family with the diabetes nurse; watch for cerebral oedema"
        ),
        disposition="admit",
        vitals=of("tachycardia; tachypnoea"),
        labs=of("na-"),
    ),
    Condition(
        name="functional constipation",
        ages=(2, 12),
        course="weeks",
        complaints=of("constipation; tummy pain and hard stools"),
        symptoms=of(
            "one hard stool every {4-6} days; pain on passing stool; soiling of underwear; a low fibre diet; "
            "withholding behaviour; drinking little at school"
        ),
        denies=of("delayed passage of meconium; vomiting; weight loss; leg weakness"),
        exam=of(
            "palpable faeces in the left iliac fossa; soft abdomen; normal spine and lower limb reflexes; normal "
            "perianal inspection"
        ),
        tests=of(
            "no investigations indicated; coeliac serology negative; thyroid function normal; growth along the "
            "{25th|50th|75th} centile"
        ),
        drugs=of("macrogol"),
        plan=of(
            "keep a stool diary with a star chart; sit on the toilet after meals; increase fluids and fibre; continue "
            "maintenance laxative for three months"
        ),
        disposition="clinic",
    ),
    Condition(
        name="nutritional iron-deficiency anaemia",
        ages=(1, 4),
        course="months",
        complaints=of("pallor; tiredness and a poor diet; pale skin noticed by the grandmother"),
        symptoms=of(
            "drinking {700-1100} ml of cow's milk a day; fussy eating; craving for soil; poor sleep; less play than "
            "siblings"
        ),
        denies=of("bleeding; jaundice; weight loss; diarrhoea"),
        exam=of(
            "conjunctival pallor; soft systolic flow murmur; no enlarged spleen; growth along the {25th|50th} centile; "
            "no bruises"
        ),
        tests=of(
            "ferritin {3-9} micrograms/L; mean cell volume {58-68} fL; haemoglobin electrophoresis normal; blood film "
            "shows microcytic hypochromic cells"
        ),
        drugs=of("sodium feredetate"),
        plan=of(
            "limit cow's milk to 400 ml a day; refer to the dietitian; repeat full blood count in four weeks; continue "
            "iron for three months after haemoglobin is normal"
        ),
        disposition="clinic",
        labs=of("hb-; plt+"),
    ),
    Condition(
        name="IgA vasculitis",
        ages=(3, 12),
        course="days",
        complaints=of("a rash on the legs; leg rash and joint pain"),
        symptoms=of("painful swollen ankles; colicky tummy pain; a sore throat two weeks ago; limping; puffy feet"),
        denies=of("fever; headache; bleeding gums; scrotal or flank pain"),
        exam=of(
            "palpable purpura over the buttocks and shins; tender swollen ankles; soft abdomen; no oedema of the face; "
            "alert and well perfused"
        ),
        tests=of(
            "urine dipstick shows {trace blood|no protein}; clotting screen normal; urine protein-creatinine ratio "
            "{8-18} mg/mmol; antistreptolysin titre raised"
        ),
        drugs=of("paracetamol"),
        plan=of(
            "check urine dipstick and blood pressure weekly for six months; rest while joints are painful; return for "
            "severe tummy pain or dark urine; avoid contact sport this week"
        ),
        disposition="home",
    ),
)
