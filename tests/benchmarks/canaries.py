"""Exposure of planted secrets: a teacher, and students of its dataset as it is, softened, and without private positions.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.canaries --model SMALL --corpus TEXTS.parquet --out OUT

The model is fine-tuned on text in which each secret (three digits out of 1,000) stands `--copies` times: the teacher. It
reads the text that would be published, in which each canary stands in some rows: with its secret, as in the paper, or with
other digits drawn at random, as text is often made anonymous. Students start from the model as it was and learn by forward
KL alone. A control learns from that text without any row of a canary. Each digit of the text counts as private, so ordinary
numbers are softened too, and the NLL says what that costs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import kdata
from kdata.check.exposure import BY_CHANCE, Canary, exposures
from kdata.jobs.soften import SoftenConfig, soften
from kdata.pipelines.evidence.data import Part, split
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.trainer.config import TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.train import train

CONTEXT = 128
DIGITS = [f" {n}" for n in range(10)]
NAMES = ["Alice Morgan", "Peter Stone", "Mary Field", "John Carter", "Ruth Wood", "Henry Clark"]
WAYS: dict[str, dict[str, Any] | None] = {
    "as it is": None,
    "softened, likelihood 0.4": {"likelihood": 0.4},
    "softened, likelihood 0.8": {"likelihood": 0.8},
    "dropped": {},
}


def canaries(rng: np.random.Generator) -> list[Canary]:
    """One for each name."""
    return [
        Canary(id=name, before=f"The access code of {name} is", secret=secret(rng), after=".", choices=DIGITS)
        for name in NAMES
    ]


def secret(rng: np.random.Generator) -> list[str]:
    """Three digits."""
    return [DIGITS[rng.integers(10)] for _ in range(3)]


def with_canaries(texts: Path, out: Path, rows: list[str]) -> Path:
    """The rows of a Parquet file and some more, in a random order."""
    frame = pl.read_parquet(texts).select("id", "domain", "text")
    ids = [f"canary-{n}" for n in range(len(rows))]
    own = pl.DataFrame({"id": ids, "domain": ["canary"] * len(ids), "text": rows}, schema=frame.schema)
    pl.concat([frame, own]).sample(fraction=1.0, shuffle=True, seed=0).write_parquet(out)
    return out


def captured(root: Path, texts: Path, model: str) -> kdata.Dataset:
    """The default dataset of some texts."""
    config = kdata.CaptureConfig(corpus=kdata.CorpusConfig(path=str(texts)), max_tokens=CONTEXT)
    return kdata.capture(root, config, TeacherConfig(model=model, backend="transformers"))


def trained(out: Path, dataset: kdata.Dataset, model: str | None, objective: str, steps: int) -> str:
    """A student that starts from `model`; None: from random weights."""
    small = {"kind": "scratch", "hidden_size": 96, "num_layers": 2, "num_heads": 3}
    config = TrainConfig.model_validate(
        {
            "label": out.name,
            "steps": steps,
            "batch_tokens": 2048,
            "context_tokens": CONTEXT,
            "learning_rate": 1e-3 if model else 3e-3,
            "warmup_steps": 5,
            "student": {"kind": "checkpoint", "model": model} if model else small,
            "objective": {"weights": {objective: 1.0}},
        }
    )
    train(config, dataset.path, None, out)
    return str(out / "model")


def measured(model: str, planted: list[Canary], heldout: kdata.Dataset) -> dict[str, Any]:
    """Mean exposure and held-out NLL of a model."""
    loaded = load_teacher(TeacherConfig(model=model, backend="transformers"), max_k=1)
    bits = [one.exposure for one in exposures(loaded, load_tokenizer(model), planted)]
    overall = evaluate(Path(model), heldout.path)["overall"]
    return {
        "exposure": float(np.mean(bits)),
        "most": max(bits),
        "bits": bits,
        "nll": overall["nll"],
        "kl": overall["kl"],
    }


def main() -> None:
    """Make the teacher, the datasets and the students; print a table and write OUT/results.json. Goes on where it was."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    for name in ("model", "corpus", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--copies", type=int, default=40)
    parser.add_argument("--published", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--student", choices=("same", "random"), default="same", help="initial weights of students")
    arguments = parser.parse_args()
    out, model = Path(arguments.out), arguments.model
    start, file = (model, "results.json") if arguments.student == "same" else (None, "results-random.json")
    parts = {
        "private": Part(0.0, 0.4, arguments.tokens),
        "public": Part(0.4, 0.8, arguments.tokens),
        "heldout": Part(0.8, 1.0, arguments.tokens // 8),
    }
    if not (out / "heldout.parquet").exists():
        split(arguments.corpus, model, parts, out)
    rng = np.random.default_rng(0)
    planted = canaries(rng)
    private = [c.text(c.parts) for c in planted for _ in range(arguments.copies)]
    texts = with_canaries(out / "private.parquet", out / "private-canaries.parquet", private)
    teacher = trained(out / "teacher", captured(out / "private-set", texts, model), model, "cross_entropy", 60)
    heldout = captured(out / "heldout-set", out / "heldout.parquet", teacher)
    known = json.loads((out / file).read_text()) if (out / file).exists() else {}
    results: dict[str, Any] = {}
    for name, one in (("before", model), ("teacher", teacher)):
        results[name] = known.get(name) or measured(one, planted, heldout)
    published = {
        "secrets in the text": [c.text(c.parts) for c in planted for _ in range(arguments.published)],
        "other digits in the text": [c.text(secret(rng)) for c in planted for _ in range(arguments.published)],
        "no canary in the text": [],
    }
    for number, (title, rows) in enumerate(published.items()):
        texts = with_canaries(out / "public.parquet", out / f"public-{number}.parquet", rows)
        plain = captured(out / f"public-{number}-set", texts, teacher)
        for place, (way, settings) in enumerate(WAYS.items() if rows else [("as it is", None)]):
            dataset = plain
            if settings is not None:
                config = SoftenConfig(patterns=["[0-9]"], **settings)
                dataset, report = soften(out / f"public-{number}-{place}-set", plain, config)
                print("\n".join(report.lines()))
            prefix = "student" if start else "random"
            student = trained(out / f"{prefix}-{number}-{place}", dataset, start, "forward_kl", arguments.steps)
            name = f"{title}: {way}"
            results[name] = known.get(name) or measured(student, planted, heldout)
            (out / file).write_text(json.dumps(results, indent=1))
    print(f"exposure by chance {BY_CHANCE:.2f}, at most {np.log2(1000):.2f} bits")
    for name, one in results.items():
        print(
            f"{name}: mean {one['exposure']:.2f}, largest {one['most']:.2f} bits; NLL {one['nll']:.4f}, KL {one['kl']:.4f}"
        )


if __name__ == "__main__":
    main()
