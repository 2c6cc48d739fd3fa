"""The report of questions 4 and 5: results.json, a Markdown table, and a plot of the gap to the teacher in each domain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.pipelines.evidence.figures import text_of, write_results
from kdata.pipelines.evidence.runs import Figures
from kdata.pipelines.evidence.selection import SETTINGS, Question, find, key_of
from kdata.pipelines.evidence.summary import Estimate, relative_difference, summarise

Runs = Mapping[str, Mapping[int, Figures]]
Means = Mapping[str, Mapping[str, Estimate]]
COLUMNS = {"nll": "NLL", "mean_gap": "mean gap", "worst_gap": "worst gap", "kl": "KL"}
COMPARED = ("mean_gap", "worst_gap")
COLOURS = ("#686f78", "#1f6fb5", "#8d5aa9", "#0f8a6a", "#c4501b")


def write_report(question: Question, out: Path, runs: Runs) -> str:
    """Write results.json, table.md and evidence.png of the runs that are measured; return the table."""
    means = {name: summarise(seeds) for name, seeds in runs.items()}
    against = {
        f"{figure}_against_baseline": {
            name: relative_difference(seeds, runs.get(baseline(question, name), {}), figure)
            for name, seeds in runs.items()
        }
        for figure in COMPARED
    }
    write_results(out, runs, means, against)
    table = markdown(question, means, against)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(question, means).savefig(out / "evidence.png", dpi=110)
    return table


def baseline(question: Question, key: str) -> str:
    """The setting that the others of its family are compared with: the first one."""
    family = find(question, key).family
    return key_of(next(s for s in SETTINGS[question] if s.family == family))


def markdown(question: Question, means: Means, against: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """The table as Markdown: one line per setting, mean ± half-width of the 95 % interval."""
    compared = [f"{COLUMNS[figure]} against the baseline" for figure in COMPARED]
    lines = [
        f"| setting | {' | '.join([*COLUMNS.values(), *compared])} | tokens | seeds |",
        f"|{'---|' * (len(COLUMNS) + len(COMPARED) + 3)}",
    ]
    for name, estimates in means.items():
        base = name == baseline(question, name)
        differences = [text_of(of[name], 2, 100, "%", sign="+") for of in against.values()]
        cells = [
            name,
            *(text_of(estimates[figure], 3) for figure in COLUMNS),
            *(["baseline", "-"] if base else differences),
            f"{estimates['tokens'].mean / 1e6:.2f} M",
            str(estimates["nll"].count),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plot(question: Question, means: Means) -> Figure:
    """One panel per family: the gap to the teacher in each domain, their mean and the worst."""
    families = list(dict.fromkeys(s.family for s in SETTINGS[question] if key_of(s) in means))
    figure = Figure(figsize=(8.6, 3.6 * len(families)), layout="constrained")
    panels = figure.subplots(len(families), squeeze=False)[:, 0]
    for axes, family in zip(panels, families, strict=True):
        _panel(axes, question, family, means)
    return figure


def _panel(axes: Axes, question: Question, family: str, means: Means) -> None:
    keys = [key_of(s) for s in SETTINGS[question] if s.family == family and key_of(s) in means]
    places = [name for name in means[keys[0]] if name.startswith("gap ")] + ["mean_gap", "worst_gap"]
    for number, key in enumerate(keys):
        estimates = [means[key][place] for place in places]
        x = [i + (number - (len(keys) - 1) / 2) * 0.13 for i in range(len(places))]
        widths = [value.half_width or 0.0 for value in estimates]
        label = key.removesuffix(f" ({family})")
        axes.errorbar(
            x, [value.mean for value in estimates], widths,
            fmt="o", markersize=5, capsize=2, color=COLOURS[number % len(COLOURS)], label=label,
        )  # fmt: skip
    names = [place.removeprefix("gap ").replace("_gap", "") for place in places]
    axes.set_xticks(range(len(places)), names)
    axes.axvline(len(places) - 2.5, color="#b6bcc4", linewidth=0.8, linestyle=":")
    axes.set_ylabel("NLL above the teacher's, nats per token")
    axes.set_title(family, loc="left", fontsize=9.5, pad=40)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dde1e6")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.0))
