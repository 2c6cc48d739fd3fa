"""What the checks found, in a few lines for a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdata.hygiene.checks import Check, HygieneConfig
from kdata.hygiene.personal import KINDS

MOST_LANGUAGES = 6
Fetch = Callable[[str], Sequence[Sequence[Any]]]  # rows of a query


def summary(config: HygieneConfig, rows: str, fetch: Fetch) -> list[str]:
    """A line for each check.

    Args:
        rows: what stands behind `from`; it has the columns CHECK.COLUMN.
        fetch: runs a query.
    """
    return [f"{check}: {_LINES[check](config, rows, fetch)}" for check in config.chosen]


def _counted(counts: dict[str, str], rows: str, fetch: Fetch) -> str:
    """How many rows meet each condition, by its name."""
    columns = ", ".join(f"count(*) filter ({condition})" for condition in counts.values())
    [numbers] = fetch(f"select {columns} from {rows}")
    return ", ".join(f"{number:,} {name}" for name, number in zip(counts, numbers, strict=True))


def _duplicates(config: HygieneConfig, rows: str, fetch: Fetch) -> str:
    counts = {
        "rows repeat a text": "not duplicates.exact_keep",
        "more are near duplicates": "duplicates.exact_keep and not duplicates.near_keep",
        "stay": "duplicates.near_keep",
    }
    return _counted(counts, rows, fetch)


def _overlap(config: HygieneConfig, rows: str, fetch: Fetch) -> str:
    return _counted(
        {f"rows share text with {name}": f"overlap.{name}_share > 0" for name in sorted(config.overlap)}, rows, fetch
    )


def _language(config: HygieneConfig, rows: str, fetch: Fetch) -> str:
    counts = fetch(f"select language.code as code, count(*) as n from {rows} group by all order by n desc, code")
    first = [f"{number:,} {code or 'not known'}" for code, number in counts[:MOST_LANGUAGES]]
    rest = sum(number for _, number in counts[MOST_LANGUAGES:])
    return ", ".join([*first, *([f"{rest:,} others"] if rest else [])])


def _quality(config: HygieneConfig, rows: str, fetch: Fetch) -> str:
    counts = {f"rows fail a rule of {name}": f"quality.{column} <> ''" for column, name in _FILTERS.items()}
    return _counted(counts, rows, fetch)


def _personal(config: HygieneConfig, rows: str, fetch: Fetch) -> str:
    counts = {"rows with any": "personal.total > 0", **{kind: f"personal.{kind} > 0" for kind in KINDS}}
    return _counted(counts, rows, fetch)


_FILTERS = {"gopher": "Gopher", "c4": "C4", "fineweb": "FineWeb"}
_LINES: dict[Check, Callable[[HygieneConfig, str, Fetch], str]] = {
    "duplicates": _duplicates,
    "overlap": _overlap,
    "language": _language,
    "quality": _quality,
    "personal": _personal,
}
