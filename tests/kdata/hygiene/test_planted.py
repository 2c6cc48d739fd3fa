"""What is planted in documents is found, the small form of tests/benchmarks/hygiene.py; and groups depend on texts alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdata.corpus.corpus import CorpusConfig
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import inspect_corpus
from tests.benchmarks.planted import Planted, scores
from tests.fakes import write_jsonl


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("planted")
    source = Planted(seed=3, words=120)
    rows = list(source.documents(1_500))
    write_jsonl(folder / "corpus.jsonl", rows)
    write_jsonl(folder / "exam.jsonl", source.items)
    config = HygieneConfig(overlap={"exam": str(folder / "exam.jsonl")}, workers=1)
    inspect_corpus(CorpusConfig(path=str(folder / "corpus.jsonl")), config, folder / "columns.parquet")
    columns = pq.read_table(folder / "columns.parquet").to_pylist()
    return {"folder": folder, "rows": rows, "source": source, "columns": columns}


def test_what_was_planted_is_found(planted: dict[str, Any]) -> None:
    texts = {row["id"]: row["text"] for row in planted["rows"]}
    found = scores(planted["source"].truth, planted["columns"], texts)
    print(json.dumps({name: (s.planted, round(s.precision, 3), round(s.recall, 3)) for name, s in found.items()}))
    for name, score in found.items():
        assert score.planted > 20, name
        assert score.precision >= 0.98, (name, score)
        assert score.recall >= 0.95, (name, score)


def test_of_a_group_the_longest_row_is_kept(planted: dict[str, Any]) -> None:
    chars = {row["id"]: len(row["text"]) for row in planted["rows"]}
    groups: dict[str, list[str]] = {}
    for row in planted["columns"]:
        groups.setdefault(row["duplicates"]["near_id"], []).append(row["id"])
    assert any(len(own) > 2 for own in groups.values())
    for kept, own in groups.items():
        assert kept == min(own, key=lambda name: (-chars[name], name))
    for row in planted["columns"]:
        own = row["duplicates"]
        assert own["near_keep"] == (own["near_id"] == row["id"])
        assert own["near_rows"] == len(groups[own["near_id"]])


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_rows_changes_no_column(planted: dict[str, Any], tmp_path: Path, seed: int) -> None:
    rows = list(planted["rows"])
    random.Random(seed).shuffle(rows)
    write_jsonl(tmp_path / "corpus.jsonl", rows)
    config = HygieneConfig(overlap={"exam": str(planted["folder"] / "exam.jsonl")}, workers=1)
    inspect_corpus(CorpusConfig(path=str(tmp_path / "corpus.jsonl")), config, tmp_path / "columns.parquet")
    shuffled = {row["id"]: row for row in pq.read_table(tmp_path / "columns.parquet").to_pylist()}
    assert [shuffled[row["id"]] for row in planted["columns"]] == planted["columns"]


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORDS.map(" ".join), min_size=1, max_size=12), order=st.randoms(use_true_random=False))
def test_groups_are_connected_components_of_similar_texts(
    texts: list[str], order: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against brute force, with a threshold that every band finds: equal sets of runs of words."""
    import numpy as np
    import pyarrow as pa

    from kdata.hygiene.duplicates import Sketches, groups, sketch
    from kdata.hygiene.words import hashed, normal_form, words_of

    def grouped(names: list[int]) -> dict[int, tuple[str, str]]:
        folder = tmp_path_factory.mktemp("sketches")
        own = []
        for name in names:
            normal = normal_form(texts[name])
            own.append(sketch(normal, hashed(words_of(normal))[0]))
        files = Sketches(folder)
        for begin in range(0, len(own), 5):
            files.append(own[begin : begin + 5])
        files.close()
        counts = np.array([len(one.shingles) for one in own])
        ids = pa.array([f"{name:02d}" for name in names])
        chars = np.array([len(texts[name]) for name in names])
        columns = groups(ids, chars, files.read(counts), 1.0, lambda: None)
        values = zip(columns["exact_id"].to_pylist(), columns["near_id"].to_pylist(), strict=True)
        return dict(zip(names, values, strict=True))

    names = list(range(len(texts)))
    shuffled = list(names)
    order.shuffle(shuffled)
    result = grouped(names)
    assert result == grouped(shuffled)

    def kept(same: list[int]) -> str:
        return f"{min(same, key=lambda name: (-len(texts[name]), name)):02d}"

    def runs(text: str) -> frozenset[tuple[str, ...]]:
        words = text.split()
        return frozenset(tuple(words[a : a + 5]) for a in range(max(1, len(words) - 4))) if words else frozenset()

    for name in names:
        assert result[name][0] == kept([other for other in names if texts[other].split() == texts[name].split()])
        alike = [
            o for o in names if (runs(texts[o]) == runs(texts[name]) if texts[name].split() else not texts[o].split())
        ]
        assert result[name][1] == kept(alike)
