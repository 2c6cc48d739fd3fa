"""What differs between two datasets, or two versions of one: rows, settings, teacher, scores, plans.

Rows are compared by id. Of a shard that both have with the same digest nothing is read; of the others four columns of the
index are, at a URL as ranges of bytes. A row has changed where its tokens (`content_hash`) have. Where its tokens are the
same and the teacher's mean NLL is not, it was read again: by another teacher, or in another way.
"""

from __future__ import annotations

import json
from typing import Any

import duckdb
import pyarrow as pa

from kdata.calls import validated
from kdata.errors import ConfigError
from kdata.format.schema import ManifestEntry, SourceInfo, json_digest
from kdata.share.provenance import flat
from kdata.store.dataset import Dataset
from kdata.store.listed import PLANS, SCORES, Kind, Listing
from kdata.store.open import AnyDataset, opened

COLUMNS = ["id", "content_hash", "num_tokens", "nll"]
KINDS = {
    "added": "a.id is null",
    "removed": "b.id is null",
    "changed": "a.content_hash <> b.content_hash",
    "read_again": "a.content_hash = b.content_hash and a.nll is distinct from b.nll",
}


@validated
def diff(a: AnyDataset, b: AnyDataset, *, limit: int = 10) -> dict[str, Any]:
    """What is different in `b`, from `a` on.

    Args:
        limit: of each kind of difference between rows, how many ids are named; all are counted.
    Returns:
        JSON values. a, b: place, commit, rows, tokens, content_digest. same: whether nothing that is compared differs.
        rows: of added, removed, changed and read_again the count, tokens (in `b`, of removed ones in `a`) and the first ids
        in order. settings: {setting: [a, b]} of what decides the rows and is not the teacher, teacher: the same of that.
        scores, plans: names that were added, removed, changed; null where a place cannot list them.
    Raises:
        ConfigError: limit is negative.
        StorageError, CorruptError: an index cannot be read.
    """
    a, b = opened(a), opened(b)
    if limit < 0:
        raise ConfigError(f"--limit {limit} is negative; 0 names no rows")
    known = {_shard_digest(entry) for entry in a.manifest} & {_shard_digest(entry) for entry in b.manifest}
    own = [[entry for entry in dataset.manifest if _shard_digest(entry) not in known] for dataset in (a, b)]
    ours, theirs = a.index_ranges(own[0], COLUMNS), b.index_ranges(own[1], COLUMNS)
    settings = _different(_settings(a), _settings(b))
    facts: dict[str, Any] = {
        "a": _facts(a),
        "b": _facts(b),
        "same": False,
        "shards_in_both": len(known),
        "rows": _compare(ours, theirs, limit),
        "teacher": {k: v for k, v in settings.items() if k.startswith("teacher.")},
        "settings": {k: v for k, v in settings.items() if not k.startswith("teacher.")},
        "scores": _listings(a, b, SCORES),
        "plans": _listings(a, b, PLANS),
    }
    lists = [names for kind in ("scores", "plans") for names in (facts[kind] or {}).values()]
    facts["same"] = not (settings or any(one["count"] for one in facts["rows"].values()) or any(lists))
    return facts


def _facts(dataset: Dataset) -> dict[str, Any]:
    return {
        "place": dataset.place,
        "commit": dataset.commit,
        "rows": dataset.num_rows,
        "tokens": dataset.num_tokens,
        "content_digest": dataset.content_digest,
    }


def _shard_digest(entry: ManifestEntry) -> str:
    """Digest of what a shard holds, whatever its name."""
    return json_digest(sorted((path.split("/")[0], info.sha256) for path, info in entry.files.items()))


def _compare(ours: pa.Table, theirs: pa.Table, limit: int) -> dict[str, dict[str, Any]]:
    with duckdb.connect() as connection:
        connection.execute("set enable_progress_bar = false")
        connection.register("a", ours)
        connection.register("b", theirs)
        joined = "from a full join b on a.id = b.id"
        rows: dict[str, dict[str, Any]] = {}
        for name, condition in KINDS.items():
            sums = "count(*), coalesce(sum(coalesce(b.num_tokens, a.num_tokens)), 0)::bigint"
            [(count, tokens)] = connection.sql(f"select {sums} {joined} where {condition}").fetchall()
            first = f"select coalesce(a.id, b.id) as id {joined} where {condition} order by id limit {limit}"
            rows[name] = {
                "count": count,
                "tokens": tokens,
                "first": [row[0] for row in connection.sql(first).fetchall()],
            }
    return rows


def _settings(dataset: Dataset) -> dict[str, str]:
    """Dotted settings, each as JSON: the identity, and kind and settings of each source."""
    sources = {name: _of_source(source) for name, source in dataset.info.sources.items()}
    settings = flat({**dataset.info.identity(), "sources": sources})
    return {key: json.dumps(value, ensure_ascii=False, sort_keys=True) for key, value in settings}


def _of_source(source: SourceInfo) -> dict[str, Any]:
    return {"kind": source.kind, "complete": source.num_units is not None, "settings": source.settings}


def _different(ours: dict[str, str], theirs: dict[str, str]) -> dict[str, list[str | None]]:
    keys = sorted(ours.keys() | theirs.keys())
    return {key: [ours.get(key), theirs.get(key)] for key in keys if ours.get(key) != theirs.get(key)}


def _listings(a: Dataset, b: Dataset, kind: Kind) -> dict[str, list[str]] | None:
    ours, theirs = a.listings(kind), b.listings(kind)
    if ours is None or theirs is None:
        return None
    return {
        "added": sorted(theirs.keys() - ours.keys()),
        "removed": sorted(ours.keys() - theirs.keys()),
        "changed": sorted(
            n for n in ours.keys() & theirs.keys() if _content(ours[n], kind) != _content(theirs[n], kind)
        ),
    }


def _content(listing: Listing, kind: Kind) -> object:
    """What a score or plan holds, whatever state of the dataset it names."""
    files = sorted((path, info.sha256) for path, info in listing.files_of(kind).items())
    return files or listing.digest
