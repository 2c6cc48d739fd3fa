"""What a run will take: tokens, bytes on disk, memory, hours, and money where an hour has a price.

Tokens are counted in the corpus (exactly up to SAMPLE documents, otherwise by their share of the characters). Everything else
is measured: the real command does a few thousand tokens of the same corpus in a process of its own, and students take three
steps on what it wrote. The reference scores what the probe wrote, and the first student is evaluated on it. Time to load is
counted once. Selection and the report, which take seconds, are not in it.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from kdata.config import parse_config
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.messages import as_json
from kdata.errors import ConfigError, KdataError, TeacherError
from kdata.format.files import temporary_folder
from kdata.format.keep_rules import described
from kdata.format.records import Reject
from kdata.jobs.job import Engine, run_job
from kdata.jobs.longest import characters
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.jobs.scoring import ScoreConfig, score
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.loader.batches import keeps_something
from kdata.loader.packing import best_fit
from kdata.observe.progress import Task
from kdata.pipelines.engine import LocalConfig, open_engine
from kdata.pipelines.ray.workers import RayConfig
from kdata.store.open import open_dataset
from kdata.teachers.config import TeacherConfig
from kdata.teachers.environment import set_environment
from kdata.teachers.model import as_folder
from kdata.teachers.sizing import Work, gib, model_size, plan_memory
from kdata.trainer.config import PrunedStudent, TrainConfig

SAMPLE = 2000  # documents that are encoded
STEPS = 3  # of a student; the first is not timed
WARM_DOCUMENTS = 2  # read before the clock starts: the first call of a teacher loads, checks and compiles


@dataclass(frozen=True)
class Stage:
    """What one piece of work takes; None: not known.

    tokens: in the dataset, or trained on. disk_bytes: of the dataset, or of the student and its checkpoint. memory_bytes: of
    the process at its peak. seconds: of the work. load_seconds: before it begins. note: how the probe differed from the run,
    for a person; None where it did as the run will.
    """

    name: str
    tokens: int
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    load_seconds: float = 0.0
    note: str | None = None

    @property
    def hours(self) -> float | None:
        """With loading."""
        return None if self.seconds is None else (self.seconds + self.load_seconds) / 3600


@dataclass(frozen=True)
class Memory:
    """The teacher's memory by its parts, in bytes; reason: why it does not fit, None where it does."""

    parts: dict[str, int]
    needed: int | None
    free: int | None
    reason: str | None


@dataclass(frozen=True)
class Counted:
    """What is in a corpus. tokens: of its sequences, estimated beyond SAMPLE documents. lengths: of some sequences."""

    documents: int
    tokens: int
    sample: list[tuple[Document, int]]
    lengths: list[int]


def memory_of(teacher: TeacherConfig, work: Work) -> Memory:
    """The teacher's memory as far as its files tell; see `plan_memory`."""
    teacher = as_folder(teacher)
    folder = Path(teacher.model)
    if teacher.backend == "vllm-server" or not (folder / "config.json").is_file():
        return Memory({}, None, None, None)
    size = model_size(folder, teacher)
    if size is None:
        return Memory({}, None, None, None)
    try:
        plan = plan_memory(teacher, size, work)
    except ConfigError as error:
        return Memory({"weights": size.weights}, None, None, str(error))
    return Memory(plan.parts, plan.needed, plan.free, None)


def count(job: CaptureJob | GenerateJob, corpus: Corpus, teacher: TeacherConfig) -> Counted:
    """Count the tokens of a job's inputs. Raises as reading the corpus does."""
    seen, documents, rng = 0, 0, random.Random(0)
    kept: list[Document] = []
    for document in corpus.documents():
        if isinstance(document, Reject):
            continue
        documents += 1
        seen += characters(document)
        if len(kept) < SAMPLE:
            kept.append(document)
        elif (place := rng.randrange(documents)) < SAMPLE:
            kept[place] = document
    lengths_of = job.lengths_of(teacher)
    sample = [(document, list(lengths_of(document))) for document in kept]
    lengths = [length for _, some in sample for length in some]
    own = sum(characters(document) for document in kept)
    tokens = sum(lengths)
    if documents > SAMPLE:
        tokens = round(tokens * seen / max(own, 1))
    rng.shuffle(sample)  # a corpus often has one domain after the other, and a probe reads the first of these
    return Counted(documents, tokens, [(document, sum(some)) for document, some in sample], lengths)


