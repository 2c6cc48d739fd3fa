"""A stage's data, opened and checked before the first step: dataset, plan, loader, tail mode, mixture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

import kdata
from kdata.errors import ConfigError, DataError, MismatchError
from kdata.loader.batches import LoaderConfig
from kdata.selection.plan import Plan
from kdata.trainer.config import Stage, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture, DomainWeights, make_mixture
from kdata.trainer.heldout import Heldout, keep_aside, open_heldout, student_losses
from kdata.trainer.loader import Loader
from kdata.trainer.mixed_loader import MixedLoader
from kdata.trainer.objectives import Tail, resolve_tail


@dataclass(frozen=True)
class OpenStage:
    """A stage that can be trained.

    source: the batches. tail: how the teacher's sparse distributions are completed. mixture, heldout: None without one.
    """

    stage: Stage
    dataset: kdata.Dataset
    plan: Plan | None
    source: Loader | MixedLoader
    tail: Tail
    mixture: DomainWeights | None
    heldout: Heldout | None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest document that the student reads, measured ones included."""
        measured = np.zeros(0, np.int64)
        if self.heldout is not None:
            lengths_R = self.heldout.dataset.index(["num_tokens"])["num_tokens"].to_numpy()
            measured = lengths_R[self.heldout.rows]
        return int(max(self.source.lengths.max(initial=0), measured.max(initial=0)))

    @property
    def identity(self) -> list[str]:
        """What the stage's numbers depend on beside settings: digests of what is trained on and of what is held out."""
        return [self.source.identity, *([] if self.heldout is None else [self.heldout.dataset.content_digest])]

    def state_dict(self) -> dict[str, Any]:
        """Loader and mixture, for a checkpoint."""
        mixture = None if self.mixture is None else self.mixture.state_dict()
        return {"stage": self.stage.name, "loader": self.source.state_dict(), "mixture": mixture}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint that was written in this stage; one of another stage changes nothing."""
        if state["stage"] != self.stage.name:
            return
        self.source.load_state_dict(state["loader"])
        if self.mixture is not None:
            self.mixture.load_state_dict(state["mixture"])

    def begins_period(self, step: int) -> bool:
        """Whether the mixture is to be heard before step 0, 1, ... of the run."""
        config = self.stage.mixture
        return config is not None and (step - self.stage.first_step) % config.every_steps == 0

    def begin_period(
        self, step: int, learner: nn.Module, rows_per_step: int, context_tokens: int, ranks: Ranks
    ) -> dict[str, Any]:
        """Measure the student, let the mixture set its weights, and draw the documents of the steps from `step` on.

        Args:
            rows_per_step: rows of an optimizer step, of all ranks.
        Returns:
            What happened, for the metrics: weights, and losses per domain where they were measured.
        """
        assert self.mixture is not None and self.stage.mixture is not None and isinstance(self.source, MixedLoader)
        told: dict[str, Any] = {}
        if self.heldout is not None:
            batch_rows = self.source.config.batch_rows // ranks.world_size  # of one rank
            told["losses"] = student_losses(learner, self.heldout, context_tokens, batch_rows, ranks)
            self.mixture.update(told["losses"])
        told["weights"] = dict(self.mixture.weights)
        steps = min(self.stage.mixture.every_steps, self.stage.end - step)
        self.source.begin(self.mixture.weights, steps * rows_per_step)
        return told


def open_stages(
    config: TrainConfig, dataset_path: Path | str, plan_path: Path | str | None, ranks: Ranks
) -> list[OpenStage]:
    """Every stage of a run.

    Raises:
        ConfigError, MismatchError, DataError: see `kdata.trainer.train.train`.
    """
    opened = [_open(config, stage, dataset_path, plan_path, ranks) for stage in config.resolved_stages()]
    first = opened[0].dataset
    for other in opened[1:]:
        _check_same_tokens(first, other.dataset)
    return opened


def _open(
    config: TrainConfig, stage: Stage, dataset_path: Path | str, plan_path: Path | str | None, ranks: Ranks
) -> OpenStage:
    dataset = kdata.open(stage.dataset or dataset_path)
    chosen = stage.plan if stage.dataset or stage.plan else plan_path
    plan = None if chosen is None else Plan.load(chosen)
    rows = None if plan is None else plan.rows(dataset)
    _check_targets(dataset, rows)
    temperatures = [float(t) for t in dataset.info.codec.parameters.get("temperatures", [])]
    tail = resolve_tail(stage.objective, dataset.info.tail, temperatures, kind=dataset.info.codec.kind)
    loader_config = LoaderConfig(
        context_tokens=config.context_tokens,
        batch_rows=micro_rows(config, ranks.world_size) * ranks.world_size,
        seed=config.seed,
        window_documents=config.window_documents,
        prefetch_batches=config.prefetch_batches,
    )
    options: dict[str, Any] = {
        "rank": ranks.rank, "world_size": ranks.world_size, "temperature": stage.objective.temperature,
    }  # fmt: skip
    if stage.mixture is None:
        source = Loader(dataset, rows, loader_config, **options)
        return OpenStage(stage, dataset, plan, source, tail, None, None)
    heldout = None
    if isinstance(stage.mixture, DDKMixture):
        rows, heldout = _hold_out(dataset, rows, stage.mixture, config.seed)
    mixed = MixedLoader(dataset, rows, loader_config, **options)
    mixture = make_mixture(stage.mixture, mixed.domains, {} if heldout is None else heldout.teacher_losses)
    return OpenStage(stage, dataset, plan, mixed, tail, mixture, heldout)


def _check_targets(dataset: kdata.Dataset, rows: np.ndarray | None) -> None:
    """Raise DataError where no token counts: the loss would be 0, and the student only decay."""
    counts = dataset.index(["num_target_tokens"])["num_target_tokens"]
    planned = counts if rows is None else counts.take(rows)
    if len(planned) and not planned.null_count and not pc.sum(planned).as_py():
        raise DataError(
            f"no token counts in the {len(planned):,} rows of {dataset.path} (all target masks are empty): nothing to learn"
        )


def _hold_out(
    dataset: kdata.Dataset, rows: np.ndarray | None, config: DDKMixture, seed: int
) -> tuple[np.ndarray | None, Heldout]:
    if config.heldout is None:
        return keep_aside(dataset, rows, config, seed)
    index = dataset.index(["domain"])["domain"]
    domains = sorted(set((index if rows is None else index.take(rows)).to_pylist()))
    heldout = open_heldout(config.heldout, domains, config)
    _check_same_tokens(dataset, heldout.dataset)
    return rows, heldout


def micro_rows(config: TrainConfig, world_size: int) -> int:
    """Rows of one rank's micro-batch. Raises ConfigError where sizes do not divide."""
    micro = config.micro_batch_tokens or config.batch_tokens // world_size
    if micro % config.context_tokens or not micro or config.batch_tokens % (micro * world_size):
        ranks = f" times {world_size} ranks" if world_size > 1 else ""
        raise ConfigError(
            f"batch_tokens={config.batch_tokens}, micro_batch_tokens={micro}{ranks} and "
            f"context_tokens={config.context_tokens}: each must be a multiple of the next"
        )
    return micro // config.context_tokens


def _check_same_tokens(first: kdata.Dataset, other: kdata.Dataset) -> None:
    """Raise MismatchError unless ids mean the same tokens in both datasets."""
    for what, a, b in (
        ("vocabulary", first.info.vocab_size, other.info.vocab_size),
        ("tokenizer", first.info.tokenizer.hash[:12], other.info.tokenizer.hash[:12]),
    ):
        if a != b:
            raise MismatchError(
                f"{other.path} has another {what} ({b}) than {first.path} ({a}), so one student cannot be trained on both; "
                "capture both with teachers of the same tokenizer"
            )
