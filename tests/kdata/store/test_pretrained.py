"""Bars of transformers stay away where kdata loads and saves models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from kdata.errors import CorruptError
from kdata.format.json_text import MAX_TOKENIZER_BYTES
from kdata.store.pretrained import model_files, without_bars
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


def test_files_that_nothing_opens_do_not_stop_a_model(llama_dir: Path, tmp_path: Path) -> None:
    """A text beside the model may be large, and a pipe may stand there; of a tokenizer's own files neither may."""
    folder = Path(shutil.copytree(llama_dir, tmp_path / "model"))
    with (folder / "corpus.txt").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    os.mkfifo(folder / "log.fifo")
    with model_files(folder, "a file"):
        pass
    (folder / "corpus.txt").rename(folder / "vocab.txt")
    with pytest.raises(CorruptError, match=r"vocab\.txt has more than"), model_files(folder, "a file"):
        pass
