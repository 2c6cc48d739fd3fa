"""Colors and style that all plots share, and how a picture becomes a file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdata.errors import ConfigError, DependencyError
from kdata.format.files import storage_errors, write_atomically
from kdata.observe.progress import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MISSING = re.compile(r"Glyph .* missing from font")
ENDINGS = (".png", ".svg", ".pdf")

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


def check_picture(path: Path) -> None:
    """Raise DependencyError where matplotlib is not installed, and ConfigError where the ending is none of a picture."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError("the picture needs matplotlib: pip install 'kdata[report]'") from error
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path}: a picture ends in {', '.join(ENDINGS)}; give it one of these endings")


@contextmanager
def missing_signs() -> Iterator[list[str]]:
    """Collect matplotlib's warnings about signs that its font lacks, instead of printing them."""
    missing: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield missing
    for one in caught:
        if _MISSING.match(str(one.message)):
            missing.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def save_picture(figure: Figure, path: Path) -> Path:
    """Write a figure to a file that `check_picture` accepts; return its path. Raises StorageError."""
    sink = io.BytesIO()
    with missing_signs() as missing:
        figure.savefig(sink, format=path.suffix[1:], dpi=150, facecolor=COLOURS["page"])
    if missing and path.suffix != ".svg":
        console.print(
            f"{path}: the font lacks signs of the names, so some are boxes; in an .svg the browser has its own fonts",
            soft_wrap=True,
        )
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, sink.getvalue())
    return path
