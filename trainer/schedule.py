"""Numbers that follow the step: the learning rate, and the weights of a mix of objectives.

Each is a pure function of (settings, step), so a resumed run needs no state of theirs.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

from pydantic import Field

from kdata.config import Strict

Shape = Literal["cosine", "linear", "constant"]


class Ramp(Strict):
    """A weight that goes from `start` to `end` and stays there; a plain number is a weight that does not move."""

    kind: Literal["linear", "cosine"] = Field(default="linear", description="Shape of the way from start to end.")
    start: float = Field(ge=0, description="Weight at the stage's first step.")
    end: float = Field(ge=0, description="Weight after `steps` steps and from then on.")
    steps: int | None = Field(
        default=None, ge=1, description="Steps from start to end; None: end is reached at the stage's last step."
    )

    def at(self, step: int, stage_steps: int) -> float:
        """The weight at step 0, 1, ... of a stage of `stage_steps` steps."""
        way = min(step / (self.steps or max(stage_steps - 1, 1)), 1.0)
        if self.kind == "cosine":
            way = 0.5 * (1 - math.cos(math.pi * way))
        return self.start + (self.end - self.start) * way


class RateSettings(Protocol):
    """What decides the learning rate of a stage."""

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


def learning_rate(stage: RateSettings, step: int) -> float:
    """Learning rate of step 0, 1, ... of a stage: a linear rise over `warmup_steps`, then the decay."""
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / (stage.warmup_steps + 1)
    way = (step - stage.warmup_steps) / max(stage.steps - 1 - stage.warmup_steps, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * way)), "linear": 1 - way, "constant": 1.0}[stage.decay]
    floor = stage.final_learning_rate_share
    return stage.learning_rate * (floor + (1 - floor) * shape)
