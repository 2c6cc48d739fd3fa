"""A second teacher on the same rows: the same ids, tokens, targets and shards, and every number the one of that teacher."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError, MismatchError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.jobs.job import LocalEngine
from kdata.jobs.payloads import refuse_other_rows
from kdata.jobs.reread import RereadJob, keep_like, reread_with
from kdata.teachers.model import load_tokenizer
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, save_tokenizer, write_jsonl
from tests.rounding import assert_logprobs, assert_tails

SAME = ["id", "content_hash", "domain", "source", "origin", "license", "num_tokens", "num_target_tokens", "num_bytes",
        "text", "prompt", "finish_reason", "shard", "row"]  # fmt: skip


def again(root: Path, dataset: kdata.Dataset, tokenizer: Path, teacher: Any = None, **settings: Any) -> kdata.Dataset:
    """Have a second stand-in teacher read the rows."""
    engine = LocalEngine(teacher or StandInTeacher("second"), load_tokenizer(tokenizer))
    resume = settings.pop("resume", "auto")
    return reread_with(root, engine, dataset, settings, resume=resume)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> kdata.Dataset:
    """Captured and generated rows, with further temperatures."""
    root = tmp_path_factory.mktemp("first") / "first"
    run_capture(root, corpus_file, tokenizer_dir, temperatures=[2.0])
    return run_generate(root, corpus_file, tokenizer_dir, temperatures=[2.0])


@pytest.fixture(scope="module")
def second(first: kdata.Dataset, tokenizer_dir: Path) -> kdata.Dataset:
    return again(first.path.with_name("second"), first, tokenizer_dir)


def test_the_rows_are_the_same_and_the_teacher_is_another(first: kdata.Dataset, second: kdata.Dataset) -> None:
    assert second.index(SAME).equals(first.index(SAME))
    assert second.index(["nll"]) != first.index(["nll"])
    assert [(e.name, e.unit, e.rows) for e in second.manifest] == [(e.name, e.unit, e.rows) for e in first.manifest]
    for ours, theirs in zip(first, second, strict=True):
        assert np.array_equal(ours.target_mask, theirs.target_mask)
        assert np.array_equal(ours.token_ids, theirs.token_ids)
        assert np.array_equal(ours.num_kept > 0, theirs.num_kept > 0)
    assert second.info.teacher != first.info.teacher
    assert second.info.tokenizer == first.info.tokenizer and second.info.tail == first.info.tail
    assert {s.kind for s in second.info.sources.values()} == {"reread"}
    assert verify(second, deep=True) == []


def test_every_number_comes_from_the_second_teacher(first: kdata.Dataset, second: kdata.Dataset) -> None:
    """Against the dense oracle; prompts of generated rows stay unrecorded."""
    teacher, unrecorded = StandInTeacher("second"), 0
    for sequence in second:
        dense_TV = teacher.dense(sequence.token_ids)
        for t in range(1, len(sequence.token_ids)):
            if not sequence.target_mask[t]:
                unrecorded += 1
                assert np.isnan([sequence.logprob[t], sequence.log_tail[t], sequence.entropy[t]]).all()
                assert sequence.rank[t] == sequence.num_kept[t] == 0
                assert sequence.log_z is not None and np.isnan(sequence.log_z[t]).all()
                continue
            token = sequence.token_ids[t]
            assert_logprobs(sequence.logprob[t], dense_TV[t, token])
            assert sequence.rank[t] == 1 + (dense_TV[t] > dense_TV[t, token]).sum()
            begin, end = sequence.entry_offsets[t], sequence.entry_offsets[t] + sequence.num_exact[t]
            np.testing.assert_allclose(
                sequence.entry_logprobs[begin:end], dense_TV[t, sequence.entry_ids[begin:end]], atol=0.05
            )
            mass = np.exp(dense_TV[t, sequence.entry_ids[begin:end]]).sum()
            assert_tails(np.exp(sequence.log_tail[t]), 1 - mass)
    assert unrecorded > 50


def test_captured_rows_are_those_of_a_capture_by_the_second_teacher(
    tmp_path: Path, first: kdata.Dataset, second: kdata.Dataset, corpus_file: Path, tokenizer_dir: Path
) -> None:
    seed = second.info.codec.parameters["draw_seed"]
    own = run_capture(
        tmp_path / "own", corpus_file, tokenizer_dir,
        teacher=StandInTeacher("second"), temperatures=[2.0], draw_seed=seed,
    )  # fmt: skip
    ours, theirs = (pa.ipc.open_file(str(d.path / "data/capture-00001.arrow")).read_all() for d in (own, second))
    bodies = []
    for table in (ours, theirs):
        plain = table.replace_schema_metadata(None)
        with pa.ipc.new_file(sink := pa.BufferOutputStream(), plain.schema) as writer:
            writer.write_table(plain)
        bodies.append(sink.getvalue().to_pybytes())
    assert bodies[0] == bodies[1]
    work = b"kdata.work_digest"  # of a capture, and of a reread
    about = [dict(table.schema.metadata) for table in (ours, theirs)]
    assert about[0].pop(work) != about[1].pop(work) and about[0] == about[1]


def test_draws_have_a_seed_of_the_second_teacher(
    first: kdata.Dataset, second: kdata.Dataset, tokenizer_dir: Path
) -> None:
    """Also where its weights are the first's: with one seed the errors of like teachers would not cancel."""
    like = again(first.path.with_name("like"), first, tokenizer_dir, StandInTeacher())
    assert first.info.codec.parameters["draw_seed"] == 0
    assert len({d.info.codec.parameters["draw_seed"] for d in (first, second, like)}) == 3
    assert np.array_equal(first[3].num_exact, like[3].num_exact)
    assert not np.array_equal(first[3].entry_ids, like[3].entry_ids)
    assert again(first.path.with_name("like"), first, tokenizer_dir, StandInTeacher(), resume="must").num_rows


