"""Requests from mistakes: what the student gets wrong on validation text, the teacher is asked to write more of (PGKD)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.corpus.encode import TextEncoder
from kdata.errors import DataError
from kdata.format.files import write_atomically
from kdata.format.keep import KeepConfig
from kdata.jobs.job import run_job
from kdata.jobs.reading import CaptureJob
from kdata.jobs.writing import GenerateJob
from kdata.observe.progress import Task, console
from kdata.pipelines.engine import open_engine
from kdata.pipelines.judging import LITTLE, replies_of, writing_config
from kdata.pipelines.rounds import RequestStage, filled
from kdata.pipelines.run import Run, write_json
from kdata.selection.apportion import apportion
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.teachers.base import Teacher
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer


@dataclass(frozen=True)
class Prediction:
    """A validation text, its class, and the student's: the most probable one, and its probability among all classes."""

    id: str
    text: str
    label: str
    predicted: str
    confidence: float


def request(run: Run, number: int, stage: RequestStage) -> None:
    """Have the student classify the validation text, ask the teacher for new texts, and add them to the dataset.

    RUN/rounds/N has predictions.jsonl, requests.jsonl, `written` (requests and replies), examples.jsonl (new rows) and
    request.json (counts). New texts that are in training, validation or held-out data already are left out.

    Raises:
        DataError: the validation text is no classification; or the teacher wrote nothing that can be used.
    """
    folder = run.round_folder(number)
    examples = labelled(open_dataset(run.validation_path), stage.marker)
    predictions = classify(stage.student, examples, stage.marker)
    _write_lines(folder / "predictions.jsonl", [asdict(one) for one in predictions])
    rows = requests_of(predictions, stage, run.recipe.seed, number)
    config = writing_config(folder / "requests.jsonl", rows, stage.chat, stage.sampling, run.recipe.seed, "written")
    job = GenerateJob(config, Corpus(config.prompts))
    teacher = run.teacher_config
    with open_engine(run.recipe.engine, teacher, max_k=LITTLE.k, work=job.work(teacher)) as engine:
        run_job(folder / "written", job, engine, log=run.log)
    new, dropped = _new_rows(run, number, stage, {row["id"]: row["domain"] for row in rows})
    if not new:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        raise DataError(
            f"round {number}: of {len(rows)} texts that the teacher wrote, none can be used ({counts}); look at "
            f"{folder / 'written'}, and change the prompt or the sampling of the request"
        )
    _write_lines(folder / "examples.jsonl", new)
    text = CorpusConfig(path=str(folder / "examples.jsonl"))
    reading = CaptureJob(run.recipe.capture_config(text, f"round-{number}"), Corpus(text))
    with open_engine(run.recipe.engine, teacher, max_k=run.recipe.keep.k, work=reading.work(teacher)) as engine:
        run_job(run.dataset_path, reading, engine, log=run.log)
    right = sum(one.label == one.predicted for one in predictions)
    hard = sum(_is_hard(one, stage) for one in predictions)
    facts = {
        "accuracy": right / len(predictions), "validation": len(predictions), "mistakes": len(predictions) - right,
        "hard": hard, "requests": len(rows), "new_rows": len(new), "left_out": dict(sorted(dropped.items())),
    }  # fmt: skip
    write_json(folder / "request.json", facts)
    console.print(
        f"round {number}: the student classifies {right} of {len(predictions)} validation texts right; {len(new)} new rows",
        soft_wrap=True,
    )


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8", "replace"))


def labelled(dataset: Dataset, marker: str) -> list[tuple[str, str, str]]:
    """Id, text and class of every row, in the order of ids. Raises DataError where one has no class, or all have the same."""
    examples = []
    for row in dataset.sql("select id, text from rows order by id").to_pylist():
        text, found, label = (row["text"] or "").rpartition(marker)
        if not found or not label.strip():
            raise DataError(
                f"{dataset.path}: row {row['id']!r} has no class behind {marker!r}; write validation rows as text, marker, "
                "class, or set the marker of the request"
            )
        examples.append((row["id"], text, label))
    labels = sorted({label for *_, label in examples})
    if len(labels) < 2:
        raise DataError(
            f"{dataset.path}: all rows have the class {labels[0] if labels else None!r}; give it two or more"
        )
    return examples


def classify(model: str, examples: Sequence[tuple[str, str, str]], marker: str) -> list[Prediction]:
    """What a model takes each text for: of all classes the one with the least NLL of text, marker and class together.

    Args:
        examples: id, text, class.
    """
    labels = sorted({label for *_, label in examples})
    reader = load_teacher(TeacherConfig(model=model, backend="transformers"), max_k=1)
    encoder = TextEncoder(load_tokenizer(model, None))
    predictions = []
    try:
        with Task("classify", len(examples), "texts") as task:
            for begin in range(0, len(examples), 32):
                some = examples[begin : begin + 32]
                ids = [encoder.prompt(text + marker + label) for _, text, _ in some for label in labels]
                sums = _logprobs(reader, ids).reshape(len(some), len(labels))
                for (row_id, text, label), sum_L in zip(some, sums, strict=True):
                    best = int(sum_L.argmax())
                    confidence = 1.0 / math.fsum(np.exp(sum_L - sum_L[best]).tolist())
                    predictions.append(Prediction(row_id, text, label, labels[best], round(confidence, 6)))
                task.advance(len(some))
    finally:
        reader.close()
    return predictions


