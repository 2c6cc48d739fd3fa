"""Do a student's mistakes ask for better text than chance does? PGKD beside its twin of equal cost, on the tests' classes.

    python -m tests.benchmarks.requests --seeds 3

A recipe with rounds on the classification set that tests/pipelines/test_round_methods.py makes: 18 labelled texts, three
classes, a teacher that knows them. Per seed three students of the same start and steps:

- more steps: rounds that ask for nothing, on the same rows;
- random: as many requests, shared out evenly, blind to the student;
- mistakes: PGKD.

Printed is what the last round's student does on the third split, which no round reads: NLL in nats per token, and
the share of texts that it classifies right.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import kdata
from kdata.pipelines import runner
from kdata.pipelines.evidence.summary import estimate, relative_difference
from kdata.pipelines.requesting import classify
from kdata.trainer.evaluate import evaluate
from tests.pipelines.test_round_methods import MARKER, REQUEST, make_teacher, recipe_of, sentences

ARMS: dict[str, dict[str, Any]] = {
    "more steps": {"stage": "select", "method": "all"},
    "random": {**REQUEST, "ask": "random"},
    "mistakes": REQUEST,
}
TEST = 150  # texts of the third split


def measure(
    folder: Path, teacher: Path, stage: dict[str, Any], seed: int, rounds: int, steps: int
) -> dict[str, float | None]:
    """NLL and accuracy of the student of the last round, on the third split; rows that the rounds added."""
    folder.mkdir()
    recipe = recipe_of(folder, teacher, [stage], seed=seed)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps})})
    recipe = recipe.model_copy(
        update={"rounds": recipe.rounds_of().model_copy(update={"count": rounds, "patience": None})}
    )
    runner.execute(recipe, folder / "run")
    model = folder / f"run/rounds/{rounds}/student/model"
    rows = sentences(TEST, 2)
    examples = [(row["id"], *row["text"].rpartition(MARKER)[::2]) for row in rows]
    right = sum(one.label == one.predicted for one in classify(str(model), examples, MARKER))
    nll = evaluate(model, folder / "run/heldout")["overall"]["nll"]
    new = kdata.open(folder / "run/dataset").num_rows - len(sentences(18, 0))
    return {"nll": nll, "accuracy": right / TEST, "new_rows": new}


def main() -> None:
    """Print a table, and the figures of every seed as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of each round, and before the first")
    own = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdata-requests-") as place:
        teacher = make_teacher(Path(place) / "teacher")
        found: dict[str, dict[int, dict[str, float | None]]] = {name: {} for name in ARMS}
        for seed in range(own.seeds):
            for name, stage in ARMS.items():
                found[name][seed] = measure(Path(place) / f"{name} {seed}", teacher, stage, seed, own.rounds, own.steps)
                print(json.dumps({"arm": name, "seed": seed, **found[name][seed]}), flush=True)
    print("| rounds that ask for | new rows | NLL | right | NLL against random |\n|---|---|---|---|---|")
    for name, seeds in found.items():
        nll, right = (estimate([float(f[key] or 0.0) for f in seeds.values()]) for key in ("nll", "accuracy"))
        gap = relative_difference(seeds, found["random"], "nll")
        against = (
            "-" if gap is None or name == "random" else f"{100 * gap.mean:+.1f} ± {100 * (gap.half_width or 0):.1f} %"
        )
        half = [f" ± {one.half_width:.3f}" if one.half_width is not None else "" for one in (nll, right)]
        new = estimate([float(f["new_rows"] or 0) for f in seeds.values()]).mean
        print(f"| {name} | {new:.1f} | {nll.mean:.3f}{half[0]} | {right.mean:.3f}{half[1]} | {against} |")


if __name__ == "__main__":
    main()
