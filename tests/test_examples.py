"""The programs of examples/ run as a user runs them, one after the other, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from kdata.trainer.config import ScratchStudent
from kdata.trainer.student import build_student
from tests.trainer.datasets import make_dataset, save_tokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """Standard output of an example; what it printed is in the message where it fails."""
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_examples_run_in_order(tmp_path: Path) -> None:
    captured = run("capture_your_text.py", tmp_path)
    assert "sequences" in captured and captured.count("the teacher's first choice was") == 5

    chosen = run("query_and_choose.py", tmp_path)
    assert "'domain': 'code'" in chosen and "sequences are in both plans" in chosen
    assert re.search("(49|50|51)% of the plan", chosen), "half of the tokens of each domain, but for the last sequence"
    assert {path.name for path in (tmp_path / "runs/examples/dataset/plans").iterdir()} >= {"hard.json", "half.json"}

    asked = run("ask_about_tokens.py", tmp_path)
    assert asked.count("nats, rank") == 5 and "believed" in asked and "tokens of the first" in asked

    trained = run("train_a_student.py", tmp_path)
    assert "all: NLL" in trained
    assert (tmp_path / "runs/examples/student/model/model.safetensors").is_file()


@pytest.mark.slow
def test_a_student_finds_text_that_the_teacher_knows(tmp_path: Path) -> None:
    """The program computes how well each number finds the rows that it planted."""
    printed = run("find_foreign_text.py", tmp_path)
    assert printed.count("nats per token") == 5
    auroc = {name: float(value) for name, value in re.findall(r"AUROC of (\w+): ([\d.]+)", printed)}
    assert set(auroc) == {"teacher", "student", "excess"}
    assert auroc["teacher"] < 0.5 < 0.9 < auroc["student"] and auroc["excess"] > 0.9


@pytest.mark.slow
def test_other_trainers_train_a_student(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [5 + (i * 7) % 40 for i in range(60)])
    model = build_student(ScratchStudent(hidden_size=32, num_layers=2, num_heads=2, max_positions=256), dataset, 0)
    student = tmp_path / "student"
    model.save_pretrained(student)
    save_tokenizer(student)
    for name in ("hf_trainer", "sft_trainer", "accelerate", "plain_torch"):
        printed = run(f"use_{name}.py", tmp_path, str(student), str(dataset.path))
        assert "loss" in printed, name
    for folder, file in (
        ("hf", "model"), ("sft", "adapter_model"), ("accelerate", "model"), ("plain", "model"),
    ):  # fmt: skip
        assert (tmp_path / "runs/examples" / folder / f"{file}.safetensors").is_file()
    assert "lost: the mass of the rest" in run("use_axolotl.py", tmp_path, str(student), str(dataset.path))
    settings = yaml.safe_load((tmp_path / "runs/examples/axolotl/axolotl.yaml").read_text("utf-8"))
    columns = pq.read_table(tmp_path / settings["datasets"][0]["path"])
    assert columns.num_rows == dataset.num_rows and settings["datasets"][0]["logprobs_field"] in columns.column_names
    assert "target_token_ids" in columns.column_names


@pytest.mark.slow
def test_a_recipe_with_rounds_keeps_the_best(tmp_path: Path) -> None:
    printed = run("train_in_rounds.py", tmp_path)
    lines = re.findall(r"round (\d): NLL ([\d.]+) on the validation text", printed)
    assert [number for number, _ in lines] == ["0", "1", "2"]
    best = min(lines, key=lambda line: float(line[1]))[0]
    assert f"round {best} is the best" in printed
    assert (tmp_path / "runs/examples/rounds/report.html").is_file()


def test_every_example_is_listed_and_short() -> None:
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"({path.name})" in listed, f"examples/README.md does not mention {path.name}"
        assert len(path.read_text("utf-8").splitlines()) < 60, f"{path.name} is long: people copy it"
