"""Evidence: students trained on equal terms, several seeds of each, so that a recommendation has a number behind it.

    python -m kdata.pipelines.evidence run QUESTION --out DIR       # train what is not trained yet, one or several processes
    python -m kdata.pipelines.evidence report QUESTION --out DIR    # results.json, table.md, evidence.png

Questions: `offline` (what to keep of the teacher, which objective), `selection` (difference sampling against random and
everything), `mixture` (DDK against fixed domain weights).

    runs.py       named settings x seeds, measured once each and kept as JSON; knows nothing of distillation
    summary.py    means and 95 % intervals over seeds, differences in pairs
    data.py       corpus split by id, the teacher's states read once, a logit dataset for each way of keeping
    students.py   one student: trained, and measured on held-out text
    online.py     full distillation, the reference: every probability of the teacher, computed in the loop
    offline.py    question 1: what is kept, how the tail is completed, which objective
    selection.py  questions 2 and 3: plans and mixtures
    figures.py, selection_figures.py    tables and pictures

Another question takes `runs.py` and `summary.py` as they are, and brings its own settings and its own `measure`.
"""

from kdata.config import set_environment

set_environment()  # here, because the modules of this folder import torch at their top
