"""Teacher hacking on small models: many epochs on few rows against one on many, at equal steps.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.hacking --teacher SMALL --oracle LARGE --corpus TEXTS.parquet --out OUT

The teacher is the small model. The large one is a pseudo-oracle: it is better, and what it believes is no truth. Students
have random weights, learn by forward KL alone from the default dataset at a constant rate, and see as many tokens. A third
student, of a fifth of the steps on many rows, is three layers of the large model: it knows more than its teacher.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import kdata
from kdata.pipelines.cli.train import print_course
from kdata.pipelines.evidence.data import Part, split
from kdata.pipelines.report.course import draw_course
from kdata.teachers.config import TeacherConfig
from kdata.trainer.config import TrainConfig
from kdata.trainer.hacking import hacking
from kdata.trainer.train import train

CONTEXT = 128


def main() -> None:
    """Capture, train and measure; what is there is not made again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    for name in ("teacher", "oracle", "corpus", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--few-tokens", type=int, default=6_000)
    parser.add_argument("--heldout-tokens", type=int, default=6_000)
    arguments = parser.parse_args()
    out, many = Path(arguments.out), int(arguments.steps * arguments.batch_tokens)
    parts = {
        "few": Part(0.0, 0.85, arguments.few_tokens),
        "many": Part(0.0, 0.85, many),
        "heldout": Part(0.85, 1.0, arguments.heldout_tokens),
    }
    if not (out / "heldout.parquet").exists():
        split(arguments.corpus, arguments.teacher, parts, out)
    teacher, oracle = (TeacherConfig(model=m, backend="transformers") for m in (arguments.teacher, arguments.oracle))
    captures = [("few", teacher), ("many", teacher), ("heldout", teacher), ("heldout", oracle)]
    for part, reader in captures:
        corpus = kdata.CorpusConfig(path=str(out / f"{part}.parquet"))
        keep = {"kind": "hybrid", "k": 32, "num_draws": 64} if part == "heldout" else {}
        name = "oracle" if reader is oracle else part
        kdata.capture(out / f"{name}-set", kdata.CaptureConfig(corpus=corpus, max_tokens=CONTEXT, **keep), reader)
    random = {"kind": "scratch", "hidden_size": 96, "num_layers": 2, "num_heads": 3}
    knowing = {"kind": "checkpoint", "model": arguments.oracle, "keep_layers": 3}
    cases = [
        ("few", random, arguments.steps),
        ("many", random, arguments.steps),
        ("many", knowing, arguments.steps // 5),
    ]
    for name, student, steps in cases:
        label = f"{name}-{student['kind']}"
        if (out / f"{label}.json").exists():
            continue
        config = TrainConfig.model_validate(
            {
                "label": label,
                "steps": steps,
                "batch_tokens": arguments.batch_tokens,
                "context_tokens": CONTEXT,
                "student": student,
                "learning_rate": 2e-3 if student is random else 5e-4,
                "warmup_steps": steps // 10,
                "objective": {"weights": {"forward_kl": 1.0}},
                "decay": "constant",
                "keep_models_every_steps": steps // 12,
            }
        )
        train(config, out / f"{name}-set", None, out / f"{label}-run")
        measured = hacking(
            out / f"{label}-run", out / "heldout-set", oracle=out / "oracle-set", trained_on=out / f"{name}-set"
        )
        (out / f"{label}.json").write_text(json.dumps(measured, indent=1))
        draw_course(measured, out / f"{label}.png")
        print_course(measured)


if __name__ == "__main__":
    main()
