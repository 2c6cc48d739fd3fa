"""What a run will take: tokens, bytes on disk, memory, hours, and money where an hour has a price.

Tokens are counted in the corpus (exactly up to SAMPLE documents, otherwise by their share of the characters). Everything else
is measured: the real command does a few thousand tokens of the same corpus in a process of its own, and students take three
steps on what it wrote. The reference scores what the probe wrote, and the first student is evaluated on it. Time to load is
counted once. Selection and the report, which take seconds, are not in it.
"""

from __future__ import annotations

import json
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

from kdata.config import parse_config
from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.messages import as_json
from kdata.errors import ConfigError, KdataError, TeacherError
from kdata.format.files import temporary_folder
from kdata.format.records import Reject
from kdata.jobs.job import run_job
from kdata.jobs.longest import characters
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.jobs.scoring import ScoreConfig, score
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.pipelines.engine import LocalConfig, open_engine
from kdata.pipelines.ray.workers import RayConfig
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.teachers.config import TeacherConfig
from kdata.teachers.environment import set_environment
from kdata.teachers.model import as_folder
from kdata.teachers.sizing import Work, gib, model_size, plan_memory
from kdata.trainer.config import TrainConfig

SAMPLE = 2000  # documents that are encoded
STEPS = 3  # of a student; the first is not timed
WARM_DOCUMENTS = 2  # read before the clock starts: the first call of a teacher loads, checks and compiles


@dataclass(frozen=True)
class Stage:
    """What one piece of work takes; None: not known.

    tokens: in the dataset, or trained on. disk_bytes: of the dataset, or of the student and its checkpoint. memory_bytes: of
    the process at its peak. seconds: of the work. load_seconds: before it begins.
    """

    name: str
    tokens: int
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    load_seconds: float = 0.0

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
    """What is in a corpus. tokens: of its sequences, estimated beyond SAMPLE documents."""

    documents: int
    tokens: int
    sample: list[tuple[Document, int]]


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
    sample = [(document, lengths_of(document)) for document in kept]
    own = sum(characters(document) for document in kept)
    tokens = sum(sum(lengths) for _, lengths in sample)
    if documents > SAMPLE:
        tokens = round(tokens * seen / max(own, 1))
        rng.shuffle(sample)
    return Counted(documents, tokens, [(document, sum(lengths)) for document, lengths in sample])


def estimate_job(
    name: str, job: CaptureJob | GenerateJob, corpus: Corpus, teacher: TeacherConfig, folder: Path, probe_tokens: int
) -> tuple[Stage, Path | None]:
    """Estimate a capture or a generation by doing a little of it.

    Args:
        folder: where the probe may write.
        probe_tokens: tokens that the teacher reads or writes for it; 0: nothing is measured.
    Returns:
        What it takes, and the dataset that the probe wrote.
    Raises:
        KdataError: as the command itself would.
    """
    counted = count(job, corpus, teacher)
    writes = isinstance(job, GenerateJob)
    if probe_tokens == 0:
        return Stage(name, counted.tokens + (_most_written(job) * counted.documents if writes else 0)), None
    documents, tokens = [], 0
    for document, size in counted.sample:
        if tokens >= probe_tokens:
            break
        documents.append(document)
        tokens += size + _most_written(job)
    folder.mkdir()
    root = folder / "probe"
    config = job.config
    field = "prompts" if writes else "corpus"
    places = {part: _write(some, getattr(config, field), folder / f"{part}.jsonl")
              for part, some in (("warm", documents[:WARM_DOCUMENTS]), ("probe", documents))}  # fmt: skip
    spec = {
        "kind": "generate" if writes else "capture",
        "warm": {**config.model_dump(), field: places["warm"]},
        "probe": {**config.model_dump(), field: places["probe"]},
        "teacher": teacher.model_dump(),
        "longest": job.work(teacher).longest,  # the engine of the run, not one that just holds the sample
        "root": str(root),
    }
    took, memory = _in_process(spec, folder)
    dataset = open_dataset(root)
    factor = counted.documents / len(documents) if writes else counted.tokens / max(dataset.num_tokens, 1)
    fixed, shards = _bytes_of(root)
    stage = Stage(
        name,
        tokens=round(dataset.num_tokens * factor) if writes else counted.tokens,
        disk_bytes=round(fixed + shards * factor),
        memory_bytes=memory,
        seconds=took["seconds"] * factor,
        load_seconds=took["load_seconds"],
    )
    return stage, root


