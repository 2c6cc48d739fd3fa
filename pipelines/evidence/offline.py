"""Question 1: how good is offline distillation? What to keep of the teacher, how to complete the rest, which objective.

All students of a seed have the same initial weights and see the same batches. Only their targets differ. The settings of
question 2, at which positions (`kdata.pipelines.evidence.positions`), are trained and measured by the same class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import Field

import kdata
from kdata.config import Strict
from kdata.format.keep import KeepConfig
from kdata.pipelines.evidence.data import DataConfig, EvidenceData, bytes_per_token
from kdata.pipelines.evidence.online import OnlineLearner
from kdata.pipelines.evidence.runs import Figures, by_name
from kdata.pipelines.evidence.students import train_and_measure
from kdata.selection.ranked import Random
from kdata.selection.step import Step
from kdata.trainer.config import ScratchStudent, StudentConfig, TrainConfig
from kdata.trainer.learner import Learner
from kdata.trainer.objective_config import OBJECTIVE_NAMES, ObjectiveConfig
from kdata.trainer.train import LearnerOf

Method = Literal["systematic", "independent"]
REFERENCE = "online, full distribution"
BASELINE = "cross-entropy"


@dataclass(frozen=True)
class Setting:
    """One way to train.

    keep: what is kept of the teacher; None: nothing (cross-entropy), or everything (online). family: its curve in the plot.
    beside: weights of other objectives in the mix, in which `objective` has weight 1. peer: who distributes or recommends
    such targets, as far as our kinds can reproduce them. step: chooses rows or positions of the dataset, None: all.
    elsewhere: weight of the cross-entropy where positions keep or count nothing. times: factor on the number of steps.
    """

    name: str
    family: str
    keep: KeepConfig | None = None
    tail: Literal["auto", "ghost", "draws", "renormalise"] = "auto"
    objective: str = "forward_kl"
    beside: tuple[tuple[str, float], ...] = ()
    peer: str | None = None
    step: Step | None = None
    elsewhere: float | None = None
    times: float = 1.0

    def describe(self) -> dict[str, Any]:
        """What it is, as JSON values; of a model that chooses positions, the folder's name alone."""
        keep = None if self.keep is None else {"kind": self.keep.kind, **self.keep.settings()}
        mix = " + ".join([self.objective, *(f"{weight:g} {name}" for name, weight in self.beside)])
        content: dict[str, Any] = {"keep": keep, "tail": self.tail, "objective": mix}
        if self.step is not None:
            step = self.step.model_dump(mode="json")
            if "model" in (step.get("positions") or {}):
                step["positions"]["model"] = Path(step["positions"]["model"]).name
            content["step"] = step
        if self.elsewhere is not None:
            content["elsewhere"] = self.elsewhere
        return content if self.times == 1 else {**content, "times": self.times}


def _top(k: int) -> KeepConfig:
    return KeepConfig(kind="topk", k=k)


def _hybrid(k: int, draws: int, method: Method = "systematic") -> KeepConfig:
    return KeepConfig(kind="hybrid", k=k, num_draws=draws, draw_method=method)


def _sampled(draws: int, method: Method = "systematic") -> KeepConfig:
    return KeepConfig(kind="sampled", num_draws=draws, draw_method=method)


def _threshold(threshold: float) -> KeepConfig:
    return KeepConfig(kind="threshold", threshold=threshold)


