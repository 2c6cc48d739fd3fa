"""Bars of transformers stay away where kdata loads and saves models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kdata.store.pretrained import without_bars
from kdata.teachers.config import TeacherConfig
from kdata.teachers.transformers import TransformersTeacher
from kdata.trainer.config import CheckpointStudent, TrainConfig
from kdata.trainer.evaluate import _load
from kdata.trainer.train import train
from tests.fakes import rows_of_text, run_capture, write_jsonl


@pytest.fixture
def bars() -> Iterator[list[str]]:
    """What the bars are for that transformers makes."""
    made: list[str] = []

    def noted(factory: Any, arguments: Any, options: dict[str, Any]) -> Any:
        made.append(str(options.get("desc")))
        return logging.EmptyTqdm(*arguments, **options)

    before = logging.set_tqdm_hook(noted)
    yield made
    assert logging.set_tqdm_hook(before) is noted, "it is set again"


def test_a_model_is_loaded_and_saved_without_a_bar(llama_dir: Path, tmp_path: Path, bars: list[str]) -> None:
    AutoModelForCausalLM.from_pretrained(llama_dir).save_pretrained(tmp_path / "copy")
    assert len(bars) == 2, "transformers makes one each"
    bars.clear()
    with pytest.raises(ZeroDivisionError), without_bars():
        raise ZeroDivisionError
    TransformersTeacher(TeacherConfig(model=str(llama_dir), backend="transformers")).close()
    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(8))
    run_capture(tmp_path / "d", corpus, llama_dir)
    student = CheckpointStudent(model=str(llama_dir))
    settings = TrainConfig(student=student, steps=2, batch_tokens=128, context_tokens=64, warmup_steps=0)
    train(settings, tmp_path / "d", None, tmp_path / "run")
    _load(tmp_path / "run/model")
    assert bars == []