def _most_written(job: CaptureJob | GenerateJob) -> int:
    """Tokens that are written for one prompt at most."""
    return job.config.sampling.max_tokens * job.config.num_samples if isinstance(job, GenerateJob) else 0


def estimate_student(name: str, config: TrainConfig, dataset: Path, folder: Path) -> Stage:
    """Estimate the training of one student by its first steps on the rows in `dataset`. Raises as `train` does."""
    folder.mkdir()
    phases = config.resolved_phases()
    steps = sum(phase.steps for phase in phases)
    few = {"steps": STEPS, "warmup_steps": 0, "phases": [], "log_every_steps": 1, "loggers": [], "mixture": None}
    probe = config.model_copy(update={**few, "checkpoint_every_steps": 0})
    spec = {
        "kind": "train",
        "config": probe.model_dump(mode="json"),
        "dataset": str(dataset),
        "root": str(folder / "out"),
    }
    took, memory = _in_process(spec, folder)
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    seconds = (last["seconds"] - first["seconds"]) / max(last["step"] - first["step"], 1) * steps
    tokens = round(last["tokens"] / last["step"] * steps)
    disk = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    return Stage(name, tokens, disk, memory, seconds, max(took["seconds"] - last["seconds"], 0.0))


def estimate_score(model: TeacherConfig, tokens: int, dataset: Path, folder: Path) -> Stage:
    """Estimate what the reference takes for `tokens` tokens by scoring `dataset`. Raises as `score` does."""
    folder.mkdir()
    spec = {
        "kind": "score",
        "teacher": model.model_dump(),
        "root": str(dataset),
        "warm": str(dataset.with_name("warm")),
    }
    took, memory = _in_process(spec, folder)
    parts = [open_dataset(root) for root in (dataset.with_name("warm"), dataset)]
    few, many = (sum(p.stat().st_size for p in (part.path / "scores").rglob("*") if p.is_file()) for part in parts)
    # A part of a score has a footer; only what is beyond it grows.
    of_token = max(many - few, 0) / max(parts[1].num_tokens - parts[0].num_tokens, 1)
    factor, disk = tokens / parts[1].num_tokens, many + of_token * (tokens - parts[1].num_tokens)
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
    factor = heldout.tokens / open_dataset(dataset).num_tokens
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


def _in_process(spec: dict[str, Any], folder: Path) -> tuple[dict[str, float], int]:
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
    if "seconds" not in took:
        reason = took.get("error") or said.strip().rpartition("\n")[2] or f"exit status {process.returncode}"
        raise TeacherError(f"the probe of {spec['kind']} failed: {reason}")
    return took, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _probe(spec: dict[str, Any]) -> dict[str, float]:
    """The work of the process: load, begin, and do the timed part."""
    begun = time.perf_counter()
    if spec["kind"] == "train":
        from kdata.trainer.train import train

        train(parse_config(TrainConfig, spec["config"], "train settings"), spec["dataset"], None, Path(spec["root"]))
        return {"seconds": time.perf_counter() - begun, "load_seconds": 0.0}
    if spec["kind"] == "evaluate":
        return _probe_evaluation(spec)
    teacher = parse_config(TeacherConfig, spec["teacher"], "teacher settings")
    if spec["kind"] == "score":
        return _beyond_warm(spec, lambda root: score(open_dataset(root), ScoreConfig(model=teacher, name="probe")))
    writes = spec["kind"] == "generate"

    def run(part: str, root: Path) -> Dataset:
        if writes:
            config = parse_config(GenerateConfig, spec[part], "generate settings")
            return run_job(root, GenerateJob(config, Corpus(config.prompts)), engine)
        reading = parse_config(CaptureConfig, spec[part], "capture settings")
        return run_job(root, CaptureJob(reading, Corpus(reading.corpus)), engine)

    work = Work(spec["longest"], writes)
    with open_engine(LocalConfig(), teacher, max_k=spec["probe"]["k"], work=work) as engine:
        run("warm", Path(spec["root"]).with_name("warm"))
        ready = time.perf_counter()
        run("probe", Path(spec["root"]))
        done = time.perf_counter()
    return {"seconds": done - ready, "load_seconds": ready - begun}