def test_another_kind_can_be_asked_for_and_seeds_can_be_set(first: kdata.Dataset, tokenizer_dir: Path) -> None:
    top = again(first.path.with_name("top"), first, tokenizer_dir, kind="topk", k=3, temperatures=[])
    assert top.info.codec.kind == "topk" and top.info.tail == "ghost"
    assert top.info.codec.parameters == {"k": 3, "id_bytes": 2}
    assert set(np.concatenate([s.num_kept for s in top])) == {0, 3}
    need = again(first.path.with_name("need"), first, tokenizer_dir, kind="threshold", threshold=0.1)
    assert need.info.codec.kind == "threshold" and need.info.codec.parameters["threshold"] == 0.1
    same = again(first.path.with_name("same"), need, tokenizer_dir, draw_seed=need.info.codec.parameters["draw_seed"])
    assert same.info.codec == need.info.codec
    for one, other in zip(need, same, strict=True):
        np.testing.assert_array_equal(one.entry_ids, other.entry_ids)
        np.testing.assert_array_equal(one.entry_logprobs, other.entry_logprobs)
    assert keep_like(first, StandInTeacher().info, {"draw_seed": 5}).draw_seed == 5
    with pytest.raises(ConfigError, match=r"reread settings: unknown key 'num_draw'.*did you mean 'num_draws'"):
        keep_like(first, None, {"num_draw": 5})


def test_a_stopped_run_resumes_to_the_same_bytes(
    tmp_path: Path, first: kdata.Dataset, second: kdata.Dataset, tokenizer_dir: Path
) -> None:
    def fail(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again(tmp_path / "second", first, tokenizer_dir, StandInTeacher("second", before_call=fail))
    assert 0 < len(kdata.open(tmp_path / "second").manifest) < len(first.manifest)
    teacher = StandInTeacher("second")
    again(tmp_path / "second", first, tokenizer_dir, teacher)
    assert digests(tmp_path / "second") == digests(second.path)
    assert teacher.calls == len(first.manifest) - 2


def test_only_a_source_added_later_is_read(tmp_path: Path, copied: Path, tokenizer_dir: Path) -> None:
    again(tmp_path / "out", kdata.open(copied), tokenizer_dir)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{**row, "id": "p" + row["id"]} for row in rows_of_text(4)])
    grown, teacher = run_generate(copied, prompts, tokenizer_dir), StandInTeacher("second")
    out = again(tmp_path / "out", grown, tokenizer_dir, teacher)
    assert teacher.calls == sum(e.source == "generate" for e in grown.manifest)
    assert out.index(SAME).equals(grown.index(SAME))


