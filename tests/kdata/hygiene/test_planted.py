"""What is planted in documents is found, the small form of tests/benchmarks/hygiene.py; and groups depend on texts alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdata.corpus.corpus import CorpusConfig
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.duplicates import Sketches, groups, signatures, sketch
from kdata.hygiene.inspect import inspect_corpus
from kdata.hygiene.personal import personal_of
from kdata.hygiene.words import hashed, normal_form, words_of
from tests.benchmarks.planted import (
    ADDRESSES,
    Planted,
    Truth,
    addresses_told_apart,
    pairs_of_every_similarity,
    peer_scores,
    scores,
)
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


def grouped(
    texts: list[str], folder: Path, threshold: float, names: list[int] | None = None
) -> dict[int, tuple[str, str]]:
    """Kept rows of exact and near duplicates, by the number of a text; ids are these numbers with two digits."""
    names = list(range(len(texts))) if names is None else names
    normal = [normal_form(texts[name]) for name in names]
    own = [sketch(text, hashed(words_of(text))[0]) for text in normal]
    files = Sketches(folder)
    for begin in range(0, len(own), 5):
        part = own[begin : begin + 5]
        files.append(part, signatures([one.shingles for one in part]))
    files.close()
    counts = np.array([len(one.shingles) for one in own])
    ids, chars = pa.array([f"{name:02d}" for name in names]), pa.array([len(texts[name]) for name in names])
    columns = groups(ids, chars, files.read(counts), threshold, lambda: None)
    return dict(
        zip(names, zip(columns["exact_id"].to_pylist(), columns["near_id"].to_pylist(), strict=True), strict=True)
    )


def runs(text: str) -> frozenset[tuple[str, ...]]:
    """The runs of five words of a text, of a shorter one all its words."""
    some = text.split()
    return frozenset(tuple(some[a : a + 5]) for a in range(max(1, len(some) - 4))) if some else frozenset()


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_pairs_are_near_where_their_similarity_says_so(tmp_path: Path, threshold: float) -> None:
    """Pairs of every similarity: below the threshold none is joined, above it nearly all are."""
    rng = random.Random(5)
    texts = []
    for _ in range(400):
        some = [f"w{rng.randrange(10**6)}" for _ in range(150)]
        other = list(some)
        for place in rng.sample(range(150), rng.randint(0, 18)):
            other[place] = "x"
        texts += [" ".join(some), " ".join(other)]
    near = grouped(texts, tmp_path, threshold)
    similar = joined = 0
    for a, b in zip(range(0, 800, 2), range(1, 800, 2), strict=True):
        one, two = runs(texts[a]), runs(texts[b])
        is_similar = len(one & two) / len(one | two) >= threshold
        is_joined = near[a][1] == near[b][1]
        assert is_similar or not is_joined
        similar, joined = similar + is_similar, joined + is_joined
    assert 30 < similar < 370
    assert joined >= 0.97 * similar


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORDS.map(" ".join), min_size=1, max_size=12), order=st.randoms(use_true_random=False))
def test_groups_do_not_depend_on_the_order_of_rows(
    texts: list[str], order: random.Random, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against brute force, with a threshold for which every band finds what is equal: sets of runs of words."""
    names = list(range(len(texts)))
    shuffled = list(names)
    order.shuffle(shuffled)
    result = grouped(texts, tmp_path_factory.mktemp("sketches"), 1.0)
    assert result == grouped(texts, tmp_path_factory.mktemp("sketches"), 1.0, shuffled)

    def kept(same: list[int]) -> str:
        return f"{min(same, key=lambda name: (-len(texts[name]), name)):02d}"

    for name in names:
        assert result[name][0] == kept([other for other in names if texts[other] == texts[name]])
        assert result[name][1] == kept([other for other in names if runs(texts[other]) == runs(texts[name])])


def test_pairs_are_joined_from_the_threshold_on(tmp_path: Path) -> None:
    rows, similarity = pairs_of_every_similarity(60, 150)
    config = HygieneConfig(checks=["duplicates"], workers=1)
    inspect_corpus(CorpusConfig(path=str(write_jsonl(tmp_path / "c.jsonl", rows))), config, tmp_path / "c.parquet")
    group = {row["id"]: row["duplicates"]["near_id"] for row in pq.read_table(tmp_path / "c.parquet").to_pylist()}
    assert min(similarity.values()) < 0.6 and max(similarity.values()) > 0.9
    for (first, second), value in similarity.items():
        if not 0.79 < value < 0.86:  # signatures miss few pairs there
            assert (group[first] == group[second]) == (value > 0.8), value


def test_addresses_are_told_from_what_looks_like_one() -> None:
    found = [[(one.kind, text[one.start : one.end]) for one in personal_of(text)] for text, _ in ADDRESSES]
    own = sum(wanted is not None for _, wanted in ADDRESSES)
    assert addresses_told_apart(found) == (own, len(ADDRESSES) - own, [])
    worse = [[], [("email", "ürgen@firma.org")], *found[2:]]
    assert addresses_told_apart(worse) == (own - 2, len(ADDRESSES) - own, [text for text, _ in ADDRESSES[:2]])


def test_what_a_peer_finds_is_counted_as_what_kdata_finds() -> None:
    personal = {"a": [("email", "x@y.org"), ("phone", "+49 30 1234567")], "b": [("ip", "8.1.1.1")]}
    truth = Truth({"b": "a"}, {"c": "a"}, {"a": "q1", "b": "q2"}, personal, {"d": "de", "e": "fr"}, {"f"})
    finds = {
        "near": {"x": {"a": 1, "b": 1, "e": 2, "f": 2}},
        "language": {"d": "de", "e": "es"},
        "lines": ["e", "f"],
        "overlap": {"y": ["a", "c", "d"]},
        "personal": {"a": [["email", "x@y.org"]], "b": [["ip", "8.1.1.1"]], "c": [["ip", "9.1.1.1"]]},
    }
    found = peer_scores(truth, list("abcdef"), finds)
    near, groups, language, repetition = (
        found["near duplicates, x"],
        found["groups, x"],
        found["language"],
        found["repetition"],
    )
    assert (near.planted, near.found, near.both) == (3, 4, 2)
    assert (groups.planted, groups.both) == (6, 4)  # c is alone, and f is with e
    overlap, email, ip = found["documents of overlap: y"], found["personal data: email"], found["personal data: ip"]
    assert (overlap.planted, overlap.found, overlap.both) == (2, 3, 1)
    assert (email.precision, email.recall, ip.precision, ip.recall) == (1.0, 1.0, 0.5, 1.0)
    assert (language.recall, repetition.precision, repetition.recall) == (0.5, 0.5, 1.0)
