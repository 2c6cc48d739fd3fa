"""A plan as a table and as a picture: what it chose of each domain. And two plans compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdata.errors import KdataError
from kdata.observe.style import COLOURS, STYLE, check_picture, save_picture
from kdata.observe.text import one_line
from kdata.selection.plan import ConditionsInfo, DomainChoice, Plan, PlanInfo, PositionsInfo, open_plan
from kdata.selection.ranked import Ranked
from kdata.selection.select import METHODS
from kdata.selection.session import Conditions, rows_of
from kdata.selection.sidecar import score_digest
from kdata.store.conditions import check_condition
from kdata.store.dataset import Dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BARS = 60  # of a histogram
SHOWN_DOMAINS = 40  # in a picture or a table; the others are one line of a table
SHOWN_VALUES = 12  # of a parameter that has one for each domain, where all would fill the screen
EMPTY = "(empty)"  # the name of a domain that has none
SHOWN_CHARS = 160  # of the text of a row that was left out

# Values of all rows to choose from, and of the chosen ones, counted in bars.
RANGE = "with rows as ({rows}), candidates as ({values}) select min(value) as low, max(value) as high from candidates"
HISTOGRAM = """with rows as ({rows}), candidates as ({values})
select least({bars} - 1, floor((value - $low) / ($high - $low) * {bars}))::integer as bar, count(*) as n,
    count(p.id) as chosen
from candidates left join plans."{plan}" as p using (id) where value is not null group by bar"""

OVERLAP = """
select domain, count(*) filter (b.id is null), count(*) filter (a.id is not null and b.id is not null),
    count(*) filter (a.id is null), min(a.id) filter (b.id is null), min(b.id) filter (a.id is null)
from plans."{a}" as a full join plans."{b}" as b on a.id = b.id join rows on rows.id = coalesce(a.id, b.id)
group by domain order by domain
"""


# Tokens that count in both plans: positions, or the targets of a plan that chooses none.
COUNTED = """
select coalesce(sum({in_a}), 0)::bigint, coalesce(sum({in_both}), 0)::bigint, coalesce(sum({in_b}), 0)::bigint
from plans."{a}" as a full join plans."{b}" as b on a.id = b.id join rows on rows.id = coalesce(a.id, b.id)
"""


@dataclass(frozen=True)
class Shown:
    """A table as text: title, column names, rows with one cell for each column, notes to print below."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]


def table_of(plan: Plan) -> Shown:
    """What was requested and chosen of each domain: amounts, and their shares of the whole column.

    Of many domains the largest have lines of their own.
    """
    info = plan.info
    names = _shown_domains({name: domain.dataset_tokens for name, domain in info.domains.items()})
    columns: dict[str, list[int | None]] = {
        "sequences": [domain.dataset_sequences for domain in info.domains.values()],
        "tokens": [domain.dataset_tokens for domain in info.domains.values()],
        f"{info.count_by} requested": [domain.requested for domain in info.domains.values()],
        "rows chosen": [domain.rows for domain in info.domains.values()],
        "sequences chosen": [domain.sequences for domain in info.domains.values()],
        "tokens chosen": [domain.tokens for domain in info.domains.values()],
    }
    chosen = info.positions
    if chosen is not None:
        shares = [chosen.domains.get(domain) for domain in info.domains]
        columns["targets"] = [0 if share is None else share.targets for share in shares]
        columns["positions chosen"] = [0 if share is None else share.positions for share in shares]
    if columns["rows chosen"] == columns["sequences chosen"]:
        del columns["rows chosen"]  # nothing is repeated
    own = [name in names for name in info.domains]
    cells_of = {name: _amounts(values, own) for name, values in columns.items() if any(v is not None for v in values)}
    left = len(own) - sum(own)
    lines = [*_named(names), *([f"{left:,} others"] if left else []), "all"]
    rows = [[name, *cells] for name, *cells in zip(lines, *cells_of.values(), strict=True)]
    parameters = ", ".join(f"{k} {_brief(v)}" for k, v in info.parameters.items())
    notes = [_left_note(left, len(own))] if left else []
    notes.append(f"method {info.method}: {info.sql if info.method == 'sql' else parameters}")
    if info.requested is not None:
        num_chosen = sum(_units(domain, info) for domain in info.domains.values())
        notes.append(f"requested {info.requested:,} {info.count_by}, chose {num_chosen:,}")
    if info.where is not None:
        notes += _condition_notes(info.where)
    if chosen is not None:
        notes += _position_notes(chosen)
    notes += [f"from plan {name} ({digest[:12]})" for name, digest in sorted(info.parents.items())]
    notes += [f"score {name} ({digest[:12]})" for name, digest in sorted(info.scores.items())]
    return Shown(
        f"plan {info.name}: {info.num_rows:,} rows, {info.num_tokens:,} tokens", ["domain", *cells_of], rows, notes
    )


