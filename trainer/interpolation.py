"""The share of the teacher in the target of `taid`, as it follows the loss: two numbers of state and the last loss.

It depends on losses over all ranks alone, so it is the same on every rank, and a checkpoint holds it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kdata.errors import CorruptError

# Of the paper's authors: first value, largest step of t, share of the former average in the average of relative changes.
START, STEP, KEEP = 0.4, 5e-4, 0.99


class AdaptiveInterpolation:
    """t of `taid`, from 0.4 to 1; it never falls.

    After step n = 0, 1, ... of N with loss L and former loss L', where t is not the first one:
    m <- 0.99 m + 0.01 (L' - L) / (L' + 1e-15); t <- min(1, max(0.4 + 0.6 n / N, t + 5e-4 sigmoid(m) (1 - t))).

    Source: TAID, arXiv 2501.16937, constants and order as in the authors' code, which we read in copies that agree. That code
    watches the cross-entropy with the target, which is more than the paper's KL by the target's entropy; here it is the KL.
    It updates t after every batch; here it is after every optimizer step.
    """

    def __init__(self) -> None:
        self.t, self.momentum, self.former_loss = START, 0.0, math.nan

    def update(self, loss: float, step: int, steps: int) -> None:
        """Set t for the next step.

        Args:
            loss: of `taid` in this step, nats per counted token. 0 is that of a step without one, and changes nothing.
            step, steps: the step, from 0, and the number of steps of the phase.
        """
        if loss == 0:
            return
        if not math.isnan(self.former_loss):
            change = (self.former_loss - loss) / (self.former_loss + 1e-15)
            self.momentum = KEEP * self.momentum + (1 - KEEP) * change
            sigmoid = 0.5 * (1 + math.tanh(self.momentum / 2))
            self.t = min(1.0, max(START + (1 - START) * step / steps, self.t + STEP * sigmoid * (1 - self.t)))
        self.former_loss = loss

    def state_dict(self) -> dict[str, float | None]:
        """State for a checkpoint; the former loss is None before the first step."""
        former = None if math.isnan(self.former_loss) else self.former_loss
        return {"t": self.t, "momentum": self.momentum, "former_loss": former}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. Raises CorruptError where a value is none that `state_dict` gives."""
        t: Any = state.get("t")
        momentum: Any = state.get("momentum")
        former: Any = state.get("former_loss")
        finite = all(type(x) is float and math.isfinite(x) for x in (t, momentum, 0.0 if former is None else former))
        if not finite or not START <= t <= 1:
            raise CorruptError(f"the state of taid is damaged: t {t!r}, momentum {momentum!r}, former_loss {former!r}")
        self.t, self.momentum, self.former_loss = t, momentum, math.nan if former is None else former
