"""The plot of question 2: NLL above online distillation against bytes; fewer entries, fewer positions, fewer rows.

Rules that choose from a dataset of all positions have its bytes, and are in the table alone.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.pipelines.evidence.figures import Against, Means
from kdata.pipelines.evidence.offline import BASELINE, Setting
from kdata.pipelines.evidence.positions import EVERY, TEXT

COLOURS = {EVERY: "#b8860b", "rows": "#0f8a6a", "random": "#1f6fb5", "entropy": "#8d5aa9"}
NAMES = {
    EVERY: "fewer entries",
    "rows": "fewer rows",
    "random": "fewer positions, at random",
    "entropy": "fewer positions, by entropy",
}
TOP = 3.6  # percent; what lies above is in the table alone


def plot(settings: tuple[Setting, ...], means: Means, against: Against) -> Figure:
    """One line for each family; hollow and dashed where the text counts at the other positions."""
    figure = Figure(figsize=(8.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    if (gap := against.get(BASELINE)) is not None:
        axes.axhline(100 * gap.mean, color="#686f78", linewidth=1.2, linestyle="--")
        axes.annotate(
            "the text alone", (0.99, 100 * gap.mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", fontsize=8.5, color="#686f78",
        )  # fmt: skip
    for family, colour in COLOURS.items():
        for suffix in ("", TEXT):
            own = [s for s in settings if s.family == family + suffix]
            _line(axes, own, means, against, colour, NAMES[family] + suffix)
    axes.set_xlabel("bytes kept for each token of the text, whole payload")
    axes.set_ylabel("held-out NLL above online full distillation, %\nmean and 95 % interval of pairs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0, TOP)
    axes.set_xlim(3, 34)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 0.66))
    return figure


def _line(axes: Axes, settings: list[Setting], means: Means, against: Against, colour: str, label: str) -> None:
    points = sorted(
        (means[s.name]["bytes_per_token"].mean, 100 * gap.mean, 100 * (gap.half_width or 0.0), s.name)
        for s in settings
        if (gap := against.get(s.name)) is not None and "bytes_per_token" in means[s.name]
    )
    if not points:
        return
    with_text = label.endswith(TEXT)
    axes.errorbar(
        [p[0] for p in points], [p[1] for p in points], [p[2] for p in points], color=colour, linewidth=1.2, marker="o",
        markersize=4.5, capsize=2, linestyle="--" if with_text else "-", markerfacecolor="white" if with_text else colour,
        label=label,
    )  # fmt: skip
    for size, above, _, name in points:
        text = (
            name.removeprefix(f"{EVERY}, ").removeprefix(f"{EVERY} of ").removesuffix(TEXT).removesuffix(" (default)")
        )
        if above < TOP:
            axes.annotate(text, (size, above), (5, 4), textcoords="offset points", fontsize=7, color=colour)
