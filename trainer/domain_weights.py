"""How much of each domain: a protocol, and the two mixtures that are known.

Every `every_steps` steps the trainer measures the student's cross-entropy on held-out text of each domain, tells the
mixture, and draws the documents of the next steps by its weights (`kdata.trainer.mixed_loader`). To add one: a class with the
methods of `DomainWeights`, its settings, a line in `make_mixture`.

Shapes: N domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from kdata.config import Strict
from kdata.errors import ConfigError, TrainingError

Weights = dict[str, float]


class DomainWeights(Protocol):
    """What the trainer asks of a mixture. State is JSON values; equal state gives equal weights ever after."""

    @property
    def weights(self) -> Weights:
        """Share of the tokens that each domain has from now on; every domain is named, they sum to 1."""

    def update(self, losses: Mapping[str, float]) -> None:
        """Hear the student's cross-entropy on each domain, nats per token. The first call comes before the first step."""

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""


class FixedMixture(Strict):
    """Weights that do not change."""

    kind: Literal["fixed"] = "fixed"
    weights: Weights = Field(description="Domain -> share of the tokens; scaled to sum to 1. Every domain is named.")
    every_steps: int = Field(
        default=1000, ge=1, description="Steps whose documents are drawn at a time; part of what decides their order."
    )


class DDKMixture(Strict):
    """Domain weights that follow how far the student is behind the teacher (DDK, arXiv 2407.16154)."""

    kind: Literal["ddk"] = "ddk"
    every_steps: int = Field(default=1000, ge=1, description="K: steps between updates; the authors' choice is 1000.")
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Share of the new weights in the smoothed ones; the rest is 1/N."
    )
    exponent_limit: float = Field(
        default=10.0,
        gt=0,
        le=700,
        description="The largest ratio of perplexities that is told apart. It stands in an exponent, and early ratios are in "
        "the hundreds. Our default; the paper states none.",
    )
    heldout: str | None = Field(
        default=None, description="Logit dataset of held-out text with the same domains; None: rows are kept aside."
    )
    heldout_share: float = Field(
        default=0.05, gt=0, lt=1, description="Share of each domain's documents that is kept aside; at least one."
    )
    heldout_documents: int = Field(
        default=500, ge=1, description="Documents per domain that are measured, at most; the authors' choice is 500."
    )


MixtureConfig = Annotated[FixedMixture | DDKMixture, Field(discriminator="kind")]


class Fixed:
    """The mixture of `FixedMixture`."""

    def __init__(self, config: FixedMixture, domains: list[str]) -> None:
        given, total = config.weights, math.fsum(config.weights.values())
        if set(given) != set(domains):
            raise ConfigError(
                f"mixture.weights names {sorted(given)}, the data has the domains {domains}; name each, once"
            )
        if any(not math.isfinite(w) or w < 0 for w in given.values()) or not total:
            raise ConfigError(f"mixture.weights {given} must be finite, >= 0 and not all 0")
        self.weights = {domain: given[domain] / total for domain in domains}

    def update(self, losses: Mapping[str, float]) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""


class DDK:
    """The mixture of `DDKMixture`.

    With l = exp(cross-entropy) of student S and teacher T on domain i, the score is exp(min(l_S / l_T, limit)). The first
    update sets r to the scores, scaled to sum to 1; each further one to alpha psi / sum(psi) + (1 - alpha) / N with
    psi = r * score.

    Args:
        teacher_losses: the teacher's cross-entropy on the same held-out text, nats per token, for each of the N domains.
    """

    def __init__(self, config: DDKMixture, teacher_losses: Mapping[str, float]) -> None:
        self.config, self.teacher_losses = config, dict(teacher_losses)
        self.weights: Weights = dict.fromkeys(self.teacher_losses, 1.0 / len(self.teacher_losses))
        self.num_updates = 0

    def update(self, losses: Mapping[str, float]) -> None:
        """Set the weights of the next steps. Raises TrainingError where a loss is not finite."""
        if wild := [d for d in self.teacher_losses if not math.isfinite(losses[d])]:
            raise TrainingError(f"the student's loss on held-out {wild[0]!r} is {losses[wild[0]]}; lower learning_rate")
        limit, alpha = self.config.exponent_limit, self.config.alpha
        behind = {d: losses[d] - teacher for d, teacher in self.teacher_losses.items()}
        ratios = {d: min(math.exp(min(gap, 700.0)), limit) for d, gap in behind.items()}  # e^710 overflows a float
        # In logarithms, less the largest, which cancels: nothing overflows, and a weight that has gone to 0 can come back.
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
        """Weights, and how often they were set."""
        return {"weights": dict(self.weights), "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.weights = {domain: state["weights"][domain] for domain in self.teacher_losses}
        self.num_updates = state["num_updates"]


def make_mixture(
    config: FixedMixture | DDKMixture, domains: list[str], teacher_losses: Mapping[str, float]
) -> DomainWeights:
    """The mixture of these settings. Raises ConfigError where they do not fit the data's domains.

    Args:
        domains: those of the training data.
        teacher_losses: nats per token on held-out text of the same domains; empty for `fixed`.
    """
    return Fixed(config, domains) if isinstance(config, FixedMixture) else DDK(config, teacher_losses)
