"""Settings of the loss: which objectives, with which weights, and which of them a dataset can serve.

The formulas are in `kdata.trainer.objectives`. This file needs no torch, so the command line and recipes can check a setting
before anything heavy is loaded.

A dataset keeps a sparse part of the teacher's distribution: K entries per position. The tail mode says what stands for the
rest of the vocabulary. Sampled entries ("draws") are unbiased only in terms that are linear in the teacher's probabilities,
so an objective that is not linear uses the exact entries and one bucket for everything else, or is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdata.config import Strict
from kdata.errors import ConfigError, nearest
from kdata.trainer.schedule import Ramp

Tail = Literal["ghost", "draws", "renormalise"]

# One name for each formula in `kdata.trainer.objectives.OBJECTIVES`, in the same order; a test compares them.
OBJECTIVE_NAMES = [
    "cross_entropy", "forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation",
    "balanced_kl", "adaptive_kl", "tail_aware_kl", "deviation_kl", "taid",
    "plackett_luce", "first", "dac_kl", "uld", "sinkd", "span_correlation",
]  # fmt: skip
# They compare positions of a window of one document: `kdata.trainer.windows`.
WINDOW_OBJECTIVES = frozenset({"sinkd", "span_correlation"})
# Not of single positions but of chunks of them: `kdata.trainer.chunks`, which needs no entries, and `kdata.trainer.merged`.
CHUNK_OBJECTIVES = frozenset({"alm", "gold"})
# The objectives that compare sorted probabilities, and the map of `kdata retokenize` that keeps them.
SORTED_OBJECTIVES: dict[str, Literal["ranks", "matched"]] = {"uld": "ranks", "gold": "matched"}
# Linear in the teacher's probabilities, up to a constant: draws give an unbiased gradient.
LINEAR = frozenset({"cross_entropy", "forward_kl", "deviation_kl", *CHUNK_OBJECTIVES})
# Infinite where the student has probability and the teacher none, so without a bucket.
NEEDS_BUCKET = frozenset({"reverse_kl", "balanced_kl", "adaptive_kl"})


def _setting(default: Any, description: str, **limits: Any) -> Any:
    """A setting of one objective. Where it has its default it is left out, so that older records of a run stay equal."""
    return Field(default=default, description=description, exclude_if=lambda value: value == default, **limits)


class ObjectiveConfig(Strict):
    """Which objectives, in which mix, and how the teacher's sparse distribution is completed."""

    weights: dict[str, float | Ramp] = Field(
        default={"cross_entropy": 0.1, "forward_kl": 0.9},
        description="Weight of each objective, by name: a number, or {kind, start, end, steps} for a weight that changes "
        "with the step. The loss is the weighted sum; the weights need not sum to 1. 0: the objective is in the metrics and "
        "does not train.",
    )
    tail: Literal["auto", "ghost", "draws", "renormalise"] = Field(
        default="auto",
        description="What stands for the probability outside the kept entries. auto: whatever the dataset was captured for "
        "(ghost or draws). ghost: one bucket with the exact remaining probability. draws: nothing, the kept weights are "
        "unbiased and sum to 1; objectives that are not linear in them (all except cross_entropy, forward_kl, deviation_kl "
        "and jsd at beta 0) use the exact entries and one bucket. renormalise: nothing, the kept entries are scaled to sum "
        "to 1 (biased; for comparison).",
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Temperature T of teacher and student in every objective except cross_entropy; values are multiplied by "
        "T^2. 1, or a temperature that the dataset was captured for (its setting `temperatures`).",
    )
    jsd_beta: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the teacher in the mixture of `jsd`. 0: forward KL; 1: reverse KL.",
    )
    skew: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share s that the skewed divergences mix in. 0.1 is the choice of the paper's authors.",
    )
    balanced_delta: float = _setting(
        2.0,
        "Weight of forward KL in `balanced_kl` where the teacher is less certain than the student, and of reverse KL where "
        "it is not; the other one has weight 1. 2 is our default.",
        gt=0,
    )
    adaptive_head: float = _setting(
        0.5,
        "Teacher's probability that the head of `adaptive_kl` may sum to. 0.5 is the choice of the paper's authors.",
        gt=0,
        lt=1,
    )
    tail_weight: float = _setting(
        2.0,
        "Weight in `tail_aware_kl` of how much probability lies in the tail. 1: forward KL. 2 is our default.",
        gt=0,
    )
    deviation_gamma: float = _setting(
        1.0,
        "Power of the teacher's entropy, as a share of the largest one, in `deviation_kl`. 0: forward KL. 1 is our default.",
        ge=0,
    )
    taid_t: Literal["adaptive"] | Annotated[float, Field(ge=0, le=1)] | Ramp = _setting(
        "adaptive",
        "Share of the teacher in the target of `taid`: a number, {kind, start, end, steps} for one that changes with the "
        "step, or adaptive: from 0.4 to 1, as the loss falls, with state that a checkpoint holds. adaptive is for "
        "`kdata train` and recipes only.",
    )
    first_c: float = _setting(
        1.0,
        "c of `first`: the teacher's five largest probabilities become exp(p / c), scaled to sum to 1. Small: the largest "
        "one alone; large: all alike. To be chosen by calibration on held-out text; 1 is the default of the authors' code.",
        gt=0,
    )
    dac_lower: float = _setting(
        0.0,
        "Lower bound of `dac_kl`: entries before which less of the teacher's probability lies, from the most probable entry "
        "on, do not count. 0: none are left out. Our default.",
        ge=0,
        lt=1,
    )
    dac_upper: float = _setting(
        0.95,
        "Upper bound of `dac_kl`: entries before which as much or more of the teacher's probability lies do not count. 1: "
        "none are left out but what is not kept. Our default.",
        gt=0,
        le=1,
    )

    compared_tokens: int = _setting(
        32,
        "Tokens of a window, counted from a document's first one: `sinkd` compares all positions of a window with each "
        "other, and takes time and memory in proportion; `span_correlation` each with the one before. The student's logits "
        "of a whole window exist at a time. 32 is our default.",
        ge=2,
    )
    alm_temperature: float = _setting(
        100.0,
        "Temperature T of `alm`, which compares the probabilities of chunks to the power 1 / T. 100 is the choice of the "
        "paper's authors.",
        gt=0,
    )
    gold_weights: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = _setting(
        None,
        "Weights of the two parts of `gold`: tokens that match by their divergence, others by rank. null: the share m of the "
        "teacher's tokens that match, and 1 - m.",
    )
    gold_beta: float = _setting(
        0.5, "Share of the teacher in the mixture of `gold`'s divergence. 0.5 is TRL's default.", gt=0, lt=1
    )
    cross_entropy_elsewhere: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        exclude_if=lambda weight: weight is None,
        description="Only with a plan that chooses positions, or a dataset that keeps distributions at some positions only: "
        "weight of the cross-entropy of the actual token at the other targets of its rows, where nothing else counts. Each "
        "of them counts like a position of weight 1. null: the other targets do not count.",
    )

    @model_validator(mode="after")
    def _taid_t_is_a_share(self) -> ObjectiveConfig:
        if isinstance(self.taid_t, Ramp) and max(self.taid_t.start, self.taid_t.end) > 1:
            raise ValueError(f"taid_t goes from {self.taid_t.start} to {self.taid_t.end}; it is a share, from 0 to 1")
        return self

    @model_validator(mode="after")
    def _dac_bounds_are_in_order(self) -> ObjectiveConfig:
        if self.dac_lower >= self.dac_upper:
            raise ValueError(
                f"dac_lower is {self.dac_lower} and dac_upper {self.dac_upper}; it must be the smaller one"
            )
        return self

    @model_validator(mode="after")
    def _spans_are_at_temperature_1(self) -> ObjectiveConfig:
        if "span_correlation" in self.weights and self.temperature != 1.0:
            raise ValueError(
                f"temperature is {self.temperature}, at which the teacher's probability of an actual token is not known, and "
                "span_correlation needs it; set temperature to 1, or remove span_correlation"
            )
        return self

    @model_validator(mode="after")
    def _gold_weighs_something(self) -> ObjectiveConfig:
        if self.gold_weights is not None and not any(self.gold_weights):
            raise ValueError("gold_weights are both 0, so gold would be 0; remove the objective, or set one above 0")
        return self

    def at(self, step: int, steps: int) -> ObjectiveConfig:
        """The same mix with numbers for what changes with the step: those of step 0, 1, ... of a phase of `steps` steps."""
        numbers = {n: w.at(step, steps) if isinstance(w, Ramp) else w for n, w in self.weights.items()}
        t = self.taid_t.at(step, steps) if isinstance(self.taid_t, Ramp) else self.taid_t
        return self.model_copy(update={"weights": numbers, "taid_t": t})

    @property
    def is_adaptive(self) -> bool:
        """Whether the mix has a part that follows the loss, and so needs state beside settings and step."""
        return "taid" in self.weights and self.taid_t == "adaptive"

    @property
    def reads_all_targets(self) -> bool:
        """Whether targets count at which nothing is kept, or which a plan does not choose."""
        return self.cross_entropy_elsewhere is not None or not CHUNK_OBJECTIVES.isdisjoint(self.weights)

    def numbers(self) -> dict[str, float]:
        """The weights. Raises ConfigError if one of them still depends on the step; `at` resolves those."""
        fixed = {name: weight for name, weight in self.weights.items() if not isinstance(weight, Ramp)}
        if len(fixed) < len(self.weights):
            raise ConfigError("objective.weights change with the step; call config.at(step, steps) first")
        return fixed

    def interpolation(self) -> float:
        """The number `taid_t`. Raises ConfigError if it still depends on the step or on losses."""
        if isinstance(self.taid_t, Ramp):
            raise ConfigError("objective.taid_t changes with the step; call config.at(step, steps) first")
        if self.taid_t == "adaptive":
            raise ConfigError(f"objective.taid_t is adaptive, {_NO_STATE}")
        return self.taid_t


