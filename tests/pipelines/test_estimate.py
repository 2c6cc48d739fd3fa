"""What `kdata estimate` says is what then happens: tokens exactly, bytes and memory within a fifth."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdata
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import ConfigError
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.pipelines import estimate
from kdata.pipelines.cli.main import call
from kdata.pipelines.recipe import Recipe, load_recipe
from kdata.pipelines.run import Run
from kdata.teachers.config import TeacherConfig
from kdata.teachers.sizing import Work
from kdata.trainer.config import CheckpointStudent, PrunedStudent, TrainConfig
from tests.fakes import LINES, write_jsonl


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 short texts in two domains: 30,000 tokens, of which the estimate reads a third."""
    rng, words = random.Random(1), " ".join(LINES).split()
    rows = [
        {"id": f"d{n}", "domain": "ab"[n % 2], "text": " ".join(rng.choice(words) for _ in range(rng.randrange(5, 40)))}
        for n in range(500)
    ]
    return write_jsonl(tmp_path_factory.mktemp("texts") / "c.jsonl", rows)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert call(["estimate", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def peak(*arguments: str) -> int:
    """Peak memory of a command in bytes; it must succeed."""
    code = "from kdata.pipelines.cli.main import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bytes_of(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def test_a_capture_takes_what_was_said(
    llama_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), "--corpus", str(texts), "--backend", "transformers"]
    answer = said(capsys, "capture", *arguments, "--probe-tokens", "10000", "--price-per-hour", "2")
    assert not (tmp_path / "d").exists(), "nothing is kept"
    [stage] = answer["stages"]
    memory = peak("capture", *arguments)
    dataset = kdata.open(tmp_path / "d")
    assert stage["tokens"] == dataset.num_tokens > 20_000
    assert stage["disk_bytes"] == pytest.approx(bytes_of(tmp_path / "d"), rel=0.2)
    assert stage["memory_bytes"] == pytest.approx(memory, rel=0.2)
    assert stage["hours"] > 0 and stage["cost"] == pytest.approx(2 * stage["hours"])
    assert answer["teacher_memory"]["reason"] is None and answer["teacher_memory"]["parts"]["weights"] > 0


