"""The loop that performs units: what progress shows while a unit is under way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.format.files import journal_of
from kdata.format.keep import KeepConfig
from kdata.observe import progress
from kdata.observe.journal import read_journal
from kdata.observe.progress import Figures, Task
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, write_jsonl


class Watched(StandInTeacher):
    """A stand-in that notes what a person sees after each sequence, before the unit is done.

    Args:
        stop_at: raise KeyboardInterrupt at this call.
    """

    def __init__(self, tasks: list[Task], *, stop_at: int | None = None) -> None:
        super().__init__()
        self.tasks, self.stop_at = tasks, stop_at
        self.seen: list[tuple[int, int | None, bool, int, str]] = []

    def _look(self, on_tokens: OnTokens) -> OnTokens:
        def look(tokens: int) -> None:
            on_tokens(tokens)
            figures: Figures = self.tasks[-1].figures
            self.seen.append((*figures.progress, figures.is_estimate, figures.shards, self.tasks[-1]._line()))

        return look

    def _count(self) -> None:
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        super()._count()

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        return super().read(sequences, keep, self._look(on_tokens))

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        return super().write(prompts, keep, sampling, seeds, self._look(on_tokens))


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Every task that begins, in order."""
    begun: list[Task] = []
    enter = Task.__enter__

    def note(self: Task) -> Task:
        begun.append(self)
        return enter(self)

    monkeypatch.setattr(Task, "__enter__", note)
    return begun


def test_the_bar_moves_before_the_first_commit(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, tasks: list[Task]
) -> None:
    teacher = Watched(tasks)
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=teacher, unit_tokens=10**6)
    assert len(dataset.manifest) == 1, "all is one unit"
    done = [seen[0] for seen in teacher.seen]
    lengths = dataset.index(["num_tokens"])["num_tokens"].to_pylist()
    assert done == np.cumsum(lengths).tolist() and {seen[3] for seen in teacher.seen} == {0}
    assert {seen[1:3] for seen in teacher.seen} == {(dataset.num_tokens, False)}, "the whole corpus is tokenized"
    line = teacher.seen[len(done) // 2][4]
    assert line.startswith(f"capture: reading: {done[len(done) // 2]:,}/{dataset.num_tokens:,} tokens  ")
    assert " left  " in line and " tokens/s  0/24 documents" in line
    assert digests(tmp_path / "d") == digests(
        run_capture(tmp_path / "plain", corpus_file, tokenizer_dir, unit_tokens=10**6).path
    )


def test_the_total_is_an_estimate_until_all_is_tokenized(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, tasks: list[Task]
) -> None:
    teacher = Watched(tasks)
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=teacher)
    first, last = teacher.seen[0], teacher.seen[-1]
    assert first[2] and "/~" in first[4] and not last[2] and "~" not in last[4]
    entry = dataset.manifest[0]
    documents = entry.rows + entry.rejected
    assert first[1] == round(entry.tokens * 24 / documents), "documents times mean tokens"
    assert (last[0], last[1]) == (dataset.num_tokens, dataset.num_tokens)
    assert [seen[0] for seen in teacher.seen] == sorted(seen[0] for seen in teacher.seen), "it never goes back"


def test_resume_counts_the_tokens_that_were_there(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, tasks: list[Task]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=Watched(tasks, stop_at=2))
    stopped = read_journal(journal_of(tmp_path / "d"))[-1]
    there = sum(entry.tokens for entry in kdata.open(tmp_path / "d").manifest)
    assert (stopped.state, stopped.tokens_done) == ("stopped", there) and there > 0
    assert stopped.tokens_estimated and stopped.tokens_total is not None and stopped.tokens_total > there
    teacher = Watched(tasks)
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=teacher)
    assert teacher.seen[0][0] > there and tasks[-1].figures.skipped_tokens == there
    line = read_journal(journal_of(tmp_path / "d"))[-1]
    assert (line.tokens, line.tokens_done) == (dataset.num_tokens - there, dataset.num_tokens)
    assert (line.tokens_total, line.tokens_estimated) == (dataset.num_tokens, False)


def test_writing_counts_written_tokens_and_estimates_from_what_is_finished(
    tmp_path: Path, tokenizer_dir: Path, tasks: list[Task]
) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", rows_of_text(8))
    teacher = Watched(tasks)
    dataset = run_generate(tmp_path / "d", prompts, tokenizer_dir, teacher=teacher, num_samples=2)
    written = [entry.target_tokens for entry in dataset.manifest]
    assert len(written) == 2 and teacher.seen[7][0] == written[0] and teacher.seen[15][0] == sum(written)
    assert teacher.seen[0][1:3] == (8 * 2 * 12, True), "before anything is finished: as long as allowed"
    line = read_journal(journal_of(tmp_path / "d"))[-1]
    assert (line.tokens, line.tokens_total, line.tokens_estimated) == (sum(written), sum(written), False)


def test_the_log_moves_too(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, tasks: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow teacher, whose only unit is under way: the thread that writes the log sees its tokens."""
    for name in ("TICK_SEC", "BEAT_SEC"):
        monkeypatch.setattr(progress, name, 0.01)
    root, waiting = tmp_path / "d", threading.Event()

    class Slow(Watched):
        def _look(self, on_tokens: OnTokens) -> OnTokens:
            def look(tokens: int) -> None:
                on_tokens(tokens)
                while read_journal(journal_of(root))[-1].tokens < tasks[-1].figures.tokens_now:
                    waiting.wait(0.01)

            return look

    dataset = run_capture(root, corpus_file, tokenizer_dir, teacher=Slow(tasks), unit_tokens=10**6)
    lines = read_journal(journal_of(root))
    under_way = [line for line in lines if line.done == 0]
    assert len({line.tokens for line in under_way}) > dataset.num_rows // 2
    assert all(line.source == "capture" and line.shards is None for line in under_way)
    moving = [line for line in under_way if line.tokens]
    assert all(line.tokens_per_sec and line.seconds_left is not None for line in moving)


def test_scoring_moves_within_a_shard(captured: Path, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    from kdata.jobs import scoring

    dataset = kdata.open(captured)
    teacher = Watched(tasks)
    with Task("score", dataset.num_tokens, "tokens") as task:
        task.plan(0, dataset.manifest[0].tokens, dataset.manifest[0].tokens)
        count: Any = scoring.UnitCounter(lambda tokens: task.under_way(0, tokens))
        scoring._score_shard(
            dataset, 0, dataset.manifest[0], teacher, count, scoring.ScoreConfig(model={"model": "m"}).columns
        )
        assert [seen[0] for seen in teacher.seen] == np.cumsum(np.diff(dataset.shard(0).offsets)).tolist()
        task.advance(dataset.manifest[0].tokens, part=0)
        assert task.figures.progress == (dataset.manifest[0].tokens, dataset.num_tokens)