def conditions_of(info: PlanInfo) -> Conditions:
    """The conditions of a plan, and the scores that they name."""
    texts = () if info.where is None else tuple(one.condition for one in info.where.conditions)
    named = {name for text in texts for name in check_condition(text)}
    return Conditions(texts, tuple(name for name in info.scores if name.lower() in named))


def _condition_notes(where: ConditionsInfo) -> list[str]:
    """How many rows each condition left out."""
    notes = [f"{where.passed:,} of {where.rows:,} rows meet the conditions"]
    for one in where.conditions:
        unknown = f", {one.unknown:,} of them because it is not known" if one.unknown else ""
        notes.append(f"  {one.condition}: leaves out {one.left_out:,} ({one.alone:,} that no other does{unknown})")
    return notes


def left_out_texts(dataset: Dataset, plan: Plan) -> list[tuple[str, str, str]]:
    """Condition, id and text of the examples of rows that a plan left out; the beginning of a long text."""
    where = plan.info.where
    ids = sorted({name for one in (where.conditions if where else []) for name in one.examples})
    if where is None or not ids:
        return []
    table = dataset.sql(
        f"select id, text[:{4 * SHOWN_CHARS}] as text from rows where list_contains($ids, id)", {"ids": ids}
    )
    texts = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    return [
        (one.condition, name, one_line(texts.get(name) or "", SHOWN_CHARS))
        for one in where.conditions
        for name in one.examples
    ]


def _position_notes(chosen: PositionsInfo) -> list[str]:
    """How the positions of a plan were chosen, how many of how many, and their share in each domain."""
    parameters = ", ".join(f"{name} {_brief(value)}" for name, value in chosen.parameters.items())
    weights = " with weights" if chosen.weighted else ""
    names = _shown_domains({name: share.targets for name, share in chosen.domains.items()}, SHOWN_VALUES)
    shares = ", ".join(
        f"{one_line(name, 32) or EMPTY} {chosen.domains[name].positions / max(chosen.domains[name].targets, 1):.1%}"
        for name in names
    )
    if left := len(chosen.domains) - len(names):
        shares += f", {left:,} other domains"
    how = parameters if chosen.sql is None else chosen.sql
    return [
        f"positions by rule {chosen.rule}{': ' if how else ''}{how}",
        f"{chosen.positions:,} of {chosen.targets:,} target positions{weights} ({shares}); {chosen.rows_left_out:,} rows "
        "without any are left out",
    ]


def _shown_domains(sizes: Mapping[str, int], most: int = SHOWN_DOMAINS) -> list[str]:
    """The largest domains, in the order of all."""
    largest = set(sorted(sizes, key=lambda name: (-sizes[name], name))[:most])
    return [name for name in sizes if name in largest]


def _named(domains: Iterable[str]) -> list[str]:
    return [name or EMPTY for name in domains]


def _left_note(left: int, domains: int) -> str:
    return (
        f"the {domains - left} largest of {domains:,} domains; kdata plan show and compare print all with --format json"
    )


