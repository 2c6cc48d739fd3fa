"""A row that cannot be used is a reject with its reason, whatever reads it, and never the end of the work."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, DataError, DistributionError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.records import Record, Reject
from kdata.format.rejects import rejected_text
from kdata.jobs.job import LocalEngine
from kdata.jobs.payloads import InputSequence, outcome_of
from kdata.jobs.reading import CaptureConfig, capture
from kdata.jobs.reread import reread_with
from kdata.pipelines.cli.main import app
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.store.dataset import Dataset
from kdata.teachers import transformers as transformers_teacher
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, VOCAB, StandInTeacher, run_capture, run_generate, save_llama, save_tokenizer

RUNNER = CliRunner(env={"COLUMNS": "300"})


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def row(name: Any, text: Any = "the cat sat on the mat", **fields: Any) -> dict[str, Any]:
    return {"id": name, "domain": "d", "text": text, **fields}


def reasons(dataset: Dataset) -> dict[str, str]:
    return {r["id"]: r["reason"] for r in dataset.sql("select id, reason from rejects").to_pylist()}


def names(dataset: Dataset) -> list[str]:
    assert verify(dataset, deep=True) == []
    return dataset.index(["id"])["id"].to_pylist()


FAULTS = {
    "no domain": (row("bad", domain=None), "no_domain"),
    "no id": (row(None), "no_id"),
    "empty": (row("bad", " \n"), "empty"),
    "null": (row("bad", None), "empty"),
    "a number": (row("bad", 5), "not_text"),
    "a list": (row("bad", ["the cat"]), "not_text"),
    "a surrogate": (row("bad", "half \ud83d of a pair"), "not_text"),
    "a surrogate in the domain": (row("bad", domain="\udfff"), "not_text"),
    "a surrogate in the license": (row("bad", license="\udfff"), "not_text"),
    "an id twice": (row("first", "another text"), "id_twice"),
}


@pytest.mark.parametrize("place", ["early", "late"])
@pytest.mark.parametrize("make", [run_capture, run_generate])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_used_is_put_aside(
    tmp_path: Path, tokenizer_dir: Path, fault: str, make: Callable[..., Dataset], place: str
) -> None:
    bad, reason = FAULTS[fault]
    rows = [row("first"), *(row(f"r{n}") for n in range(3))]
    rows.insert(1 if place == "early" else len(rows), bad)
    small = {"unit_tokens": 1} if make is run_capture else {"unit_prompts": 1}
    dataset = make(tmp_path / "d", save(tmp_path / "c.jsonl", rows), tokenizer_dir, **small)
    if make is run_generate and fault in ("empty", "null"):  # a prompt is <s> at least, and that can be continued
        assert dataset.num_rows == 5
        return
    assert len(names(dataset)) == 4 and list(reasons(dataset).values()) == [reason]
    with pytest.raises(DataError, match="cannot be used") as error:
        make(tmp_path / "strict", tmp_path / "c.jsonl", tokenizer_dir, strict=True, **small)
    assert next(iter(reasons(dataset))) in str(error.value)


def test_a_first_bad_row_does_not_take_the_id_of_a_good_one(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", [row("a", domain=None), row("a"), row("a")])
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir)
    assert names(dataset) == ["a"]
    rejects = dataset.sql("select reason from rejects order by reason")["reason"].to_pylist()
    assert rejects == ["id_twice", "no_domain"]


def test_where_no_row_at_all_can_be_used_it_is_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = save(tmp_path / "c.jsonl", [row("a", 1), row("b", 2)])
    teacher = StandInTeacher()
    with pytest.raises(DataError, match=r"not one row could be used. a: column 'text' must hold text, not int"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, teacher=teacher)
    assert teacher.calls == 0
    with pytest.raises(ConfigError, match="has no column 'text'"):
        run_capture(tmp_path / "d", save(tmp_path / "n.jsonl", [{"id": "a", "domain": "d"}]), tokenizer_dir)


LONG = "the cat sat on the mat and the dog sat on the log " * 8


@pytest.mark.parametrize("order", [("long", "long#0"), ("long#0", "long")])
def test_the_id_of_a_piece_that_a_row_has_too_is_a_reject(
    tmp_path: Path, tokenizer_dir: Path, order: tuple[str, ...]
) -> None:
    texts = {"long": LONG, "long#0": "the dog"}
    corpus = save(tmp_path / "c.jsonl", [row(name, texts[name]) for name in (*order, "last")[:2]] + [row("last")])
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir)
    row_ids = names(dataset)
    assert len(row_ids) == len(set(row_ids)) and {"long#0", "long#1", "last"} <= set(row_ids)
    assert reasons(dataset) == {"long#0": "id_twice"}


def test_an_id_of_another_source_is_a_reject_and_all_of_them_are_an_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    run_capture(tmp_path / "d", save(tmp_path / "a.jsonl", [row("a"), row("b")]), tokenizer_dir)
    more = save(tmp_path / "b.jsonl", [row("b"), row("c")])
    dataset = run_capture(tmp_path / "d", more, tokenizer_dir, name="more")
    assert names(dataset) == ["a", "b", "c"] and reasons(dataset) == {"b": "id_twice"}
    with pytest.raises(DataError, match="already has a row with id 'b'"):
        run_capture(tmp_path / "d", more, tokenizer_dir, name="again")


CHATS = {
    "good": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}],
    "no role": [{"content": "the cat"}],
    "no content": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": None}],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
    "arguments": [{"role": "assistant", "tool_calls": [{"function": {"name": "w", "arguments": "{not json"}}]}],
    "call": [{"role": "assistant", "tool_calls": ["w"]}],
    "text": "not JSON",
    "object": {"role": "user"},
    "surrogate": [{"role": "user", "content": "\ud83d"}],
}


@pytest.mark.parametrize("make", [run_capture, run_generate])
def test_a_broken_chat_is_put_aside(tmp_path: Path, make: Callable[..., Dataset]) -> None:
    save_tokenizer(tmp_path / "t", chat_template=CHATML)
    corpus = save(tmp_path / "c.jsonl", [{"id": n, "domain": "d", "messages": m} for n, m in CHATS.items()])
    dataset = make(tmp_path / "d", corpus, tmp_path / "t", reading={"messages_column": "messages"})
    assert [name.partition("~")[0] for name in names(dataset)] == ["good"]
    expected = dict.fromkeys(CHATS, "chat") | {"surrogate": "not_text"}
    del expected["good"]
    assert reasons(dataset) == expected


# -------------------------------------------------------------------------------------------- the teacher's numbers

BAD_TEXT = "def add"


class Broken(StandInTeacher):
    """A stand-in whose numbers are wrong for texts that begin with BAD_TEXT.

    Args:
        fault: nan (as the reduction reports it), -inf (an actual token has probability 0), or nothing (not recorded).
        everywhere: for all texts.
    """

    def __init__(self, fault: str, tokenizer: Any, *, everywhere: bool = False) -> None:
        super().__init__()
        self._fault, self._everywhere = fault, everywhere
        self._bad = tokenizer(BAD_TEXT)["input_ids"]

    def readout(self, ids: np.ndarray, keep: KeepConfig, start: int = 1) -> Any:
        readout = super().readout(ids, keep, start)
        if not self._everywhere and list(ids[: len(self._bad)]) != self._bad:
            return readout
        if self._fault == "nan":
            raise DistributionError("the teacher's logits hold NaN or infinity")
        if self._fault == "-inf":
            readout.logprob[-1] = -np.inf
        elif self._fault == "tail":
            readout.kept.logprobs[-1] = np.nan
        else:
            readout.rank[-1] = 0
        return readout


TEACHER_FAULTS = {"nan": "not_finite", "-inf": "not_finite", "tail": "not_finite", "nothing": "teacher_failed"}


@pytest.mark.parametrize("unit", [1, 1000])
@pytest.mark.parametrize("make", [run_capture, run_generate])
@pytest.mark.parametrize("fault", TEACHER_FAULTS)
def test_a_row_for_which_the_teacher_has_no_numbers_is_put_aside(
    tmp_path: Path, tokenizer_dir: Path, fault: str, make: Callable[..., Dataset], unit: int
) -> None:
    rows = [row("bad", f"{BAD_TEXT}(a, b)"), row("a"), row("b")]
    corpus, teacher = save(tmp_path / "c.jsonl", rows), Broken(fault, load_tokenizer(tokenizer_dir))
    size = {"unit_tokens": unit} if make is run_capture else {"unit_prompts": unit}
    dataset = make(tmp_path / "d", corpus, tokenizer_dir, teacher=teacher, **size)
    assert [name.partition("~")[0] for name in names(dataset)] == ["a", "b"]
    assert list(reasons(dataset).values()) == [TEACHER_FAULTS[fault]]
    with pytest.raises(DataError, match=r"row 'bad.* cannot be used"):
        make(tmp_path / "e", corpus, tokenizer_dir, teacher=teacher, strict=True, **size)


@pytest.mark.parametrize("fault", ["nan", "-inf"])
@pytest.mark.parametrize("unit_tokens", [1, 1000])
def test_a_teacher_without_numbers_for_any_row_is_an_error(
    tmp_path: Path, tokenizer_dir: Path, fault: str, unit_tokens: int
) -> None:
    corpus = save(tmp_path / "c.jsonl", [row(f"r{n}") for n in range(20)])
    teacher = Broken(fault, load_tokenizer(tokenizer_dir), everywhere=True)
    with pytest.raises(TeacherError, match="so the rows are not at fault; check"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, teacher=teacher, unit_tokens=unit_tokens)
    assert teacher.calls < 30
    one = save(tmp_path / "one.jsonl", [row("r")])
    for _ in range(2):  # neither at once, nor where the unit is there already
        with pytest.raises(TeacherError, match="not given usable numbers for any of 1 rows"):
            run_capture(tmp_path / "e", one, tokenizer_dir, teacher=teacher)


@pytest.mark.parametrize("fault", ["nan", "-inf"])
def test_a_row_that_a_second_teacher_cannot_read_is_put_aside(tmp_path: Path, tokenizer_dir: Path, fault: str) -> None:
    corpus = save(tmp_path / "c.jsonl", [row("bad", f"{BAD_TEXT}(a, b)"), row("a")])
    first, tokenizer = run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=1), load_tokenizer(tokenizer_dir)
    engine = LocalEngine(Broken(fault, tokenizer), tokenizer)
    second = reread_with(tmp_path / "out", engine, first)
    assert names(second) == ["a"] and reasons(second) == {"bad": "not_finite"}
    with pytest.raises(DataError, match="row 'bad' cannot be used"):
        reread_with(tmp_path / "strict", engine, first, {"strict": True})


def test_arrays_that_do_not_belong_together_are_an_error_and_ids_beyond_the_head_a_reject() -> None:
    ids = np.array([0, 5, 6], np.int32)
    sequence = InputSequence("a", "d", ids, np.array([False, True, True]), "the cat")
    [readout] = StandInTeacher().read([ids], KeepConfig(kind="topk", k=4))
    whole = sequence.record(readout)

    def outcome(**changes: Any) -> Record | Reject:
        return outcome_of(readout, lambda _: replace(whole, **changes), "a", "d", VOCAB)

    assert isinstance(outcome(), Record)
    with pytest.raises(DataError, match="a: rank has 2 values for 3 tokens"):
        outcome(rank=whole.rank[:-1])
    assert outcome(token_ids=ids + VOCAB) == Reject(
        "a", "d", "teacher_failed", f"a: a token id lies outside [0, {VOCAB})"
    )


@pytest.mark.parametrize("kind", ["topk", "hybrid", "adaptive", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_real_model_that_gives_no_number_for_one_row(
    tmp_path: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: str, value: float
) -> None:
    """The logit of one id is broken after a prefix that one text has."""
    import torch

    tokenizer = load_tokenizer(llama_dir)
    bad = tokenizer("def add(a, b)")["input_ids"]

    class BrokenHead(transformers_teacher.TransformersTeacher):
        def __init__(self, config: TeacherConfig) -> None:
            super().__init__(config)
            self._model.register_forward_hook(self._break, with_kwargs=True)

        @staticmethod
        def _break(_: Any, arguments: Any, keywords: Any, output: Any) -> Any:
            ids = arguments[0] if arguments else keywords["input_ids"]
            for number, own in enumerate(ids):
                if own[: len(bad)].tolist() == bad:
                    output.logits[number, 2, bad[3]] = torch.tensor(value)
            return output

    monkeypatch.setattr(transformers_teacher, "TransformersTeacher", BrokenHead)
    corpus = save(tmp_path / "c.jsonl", [row("bad", "def add(a, b)"), row("a"), row("b", "the dog")])
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind=kind, k=8, unit_tokens=1)
    dataset = capture(tmp_path / "d", config, TeacherConfig(model=str(llama_dir), backend="transformers"))
    assert names(dataset) == ["a", "b"] and reasons(dataset) == {"bad": "not_finite"}


def test_a_token_that_the_head_lacks_spoils_its_own_row_only(tmp_path: Path) -> None:
    """Such as a pad token that was added to the tokenizer and not to the model."""
    llama = save_llama(tmp_path / "llama")
    tokenizer = load_tokenizer(llama)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(llama)
    rows = [row("a"), row("pad", "the [PAD] cat"), row("b")]
    who = TeacherConfig(model=str(llama), backend="transformers")
    corpus = CorpusConfig(path=str(save(tmp_path / "c.jsonl", rows)))
    dataset = capture(tmp_path / "d", CaptureConfig(corpus=corpus, kind="hybrid", k=8), who)
    assert names(dataset) == ["a", "b"] and reasons(dataset) == {"pad": "vocabulary"}
    written = run_generate(tmp_path / "g", tmp_path / "c.jsonl", llama)
    assert written.num_rows == 2 and reasons(written) == {"pad": "vocabulary"}


# ------------------------------------------------------------------------------------------------------- the command


def lists(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "input_ids": [10, 20, 30],
        "topk_ids": [[], [20, 21], [30, 31]],
        "topk_logprobs": [[], [-0.5, -1.5], [-0.1, -4.0]],
        **changes,
    }


PEER_FAULTS = {
    "a": (lists("a", input_ids=[10, 20, 31]), "id_twice"),
    "entry": (lists("entry", topk_ids=[[], [20, 20], [30, 31]]), "twice"),
    "nan": (lists("nan", topk_logprobs=[[], [-0.5, float("nan")], [-0.1, -4.0]]), "not_finite"),
    "big": (lists("big", input_ids=[10, 20, 9000]), "vocabulary"),
    "negative": (lists("negative", topk_ids=[[], [20, -1], [30, 31]]), "vocabulary"),
    "shorter": (lists("shorter", topk_ids=[[], [20], [30, 31]]), "misaligned"),
    "mask": (lists("mask", target_mask=[True]), "misaligned"),
    "first": (lists("first", topk_ids=[[1], [20], [30]], topk_logprobs=[[-1.0], [-0.5], [-0.1]]), "misaligned"),
    "none": (lists("none", input_ids=None, topk_ids=None, topk_logprobs=None), "no_targets"),
}


def test_rows_of_another_tool_that_cannot_be_used_are_put_aside(tmp_path: Path) -> None:
    source = save(tmp_path / "rows.jsonl", [lists("a"), *(bad for bad, _ in PEER_FAULTS.values()), lists("z")])
    dataset, report = import_dataset(source, tmp_path / "d", ImportConfig(format="plain", vocab_size=8192))
    assert names(dataset) == ["a", "z"]
    assert reasons(dataset) == {name: reason for name, (_, reason) in PEER_FAULTS.items()}
    assert report.rows == 2 and report.tokens == 6, "what is put aside is not counted"
    with pytest.raises(DataError, match="cannot be used"):
        import_dataset(source, tmp_path / "e", ImportConfig(format="plain", vocab_size=8192, strict=True))
    with pytest.raises(DataError, match=r"not one row could be imported. Row 'big'"):
        only = save(tmp_path / "only.jsonl", [PEER_FAULTS["big"][0]])
        import_dataset(only, tmp_path / "f", ImportConfig(format="plain", vocab_size=8192))


def test_the_last_line_of_a_command_counts_rejects_and_says_where_they_are(tmp_path: Path, llama_dir: Path) -> None:
    rows = [row("a"), row("b", ""), row("c", " "), row("a", "again"), row("d", "the dog")]
    corpus, root = save(tmp_path / "c.jsonl", rows), tmp_path / "d"
    teacher = ("--teacher", llama_dir, "--backend", "transformers", "--kind", "hybrid", "--k", 8)

    def call(*arguments: object) -> tuple[int, str]:
        result = RUNNER.invoke(app, [str(a) for a in arguments])
        return result.exit_code, result.stdout.splitlines()[-1] if result.exit_code == 0 else str(result.exception)

    expected = f"3 rejected: 2 no text, 1 id twice (written to {root}/rejects)"
    assert call("capture", root, *teacher, "--corpus", corpus) == (0, expected)
    assert call("capture", root, *teacher, "--corpus", corpus) == (0, expected), "those of the first run"
    assert call("reread", root, tmp_path / "second", *teacher) == (0, "0 rejected")
    out = tmp_path / "written"
    prompts = ("--prompts", corpus, "--text-column", "text", "--max-tokens", 2)
    assert call("generate", out, *teacher, *prompts) == (0, f"1 rejected: 1 id twice (written to {out}/rejects)")
    peer = save(tmp_path / "peer.jsonl", [lists("a"), lists("a")])
    status, line = call("import", peer, tmp_path / "imported", "--format", "plain", "--vocab-size", 100)
    assert (status, line) == (0, f"1 rejected: 1 id twice (written to {tmp_path}/imported/rejects)")
    status, output = call("capture", tmp_path / "e", *teacher, "--corpus", corpus, "--strict")
    assert status == 1 and "row 'b' cannot be used (no text)" in output
    status, output = call("capture", root, *teacher, "--corpus", corpus, "--set", "strict=true")
    assert status == 1 and "cannot be used" in output, "rejects of an earlier run count too"
    assert kdata.open(root).info.sources["capture"].settings.keys() >= {"corpus", "k"}
    assert "strict" not in kdata.open(root).info.sources["capture"].settings


def test_rejects_are_counted_the_most_frequent_first() -> None:
    assert rejected_text({}) == "0 rejected"
    assert rejected_text({"id_twice": 1, "empty": 2_000}) == "2,001 rejected: 2,000 no text, 1 id twice"
    assert rejected_text({"some_reason": 1}) == "1 rejected: 1 some reason"
