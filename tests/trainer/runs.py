"""Runs of the trainer in tests: models to begin with, settings, and what a run wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kdata
from kdata.config import parse_config
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.student import build_student
from tests.trainer.datasets import save_tokenizer


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def save_base(folder: Path, dataset: kdata.Dataset, **sizes: Any) -> Path:
    """A tiny model with random weights and a tokenizer, to begin from."""
    student = ScratchStudent(hidden_size=32, num_layers=2, num_heads=2, max_positions=64, **sizes)
    build_student(student, dataset, 0).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def six_steps(base: Path, more: dict[str, Any], /, **changes: object) -> TrainConfig:
    """Settings of a short run with checkpoints, from a model's folder with more settings of the student."""
    values: dict[str, object] = {
        "student": {"kind": "checkpoint", "model": str(base), **more}, "steps": 6, "batch_tokens": 128,
        "context_tokens": 64, "warmup_steps": 0, "learning_rate": 1e-2, "log_every_steps": 1, "checkpoint_every_steps": 2,
    }  # fmt: skip
    return parse_config(TrainConfig, {**values, **changes}, "test")
