"""Generation: only what was written counts, and the same settings write the same rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.generate import GenerateConfig, sample_seed
from kdata.teachers import SamplingConfig, load_tokenizer
from tests.fakes import EOS, StandInTeacher, digests, run_generate

PROMPTS = [
    {"id": f"p{n}", "domain": "d", "text": text} for n, text in enumerate(["the cat", "def add", "🙂", "naïve", "日本"])
]


@pytest.fixture
def prompts(jsonl: Callable[..., Path]) -> Path:
    return jsonl(PROMPTS)


def test_the_prompt_is_stored_but_only_the_completion_counts(
    tmp_path: Path, prompts: Path, tokenizer_dir: Path
) -> None:
    dataset, teacher = run_generate(tmp_path / "d", prompts, tokenizer_dir), StandInTeacher()
    tokenizer = load_tokenizer(tokenizer_dir)
    assert dataset.index(["id"])["id"].to_pylist() == [f"p{n}~0" for n in range(5)]
    for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True):
        begin = len(tokenizer(row["prompt"])["input_ids"])
        assert sequence.token_ids[:begin].tolist() == tokenizer(row["prompt"])["input_ids"]
        assert not sequence.target_mask[:begin].any() and sequence.target_mask[begin:].all()
        assert (sequence.num_kept[:begin] == 0).all() and np.isnan(sequence.logprob[:begin]).all()
        assert row["text"].startswith(row["prompt"])
        dense = teacher.dense(sequence.token_ids)
        own = dense[np.arange(len(dense)), sequence.token_ids][begin:]
        np.testing.assert_allclose(sequence.logprob[begin:], own, rtol=2**-10)
        assert row["nll"] == pytest.approx(-own.mean(), rel=1e-5)
        ended = bool(sequence.token_ids[-1] == EOS)
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or row["num_target_tokens"] == 12


def test_samples_are_reproducible_and_differ_from_each_other(
    tmp_path: Path, prompts: Path, tokenizer_dir: Path
) -> None:
    first = run_generate(tmp_path / "a", prompts, tokenizer_dir, num_samples=3)
    run_generate(tmp_path / "b", prompts, tokenizer_dir, num_samples=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert first.index(["id"])["id"].to_pylist()[:4] == ["p0~0", "p0~1", "p0~2", "p1~0"]
    texts = first.index(["text"])["text"].to_pylist()
    assert len(set(texts[:3])) == 3
    other = run_generate(tmp_path / "c", prompts, tokenizer_dir, num_samples=3, seed=1)
    assert other.index(["text"])["text"].to_pylist() != texts


def test_a_sample_does_not_depend_on_its_neighbours(
    tmp_path: Path, prompts: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    every = run_generate(tmp_path / "a", prompts, tokenizer_dir)
    alone = run_generate(tmp_path / "b", jsonl(PROMPTS[3:4], "one.jsonl"), tokenizer_dir)
    row = int(every.rows_of(["p3~0"])[0])
    np.testing.assert_array_equal(every[row].token_ids, alone[0].token_ids)
    assert len({sample_seed(0, "p", 0), sample_seed(0, "p", 1), sample_seed(1, "p", 0), sample_seed(0, "q", 0)}) == 4


def test_a_prompt_without_room_or_tokens_is_rejected(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    from tests.fakes import save_tokenizer

    save_tokenizer(tmp_path / "bare", bos=False)
    rows = [
        {"id": "long", "domain": "d", "text": "the cat " * 60},
        {"id": "none", "domain": "d", "text": ""},
        PROMPTS[0],
    ]
    dataset = run_generate(tmp_path / "d", jsonl(rows), tmp_path / "bare")
    assert dataset.index(["id"])["id"].to_pylist() == ["p0~0"]
    reasons = {row["id"]: row for row in dataset.sql("select * from rejects").to_pylist()}
    assert reasons["long"]["reason"] == "too_long" and "leave room to write" in reasons["long"]["detail"]
    assert reasons["none"]["reason"] == "empty"
    room = run_generate(
        tmp_path / "e",
        jsonl([{"id": "x", "domain": "d", "text": "the cat " * 20}]),
        tokenizer_dir,
        sampling=SamplingConfig(max_tokens=30, min_tokens=30),
    )
    assert room.num_rows == 0


def test_greedy_is_the_most_probable_token_every_time(tmp_path: Path, prompts: Path, tokenizer_dir: Path) -> None:
    dataset = run_generate(tmp_path / "d", prompts, tokenizer_dir, sampling=SamplingConfig(temperature=0, max_tokens=4))
    for sequence in dataset:
        assert (sequence.rank[sequence.target_mask] == 1).all()


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_tokens 9 exceeds max_tokens 8"):
        parse_config(
            GenerateConfig,
            {"prompts": {"path": "x"}, "sampling": {"max_tokens": 8, "min_tokens": 9}},
            "generate settings",
        )


def test_capture_and_generation_share_a_dataset(
    tmp_path: Path, prompts: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    from tests.fakes import run_capture

    run_generate(tmp_path / "d", prompts, tokenizer_dir)
    run_capture(tmp_path / "d", corpus_file, tokenizer_dir)
    counts = kdata.open(tmp_path / "d").sql("select source, count(*) as n from rows group by all order by all")
    assert counts.to_pylist() == [{"source": "capture", "n": 25}, {"source": "generate", "n": 5}]
