"""vLLM's own JSON: every form of it gives the same rows, and what is wrong in a row makes it a reject."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError
from kdata.pipelines.cli.main import call
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.share.interchange.rows import ImportReport, RowError, place
from kdata.share.interchange.source import PeerFile
from kdata.share.interchange.vllm_json import read_rows
from tests.fakes import write_jsonl

TOKENS = [10, 20, 30]
LISTS = [None, {20: -0.5, 21: -1.5}, {30: -0.1, 31: -4.0}]


def entries(lists: list[dict[int, float] | None]) -> list[Any]:
    """Lists as vLLM writes them in JSON."""
    return [
        part and {str(key): {"logprob": value, "rank": 1, "decoded_token": "x"} for key, value in part.items()}
        for part in lists
    ]


OUTPUT = {"request_id": "a", "prompt": "t", "prompt_token_ids": TOKENS, "prompt_logprobs": entries(LISTS)}
CHOICE = {"prompt_token_ids": TOKENS, "prompt_logprobs": entries(LISTS)}
FLAT = {
    "start_indices": [0, 0, 2], "end_indices": [0, 2, 4], "token_ids": [20, 21, 30, 31], "logprobs": [-0.5, -1.5, -0.1, -4.0],
    "ranks": [1, 2, 1, 2], "decoded_tokens": [None] * 4,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "engine": OUTPUT,
    "no first null": {**OUTPUT, "prompt_logprobs": OUTPUT["prompt_logprobs"][1:]},  # type: ignore[index]
    "plain numbers": {**OUTPUT, "prompt_logprobs": [None, {"20": -0.5, "21": -1.5}, {"30": -0.1, "31": -4}]},
    "flat": {**OUTPUT, "prompt_logprobs": FLAT},
    "chat": {"id": "a", "choices": [{"message": {"content": "w"}}], "prompt_text": "t", **CHOICE},
    "completions": {"id": "a", "choices": [{"index": 0, "text": "w", **CHOICE}], "text": "t"},
}


def imported(folder: Path, rows: list[Any], **options: Any) -> tuple[kdata.Dataset, ImportReport]:
    source = write_jsonl(folder / "dump.jsonl", rows)
    return import_dataset(source, folder / "d", ImportConfig(format="vllm", vocab_size=100, **options))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_row(tmp_path: Path, form: str) -> None:
    dataset, _ = imported(tmp_path, [FORMS[form]])
    row = dataset[0]
    assert (row.id, row.text, row.token_ids.tolist()) == ("a", "t", TOKENS) and not dataset.rejected()
    assert row.num_kept.tolist() == [0, 2, 2] and row.target_mask.tolist() == [False, True, True]
    assert dataset.take(np.array([0])).entry_ids.tolist() == [20, 21, 30, 31]
    np.testing.assert_allclose(dataset.take(np.array([0])).entry_logprobs, [-0.5, -1.5, -0.1, -4.0], rtol=1e-6)
    assert verify(dataset, deep=True) == [] and dataset.info.teacher.backend == "imported from vllm"
    np.testing.assert_allclose(row.logprob, [np.nan, -0.5, -0.1], rtol=2**-10)  # float16
    assert row.rank.tolist() == ([0, 0, 0] if form == "plain numbers" else [0, 1, 1])
    assert dataset.index(["nll"])["nll"].to_pylist() == [pytest.approx(0.3, rel=2**-10)]


def test_an_actual_token_behind_the_top_has_the_rank_that_vllm_gave_it(tmp_path: Path) -> None:
    lists = [
        None,
        {"5": {"logprob": -0.1, "rank": 1}, "20": {"logprob": -6.0, "rank": 77}},
        {"6": {"logprob": -0.2, "rank": 1}, "30": {"logprob": -9999.0, "rank": 99}},
    ]
    dataset, report = imported(tmp_path, [{**OUTPUT, "prompt_logprobs": lists}])
    assert dataset[0].rank.tolist() == [0, 77, 0] and dataset[0].logprob[1] == -6 and np.isnan(dataset[0].logprob[2])
    assert dataset.index(["nll"])["nll"].to_pylist() == [None]  # a probability of 0 is the server's rounding
    assert verify(dataset, deep=True) == [] and report.actual == 1 and "rank" not in " ".join(report.lines("keep"))


@pytest.mark.parametrize("rank", [True, 0, -1, 2**40, "1", None, 1.5, []])
def test_what_is_no_rank_is_not_known(tmp_path: Path, rank: Any) -> None:
    lists = [None, *({str(token): {"logprob": -0.1, "rank": rank}} for token in TOKENS[1:])]
    dataset, _ = imported(tmp_path, [{**OUTPUT, "prompt_logprobs": lists}])
    assert dataset[0].rank.tolist() == [0, 0, 0] and np.isfinite(dataset[0].logprob[1:]).all()


def test_several_choices_are_several_rows(tmp_path: Path) -> None:
    dataset, _ = imported(tmp_path, [{"id": "r", "choices": [CHOICE, CHOICE]}])
    assert dataset.index()["id"].to_pylist() == ["r-0", "r-1"]


def test_the_server_s_stand_in_for_minus_infinity_is_no_entry(tmp_path: Path) -> None:
    lists = [None, {20: -0.5, 21: -9999.0}, {30: -0.1, 31: -math.inf}]
    dataset, report = imported(tmp_path, [{**OUTPUT, "prompt_logprobs": entries(lists)}])
    assert report.padding_entries == 2 and dataset[0].num_kept.tolist() == [0, 1, 1]


def test_vllm_s_own_classes_give_this_json() -> None:
    """The names of the fields are those of the installed vLLM."""
    logprobs = pytest.importorskip("vllm.logprobs")
    assert {"logprob", "rank"} <= set(asdict(logprobs.Logprob(-0.5)))
    flat = logprobs.FlatLogprobs()
    flat.append(None)
    flat.append({20: logprobs.Logprob(-0.5, 1), 21: logprobs.Logprob(-1.5, 2)})
    flat.append({30: logprobs.Logprob(-0.1, 1), 31: logprobs.Logprob(-4.0, 2)})
    assert asdict(flat) == FLAT


BAD: list[tuple[str, Any, str]] = [
    ("no ids", {"id": "x", "prompt_logprobs": []}, "no_token_ids"),
    ("ids are text", {**OUTPUT, "prompt_token_ids": "1 2 3"}, "form"),
    ("an id is text", {**OUTPUT, "prompt_token_ids": [10, "20", 30]}, "vocabulary"),
    ("an id is true", {**OUTPUT, "prompt_token_ids": [10, True, 30]}, "vocabulary"),
    ("an id is beyond int32", {**OUTPUT, "prompt_token_ids": [10, 2**40, 30]}, "vocabulary"),
    ("an id is beyond the vocabulary", {**OUTPUT, "prompt_token_ids": [10, 20, 30, 500],
                                        "prompt_logprobs": entries([*LISTS, {500: -1.0}])}, "vocabulary"),
    ("no log-probabilities", {**OUTPUT, "prompt_logprobs": None}, "no_logprobs"),
    ("no choices", {"id": "x", "choices": []}, "no_token_ids"),
    ("a choice is a number", {"id": "x", "choices": [3]}, "no_token_ids"),
    ("lists are text", {**OUTPUT, "prompt_logprobs": "x"}, "form"),
    ("a list is a number", {**OUTPUT, "prompt_logprobs": [None, 3, 4]}, "form"),
    ("a key is a word", {**OUTPUT, "prompt_logprobs": [None, {"the": -1.0}, None]}, "vocabulary"),
    ("a key is very long", {**OUTPUT, "prompt_logprobs": [None, {"9" * 9999: -1.0}, None]}, "vocabulary"),
    ("a key in two forms", {**OUTPUT, "prompt_logprobs": [None, {"20": -1.0, "020": -2.0}, None]}, "twice"),
    ("a value is text", {**OUTPUT, "prompt_logprobs": [None, {"20": {"logprob": "-1"}}, None]}, "form"),
    ("a value is missing", {**OUTPUT, "prompt_logprobs": [None, {"20": {}}, None]}, "form"),
    ("a value is not a number", {**OUTPUT, "prompt_logprobs": [None, {"20": math.nan}, None]}, "not_finite"),
    ("a value is infinite", {**OUTPUT, "prompt_logprobs": [None, {"20": math.inf}, None]}, "not_finite"),
    ("a value is an integer beyond floats", {**OUTPUT, "prompt_logprobs": [None, {"20": 10**400}, None]}, "not_finite"),
    ("too few lists", {**OUTPUT, "prompt_token_ids": [10, 20, 30, 40, 50]}, "misaligned"),
    ("too many lists", {**OUTPUT, "prompt_logprobs": entries([*LISTS, {1: -1.0}])}, "misaligned"),
    ("lists of the next token", {**OUTPUT, "prompt_logprobs": entries([None, LISTS[2], LISTS[1]])}, "misaligned"),
    ("a list of the first token", {**OUTPUT, "prompt_logprobs": entries([{10: -1.0}, *LISTS[1:]])}, "misaligned"),
    ("one token", {**OUTPUT, "prompt_token_ids": [10], "prompt_logprobs": [None]}, "no_targets"),
    ("flat without ids", {**OUTPUT, "prompt_logprobs": {**FLAT, "token_ids": None}}, "form"),
    ("flat with a part outside", {**OUTPUT, "prompt_logprobs": {**FLAT, "end_indices": [0, 2, 9]}}, "form"),
    ("flat with text as edges", {**OUTPUT, "prompt_logprobs": {**FLAT, "end_indices": ["0", 2, 4]}}, "form"),
    ("not an object", [1, 2], "not_json"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), [(row, reason) for _, row, reason in BAD], ids=[name for name, _, _ in BAD])
def test_a_bad_row_is_a_reject_and_the_others_are_imported(tmp_path: Path, row: Any, reason: str) -> None:
    good = {**OUTPUT, "request_id": "good"}
    dataset, _ = imported(tmp_path, [row, good])
    assert dataset.index()["id"].to_pylist() == ["good"] and dataset.rejected() == {reason: 1}
    assert dataset.sql("select reason from rejects")["reason"].to_pylist() == [reason]


@pytest.mark.parametrize("line", ["{", "[" * 100_000, '{"a": 1} x', "\x00"])
def test_a_line_that_is_not_json_is_a_reject(tmp_path: Path, line: str) -> None:
    (tmp_path / "dump.jsonl").write_text(f"{line}\n{json.dumps(OUTPUT)}\n\n")
    config = ImportConfig(format="vllm", vocab_size=100)
    dataset, _ = import_dataset(tmp_path / "dump.jsonl", tmp_path / "d", config)
    assert dataset.num_rows == 1 and dataset.rejected() == {"not_json": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["20", 20, 10]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*OUTPUT, *FLAT, "20", "choices"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(tokens=JSON, lists=JSON, rest=JSON)
def test_whatever_stands_in_a_line_it_is_a_row_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, tokens: Any, lists: Any, rest: Any
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    write_jsonl(file, [{"prompt_token_ids": tokens, "prompt_logprobs": lists, "x": rest}, rest, {"choices": rest}])
    for row in read_rows([PeerFile.of(file)]):
        try:
            assert len(place(row, "with", 100, "keep")[0].token_ids) >= 2
        except RowError as error:
            assert error.reason


def test_a_json_file_holds_one_answer_or_a_list_of_them(tmp_path: Path) -> None:
    for number, content in enumerate((OUTPUT, [OUTPUT, {**OUTPUT, "request_id": "b"}])):
        (tmp_path / "answer.json").write_text(json.dumps(content, indent=1))
        config = ImportConfig(format="vllm", vocab_size=100)
        dataset, _ = import_dataset(tmp_path / "answer.json", tmp_path / f"d{number}", config)
        assert dataset.num_rows == number + 1
    with pytest.raises(ConfigError, match=r"has no \.parquet or \.jsonl file"):
        import_dataset(tmp_path / "answer.json", tmp_path / "e", ImportConfig(format="plain", vocab_size=100))


def test_the_command_imports_it_and_counts_rejects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "dump.jsonl", [OUTPUT, {"request_id": "b"}])
    assert call(["import", str(file), str(tmp_path / "d"), "--format", "vllm", "--vocab-size", "100"]) == 0
    assert "1 rejected: 1 no token ids" in capsys.readouterr().out