def test_other_rows_are_refused(
    tmp_path: Path, copied: Path, corpus_file: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]
) -> None:
    again(tmp_path / "out", kdata.open(copied), tokenizer_dir)
    shutil.rmtree(copied)
    rows = [{**row, "text": row["text"] + "!"} for row in rows_of_text(12)]
    other = run_capture(copied, jsonl(rows), tokenizer_dir)
    with pytest.raises(MismatchError, match="source 'capture' was begun with other settings") as error:
        again(tmp_path / "out", other, tokenizer_dir)
    assert "  of: " in str(error.value)


def test_another_vocabulary_is_refused_naming_both(tmp_path: Path, captured: Path, tokenizer_dir: Path) -> None:
    dataset = kdata.open(captured)
    larger = again(tmp_path / "larger", dataset, tokenizer_dir, StandInTeacher(vocab_size=301))
    assert larger.info.vocab_size == 301, "a head with another padding has the same ids"
    other = tmp_path / "tokenizer"
    save_tokenizer(other, lines=["other words make another vocabulary, other words"])
    with pytest.raises(MismatchError, match=r"dataset \(\w{12}\) and stand-in \(\w{12}\) are not the same: id"):
        again(tmp_path / "out", dataset, other)
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_reread_are_refused(
    tmp_path: Path, copied: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    dataset = kdata.open(copied)
    with pytest.raises(ConfigError, match=r"row 'doc-009#0' of .* has 64 tokens, stand-in reads 40"):
        again(tmp_path / "out", dataset, tokenizer_dir, StandInTeacher(context=40))
    with pytest.raises(ConfigError, match="needs a folder of its own"):
        again(copied, dataset, tokenizer_dir)
    with pytest.raises(ConfigError, match="must be below the vocabulary size"):
        again(tmp_path / "out", dataset, tokenizer_dir, k=300)

    def fail(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_capture(tmp_path / "begun", corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=fail))
    with pytest.raises(DataError, match=r"source 'capture' of .* is not complete"):
        again(tmp_path / "out", kdata.open(tmp_path / "begun"), tokenizer_dir)
    assert not (tmp_path / "out").exists()


def test_a_row_at_which_the_second_teacher_fails_is_a_reject(
    tmp_path: Path, captured: Path, tokenizer_dir: Path
) -> None:
    """And what is left is a whole dataset, but no payload of the same rows."""
    first = kdata.open(captured)
    unreadable = first[4].token_ids

    class Failing(StandInTeacher):
        def readout(self, ids: np.ndarray, keep: KeepConfig, start: int = 1) -> Any:
            if np.array_equal(ids, unreadable):
                raise TeacherError("this one is too much")
            return super().readout(ids, keep, start)

    second = again(tmp_path / "out", first, tokenizer_dir, Failing("second"))
    assert verify(second, deep=True) == []
    assert second.sql("select id, reason from rejects").to_pylist() == [
        {"id": first.index(["id"])["id"][4].as_py(), "reason": "teacher_failed"}
    ]
    with pytest.raises(MismatchError, match=r"has 25 rows, .* 24: not the same rows.*kdata split --by plan"):
        refuse_other_rows(first, second)


def test_the_job_can_be_sent_to_another_process(first: kdata.Dataset, tokenizer_dir: Path) -> None:
    """It and its units, as an engine on other machines needs it; what is done there is the same."""
    teacher, tokenizer = StandInTeacher("second"), load_tokenizer(tokenizer_dir)
    job = RereadJob(first, "generate", keep_like(first, teacher.info))
    unit = next(job.units(teacher, tokenizer))
    there, its = pickle.loads(pickle.dumps((job, unit)))
    here, done = job.perform(teacher, tokenizer, unit), there.perform(teacher, tokenizer, its)
    assert here.inputs == done.inputs and [r.id for r in here.records] == [r.id for r in done.records]
    for one, other in zip(here.records, done.records, strict=True):
        assert np.array_equal(one.kept.ids, other.kept.ids) and np.array_equal(one.target_mask, other.target_mask)
    assert job.total == 24 - 1  # one prompt of the corpus is empty
