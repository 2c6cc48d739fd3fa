"""The report of question `raw`: results.json, Markdown tables, and a picture of what each method kept and what it brought."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.pipelines.evidence.figures import text_of, write_results
from kdata.pipelines.evidence.raw import SHARES
from kdata.pipelines.evidence.raw_question import NONE, SETTINGS, TRAINED, describe
from kdata.pipelines.evidence.runs import Figures
from kdata.pipelines.evidence.selection import key_of
from kdata.pipelines.evidence.summary import Estimate, relative_difference, summarise

Runs = Mapping[str, Mapping[int, Figures]]
Means = Mapping[str, Mapping[str, Estimate]]
Against = Mapping[str, Estimate | None]
FAMILIES = {"distillation": "#1f6fb5", "cross-entropy": "#c4501b"}


def write_report(out: Path, runs: Runs) -> str:
    """Write results.json, table.md and evidence.png of the runs that are measured; return the tables."""
    means = {name: summarise(seeds) for name, seeds in runs.items()}
    against = {
        name: None if name == none_of(name) else relative_difference(seeds, runs.get(none_of(name), {}), "nll")
        for name, seeds in runs.items()
    }
    write_results(out, runs, means, {"nll_against_none": against}, describe)
    table = f"{markdown(means, against)}\n\n{kept_markdown(means)}"
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(means, against).savefig(out / "evidence.png", dpi=110)
    return table


def none_of(key: str) -> str:
    """The setting that one is compared with: no selection, with the same objective or the nearest one."""
    family = next(s.family for s in SETTINGS if key_of(s) == key)
    return f"{NONE} ({family if family in (*FAMILIES, TRAINED) else 'distillation'})"


def names_of(means: Means) -> list[str]:
    """Names of the settings that are measured, once for all families, in their order."""
    return list(dict.fromkeys(s.name for s in SETTINGS if key_of(s) in means))


def markdown(means: Means, against: Against) -> str:
    """One line per method: what it kept, and the NLL of both kinds of students; mean ± half-width of the 95 % interval."""
    heads = [f"NLL, {family} | against no selection" for family in FAMILIES]
    lines = [f"| method | precision | recall | {' | '.join(heads)} | leaked text | seeds |", "|" + "---|" * 9]
    for name in names_of(means):
        keys = [f"{name} ({family})" for family in FAMILIES]
        own = next((means[key] for key in keys if key in means), None)
        if own is None:
            continue
        cells = [name, f"{own['precision'].mean:.2f}", f"{own['recall'].mean:.2f}"]
        for key in keys:
            cells += [
                text_of(means[key]["nll"], 3) if key in means else "-",
                text_of(against.get(key), 2, 100, "%", sign="+") if name != NONE else "-",
            ]
        seeds = [str(means[key]["nll"].count) for key in keys if key in means]
        lines.append(f"| {' | '.join([*cells, text_of(own['nll_benchmark'], 3), ' + '.join(dict.fromkeys(seeds))])} |")
    for setting in SETTINGS:
        if setting.family not in FAMILIES and (key := key_of(setting)) in means:
            change = "-" if key == none_of(key) else text_of(against.get(key), 2, 100, "%", sign="+")
            lines.append(
                f"| {key} | {means[key]['precision'].mean:.2f} | {means[key]['recall'].mean:.2f} "
                f"| {text_of(means[key]['nll'], 3)} | {change} | - | - "
                f"| {text_of(means[key]['nll_benchmark'], 3)} | {means[key]['nll'].count} |"
            )
    return "\n".join(lines)


def kept_markdown(means: Means) -> str:
    """One line per method: the share of each origin's tokens that it kept, in percent."""
    lines = [f"| kept of, % | {' | '.join(SHARES)} |", "|" + "---|" * (len(SHARES) + 1)]
    for name in names_of(means):
        shares = [f"{100 * _any(means, name)[f'kept {origin}'].mean:.0f}" for origin in SHARES]
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _any(means: Means, name: str) -> Mapping[str, Estimate]:
    return next(means[key_of(s)] for s in SETTINGS if s.name == name and key_of(s) in means)


def _plot(means: Means, against: Against) -> Figure:
    names = names_of(means)
    figure = Figure(figsize=(10.5, 1.6 + 0.33 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.15])
    _changes(left, names, against)
    _kept(right, names, means)
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


def _kept(axes: Axes, names: list[str], means: Means) -> None:
    """The share of each origin that was kept, as a map of numbers."""
    shares = [[100 * _any(means, name)[f"kept {origin}"].mean for origin in SHARES] for name in names]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=7.5)
    axes.set_xticks(range(len(SHARES)), list(SHARES), rotation=40, ha="left", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("kept of each origin, % of its tokens")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
