"""The report of a comparison: results.json, a Markdown table, and NLL against bytes per token."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.pipelines.evidence.data import TEACHER_FILE
from kdata.pipelines.evidence.offline import BASELINE, REFERENCE, SETTINGS
from kdata.pipelines.evidence.runs import Figures, identity_of
from kdata.pipelines.evidence.summary import Estimate, relative_difference, summarise

Runs = Mapping[str, Mapping[int, Figures]]
Means = Mapping[str, Mapping[str, Estimate]]
Against = Mapping[str, Estimate | None]
COLOURS = {
    "hybrid": "#0f8a6a", "sampled": "#8d5aa9", "threshold": "#b8860b", "topk, ghost": "#1f6fb5",
    "topk, renormalised": "#c4501b", "adaptive, ghost": "#4f7f8f", "hybrid, independent": "#0f8a6a",
    "sampled, independent": "#8d5aa9",
}  # fmt: skip
AIMS = ((0.1, 32), (0.5, 8))  # percent above online, bytes per token


# Bytes per token of other projects' targets that no student was trained on. Measured: a file of 24 documents in their format,
# V = 8,192, divided by its tokens. Published: figures of their authors, for large vocabularies.
PEER_SIZES = (
    ("axolotl's columns, k=16, measured", 159), ("DistillKit, k=80 in bins, measured", 207),
    ("DistillKit, k=128, measured", 263), ("k=50, published", 127), ("k=128, published", 344),
    ("random sampling, published", 36),
)  # fmt: skip


def write_report(
    out: Path,
    runs: Runs,
    plot: Callable[[Means, Against], Figure] | None = None,
    *,
    describe: Callable[[str], Mapping[str, Any]] | None = None,
) -> str:
    """Write results.json, table.md and evidence.png of the runs that are measured; return the table.

    Args:
        plot: draws the figure from means and differences; None: that of question 1.
        describe: the content of a setting, by its name, as JSON values, for results.json; None: it is left out.
    """
    means = {name: summarise(seeds) for name, seeds in runs.items()}
    against = {name: relative_difference(seeds, runs.get(REFERENCE, {}), "nll") for name, seeds in runs.items()}
    write_results(out, runs, means, {"nll_against_online": against}, describe)
    table = markdown(means, against)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    (plot or _plot)(means, against).savefig(out / "evidence.png", dpi=110)
    return table


def write_results(
    out: Path,
    runs: Runs,
    means: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Mapping[str, Estimate | None]],
    describe: Callable[[str], Mapping[str, Any]] | None = None,
) -> None:
    """Write results.json: what all runs share (`set_up`), and for every setting its content, means, differences and seeds."""
    content = {
        name: {
            **({} if describe is None else {"content": describe(name)}),
            **{figure: asdict(value) for figure, value in estimates.items()},
            **{
                difference: None if (gap := by_setting[name]) is None else asdict(gap)
                for difference, by_setting in differences.items()
            },
            "seeds": {str(seed): figures for seed, figures in runs[name].items()},
        }
        for name, estimates in means.items()
    }
    results = {"set_up": set_up_of(out), "settings": content}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def set_up_of(out: Path) -> dict[str, Any]:
    """The teacher that read the data in a folder, and the settings that its runs share; empty where nothing says so."""
    teacher = out / "data" / TEACHER_FILE
    known = json.loads(teacher.read_text(encoding="utf-8")) if teacher.exists() else {}
    return {**known, **identity_of(out / "runs")}


def markdown(means: Means, against: Against) -> str:
    """The table as Markdown: one line per setting, mean ± half-width of the 95 % interval."""
    lines = [
        "| target | B/token | NLL | against online | KL | ECE, % | tokens/s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peers = {s.name: s.peer for s in SETTINGS}
    for name, estimates in means.items():
        size = f"{estimates['bytes_per_token'].mean:.1f}" if "bytes_per_token" in estimates else "-"
        label = f"{name} ({peers[name]})" if peers.get(name) else name
        cells = [
            label,
            size,
            text_of(estimates["nll"], 3),
            "-" if name == REFERENCE else text_of(against[name], 2, 100, "%", sign="+"),
            text_of(estimates["kl"], 3),
            text_of(estimates["ece"], 2, 100),
            f"{estimates['tokens_per_sec'].mean:,.0f}",
            str(estimates["nll"].count),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def text_of(value: Estimate | None, digits: int, scale: float = 1.0, unit: str = "", *, sign: str = "") -> str:
    """An estimate as text: mean ± half-width, times `scale`."""
    if value is None:
        return "-"
    mean = f"{value.mean * scale:{sign}.{digits}f}"
    width = "" if value.half_width is None else f" ± {value.half_width * scale:.{digits}f}"
    return f"{mean}{width}{f' {unit}' if unit else ''}"


def _plot(means: Means, against: Against) -> Figure:
    """NLL above online distillation against bytes per token: one curve per family, a line for cross-entropy."""
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    if (gap := against.get(BASELINE)) is not None:
        axes.axhline(100 * gap.mean, color="#686f78", linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{BASELINE} {means[BASELINE]['nll'].mean:.3f}", (0.01, 100 * gap.mean), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="left", va="bottom", fontsize=8.5, color="#686f78",
        )  # fmt: skip
    for family, colour in COLOURS.items():
        _curve(axes, means, against, family, colour)
    for percent, size in AIMS:
        axes.plot([1, size, size], [percent, percent, 0], color="#b6bcc4", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            f"aim: {percent} %", (7.2, percent), (0, 2), textcoords="offset points", fontsize=7.5, color="#686f78"
        )
    axes.set_xlabel("bytes per token on disk, whole payload")
    online = f" ({means[REFERENCE]['nll'].mean:.3f})" if REFERENCE in means else ""
    axes.set_ylabel(f"held-out NLL above online full distillation{online}, %\nmean and 95 % interval of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(7, 420)
    axes.set_xticks(
        [8, 12, 20, 32, 45, 65, 100, 150, 200, 300, 400],
        ["8", "12", "20", "32", "45", "65", "100", "150", "200", "300", "400"],
    )
    axes.minorticks_off()
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.6)
    axes.set_yticks([0, 0.1, 0.2, 0.5, 1, 2, 5], ["0", "0.1", "0.2", "0.5", "1", "2", "5"])
    axes.set_ylim(-0.05, 8)
    for name, size in PEER_SIZES:
        axes.plot(size, 0.02, "v", color="#686f78", markersize=5, transform=axes.get_xaxis_transform())
        axes.text(
            size, 0.05, name,
            rotation=90, fontsize=7, ha="center", va="bottom", color="#686f78",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.47), ncols=2)
    return figure


def _curve(
    axes: Axes,
    means: Means,
    against: Against,
    family: str,
    colour: str,
) -> None:
    """One family by increasing size. Independent draws are dashed and hollow; settings of a peer have a square."""
    chosen = [s for s in SETTINGS if s.family == family and s.name in means]
    points = sorted(
        ((means[s.name]["bytes_per_token"].mean, gap, s) for s in chosen if (gap := against.get(s.name)) is not None),
        key=lambda point: point[0],
    )
    if not points:
        return
    plain = not family.endswith("independent")
    axes.errorbar(
        [size for size, _, _ in points], [100 * gap.mean for _, gap, _ in points],
        [100 * (gap.half_width or 0.0) for _, gap, _ in points], color=colour, linewidth=1.3, marker="o", markersize=4,
        capsize=2, linestyle="-" if plain else "--", markerfacecolor=colour if plain else "white", label=family,
    )  # fmt: skip
    for size, gap, setting in points:
        label = setting.name.removeprefix(f"{family.split(',')[0]} ").split(",")[0].removesuffix(" (default)")
        if setting.peer:
            axes.plot(size, 100 * gap.mean, "s", color=colour, markersize=9, fillstyle="none")
            label = f"{label} [{setting.peer.split(',')[0]}]"
        if not plain and not setting.peer:
            continue  # the other draw method has a label at this size
        # The labels of sampled kinds go below those of hybrids, and those of independent draws above.
        away, side = ((-6, 6), "right") if family == "sampled, independent" and size > 30 else ((4, 5), "left")
        if family == "sampled":
            away = (4, -12)
        if family == "threshold":
            away, side = (-5, 2), "right"
        axes.annotate(
            label, (size, 100 * gap.mean), away, textcoords="offset points", ha=side, fontsize=8, color=colour
        )