def _amounts(values: list[int | None], own: list[bool]) -> list[str]:
    """Numbers with their share of the sum: those that have a line of their own, the sum of the others, if any, and of all."""
    numbers = [value or 0 for value in values]
    total, shown = sum(numbers), [number for number, has in zip(numbers, own, strict=True) if has]
    shown += [] if all(own) else [total - sum(shown)]
    return [*(f"{_short(number)} {number / max(total, 1):5.1%}" for number in shown), f"{_short(total)} {'':5}"]


def _short(number: int) -> str:
    """At most five characters: 1,234, 56.2k, 1.23G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scaled = number / (1e3 if letter == "k" else size)
            return f"{scaled:.0f}{letter}" if scaled >= 100 else f"{scaled:.3g}{letter}"
    return f"{number:,}"


def _units(domain: DomainChoice, info: PlanInfo) -> int:
    return domain.sequences if info.count_by == "sequences" else domain.tokens


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        first = [f"{k or EMPTY}: {_brief(v)}" for k, v in list(value.items())[:SHOWN_VALUES]]
        left = len(value) - len(first)
        return "{" + ", ".join([*first, *([f"{left:,} others"] if left else [])]) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(dataset: Dataset, plan: Plan, path: Path) -> Path:
    """Draw the share of each domain and, for a method that ranks by a value, its histogram with the cut.

    Returns:
        `path`, where the picture is.
    Raises:
        ConfigError: `path` does not end in .png, .svg or .pdf.
        DependencyError: matplotlib is not installed.
        StorageError: the disk refused.
    """
    check_picture(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bars = _histogram(dataset, plan)
    domains = sorted(plan.info.domains, key=lambda name: (-plan.info.domains[name].dataset_tokens, name))[
        :SHOWN_DOMAINS
    ]
    with rc_context(STYLE):
        height = 1.2 + 0.45 * len(domains)
        figure = Figure(figsize=(6.4, height + (2.4 if bars else 0)), layout="constrained")
        panels = figure.subplots(2 if bars else 1, 1, height_ratios=[height, 2.4] if bars else None, squeeze=False)[
            :, 0
        ]
        _draw_shares(panels[0], plan.info, domains)
        if bars:
            _draw_histogram(panels[1], plan.info, bars)
        figure.suptitle(f"Plan {plan.info.name} ({plan.info.method})", x=0.01, ha="left", fontsize=11)
        return save_picture(figure, path)


def _draw_shares(axes: Axes, info: PlanInfo, domains: list[str]) -> None:
    sequences = info.count_by == "sequences" and info.requested is not None
    shown = [info.domains[name] for name in domains]
    all_held = [d.dataset_sequences if sequences else d.dataset_tokens for d in info.domains.values()]
    all_chosen = [d.sequences if sequences else d.tokens for d in info.domains.values()]
    held = np.array([d.dataset_sequences if sequences else d.dataset_tokens for d in shown]) / max(sum(all_held), 1)
    chosen = np.array([d.sequences if sequences else d.tokens for d in shown]) / max(sum(all_chosen), 1)
    places = np.arange(len(domains))
    axes.barh(places - 0.2, 100 * held, 0.36, color=COLOURS["rest"], label="dataset")
    bars = axes.barh(places + 0.2, 100 * chosen, 0.36, color=COLOURS["plan"], label="plan")
    axes.bar_label(bars, [f"{100 * share:.1f}" for share in chosen], padding=3, fontsize=8)
    total = sum(d.requested or 0 for d in info.domains.values())
    if total:
        marks = [100 * (d.requested or 0) / total for d in shown]
        axes.vlines(marks, places, places + 0.4, color=COLOURS["ink"], linewidth=1.8, label="requested")
    axes.set_yticks(places, [one_line(name, 32) or EMPTY for name in domains])
    axes.set(xlabel=f"share of {'sequences' if sequences else 'tokens'}, %", ylim=(len(domains) - 0.5, -0.5))
    axes.grid(axis="x")
    axes.margins(x=0.12)
    axes.legend(loc="best", fontsize=8)
    if len(info.domains) > len(domains):
        axes.set_title(f"the {len(domains)} largest of {len(info.domains)} domains", loc="left")


@dataclass(frozen=True)
class _Bars:
    """A histogram: counts int64 [BARS] of all values and of the chosen ones from low to high; label of the axis."""

    low: float
    high: float
    all: np.ndarray
    chosen: np.ndarray
    label: str


def _histogram(dataset: Dataset, plan: Plan) -> _Bars | None:
    """The plan's values; None where its method has none, or they cannot be computed any more."""
    method = METHODS.get(plan.info.method)
    if method is None or not issubclass(method, Ranked) or method.VALUE is None or not _inputs_unchanged(dataset, plan):
        return None
    step = method.from_recorded(plan.info.parameters)
    rows = rows_of(next(iter(plan.info.parents), None), "main.rows", conditions_of(plan.info))
    form = {"rows": rows, "values": step.values(), "bars": BARS, "plan": plan.info.name}
    [ends] = dataset.sql(RANGE.format(**form), step.bindings() or None).to_pylist()
    if ends["low"] is None or ends["low"] == ends["high"]:
        return None
    counts = np.zeros((2, BARS), np.int64)
    for row in dataset.sql(HISTOGRAM.format(**form), {**step.bindings(), **ends}).to_pylist():
        counts[:, row["bar"]] = row["n"], row["chosen"]
    return _Bars(ends["low"], ends["high"], counts[0], counts[1], method.VALUE)


