"""Evidence: students trained on equal terms, several seeds of each, so that a recommendation has a number behind it.

    python -m pipelines.evidence run --out DIR       # train what is not trained yet; several such processes share the work
    python -m pipelines.evidence report --out DIR    # results.json, table.md, evidence.png

    runs.py       named settings x seeds, measured once each and kept as JSON; knows nothing of distillation
    summary.py    means and 95 % intervals over seeds, differences in pairs
    data.py       corpus split by id, the teacher's states read once, a logit dataset for each way of keeping
    students.py   one student: trained, and measured on held-out text
    online.py     full distillation, the reference: every probability of the teacher, computed in the loop
    offline.py    the settings that are compared: what is kept, how the tail is completed, which objective
    figures.py    the table and the curve of NLL against bytes per token

Another question takes `runs.py` and `summary.py` as they are, and brings its own settings and its own `measure`.
"""
