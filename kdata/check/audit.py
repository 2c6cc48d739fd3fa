"""The leakage audit: does a published logit dataset reveal the teacher's output projection?

Logits are z = W h with W [V, d]. From enough of them one can recover the span of W, and so the hidden size d and the
projection up to a d x d matrix (Carlini et al., arXiv 2403.06634; Finlayson et al., 2403.09539). Two attacks work on sparse
rows. The audit runs both on the datasets as they would be published:

1. Algebra. A context has d free numbers, so only more than d distinct ids released for one context can determine W. All
   rows and sources that share the context count, and so do the actual tokens (their log-probability is stored).
2. Statistics. Cov(z_i, z_j) = (W Cov(h) W^T)_ij can be estimated from all positions that store both i and j, however few
   ids each position stores. The co-moment matrix of a block of frequent ids has rank d (d + 1 for log-probabilities, whose
   normaliser is one more direction). A gap after eigenvalue d, or an overlap of the top eigenspace with the true head, shows
   that W leaks. The null permutes the values within each position, which destroys only the pairing of ids and values.

The verdict is FAIL, WARN, or "not recovered by these two attacks". The audit knows no other attack and proves no safety. It
was derived from the mean and rank of sparse rows and simulated on synthetic z = W h; it is not calibrated on a large model.
WARN begins where the simulation begins to recover W (about 7 pairs: subspace overlap 0.66; 70 pairs: 0.97).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdata.calls import validated
from kdata.check.attacks import (
    Moments,
    co_moments,
    distinct_per_context,
    eigen_gap,
    frequent_ids,
    subspace_overlap,
)
from kdata.errors import ConfigError, DataError, DependencyError, MismatchError, MissingError
from kdata.format.keep_rules import refuse_sorted
from kdata.format.schema import DatasetInfo
from kdata.format.sequences import Sequences
from kdata.observe.progress import Task
from kdata.store.dataset import Dataset
from kdata.store.pretrained import model_files

WARN_PAIRS = 5.0
OVERLAP_RECOVERED = 0.9
NULLS = 3
UNKNOWN_BLOCK = 512
NOT_RECOVERED = "not recovered by these two attacks"


@dataclass(frozen=True)
class Audit:
    """The result of the two attacks.

    Attributes:
        k_eff: most distinct ids released for one context.
        contexts_over: contexts with more than d ids; None where d is unknown.
        block: ids in the co-moment matrix.
        median_pairs: number of positions that store both ids of a pair, median over pairs.
        gap: largest ratio of consecutive eigenvalues near d (anywhere where d is unknown), after eigenvalue `gap_index`.
        null_gap: the largest such ratio under the null.
        overlap, null_overlap: share of the true head's span in the top eigenspace; None without head.
    """

    verdict: str
    reasons: list[str]
    positions: int
    hidden_size: int | None
    k_eff: int
    contexts_over: int | None
    block: int
    median_pairs: float
    gap: float
    gap_index: int
    null_gap: float
    overlap: float | None
    null_overlap: float | None

    def lines(self) -> list[str]:
        """The audit as text, the verdict last."""
        d = "unknown" if self.hidden_size is None else f"{self.hidden_size:,}"
        lines = [
            f"positions: {self.positions:,}; hidden size d: {d}",
            f"most distinct ids released for one context: {self.k_eff:,}"
            + ("" if self.contexts_over is None else f"; contexts with more than d: {self.contexts_over:,}"),
            f"median pair count on the {self.block:,} most frequent ids: {self.median_pairs:,.1f}",
            f"largest eigenvalue gap: {self.gap:.2f} after {self.gap_index:,}; null {self.null_gap:.2f}",
        ]
        if self.overlap is not None:
            lines.append(f"overlap with the true head's span: {self.overlap:.3f}; null {self.null_overlap:.3f}")
        return [*lines, *self.reasons, f"verdict: {self.verdict}"]

    def as_dict(self) -> dict[str, Any]:
        """The audit as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """Some rows of a dataset, as the audit reads them."""

    dataset: Dataset
    rows: np.ndarray

    @property
    def info(self) -> DatasetInfo:
        """See `Dataset.info`."""
        return self.dataset.info

    @property
    def place(self) -> str:
        """See `Dataset.place`."""
        return self.dataset.place

    @property
    def num_rows(self) -> int:
        """Rows of the sample."""
        return len(self.rows)

    def take(self, rows: np.ndarray) -> Sequences:
        """See `Dataset.take`."""
        return self.dataset.take(self.rows[rows])


