"""Held-out text of each domain, and what the student and the teacher lose on it: what a mixture is told.

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
from kdata.loader.batches import LoaderConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objectives import ObjectiveConfig

MEASURED = ObjectiveConfig(weights={"cross_entropy": 1.0})


@dataclass(frozen=True)
class Heldout:
    """Documents that are measured and never trained on.

    rows: int64, global rows of `dataset`. domain_R: int64 [R], number of each row's domain in `domains`, -1 for others.
    teacher_losses: nats per token on these rows, for each domain.
    """

    dataset: kdata.Dataset
    rows: np.ndarray
    domains: list[str]
    domain_R: np.ndarray
    teacher_losses: dict[str, float]


def keep_aside(
    dataset: kdata.Dataset, rows: np.ndarray | None, config: DDKMixture, seed: int
) -> tuple[np.ndarray, Heldout]:
    """Split what is to be trained on.

    Args:
        rows: int64 [S] planned global rows, repeats included; None: every row.
        seed: decides which documents are kept aside.
    Returns:
        The rows that are left, int64, in their order with their repeats; and what was kept aside.
    Raises:
        ConfigError: a domain has too few documents, or the dataset lacks the teacher's losses.
    """
    planned = np.arange(dataset.num_rows, dtype=np.int64) if rows is None else rows
    names, number_R = _domains(dataset)
    aside = []
    for number in np.unique(number_R[planned]):
        pool = np.unique(planned[number_R[planned] == number])
        count = min(config.heldout_documents, max(1, round(config.heldout_share * len(pool))))
        if count >= len(pool):
            raise ConfigError(
                f"domain {str(names[number])!r} has {len(pool)} documents, too few to keep {count} aside; name a held-out "
                "dataset in mixture.heldout, or leave the domain out by a plan"
            )
        order = np.argsort(np.random.PCG64([seed, int(number)]).random_raw(len(pool)), kind="stable")
        aside.append(np.sort(pool[order[:count]]))
    kept_aside = np.concatenate(aside)
    left = planned[~np.isin(planned, kept_aside)]
    return left, _heldout(dataset, kept_aside, [str(names[n]) for n in np.unique(number_R[planned])])


def open_heldout(path: str, domains: list[str], config: DDKMixture) -> Heldout:
    """The first documents of each domain of another dataset. Raises ConfigError where a domain has none there."""
    dataset = kdata.open(path)
    names, number_R = _domains(dataset)
    found = []
    for domain in domains:
        rows = np.flatnonzero(names[number_R] == domain)[: config.heldout_documents]
        if not len(rows):
            raise ConfigError(f"mixture.heldout {path} has no document of domain {domain!r}, which is trained on")
        found.append(rows)
    return _heldout(dataset, np.sort(np.concatenate(found)).astype(np.int64), domains)


def student_losses(
    learner: nn.Module, heldout: Heldout, context_tokens: int, batch_rows: int, ranks: Ranks
) -> dict[str, float]:
    """The student's cross-entropy on each domain, nats per counted token. Every rank calls it and gets the same.

    Args:
        learner: see `kdata.trainer.learner.Learner`, wrapped or not; its weights stay as they are.
        batch_rows: rows of `context_tokens` cells of one forward pass of one rank.
    """
    loader = Loader(heldout.dataset, heldout.rows, LoaderConfig(context_tokens=context_tokens, batch_rows=batch_rows))
    totals = np.zeros((2, len(heldout.domains)))
    learner.eval()
    with torch.no_grad():
        for group in _groups(loader.epoch(), ranks.world_size):
            # Ranks gather weights together, so one without a batch of its own computes another's and forgets it.
            mine = ranks.rank < len(group)
            batch = group[ranks.rank] if mine else group[0]
            _, values_MO = learner(batch, MEASURED, "ghost", 1)
            if mine:
                domain_M = heldout.domain_R[batch.rows[batch.document_M]]
                nll_M = values_MO[:, 0].double().cpu().numpy()
                totals += [np.bincount(domain_M, w, minlength=len(heldout.domains)) for w in (nll_M, None)]
    if isinstance(learner, FSDPModule):
        learner.reshard()  # without a backward pass the gathered copy would stay, and be stale after the next step
    learner.train()
    nll_N, count_N = ranks.sum(totals)
    return dict(zip(heldout.domains, (nll_N / count_N).tolist(), strict=True))


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(batches, size)):
        yield group


def _domains(dataset: kdata.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Names of the domains, and the number of each row's, int64 [R]."""
    names = np.array(dataset.index(["domain"])["domain"].to_pylist(), dtype=str)
    return np.unique(names, return_inverse=True)


def _heldout(dataset: kdata.Dataset, rows: np.ndarray, domains: list[str]) -> Heldout:
    """Put together, with the teacher's losses out of the index."""
    index = dataset.index(["nll", "num_target_tokens"])
    nll_R = index["nll"].to_numpy().astype(np.float64)  # null is NaN
    count_R = np.nan_to_num(index["num_target_tokens"].to_numpy().astype(np.float64))
    names, number_R = _domains(dataset)
    known = np.array([domains.index(name) if name in domains else -1 for name in names.tolist()])
    domain_R = known[number_R]
    losses = {}
    for number, domain in enumerate(domains):
        own = rows[(domain_R[rows] == number) & (count_R[rows] > 0)]
        if not len(own) or not np.isfinite(nll_R[own]).all():
            raise ConfigError(
                f"domain {domain!r}: the held-out rows have no teacher's loss (nll in the index); they were imported, or "
                "hold no target token. Name another dataset in mixture.heldout"
            )
        losses[domain] = float((nll_R[own] * count_R[own]).sum() / count_R[own].sum())
    return Heldout(dataset, rows, domains, domain_R, losses)
