"""The report of a comparison: results.json, a Markdown table, and NLL against bytes per token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.evidence.offline import BASELINE, REFERENCE, SETTINGS
from pipelines.evidence.runs import Figures
from pipelines.evidence.summary import Estimate, relative_difference, summarise

Runs = Mapping[str, Mapping[int, Figures]]
COLOURS = {
    "hybrid": "#0f8a6a", "sampled": "#8d5aa9", "topk, ghost": "#1f6fb5", "topk, renormalised": "#c4501b",
    "adaptive, ghost": "#4f7f8f",
}  # fmt: skip


# Bytes per token of others' targets that were not trained on. Measured: a file of 24 documents in their format, V = 8,192,
# over its tokens. Published: figures as their authors give them, for large vocabularies.
PEER_SIZES = (
    ("axolotl's columns, k=16, measured", 159), ("DistillKit, k=80 in bins, measured", 207),
    ("DistillKit, k=128, measured", 263), ("k=50, published", 127), ("k=128, published", 344),
    ("random sampling, published", 36),
)  # fmt: skip


def write_report(out: Path, runs: Runs) -> str:
    """Write results.json, table.md and evidence.png of the runs that are there; return the table."""
    means = {name: summarise(seeds) for name, seeds in runs.items()}
    against = {name: relative_difference(seeds, runs.get(REFERENCE, {}), "nll") for name, seeds in runs.items()}
    write_results(out, runs, means, {"nll_against_online": against})
    table = markdown(means, against)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    _plot(means).savefig(out / "evidence.png", dpi=110)
    return table


def write_results(
    out: Path,
    runs: Runs,
    means: Mapping[str, Mapping[str, Estimate]],
    differences: Mapping[str, Mapping[str, Estimate | None]],
) -> None:
    """Write results.json: of every setting the means, the differences by name, and the figures of its seeds."""
    content = {
        name: {
            **{figure: asdict(value) for figure, value in found.items()},
            **{what: None if (gap := of[name]) is None else asdict(gap) for what, of in differences.items()},
            "seeds": {str(seed): figures for seed, figures in runs[name].items()},
        }
        for name, found in means.items()
    }
    (out / "results.json").write_text(json.dumps({"settings": content}, indent=1), encoding="utf-8")


def markdown(means: Mapping[str, Mapping[str, Estimate]], against: Mapping[str, Estimate | None]) -> str:
    """The table of a README: one line a setting, mean ± half-width of the 95 % interval."""
    lines = [
        "| target | B/token | NLL | against online | KL | ECE, % | tokens/s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peers = {s.name: s.peer for s in SETTINGS}
    for name, found in means.items():
        size = f"{found['bytes_per_token'].mean:.1f}" if "bytes_per_token" in found else "-"
        label = f"{name} ({peers[name]})" if peers.get(name) else name
        cells = [
            label,
            size,
            told(found["nll"], 3),
            "-" if name == REFERENCE else told(against[name], 2, 100, "%", sign="+"),
            told(found["kl"], 3),
            told(found["ece"], 2, 100),
            f"{found['tokens_per_sec'].mean:,.0f}",
            str(found["nll"].count),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def told(value: Estimate | None, digits: int, scale: float = 1.0, unit: str = "", *, sign: str = "") -> str:
    """An estimate in words: mean ± half-width, times `scale`."""
    if value is None:
        return "-"
    mean = f"{value.mean * scale:{sign}.{digits}f}"
    width = "" if value.half_width is None else f" ± {value.half_width * scale:.{digits}f}"
    return f"{mean}{width}{f' {unit}' if unit else ''}"


def _plot(means: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """NLL against bytes per token: one curve a family, lines for online distillation and cross-entropy."""
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in ((REFERENCE, "#22262b"), (BASELINE, "#686f78")):
        if name in means:
            nll = means[name]["nll"]
            axes.axhline(nll.mean, color=colour, linewidth=1.2, linestyle="--")
            axes.annotate(
                f"{name} {nll.mean:.3f}", (0.99, nll.mean), xycoords=("axes fraction", "data"), xytext=(0, -3),
                textcoords="offset points", ha="right", va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    for family, colour in COLOURS.items():
        _curve(axes, means, family, colour)
    for limit in (32, 65):
        axes.axvline(limit, color="#b6bcc4", linewidth=0.8, linestyle=":")
    axes.set_xlabel("bytes per token on disk, whole payload")
    axes.set_ylabel("held-out NLL, nats per token (mean and 95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xscale("log")
    axes.set_xlim(18, 420)
    axes.set_xticks(
        [20, 32, 45, 65, 100, 150, 200, 300, 400], ["20", "32", "45", "65", "100", "150", "200", "300", "400"]
    )
    axes.minorticks_off()
    for name, size in PEER_SIZES:
        axes.plot(size, 0.02, "v", color="#686f78", markersize=5, transform=axes.get_xaxis_transform())
        axes.text(
            size, 0.05, name,
            rotation=90, fontsize=7, ha="center", va="bottom", color="#686f78",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure


def _curve(axes: Axes, means: Mapping[str, Mapping[str, Estimate]], family: str, colour: str) -> None:
    """One family by rising size; what a peer distributes has a square."""
    chosen = [s for s in SETTINGS if s.family == family and s.name in means]
    points = sorted(
        ((means[s.name]["bytes_per_token"].mean, means[s.name]["nll"], s) for s in chosen), key=lambda point: point[0]
    )
    if not points:
        return
    sizes = [size for size, _, _ in points]
    nlls = [nll.mean for _, nll, _ in points]
    widths = [nll.half_width or 0.0 for _, nll, _ in points]
    axes.errorbar(sizes, nlls, widths, color=colour, linewidth=1.3, marker="o", markersize=4, capsize=2, label=family)
    for size, nll, setting in points:
        label = setting.name.removeprefix(f"{family.split(',')[0]} ").split(",")[0].removesuffix(" (default)")
        if setting.peer:
            axes.plot(size, nll.mean, "s", color=colour, markersize=9, fillstyle="none")
            label = f"{label} [{setting.peer.split(',')[0]}]"
        below = -12 if family == "sampled" else 5  # beside the hybrid kinds, which are as good
        axes.annotate(label, (size, nll.mean), (4, below), textcoords="offset points", fontsize=8, color=colour)
