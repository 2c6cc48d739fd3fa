"""The report of question `raw`: results.json, Markdown tables, and a picture of what each method kept and what it brought."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.pipelines.evidence.figures import text_of, write_results
from kdata.pipelines.evidence.raw import SHARES
from kdata.pipelines.evidence.raw_question import KEPT, NONE, SETTINGS, TRAINED, describe
from kdata.pipelines.evidence.runs import Figures
from kdata.pipelines.evidence.selection import key_of
from kdata.pipelines.evidence.summary import Estimate, relative_difference, summarise

Runs = Mapping[str, Mapping[int, Figures]]
Means = Mapping[str, Mapping[str, Estimate]]
Against = Mapping[str, Estimate | None]
Kept = Mapping[str, Mapping[str, Any]]
FAMILIES = {"distillation": "#1f6fb5", "cross-entropy": "#c4501b"}


def write_report(out: Path, runs: Runs) -> str:
    """Write results.json, table.md and evidence.png of the runs that are measured; return the tables."""
    means = {name: summarise(seeds) for name, seeds in runs.items()}
    against = {
        name: None if name == none_of(name) else relative_difference(seeds, runs.get(none_of(name), {}), "nll")
        for name, seeds in runs.items()
    }
    kept: Kept = json.loads((out / "data" / KEPT).read_text(encoding="utf-8"))
    write_results(out, runs, means, {"nll_against_none": against}, describe)
    made = json.loads((out / "data" / "raw.json").read_text(encoding="utf-8"))
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (out / "results.json").write_text(json.dumps({**results, "corpus": made, "kept": kept}, indent=1), encoding="utf-8")
    table = f"{markdown(means, against, kept)}\n\n{kept_markdown(kept)}"
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(against, kept).savefig(out / "evidence.png", dpi=110)
    return table


def none_of(key: str) -> str:
    """The setting that one is compared with: no selection, with the same objective or the nearest one."""
    family = next(s.family for s in SETTINGS if key_of(s) == key)
    return f"{NONE} ({family if family in (*FAMILIES, TRAINED) else 'distillation'})"


def markdown(means: Means, against: Against, kept: Kept) -> str:
    """One line per method: what it kept, and the NLL of both kinds of students; mean ± half-width of the 95 % interval."""
    heads = [f"NLL, {family} | against no selection" for family in FAMILIES]
    lines = [f"| method | precision | recall | {' | '.join(heads)} | leaked text | seeds |", "|" + "---|" * 9]
    for name, verdict in kept.items():
        keys = [f"{name} ({family})" for family in FAMILIES]
        cells = [name, f"{verdict['precision']:.2f}", f"{verdict['recall']:.2f}"]
        cells += [cell for key in keys for cell in _cells(key, means, against)]
        measured = [means[key] for key in keys if key in means]
        cells.append(text_of(measured[0]["nll_benchmark"], 3) if measured else "-")
        lines.append(f"| {' | '.join([*cells, _seeds(measured)])} |")
    for key in (key_of(s) for s in SETTINGS if s.family not in FAMILIES):
        if key in means:
            cells = [key, "", "", *_cells(key, means, against), "", "", text_of(means[key]["nll_benchmark"], 3)]
            lines.append(f"| {' | '.join([*cells, _seeds([means[key]])])} |")
    return "\n".join(lines)


def _cells(key: str, means: Means, against: Against) -> list[str]:
    if key not in means:
        return ["-", "-"]
    return [text_of(means[key]["nll"], 3), text_of(against.get(key), 2, 100, "%", sign="+")]


def _seeds(measured: list[Mapping[str, Estimate]]) -> str:
    return " + ".join(str(of["nll"].count) for of in measured) or "0"


def kept_markdown(kept: Kept) -> str:
    """One line per method: the share of each origin's tokens that it kept, in percent."""
    lines = [f"| kept of, % | {' | '.join(SHARES)} |", "|" + "---|" * (len(SHARES) + 1)]
    for name, verdict in kept.items():
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.0f}' for share in _shares(verdict))} |")
    return "\n".join(lines)


def _shares(verdict: Mapping[str, Any]) -> list[float]:
    return [verdict["kept"].get(origin, 0.0) for origin in SHARES]


def _plot(against: Against, kept: Kept) -> Figure:
    names = list(kept)
    figure = Figure(figsize=(10.5, 1.6 + 0.33 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.15])
    _changes(left, names, against)
    _kept(right, [_shares(verdict) for verdict in kept.values()])
    left.set_yticks(range(len(names)), names, fontsize=8.5)
    left.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _changes(axes: Axes, names: list[str], against: Against) -> None:
    """NLL against no selection for both kinds of students."""
    for number, (family, colour) in enumerate(FAMILIES.items()):
        points = [(y, gap) for y, name in enumerate(names) if (gap := against.get(f"{name} ({family})")) is not None]
        axes.errorbar(
            [100 * gap.mean for _, gap in points], [y + 0.24 * number - 0.12 for y, _ in points],
            xerr=[100 * (gap.half_width or 0.0) for _, gap in points],
            fmt="o", markersize=4, capsize=2, color=colour, label=family,
        )  # fmt: skip
    axes.axvline(0, color="#686f78", linewidth=0.8)
    axes.set_xlabel("held-out NLL against no selection, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dde1e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower left", bbox_to_anchor=(0, 1.0))


def _kept(axes: Axes, shares_of: list[list[float]]) -> None:
    """The share of each origin that was kept, as a map of numbers."""
    shares = [[100 * share for share in line] for line in shares_of]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=7.5)
    axes.set_xticks(range(len(SHARES)), list(SHARES), rotation=40, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("kept of each origin, % of its tokens")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
