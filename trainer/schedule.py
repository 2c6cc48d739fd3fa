"""Numbers that change with the step: the learning rate, and the weights of a mix of objectives.

Each is a pure function of settings and step, so a run that resumes needs no state for them.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

from pydantic import Field

from kdata.config import Strict

Shape = Literal["cosine", "linear", "constant"]


class Ramp(Strict):
    """A weight that goes from `start` to `end` and then stays there. A plain number is a constant weight."""

    kind: Literal["linear", "cosine"] = Field(default="linear", description="Shape of the curve from start to end.")
    start: float = Field(ge=0, description="Weight at the phase's first step.")
    end: float = Field(ge=0, description="Weight after `steps` steps and from then on.")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps from start to end; null: the weight reaches end at the phase's last step.",
    )

    def at(self, step: int, phase_steps: int) -> float:
        """The weight at step 0, 1, ... of a phase of `phase_steps` steps."""
        progress = min(step / (self.steps or max(phase_steps - 1, 1)), 1.0)
        if self.kind == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress


class RateSettings(Protocol):
    """The settings that decide the learning rate of a phase; see `kdata.trainer.config.Phase`."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay(self) -> Shape: ...
    @property
    def final_learning_rate_share(self) -> float: ...


def learning_rate(phase: RateSettings, step: int) -> float:
    """Learning rate of step 0, 1, ... of a phase: a linear rise over `warmup_steps`, then the decay."""
    if step < phase.warmup_steps:
        return phase.learning_rate * (step + 1) / (phase.warmup_steps + 1)
    progress = (step - phase.warmup_steps) / max(phase.steps - 1 - phase.warmup_steps, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[phase.decay]
    floor = phase.final_learning_rate_share
    return phase.learning_rate * (floor + (1 - floor) * shape)
