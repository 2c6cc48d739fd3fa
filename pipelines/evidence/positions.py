"""Question 2: at which positions is a distribution worth its bytes and its compute?

Every student of a seed sees the same rows in the same order and takes the same number of steps, so compute is equal but for
the loss itself; "times the steps" makes that equal too. Rules that can be applied while the teacher reads (`random`,
`entropy`) are captured so, and their bytes are those on disk. Rules that need entries or a student (`margin`, `gap`) choose
from a dataset that keeps all positions, whose bytes they have. Equal bytes are found on the curves: fewer entries at all
positions, fewer positions, or fewer rows, which are then read more than once. Bytes are those kept for each token of the
whole text. "with text" adds the cross-entropy of the
actual token, with weight 1, at the positions left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import KeepEntropy, KeepPositions, KeepRandom
from kdata.pipelines.evidence.offline import BASELINE, REFERENCE, Setting
from kdata.selection.position_base import PositionRule
from kdata.selection.position_rules import Gap, Margin
from kdata.selection.ranked import All, Random

ROWS = (0.6, 0.4, 0.25, 0.15)
LONGER = 1.85  # of the tokens per second of all positions: 9,360 and 17,360 for a share of 0.2, on one core
EVERY, TEXT = "all positions", ", with text"


def settings(student: str | None) -> tuple[Setting, ...]:
    """Every setting by priority.

    Args:
        student: the model of the rule `gap`, the one that training starts from; None: without that rule.
    """
    lines = [
        Setting(REFERENCE, "online"),
        Setting(f"{EVERY}, threshold 0.03 (default)", EVERY, _threshold()),
        *_pairs("random", 0.2),
        *_pairs("entropy", 0.2),
        *_pairs("random", 0.5),
        *_pairs("entropy", 0.5),
        Setting(f"{EVERY}, sampled 12", EVERY, _sampled(12)),
        Setting(f"{EVERY}, sampled 6", EVERY, _sampled(6)),
        Setting(f"{EVERY}, sampled 3", EVERY, _sampled(3)),
        Setting(BASELINE, "none", objective="cross_entropy"),
    ]
    for share in (0.5, 0.2):
        if student is not None:
            lines += _chosen(
                f"gap {share:g}", "gap", Gap(share=share, per="row", model=student, backend="transformers")
            )
    lines += _chosen("margin 0.2", "margin", Margin(share=0.2, per="row"))
    lines += [
        *_pairs("random", 0.1),
        *_pairs("entropy", 0.1),
        *_pairs("random", 0.5, 0.0125),
        *_pairs("entropy", 0.5, 0.0125),
        *(_rows(share) for share in ROWS),
        *(_longer(s) for s in (*_pairs("random", 0.2), *_pairs("entropy", 0.2)) if s.elsewhere is None),
    ]
    return tuple(lines)


def _threshold(threshold: float = 0.03, positions: KeepPositions | None = None) -> KeepConfig:
    return KeepConfig(kind="threshold", threshold=threshold, positions=positions)


def _sampled(draws: int) -> KeepConfig:
    return KeepConfig(kind="sampled", num_draws=draws)


def _pairs(rule: str, share: float, threshold: float = 0.03) -> list[Setting]:
    """A rule applied at capture, without and with the text at the other positions."""
    positions: Any = KeepRandom(share=share) if rule == "random" else KeepEntropy(share=share)
    name = f"{rule} {share:g}" + ("" if threshold == 0.03 else f", threshold {threshold:g}")
    keep = _threshold(threshold, positions)
    return [Setting(name, rule, keep), Setting(name + TEXT, rule + TEXT, keep, elsewhere=1.0)]


def _chosen(name: str, family: str, rule: PositionRule) -> list[Setting]:
    """A rule applied to the default dataset by a plan, likewise."""
    step = All(name="".join(c if c.isalnum() else "_" for c in name), positions=rule)
    keep = _threshold()
    return [Setting(name, family, keep, step=step), Setting(name + TEXT, family + TEXT, keep, step=step, elsewhere=1.0)]


def _rows(share: float) -> Setting:
    step = Random(name=f"rows_{share:g}".replace(".", "_"), share=share, count_by="tokens")
    return Setting(f"{EVERY} of {share:g} of the rows", "rows", _threshold(), step=step)


def _longer(setting: Setting) -> Setting:
    """The same for as many steps as take the processor time of all positions; measured for a share of 0.2."""
    return replace(
        setting, name=f"{setting.name}, {LONGER:g} times the steps", family=f"{setting.family}, longer", times=LONGER
    )


def runs(chosen: tuple[Setting, ...], seeds: int) -> list[tuple[str, int]]:
    """(setting, seed) of every run: the settings by priority, each with all seeds."""
    return [(s.name, seed) for s in chosen for seed in range(seeds)]