@dataclass(frozen=True)
class Begun:
    """A capture or generation that is estimated.

    documents: that the probe does. dataset: what it wrote, None where nothing was measured.
    """

    job: CaptureJob | GenerateJob
    counted: Counted
    documents: list[Document]
    dataset: Path | None = None

    @property
    def most_tokens(self) -> int:
        """In the dataset, where each prompt gets as long an answer as it may."""
        samples = self.job.config.num_samples if isinstance(self.job, GenerateJob) else 1
        return self.counted.tokens * samples + _most_written(self.job) * self.counted.documents


def estimate_jobs(
    jobs: dict[str, CaptureJob | GenerateJob], teacher: TeacherConfig, folder: Path, probe_tokens: int
) -> tuple[list[Stage], list[Begun]]:
    """Estimate captures and generations, one after the other with one teacher, by doing a little of each.

    Args:
        folder: where the probe may write.
        probe_tokens: tokens that the teacher reads or writes for each; 0: nothing is measured.
    Returns:
        What each takes, and what was done for it.
    Raises:
        KdataError: as the command itself would.
    """
    begun = {name: Begun(job, *_counted(job, teacher, probe_tokens)) for name, job in jobs.items()}
    if probe_tokens == 0:
        return [Stage(name, one.most_tokens) for name, one in begun.items()], list(begun.values())
    folder.mkdir()
    spec = {
        "kind": "teacher",
        "jobs": [_spec(one, folder / name) for name, one in begun.items()],
        "teacher": teacher.model_dump(),
        "longest": reduce(or_, [job.work(teacher) for job in jobs.values()]).longest,  # the engine of the run
    }
    took, memory = _in_process(spec, folder)
    begun = {name: replace(one, dataset=folder / name / "probe") for name, one in begun.items()}
    return [_stage(name, one, memory, took[name]) for name, one in begun.items()], list(begun.values())


def _counted(
    job: CaptureJob | GenerateJob, teacher: TeacherConfig, probe_tokens: int
) -> tuple[Counted, list[Document]]:
    """What is in a job's inputs, and documents with about `probe_tokens` tokens."""
    counted = count(job, corpus_of(job), teacher)
    documents: list[tuple[int, Document]] = []
    tokens = 0
    for document, size in counted.sample:
        if tokens >= probe_tokens and len(documents) > WARM_DOCUMENTS:
            break
        if size:  # what cannot be used says nothing
            documents.append((size, document))
            tokens += size + _most_written(job)
    documents.sort(key=lambda one: one[0])  # the warm ones are the shortest, so that the probe does much more than they
    return counted, [document for _, document in documents]


def _spec(begun: Begun, folder: Path) -> dict[str, Any]:
    """What the process of the probe does for one job, in `folder`."""
    folder.mkdir()
    config = begun.job.config
    field = "prompts" if isinstance(begun.job, GenerateJob) else "corpus"
    parts = {"warm": begun.documents[:WARM_DOCUMENTS], "probe": begun.documents}
    places = {part: _write(some, getattr(config, field), folder / f"{part}.jsonl") for part, some in parts.items()}
    settings = {part: {**config.model_dump(), field: place} for part, place in places.items()}
    return {"name": folder.name, "writes": isinstance(begun.job, GenerateJob), "root": str(folder), **settings}


def _stage(name: str, begun: Begun, memory: int, took: dict[str, float]) -> Stage:
    """What a job takes, from the probe of it. `warm_seconds` are of the first rows, with everything that happens once."""
    assert begun.dataset is not None
    warm, dataset = (open_dataset(begun.dataset.with_name(part)) for part in ("warm", "probe"))
    writes = isinstance(begun.job, GenerateJob)
    counted = begun.counted
    usable = sum(size > 0 for _, size in counted.sample) / max(
        len(counted.sample), 1
    )  # the probe leaves out the others
    factor = (
        counted.documents * usable / max(len(begun.documents), 1)
        if writes
        else counted.tokens / max(dataset.num_tokens, 1)
    )
    fixed, shards = _bytes_of(begun.dataset)
    rate = took["seconds"] / max(dataset.num_tokens, 1)
    return Stage(
        name,
        tokens=round(dataset.num_tokens * factor) if writes else counted.tokens,
        disk_bytes=round(fixed + shards * factor),
        memory_bytes=memory,
        seconds=took["seconds"] * factor,
        load_seconds=took["load_seconds"] + max(took["warm_seconds"] - rate * warm.num_tokens, 0.0),
    )