# By priority: a run that is stopped early has measured the first of them for all seeds.
FIRST = (
    Setting(REFERENCE, "online"),
    Setting("threshold 0.03 (default)", "threshold", _threshold(0.03)),
    Setting("hybrid 8 + 28", "hybrid", _hybrid(8, 28)),
    Setting("hybrid 16 + 16", "hybrid", _hybrid(16, 16)),
    Setting("hybrid 8 + 8", "hybrid", _hybrid(8, 8)),
    Setting("hybrid 4 + 8", "hybrid", _hybrid(4, 8)),
    Setting(BASELINE, "none", objective="cross_entropy"),
    Setting("topk 64, ghost", "topk, ghost", _top(64)),
    Setting("topk 64, renormalised", "topk, renormalised", _top(64), "renormalise", peer="as most caches are used"),
    Setting("sampled 50", "sampled", _sampled(50)),
    Setting("sampled 80", "sampled", _sampled(80)),
    Setting("sampled 25", "sampled", _sampled(25)),
    Setting("sampled 12", "sampled", _sampled(12)),
    Setting("sampled 36", "sampled", _sampled(36)),
    Setting("threshold 0.02", "threshold", _threshold(0.02)),
    Setting("threshold 0.1", "threshold", _threshold(0.1)),
)
SECOND = (
    Setting("hybrid 16 + 16, independent draws", "hybrid, independent", _hybrid(16, 16, "independent")),
    Setting("hybrid 8 + 8, independent draws", "hybrid, independent", _hybrid(8, 8, "independent")),
    Setting("hybrid 4 + 8, independent draws", "hybrid, independent", _hybrid(4, 8, "independent")),
    Setting(
        "sampled 50, independent draws",
        "sampled, independent",
        _sampled(50, "independent"),
        peer="random sampling, 50 draws",
    ),
    Setting(
        "sampled 12, independent draws",
        "sampled, independent",
        _sampled(12, "independent"),
        peer="random sampling, 12 draws",
    ),
    Setting("topk 16, ghost", "topk, ghost", _top(16)),
    Setting("topk 16, renormalised", "topk, renormalised", _top(16), "renormalise", peer="axolotl, k=16"),
    Setting("topk 128, renormalised", "topk, renormalised", _top(128), "renormalise", peer="DistillKit, k=128"),
    Setting("adaptive 0.95, at most 64", "adaptive, ghost", KeepConfig(kind="adaptive", k=64, mass=0.95)),
    Setting("topk 32, ghost", "topk, ghost", _top(32)),
    Setting("topk 8, ghost", "topk, ghost", _top(8)),
    Setting("topk 50, renormalised", "topk, renormalised", _top(50), "renormalise", peer="DistillKit, k=50"),
)
OBJECTIVES = (
    Setting("hybrid 16 + 16, jsd", "objective", _hybrid(16, 16), objective="jsd"),
    Setting("hybrid 16 + 16, skewed_reverse_kl", "objective", _hybrid(16, 16), objective="skewed_reverse_kl"),
    Setting("topk 64 ghost, reverse_kl", "objective", _top(64), objective="reverse_kl"),
    Setting("topk 64 ghost, jsd", "objective", _top(64), objective="jsd"),
    Setting("topk 64 ghost, skewed_forward_kl", "objective", _top(64), objective="skewed_forward_kl"),
    Setting("topk 64 ghost, skewed_reverse_kl", "objective", _top(64), objective="skewed_reverse_kl"),
    Setting("topk 64 ghost, total_variation", "objective", _top(64), objective="total_variation"),
    Setting("hybrid 16 + 16, skewed_forward_kl", "objective", _hybrid(16, 16), objective="skewed_forward_kl"),
    Setting("hybrid 16 + 16, total_variation", "objective", _hybrid(16, 16), objective="total_variation"),
    Setting("hybrid 16 + 16, reverse_kl", "objective", _hybrid(16, 16), objective="reverse_kl"),
    *(
        Setting(f"default, {name}", "objective", _threshold(0.03), objective=name)
        for name in OBJECTIVE_NAMES
        if name not in ("cross_entropy", "forward_kl")
    ),
    # As their sources use them: added to another objective. 0.032 is SinKD's 0.001 of a sum, for windows of 32 positions.
    Setting("default, forward_kl and sinkd", "objective", _threshold(0.03), beside=(("sinkd", 0.032),)),
    Setting(
        "default, forward_kl and span_correlation", "objective", _threshold(0.03), beside=(("span_correlation", 1.0),)
    ),
)
SETTINGS = (*FIRST, *SECOND, *OBJECTIVES)


