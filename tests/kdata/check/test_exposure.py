"""Exposure of canaries against brute force over a model whose distributions are known."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdata.check.exposure import BY_CHANCE, Canary, _exposure, exposures, read_canaries
from kdata.errors import ConfigError, DataError, KdataError, MissingError, TeacherError
from kdata.pipelines.cli.main import app
from kdata.teachers.model import load_tokenizer
from tests.fakes import StandInTeacher, write_jsonl

CANARY = {"id": "pin", "before": "the dog sat ", "secret": "42", "choices": "0123456789", "after": " on"}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


def dense_nll(teacher: StandInTeacher, ids: np.ndarray) -> float:
    """NLL of a sequence in float64 from the teacher's whole distributions."""
    dense_TV = teacher.dense(ids)
    return -float(sum(np.float64(dense_TV[t, ids[t]]) for t in range(1, len(ids))))


def test_exposure_is_that_of_a_loop_over_all_candidates(tokenizer: Any) -> None:
    teacher, canary = StandInTeacher("some"), Canary(**CANARY)
    [result] = exposures(teacher, tokenizer, [canary])
    nll = {
        f"{a}{b}": dense_nll(teacher, np.array(tokenizer(f"the dog sat {a}{b} on")["input_ids"], np.int32))
        for a in range(10)
        for b in range(10)
    }
    rank = 1 + sum(value < nll["42"] - 1e-6 for value in nll.values())
    assert result.rank == rank and result.space == result.compared == 100
    assert result.nll == pytest.approx(nll["42"], rel=1e-5)
    assert result.exposure == pytest.approx(math.log2(100) - math.log2(rank))


@given(st.integers(2, 400), st.data())
def test_ranks_of_all_secrets_of_a_space(size: int, data: Any) -> None:
    """The likeliest secret has log2 |R| bits, the least likely 0; their mean approaches log2 e from below."""
    canary = Canary(id="c", secret=["0"], choices=[str(n) for n in range(size)])
    nlls = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(size).astype(float)
    bits = [_exposure(canary, np.concatenate([nlls[n : n + 1], np.delete(nlls, n)])).exposure for n in range(size)]
    assert max(bits) == pytest.approx(math.log2(size)) and min(bits) == pytest.approx(0, abs=1e-12)
    assert np.mean(bits) == pytest.approx(np.mean([math.log2(size / rank) for rank in range(1, size + 1)]))
    assert np.mean(bits) < BY_CHANCE
    assert _exposure(canary, np.zeros(size)).rank == 1 + (size - 1) / 2


def test_of_a_large_space_candidates_are_drawn_each_once(tokenizer: Any) -> None:
    canary = Canary(**{**CANARY, "secret": "424242"})
    texts = canary.candidates(50, np.random.default_rng(0))
    assert len(set(texts)) == 50 and texts[0] == "the dog sat 424242 on" and canary.space == 10**6
    [result] = exposures(StandInTeacher(), tokenizer, [canary], most=50)
    assert result.compared == 50 and result.exposure <= math.log2(50)
    parts = Canary(id="w", secret=["red", " dog"], choices=[["red", "blue"], [" dog", " cat", " fox"]])
    assert sorted(parts.candidates(9, np.random.default_rng(0))) == sorted(
        a + b for a in ("red", "blue") for b in (" dog", " cat", " fox")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"secret": "4x"}, "not among its choices"),
        ({"choices": [["1", "4"]]}, "choices are of 1 parts, the secret has 2"),
        ({"choices": "4422"}, "a choice is there twice"),
        ({"secret": "4", "choices": "4"}, "the only candidate"),
        ({"secret": ""}, "the secret is empty"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_line_that_is_no_canary_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{**CANARY, "id": "fine"}, {**CANARY, **change}])
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        read_canaries(path)


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85"])
def test_lines_end_at_newlines_only(inside: str, tmp_path: Path) -> None:
    """JSON strings may hold other line separators as they are."""
    canaries = [{**CANARY, "id": name, "before": f"line{inside}two "} for name in ("one", "two")]
    path, text = tmp_path / "c.jsonl", "\r\n".join(json.dumps(one, ensure_ascii=False) for one in canaries)
    path.write_bytes(text.encode())
    assert [canary.before for canary in read_canaries(path)] == [f"line{inside}two "] * 2


def test_bad_files_and_models_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        read_canaries(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DataError, match="no canary"):
        read_canaries(tmp_path / "empty")
    with pytest.raises(DataError, match="there twice"):
        read_canaries(write_jsonl(tmp_path / "twice.jsonl", [CANARY, CANARY]))
    canary = Canary(**CANARY)
    with pytest.raises(ConfigError, match="2 or more"):
        exposures(StandInTeacher(), tokenizer, [canary], most=1)
    with pytest.raises(ConfigError, match="shorten `before`"):
        exposures(StandInTeacher(), tokenizer, [Canary(**{**CANARY, "before": "the dog " * 99})])

    class Broken(StandInTeacher):
        def read(self, *arguments: Any) -> Any:
            readouts = super().read(*arguments)
            readouts[3].logprob[1] = np.nan
            return readouts

    with pytest.raises(TeacherError, match="not finite"):
        exposures(Broken(), tokenizer, [canary])


def test_the_command_compares_models(llama_dir: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "c.jsonl", [CANARY, {**CANARY, "id": "other", "secret": "07"}])
    done = CliRunner().invoke(app, ["exposure", str(llama_dir), str(llama_dir), "--canaries", str(file)])
    assert done.exit_code == 0, done.exception
    assert "pin" in done.output and "other" in done.output and "mean" in done.output and "1.44" in done.output
    done = CliRunner().invoke(
        app, ["exposure", str(llama_dir), "--canaries", str(file), "--candidates", "30", "--format", "json"]
    )
    [model] = json.loads(done.stdout)["models"]
    assert [canary["compared"] for canary in model["canaries"]] == [30, 30]
    assert model["mean"] == pytest.approx(np.mean([canary["exposure"] for canary in model["canaries"]]))


@pytest.mark.parametrize("lacks", ["folder", "config.json", "tokenizer.json"])
def test_all_models_are_checked_before_the_first_is_measured(
    lacks: str, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kdata.pipelines.cli.check.load_teacher", measured)
    second = tmp_path / "second"
    if lacks != "folder":
        shutil.copytree(llama_dir, second)
        (second / lacks).unlink()
    file = write_jsonl(tmp_path / "c.jsonl", [CANARY])
    done = CliRunner().invoke(app, ["exposure", str(llama_dir), str(second), "--canaries", str(file)])
    assert isinstance(done.exception, KdataError) and str(second) in str(done.exception)


def test_canaries_that_cannot_be_measured_are_refused_before_a_model_is_loaded(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one of the file has candidates of one token."""

    def measured(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("kdata.pipelines.cli.check.load_teacher", measured)
    bare = shutil.copytree(llama_dir, tmp_path / "bare")
    known = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(
        json.dumps({**known, "post_processor": None})
    )  # which puts a mark before texts
    short = {"id": "short", "secret": "4", "choices": "0123456789"}
    file = write_jsonl(tmp_path / "c.jsonl", [CANARY, short])
    done = CliRunner().invoke(app, ["exposure", str(bare), "--canaries", str(file)])
    assert isinstance(done.exception, DataError) and "'short' has a candidate of one token" in str(done.exception)