def _beyond_warm(spec: dict[str, Any], work: Callable[[Path], object]) -> dict[str, float]:
    """Do work that loads a model on a few rows, then on the probe's: the difference grows with rows, the rest is loading."""
    begun = time.perf_counter()
    work(Path(spec["warm"]))
    ready = time.perf_counter()
    work(Path(spec["root"]))
    seconds = time.perf_counter() - ready
    few, many = (open_dataset(spec[part]).num_tokens for part in ("warm", "root"))
    rate = max(seconds - (ready - begun), 0.0) / max(many - few, 1) if many > few else 0.0
    return {"seconds": rate * many, "load_seconds": ready - begun - rate * few}


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
        stage, _ = estimate_job(job.name, job, corpus_of(job), teacher, folder / job.name, tokens)
    return [stage], memory


def estimate_recipe(recipe: Any, probe_tokens: int) -> tuple[list[Stage], Memory]:
    """Estimate the stages of a recipe that take long: generate, capture, heldout, score, each student, evaluate.

    Raises ConfigError where the recipe names a cluster.
    """
    from kdata.pipelines.runner import Run

    refuse_cluster(recipe.engine)
    with temporary_folder("estimate") as folder:
        run = Run(recipe, folder, {})
        jobs: dict[str, Any] = {"generate": run.generate_job(), "capture": run.capture_job("capture")}
        teacher, heldout = run.teacher_config, run.capture_job("heldout")
        memory = _memory(teacher, [job for job in (*jobs.values(), heldout) if job is not None])
        stages: list[Stage] = []
        dataset: Path | None = None
        for stage_name, job in jobs.items():
            if job is not None:
                tokens = 0 if memory.reason else probe_tokens
                stage, dataset = estimate_job(stage_name, job, corpus_of(job), teacher, folder / stage_name, tokens)
                # A run loads the teacher once.
                stages.append(replace(stage, load_seconds=0.0) if stages else stage)
        measured_on = dataset  # what a student is evaluated on
        if recipe.keep.positions is None or memory.reason:
            stages.append(_like(stages[-1], "heldout", heldout, teacher))
        else:  # of the held-out text every position is kept
            of_heldout = (corpus_of(heldout), teacher, folder / "heldout", probe_tokens)
            stage, measured_on = estimate_job("heldout", heldout, *of_heldout)
            stages.append(replace(stage, load_seconds=0.0))
        if dataset is None or measured_on is None:
            return stages, memory
        read = stages[-1]
        if run.uses_score:
            tokens = sum(stage.tokens for stage in stages if stage.name in jobs)
            stages.append(estimate_score(run.reference_config, tokens, dataset, folder / "score"))
        for student, settings in recipe.students.items():
            config = run.train_config(settings)
            stages.append(estimate_student(f"train {student}", config, dataset, folder / f"train-{student}"))
        model = folder / f"train-{next(iter(recipe.students))}" / "out" / "model"
        last, number = recipe.evaluate, len(recipe.students)
        prompts = _num_prompts(heldout, last.samples)
        one = estimate_evaluation(model, read, prompts, last.sample_tokens, measured_on, folder / "evaluate")
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


def _like(stage: Stage, name: str, job: CaptureJob, teacher: TeacherConfig) -> Stage:
    """A capture of another corpus at the rate of `stage`; the teacher is loaded already."""
    tokens = count(job, corpus_of(job), teacher).tokens
    share = tokens / max(stage.tokens, 1)
    return replace(
        stage,
        name=name,
        tokens=tokens,
        disk_bytes=None if stage.disk_bytes is None else round(stage.disk_bytes * share),
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