class OfflineConfig(Strict):
    """Settings that all students share."""

    data: DataConfig = Field(description="Text and teacher.")
    student: StudentConfig = Field(
        default_factory=lambda: ScratchStudent(hidden_size=96, num_layers=3, num_heads=3),
        description="The model to train.",
    )
    steps: int = Field(300, ge=1, description="Number of optimizer steps.")
    batch_tokens: int = Field(2048, ge=2, description="Token positions of one step; padding counts.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(30, ge=0, description="Steps of linear rise to the peak; 0: none.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision of the student's matrix products; bf16 needs a processor that multiplies it."
    )

    def identity(self) -> dict[str, Any]:
        """The settings that the figures depend on; of a model, the folder's name alone."""
        settings = self.model_dump(mode="json", exclude={"data": {"teacher", "corpus"}})
        if not isinstance(self.student, ScratchStudent):
            settings["student"]["model"] = Path(self.student.model).name
        return settings


class Offline:
    """The comparison: `measure` trains one setting with one seed and measures the student."""

    def __init__(self, config: OfflineConfig, data: EvidenceData, settings: Sequence[Setting] | None = None) -> None:
        self.config, self.data, self.settings = config, data, SETTINGS if settings is None else settings

    def train_config(self, setting: Setting, seed: int) -> TrainConfig:
        """Settings of one training run."""
        c = self.config
        return TrainConfig(
            label=setting.name,
            student=c.student,
            objective=ObjectiveConfig(
                weights={setting.objective: 1.0, **dict(setting.beside)},
                tail=setting.tail,
                cross_entropy_elsewhere=setting.elsewhere,
            ),
            steps=round(c.steps * setting.times),
            batch_tokens=c.batch_tokens,
            context_tokens=c.data.context_tokens,
            seed=seed,
            learning_rate=c.learning_rate,
            warmup_steps=c.warmup_steps,
            precision=c.precision,
            data_order="seed",
            checkpoint_every_steps=0,
        )

    def measure(self, name: str, seed: int) -> Figures:
        """Train and measure one student. bytes_per_token is of the dataset's payload, or of the rows that a plan chooses, for
        each token of the dataset; None if the student does not use it."""
        setting = find(name, self.settings)
        dataset = self.data.train(setting.keep or KeepConfig())
        learner_of: LearnerOf = Learner
        if name == REFERENCE:
            learner_of = partial(OnlineLearner, states=self.data.states("train"), dataset=dataset)
        plan = None if setting.step is None else self._plan(setting.step, dataset)
        figures = train_and_measure(self.train_config(setting, seed), dataset, self.data.heldout, learner_of, plan)
        if setting.keep is None:
            return {**figures, "bytes_per_token": None}
        # A plan of rows needs those rows alone to be kept.
        share = setting.step.share if isinstance(setting.step, Random) else 1.0
        return {**figures, "bytes_per_token": bytes_per_token(dataset) * (share or 1.0)}

    def _plan(self, step: Step, dataset: kdata.Dataset) -> str:
        """Name of the plan of a step, which is made when it is first used; several processes may ask for it."""
        assert step.name is not None  # every setting names its plan
        with FileLock(self.data.folder / f"{dataset.path.name}.lock"):
            if not (dataset.path / "plans" / f"{step.name}.json").exists():
                kdata.select(dataset, step)
        return step.name


def describe(name: str) -> dict[str, Any]:
    """The content of a setting, by its name, as JSON values."""
    return find(name).describe()


def find(name: str, settings: Sequence[Setting] | None = None) -> Setting:
    """A setting by its name. Raises ConfigError if there is none."""
    return by_name({s.name: s for s in (SETTINGS if settings is None else settings)}, name)


def runs(seeds: int) -> list[tuple[str, int]]:
    """(setting, seed) of every run, the most important settings first, for all seeds."""
    return [(s.name, seed) for tier in (FIRST, SECOND, OBJECTIVES) for seed in range(seeds) for s in tier]
