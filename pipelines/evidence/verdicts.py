"""What the evidence says about each method of `kdata select`, from raw.json: the runs of question `raw`. Needs no torch.

A figure is the relative difference of the held-out NLL to training without selection, in pairs of the same seed. Of several
settings of a method the best counts, and how many there were is said.
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


@dataclass(frozen=True)
class Verdict:
    """One method: the best difference in each family of students, and how many settings were measured; empty: none was.

    cleaned: the rows were those that meet conditions of hygiene.
    """

    best: dict[str, Estimate]
    settings: int
    cleaned: bool = False

    def __str__(self) -> str:
        if not self.best:
            return "not measured"
        parts = [f"{FAMILIES[family]}: {_words(gap)}" for family, gap in self.best.items()]
        text = "; ".join(parts) + (f" (best of {self.settings})" if self.settings > 1 else "")
        return f"with the conditions of hygiene, {text}" if self.cleaned else text


def _words(gap: Estimate) -> str:
    """`helps, NLL -1.2 ± 0.3 %`: it helps or hurts where the interval leaves out 0; of one seed there is none."""
    if gap.half_width is None:
        return f"NLL {100 * gap.mean:+.1f} %, one seed"
    low, high = gap.mean - gap.half_width, gap.mean + gap.half_width
    word = "helps" if high < 0 else "hurts" if low > 0 else "no difference"
    return f"{word}, NLL {100 * gap.mean:+.1f} ± {100 * gap.half_width:.1f} %"


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
            max(map(len, of.values()), default=0),
            name == DEFAULT,
        )
        for name, of in gaps.items()
    }


def _method(content: dict[str, Any]) -> str | None:
    """The method of a setting that has no conditions beside it; None where there is none. `all` is nothing without them."""
    step = content.get("step", {"method": content.get("mixture")})
    return step["method"] if step["method"] in METHODS and ("where" in step) == (step["method"] == DEFAULT) else None
