"""What the evidence says about each method of `kdata select`, from raw.json: the runs of question `raw`. Needs no torch.

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
CLEAN = Path(__file__).with_name("mixture.json")
# Settings of the question `mixture` by method: weights of domains alone, on a clean corpus, against its own shares.
OF_CLEAN, OWN_SHARES = {"uniform": "uniform", "temperature": "static (square root of tokens)"}, "proportional"
FAMILIES = {"distillation": "distilled", "cross-entropy": "cross-entropy"}
# Methods without a run, and why: most bring no choice of their own.
UNMEASURED = {
    "sql": "your own choice",
    "static": "your own shares",
    "table": "your own shares",
    "proportional": "see random",
    "cap": "see random",
    "curriculum": "needs a judge",
}
LEGEND = (
    "NLL of students on held-out text against those of the whole corpus, in %, of a",
    "raw corpus (55 % good): below 0 is better. *: the interval leaves out 0. Of",
    "several settings of a method the best. all: with the conditions of hygiene.",
    "(1): of a clean corpus, against its own shares.",
)


@dataclass(frozen=True)
class Verdict:
    """One method: the best difference in each family of students; empty: none was measured, and `instead` says why.

    mark: stands behind the numbers; see LEGEND.
    """

    best: dict[str, Estimate]
    instead: str = ""
    mark: str = ""

    def cells(self) -> list[str]:
        """A cell for each of FAMILIES: `-1.2 ± 0.3 *` is in percent, with a star where the interval leaves out 0."""
        if not self.best:
            return [self.instead, ""]
        return [_cell(gap) + self.mark if (gap := self.best.get(family)) else "not measured" for family in FAMILIES]


def _cell(gap: Estimate) -> str:
    mean = f"{100 * gap.mean:+.1f}"
    if gap.half_width is None:
        return f"{mean}, one seed"
    return f"{mean} ± {100 * gap.half_width:.1f} {'*' if abs(gap.mean) > gap.half_width else ' '}"


def verdicts(path: Path = RESULTS, clean: Path = CLEAN) -> dict[str, Verdict]:
    """A verdict on each method of `kdata select`.

    Args:
        path: results of the question `raw`.
        clean: results of the question `mixture`, for methods that the other one has no setting of.
    Raises:
        CorruptError: a file is not what `report` writes.
    """
    gaps: dict[str, dict[str, list[Estimate]]] = {name: {} for name in METHODS}
    try:
        for setting in read_json(path)["settings"].values():
            name, gap = _method(setting["content"]), setting["nll_against_none"]
            if name is not None and gap is not None and setting["content"]["family"] in FAMILIES:
                gaps[name].setdefault(setting["content"]["family"], []).append(Estimate(**gap))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); install kdata again") from error
    of_raw = {
        name: Verdict(
            {family: min(of[family], key=lambda gap: gap.mean) for family in FAMILIES if family in of},
            UNMEASURED.get(name, "not measured"),
        )
        for name, of in gaps.items()
    }
    return {**of_raw, **{name: of for name, of in _of_clean(clean).items() if not of_raw[name].best}}


def _of_clean(path: Path) -> dict[str, Verdict]:
    """Verdicts by weights of domains alone."""
    try:
        settings = {name: one["seeds"] for name, one in read_json(path)["settings"].items()}
        gaps = {name: relative_difference(settings[key], settings[OWN_SHARES], "nll") for name, key in OF_CLEAN.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); install kdata again") from error
    return {name: Verdict({"distillation": gap}, mark=" (1)") for name, gap in gaps.items() if gap is not None}


def _method(content: dict[str, Any]) -> str | None:
    """The method of a setting that has no conditions beside it; None where there is none. `all` is nothing without them."""
    step = content.get("step", {"method": content.get("mixture")})
    return step["method"] if step["method"] in METHODS and ("where" in step) == (step["method"] == DEFAULT) else None