@pytest.mark.slow
def test_a_generation_and_a_student_take_what_was_said(
    llama_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"path": str(texts), "limit": 60}
    recipe = {
        "name": "small",
        "teacher": {"model": str(llama_dir), "backend": "transformers"},
        "generate": {"prompts": {**source, "text_column": "text"}, "sampling": {"max_tokens": 8}},
        "corpus": source,
        "heldout": {**source, "limit": 10},
        "reference": {"model": str(llama_dir)},
        "select": {"method": "difference"},
        "students": {
            "plain": {"label": "plain", "objective": {"weights": {"cross_entropy": 1.0}}},
            "chosen": {"label": "chosen", "plan": True, "objective": {"weights": {"forward_kl": 1.0}}},
        },
        "train": {"steps": 6, "warmup_steps": 1, "batch_tokens": 512, "context_tokens": 128},
        "capture": {"max_tokens": 100},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = said(capsys, str(tmp_path / "recipe.yaml"), "--probe-tokens", "1000")
    stages = {stage["name"]: stage for stage in answer["stages"]}
    assert list(stages) == ["generate", "capture", "heldout", "score", "train chosen", "train plain", "evaluate"]
    memory = peak("run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    run = tmp_path / "run"
    index = kdata.open(run / "dataset").sql("select source, sum(num_tokens) as n from rows group by 1").to_pylist()
    tokens = {row["source"]: row["n"] for row in index}
    assert stages["capture"]["tokens"] == tokens["capture"]
    assert stages["generate"]["tokens"] == pytest.approx(float(tokens["generate"]), rel=0.2)
    assert stages["heldout"]["tokens"] == kdata.open(run / "heldout").num_tokens
    trained = json.loads((run / "students/plain/train.json").read_text())
    assert stages["train plain"]["tokens"] == pytest.approx(trained["tokens"], rel=0.2)
    assert stages["score"]["tokens"] == pytest.approx(float(sum(tokens.values())), rel=0.2)
    assert stages["score"]["disk_bytes"] == pytest.approx(bytes_of(run / "dataset/scores"), rel=0.2)
    assert stages["evaluate"]["tokens"] == 2 * stages["heldout"]["tokens"]
    assert all(stages[name]["load_seconds"] > 0 and stages[name]["memory_bytes"] for name in ("score", "evaluate"))
    disk = stages["train plain"]["disk_bytes"]
    assert disk == pytest.approx(bytes_of(run / "students/plain"), rel=0.2)
    assert answer["total"]["memory_bytes"] == pytest.approx(memory, rel=0.2)
    assert answer["total"]["tokens"] == sum(stage["tokens"] for stage in stages.values())
    assert answer["total"]["cost"] is None and answer["total"]["hours"] > 0


@pytest.mark.slow
def test_students_are_timed_where_the_probe_keeps_nothing(
    llama_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"path": str(texts), "limit": 40}
    recipe = {
        "name": "none",
        "teacher": {"model": str(llama_dir), "backend": "transformers"},
        "generate": None,
        "corpus": source,
        "heldout": {**source, "limit": 5},
        "keep": {"positions": {"rule": "span", "begin": "<think>", "end": "</think>"}},
        "students": {"plain": {"label": "plain", "objective": {"weights": {"forward_kl": 1.0}}}},
        "train": {"steps": 6, "warmup_steps": 1, "batch_tokens": 512, "context_tokens": 128},
        "capture": {"max_tokens": 100},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    answer = said(capsys, str(tmp_path / "recipe.yaml"), "--probe-tokens", "300")
    stages = {stage["name"]: stage for stage in answer["stages"]}
    assert stages["train plain"]["hours"] > 0
    assert "rows that the probe read keeps a distribution (targets in the text" in stages["train plain"]["note"]
    assert stages["capture"]["note"] is None


def test_a_probe_reads_every_part_of_a_corpus(llama_dir: Path, tmp_path: Path) -> None:
    """Domains that follow each other in the file: the first few hundred tokens would be of the first one."""
    rows = [{"id": f"d{n}", "domain": "a" if n < 150 else "b", "text": LINES[n % len(LINES)]} for n in range(300)]
    corpus = CorpusConfig(path=str(write_jsonl(tmp_path / "c.jsonl", rows)))
    job = CaptureJob(CaptureConfig(corpus=corpus), Corpus(corpus))
    _, documents = estimate._counted(job, TeacherConfig(model=str(llama_dir), backend="transformers"), 600)
    assert len(documents) < 150 and {document.domain for document in documents} == {"a", "b"}


def test_without_a_probe_tokens_and_the_teacher_s_memory_are_known(
    llama_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), "--corpus", str(texts), "--backend", "transformers"]
    [stage] = said(capsys, "capture", *arguments, "--probe-tokens", "0", "--price-per-hour", "2")["stages"]
    assert stage["tokens"] > 20_000 and stage["disk_bytes"] is stage["hours"] is stage["cost"] is None
    assert call(["estimate", "capture", *arguments, "--probe-tokens", "0"]) == 0
    shown = capsys.readouterr().out
    assert "memory of the teacher: weights" in shown and "GiB are free" in shown and "—" in shown


@pytest.mark.parametrize(
    ("what", "source"), [("capture", ("--corpus",)), ("generate", ("--text-column", "text", "--prompts"))]
)
def test_what_is_kept_is_as_the_command_says(
    llama_dir: Path, texts: Path, tmp_path: Path, what: str, source: tuple[str, ...]
) -> None:
    from kdata.pipelines.cli.estimate import _job

    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), *source, str(texts), "--backend", "transformers"]
    job, _ = _job(what, [*arguments, "--kind", "threshold", "--threshold", "0.05"])
    assert (job.keep.kind, job.keep.threshold) == ("threshold", 0.05)


def test_more_texts_than_are_encoded_are_estimated(
    texts: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), "--corpus", str(texts), "--backend", "transformers"]
    whole = said(capsys, "capture", *arguments, "--probe-tokens", "0")["total"]["tokens"]
    monkeypatch.setattr(estimate, "SAMPLE", 50)
    part = said(capsys, "capture", *arguments, "--probe-tokens", "0")["total"]["tokens"]
    assert part != whole and part == pytest.approx(whole, rel=0.1)


