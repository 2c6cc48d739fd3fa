"""A corpus that has changed: what is stored of unchanged rows stays, and only the others are read, or written, again."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import CorruptError, MismatchError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.jobs import changes
from kdata.jobs.job import LocalEngine
from kdata.jobs.reading import CaptureConfig, CaptureJob, capture
from kdata.jobs.reread import reread_with
from kdata.store.dataset import Dataset
from kdata.store.writer import Writer
from kdata.teachers.base import OnTokens, Readout, ignore_tokens
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, StandInTeacher, digests, run_capture, run_generate, save_tokenizer

# What must be the same in a fresh capture; where a row stands does not matter.
COLUMNS = "* exclude (shard, row)"
TEXTS = ["the cat", "the dog sat", "def add(a, b)", "naïve café 🙂", "for item in items", "  ", "the mat " * 40]
BAD = [{"domain": None}, {"text": 5}, {"text": "half \ud83d"}]


class Counting(StandInTeacher):
    """A stand-in that keeps the sequences and prompts that it was asked for.

    Args:
        failing: sequences that begin so are refused.
    """

    def __init__(self, *, failing: Sequence[int] = (), before_call: Callable[[int], None] | None = None) -> None:
        super().__init__(before_call=before_call)
        self.read_ids: list[tuple[int, ...]] = []
        self._failing = list(failing)

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        for ids in sequences:
            if self._failing and ids[: len(self._failing)].tolist() == self._failing:
                raise TeacherError("this one is too much")
        readouts = super().read(sequences, keep, on_tokens)
        self.read_ids += [tuple(ids.tolist()) for ids in sequences]
        return readouts


def row(name: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "domain": "d", "text": text, **fields}


def contents(dataset: Dataset) -> dict[str, tuple[Any, ...]]:
    """Everything about each row, its distributions too, by id; and the rejects."""
    index = dataset.sql(f"select {COLUMNS} from rows").to_pylist()
    about = {line["id"]: tuple(line.items()) for line in index}
    ids = dataset.index(["id"])["id"].to_pylist()
    numbers = {
        name: tuple(
            getattr(sequence, field).tobytes()
            for field in ("token_ids", "target_mask", "logprob", "rank", "log_tail", "entry_ids", "entry_logprobs")
        )
        for name, sequence in zip(ids, dataset, strict=True)
    }
    return {name: (about[name], numbers[name]) for name in ids}


def rejects(dataset: Dataset) -> list[tuple[Any, ...]]:
    return sorted(tuple(line.values()) for line in dataset.sql("select * from rejects").to_pylist())


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def assert_as_fresh(dataset: Dataset, fresh: Dataset) -> None:
    assert contents(dataset) == contents(fresh)
    assert rejects(dataset) == rejects(fresh)
    assert verify(dataset, deep=True) == []
    units = [entry.unit for entry in dataset.manifest]
    assert sorted(units) == list(range(len(units))), "complete, without a gap"


def documents() -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda text, domain, fault: {"text": text, "domain": domain, **fault},
        st.sampled_from(TEXTS),
        st.sampled_from(["d", "e"]),
        st.one_of(st.just({}), st.just({}), st.just({}), st.sampled_from(BAD)),
    )


@st.composite
def edits(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """A corpus, and the same corpus after each of some rounds of edits anywhere in it."""
    names = itertools.count()
    rows = [{"id": f"n{next(names)}", **draw(documents())} for _ in range(draw(st.integers(2, 9)))]
    rounds = [rows]
    for _ in range(draw(st.integers(1, 3))):
        rows = list(rows)
        for _ in range(draw(st.integers(0, 4))):
            place = draw(st.integers(0, len(rows)))
            action = draw(st.sampled_from(["add", "remove", "change", "repeat", "relabel"]))
            if action == "add" or place == len(rows):
                rows.insert(place, {"id": f"n{next(names)}", **draw(documents())})
            elif action == "remove":
                del rows[place]
            elif action == "change":
                rows[place] = {"id": rows[place]["id"], **draw(documents())}
            elif action == "repeat":
                rows.insert(draw(st.integers(0, len(rows))), rows[place])
            else:
                rows[place] = {**rows[place], "domain": "other", "license": "mit"}
        rounds.append(rows)
    return rounds


KEPT = row("kept", "the dog sat on the log")  # one row that always stays: otherwise it is another corpus


@pytest.mark.parametrize("id_column", ["id", None])
@settings(max_examples=20)
@given(rounds=edits(), stop=st.one_of(st.none(), st.integers(0, 3)), unit_tokens=st.sampled_from([1, 25, 1000]))
def test_after_any_edits_the_rows_are_those_of_a_fresh_capture_and_only_new_ones_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_dir: Path,
    id_column: str | None,
    rounds: list[list[dict[str, Any]]],
    stop: int | None,
    unit_tokens: int,
) -> None:
    folder = tmp_path_factory.mktemp("edits")
    options = {"unit_tokens": unit_tokens, "reading": {"id_column": id_column}}
    stored: set[tuple[int, ...]] = set()

    def at_call(call: int) -> None:
        if call == stop:
            raise KeyboardInterrupt

    for number, rows in enumerate(rounds):
        corpus = save(folder / "corpus.jsonl", [KEPT, *rows])
        teacher = Counting(before_call=at_call if number < len(rounds) - 1 else None)
        with suppress(KeyboardInterrupt):
            run_capture(folder / "d", corpus, tokenizer_dir, teacher=teacher, **options)
        if not (folder / "d").exists():
            continue
        dataset = kdata.open(folder / "d")
        now = {tuple(sequence.token_ids.tolist()) for sequence in dataset}
        # Never again what was stored and still is in the corpus; but a text that is there once more is read once more.
        again = set(teacher.read_ids) & stored
        counts = [tuple(s.token_ids.tolist()) for s in dataset]
        assert all(counts.count(ids) > 1 for ids in again)
        stored = now
    fresh = run_capture(folder / "fresh", folder / "corpus.jsonl", tokenizer_dir, teacher=Counting(), **options)
    assert_as_fresh(kdata.open(folder / "d"), fresh)
    teacher = Counting()
    before = digests(folder / "d")
    run_capture(folder / "d", folder / "corpus.jsonl", tokenizer_dir, teacher=teacher, **options)
    assert teacher.calls == 0 and digests(folder / "d") == before


ROWS = [row(f"r{n}", text) for n, text in enumerate(["the cat", "the dog sat", "def add(a, b)", "the log", "the mat"])]


def test_a_mended_corpus_goes_on_and_one_line_says_what_changed(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = row("bad", "half \ud83d of a pair")
    save(tmp_path / "c.jsonl", [*ROWS[:3], bad, *ROWS[3:]])
    first = run_capture(tmp_path / "d", tmp_path / "c.jsonl", tokenizer_dir, unit_tokens=1)
    assert (first.num_rows, rejects(first)[0][0]) == (5, "bad")
    payload = {entry.name: entry.files for entry in first.manifest}
    mended, teacher = [ROWS[0], row("r1", "the dog ran"), row("bad", "whole"), *ROWS[3:], row("new", "in")], Counting()
    save(tmp_path / "c.jsonl", mended)
    capsys.readouterr()
    grown = run_capture(tmp_path / "d", tmp_path / "c.jsonl", tokenizer_dir, unit_tokens=1, teacher=teacher)
    line = next(line for line in capsys.readouterr().err.splitlines() if "have changed" in line)
    assert line == (
        "capture: the inputs have changed: 3 of 5 stored rows stay; taken out: 1 that are gone and 1 that have changed; "
        "3 to do"
    )
    assert len(teacher.read_ids) == 3
    assert_as_fresh(grown, run_capture(tmp_path / "fresh", tmp_path / "c.jsonl", tokenizer_dir, unit_tokens=1))
    untouched = {entry.name: entry.files for entry in grown.manifest if entry.files == payload.get(entry.name)}
    assert "capture-00000" in untouched, "a shard in which nothing changed keeps its bytes"
    settings = grown.info.sources["capture"].settings
    assert settings["former"] == [{"corpus.sha256": first.info.sources["capture"].settings["corpus"]["sha256"]}]
    assert settings["corpus"]["sha256"] == Corpus(CorpusConfig(path=str(tmp_path / "c.jsonl"))).settings()["sha256"]


def test_new_labels_are_taken_without_reading(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir)
    save(corpus, [{**line, "domain": "other", "source": "web"} for line in ROWS])
    teacher = Counting()
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, teacher=teacher)
    assert teacher.calls == 0
    assert_as_fresh(dataset, run_capture(tmp_path / "fresh", corpus, tokenizer_dir))


def test_rows_without_an_id_column_are_not_read_again_where_they_move(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Their ids hold the number of the row."""
    corpus = save(tmp_path / "c.jsonl", ROWS)
    options = {"reading": {"id_column": None}}
    run_capture(tmp_path / "d", corpus, tokenizer_dir, **options)
    save(corpus, [row("x", "a new first row"), *ROWS])
    teacher = Counting()
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, teacher=teacher, **options)
    assert len(teacher.read_ids) == 1
    assert_as_fresh(dataset, run_capture(tmp_path / "fresh", corpus, tokenizer_dir, **options))


