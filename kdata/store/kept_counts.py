"""What a dataset keeps where, for people: of a dataset that keeps distributions at some of its target positions only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdata.format.keep_rules import described
from kdata.store.dataset import Dataset


def kept_lines(dataset: Dataset, *, look: bool = True) -> Iterator[str]:
    """What is kept, and which domains and roles of the rule no row has, a line each; none where every target is kept.

    Args:
        look: for these domains and roles, in the index; False: the manifest alone is read.
    """
    rule: dict[str, Any] | None = dataset.info.codec.parameters.get("positions")
    if rule is None:
        return
    if not look and any(entry.kept_positions is None for entry in dataset.manifest):
        return
    kept, targets = num_kept_positions(dataset), sum(entry.target_tokens for entry in dataset.manifest)
    yield f"distributions are kept at {kept:,} of {targets:,} target positions: {described(rule)}"
    if targets and not kept:
        yield "WARNING: the rule keeps no distribution, so no student can learn from one of this dataset"
    if look:
        domains, roles = _absent(dataset, rule)
        for domain in domains:
            yield f"WARNING: no row has the domain {domain!r}, of which every target was to be kept"
        for role in roles:
            yield f"WARNING: no chat has a message of role {role!r}"


def _absent(dataset: Dataset, rule: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Domains and roles of a rule that no row has. Shards are read until all are found."""
    domains, roles = list(rule.get("domains", [])), list(rule.get("roles", []))
    for entry in dataset.manifest:
        columns = [*(["domain"] if domains else []), *(["messages"] if roles else [])]
        if not columns:
            break
        index = dataset.shard_index(entry, columns)
        domains = [one for one in domains if not pc.any(pc.equal(index["domain"], one)).as_py()]
        roles = [one for one in roles if not _has_role(index, one)]
    return domains, roles


def num_kept_positions(dataset: Dataset) -> int:
    """Target positions of a dataset at which a distribution is kept, by its manifest.

    An older kdata, which copies rows without decoding them, leaves the numbers out; then they are counted in the payload.
    """
    if any(entry.kept_positions is None for entry in dataset.manifest):
        return sum(domain["kept"] for domain in kept_by_domain(dataset))
    return sum(entry.num_kept_positions for entry in dataset.manifest)


def kept_by_domain(dataset: Dataset) -> list[dict[str, Any]]:
    """Targets of each domain, and how many of them have entries, by reading these counts from the payload."""
    rows: list[dict[str, Any]] = dataset.sql(
        "select domain as name, count(*) as targets, count(*) filter (num_exact + num_drawn > 0) as kept "
        "from tokens join rows using (id) where target group by 1 order by targets desc, name"
    ).to_pylist()
    return rows


def _has_role(index: pa.Table, role: str) -> bool:
    """Whether a chat has a message of a role. Quotes inside of a JSON text are escaped, so that no content matches."""
    pattern = f'"role": {json.dumps(role, ensure_ascii=False)}'
    return bool(pc.any(pc.match_substring(index["messages"], pattern)).as_py())