_NO_STATE = (
    "which follows the losses of `kdata train` and has no state elsewhere; set objective.taid_t to a number, or to a ramp "
    "such as {start: 0.4, end: 1.0}"
)


def refuse_adaptive(config: ObjectiveConfig) -> None:
    """Raise ConfigError where a mix needs state that only this trainer keeps."""
    if config.is_adaptive:
        raise ConfigError(f"objective.taid_t is adaptive, {_NO_STATE}")


def refuse_chunks(config: ObjectiveConfig) -> None:
    """Raise ConfigError where a mix needs chunks of tokens, which only this trainer's batches hold."""
    for name in CHUNK_OBJECTIVES.intersection(config.weights):
        raise ConfigError(
            f"objective {name} is of chunks of tokens, which batches for other trainers do not hold; use `kdata train`"
        )


def token_map_of(config: ObjectiveConfig) -> Literal["prefix", "ranks", "matched"]:
    """The map with which a dataset is to be retokenized for a mix. Raises ConfigError where none serves all of it."""
    token_map: Literal["prefix", "ranks", "matched"] = "prefix"
    for name, needed in SORTED_OBJECTIVES.items():
        if name in config.weights:
            token_map = needed
    refuse_other_map(config, token_map)
    return token_map


def refuse_other_map(config: ObjectiveConfig, token_map: str | None) -> None:
    """Raise ConfigError where entries have ids that an objective of a mix cannot use.

    Args:
        token_map: the dataset's (`CodecInfo.token_map`); None: entries are as a teacher with its tokenizer has them.
    """
    for name in config.weights:
        needed = SORTED_OBJECTIVES.get(name)
        if name in ("cross_entropy", "alm") or needed == token_map or (name == "uld" and token_map is None):
            continue
        if needed is not None:
            own = "its teacher's own tokenizer" if token_map is None else f"map {token_map}"
            raise ConfigError(
                f"objective {name} needs data that was retokenized with --map {needed} (`kdata train --tokenizer` does), and "
                f"this has {own}; retokenize for {name}, or use another objective"
            )
        if name == "span_correlation" and token_map is not None:
            raise ConfigError(
                "objective span_correlation needs the teacher's probability of every actual token, and data that was "
                "retokenized holds that of chunks; use alm, which compares chunks, or the dataset it was made of"
            )
        if token_map in SORTED_OBJECTIVES.values():
            raise ConfigError(
                f"objective {name} needs to know which tokens the teacher believed in, and data with map {token_map} has "
                "sorted probabilities; remove it (weight 0 would measure it too), or retokenize with --map prefix"
            )


