"""A recipe with rounds: the newest student says what the next round trains on (KD^3: text that both models predict well).

    python examples/train_in_rounds.py

The text is what this Python carries, cut into training, validation and held-out parts. The teacher ships with kdata.
"""

import json
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from kdata.pipelines.builtin.builtin import ensure_corpus
from kdata.pipelines.recipe import load_recipe
from kdata.pipelines.runner import execute

folder = Path("runs/examples")
folder.mkdir(parents=True, exist_ok=True)

# 1. Three texts that have no row in common. Rounds are chosen by the second; the third stays untouched until the end.
rows = pq.read_table(ensure_corpus(folder / "cache").corpus)
for name, first, number in (("train", 0, 120), ("valid", 120, 20), ("test", 140, 20)):
    pq.write_table(rows.slice(first, number), folder / f"rounds-{name}.parquet")

# 2. The recipe. {round} and {last} are the round's number and the student of the round before.
recipe = {
    "name": "rounds",
    "teacher": {"model": "builtin", "backend": "transformers"},
    "generate": None,
    "corpus": {"path": str(folder / "rounds-train.parquet")},
    "heldout": {"path": str(folder / "rounds-test.parquet")},
    "student": {"scratch": {"hidden_size": 48, "num_layers": 2, "num_heads": 2}},
    "train": {"steps": 15, "batch_tokens": 2048, "warmup_steps": 2, "learning_rate": 0.003},
    "students": {"kd": {"label": "distilled", "objective": {"weights": {"forward_kl": 1.0}}}},
    "rounds": {
        "count": 2,
        "patience": None,  # do both, whatever they bring
        "validation": {"path": str(folder / "rounds-valid.parquet")},
        "stages": [
            {"stage": "score", "name": "student_{round}", "model": "{last}"},
            {"stage": "select", "method": "confidence", "score": "student_{round}", "share": {"by_round": [0.5, 0.8]}},
        ],
    },
}
(folder / "rounds.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

# 3. As `kdata run runs/examples/rounds.yaml`. If it is stopped, run it again: it continues with the stage that was stopped.
out = folder / "rounds"
execute(load_recipe(folder / "rounds.yaml", []), out)
rounds = json.loads((out / "results.json").read_text())["rounds"]
for line in rounds["rounds"]:
    print(
        f"round {line['round']}: NLL {line['value']:.4f} on the validation text, trained on {line['plan'] or 'all rows'}"
    )
print(f"round {rounds['best']} is the best; kdata sql {out / 'dataset'} 'select * from scores.student_1'")