def test_another_corpus_is_refused_and_nothing_is_changed(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir)
    before = digests(tmp_path / "d")
    save(corpus, [row(line["id"], line["text"] + "!") for line in ROWS])
    with pytest.raises(MismatchError, match=r"corpus\.sha256"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir)
    assert digests(tmp_path / "d") == before


def test_what_the_teacher_refused_is_asked_again_only_where_its_unit_changed(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    failing = load_tokenizer(tokenizer_dir)("def")["input_ids"]
    corpus = save(tmp_path / "c.jsonl", ROWS)
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=20, teacher=Counting(failing=failing))
    assert [name for name, *_ in rejects(dataset)] == ["r2"]
    unit = next(entry for entry in dataset.manifest if entry.rejected)
    names = dataset.sql("select id from rows where shard = $shard", {"shard": unit.name})["id"].to_pylist()
    assert names, "others are in its unit"
    save(corpus, [*ROWS, row("new", "in")])
    teacher = Counting()
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=20, teacher=teacher)
    assert len(teacher.read_ids) == 1 and [name for name, *_ in rejects(dataset)] == ["r2"]
    save(corpus, [line for line in [*ROWS, row("new", "in")] if line["id"] != names[0]])
    teacher = Counting()
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=20, teacher=teacher)
    assert len(teacher.read_ids) == 1 and rejects(dataset) == []
    assert_as_fresh(dataset, run_capture(tmp_path / "fresh", corpus, tokenizer_dir, unit_tokens=20))