def _most_written(job: CaptureJob | GenerateJob) -> int:
    """Tokens that are written for one prompt at most."""
    return job.config.sampling.max_tokens * job.config.num_samples if isinstance(job, GenerateJob) else 0


def estimate_student(
    name: str, config: TrainConfig, dataset: Path, tokens: int, lengths: Sequence[int], folder: Path
) -> Stage:
    """Estimate the training of one student by its first steps on the rows in `dataset`. Raises as `train` does.

    Args:
        tokens, lengths: of the dataset that it will learn from, and of some sequences of it.
    """
    folder.mkdir()
    phases = config.resolved_phases()
    steps = sum(phase.steps for phase in phases)
    few = {"steps": STEPS, "warmup_steps": 0, "phases": [], "log_every_steps": 1, "loggers": [], "mixture": None}
    probe = config.model_copy(update={**few, "checkpoint_every_steps": 0})
    if not open_dataset(dataset).info.codec.keeps_some_positions:
        # The probe has no plan, so there is no target elsewhere, and training refuses to look for one.
        objective = config.objective.model_copy(update={"cross_entropy_elsewhere": None})
        probe = probe.model_copy(update={"objective": objective})
    spec = {
        "kind": "train",
        "config": probe.model_dump(mode="json"),
        "dataset": str(dataset),
        "root": str(folder / "out"),
    }
    took, memory = _in_process(spec, folder)
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    # The few rows of a probe fill its batches worse than those of the run do.
    seconds_per_token = (last["seconds"] - first["seconds"]) / max(last["tokens"] - first["tokens"], 1)
    trained = round(_tokens_of_a_step(config, tokens, lengths) * steps)
    disk = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    load_seconds = max(took["seconds"] - last["seconds"], 0.0)
    if isinstance(config.student, PrunedStudent):  # the run has more rows to choose its parts by than the probe
        rows, probe_rows = tokens * len(lengths) / max(sum(lengths), 1), open_dataset(dataset).num_rows
        wanted = config.student.importance_rows
        load_seconds += took["rows_seconds"] * (min(wanted, rows) / max(min(wanted, probe_rows), 1) - 1)
    return Stage(name, trained, disk, memory, seconds_per_token * trained, load_seconds)


def students_probe(dataset: Path, whole: Path) -> tuple[Path, str | None]:
    """The dataset on which the steps of students are timed, and a note where it is not the first one.

    Args:
        dataset: what the probe of the training data wrote. whole: of other text, with a distribution at every target.
    """
    opened = open_dataset(dataset)
    if not opened.info.codec.keeps_some_positions or keeps_something(opened).any():
        return dataset, None
    return whole, (
        f"none of the {opened.num_rows:,} rows that the probe read keeps a distribution "
        f"({described(opened.info.codec.parameters['positions'])}), so the students were timed on held-out text with all of "
        "them, which takes longer; raise --probe-tokens. A run whose rows all keep none is refused when training begins"
    )


