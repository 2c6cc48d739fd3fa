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
from kdata.pipelines.evidence.summary import Estimate
from kdata.selection.select import DEFAULT, METHODS

RESULTS = Path(__file__).with_name("raw.json")
FAMILIES = {"distillation": "distilled", "cross-entropy": "cross-entropy"}
# Methods that bring no choice of their own to measure, and what to read instead.
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
)


@dataclass(frozen=True)
class Verdict:
    """One method: the best difference in each family of students; empty: none was measured, and `instead` says why."""

    best: dict[str, Estimate]
    instead: str = ""

    def cells(self) -> list[str]:
        """A cell for each of FAMILIES: `-1.2 ± 0.3 *` is in percent, with a star where the interval leaves out 0."""
        return [_cell(self.best.get(family)) for family in FAMILIES] if self.best else [self.instead, ""]


def _cell(gap: Estimate | None) -> str:
    if gap is None:
        return "not measured"
    mean = f"{100 * gap.mean:+.1f}"
    if gap.half_width is None:
        return f"{mean}, one seed"
    return f"{mean} ± {100 * gap.half_width:.1f} {'*' if abs(gap.mean) > gap.half_width else ' '}"


def verdicts(path: Path = RESULTS) -> dict[str, Verdict]:
    """A verdict on each method of `kdata select`.

    Raises:
        CorruptError: raw.json is not what `report raw` writes.
    """
    gaps: dict[str, dict[str, list[Estimate]]] = {name: {} for name in METHODS}
    try:
        for setting in read_json(path)["settings"].values():
            name, gap = _method(setting["content"]), setting["nll_against_none"]
            if name is not None and gap is not None and setting["content"]["family"] in FAMILIES:
                gaps[name].setdefault(setting["content"]["family"], []).append(Estimate(**gap))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is damaged ({error!r}); install kdata again") from error
    return {
        name: Verdict(
            {family: min(of[family], key=lambda gap: gap.mean) for family in FAMILIES if family in of},
            UNMEASURED.get(name, "not measured"),
        )
        for name, of in gaps.items()
    }


def _method(content: dict[str, Any]) -> str | None:
    """The method of a setting that has no conditions beside it; None where there is none. `all` is nothing without them."""
    step = content.get("step", {"method": content.get("mixture")})
    return step["method"] if step["method"] in METHODS and ("where" in step) == (step["method"] == DEFAULT) else None