def tail_of(name: str, config: ObjectiveConfig, tail: Tail) -> Tail:
    """The tail mode of one objective: `tail`, or ghost of the exact entries if draws would bias the objective."""
    linear = name in LINEAR or (name == "jsd" and config.jsd_beta == 0.0)
    return tail if linear or tail != "draws" else "ghost"


def scale_of(name: str, temperature: float) -> float:
    """The factor on an objective's value and gradient: T^2, or 1 for cross_entropy."""
    return 1.0 if name in ("cross_entropy", *CHUNK_OBJECTIVES) else temperature**2


def resolve_tail(
    config: ObjectiveConfig,
    held: Literal["ghost", "draws", "absent"],
    temperatures: Sequence[float] = (),
    *,
    kind: str = "sampled",
    token_map: str | None = None,
) -> Tail:
    """Check an objective mix against what a dataset holds, and return the tail mode to train with.

    Args:
        config: the mix.
        held: the dataset's `tail`.
        temperatures: those other than 1 whose log-sum-exp the dataset holds.
        kind: the dataset's `codec.kind`. It matters for draws only: hybrid and threshold alone have exact entries at every
            position.
        token_map: the dataset's `codec.token_map`, of data for another tokenizer.

    Raises:
        ConfigError: an unknown objective; no positive weight; a negative or non-finite weight; a temperature that the
            dataset was not captured for; a tail mode or an objective that the data cannot serve; an objective that is
            infinite under the tail mode.
    """
    known = [*OBJECTIVE_NAMES, *sorted(CHUNK_OBJECTIVES)]
    unknown = sorted(set(config.weights) - set(known))
    if unknown:
        hint = nearest(unknown[0], known)
        raise ConfigError(f"objective.weights names {unknown}{hint}; known objectives: {', '.join(known)}")
    _check_weights(config.weights)
    refuse_other_map(config, token_map)
    if config.temperature != 1.0 and config.temperature not in temperatures:
        raise ConfigError(
            f"objective.temperature is {config.temperature}, but the dataset holds the teacher's log-sum-exp only at "
            f"{[1.0, *temperatures]}, so the tail would be wrong at any other temperature; set it to one of these, or "
            f"capture the text again with --set temperatures=[{config.temperature}]"
        )
    if held == "absent":
        if config.tail != "renormalise":
            raise ConfigError(
                f"objective.tail is {config.tail!r}, but the dataset was imported from a format that does not hold the "
                "probability outside the kept entries; set objective.tail to renormalise (biased towards the kept entries), "
                "or capture the text again with `kdata capture`"
            )
        held = "ghost"
    tail: Tail = held if config.tail == "auto" else config.tail
    if tail == "renormalise" and "gold" in config.weights:
        raise ConfigError("objective gold compares the tails, and tail is renormalise; set objective.tail to auto")
    if (tail == "draws") != (held == "draws"):
        allowed = "draws" if held == "draws" else "ghost or renormalise"
        raise ConfigError(f"objective.tail is {tail!r}, but the dataset's kept entries are for {held!r}; use {allowed}")
    needs_bucket = [n for n in config.weights if n in NEEDS_BUCKET or (n == "jsd" and config.jsd_beta == 1.0)]
    if needs_bucket and tail == "renormalise":
        raise ConfigError(
            f"{needs_bucket[0]} is infinite with tail {tail!r} (the student's probability outside the kept entries meets a "
            "teacher's probability of 0); use skewed_reverse_kl, or data with an exact tail (ghost)"
        )
    biased = [name for name in config.weights if tail_of(name, config, tail) != tail]
    if biased and kind not in ("hybrid", "threshold"):
        raise ConfigError(
            f"{biased[0]} is not linear in the teacher's probabilities, so draws bias it, and data of kind {kind!r} does not "
            "hold exact entries at every position; remove it (weight 0 would measure it too), or use data of kind hybrid, "
            "threshold, topk or adaptive"
        )
    return tail


def refuse_elsewhere(config: ObjectiveConfig, *, has_positions: bool) -> None:
    """Raise ConfigError where a weight for targets elsewhere is set, and neither plan nor dataset leaves a target out."""
    if config.cross_entropy_elsewhere is not None and not has_positions:
        raise ConfigError(
            f"objective.cross_entropy_elsewhere is {config.cross_entropy_elsewhere}, but every target counts: it is for "
            "plans that choose positions (`kdata select --positions RULE`), and for datasets that keep distributions at some "
            "positions only; name such a plan, or leave the setting at null"
        )


def _check_weights(weights: Mapping[str, float | Ramp]) -> None:
    """Raise ConfigError unless weights are finite, none is negative and not all are 0, at both ends of their ramps."""
    for place in ("start", "end"):
        values = [getattr(w, place) if isinstance(w, Ramp) else w for w in weights.values()]
        if any(not math.isfinite(w) or w < 0 for w in values) or not any(values):
            where = f" at the {place}" if any(isinstance(w, Ramp) for w in weights.values()) else ""
            raise ConfigError(f"objective.weights {weights} must be finite, >= 0 and not all 0{where}")
