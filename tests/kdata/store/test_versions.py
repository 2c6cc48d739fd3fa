"""Versions of the codec packed side by side: an older kdata's data goes on, and is combined with what a newer one wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import DataError
from kdata.jobs.combine import CombineConfig, combine
from kdata.jobs.job import LocalEngine
from kdata.jobs.reread import reread_with
from kdata.share.arrange import head, merge, split
from kdata.store.dataset import Dataset
from kdata.teachers.model import load_tokenizer
from tests.fakes import StandInTeacher, codec_version, digests, run_capture

KINDS: list[dict[str, Any]] = [
    {"kind": "topk", "k": 6},
    {"kind": "hybrid", "k": 4, "num_draws": 9, "temperatures": [2.0]},
    {"kind": "hybrid", "k": 4, "num_draws": 9, "tau": 0.8},
    {"kind": "sampled", "num_draws": 12, "positions": {"rule": "random", "share": 0.5}},
]
NUMBERS = ("token_ids", "target_mask", "rank", "log_tail", "num_kept", "num_exact", "entry_ids", "entry_logprobs")


def version_of(settings: dict[str, Any]) -> int:
    return 2 if "positions" in settings else 1


def rows_of(dataset: Dataset) -> dict[str, dict[str, np.ndarray]]:
    ids = dataset.index(["id"])["id"].to_pylist()
    return {
        name: {field: np.asarray(getattr(row, field)) for field in (*NUMBERS, "logprob", "entropy")}
        for name, row in zip(ids, dataset, strict=True)
    }


def same_rows(actual: Dataset, *parts: Dataset) -> None:
    """Every row is that of its part: to the bit, but for numbers that an earlier version keeps in float16."""
    expected = {name: row for part in parts for name, row in rows_of(part).items()}
    found = rows_of(actual)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        for field in NUMBERS:
            np.testing.assert_array_equal(row[field], expected[name][field], f"{name} {field}")
        for field in ("logprob", "entropy"):
            np.testing.assert_allclose(row[field], expected[name][field], rtol=2**-11)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: f"{s['kind']}{s.get('tau', '')}")
def test_a_dataset_goes_on_with_its_version(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, settings: dict[str, Any]
) -> None:
    """Stopped half-way and continued by today's kdata, it has the bytes of an older kdata's whole run."""

    def stop(call: int) -> None:
        if call > 1:
            raise InterruptedError

    with codec_version(version_of(settings)):
        whole = run_capture(tmp_path / "whole", corpus_file, tokenizer_dir, **settings)
        with pytest.raises(InterruptedError):
            run_capture(
                tmp_path / "d", corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=stop), **settings
            )
    assert 0 < len(kdata.open(tmp_path / "d").manifest) < len(whole.manifest)
    again = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, **settings)
    assert again.info.codec.version == version_of(settings)
    assert digests(again.path) == digests(whole.path)


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: f"{s['kind']}{s.get('tau', '')}")
@pytest.mark.parametrize("older_first", [True, False])
def test_datasets_of_two_versions_are_merged_without_rounding_again(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path, settings: dict[str, Any], older_first: bool
) -> None:
    texts = [{"id": f"r{n}", "domain": "d", "text": f"the cat sat on mat {n} and the dog {n % 3}"} for n in range(12)]
    first, second = jsonl(texts[:7], "first.jsonl"), jsonl(texts[7:], "second.jsonl")
    with codec_version(version_of(settings)):
        older = run_capture(tmp_path / "older", first, tokenizer_dir, **settings)
    newer = run_capture(tmp_path / "newer", second, tokenizer_dir, **settings)
    assert (older.info.codec.version, newer.info.codec.version) == (version_of(settings), 3)
    parts = [older, newer] if older_first else [newer, older]
    both = merge(parts, tmp_path / "both")
    assert both.info.codec.version == version_of(settings) and verify(both, deep=True) == []
    same_rows(both, *parts)
    linked = merge(parts, tmp_path / "linked", link=True)
    assert linked.content_digest == both.content_digest
    with pytest.raises(DataError, match="both have a row"):
        merge([both, newer], tmp_path / "no")
    some = head(both, tmp_path / "head", 9)
    assert verify(some, deep=True) == [] and some.num_rows == 9


@pytest.mark.parametrize("settings", KINDS, ids=lambda s: f"{s['kind']}{s.get('tau', '')}")
def test_parts_of_coded_data_are_its_rows_to_the_bit(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, settings: dict[str, Any]
) -> None:
    """Other shards have other common ids, so ids are coded anew; codes of numbers stay."""
    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, **settings)
    parts = list(split(dataset, tmp_path / "parts", by="domain").values())
    same_rows(merge(parts, tmp_path / "again"), dataset)
    for part in parts:
        assert verify(part, deep=True) == []
    whole = rows_of(dataset)
    for name, row in rows_of(merge(parts, tmp_path / "twice")).items():
        for field in ("logprob", "entropy"):
            np.testing.assert_array_equal(row[field], whole[name][field])


def test_rows_of_two_versions_are_combined(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    with codec_version(1):
        first = run_capture(tmp_path / "first", corpus_file, tokenizer_dir, k=4, num_draws=9)
    engine = LocalEngine(StandInTeacher("other"), load_tokenizer(tokenizer_dir))
    second = reread_with(tmp_path / "second", engine, first, {})
    assert second.info.codec.version == 3
    domains = sorted(set(first.index(["domain"])["domain"].to_pylist()))
    by_domain = {domain: [1.0, 0.0] if n % 2 else [0.0, 1.0] for n, domain in enumerate(domains)}
    chosen, report = combine(tmp_path / "chosen", [first, second], CombineConfig(by_domain=by_domain))
    assert report.lossless and chosen.info.codec.version == 1 and verify(chosen, deep=True) == []
    ours, theirs, found = rows_of(first), rows_of(second), rows_of(chosen)
    for row in first.index(["id", "domain"]).to_pylist():
        source = ours if by_domain[row["domain"]][0] else theirs
        for field in NUMBERS:
            np.testing.assert_array_equal(found[row["id"]][field], source[row["id"]][field])
    average, report = combine(tmp_path / "average", [first, second], CombineConfig())
    assert not report.lossless and average.info.codec.version == 3 and verify(average, deep=True) == []
