"""How many sequences a teacher gets at once, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.errors import TeacherError
from kdata.format.keep import KeepConfig
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig
from kdata.teachers.windows import each, rows_per_step, windows
from tests.fakes import StandInTeacher, digests, run_capture, run_generate

BAD = "doc-003"


class Picky(StandInTeacher):
    """A stand-in that fails whenever it gets a certain sequence, or at its first calls."""

    def __init__(self, poison: np.ndarray | None = None, *, first_calls: int = 0, always: bool = False) -> None:
        super().__init__()
        self.poison, self.first_calls, self.always = poison, first_calls, always
        self.asked: list[int] = []

    def _refuse(self, sequences: Sequence[np.ndarray]) -> None:
        self.asked.append(len(sequences))
        poisoned = self.poison is not None and any(np.array_equal(s, self.poison) for s in sequences)
        if self.always or poisoned or len(self.asked) <= self.first_calls:
            raise TeacherError("this sequence breaks the stand-in")

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        self._refuse(sequences)
        return super().read(sequences, keep, on_tokens)

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        self._refuse(prompts)
        return super().write(prompts, keep, sampling, seeds, on_tokens)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120), st.booleans())
def test_windows_hold_every_sequence_once_and_stay_in_their_bounds(
    lengths: list[int], budget: int, padded: bool
) -> None:
    groups = windows(lengths, budget, padded=padded)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    for group in groups:
        inside = [lengths[number] for number in group]
        assert inside == sorted(inside, reverse=True)
        cost = len(inside) * inside[0] if padded else sum(inside)
        assert len(group) == 1 or cost <= budget
    # No window is opened while the one before has room for its first.
    for before, after in pairwise(groups):
        inside = [lengths[number] for number in before]
        more = (len(inside) + 1) * inside[0] if padded else sum(inside) + lengths[after[0]]
        assert more > budget


def test_rows_times_vocabulary_stay_within_the_memory() -> None:
    assert rows_per_step(2**18, 3.0) == 1024  # 3 GiB / (3 copies x 4 bytes x 2^18)
    assert rows_per_step(2**18, 3.0, copies=1) == 3072
    assert rows_per_step(10**9, 0.001) == 1


def test_each_answers_every_input_that_can_be_answered() -> None:
    calls: list[list[int]] = []

    def ask(some: list[int]) -> list[int]:
        calls.append(some)
        if 2 in some:
            raise TeacherError("not 2")
        return [10 * number for number in some]

    answers = each(ask, 4)
    assert answers[0] == 0 and answers[1] == 10 and answers[3] == 30
    assert isinstance(answers[2], TeacherError) and str(answers[2]) == "not 2"
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert each(ask, 0) == [] and each(ask, 2) == [0, 10]


def test_a_failure_at_every_input_is_raised() -> None:
    def ask(some: list[int]) -> list[int]:
        raise TeacherError("the engine is gone")

    for count in (1, 3):
        with pytest.raises(TeacherError, match="the engine is gone"):
            each(ask, count)


@pytest.fixture
def poison(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> np.ndarray:
    """Token ids of one document of the corpus."""
    whole = run_capture(tmp_path / "whole", corpus_file, tokenizer_dir)
    return np.array(whole.take(whole.rows_of([BAD])).token_ids)


def test_a_sequence_that_fails_alone_is_a_reject_and_the_rest_is_read(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, poison: np.ndarray
) -> None:
    teacher = Picky(poison)
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=teacher)
    whole = kdata.open(tmp_path / "whole")
    assert dataset.num_rows == whole.num_rows - 1
    rejects = dataset.sql("select id, reason, detail from rejects where reason = 'teacher_failed'").to_pylist()
    assert rejects == [{"id": BAD, "reason": "teacher_failed", "detail": "this sequence breaks the stand-in"}]
    assert verify(dataset, deep=True) == []
    kept = "select id, content_hash, nll from rows where id <> $id order by id"
    assert dataset.sql(kept, {"id": BAD}).equals(whole.sql(kept, {"id": BAD}))


def test_a_passing_failure_leaves_no_trace(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    run_capture(tmp_path / "undisturbed", corpus_file, tokenizer_dir)
    teacher = Picky(first_calls=1)
    run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=teacher)
    assert teacher.asked[1:].count(1) == teacher.asked[0]  # those of the first unit, one by one
    assert digests(tmp_path / "d") == digests(tmp_path / "undisturbed")


def test_a_teacher_that_fails_at_everything_ends_the_run(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(TeacherError, match="breaks the stand-in"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=Picky(always=True))
    assert kdata.open(tmp_path / "d").num_rows == 0


def test_a_prompt_that_cannot_be_continued_is_a_reject(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    whole = run_generate(tmp_path / "whole", corpus_file, tokenizer_dir)
    first = whole[0]
    prompt = first.token_ids[: int(np.flatnonzero(first.target_mask)[0])]
    dataset = run_generate(tmp_path / "d", corpus_file, tokenizer_dir, teacher=Picky(np.array(prompt)))
    assert dataset.num_rows == whole.num_rows - 1
    refused = dataset.sql("select id from rejects where reason = 'teacher_failed'").to_pylist()
    assert refused == [{"id": whole.index(["id"])["id"][0].as_py()}]