def _inputs_unchanged(dataset: Dataset, plan: Plan) -> bool:
    """Whether the scores and plans that a plan read still exist and have the recorded digests."""
    try:
        scores = {name: score_digest(dataset, name) for name in plan.info.scores}
        parents = {name: open_plan(dataset, name).plan_digest for name in plan.info.parents}
    except KdataError:
        return False
    return scores == plan.info.scores and parents == plan.info.parents


def _draw_histogram(axes: Axes, info: PlanInfo, bars: _Bars) -> None:
    edges = np.linspace(bars.low, bars.high, BARS + 1)
    place: dict[str, Any] = {"x": edges[:-1], "width": np.diff(edges), "align": "edge"}
    axes.bar(height=bars.chosen, color=COLOURS["plan"], label="chosen", **place)
    axes.bar(height=bars.all - bars.chosen, bottom=bars.chosen, color=COLOURS["rest"], label="left out", **place)
    cuts = info.parameters.get("thresholds", {"": info.parameters.get("threshold")})
    for cut in sorted({cut for cut in cuts.values() if cut is not None}):
        axes.axvline(cut, color=COLOURS["ink"], linewidth=1.0, linestyle=(0, (3, 2)))
    axes.set(xlabel=bars.label, ylabel="sequences")
    axes.legend(loc="best", fontsize=8)
    axes.grid(axis="y")


@dataclass(frozen=True)
class Overlap:
    """Rows of one domain, or of all: those that only one of two plans chose, those that both chose; shares of tokens."""

    only_first: int
    both: int
    only_second: int
    first_token_share: float
    second_token_share: float


@dataclass(frozen=True)
class CountedTokens:
    """Tokens that count in training, each row once: those of one of two plans alone, and those of both.

    jaccard: those of both, of those of either; in [0, 1].
    """

    only_first: int
    both: int
    only_second: int
    jaccard: float


@dataclass(frozen=True)
class Comparison:
    """Two plans of a dataset: their overlap in each domain and overall, and at most five ids that only one chose.

    positions: which tokens count; None where neither plan chooses positions.
    """

    first: str
    second: str
    domains: dict[str, Overlap]
    overall: Overlap
    only_first_examples: list[str]
    only_second_examples: list[str]
    positions: CountedTokens | None = None