def _tokens_of_a_step(config: TrainConfig, tokens: int, lengths: Sequence[int]) -> float:
    """Mean tokens of a batch, from how sequences of such lengths fill rows; the last batch of an epoch may be small."""
    context = config.context_tokens
    rows = len(best_fit(np.minimum(lengths, context), context)) * tokens / max(sum(lengths), 1)
    return tokens / max(math.ceil(rows / max(config.batch_tokens // context, 1)), 1)


def estimate_score(model: TeacherConfig, of_tokens: bool, tokens: int, dataset: Path, folder: Path) -> Stage:
    """Estimate what the reference takes for `tokens` tokens by scoring `dataset`. Raises as `score` does.

    Args:
        of_tokens: whether the score has a number for each token.
    """
    folder.mkdir()
    spec = {
        "kind": "score",
        "teacher": model.model_dump(),
        "of_tokens": of_tokens,
        "root": str(dataset),
        "warm": str(dataset.with_name("warm")),
    }
    took, memory = _in_process(spec, folder)
    parts = [open_dataset(root) for root in (dataset.with_name("warm"), dataset)]
    few, many = (sum(p.stat().st_size for p in (part.path / "scores").rglob("*") if p.is_file()) for part in parts)
    # A part of a score has a footer; only what is beyond it grows.
    of_token = max(many - few, 0) / max(parts[1].num_tokens - parts[0].num_tokens, 1)
    factor, disk = tokens / max(parts[1].num_tokens, 1), many + of_token * (tokens - parts[1].num_tokens)
    return Stage("score", tokens, round(disk), memory, took["seconds"] * factor, took["load_seconds"])


def estimate_evaluation(
    model: Path, heldout: Stage, num_prompts: int, sample_tokens: int, dataset: Path, folder: Path
) -> Stage:
    """Estimate what one student's evaluation takes by evaluating it on `dataset`. Raises as `evaluate` does.

    Args:
        model: a student of the same network, whatever it has learned.
        num_prompts: texts that a student continues by `sample_tokens` tokens each.
    """
    folder.mkdir()
    spec = {
        "kind": "evaluate", "model": str(model), "root": str(dataset), "warm": str(dataset.with_name("warm")),
        "sample_tokens": sample_tokens if num_prompts else 0,
    }  # fmt: skip
    took, memory = _in_process(spec, folder)
    factor = heldout.tokens / max(open_dataset(dataset).num_tokens, 1)
    seconds = took["seconds"] * factor + took["sample_seconds"] * num_prompts
    return Stage("evaluate", heldout.tokens, round(took["bytes"]), memory, seconds, took["load_seconds"])


def _write(documents: list[Document], config: CorpusConfig, path: Path) -> dict[str, Any]:
    """Write documents as a corpus of their own; its settings."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            row: dict[str, Any] = {"id": document.id, "domain": document.domain}
            if document.chat is None:
                row["text"] = document.text
            else:
                row |= {"messages": as_json(document.chat.messages), "tools": as_json(document.chat.tools or [])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    is_chat = config.messages_column is not None
    columns = {
        "text_column": None if is_chat else "text", "messages_column": "messages" if is_chat else None,
        "tools_column": "tools" if is_chat and config.tools_column else None, "id_column": "id", "domain_column": "domain",
    }  # fmt: skip
    rest = {"path": str(path), "split": None, "subset": None, "domains": None, "limit": None}
    return {**config.model_dump(), **columns, **rest}


def _bytes_of(root: Path) -> tuple[int, int]:
    """Bytes of a dataset that do not grow with its rows, and of those that do."""
    files = {path.relative_to(root): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    grows = sum(size for path, size in files.items() if path.parts[0] in ("data", "index", "rejects", "manifest.jsonl"))
    return sum(files.values()) - grows, grows


def _in_process(spec: dict[str, Any], folder: Path) -> tuple[dict[str, Any], int]:
    """Do what `spec` says in a process of its own; what it took, and its memory in bytes at the peak.

    Raises TeacherError where it failed.
    """
    (folder / "spec.json").write_text(json.dumps(spec))
    result = folder / "result.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "kdata.pipelines.estimate", str(folder / "spec.json"), str(result)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    took: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    if not took or "error" in took:
        reason = took.get("error") or said.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise TeacherError(f"the probe of {spec['kind']} failed: {reason}")
    return took, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _probe(spec: dict[str, Any]) -> dict[str, Any]:
    """The work of the process: load, begin, and do the timed part."""
    begun = time.perf_counter()
    if spec["kind"] == "train":
        from kdata.trainer.train import train

        settings = parse_config(TrainConfig, spec["config"], "train settings")
        train(settings, spec["dataset"], None, Path(spec["root"]))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "load_seconds": 0.0, "rows_seconds": _rows_seconds(settings, spec)}
    if spec["kind"] == "evaluate":
        return _probe_evaluation(spec)
    teacher = parse_config(TeacherConfig, spec["teacher"], "teacher settings")
    if spec["kind"] == "score":
        config = ScoreConfig(model=teacher, name="probe", tokens=spec["of_tokens"])
        return _beyond_warm(spec, lambda root: score(open_dataset(root), config))
    return _probe_teacher(spec, teacher, begun)


def _rows_seconds(config: TrainConfig, spec: dict[str, Any]) -> float:
    """Seconds of the pass over all rows of the probe that a pruned student begins with; of others 0."""
    if not isinstance(config.student, PrunedStudent):
        return 0.0
    from kdata.trainer.distributed import join
    from kdata.trainer.importance import IMPORTANCE_FILE
    from kdata.trainer.student import build_student, importance_in

    dataset, took = open_dataset(spec["dataset"]), []
    # Not the file of the training: its rows may be others, and the pass would then be in both times.
    scores = Path(spec["root"]) / f"again-{IMPORTANCE_FILE}"
    with join(config.device) as ranks:
        for file in (None, scores):  # without the scores at hand, and with them
            begun = time.perf_counter()
            student = build_student(config.student, dataset, config.seed, ranks=ranks, importance=file)
            took.append(time.perf_counter() - begun)
            if file is None and (chosen := importance_in(student)) is not None:
                scores.write_bytes(chosen.to_bytes())
    return max(took[0] - took[1], 0.0)


def _probe_teacher(spec: dict[str, Any], teacher: TeacherConfig, begun: float) -> dict[str, Any]:
    """Do a little of each job with one teacher, as a run does. Loading counts for the first."""
    jobs = {one["name"]: (one, [_job(one, part) for part in ("warm", "probe")]) for one in spec["jobs"]}
    work = Work(spec["longest"], any(one["writes"] for one, _ in jobs.values()))
    max_k = max(job.keep.k for _, parts in jobs.values() for job in parts)
    took: dict[str, Any] = {}
    with open_engine(LocalConfig(), teacher, max_k=max_k, work=work) as engine:
        load_seconds = time.perf_counter() - begun
        for name, (one, parts) in jobs.items():
            times = [time.perf_counter()]
            for part, job in zip(("warm", "probe"), parts, strict=True):
                _run(Path(one["root"]) / part, job, engine)
                times.append(time.perf_counter())
            took[name] = {
                "load_seconds": load_seconds, "warm_seconds": times[1] - times[0], "seconds": times[2] - times[1],
            }  # fmt: skip
            load_seconds = 0.0
    return took


def _run(root: Path, job: CaptureJob | GenerateJob, engine: Engine) -> None:
    # Two calls, because each kind of job has units of its own type.
    if isinstance(job, GenerateJob):
        run_job(root, job, engine)
    else:
        run_job(root, job, engine)


def _job(one: dict[str, Any], part: str) -> CaptureJob | GenerateJob:
    if one["writes"]:
        config = parse_config(GenerateConfig, one[part], "generate settings")
        return GenerateJob(config, Corpus(config.prompts))
    reading = parse_config(CaptureConfig, one[part], "capture settings")
    return CaptureJob(reading, Corpus(reading.corpus))


def _beyond_warm(spec: dict[str, Any], work: Callable[[Path], object]) -> dict[str, float]:
    """Do work that loads a model on a few rows, then on the probe's: the difference grows with rows, the rest is loading."""
    begun = time.perf_counter()
    work(Path(spec["warm"]))
    ready = time.perf_counter()
    work(Path(spec["root"]))
    seconds = time.perf_counter() - ready
    few, many = (open_dataset(spec[part]).num_tokens for part in ("warm", "root"))
    rate = max(seconds - (ready - begun), 0.0) / max(many - few, 1) if many > few else 0.0
    return {"seconds": rate * many, "load_seconds": max(ready - begun - rate * few, 0.0)}


def _probe_evaluation(spec: dict[str, Any]) -> dict[str, float]:
    """Evaluate a student without and with one text to write."""
    from kdata.trainer.evaluate import EvaluateConfig, evaluate

    model, size = Path(spec["model"]), 0

    def measure(root: Path) -> None:
        nonlocal size
        size = len(json.dumps(evaluate(model, root)))

    took = _beyond_warm(spec, measure)
    sample_seconds = 0.0
    if spec["sample_tokens"]:
        config = EvaluateConfig(sample_tokens=spec["sample_tokens"])
        begun = time.perf_counter()
        evaluate(model, spec["warm"])
        ready = time.perf_counter()
        evaluate(model, spec["warm"], prompts=[{"domain": "", "prompt": "The first line of"}], config=config)
        sample_seconds = max(time.perf_counter() - ready - (ready - begun), 0.0)
    return {**took, "sample_seconds": sample_seconds, "bytes": size}


def as_json_object(stages: list[Stage], memory: Memory, price_per_hour: float | None) -> dict[str, Any]:
    """The estimate as `--format json` prints it."""
    rows = [{**asdict(stage), "hours": stage.hours, "cost": cost(stage.hours, price_per_hour)} for stage in stages]
    whole = total(stages)
    return {
        "stages": rows,
        "total": {**asdict(whole), "hours": whole.hours, "cost": cost(whole.hours, price_per_hour)},
        "teacher_memory": asdict(memory),
        "price_per_hour": price_per_hour,
    }


def total(stages: list[Stage]) -> Stage:
    """All stages one after the other: sums, and the largest memory; None where a part is not known."""

    def of(values: list[Any], add: Callable[[list[Any]], Any]) -> Any:
        return None if None in values else add(values)

    return Stage(
        "total",
        sum(stage.tokens for stage in stages),
        of([stage.disk_bytes for stage in stages], sum),
        of([stage.memory_bytes for stage in stages], max),
        of([stage.seconds for stage in stages], sum),
        sum(stage.load_seconds for stage in stages),
    )


def cost(hours: float | None, price_per_hour: float | None) -> float | None:
    """Money in the unit of the price; None where one of both is not known."""
    return None if hours is None or price_per_hour is None else hours * price_per_hour


def _memory(teacher: TeacherConfig, jobs: Sequence[CaptureJob | GenerateJob]) -> Memory:
    """The teacher's memory for these jobs. Where not even the least work fits, the longest text is not looked up."""
    least = memory_of(teacher, Work(1))
    return least if least.reason else memory_of(teacher, reduce(or_, [job.work(teacher) for job in jobs]))


def corpus_of(job: CaptureJob | GenerateJob) -> Corpus:
    """What the job reads."""
    return Corpus(job.config.prompts if isinstance(job, GenerateJob) else job.config.corpus)


def estimate_capture(
    job: CaptureJob | GenerateJob, teacher: TeacherConfig, probe_tokens: int
) -> tuple[list[Stage], Memory]:
    """Estimate one capture or generation."""
    memory = _memory(teacher, [job])
    with temporary_folder("estimate") as folder:
        tokens = 0 if memory.reason else probe_tokens
        with Task("estimate", 1, "probes") as task:
            stages, _ = estimate_jobs({job.name: job}, teacher, folder / "teacher", tokens)
            task.advance(1)
    return stages, memory


def estimate_recipe(recipe: Any, probe_tokens: int) -> tuple[list[Stage], Memory]:
    """Estimate the stages of a recipe that take long: generate, capture, heldout, score, each student, evaluate.

    Raises ConfigError where the recipe names a cluster.
    """
    from kdata.pipelines.run import Run

    refuse_cluster(recipe.engine)
    with temporary_folder("estimate") as folder:
        run = Run(recipe, folder, {})
        jobs: dict[str, Any] = {"generate": run.generate_job(), "capture": run.capture_job("capture")}
        jobs = {stage_name: job for stage_name, job in jobs.items() if job is not None}
        teacher, heldout = run.teacher_config, run.capture_job("heldout")
        memory = _memory(teacher, [*jobs.values(), heldout])
        probe_tokens = 0 if memory.reason else probe_tokens
        models = run.uses_score + len(recipe.students) + 1 if probe_tokens else 0
        with Task("estimate", 1 + models, "probes") as task:
            # Where the rest keeps some positions only, the held-out text is measured too, because it keeps every one.
            probed = jobs if recipe.keep.positions is None else {**jobs, "heldout": heldout}
            stages, begun = estimate_jobs(probed, teacher, folder / "teacher", probe_tokens)
            task.advance(1)
            # They write one dataset: what does not grow with its rows is there once.
            dataset, measured_on = begun[len(jobs) - 1].dataset, begun[-1].dataset
            fixed = 0 if dataset is None else _bytes_of(dataset)[0]
            own_stages, other = stages[: len(jobs)], stages[len(jobs) :]
            stages = [own_stages[0], *(_more_bytes(stage, -fixed) for stage in own_stages[1:]), *other]
            if not other:
                stages.append(_like(stages[-1], "heldout", heldout, teacher, fixed if len(jobs) == 1 else 0, fixed))
            if dataset is None or measured_on is None:
                return stages, memory
            read, tokens = stages[-1], sum(stage.tokens for stage in stages[:-1])
            lengths = begun[len(jobs) - 1].counted.lengths
            if run.uses_score:
                stages.append(
                    estimate_score(run.reference_config, run.scores_tokens, tokens, dataset, folder / "score")
                )
                task.advance(1)
            learned, note = students_probe(dataset, measured_on)
            for student, settings in recipe.students.items():
                config, own = run.train_config(settings), folder / f"train-{student}"
                one = estimate_student(f"train {student}", config, learned, tokens, lengths, own)
                stages.append(replace(one, note=note))
                task.advance(1)
            if recipe.rounds is not None:
                stages.append(_rounds_like(run, stages[-len(recipe.students) :]))
            model = folder / f"train-{next(iter(recipe.students))}" / "out" / "model"
            stage, number = recipe.evaluate, len(recipe.students)
            prompts = _num_prompts(heldout, stage.samples)
            one = estimate_evaluation(model, read, prompts, stage.sample_tokens, measured_on, folder / "evaluate")
            task.advance(1)
        assert one.seconds is not None and one.disk_bytes is not None  # it was measured
        stages.append(replace(
            one, tokens=one.tokens * number, disk_bytes=one.disk_bytes * number, seconds=one.seconds * number,
            load_seconds=one.load_seconds * number,
        ))  # fmt: skip
        return stages, memory


def _num_prompts(heldout: CaptureJob, samples: int) -> int:
    """Texts that each student continues: as many of every domain, long ones only (`heldout_prompts` chooses them)."""
    per_domain: dict[str, int] = {}
    for document in corpus_of(heldout).documents():
        if not isinstance(document, Reject) and characters(document) > 160:
            per_domain[document.domain] = per_domain.get(document.domain, 0) + 1
    return sum(min(number, samples) for number in per_domain.values())


def _rounds_like(run: Any, trained: list[Stage]) -> Stage:
    """Training of all rounds; what they score, judge and write in between is not tried."""
    rounds, names = run.recipe.rounds_of(), list(run.recipe.students)
    one, count = trained[names.index(rounds.student_of(names))], rounds.count
    return replace(
        one,
        name="train rounds",
        tokens=one.tokens * count,
        disk_bytes=None if one.disk_bytes is None else one.disk_bytes * count,
        seconds=None if one.seconds is None else one.seconds * count,
        load_seconds=None if one.load_seconds is None else one.load_seconds * count,
        note=f"{count} rounds, if none ends them early; what rounds score, judge and request is not in this",
    )


def _more_bytes(stage: Stage, size: int) -> Stage:
    return stage if stage.disk_bytes is None else replace(stage, disk_bytes=stage.disk_bytes + size)


def _like(
    stage: Stage, name: str, job: CaptureJob, teacher: TeacherConfig, counted_bytes: int, fixed_bytes: int
) -> Stage:
    """A capture of another corpus into a dataset of its own, at the rate of `stage`; the teacher is loaded already.

    Args:
        counted_bytes: in `stage.disk_bytes`, of what does not grow with rows. fixed_bytes: such bytes of the new dataset.
    """
    tokens = count(job, corpus_of(job), teacher).tokens
    share = tokens / max(stage.tokens, 1)
    grown = None if stage.disk_bytes is None else round((stage.disk_bytes - counted_bytes) * share) + fixed_bytes
    return replace(
        stage,
        name=name,
        tokens=tokens,
        disk_bytes=grown,
        seconds=None if stage.seconds is None else stage.seconds * share,
        load_seconds=0.0,
    )


def refuse_cluster(engine: LocalConfig | RayConfig) -> None:
    """Raise ConfigError for an engine on other machines: a probe would say nothing about them."""
    if isinstance(engine, RayConfig):
        raise ConfigError(
            "estimate measures on this machine; leave --engine ray away, and divide the hours by the teachers"
        )


def lines_of(memory: Memory) -> Iterator[str]:
    """The teacher's memory, in words."""
    if memory.reason is not None:
        yield memory.reason
    elif memory.needed is not None and memory.free is not None:
        parts = ", ".join(f"{name} {gib(value)}" for name, value in memory.parts.items())
        yield f"memory of the teacher: {parts}; at least {gib(memory.needed)} at a time, {gib(memory.free)} are free"


def main() -> None:
    """The process of a probe."""
    set_environment()
    spec, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    try:
        took: dict[str, Any] = _probe(spec)
    except KdataError as error:
        took = {"error": str(error)}
    result.write_text(json.dumps(took))


if __name__ == "__main__":
    main()
