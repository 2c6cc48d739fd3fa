"""What the evidence says about each method of `kdata select`: the runs of question `raw`, with two teachers. Needs no torch.

A figure is the relative difference of the held-out NLL to training without selection, in pairs of the same seed. Of several
settings of a method the best counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdata.errors import CorruptError
from kdata.format.json_text import read_json
from kdata.pipelines.evidence.summary import Estimate, relative_difference
from kdata.selection.select import DEFAULT, METHODS

RESULTS = Path(__file__).with_name("raw.json")
GEMMA = Path(__file__).with_name("raw_gemma.json")
CLEAN = Path(__file__).with_name("mixture.json")
# Settings of the question `mixture` by method: weights of domains alone, on a clean corpus, against its own shares.
OF_CLEAN, OWN_SHARES = {"uniform": "uniform", "temperature": "static (square root of tokens)"}, "proportional"
DISTILLED, FROM_TEXT, BY_GEMMA = "distilled", "from text", "Gemma"
COLUMNS = (DISTILLED, FROM_TEXT, BY_GEMMA)
NO_RUNS = {"sql", "static", "table", "proportional", "cap", "curriculum"}  # bring no choice of their own; see LEGEND
LEGEND = (
    "NLL of students on clean held-out text against students of the whole corpus, in",
    "%, of a raw corpus (55 % good): below 0 is better. *: the 95 % interval leaves",
    "out 0. Of several settings of a method the best, so a little is luck. distilled",
    "and from text: teacher of 10M parameters. Gemma: distilled from Gemma 3 270M.",
    "all: with the conditions of hygiene. c: of a clean corpus, against its shares.",
    "-: no run. sql, static, table: your own choice. proportional, cap: as random.",
    "curriculum: needs a judge. More: pipelines/README.md",
)


@dataclass(frozen=True)
class Verdict:
    """One method: the best difference by column of COLUMNS; empty: none was measured.

    mark: stands behind the numbers; see LEGEND.
    """

    best: dict[str, Estimate]
    mark: str = ""

    def cells(self) -> list[str]:
        """A cell for each of COLUMNS: `-1.2±0.3*` is in percent, with a star where the interval leaves out 0."""
        return [_cell(gap) + self.mark if (gap := self.best.get(column)) else "-" for column in COLUMNS]


def _cell(gap: Estimate) -> str:
    mean = f"{100 * gap.mean:+.1f}"
    if gap.half_width is None:
        return f"{mean}, n=1"
    return f"{mean}±{100 * gap.half_width:.1f}{'*' if abs(gap.mean) > gap.half_width else ''}"


def verdicts(path: Path = RESULTS, gemma: Path = GEMMA, clean: Path = CLEAN) -> dict[str, Verdict]:
    """A verdict on each method of `kdata select`.

    Args:
        path: results of the question `raw`.
        gemma: results of the same question with a language model as teacher.
        clean: results of the question `mixture`, for methods that the other ones have no setting of.
    Raises:
        CorruptError: a file is not what `report` writes.
    """
    own = _gaps(path)
    gaps = {DISTILLED: own["distillation"], FROM_TEXT: own["cross-entropy"], BY_GEMMA: _gaps(gemma)["distillation"]}
    of_raw = {
        name: Verdict({column: min(of[name], key=lambda gap: gap.mean) for column, of in gaps.items() if name in of})
        for name in METHODS
    }
    return {**of_raw, **{name: of for name, of in _of_clean(clean).items() if not of_raw[name].best}}


def _gaps(path: Path) -> dict[str, dict[str, list[Estimate]]]:
    """By family of students and method: the differences of the method's settings to no selection."""
    gaps: dict[str, dict[str, list[Estimate]]] = {"distillation": {}, "cross-entropy": {}}
    try:
        for setting in read_json(path)["settings"].values():
            content, gap = setting["content"], setting["nll_against_none"]
            name = _method(content)
            if name is not None and gap is not None and content["family"] in gaps:
                gaps[content["family"]].setdefault(name, []).append(Estimate(**gap))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); install kdata again") from error
    return gaps


def _of_clean(path: Path) -> dict[str, Verdict]:
    """Verdicts by weights of domains alone."""
    try:
        settings = {name: one["seeds"] for name, one in read_json(path)["settings"].items()}
        gaps = {name: relative_difference(settings[key], settings[OWN_SHARES], "nll") for name, key in OF_CLEAN.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); install kdata again") from error
    return {name: Verdict({DISTILLED: gap}, mark="c") for name, gap in gaps.items() if gap is not None}


def _method(content: dict[str, Any]) -> str | None:
    """The method of a setting that has no conditions beside it; None where there is none. `all` is nothing without them."""
    step = content.get("step", {"method": content.get("mixture")})
    return step["method"] if step["method"] in METHODS and ("where" in step) == (step["method"] == DEFAULT) else None
