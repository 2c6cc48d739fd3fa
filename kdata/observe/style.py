"""Colors and style that all plots share."""

from __future__ import annotations

from typing import Any

# Hues that stay apart for the colour-blind, 3:1 on white; `report.html.j2` has their dark counterparts.
COLOURS = {
    "ink": "#22262b", "muted": "#686f78", "grid": "#dde1e6", "page": "#fffffe",
    "ce": "#c4501b", "everything": "#1f6fb5", "plan": "#0f8a6a",
    "x1": "#8d5aa9", "x2": "#a97b00", "x3": "#4f7f8f",
    "capture": "#5b7fb0", "generate": "#c97f1f", "rest": "#b6bcc4",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"], "axes.titlesize": 9.5, "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True, "grid.color": COLOURS["grid"], "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"], "legend.handlelength": 1.2, "figure.constrained_layout.h_pad": 0.03,
}  # fmt: skip
