"""Overlap with named evaluation sets: runs of n words that a text shares with an item of a set.

A set is a file or folder that a corpus may be, too (JSON, Parquet, CSV); an item is a row, and each text in it, also inside
of lists and objects, is a field. n is that of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): the 5th percentile of
the items' lengths in words, at least 8 and at most 13; an item is as long as its longest field. A field with fewer words is
not searched for: it would be met everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdata.corpus.files import FileRows
from kdata.corpus.values import as_text
from kdata.errors import DataError
from kdata.format.compiled import compiled
from kdata.format.records import RowError
from kdata.hygiene.words import hashed, ngrams, normal_form, words_of

LEAST_WORDS, MOST_WORDS = 8, 13
FILTER_BITS = 22

# Of each set, behind its name and an underscore.
COLUMNS: dict[str, tuple[str, str]] = {
    "share": ("float32", "Share of the text's runs of n words that are in the set; 0 where the text is shorter."),
    "item": ("string", "The item of which most was found: its `id`, or else its row number; null where nothing was."),
    "item_share": ("float32", "Share of that item's runs of n words that are in the text; 0 where nothing was found."),
    "shown": ("string", "The first run of n words that is in the set, in normal form; null where none is."),
}


@dataclass(frozen=True)
class EvaluationSet:
    """The runs of words of a set.

    Attributes:
        n: words of a run.
        hashes: uint64 [H], rising, of every run.
        starts: int64 [H + 1], where the items of each run begin in `items`.
        items: int64, numbers of items.
        sizes: int64 [I], different runs of each item.
        names: of the items.
        num_skipped: items without a field of n words.
    """

    name: str
    n: int
    hashes: np.ndarray
    starts: np.ndarray
    items: np.ndarray
    sizes: np.ndarray
    names: list[str]
    num_skipped: int
    near: np.ndarray  # bool [2^FILTER_BITS]: whether a hash with these first bits is there


def set_digest(path: Path) -> str:
    """SHA-256 (hex) over a set's files."""
    return str(FileRows(path, []).identity()["sha256"])


def open_set(name: str, path: Path, n: int | None = None) -> EvaluationSet:
    """Read an evaluation set.

    Args:
        n: words of a run; None: by the lengths of its items.
    Raises:
        MissingError, ConfigError: there is no file that kdata reads.
        DataError: no row has a text of n words.
    """
    names, fields = [], []
    rows = FileRows(path, [])
    for number, row in enumerate(rows.rows(rows.names)):
        if isinstance(row, RowError):
            raise DataError(f"evaluation set {name!r}, {path}, row {number}: {row.detail}; mend it or take it out")
        names.append(as_text(row.get("id")) or f"row {number}")
        fields.append([hashed(words_of(normal_form(text)))[0] for text in _texts(row)])
    longest = [max(map(len, own), default=0) for own in fields]
    if n is None:
        lengths = [length for length in longest if length] or [0]
        n = int(np.clip(np.percentile(lengths, 5), LEAST_WORDS, MOST_WORDS))
    runs = [_runs(own, n) for own in fields]
    sizes = np.array([len(own) for own in runs], np.int64)
    if not sizes.sum():
        raise DataError(
            f"evaluation set {name!r}: no row of {path} has a text of {n} words; name a file with questions, or lower ngram"
        )
    flat, owners = np.concatenate(runs), np.repeat(np.arange(len(runs)), sizes)
    order = np.argsort(flat, kind="stable")
    hashes, starts = np.unique(flat[order], return_index=True)
    near = np.zeros(1 << FILTER_BITS, bool)
    near[hashes >> np.uint64(64 - FILTER_BITS)] = True
    starts = np.append(starts, len(flat)).astype(np.int64)
    return EvaluationSet(name, n, hashes, starts, owners[order], sizes, names, int((sizes == 0).sum()), near)


def _runs(fields: list[np.ndarray], n: int) -> np.ndarray:
    """Different runs of n words in the fields of an item."""
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *(ngrams(own, n) for own in fields if len(own) >= n)]))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, also inside of lists and objects."""
    if isinstance(value, str):
        yield value.encode(errors="replace").decode()
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def overlap_of(words: list[str], words_W: np.ndarray, evaluation: EvaluationSet) -> dict[str, Any]:
    """A value for each of COLUMNS, with the set's name in front.

    Args:
        words: of the text, in normal form. words_W: uint64 [W], their hashes.
    """
    n = evaluation.n
    values: dict[str, Any] = {"share": 0.0, "item": None, "item_share": 0.0, "shown": None}
    if len(words) >= n:
        hashes = ngrams(words_W, n)
        places = _places(hashes, evaluation.near, evaluation.hashes)
        hits = np.flatnonzero(places >= 0)
        if len(hits):
            runs = np.unique(places[hits])
            items = np.concatenate([evaluation.items[evaluation.starts[r] : evaluation.starts[r + 1]] for r in runs])
            owners, counts = np.unique(items, return_counts=True)
            shares = counts / evaluation.sizes[owners]
            best = int(shares.argmax())  # the first one of equal ones
            begin = int(hits[0])
            values = {
                "share": len(hits) / len(hashes),
                "item": evaluation.names[int(owners[best])],
                "item_share": float(shares[best]),
                "shown": " ".join(words[begin : begin + n]),
            }
    return {f"{evaluation.name}_{key}": value for key, value in values.items()}


@compiled()
def _places(hashes: Any, near: Any, known: Any) -> Any:
    """Place of each hash among the known ones, which rise; -1 where it is not there."""
    places = np.full(len(hashes), -1, np.int64)
    for number in range(len(hashes)):
        if near[hashes[number] >> np.uint64(42)]:
            place = np.searchsorted(known, hashes[number])
            if place < len(known) and known[place] == hashes[number]:
                places[number] = place
    return places
