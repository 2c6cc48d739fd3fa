"""A model that needs its beginning-of-sequence token, and a tokenizer that adds none: noticed before anything is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import ConfigError
from kdata.jobs.job import LocalEngine, run_job
from kdata.jobs.reading import CaptureConfig, CaptureJob, capture
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import (
    BOS,
    VOCAB,
    StandInTeacher,
    rows_of_text,
    run_capture,
    run_generate,
    save_llama,
    save_tokenizer,
    write_jsonl,
)


class NeedsBos(StandInTeacher):
    """Knows nothing behind <s>, which is better than what it believes elsewhere."""

    def __init__(self, bos: Any = None) -> None:
        super().__init__()
        self.info = self.info.model_copy(update={"bos": bos})

    def after(self, prefix: Sequence[int]) -> np.ndarray:
        """See `StandInTeacher.after`."""
        return np.full(VOCAB, -np.log(VOCAB)) if len(prefix) and prefix[0] == BOS else super().after(prefix)


@pytest.fixture
def plain_tokenizer(tmp_path: Path) -> Path:
    """A tokenizer that has <s> and puts it nowhere."""
    save_tokenizer(tmp_path / "tokenizer", bos=False)
    return tmp_path / "tokenizer"


def test_a_text_that_reads_better_behind_bos_stops_the_run(
    plain_tokenizer: Path, corpus_file: Path, tmp_path: Path
) -> None:
    teacher = NeedsBos()
    with pytest.raises(ConfigError) as caught:
        run_capture(tmp_path / "dataset", corpus_file, plain_tokenizer, teacher=teacher)
    message = str(caught.value)
    assert f"{np.log(VOCAB):.2f} nats per token with it" in message and "'<s>'" in message
    assert "teacher.bos=add" in message and "teacher.bos=omit" in message and "\n" not in message
    assert open_dataset(tmp_path / "dataset").num_rows == 0 and teacher.calls == 1


def test_prompts_are_checked_too(plain_tokenizer: Path, corpus_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.bos=add"):
        run_generate(tmp_path / "dataset", corpus_file, plain_tokenizer, teacher=NeedsBos())


def captured_with(bos: str, tokenizer: Path, corpus: Path, root: Path) -> Dataset:
    """A capture with `teacher.bos` set, as an engine makes it."""
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="hybrid", k=8)
    engine = LocalEngine(NeedsBos(bos), load_tokenizer(tokenizer, bos=bos))
    return run_job(root, CaptureJob(config, Corpus(config.corpus)), engine)


def test_the_setting_decides_and_is_recorded(plain_tokenizer: Path, corpus_file: Path, tmp_path: Path) -> None:
    added = captured_with("add", plain_tokenizer, corpus_file, tmp_path / "added")
    omitted = captured_with("omit", plain_tokenizer, corpus_file, tmp_path / "omitted")
    assert {row.token_ids[0] for row in added} == {BOS} and BOS not in {row.token_ids[0] for row in omitted}
    assert [row.text for row in added][:3] == [row.text for row in omitted][:3]
    for dataset, says in ((added, "add"), (omitted, "omit")):
        assert json.loads((dataset.path / "dataset.json").read_text())["teacher"]["bos"] == says
    stored = load_tokenizer(added.path / "tokenizer")
    assert stored("the cat")["input_ids"][0] == BOS, "prompts for a student begin in the same way"


def test_a_tokenizer_that_adds_bos_costs_nothing(tokenizer_dir: Path, corpus_file: Path, tmp_path: Path) -> None:
    teacher = StandInTeacher()
    dataset = run_capture(tmp_path / "dataset", corpus_file, tokenizer_dir, teacher=teacher)
    assert teacher.calls == len(dataset.manifest), "one call for each unit, none to compare"
    assert "bos" not in json.loads((dataset.path / "dataset.json").read_text())["teacher"]


def test_a_model_that_does_not_care_is_read_as_it_is(tmp_path: Path) -> None:
    """A random Llama: what it gains or loses by <s> is noise."""
    save_llama(tmp_path / "model")
    save_tokenizer(tmp_path / "model", bos=False)
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows_of_text(24, words=30))
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="hybrid", k=8)
    for bos in (None, "add"):
        who = TeacherConfig(model=str(tmp_path / "model"), backend="transformers", bos=bos)
        dataset = capture(tmp_path / f"dataset-{bos}", config, who)
        assert dataset.num_rows == 24 and dataset.info.teacher.bos == bos
        assert bool(dataset[0].token_ids[0] == BOS) == (bos == "add")
