"""Exact and near duplicates of a whole corpus, in memory that is bounded whatever the texts are.

Exact: the same text in normal form (`kdata.hygiene.words.normal_form`). Near: a Jaccard similarity of at least `threshold`
between the sets of runs of SHINGLE_WORDS words. Candidates are texts that share a band of their MinHash signature (rensa,
MIT); each pair of candidates is verified by the real Jaccard similarity of the two sets, and those that pass are joined by
union-find. So a group is a connected component: two of its texts may be less similar than the threshold, by way of a third.

Groups depend on the texts alone, not on the order of rows or on units. Of each group one row is kept: the one with most
characters, of these the one whose id comes first.

What it takes: a text's signature and set of shingles are in files (`Sketches`), 4 bytes a hash; memory holds some 100
bytes a text beside its id. Sources: Broder 1997 (resemblance), Lee et al. 2022 (arXiv 2107.06499).
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdata.errors import DependencyError
from kdata.format.compiled import compiled
from kdata.hygiene.words import ngrams

SHINGLE_WORDS = 5
NUM_HASHES = 120
# Hashes of a band: of the numbers that divide NUM_HASHES the largest one by which a pair at the threshold shares a band with
# this probability. 6 at a threshold of 0.8 and above (0.998 at 0.8, where the default is), 5 at 0.75, 4 at 0.7, 3 at 0.5.
LEAST_RECALL, MOST_BAND_HASHES = 0.995, 6
SEED = 1
# Texts that share a band, in the order of their digests: each is compared with so many that follow it. Above this number of
# texts in one band a pair may be missed; a boilerplate that many texts consist of is found all the same, by way of others.
WINDOW = 2_000
# A pair is verified unless its signatures say that it is this many standard deviations below the threshold.
SIGMAS = 4.0

COLUMNS: dict[str, tuple[str, str]] = {
    "exact_id": ("string", "Id of the row that is kept of those with the same text; its own id where it is that row."),
    "exact_rows": ("int32", "Rows with the same text, itself included."),
    "exact_keep": ("bool", "Whether it is the row that is kept of those with the same text."),
    "near_id": ("string", "Id of the row that is kept of its group of near duplicates; exact ones belong to it, too."),
    "near_rows": ("int32", "Rows of that group, itself included."),
    "near_keep": ("bool", "Whether it is the row that is kept of that group."),
    "jaccard": ("float32", "Jaccard similarity with the row `near_id`; 1 for that row itself."),
}


@dataclass(frozen=True)
class Sketch:
    """What is compared of a text.

    Attributes:
        digest: 16 bytes, BLAKE2b of the normal form.
        shingles: uint32 [S], rising; hashes of runs of SHINGLE_WORDS words, of a shorter text of all its words. 32 of 64
            bits: two texts of 400 words share one by chance with a probability of 4e-5, which changes a similarity by 0.001.
    """

    digest: bytes
    shingles: np.ndarray


def sketch(normal: str, words_W: np.ndarray) -> Sketch:
    """The sketch of a text from its normal form and the hashes of its words, uint64 [W]."""
    digest = hashlib.blake2b(normal.encode(), digest_size=16).digest()
    return Sketch(digest, np.unique((ngrams(words_W, SHINGLE_WORDS) >> np.uint64(32)).astype(np.uint32)))


def signatures(shingles: list[np.ndarray]) -> np.ndarray:
    """MinHash signatures, uint32 [N, NUM_HASHES]."""
    if not shingles:
        return np.zeros((0, NUM_HASHES), np.uint32)
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise DependencyError("the check `duplicates` needs rensa: pip install 'kdata[hygiene]'") from error
    offsets = np.cumsum([0, *map(len, shingles)]).astype(np.uint64)
    # rensa wants hashes whose bits are all random.
    flat = np.concatenate(shingles).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    rows = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, NUM_HASHES, SEED).to_rows()
    return np.array(rows, np.uint32).reshape(len(shingles), NUM_HASHES)


class Sketches:
    """The sketches of all texts, in files of a folder that grow with each unit: what a unit adds is there before it counts.

    Args:
        counts: texts and shingles of the units that count; what is behind them in the files is cut off.
    """

    NAMES = ("digests", "signatures", "shingles")

    def __init__(self, folder: Path, counts: tuple[int, int] = (0, 0)) -> None:
        self._paths = {name: folder / f"{name}.bin" for name in self.NAMES}
        self._files: dict[str, BinaryIO] = {}
        for name, size in self._sizes(counts).items():
            self._files[name] = self._paths[name].open("ab")
            self._files[name].truncate(size)

    @classmethod
    def _sizes(cls, counts: tuple[int, int]) -> dict[str, int]:
        texts, shingles = counts
        return dict(zip(cls.NAMES, (16 * texts, 4 * NUM_HASHES * texts, 4 * shingles), strict=True))

    @classmethod
    def check(cls, folder: Path, counts: tuple[int, int]) -> None:
        """Raise OSError or ValueError where a file is not there, or shorter than the units that count."""
        for name, size in cls._sizes(counts).items():
            if size and (folder / f"{name}.bin").stat().st_size < size:
                raise ValueError(f"{name}.bin is shorter than what was written")

    def append(self, sketches: list[Sketch], signatures_NK: np.ndarray) -> None:
        """Add texts and their signatures, and see that they are on the disk."""
        content = {
            "digests": b"".join(one.digest for one in sketches),
            "signatures": signatures_NK.tobytes(),
            "shingles": b"".join(one.shingles.tobytes() for one in sketches),
        }
        for name, file in self._files.items():
            file.write(content[name])
            file.flush()

        for file in self._files.values():
            os.fsync(file.fileno())

    def read(self, counts_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Digests uint64 [N, 2], signatures uint32 [N, NUM_HASHES], shingles uint32 [S] and their offsets int64 [N + 1].

        The arrays are mapped from the files, which are this program's own.

        Args:
            counts_N: int [N], shingles of each text.
        """
        offsets = np.zeros(len(counts_N) + 1, np.int64)
        np.cumsum(counts_N, out=offsets[1:])
        shapes = {
            "digests": (np.uint64, (len(counts_N), 2)),
            "signatures": (np.uint32, (len(counts_N), NUM_HASHES)),
            "shingles": (np.uint32, (int(offsets[-1]),)),
        }
        arrays = [
            np.memmap(self._paths[name], dtype, "r", shape=shape).view(np.ndarray)
            if math.prod(shape)
            else np.zeros(shape, dtype)
            for name, (dtype, shape) in shapes.items()
        ]
        return arrays[0], arrays[1], arrays[2], offsets

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def band_hashes(threshold: float) -> int:
    """Hashes of a band, of NUM_HASHES in all, by the least similarity that is looked for."""
    fitting = (
        n for n in range(MOST_BAND_HASHES, 1, -1)
        if NUM_HASHES % n == 0 and 1 - (1 - threshold**n) ** (NUM_HASHES // n) >= LEAST_RECALL
    )  # fmt: skip
    return next(fitting, 2)


def groups(
    ids: pa.Array,
    chars: pa.Array,
    sketches: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    threshold: float,
    on_band: Callable[[], None],
) -> dict[str, pa.Array]:
    """A value for each of COLUMNS and text; null where a row has no text.

    Args:
        ids: of the texts, [N]. chars: int [N], their characters; null where a row has no text.
        sketches: see `Sketches.read`.
        on_band: called behind each band, of which there are NUM_HASHES / `band_hashes(threshold)`.
    """
    digests, signature, shingles, offsets = sketches
    lacks_N = chars.is_null().to_numpy(zero_copy_only=False)
    # No text has the digest of an empty one; behind every text in rank, such a row is never kept in place of one.
    rank_N = _ranks(ids, chars.fill_null(-1).to_numpy())
    exact_N = np.where(lacks_N, np.arange(len(ids)), _exact(digests, rank_N))
    alone = np.flatnonzero(exact_N == np.arange(len(ids)))  # one of each text
    order = np.lexsort((digests[alone, 1], digests[alone, 0]))
    alone = alone[order]  # in an order that follows from the texts
    parents_N = np.arange(len(ids))
    sizes = np.diff(offsets)
    alone = alone[sizes[alone] > 0]  # texts without a word have no near duplicates
    least = threshold - SIGMAS * math.sqrt(threshold * (1 - threshold) / NUM_HASHES)
    each = band_hashes(threshold)
    for begin in range(0, NUM_HASHES, each):
        keys = _band(signature, alone, begin, each)
        by_key = np.argsort(keys, kind="stable")
        _join(keys[by_key], alone[by_key], parents_N, signature, shingles, offsets, threshold, least, WINDOW)
        on_band()
    near_N = _kept(_roots(parents_N)[exact_N], rank_N)
    return {
        **_columns("exact", exact_N, ids, lacks_N),
        **_columns("near", near_N, ids, lacks_N),
        "jaccard": pa.array(_similarities(near_N, shingles, offsets), pa.float32(), mask=lacks_N),
    }


def _columns(name: str, kept_N: np.ndarray, ids: pa.Array, lacks_N: np.ndarray) -> dict[str, pa.Array]:
    rows = np.bincount(kept_N, minlength=len(kept_N))[kept_N]
    return {
        f"{name}_id": ids.take(pa.array(kept_N, mask=lacks_N)),
        f"{name}_rows": pa.array(rows, pa.int32(), mask=lacks_N),
        f"{name}_keep": pa.array(kept_N == np.arange(len(kept_N)), mask=lacks_N),
    }


def _ranks(ids: pa.Array, chars_N: np.ndarray) -> np.ndarray:
    """Place of each row in the order in which rows are kept, int64 [N]: most characters first, then by id."""
    table = pa.table({"chars": chars_N, "id": ids})
    order = pc.sort_indices(table, [("chars", "descending"), ("id", "ascending")]).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _kept(group_N: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
    """For each row the row of its group with the smallest rank, int64 [N]. Groups are numbers in [0, N)."""
    best = np.full(len(group_N), len(group_N), np.int64)
    np.minimum.at(best, group_N, rank_N)
    rows = np.empty(len(group_N), np.int64)
    rows[rank_N] = np.arange(len(group_N))
    kept: np.ndarray = rows[best[group_N]]
    return kept


def _exact(digests: np.ndarray, rank_N: np.ndarray) -> np.ndarray:
    """For each row the row that is kept of those with its digest, int64 [N]."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    sorted_digests = digests[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (sorted_digests[1:] != sorted_digests[:-1]).any(axis=1)
    group_N = np.empty(len(order), np.int64)
    group_N[order] = np.cumsum(is_new) - 1
    return _kept(group_N, rank_N)


def _band(signature: np.ndarray, rows: np.ndarray, begin: int, count: int) -> np.ndarray:
    """Hash of `count` columns of the signatures of some rows, uint64 [R]."""
    keys: np.ndarray = _band_keys(signature, rows, begin, count)
    return keys


@compiled()
def _band_keys(signature: Any, rows: Any, begin: int, count: int) -> Any:
    keys = np.empty(len(rows), np.uint64)
    for place in range(len(rows)):
        value = np.uint64(begin)
        for column in range(begin, begin + count):
            value = (value ^ np.uint64(signature[rows[place], column])) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        keys[place] = value
    return keys


@compiled()
def _root(parents: Any, row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


@compiled()
def _roots(parents: Any) -> Any:
    roots = np.empty(len(parents), np.int64)
    for row in range(len(parents)):
        roots[row] = _root(parents, row)
    return roots


@compiled()
def _jaccard(shingles: Any, offsets: Any, a: int, b: int) -> float:
    """Jaccard similarity of two sets of shingles; of two empty ones 1."""
    i, end_i, j, end_j = offsets[a], offsets[a + 1], offsets[b], offsets[b + 1]
    total, both = (end_i - i) + (end_j - j), 0
    while i < end_i and j < end_j:
        x, y = shingles[i], shingles[j]
        both += x == y
        i += x <= y
        j += y <= x
    return both / (total - both) if total else 1.0


@compiled()
def _join(
    keys: Any, rows: Any, parents: Any, signature: Any, shingles: Any, offsets: Any, threshold: float, least: float,
    window: int,
) -> None:  # fmt: skip
    """Join the rows that share a key and are similar enough. Rows of one group already are not compared again."""
    needed = least * signature.shape[1]
    begin = 0
    while begin < len(keys):
        end = begin + 1
        while end < len(keys) and keys[end] == keys[begin]:
            end += 1
        for i in range(begin, end - 1):
            for j in range(i + 1, min(end, i + 1 + window)):
                a, b = rows[i], rows[j]
                root_a, root_b = _root(parents, a), _root(parents, b)
                if root_a == root_b:
                    continue
                equal = 0
                for column in range(signature.shape[1]):
                    equal += signature[a, column] == signature[b, column]
                if equal >= needed and _jaccard(shingles, offsets, a, b) >= threshold:
                    parents[max(root_a, root_b)] = min(root_a, root_b)
        begin = end


@compiled()
def _similarities(kept: Any, shingles: Any, offsets: Any) -> Any:
    values = np.ones(len(kept), np.float32)
    for row in range(len(kept)):
        if kept[row] != row:
            values[row] = _jaccard(shingles, offsets, row, kept[row])
    return values