def sample_of(dataset: Dataset, tokens: int) -> Sample:
    """Rows at even distances, as many as have about so many tokens."""
    share = min(1.0, tokens / max(dataset.num_tokens, 1))
    number = max(1, round(share * dataset.num_rows))
    return Sample(dataset, np.arange(number) * dataset.num_rows // number)


@validated
def audit(
    datasets: Sequence[Dataset | Sample],
    *,
    hidden_size: int | None = None,
    head_VD: np.ndarray | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Audit:
    """Run both attacks on all datasets that are or would be released of one teacher.

    Args:
        datasets: all of them, as leaks add up; of one vocabulary. A sample (`sample_of`) shows less than all rows.
        hidden_size: d, where it is known.
        head_VD: float [V, d], the teacher's true output projection, as ground truth.
        block: ids in the co-moment matrix; None takes 2d, or 512 where d is unknown. Memory is 40 bytes times its square.
    Raises:
        DataError: no exact entries to attack.
        MismatchError: vocabularies differ, or the head is of another vocabulary or hidden size.
        ConfigError: the block is not larger than d.
    """
    vocab_size = _check(datasets, head_VD, hidden_size)
    d = hidden_size or (None if head_VD is None else head_VD.shape[1])
    size = min(block or (UNKNOWN_BLOCK if d is None else 2 * d), vocab_size)
    if d is not None and size <= d + 1:
        raise ConfigError(f"a block of {size} ids is too small to show a rank of {d}; set --block to {2 * d}")
    with Task("audit", 3 + NULLS, "passes") as task:
        k_eff, over = distinct_per_context(datasets, d)
        task.advance(1)
        ids_B = frequent_ids(datasets, vocab_size, size)
        task.advance(1)
        rng = np.random.default_rng(seed)
        moments, positions = co_moments(datasets, ids_B, vocab_size, None)
        task.advance(1)
        nulls = []
        for _ in range(NULLS):
            nulls.append(co_moments(datasets, ids_B, vocab_size, rng)[0])
            task.advance(1)
    return _judge(d, k_eff, over, positions, ids_B, moments, nulls, head_VD)


def _check(datasets: Sequence[Dataset | Sample], head_VD: np.ndarray | None, hidden_size: int | None) -> int:
    if not datasets or not any(dataset.num_rows for dataset in datasets):
        raise DataError("the datasets have no rows, so there is nothing to audit; name datasets with rows")
    for dataset in datasets:
        refuse_sorted(dataset.info.codec, dataset.place, "an audit")
    sizes = {dataset.info.vocab_size for dataset in datasets}
    if len(sizes) > 1:
        raise MismatchError(
            f"the datasets have vocabularies of {sorted(sizes)} ids; audit those of one teacher together"
        )
    size = sizes.pop()
    if head_VD is not None and (head_VD.shape[0] < size or hidden_size not in (None, head_VD.shape[1])):
        raise MismatchError(
            f"the head has the shape {head_VD.shape}, but the datasets have {size} ids and d is {hidden_size}; name the "
            "teacher's own folder, or leave out the hidden size"
        )
    return size


def _judge(
    d: int | None, k_eff: int, over: int | None, positions: int, ids_B: np.ndarray, moments: Moments,
    nulls: list[Moments], head_VD: np.ndarray | None,
) -> Audit:  # fmt: skip
    size = len(ids_B)
    median = float(np.median(moments.pairs_BB[~np.eye(size, dtype=bool)])) if size > 1 else 0.0
    gap, index = eigen_gap(moments.values_BB, d)
    null_gap = max(eigen_gap(null.values_BB, d)[0] for null in nulls)
    overlap = null_overlap = None
    if head_VD is not None:
        overlap = subspace_overlap(moments.values_BB, head_VD[ids_B])
        null_overlap = max(subspace_overlap(null.values_BB, head_VD[ids_B]) for null in nulls)
    fails, warns = [], []
    if d is not None and k_eff > d:
        fails.append(
            f"FAIL: {k_eff:,} distinct ids are released for one context, more than d = {d:,} ({over:,} such contexts)"
        )
    if gap > null_gap and (d is None or index in (d, d + 1)):
        fails.append(
            f"FAIL: the eigenvalues drop {gap:.2f}-fold after {index:,}, under the null at most {null_gap:.2f}-fold"
        )
    if overlap is not None and null_overlap is not None and overlap > max(OVERLAP_RECOVERED, null_overlap):
        fails.append(f"FAIL: {overlap:.1%} of the head's span is recovered")
    if median >= WARN_PAIRS:
        warns.append(
            f"WARN: half of all pairs of frequent ids are stored together {median:,.0f} times or more; "
            "more rows may reveal the head"
        )
    if d is not None and size <= d + 1:
        warns.append(f"WARN: {size:,} distinct ids are stored in all: too few for the second attack at d = {d:,}")
    verdict = "FAIL" if fails else "WARN" if warns else NOT_RECOVERED
    return Audit(
        verdict, fails + warns, positions, d, k_eff, over, size, median, gap, index, null_gap, overlap, null_overlap
    )


def load_head(folder: Path) -> np.ndarray:
    """The output projection float32 [V, d] in a model's folder: lm_head, or the embedding where they are tied.

    Raises:
        MissingError: the folder's safetensors hold no such tensor.
        DependencyError: torch or safetensors is not installed.
    """
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise DependencyError("--head reads a model's weights: pip install 'kdata[train]'") from error
    tensor_of: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with model_files(path, "the weights"), safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, this object is no mapping
                for wanted in ("lm_head.weight", "embed_tokens.weight", "wte.weight", "embed_out.weight"):
                    if name.endswith(wanted):
                        tensor_of.setdefault(wanted, (path, name))
    for wanted in ("lm_head.weight", "embed_out.weight", "embed_tokens.weight", "wte.weight"):
        if wanted in tensor_of:
            path, name = tensor_of[wanted]
            with model_files(path, "the weights"), safe_open(path, framework="pt") as tensors:
                head_VD: np.ndarray = tensors.get_tensor(name).float().numpy()
                return head_VD
    raise MissingError(
        f"{folder} has no safetensors with an output projection (lm_head or embed_tokens); name a model's folder"
    )