def _logprobs(reader: Teacher, ids: list[np.ndarray]) -> np.ndarray:
    """Log-probability of each sequence, float64 [S]. Raises DataError where one does not fit into the model."""
    longest = max(len(one) for one in ids)
    if longest > reader.context:
        raise DataError(f"a validation text has {longest:,} tokens, and the student reads at most {reader.context:,}")
    readouts = reader.read(ids, KeepConfig(kind="topk", k=1))
    return np.array([readout.logprob[1:].astype(np.float64).sum() for readout in readouts])


def report_of(predictions: Sequence[Prediction]) -> str:
    """Accuracy, and precision, recall and F1 of each class, a line each."""
    right = sum(one.label == one.predicted for one in predictions)
    lines = [f"accuracy {right / len(predictions):.3f} of {len(predictions)} texts"]
    for label in sorted({one.label for one in predictions}):
        of_label, as_label = (sum(value == label for value in values) for values in (
            [one.label for one in predictions], [one.predicted for one in predictions]))  # fmt: skip
        both = sum(one.label == one.predicted == label for one in predictions)
        precision, recall = both / as_label if as_label else 0.0, both / of_label
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        lines.append(f"{label}: precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}, {of_label} texts")
    return "\n".join(lines)


def _is_hard(one: Prediction, stage: RequestStage) -> bool:
    return one.label != one.predicted and one.confidence >= stage.hard_above


def requests_of(predictions: Sequence[Prediction], stage: RequestStage, seed: int, number: int) -> list[dict[str, Any]]:
    """One prompt for each text to ask for: id, domain (the class that is asked for), prompt."""
    blind = stage.ask == "random"  # what the student answers is neither counted nor shown
    report = "(not shown)" if blind else report_of(predictions)
    labels = sorted({one.label for one in predictions})
    mistakes = Counter(one.label for one in predictions if one.label != one.predicted and not blind)
    shares = apportion(stage.num_requests, {label: mistakes[label] + 1 for label in labels})
    rows = []
    for place, label in enumerate(labels):
        own = [one for one in predictions if one.label == label]
        groups = {
            "correct": [one for one in own if blind or one.predicted == label],
            "wrong": [one for one in own if not blind and one.predicted != label and not _is_hard(one, stage)],
            "hard": [one for one in own if not blind and _is_hard(one, stage)],
        }
        for count in range(shares[label]):
            row_id = (
                f"{number}-{place:03}-{count:05}"  # what is sampled follows from the id: another round, other texts
            )
            drawn = {name: _drawn(group, stage.examples, f"{seed}:{row_id}") for name, group in groups.items()}
            examples = {name: [asdict(one) for one in group] for name, group in drawn.items()}
            prompt = filled(stage.prompt, {"label": label, "labels": labels, "report": report, **examples})
            rows.append({"id": row_id, "domain": label, "prompt": prompt})
    return rows


def _drawn(group: Sequence[Prediction], number: int, seed: str) -> list[Prediction]:
    """Some of a group at random, by digests: the same on every machine."""
    return sorted(group, key=lambda one: (hashlib.md5(f"{seed}:{one.id}".encode()).hexdigest(), one.id))[:number]


def _new_rows(
    run: Run, number: int, stage: RequestStage, label_of: dict[str, str]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Rows of new texts, and how many were left out, by reason."""
    seen: set[str] = set()
    for path in (run.dataset_path, run.validation_path, run.heldout_path):
        known = open_dataset(path)
        sources = [entry.source for entry in known.manifest]
        # A round that was stopped after its rows were read must not take them for known ones.
        own = f"round-{number}/" if f"round-{number}" in sources else None
        for row in known.sql("select id, text from rows").to_pylist():
            if own is None or not row["id"].startswith(own):
                seen.add((row["text"] or "").rpartition(stage.marker)[0].strip())
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row_id, reply in replies_of(open_dataset(run.round_folder(number) / "written")):
        text = reply.partition(stage.marker)[0].strip()
        if not text or text in seen:
            dropped["empty" if not text else "known already"] += 1
            continue
        seen.add(text)
        label = label_of[row_id.rpartition("~")[0]]
        rows.append({"id": f"round-{number}/{row_id}", "domain": label, "text": text + stage.marker + label})
    refused = len(label_of) - len(rows) - sum(dropped.values())
    if refused:
        dropped["rejected"] = refused
    return rows, dropped
