"""The data of each training phase, opened and checked before the first step.

A phase has a dataset, perhaps a plan, a loader, a tail mode, and perhaps domain weights with held-out text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from torch import nn

import kdata
from kdata.errors import ConfigError, CorruptError, DataError
from kdata.format.keep_rules import described
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import BatchesConfig, keeps_something
from kdata.selection.plan import Plan, open_plan
from kdata.store.queryable import is_name
from kdata.store.token_columns import COUNTS, has_entries, token_columns
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.trainer.config import Phase, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture, DomainWeights, FixedMixture, MixtureConfig, make_domain_weights
from kdata.trainer.heldout import Heldout, keep_aside, open_heldout, student_losses
from kdata.trainer.interpolation import AdaptiveInterpolation
from kdata.trainer.loader import Loader
from kdata.trainer.mixed_loader import MixedLoader
from kdata.trainer.objective_config import ObjectiveConfig, Tail, refuse_elsewhere, resolve_tail

# Mixed with the seed instead of the dataset's digest where `data_order` is seed.
SEED_ORDER = "0" * 64


@dataclass(frozen=True)
class OpenPhase:
    """A phase whose data is open.

    loader: its batches. tail: how the teacher's sparse distributions are completed. domain_weights, heldout: None without a
    mixture; heldout also None with fixed weights. interpolation: of `taid`, None where it does not follow the loss.
    """

    phase: Phase
    dataset: kdata.Dataset
    plan: Plan | None
    loader: Loader | MixedLoader
    tail: Tail
    domain_weights: DomainWeights | None
    heldout: Heldout | None
    interpolation: AdaptiveInterpolation | None

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest document that the student reads, held-out documents included."""
        heldout_lengths = np.zeros(0, np.int64)
        if self.heldout is not None:
            lengths_R = self.heldout.dataset.index(["num_tokens"])["num_tokens"].to_numpy()
            heldout_lengths = lengths_R[self.heldout.rows]
        return int(max(self.loader.lengths.max(initial=0), heldout_lengths.max(initial=0)))

    @property
    def drawn_rows(self) -> np.ndarray:
        """Global rows of the plan, int64, without those of domains of weight 0."""
        rows: np.ndarray = self.loader.rows
        if isinstance(self.loader, MixedLoader):
            assert self.domain_weights is not None
            pools = zip(self.loader.domains, self.loader.pools, strict=True)
            rows = np.concatenate([pool for domain, pool in pools if self.domain_weights.weights[domain]])
        return rows

    @property
    def identity(self) -> list[str]:
        """Digests of the training data and of the held-out data: what the phase's numbers depend on beside settings."""
        return [self.loader.identity, *([] if self.heldout is None else [self.heldout.dataset.content_digest])]

    def state_dict(self) -> dict[str, Any]:
        """State of the loader, of the domain weights and of the interpolation, for a checkpoint."""
        weights = None if self.domain_weights is None else self.domain_weights.state_dict()
        own = {} if self.interpolation is None else {"taid": self.interpolation.state_dict()}
        return {"phase": self.phase.name, "loader": self.loader.state_dict(), "mixture": weights, **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of this phase. A checkpoint of another phase changes nothing.

        Raises:
            MismatchError: data or order differ.
            CorruptError: a value is not one that `state_dict` gives for this data.
        """
        if state.get("phase") != self.phase.name:
            return
        own = {"loader": self.loader, "mixture": self.domain_weights, "taid": self.interpolation}
        stateful = {name: part for name, part in own.items() if part is not None}
        if not all(isinstance(state.get(name), dict) for name in stateful):
            raise CorruptError("it lacks the state of the loader, of the domain weights or of taid")
        for name, part in stateful.items():
            part.load_state_dict(state[name])

    def objective_at(self, step: int) -> ObjectiveConfig:
        """The mix of step 0, 1, ... of the phase, in numbers."""
        mix = self.phase.objective.at(step, self.phase.steps)
        return mix if self.interpolation is None else mix.model_copy(update={"taid_t": self.interpolation.t})

    def begins_period(self, step: int) -> bool:
        """Whether the domain weights are updated before step 0, 1, ... of the run."""
        config = self.phase.mixture
        return config is not None and (step - self.phase.first_step) % config.every_steps == 0

    def begin_period(
        self, step: int, learner: nn.Module, rows_per_step: int, context_tokens: int, ranks: Ranks
    ) -> dict[str, Any]:
        """Measure the student, update the domain weights, and draw the documents of the steps from `step` on.

        Args:
            rows_per_step: rows of an optimizer step, over all ranks.
        Returns:
            For the metrics: "weights" of the domains, and "losses" per domain if they were measured.
        """
        assert self.domain_weights is not None and self.phase.mixture is not None
        assert isinstance(self.loader, MixedLoader)
        period: dict[str, Any] = {}
        if self.heldout is not None:
            batch_rows = self.loader.config.batch_rows // ranks.world_size  # of one rank
            period["losses"] = student_losses(learner, self.heldout, context_tokens, batch_rows, ranks)
            self.domain_weights.update(period["losses"])
        period["weights"] = dict(self.domain_weights.weights)
        steps = min(self.phase.mixture.every_steps, self.phase.end - step)
        self.loader.begin(self.domain_weights.weights, steps * rows_per_step)
        return period


def open_phases(config: TrainConfig, dataset: Path | str, plan: Path | str | None, ranks: Ranks) -> list[OpenPhase]:
    """Open the data of every phase of a run.

    With several ranks, one of each machine copies the shards of a dataset at a URL before the others open it; with one rank,
    a shard is copied when it is first read.

    Raises:
        ConfigError, MismatchError, DataError, MissingError: see `kdata.trainer.train.train`.
    """
    with ranks.one_per_machine_first():
        opened = [_open(config, phase, dataset, plan, ranks) for phase in config.resolved_phases()]
        if ranks.world_size > 1:
            for open_phase in opened:
                if isinstance(open_phase.loader, MixedLoader) or open_phase.loader.arrays.groups is None:
                    _copy_shards(open_phase.dataset, open_phase.loader.rows)
                if open_phase.heldout is not None:
                    _copy_shards(open_phase.heldout.dataset, open_phase.heldout.rows)
    first = opened[0].dataset
    for other in opened[1:]:
        _check_same_tokens(first, other.dataset)
    return opened


def _open(
    config: TrainConfig, phase: Phase, run_dataset: Path | str, run_plan: Path | str | None, ranks: Ranks
) -> OpenPhase:
    dataset = kdata.open(phase.dataset or run_dataset)
    plan_name = phase.plan if phase.dataset or phase.plan else run_plan
    plan = None if plan_name is None else plan_of(dataset, plan_name)
    rows, positions = (None, None) if plan is None else plan.choice(dataset)
    refuse_no_targets(dataset, rows)
    refuse_nothing_kept(dataset, rows, positions)
    refuse_unknown_entropy(dataset, rows, phase.objective)
    temperatures = dataset.info.codec.temperatures
    codec = dataset.info.codec
    tail = resolve_tail(phase.objective, dataset.info.tail, temperatures, kind=codec.kind, token_map=codec.token_map)
    refuse_unknown_logprobs(dataset, rows, phase.objective)
    refuse_elsewhere(phase.objective, has_positions=positions is not None or dataset.info.codec.keeps_some_positions)
    batches_config = BatchesConfig(
        context_tokens=config.context_tokens,
        batch_rows=micro_rows(config, ranks.world_size) * ranks.world_size,
        seed=config.seed,
        window_documents=config.window_documents,
        shuffle_group_tokens=config.shuffle_group_tokens,
        prefetch_batches=config.prefetch_batches,
    )
    options: dict[str, Any] = {
        "rank": ranks.rank, "world_size": ranks.world_size, "temperature": phase.objective.temperature,
        "positions": positions, "elsewhere": phase.objective.reads_all_targets,
    }  # fmt: skip
    interpolation = AdaptiveInterpolation() if phase.objective.is_adaptive else None
    if phase.mixture is None:
        order_key = SEED_ORDER if config.data_order == "seed" else None
        loader = Loader(dataset, rows, batches_config, order_key=order_key, **options)
        return OpenPhase(phase, dataset, plan, loader, tail, None, None, interpolation)
    heldout = None
    if isinstance(phase.mixture, DDKMixture):
        rows, heldout = _hold_out(dataset, rows, phase.mixture, config.seed)
        refuse_nothing_kept(dataset, rows, None)  # what is held out may be all that keeps something
    mixed = MixedLoader(dataset, rows, batches_config, **options)
    refuse_unread_domains(mixed, phase.mixture)
    domains = sorted([*mixed.domains, *mixed.unread_domains])
    weights = make_domain_weights(phase.mixture, domains, {} if heldout is None else heldout.teacher_losses)
    opened = OpenPhase(phase, dataset, plan, mixed, tail, weights, heldout, interpolation)
    refuse_nothing_kept(dataset, opened.drawn_rows, None)
    return opened


def _copy_shards(dataset: kdata.Dataset, rows: np.ndarray) -> None:
    """Have the shards of these rows on this machine; nothing happens if the dataset is a folder."""
    for number in np.unique(np.searchsorted(dataset.shard_starts, rows, side="right") - 1):
        dataset.shard_file(dataset.manifest[int(number)], "data")


def plan_of(dataset: kdata.Dataset, plan: Path | str) -> Plan:
    """A plan by its name in the dataset, wherever the dataset is; or a plan file, by a path with a folder or an ending."""
    return open_plan(dataset, str(plan)) if is_name(str(plan)) else Plan.load(plan)


def refuse_no_targets(dataset: kdata.Dataset, rows: np.ndarray | None) -> None:
    """Raise DataError if no token counts: the loss would be 0, and weight decay alone would change the student."""
    counts = dataset.index(["num_target_tokens"])["num_target_tokens"]
    planned = counts if rows is None else counts.take(rows)
    if len(planned) and not planned.null_count and not pc.sum(planned).as_py():
        raise DataError(
            f"{dataset.place}: none of the tokens in {len(planned):,} rows is a target (all target masks are empty), so "
            "there is nothing to learn; capture the text again with other `targets`, or choose other rows with a plan"
        )


def refuse_unknown_entropy(dataset: kdata.Dataset, rows: np.ndarray | None, objective: ObjectiveConfig) -> None:
    """Raise ConfigError if an objective needs the teacher's entropy, and a planned row does not hold it at every target."""
    if "deviation_kl" in objective.weights:
        why = "they were imported, combined of several teachers, or read through a server"
        _refuse_null(dataset, rows, "mean_entropy", "deviation_kl needs the teacher's entropy at every target", why)


def refuse_unknown_logprobs(dataset: kdata.Dataset, rows: np.ndarray | None, objective: ObjectiveConfig) -> None:
    """Raise ConfigError if an objective needs the teacher's log-probability of every target, and a planned row lacks one."""
    if "span_correlation" in objective.weights:
        needs = "span_correlation needs the teacher's log-probability of every target"
        _refuse_null(dataset, rows, "nll", needs, "they were imported")


def _refuse_null(dataset: kdata.Dataset, rows: np.ndarray | None, column: str, needs: str, why: str) -> None:
    """Raise ConfigError if a column of the index, a mean over targets, is null in a planned row that has some."""
    index = dataset.index([column, "num_target_tokens"])
    unknown = index[column].is_null().to_numpy() & (index["num_target_tokens"].to_numpy() > 0)
    planned = np.arange(dataset.num_rows) if rows is None else np.unique(rows)
    if len(bare := planned[unknown[planned]]):
        row_id = dataset.index(["id"])["id"][int(bare[0])].as_py()
        raise ConfigError(
            f"{needs}, and {dataset.place} does not hold it in {len(bare):,} of {len(planned):,} rows, the first of them "
            f"{row_id!r} ({why}); remove the objective, or leave these rows out with a plan (kdata select --sql "
            f"'select id from rows where {column} is not null')"
        )


def refuse_nothing_kept(dataset: kdata.Dataset, rows: np.ndarray | None, positions: ChosenPositions | None) -> None:
    """Check a dataset that keeps distributions at some positions only against the rows and positions to train on.

    Raises:
        DataError: no row has a position with a distribution, so no objective could use one.
        ConfigError: a chosen position has none.
    """
    if not dataset.info.codec.keeps_some_positions:
        return
    planned = np.arange(dataset.num_rows) if rows is None else np.unique(rows)
    if not keeps_something(dataset)[planned].any():
        raise DataError(
            f"{dataset.place}: none of {len(planned):,} rows has a position at which a distribution is kept "
            f"({described(dataset.info.codec.parameters['positions'])}), so no objective has anything to learn from; capture "
            "the text with another rule (`positions`), or choose other rows with a plan"
        )
    if positions is None:
        return
    wanted = np.zeros(dataset.num_rows, bool)
    wanted[planned] = True
    for read in token_columns(dataset, ["target_mask", *COUNTS], wanted):
        own = np.arange(len(read.offsets) - 1)[wanted[read.first_row : read.first_row + len(read.offsets) - 1]]
        token_N, _ = positions.tokens(own + read.first_row, np.append(read.offsets[own], 0))
        bare_N = token_N[~has_entries(read)[token_N]]
        if len(bare_N):
            row = int(np.searchsorted(read.offsets, bare_N[0], side="right")) - 1
            row_id = dataset.index(["id"])["id"][read.first_row + row].as_py()
            raise ConfigError(
                f"the plan chooses position {bare_N[0] - read.offsets[row]} of row {row_id!r}, at which {dataset.place} "
                "keeps no distribution; choose among the positions that it keeps: `kdata select` does, and so does a query "
                "with `num_exact + num_drawn > 0`"
            )


def refuse_unread_domains(loader: MixedLoader, mixture: MixtureConfig) -> None:
    """Raise ConfigError if the mixture gives tokens to a domain of which no row can be read; weight 0 is not refused.

    Without the error the other domains would share its tokens, and the metrics would show weights that nobody had.
    """
    fixed = mixture.weights if isinstance(mixture, FixedMixture) else {}
    refused = [domain for domain in loader.unread_domains if fixed.get(domain) != 0]
    if not refused:
        return
    codec = loader.dataset.info.codec
    remedy = (
        "set its weight in mixture.weights to 0"
        if isinstance(mixture, FixedMixture)
        else "leave it out with a plan (`kdata select --sql`)"
    )
    why = "has no token"
    if codec.keeps_some_positions:
        why = f"keeps no distribution ({described(codec.parameters['positions'])})"
        remedy += (
            ", set objective.cross_entropy_elsewhere so that its tokens count, or capture it with other `positions`"
        )
    raise ConfigError(
        f"{loader.dataset.place}: domain {refused[0]!r} {why} in the rows that are left to train on, so the mixture "
        f"cannot draw from it; {remedy}"
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
    """Rows of one rank's micro-batch. Raises ConfigError if the sizes are not multiples of each other."""
    micro = config.micro_batch_tokens or config.batch_tokens // world_size
    if micro % config.context_tokens or not micro or config.batch_tokens % (micro * world_size):
        ranks = f" times {world_size} ranks" if world_size > 1 else ""
        raise ConfigError(
            f"batch_tokens={config.batch_tokens}, micro_batch_tokens={micro}{ranks} and "
            f"context_tokens={config.context_tokens}: each must be a multiple of the next"
        )
    return micro // config.context_tokens


def _check_same_tokens(first: kdata.Dataset, other: kdata.Dataset) -> None:
    """Raise MismatchError unless a token id means the same token in both datasets."""
    remedy = "one student cannot be trained on both: capture both with teachers of the same tokenizer"
    refuse_other_ids(Vocabulary.of_dataset(first), Vocabulary.of_dataset(other), remedy)


def others_of(phases: list[OpenPhase]) -> list[kdata.Dataset]:
    """The datasets of a run beside that of its first phase, held-out ones included."""
    held_out = [phase.heldout.dataset for phase in phases if phase.heldout is not None]
    return [*(phase.dataset for phase in phases[1:]), *held_out]
