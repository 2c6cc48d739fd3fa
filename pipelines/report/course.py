"""The picture of `kdata hacking`: proxy and golden of each kept model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdata.observe.style import COLOURS, STYLE, check_picture, save_picture


def draw_course(measured: dict[str, Any], path: Path) -> Path:
    """Draw proxy and golden against the step, golden with a mark at its least value.

    Args:
        measured: what `kdata.trainer.hacking.hacking` returns.
        path: ends in .png, .svg or .pdf.
    Raises:
        StorageError: the disk refused. Others: as `check_picture`.
    """
    check_picture(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps = [model["step"] for model in measured["models"]]
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, name, label, colour in (
            (panels[0], "proxy", "proxy: KL to the teacher", "everything"),
            (panels[1], "golden", f"golden: {measured['golden_is'].partition(':')[0]}", "ce"),
        ):
            values = [model[name] for model in measured["models"]]
            axes.plot(steps, values, color=COLOURS[colour], marker="o", markersize=3)
            axes.set_title(label, loc="left")
            axes.set_ylabel("nats per token")
            axes.grid(True)
        panels[1].axvline(measured["best_step"], color=COLOURS["muted"], linestyle=":")
        panels[1].set_xlabel("step")
        figure.suptitle(measured["label"], x=0.01, ha="left", fontsize=11)
        return save_picture(figure, path)