@pytest.mark.parametrize("step", ["write_manifest", "_remove", "write_info"])
def test_a_crash_while_shards_are_replaced_loses_no_row(
    tmp_path: Path, tokenizer_dir: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdata.store import writer

    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=8)
    save(corpus, [ROWS[0], *ROWS[2:], row("new", "in"), row("newer", "the log")])

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = writer.write_info
        calls = itertools.count()
        if step == "_remove":
            patch.setattr(Writer, step, crash)
        elif step == "write_info":  # the second call: the first is the opening's
            patch.setattr(writer, step, lambda *args: crash() if next(calls) == 1 else real(*args))
        else:
            patch.setattr(writer, step, crash)
        with pytest.raises(KeyboardInterrupt):
            run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=8)
    assert kdata.open(tmp_path / "d").num_rows >= 4
    save(corpus, [ROWS[0], *ROWS[2:]])  # and no unit takes the free number
    teacher = Counting()
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=8, teacher=teacher)
    assert teacher.calls == 0
    assert_as_fresh(dataset, run_capture(tmp_path / "fresh", corpus, tokenizer_dir, unit_tokens=8))


def test_the_bytes_after_a_crash_are_those_of_a_run_without(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard of rows that stay names the work that read them, whether or not the new inputs were recorded before."""
    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=20)
    shutil.copytree(tmp_path / "d", tmp_path / "undisturbed")
    save(corpus, [ROWS[0], *ROWS[2:], row("new", "in")])

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdata.store.writer.write_manifest", crash)
        with pytest.raises(KeyboardInterrupt):
            run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=20)
    for name in ("d", "undisturbed"):
        run_capture(tmp_path / name, corpus, tokenizer_dir, unit_tokens=20)
    assert digests(tmp_path / "d") == digests(tmp_path / "undisturbed")


def test_an_id_of_another_source_stays_a_reject_and_nothing_is_written_again(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    run_capture(tmp_path / "d", save(tmp_path / "a.jsonl", [ROWS[0]]), tokenizer_dir, name="first")
    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir)
    save(corpus, [*ROWS, row("new", "in")])
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir)
    assert [(name, reason) for name, _, _, reason, _ in rejects(dataset)] == [("r0", "id_twice")]
    assert len(dataset) == len(ROWS) + 1
    before = digests(tmp_path / "d")
    run_capture(tmp_path / "d", corpus, tokenizer_dir)
    assert digests(tmp_path / "d") == before


def test_prompts_that_changed_go_on(tmp_path: Path, tokenizer_dir: Path) -> None:
    prompts = save(tmp_path / "p.jsonl", ROWS)
    options = {"num_samples": 2, "unit_prompts": 2}
    run_generate(tmp_path / "d", prompts, tokenizer_dir, **options)
    edited = [row("r9", "for item"), ROWS[0], row("r1", "the dog ran"), {**ROWS[3], "domain": "e"}, ROWS[4]]
    save(prompts, edited)
    asked: list[int] = []

    class Asked(StandInTeacher):
        def write(self, prompts: Any, *rest: Any) -> Any:
            asked.append(len(prompts))
            return super().write(prompts, *rest)

    dataset = run_generate(tmp_path / "d", prompts, tokenizer_dir, teacher=Asked(), **options)
    assert sum(asked) == 2 * 2, "two samples of each of two prompts"
    assert_as_fresh(dataset, run_generate(tmp_path / "fresh", prompts, tokenizer_dir, **options))
    again = StandInTeacher()
    run_generate(tmp_path / "d", prompts, tokenizer_dir, teacher=again, **options)
    assert again.calls == 0


def test_chats_that_changed_go_on(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "t", chat_template=CHATML)
    chats = [
        {
            "id": f"c{n}",
            "domain": "chat",
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "so"}],
        }
        for n, text in enumerate(["the cat", "the dog", "in"])
    ]
    options = {"reading": {"messages_column": "messages"}}
    for make in (run_capture, run_generate):
        corpus, teacher = save(tmp_path / "c.jsonl", chats), StandInTeacher()
        root = tmp_path / make.__name__
        make(root, corpus, tmp_path / "t", **options)
        broken = {**chats[1], "messages": [{"role": "user", "content": [{"type": "image"}]}]}
        save(corpus, [chats[0], broken, chats[2]])
        dataset = make(root, corpus, tmp_path / "t", teacher=teacher, **options)
        assert teacher.calls == 0
        assert_as_fresh(dataset, make(tmp_path / f"fresh-{make.__name__}", corpus, tmp_path / "t", **options))


def test_a_second_payload_follows_a_dataset_that_has_grown(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    tokenizer = load_tokenizer(tokenizer_dir)

    def again(teacher: StandInTeacher) -> Dataset:
        return reread_with(tmp_path / "second", LocalEngine(teacher, tokenizer), kdata.open(tmp_path / "d"))

    first = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=8)
    again(StandInTeacher("second"))
    save(corpus, [*ROWS[:-1], row("r4", "another"), row("new", "in")])
    grown = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=8)
    teacher = StandInTeacher("second")
    second = again(teacher)
    unchanged = {entry.inputs for entry in first.manifest} & {entry.inputs for entry in grown.manifest}
    assert unchanged and teacher.calls == len(grown.manifest) - len(unchanged)
    same = ["id", "content_hash", "domain", "shard", "row"]
    assert second.index(same).equals(grown.index(same))
    assert verify(second, deep=True) == []


def test_a_corpus_that_grows_is_read_on_by_a_real_model(tmp_path: Path, llama_dir: Path) -> None:
    who = TeacherConfig(model=str(llama_dir), backend="transformers")
    config = CaptureConfig(corpus=CorpusConfig(path=str(tmp_path / "c.jsonl")), kind="topk", k=4, unit_tokens=8)
    save(tmp_path / "c.jsonl", [*ROWS[:2], row("bad", "", domain=None), *ROWS[2:]])
    first = capture(tmp_path / "d", config, who)
    before = contents(first)
    assert [reason for _, _, _, reason, _ in rejects(first)] == ["no_domain"]
    save(tmp_path / "c.jsonl", [row("new", "naïve"), *ROWS])
    grown = capture(tmp_path / "d", config, who)
    assert (len(before), grown.num_rows, rejects(grown)) == (5, 6, [])
    after = contents(grown)
    assert all(after[name] == before[name] for name in before), "number for number"
    fresh = capture(tmp_path / "fresh", config, who)
    columns = "id, content_hash, domain, text, num_target_tokens"
    assert grown.sql(f"select {columns} from rows order by id").equals(
        fresh.sql(f"select {columns} from rows order by id")
    )


def test_work_on_other_machines_goes_on_from_what_is_left(tmp_path: Path, tokenizer_dir: Path) -> None:
    """An engine that is done with the last unit first, as several machines may be."""

    class Backwards(LocalEngine):
        def run(self, job: Any, units: Any, writer: Any, on_tokens: Any) -> Any:
            yield from super().run(job, reversed(list(units)), writer, on_tokens)

    corpus = save(tmp_path / "c.jsonl", ROWS)
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    save(corpus, [row("a", "cat"), row("b", "dog"), *ROWS[3:]])
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="hybrid", k=8, unit_tokens=1)
    job = CaptureJob(config, Corpus(config.corpus))
    engine = Backwards(StandInTeacher(), load_tokenizer(tokenizer_dir))
    dataset = kdata.jobs.job.run_job(tmp_path / "d", job, engine)
    assert_as_fresh(dataset, run_capture(tmp_path / "fresh", corpus, tokenizer_dir, unit_tokens=1))


def test_a_digest_tells_texts_apart() -> None:
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", None), (None, "abc"), ("", "abc"), ("abc", "")]
    assert len({changes.digest(*texts) for texts in parts}) == len(parts)


def test_a_reader_of_a_replaced_shard_is_told_so(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Not that the dataset is damaged: another process has changed it since it was opened."""
    corpus = save(tmp_path / "c.jsonl", ROWS)
    opened = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    save(corpus, [row("r0", "the dog ran"), *ROWS[1:]])
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    with pytest.raises(MismatchError, match=r"has changed since it was opened.*shard capture-00000"):
        opened.index()
    with pytest.raises(MismatchError, match="has changed since it was opened"):
        _ = opened[0]
    assert opened[1].id == "r1", "other shards are readable"


def test_a_reader_that_opens_a_shard_again_does_not_read_the_one_in_its_place(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of many shards close those that they used least; a replaced shard may have the name of the former one."""
    monkeypatch.setattr("kdata.store.dataset.OPEN_SHARDS", 0)
    monkeypatch.setattr("kdata.store.dataset.CACHED_BYTES", 0)
    corpus = save(tmp_path / "c.jsonl", ROWS)
    opened = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    before = opened[0].token_ids.tolist()
    _ = opened[1]
    save(corpus, [row("r0", "the dog ran"), *ROWS[1:]])
    now = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    assert now.manifest[0].name == opened.manifest[0].name and now[0].token_ids.tolist() != before
    with pytest.raises(MismatchError, match="has changed since it was opened"):
        _ = opened[0]


def test_a_dataset_that_is_gone_is_not_called_changed(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    opened = run_capture(tmp_path / "d", corpus, tokenizer_dir)
    (tmp_path / "d").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="is missing"):
        _ = opened[0]


def test_a_shard_that_is_replaced_between_the_look_at_it_and_its_opening(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    opened = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    save(corpus, ROWS[:-1])
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1)
    path = tmp_path / "d/data" / f"{opened.manifest[-1].name}.arrow"
    assert not path.exists()
    monkeypatch.setattr(Dataset, "checked_file", lambda self, entry, folder: path)
    with pytest.raises(MismatchError, match="has changed since it was opened"):
        _ = opened[len(opened) - 1]


def test_a_dataset_opens_while_a_writer_replaces_its_two_files(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = save(tmp_path / "c.jsonl", ROWS)
    before = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1).info
    save(corpus, [row("r0", "the dog ran"), *ROWS[1:]])
    now = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1).info
    answers = [before, now, now]
    monkeypatch.setattr("kdata.store.dataset.read_info", lambda _: answers.pop(0))
    assert kdata.open(tmp_path / "d").info == now
    assert not answers, "the first answer did not belong to the manifest"
