"""`kdata verify --against-teacher`: what is stored, compared with what the teacher returns now."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import kdata
from kdata.check.remeasure import against_teacher
from kdata.errors import MismatchError
from kdata.format.keep import KeepConfig
from kdata.jobs.reading import CaptureConfig
from kdata.teachers.base import Readout
from kdata.teachers.config import TeacherConfig
from kdata.teachers.transformers import TransformersTeacher
from tests.fakes import rows_of_text, write_jsonl

KEEPS = {
    "topk": {"kind": "topk", "k": 12},
    "adaptive": {"kind": "adaptive", "k": 30, "mass": 0.9},
    "hybrid": {"kind": "hybrid", "k": 4, "num_draws": 6},
    "sampled": {"kind": "sampled", "num_draws": 9},
    "threshold": {"kind": "threshold", "threshold": 0.05},
}


@pytest.mark.parametrize("kind", KEEPS)
def test_the_error_measured_again_equals_that_in_the_manifest(kind: str, llama_dir: Path, tmp_path: Path) -> None:
    from kdata.jobs.reading import capture

    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(12))
    who = TeacherConfig(model=str(llama_dir), backend="transformers")
    settings = CaptureConfig(corpus={"path": str(corpus)}, **KEEPS[kind])
    dataset = capture(tmp_path / "d", settings, who)
    assert KeepConfig.of(dataset.info.codec).settings() == settings.settings()
    teacher = TransformersTeacher(who)
    measured = against_teacher(dataset, teacher, dataset.num_rows)
    written = dataset.manifest[0].codec_error
    assert measured.rows == dataset.num_rows and written is not None
    assert measured.codec.mean_nats == pytest.approx(written.mean_nats, abs=1e-4)
    assert measured.codec.kl_nats == pytest.approx(written.kl_nats, abs=1e-5)
    assert measured.max_logprob_nats < 0.01 and measured.max_log_tail_nats < 1e-4
    assert measured.same_draws is None if kind in ("topk", "adaptive") else measured.same_draws > 0.99


def test_other_beliefs_are_measured_and_another_teacher_is_refused(llama_dir: Path, tmp_path: Path) -> None:
    from kdata.jobs.reading import capture

    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(6))
    who = TeacherConfig(model=str(llama_dir), backend="transformers")
    dataset = capture(tmp_path / "d", CaptureConfig(corpus={"path": str(corpus)}, kind="hybrid", k=12), who)
    teacher = TransformersTeacher(who)

    class FlatterTeacher:
        """The same weights by name, but other beliefs: a fault injection."""

        info, vocab_size, context = teacher.info, teacher.vocab_size, teacher.context

        def read(self, sequences: list[np.ndarray], keep: KeepConfig) -> list[Readout]:
            readouts = teacher.read(sequences, keep)
            flatter = [dataclasses.replace(r.kept, logprobs=r.kept.logprobs * np.float32(1.3)) for r in readouts]
            return [dataclasses.replace(r, kept=k) for r, k in zip(readouts, flatter, strict=True)]

    assert against_teacher(dataset, FlatterTeacher(), 6).codec.kl_nats > 1e-2  # type: ignore[arg-type]
    stranger = dataset.info.teacher.model_copy(update={"weights_hash": "0" * 64})
    dataset.info = dataset.info.model_copy(update={"teacher": stranger})
    with pytest.raises(MismatchError, match="is not the teacher"):
        against_teacher(dataset, teacher, 2)
    assert kdata.open(dataset.path).num_rows == dataset.num_rows
