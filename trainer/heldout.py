"""Held-out text of each domain, and the student's and the teacher's loss on it: the input of DDK's domain weights.

The text is another dataset, or a share of the training rows that is held out and never trained on.

Shapes: R rows of a dataset, N domains, M counted positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import kdata
from kdata.errors import ConfigError
from kdata.loader.batches import BatchesConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import ObjectiveConfig

# Every target is measured, those too at which the dataset keeps no distribution.
MEASURED = ObjectiveConfig(weights={"cross_entropy": 1.0}, cross_entropy_elsewhere=1.0)


@dataclass(frozen=True)
class Heldout:
    """Documents that are measured and never trained on.

    rows: int64, global rows of `dataset`. domain_R: int64 [R], index of each row's domain in `domains`, -1 for other domains.
    teacher_losses: the teacher's loss on these rows, nats per token, for each domain.
    """

    dataset: kdata.Dataset
    rows: np.ndarray
    domains: list[str]
    domain_R: np.ndarray
    teacher_losses: dict[str, float]


def keep_aside(
    dataset: kdata.Dataset, rows: np.ndarray | None, config: DDKMixture, seed: int
) -> tuple[np.ndarray, Heldout]:
    """Split the planned rows into rows to train on and rows to hold out.

    Args:
        rows: int64 [S] planned global rows, repeats included; None: every row.
        seed: decides which documents are held out.
    Returns:
        The rows to train on, int64, in their order with their repeats; and the held-out rows.
    Raises:
        ConfigError: a domain has too few documents, or the dataset lacks the teacher's losses.
    """
    planned = np.arange(dataset.num_rows, dtype=np.int64) if rows is None else rows
    names, number_R = _domains(dataset)
    held_out = []
    for number in np.unique(number_R[planned]):
        pool = np.unique(planned[number_R[planned] == number])
        count = min(config.heldout_documents, max(1, round(config.heldout_share * len(pool))))
        if count >= len(pool):
            raise ConfigError(
                f"domain {str(names[number])!r} has {len(pool)} documents, too few to hold out {count}; name a held-out "
                "dataset in mixture.heldout, or leave the domain out with a plan"
            )
        order = np.argsort(np.random.PCG64([seed, int(number)]).random_raw(len(pool)), kind="stable")
        held_out.append(np.sort(pool[order[:count]]))
    heldout_rows = np.concatenate(held_out)
    training_rows = planned[~np.isin(planned, heldout_rows)]
    return training_rows, _heldout(dataset, heldout_rows, [str(names[n]) for n in np.unique(number_R[planned])])


def open_heldout(path: str, domains: list[str], config: DDKMixture) -> Heldout:
    """The first documents of each domain of another dataset. Raises ConfigError if it has none of some domain."""
    dataset = kdata.open(path)
    names, number_R = _domains(dataset)
    parts = []
    for domain in domains:
        rows = np.flatnonzero(names[number_R] == domain)[: config.heldout_documents]
        if not len(rows):
            raise ConfigError(f"mixture.heldout {path} has no document of domain {domain!r}, which is trained on")
        parts.append(rows)
    return _heldout(dataset, np.sort(np.concatenate(parts)).astype(np.int64), domains)


def student_losses(
    learner: nn.Module, heldout: Heldout, context_tokens: int, batch_rows: int, ranks: Ranks
) -> dict[str, float]:
    """The student's cross-entropy on each domain, nats per counted token. Every rank must call it and gets the same.

    Args:
        learner: a `kdata.trainer.learner.Learner`, wrapped or not; its weights do not change.
        batch_rows: rows of `context_tokens` tokens in one forward pass of one rank.
    """
    config = BatchesConfig(context_tokens=context_tokens, batch_rows=batch_rows)
    loader = Loader(heldout.dataset, heldout.rows, config, elsewhere=True)
    totals = np.zeros((2, len(heldout.domains)))
    learner.eval()
    with torch.no_grad():
        for group in _groups(loader.epoch(), ranks.world_size):
            # Ranks gather weights together, so a rank without a batch computes the first one and ignores the result.
            mine = ranks.rank < len(group)
            batch = group[ranks.rank] if mine else group[0]
            _, values_MO = learner(batch, MEASURED, "ghost", 1)
            if mine:
                domain_M = heldout.domain_R[batch.rows[batch.document_M]]
                nll_M = values_MO[:, 0].double().cpu().numpy()
                totals += [np.bincount(domain_M, w, minlength=len(heldout.domains)) for w in (nll_M, None)]
    if isinstance(learner, FSDPModule):
        learner.reshard()  # without a backward pass the gathered copy would stay and be outdated after the next step
    learner.train()
    nll_N, count_N = ranks.sum(totals)
    return dict(zip(heldout.domains, (nll_N / count_N).tolist(), strict=True))


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


def _domains(dataset: kdata.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Names of the domains, and the index of each row's domain, int64 [R]."""
    names = np.array(dataset.index(["domain"])["domain"].to_pylist(), dtype=str)
    return np.unique(names, return_inverse=True)


def _heldout(dataset: kdata.Dataset, rows: np.ndarray, domains: list[str]) -> Heldout:
    """Held-out rows with the teacher's losses from the index."""
    index = dataset.index(["nll", "num_target_tokens"])
    nll_R = index["nll"].to_numpy().astype(np.float64)  # null is NaN
    count_R = np.nan_to_num(index["num_target_tokens"].to_numpy().astype(np.float64))
    names, number_R = _domains(dataset)
    number_of_name = np.array([domains.index(name) if name in domains else -1 for name in names.tolist()])
    domain_R = number_of_name[number_R]
    losses = {}
    for number, domain in enumerate(domains):
        own = rows[(domain_R[rows] == number) & (count_R[rows] > 0)]
        if not len(own) or not np.isfinite(nll_R[own]).all():
            raise ConfigError(
                f"domain {domain!r}: the index holds no teacher's loss (nll) for the held-out rows; they were imported, or "
                "have no target token. Name another dataset in mixture.heldout"
            )
        losses[domain] = float((nll_R[own] * count_R[own]).sum() / count_R[own].sum())
    return Heldout(dataset, rows, domains, domain_R, losses)


def first_of_each(domain_R: np.ndarray, limit: int | None) -> np.ndarray:
    """Global rows of the first `limit` documents of each domain, int64, in dataset order."""
    if limit is None:
        return np.arange(len(domain_R), dtype=np.int64)
    order = np.argsort(domain_R, kind="stable")
    starts = np.searchsorted(domain_R[order], np.arange(domain_R.max(initial=-1) + 1))
    place = np.arange(len(order)) - starts[domain_R[order]]
    return np.sort(order[place < limit]).astype(np.int64)