def compare(dataset: Dataset, first: str, second: str) -> Comparison:
    """Rows that two plans of a dataset have in common in each domain, and each plan's share of tokens there.

    Where a plan chooses positions, also how many tokens count in both.

    Raises:
        MissingError, MismatchError: a plan does not exist, or is of another state of the dataset.
        ConfigError: an invalid name.
    """
    a, b = open_plan(dataset, first).info, open_plan(dataset, second).info
    overlap = {row[0]: row[1:] for row in _rows(dataset, OVERLAP.format(a=first, b=second))}
    domains = {}
    for name in sorted(a.domains):
        only_first, both, only_second, _, _ = overlap.get(name, (0, 0, 0, None, None))
        shares = a.shares[name]["plan"], b.shares[name]["plan"]
        domains[name] = Overlap(only_first, both, only_second, *shares)
    overall = _sum(domains.values())
    examples = [sorted(row[place] for row in overlap.values() if row[place] is not None)[:5] for place in (3, 4)]
    first_ids, second_ids = examples
    return Comparison(first, second, domains, overall, first_ids, second_ids, _counted(dataset, a, b))


def _sum(overlaps: Iterable[Overlap]) -> Overlap:
    some = list(overlaps)
    return Overlap(**{part.name: sum(getattr(one, part.name) for one in some) for part in fields(Overlap)})


def _counted(dataset: Dataset, a: PlanInfo, b: PlanInfo) -> CountedTokens | None:
    has = {"a": a.positions is not None, "b": b.positions is not None}
    if not any(has.values()):
        return None
    own = {
        plan: f"len({plan}.positions)" if h else f"if({plan}.id is null, 0, num_target_tokens)"
        for plan, h in has.items()
    }
    common = f"len({'a' if has['a'] else 'b'}.positions)"  # where the other plan has the row, all its targets count
    both = "len(list_intersect(a.positions, b.positions))" if all(has.values()) else f"if(a.id = b.id, {common}, 0)"
    text = COUNTED.format(a=a.name, b=b.name, in_a=own["a"], in_both=both, in_b=own["b"])
    [(in_first, in_both, in_second)] = _rows(dataset, text)
    either = in_first + in_second - in_both
    return CountedTokens(in_first - in_both, in_both, in_second - in_both, in_both / either)


def comparison_table(comparison: Comparison) -> Shown:
    """Two plans compared, as a table; the last column is the difference of the shares in percentage points."""
    first, second = comparison.first, comparison.second
    rows: list[list[str]] = []
    notes: list[str] = []
    every = comparison.domains
    names = _shown_domains({name: one.only_first + one.both + one.only_second for name, one in every.items()})
    lines = list(zip(_named(names), (every[name] for name in names), strict=True))
    if left := len(every) - len(names):
        lines.append((f"{left:,} others", _sum(one for name, one in every.items() if name not in set(names))))
        notes.append(_left_note(left, len(every)))
    for name, domain in lines:
        points = 100 * (domain.second_token_share - domain.first_token_share)
        rows.append([name, *_cells(domain), f"{points:+.1f}"])
    rows.append(["all", *_cells(comparison.overall), ""])
    for plan, ids in ((first, comparison.only_first_examples), (second, comparison.only_second_examples)):
        if ids:
            notes.append(f"only in {plan}, for example: {', '.join(ids)}")
    if (counted := comparison.positions) is not None:
        notes.append(
            f"{counted.both:,} tokens count in both, {counted.only_first:,} only in {first}, {counted.only_second:,} only in "
            f"{second}: both / either {counted.jaccard:.3f}"
        )
    columns = ["domain", f"only {first}", "both", f"only {second}", "both / either", first, second, "points"]
    return Shown(f"plans {first} and {second}: rows, and shares of tokens", columns, rows, notes)


def _cells(overlap: Overlap) -> list[str]:
    """The numbers of rows, the share of rows in both plans (empty without rows), and the shares of tokens."""
    counts = overlap.only_first, overlap.both, overlap.only_second
    in_both = f"{overlap.both / sum(counts):.3f}" if sum(counts) else ""
    shares = overlap.first_token_share, overlap.second_token_share
    return [*(f"{count:,}" for count in counts), in_both, *(f"{share:.1%}" for share in shares)]


def _rows(dataset: Dataset, sql: str) -> list[tuple[Any, ...]]:
    table = dataset.sql(sql)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
