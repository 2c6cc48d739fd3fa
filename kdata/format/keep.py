"""What is kept of a distribution: five kinds, one typed setting.

    topk       the k most probable entries
    adaptive   as many as reach a mass, at least min_k, at most k
    sampled    N draws from the whole distribution: unbiased
    hybrid     the k most probable exactly, and N draws from the tail: unbiased
    threshold  each id of probability t or more exactly, and a draw for each t of the tail: unbiased

For the first two the rest is one number, the exact tail mass ("ghost"). For the others the kept weights already are an
unbiased estimate of the whole distribution ("draws"), whose expected training gradient is that of full distillation
(random-sampling distillation, arXiv 2503.16870, which draws independently).

Draws are systematic (Madow 1949; "systematic resampling" of particle filters, Kitagawa 1996): one uniform U a position, and
the N points (j + U) / N on the cumulative sum. Token i is then drawn floor(N p_i) or one time more, its expectation is N p_i
as with independent draws, and its variance frac (1 - frac) / N^2, frac the fractional part of N p_i, and not
p_i (1 - p_i) / N: what is likely has next to no noise. Measured in tests/benchmarks/codec.py.

Threshold spends entries where they count. Where id i is kept with probability q_i and weighs p_i / q_i, the variances sum to
sum_i p_i^2 (1 / q_i - 1). Over all ids of all positions, and at a given mean number of entries, that is least for q_i =
min(1, p_i / t) with one t for all (threshold sampling: Duffield, Lund and Thorup, Learn more, sample less, IEEE Transactions
on Information Theory 51, 2005; in surveys, sampling with probability proportional to size beside a stratum that is taken
whole: Tille, Sampling Algorithms, 2006). The rest of a position, of mass tail, gets N = ceil(tail / t) systematic draws, and
not a random number of them, so that weights sum to 1; no id is drawn more than twice. The most probable id is exact wherever
it lies: the first choice is always known. A position has at most 1 / t + 2 entries, whatever the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from kdata.config import Strict
from kdata.errors import ConfigError
from kdata.format.common_ids import LARGEST
from kdata.format.keep_rules import KeepPositions
from kdata.format.kept import Kept
from kdata.format.schema import CodecInfo

# Versions of the codec packed. 1: whole numbers beside the entries. 2: the same, and the dataset has `positions`: a kdata
# that knows version 1 alone would train on targets that have no entries as if the teacher had put all probability outside of
# them, so it has to refuse these datasets. 3: codes. 4: the same, and the ids of entries are no tokens of the dataset, as
# `kdata retokenize` has them for sorted probabilities: who reads them as tokens has to refuse. A dataset that an earlier
# version began goes on with its version.
PLAIN_VERSION, POSITIONS_VERSION, CODED_VERSION, RANKS_VERSION = 1, 2, 3, 4


def packed_version(vocab_size: int, has_positions: bool) -> int:
    """The version that new datasets have: the codes hold 8,388,608 ids."""
    if vocab_size <= LARGEST + 1:
        return CODED_VERSION
    return POSITIONS_VERSION if has_positions else PLAIN_VERSION


# Settings that not every kind has.
KINDS_WITH = {
    "k": ("hybrid", "topk", "adaptive"),
    "mass": ("adaptive",),
    "min_k": ("adaptive",),
    "num_draws": ("hybrid", "sampled"),
    "tau": ("hybrid", "sampled"),
    "draw_method": ("hybrid", "sampled"),
}


class KeepConfig(Strict):
    """How much of each distribution is kept."""

    kind: Literal["topk", "adaptive", "sampled", "hybrid", "threshold"] = Field(
        "threshold",
        description="What is kept: the k most probable entries (topk), as many of them as reach `mass` (adaptive), random "
        "draws (sampled), the k most probable entries and random draws from the rest (hybrid), or every entry from a "
        "probability on and as many draws as the rest asks for (threshold).",
    )
    k: int = Field(8, ge=1, le=4096, description="Exact entries (topk, hybrid), or at most so many (adaptive).")
    mass: float = Field(0.95, gt=0, lt=1, description="Kept probability mass that is enough (adaptive).")
    min_k: int = Field(4, ge=1, description="At least so many entries (adaptive).")
    num_draws: int = Field(28, ge=1, le=255, description="Random draws at each position (sampled, hybrid).")
    threshold: float = Field(
        0.03,
        ge=0.004,
        lt=1,
        description="Entries of this probability or more are exact, and so is the first; the rest has a random draw for each "
        "such mass (threshold).",
    )
    tau: float = Field(
        1.0,
        gt=0,
        le=2,
        description="Draws are proportional to p^tau, weighted back (sampled, hybrid); 1 is p itself.",
    )
    draw_seed: int = Field(0, ge=0, description="Seed of the draws (sampled, hybrid, threshold).")
    draw_method: Literal["systematic", "independent"] = Field(
        "systematic",
        description="How draws depend on each other (sampled, hybrid). systematic: evenly spaced points and one random shift "
        "at each position; unbiased as independent draws are, with less noise. independent: datasets from before there was a "
        "choice.",
    )
    draws_by: Literal["sequence", "context"] = Field(
        "sequence",
        exclude_if=lambda by: by == "sequence",
        description="What draws depend on (sampled, hybrid, threshold). sequence: on the whole text, so that "
        "texts with a common beginning release other ids there. context: on the tokens before the position alone, so that "
        "equal contexts release the same ids; for teachers whose weights are not public.",
    )
    temperatures: list[float] = Field(
        [],
        description="Further temperatures at which training shall be exact; their log-sum-exp is stored too.",
    )
    positions: KeepPositions | None = Field(
        None,
        exclude_if=lambda rule: rule is None,
        description="At which target positions a distribution is kept; at the others only the token's log-probability, rank, "
        "entropy and log_tail are. null: at all of them.",
    )

    @model_validator(mode="after")
    def _of_this_kind(self) -> KeepConfig:
        """Refuse settings of other kinds where no kind is named: whoever sets k does not mean the default kind."""
        if "kind" not in self.model_fields_set:
            for name, kinds in KINDS_WITH.items():
                if name in self.model_fields_set and self.kind not in kinds:
                    raise ValueError(
                        f"{name} is a setting of kind {', '.join(kinds)}, and none is named (the default is {self.kind}); "
                        f"set kind too, for instance kind={kinds[0]}"
                    )
        return self

    @model_validator(mode="after")
    def _sane(self) -> KeepConfig:
        if self.kind == "adaptive" and self.min_k > self.k:
            raise ValueError(f"min_k={self.min_k} exceeds the cap k={self.k}; lower it")
        if any(t <= 0 or t == 1 for t in self.temperatures):
            raise ValueError("temperatures must be above 0 and other than 1 (1 is always exact)")
        if self.kind == "threshold" and self.tau != 1:
            raise ValueError(f"tau={self.tau} is for sampled and hybrid; kind threshold draws by p itself: set tau=1")
        if self.kind == "threshold" and self.draw_method != "systematic":
            raise ValueError(
                f"draw_method={self.draw_method} is for sampled and hybrid; kind threshold needs draw_method=systematic"
            )
        if self.draws_by == "context" and self.tail != "draws":
            raise ValueError(f"draws_by=context is for kinds with draws, and {self.kind} has none; leave it out")
        return self

    @property
    def tail(self) -> Literal["ghost", "draws"]:
        """How the rest is represented: its exact mass (ghost), or draws."""
        return "draws" if self.kind in ("sampled", "hybrid", "threshold") else "ghost"

    @property
    def needs_full_distribution(self) -> bool:
        """True where the k most probable entries are not enough."""
        needs_entropy = self.positions is not None and self.positions.NEEDS_ENTROPY
        return self.tail == "draws" or bool(self.temperatures) or needs_entropy

    @property
    def why_full_distribution(self) -> str:
        """The settings that need it, for a message."""
        if self.positions is not None and self.positions.NEEDS_ENTROPY:
            return f"positions by {self.positions.rule}"
        return f"kind {self.kind}" if self.tail == "draws" else "further temperatures"

    @property
    def num_exact(self) -> int:
        """Most exact entries at a position."""
        if self.kind == "threshold":
            return int((1 + 1e-5) / self.threshold)  # rounded probabilities may sum to a little more than 1
        return 0 if self.kind == "sampled" else self.k

    @property
    def most_draws(self) -> int:
        """Most draws at a position."""
        if self.kind == "threshold":
            return math.ceil(1 / self.threshold)
        return self.num_draws if self.tail == "draws" else 0

    @property
    def log_threshold(self) -> float:
        """Log-probability, a float32, from which on an entry is exact whatever its rank; -inf for the other kinds."""
        return float(np.float32(math.log(self.threshold))) if self.kind == "threshold" else -math.inf

    def settings(self) -> dict[str, Any]:
        """The parameters that this kind uses. They identify it."""
        used = {
            "topk": ("k",),
            "adaptive": ("k", "mass", "min_k"),
            "sampled": ("num_draws", "tau", "draw_seed"),
            "hybrid": ("k", "num_draws", "tau", "draw_seed"),
            "threshold": ("threshold", "draw_seed"),
        }[self.kind]
        settings = {name: getattr(self, name) for name in used}
        if "num_draws" in settings:  # its name in recorded settings
            settings["draws"] = settings.pop("num_draws")
        if (
            self.tail == "draws" and self.draw_method != "independent"
        ):  # datasets from before this setting are independent
            settings["draw_method"] = self.draw_method
        if self.tail == "draws" and self.draws_by != "sequence":
            settings["draws_by"] = self.draws_by
        if self.positions is not None:
            settings["positions"] = self.positions.model_dump()
        return {**settings, "temperatures": self.temperatures} if self.temperatures else settings

    @staticmethod
    def of(info: CodecInfo) -> KeepConfig:
        """The setting that a dataset was captured with, without `positions`: its rule may be of a newer kdata."""
        values = {k: v for k, v in info.parameters.items() if k in KeepConfig.model_fields and k != "positions"}
        if "num_draws" in info.parameters:
            values = {"draw_method": "independent", **values}
        return KeepConfig(kind=info.kind, **values)

    def codec(self, vocab_size: int) -> CodecInfo:
        """The packed codec for this kind and vocabulary."""
        parameters = {**self.settings(), "id_bytes": 2 if vocab_size <= 2**16 else 3}
        if "draws" in parameters:
            parameters["num_draws"] = parameters.pop("draws")
        version = packed_version(vocab_size, self.positions is not None)
        if self.kind == "threshold" and version < CODED_VERSION:
            raise ConfigError(
                f"kind threshold is for at most {LARGEST + 1:,} ids, and there are {vocab_size:,}; choose hybrid"
            )
        return CodecInfo(id="packed", version=version, kind=self.kind, parameters=parameters)


def keep_top(keep: KeepConfig, ids_TK: np.ndarray, logprobs_TK: np.ndarray, recorded_T: np.ndarray) -> Kept:
    """Exact entries of the kinds topk, adaptive and threshold from top-k arrays [T, K] that fall along K."""
    if keep.kind == "topk":
        return Kept.top(ids_TK, logprobs_TK, recorded_T)
    if keep.kind == "threshold":
        enough_T, fewest = (logprobs_TK >= keep.log_threshold).sum(1), 1
    else:
        mass_TK = np.cumsum(np.exp(logprobs_TK.astype(np.float64)), 1)
        enough_T, fewest = (mass_TK < keep.mass).sum(1) + 1, keep.min_k
    counts_T = np.where(recorded_T, np.clip(enough_T, fewest, ids_TK.shape[1]), 0).astype(np.int32)
    kept_TK = np.arange(ids_TK.shape[1]) < counts_T[:, None]
    return Kept(
        counts_T,
        np.zeros_like(counts_T),
        ids_TK[kept_TK].astype(np.int32, copy=False),
        logprobs_TK[kept_TK].astype(np.float32, copy=False),
    )
