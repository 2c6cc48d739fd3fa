"""Marks from a judge: the student answers the teacher's prompts, and a model marks both answers (TAPIR, 2405.13448)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdata.config import parse_config
from kdata.corpus.corpus import Corpus
from kdata.errors import DataError
from kdata.format.files import folder_beside, settle, write_atomically
from kdata.format.json_text import parse_row
from kdata.format.keep import KeepConfig
from kdata.jobs.job import run_job
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.observe.progress import console
from kdata.pipelines.engine import LocalConfig, open_engine
from kdata.pipelines.rounds import JudgeStage, filled, first_groups
from kdata.pipelines.run import Run
from kdata.selection.score_file import bring
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.teachers.config import SamplingConfig, TeacherConfig

LITTLE = KeepConfig(kind="topk", k=1)  # of text that is no training data, the distributions do not matter
SIDES = ("teacher", "student")


def judge(run: Run, number: int, stage: JudgeStage) -> None:
    """Write the score `stage.name`: marks of the teacher's and the student's answers, and the gap.

    RUN/rounds/N/answers has the student's answers, RUN/rounds/N/marks what the judge read and replied.

    Raises:
        DataError: no reply has a mark.
    """
    folder = run.round_folder(number)
    answers = run.generate_job(LITTLE)
    assert answers is not None  # the recipe was checked
    _write(run, folder / "answers", answers, TeacherConfig(model=stage.student, backend=stage.backend))
    dataset, given = open_dataset(run.dataset_path), open_dataset(folder / "answers")
    questions = _questions(dataset, given, stage)
    if not questions:
        raise DataError(f"round {number}: none of the student's answers is to a prompt that the teacher answered")
    config = writing_config(folder / "questions.jsonl", questions, stage.chat, stage.sampling, run.recipe.seed, "marks")
    if stage.judge.model == "teacher":
        model = run.teacher_config
    else:
        name, revision = run.model_of(stage.judge.model, stage.judge.revision)
        model = TeacherConfig(**{**stage.judge.model_dump(), "model": name, "revision": revision})
    _write(run, folder / "marks", GenerateJob(config, Corpus(config.prompts)), model)
    replies = {row_id.rpartition("~")[0]: text for row_id, text in replies_of(open_dataset(folder / "marks"))}
    _bring(dataset, number, stage, sorted({row_id.rpartition("#")[0] for row_id in replies}), replies, folder)


def writing_config(
    path: Path, rows: list[dict[str, Any]], chat: bool, sampling: SamplingConfig, seed: int, name: str
) -> GenerateConfig:
    """Write requests (id, domain, prompt) to a file, and return the settings of a model that replies to them.

    Args:
        chat: each is a user's message.
    """
    form = [
        {"id": r["id"], "domain": r["domain"], "messages": [{"role": "user", "content": r["prompt"]}]} if chat else r
        for r in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in form).encode("utf-8", "replace")
    )
    column = {"messages_column": "messages"} if chat else {"text_column": "prompt"}
    prompts = {"path": str(path), **column}
    values = {**LITTLE.model_dump(), "prompts": prompts, "sampling": sampling.model_dump(), "seed": seed, "name": name}
    return parse_config(GenerateConfig, values, name)


def _write(run: Run, root: Path, job: GenerateJob, model: TeacherConfig) -> None:
    """Have a model in this process write; what is there already stays."""
    with open_engine(LocalConfig(), model, max_k=LITTLE.k, work=job.work(model)) as engine:
        run_job(root, job, engine, log=run.log)


def replies_of(dataset: Dataset) -> list[tuple[str, str]]:
    """Id and written text of every row, in the order of ids; "" where nothing readable was written."""
    rows = dataset.sql("select id, prompt, text, messages from rows order by id").to_pylist()
    return [(row["id"], _written(row)) for row in rows]


def _written(row: dict[str, Any]) -> str:
    if row["messages"] is not None:
        return str(parse_row(row["messages"])[-1]["content"] or "")
    prompt, text = row["prompt"] or "", row["text"]
    return str(text[len(prompt) :] if text.startswith(prompt) else text)


def _question(row: dict[str, Any]) -> str:
    if row["messages"] is None:
        return str(row["prompt"] or "")
    return "\n".join(
        f"{message['role']}: {message.get('content') or ''}" for message in parse_row(row["messages"])[:-1]
    )


def _questions(dataset: Dataset, answers: Dataset, stage: JudgeStage) -> list[dict[str, Any]]:
    """What the judge reads, two rows for each answer of both, in the order of ids."""
    of_student = dict(replies_of(answers))
    rows = dataset.sql(
        "select id, domain, prompt, text, messages from rows where prompt is not null order by id"
    ).to_pylist()
    questions = []
    for row in rows:
        if row["id"] in of_student:
            for side, answer in zip(SIDES, (_written(row), of_student[row["id"]]), strict=True):
                prompt = filled(stage.prompt, {"question": _question(row), "answer": answer})
                questions.append({"id": f"{row['id']}#{side}", "domain": row["domain"], "prompt": prompt})
    return questions


def marks_of(replies: Sequence[str], stage: JudgeStage) -> list[float | None]:
    """The mark in each of a judge's replies; None where there is none, or it is out of range."""
    return [_mark(found, stage) for found in first_groups(replies, stage.pattern)]


def _mark(found: str, stage: JudgeStage) -> float | None:
    try:
        mark = float(found)
    except ValueError:
        return None
    return mark if stage.lowest <= mark <= stage.highest else None


def _bring(
    dataset: Dataset, number: int, stage: JudgeStage, ids: list[str], replies: dict[str, str], folder: Path
) -> None:
    """Write the score from the judge's replies. Raises DataError where no pair of answers has two marks."""
    marks = {side: marks_of([replies.get(f"{row_id}#{side}", "") for row_id in ids], stage) for side in SIDES}
    pairs = zip(marks["teacher"], marks["student"], strict=True)
    gaps = [None if teacher is None or student is None else teacher - student for teacher, student in pairs]
    known = sum(gap is not None for gap in gaps)
    if not known:
        example = next(iter(replies.values()), "")
        raise DataError(
            f"round {number}: in none of {len(ids):,} pairs did the judge mark both answers, as pattern, lowest and "
            f"highest read its replies; it replied for instance {example[:80]!r}. All replies: kdata sql {folder / 'marks'}"
        )
    columns = {"id": pa.array(ids, pa.string())}
    columns |= {name: pa.array(values, pa.float64()) for name, values in {**marks, "gap": gaps}.items()}
    file = folder / "marks.parquet"
    with folder_beside(file) as aside:
        pq.write_table(pa.table(columns), aside / file.name, compression="zstd")
        settle(aside / file.name, file)
    bring(dataset, file, stage.name, unit="marks of a judge; gap: teacher's less student's")
    console.print(f"round {number}: {known:,} of {len(ids):,} pairs of answers have both marks", soft_wrap=True)