def test_what_does_not_fit_is_said_and_not_tried(
    llama_dir: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdata.teachers import sizing

    monkeypatch.setattr(sizing, "free_memory", lambda: (1 << 20, 1 << 20))
    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), "--corpus", str(texts), "--backend", "transformers"]
    answer = said(capsys, "capture", *arguments)
    assert "does not fit: weights" in answer["teacher_memory"]["reason"]
    assert answer["total"]["tokens"] > 20_000 and answer["total"]["hours"] is None


def test_a_probe_that_fails_is_one_error(
    llama_dir: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path / "d"), "--teacher", str(llama_dir), "--corpus", str(texts), "--backend", "transformers"]
    assert call(["estimate", "capture", *arguments, "--set", "append_eos=true", "--max-tokens", "2"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "max_tokens=2 leaves no room" in lines[0]
    assert call(["estimate", "capture", *arguments, "--no-such-option"]) == 2
    assert "--no-such-option" in capsys.readouterr().err
    assert call(["estimate", "capture", *arguments, "--engine", "ray"]) == 2
    assert "estimate measures on this machine" in capsys.readouterr().err


def test_the_memory_of_a_model_that_is_not_here() -> None:
    about = estimate.memory_of(TeacherConfig(model="OWNER/NAME"), Work(100))
    assert about.needed is None and about.reason is None and list(estimate.lines_of(about)) == []


def test_a_student_of_the_teacher_s_layers_and_its_reference_are_found(llama_dir: Path, tmp_path: Path) -> None:
    teacher = {"model": str(llama_dir), "backend": "transformers"}
    recipe = Recipe.model_validate(
        {
            "name": "layers",
            "teacher": teacher,
            "reference": {"model": "teacher"},
            "student": {"model": "teacher", "keep_layers": 1},
            "students": {"plain": {"label": "plain", "objective": {"weights": {"cross_entropy": 1.0}}}},
        }
    )
    run = Run(recipe, tmp_path, {})
    student = run.train_config(recipe.students["plain"]).student
    assert isinstance(student, CheckpointStudent) and (student.model, student.keep_layers) == (str(llama_dir), 1)
    assert run.reference_config.model == str(llama_dir)


@pytest.mark.slow
def test_a_pruned_student_is_estimated_with_its_pass_over_rows(llama_dir: Path, texts: Path, tmp_path: Path) -> None:
    """More rows to choose its parts by take longer to begin; the time of a step and the size on disk are its own."""
    capture = kdata.CaptureConfig(corpus=kdata.CorpusConfig(path=str(texts), limit=30))
    kdata.capture(tmp_path / "d", capture, TeacherConfig(model=str(llama_dir), backend="transformers"))
    lengths = kdata.open(tmp_path / "d").index(["num_tokens"])["num_tokens"].to_pylist()
    stages = []
    for name, rows in (("few", 30), ("many", 3000)):
        student = PrunedStudent(model=str(llama_dir), hidden_size=32, intermediate_size=48, importance_rows=rows)
        config = TrainConfig(student=student, steps=6, warmup_steps=1, batch_tokens=512, context_tokens=128)
        stage = estimate.estimate_student(name, config, tmp_path / "d", 200 * sum(lengths), lengths, tmp_path / name)
        stages.append(stage)
    few, many = stages
    assert many.load_seconds > few.load_seconds and few.disk_bytes == pytest.approx(many.disk_bytes, rel=0.01)
    assert (tmp_path / "few" / "out" / "importance.parquet").exists()


def test_a_cluster_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "far",
                "engine": {"kind": "ray"},
                "students": {"a": {"label": "a", "objective": {"weights": {"cross_entropy": 1.0}}}},
            }
        )
    )
    with pytest.raises(ConfigError, match="estimate measures on this machine"):
        estimate.estimate_recipe(load_recipe(tmp_path / "recipe.yaml", []), 100)


def test_a_reference_that_is_the_teacher_itself_is_refused_for_difference_sampling(tmp_path: Path) -> None:
    """Every difference would be 0."""
    student = {"label": "a", "plan": True, "objective": {"weights": {"cross_entropy": 1.0}}}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "own",
                "teacher": {"model": "x"},
                "student": {"model": "teacher"},
                "students": {"a": student},
                "select": {"method": "difference"},
            }
        )
    )
    with pytest.raises(ConfigError, match="difference sampling needs a reference model"):
        load_recipe(tmp_path / "recipe.yaml", [])
