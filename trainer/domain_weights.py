"""How much the student reads of each domain: a protocol, fixed weights, and DDK, whose weights follow the student.

Every `every_steps` steps the trainer measures the student's cross-entropy on held-out text of each domain, passes it to
`update`, and draws the documents of the next steps with the new weights (`kdata.trainer.mixed_loader`). To add a method,
write a class with the methods of `DomainWeights`, its settings, and a line in `make_domain_weights`.

Shapes: N domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from kdata.config import Strict
from kdata.errors import ConfigError, CorruptError, TrainingError

Weights = dict[str, float]


class DomainWeights(Protocol):
    """Weights of the domains during training. State is JSON values; equal state gives equal weights from then on."""

    @property
    def weights(self) -> Weights:
        """Share of the tokens of each domain from now on. Every domain is in it, and the shares sum to 1."""

    def update(self, losses: Mapping[str, float]) -> None:
        """Take the student's cross-entropy on each domain, nats per token. The first call is before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""


class FixedMixture(Strict):
    """Settings of weights that do not change."""

    kind: Literal["fixed"] = "fixed"
    weights: Weights = Field(
        description="Share of the tokens of each domain, by name; scaled to sum to 1. Name every domain; 0: not read."
    )
    every_steps: int = Field(
        default=1000, ge=1, description="Steps whose documents are drawn at once. Another number gives another order."
    )


class DDKMixture(Strict):
    """Settings of weights that follow how far the student is behind the teacher (DDK, arXiv 2407.16154)."""

    kind: Literal["ddk"] = "ddk"
    every_steps: int = Field(
        default=1000, ge=1, description="Steps between two updates (K in the paper, which uses 1000)."
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the new weights in the smoothed weights; the rest is 1/N for each domain. 0: uniform after the "
        "first update; 1: no smoothing.",
    )
    exponent_limit: float = Field(
        default=10.0,
        gt=0,
        le=700,
        description="Upper limit of the ratio of student's to teacher's perplexity. The ratio is an exponent, and early in "
        "training it is in the hundreds. The default is ours; the paper states none.",
    )
    heldout: str | None = Field(
        default=None,
        description="Logit dataset of held-out text with the same domains: a folder, a URL or hf://OWNER/NAME. null: a share "
        "of the training rows is held out.",
    )
    heldout_share: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="Share of each domain's documents to hold out if heldout is null; at least one.",
    )
    heldout_documents: int = Field(
        default=500, ge=1, description="Largest number of held-out documents per domain; the paper uses 500."
    )


MixtureConfig = Annotated[FixedMixture | DDKMixture, Field(discriminator="kind")]


class Fixed:
    """The weights of `FixedMixture`."""

    def __init__(self, config: FixedMixture, domains: list[str]) -> None:
        shares, total = config.weights, math.fsum(config.weights.values())
        if set(shares) != set(domains):
            raise ConfigError(
                f"mixture.weights names {sorted(shares)}, the data has the domains {domains}; name each of them"
            )
        if any(not math.isfinite(w) or w < 0 for w in shares.values()) or not total:
            raise ConfigError(f"mixture.weights {shares} must be finite, >= 0 and not all 0")
        self.weights = {domain: shares[domain] / total for domain in domains}

    def update(self, losses: Mapping[str, float]) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing."""


class DDK:
    """The weights of `DDKMixture`.

    With l = exp(cross-entropy) of student S and teacher T on a domain, its score is exp(min(l_S / l_T, limit)). The first
    update sets the weights r to the scores, scaled to sum to 1. Each further update sets them to
    alpha psi / sum(psi) + (1 - alpha) / N with psi = r * score.

    Source: DDK, arXiv 2407.16154. The limit is ours.

    Args:
        teacher_losses: the teacher's cross-entropy on the same held-out text, nats per token, for each of the N domains.
    """

    def __init__(self, config: DDKMixture, teacher_losses: Mapping[str, float]) -> None:
        self.config, self.teacher_losses = config, dict(teacher_losses)
        self.weights: Weights = dict.fromkeys(self.teacher_losses, 1.0 / len(self.teacher_losses))
        self.num_updates = 0

    def update(self, losses: Mapping[str, float]) -> None:
        """Set the weights of the next steps. Raises TrainingError if a loss is not finite."""
        if bad := [d for d in self.teacher_losses if not math.isfinite(losses[d])]:
            raise TrainingError(
                f"the student's loss on held-out text of domain {bad[0]!r} is {losses[bad[0]]}; lower learning_rate"
            )
        limit, alpha = self.config.exponent_limit, self.config.alpha
        gaps = {d: losses[d] - teacher for d, teacher in self.teacher_losses.items()}
        ratios = {d: min(math.exp(min(gap, 700.0)), limit) for d, gap in gaps.items()}  # e^710 overflows a float
        # In logarithms, minus the largest, which cancels: nothing overflows, and a weight that reached 0 can rise again.
        before = {d: math.log(max(self.weights[d], 1e-300)) if self.num_updates else 0.0 for d in ratios}
        top = max(before[d] + r for d, r in ratios.items())
        psi = {d: math.exp(before[d] + r - top) for d, r in ratios.items()}
        total = math.fsum(psi.values())
        if self.num_updates:
            self.weights = {d: alpha * p / total + (1 - alpha) / len(psi) for d, p in psi.items()}
        else:
            self.weights = {d: p / total for d, p in psi.items()}
        self.num_updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The weights, and how often they were updated."""
        return {"weights": dict(self.weights), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint. Raises CorruptError where a value is none that `state_dict` gives."""
        weights, updates = state.get("weights"), state.get("num_updates")
        values: list[Any] = [weights.get(d) if isinstance(weights, Mapping) else None for d in self.teacher_losses]
        if type(updates) is not int or updates < 0 or any(type(v) is not float or not 0 <= v <= 1 for v in values):
            raise CorruptError(f"the state of the mixture is damaged: weights {weights!r}, num_updates {updates!r}")
        self.weights, self.num_updates = dict(zip(self.teacher_losses, values, strict=True)), updates


def make_domain_weights(
    config: FixedMixture | DDKMixture, domains: list[str], teacher_losses: Mapping[str, float]
) -> DomainWeights:
    """The weights of these settings. Raises ConfigError if the settings do not fit the data's domains.

    Args:
        domains: the domains of the training data.
        teacher_losses: nats per token on held-out text of the same domains; empty for `fixed`.
    """
    return Fixed(config, domains) if isinstance(config, FixedMixture) else DDK(config, teacher_losses)
