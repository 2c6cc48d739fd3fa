"""Tasks of the lm-evaluation-harness: the real one if the extra is installed, and a stand-in that records its arguments."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import kdata
import kdata.trainer.evaluate as module
from kdata.errors import ConfigError, DependencyError
from kdata.trainer.config import EvaluateConfig, ScratchStudent, TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.train import train
from tests.trainer.datasets import make_dataset

QUESTIONS = [f"w{3 + i} w{40 - i} w{7 * i % 50 + 3}" for i in range(24)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", [5 + (i * 7) % 40 for i in range(60)])


@pytest.fixture(scope="module")
def model_dir(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    student = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    train(
        TrainConfig(student=student, steps=20, batch_tokens=128, context_tokens=64, warmup_steps=2, learning_rate=1e-2),
        dataset.path,
        None,
        out,
    )
    return out / "model"


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One multiple-choice task over a local file: which of two words goes on better."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "choices": [f"w{5 + i}", f"w{30 + i}"], "label": i % 2}
        for i, question in enumerate(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "next_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "next_word.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracy(model_dir: Path, folder: Path, count: int) -> float:
    """The same by hand: which of the two words is likelier after each question."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()][:count]
    right = 0
    for row in rows:
        begin = len(tokenizer(row["question"]).input_ids)
        scores = []
        for choice in row["choices"]:  # some are several tokens
            ids = tokenizer(f"{row['question']} {choice}", return_tensors="pt").input_ids
            with torch.no_grad():
                log_q = torch.log_softmax(model(ids).logits[0].double(), -1)
            scores.append(float(sum(log_q[t - 1, ids[0, t]] for t in range(begin, ids.shape[1]))))
        right += int(scores[1] > scores[0]) == row["label"]
    return right / len(rows)


def test_a_local_task_is_scored_offline(
    dataset: kdata.Dataset, model_dir: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="the extra lm-eval is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for count in (24, 10):
        config = EvaluateConfig(tasks=["next_word"], tasks_folder=str(task_folder), task_documents=count)
        scores = evaluate(model_dir, dataset.path, config=config)["tasks"]["next_word"]
        assert scores["acc,none"] == pytest.approx(accuracy(model_dir, task_folder, count))
    assert all(isinstance(value, float) for value in scores.values())
    config = EvaluateConfig(tasks=["next_wrod"], tasks_folder=str(task_folder))
    with pytest.raises(ConfigError, match="has no task 'next_wrod'"):
        evaluate(model_dir, dataset.path, config=config)


def test_the_arguments_of_the_harness_and_the_scores_that_are_kept(
    dataset: kdata.Dataset, model_dir: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for lm_eval 0.4."""
    received: dict[str, Any] = {}

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            received["include_path"], self.all_tasks = include_path, ["next_word"]

    def simple_evaluate(model: object, **settings: object) -> dict:
        received.update(settings, model=model)
        return {"results": {"next_word": {"alias": "next_word", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **settings: settings},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, members in modules.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(members)
        monkeypatch.setitem(sys.modules, name, stand_in)
    config = EvaluateConfig(tasks=["next_word"], tasks_folder=str(task_folder), task_documents=7)
    measured = evaluate(model_dir, dataset.path, config=config)
    assert measured["tasks"] == {"next_word": {"acc,none": 0.5}}
    assert (
        received["include_path"] == str(task_folder) and received["limit"] == 7 and received["tasks"] == ["next_word"]
    )
    assert received["model"]["pretrained"].config.hidden_size == 16 and len(received["model"]["tokenizer"]) == 61


def test_without_the_harness_tasks_are_refused(
    dataset: kdata.Dataset, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match=r"pip install 'kdata\[lm-eval\]'"), monkeypatch.context() as patch:
        patch.setattr(module, "_measure_dataset", None)  # nothing is measured first
        evaluate(model_dir, dataset.path, config=EvaluateConfig(tasks=["next_word"]))
    assert evaluate(model_dir, dataset.path)["tasks"] == {}
