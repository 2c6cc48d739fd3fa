"""Evidence: students trained on equal terms, several seeds each, so that every recommendation has a measured number.

    python -m kdata.pipelines.evidence run QUESTION --out DIR       # train what is missing; several processes may
    python -m kdata.pipelines.evidence report QUESTION --out DIR    # write results.json, table.md, evidence.png

Questions: `offline` (what to keep of the teacher, and which objective), `positions` (at which tokens), `tokenizers` (students
with another tokenizer), `selection` (difference sampling against random and everything), `mixture` (DDK against fixed domain
weights), `raw` (hygiene and rules on a raw corpus), `capacity` (sizes of students, and a smaller teacher).

    runs.py       named settings x seeds, measured once each and stored as JSON; independent of distillation
    summary.py    means and 95 % intervals over seeds, paired differences
    data.py       corpus split by id, the teacher's states computed once, a logit dataset for each kind of keeping
    students.py   one student: trained, and measured on held-out text
    online.py     full distillation, the reference: every probability of the teacher, computed during training
    offline.py    question 1: what is kept, how the tail is completed, which objective
    positions.py  question 2: fewer positions against fewer entries and fewer rows
    tokenizers.py question 3: entries and chunks for another tokenizer
    selection.py  questions 4 and 5: plans and mixtures
    capacity.py   sizes of students, each with the teacher and with a smaller one
    figures.py, positions_figures.py, selection_figures.py    tables and plots

To ask another question, use `runs.py` and `summary.py` and write its settings and its `measure`.
"""

from kdata.teachers.environment import set_environment

set_environment()  # here, because the modules of this folder import torch at their top
