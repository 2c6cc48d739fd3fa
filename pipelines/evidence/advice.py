"""What the evidence says about a dataset: what to keep of the teacher, which objective, and which size of student.

Needs no torch.

Every number is read from results.json, which the runs of question 1 wrote (`kdata.pipelines.evidence.offline`), and those of
sizes from capacity.json (`kdata.pipelines.evidence.capacity`). Two settings are told apart where their 95 % intervals do not
overlap. What no run was made for is listed, and nothing is guessed from runs of other kinds, sizes or vocabularies.

A figure is the relative difference of the held-out NLL to full distillation, in pairs of the same seed; for sizes see
`sizes_of`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

import kdata
from kdata.config import first_problem
from kdata.errors import CorruptError, DataError
from kdata.format.json_text import read_json
from kdata.format.keep import KeepConfig
from kdata.pipelines.evidence.summary import Estimate
from kdata.selection.plan import Plan

RESULTS = Path(__file__).with_name("results.json")
R = TypeVar("R", bound=BaseModel)
CAPACITY = Path(__file__).with_name("capacity.json")
PLAIN = ("auto", "forward_kl")  # how data is used where nothing else is said: tail, objective
NOT_OF_THE_KIND = (
    "draw_seed",
    "draws_by",
    "temperatures",
    "positions",
)  # settings that no figure depends on, or that are said apart


@dataclass(frozen=True)
class Measured:
    """One setting of the evidence. keep: what was kept of the teacher, None: nothing. gap: NLL against full distillation."""

    name: str
    keep: dict[str, Any] | None
    tail: str
    objective: str
    bytes_per_token: float | None
    gap: Estimate

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean of a single run."""
        return self.gap.mean - (self.gap.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean of a single run."""
        return self.gap.mean + (self.gap.half_width or 0.0)

    @property
    def is_plain(self) -> bool:
        """Whether it is stored data, used as it is used where nothing else is said."""
        return self.keep is not None and self.bytes_per_token is not None and (self.tail, self.objective) == PLAIN

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        own = {
            "name": self.name,
            "keep": self.keep,
            "objective": self.objective,
            "bytes_per_token": self.bytes_per_token,
        }
        return {**own, "nll_against_online": asdict(self.gap)}


class _Part(BaseModel):
    """A part of results.json, as far as it is read."""

    model_config = ConfigDict(strict=True)


class _Mean(_Part):
    mean: FiniteFloat


class _Gap(_Mean):
    half_width: FiniteFloat | None
    count: int = Field(ge=1)


class _Content(_Part):
    keep: dict[str, Any] | None
    tail: str
    objective: str

    @model_validator(mode="after")
    def _of_a_kind(self) -> _Content:
        if self.keep is not None and not isinstance(self.keep.get("kind"), str):
            raise ValueError("keep has no kind")
        return self


class _Setting(_Part):
    content: _Content
    bytes_per_token: _Mean | None = None
    nll_against_online: _Gap | None


class _SetUp(_Part):
    model_config = ConfigDict(strict=True, extra="allow")

    vocab_size: int | None = None
    teacher_params: int | None = None


class _Results(_Part):
    set_up: _SetUp
    settings: dict[str, _Setting]


def _read(path: Path, kind: type[R]) -> R:
    try:
        return kind.model_validate(read_json(path))
    except (OSError, DataError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise CorruptError(f"{path} is no result of the evidence ({problem}); install kdata again") from error


def read_results(path: Path = RESULTS) -> tuple[dict[str, Any], list[Measured]]:
    """What all runs share, and the settings that were compared with full distillation. Raises CorruptError."""
    results = _read(path, _Results)
    measured = [
        Measured(
            name,
            _of_kind(setting.content.keep),
            setting.content.tail,
            setting.content.objective,
            None if setting.bytes_per_token is None else setting.bytes_per_token.mean,
            Estimate(**setting.nll_against_online.model_dump()),
        )
        for name, setting in results.settings.items()
        if setting.nll_against_online is not None
    ]
    return results.set_up.model_dump(exclude_unset=True), measured


class _Source(_Part):
    size: str
    source: str


class _Sized(_Part):
    content: _Source
    params: _Mean
    teacher_params: _Mean | None = None
    nll: _Gap
    nll_against_text_alone: _Gap | None
    nll_against_teacher: _Gap | None


class _Capacity(_Part):
    settings: dict[str, _Sized]


def sizes_of(path: Path = CAPACITY) -> list[dict[str, Any]]:
    """The sizes of students that were compared with nothing else changed, smallest first. Raises CorruptError.

    Returns:
        Of each: "params", "nll" of the student of the teacher, "against_text_alone", and "smaller_teacher", the NLL of the
        student of a smaller teacher against that of the teacher: mean, half_width of the 95 % interval (null: one run) and
        count of runs; the two differences are relative, in pairs of the same seed. "teachers": parameters of both teachers.
    """
    settings = _read(path, _Capacity).settings.values()
    by_size: dict[str, dict[str, _Sized]] = defaultdict(dict)
    for one in settings:
        by_size[one.content.size][one.content.source] = one
    sizes = []
    for found in by_size.values():
        if (own := found.get("teacher")) is None:
            continue
        smaller = found.get("reference")
        gaps = {
            "nll": own.nll,
            "against_text_alone": own.nll_against_text_alone,
            "smaller_teacher": None if smaller is None else smaller.nll_against_teacher,
        }
        teachers = [
            None if one is None or one.teacher_params is None else one.teacher_params.mean for one in (own, smaller)
        ]
        estimates = {name: None if gap is None else gap.model_dump() for name, gap in gaps.items()}
        sizes.append({"params": round(own.params.mean), "teachers": teachers, **estimates})
    return sorted(sizes, key=lambda size: size["params"])


def advise(
    dataset: kdata.Dataset, plan: Plan | None = None, *, results: Path = RESULTS, capacity: Path = CAPACITY
) -> dict[str, Any]:
    """Recommend what to keep and which objective, for a dataset or for what a plan takes of it.

    Args:
        results: results.json of the runs.
        capacity: that of the runs of sizes.
    Returns:
        JSON values. "data": what it is about. "evidence": `set_up` and number of settings and runs. "keep": the setting with
        the fewest bytes whose interval overlaps with that of the closest to full distillation. "closest": that one. "own":
        the dataset's own setting, null if it was not measured. "alike": measured settings of its kind. "text_alone":
        cross-entropy without a teacher. "sizes": see `sizes_of`. "objective": the comparisons of objectives, each with
        "on" (what was kept), "of_this_kind", "best", "others". "no_evidence": sentences about what no run was made for. Null
        where nothing was measured. Settings have name, keep, objective, bytes_per_token and nll_against_online (mean,
        half_width of the 95 % interval or null, count of runs).
    Raises:
        CorruptError: the results are damaged.
        MismatchError: the plan is not of this dataset as it is.
    """
    set_up, measured = read_results(results)
    own_keep = _keep_of(dataset)
    plain = [m for m in measured if m.is_plain]
    closest = min(plain, key=lambda m: m.gap.mean, default=None)
    near = [] if closest is None else [m for m in plain if m.low <= closest.high and closest.low <= m.high]
    chosen = min(near, key=lambda m: (m.bytes_per_token, m.gap.mean), default=None)
    alike = [m for m in plain if m.keep is not None and m.keep["kind"] == dataset.info.codec.kind]
    own = next((m for m in alike if m.keep == own_keep), None)
    alone = next((m for m in measured if m.keep is None and m.objective == "cross_entropy"), None)
    return {
        "data": _data(dataset, plan, own_keep),
        "evidence": {"set_up": set_up, "settings": len(measured), "runs": sum(m.gap.count for m in measured)},
        "keep": None if chosen is None else chosen.facts(),
        "closest": None if closest is None else closest.facts(),
        "own": None if own is None else own.facts(),
        "alike": [m.facts() for m in alike],
        "text_alone": None if alone is None else alone.facts(),
        "sizes": sizes_of(capacity),
        "objective": _objectives(measured, dataset.info.codec.kind),
        "no_evidence": _lacking(dataset, plan, set_up, own is not None, alike),
    }


def _of_kind(keep: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of `KeepConfig` out of recorded ones, without those that no figure depends on."""
    if keep is None:
        return None
    own = {"num_draws" if name == "draws" else name: v for name, v in keep.items() if name not in NOT_OF_THE_KIND}
    if "num_draws" in own:
        own.setdefault("draw_method", "independent")
    return own


def _keep_of(dataset: kdata.Dataset) -> dict[str, Any] | None:
    """What a dataset keeps, as the evidence writes it; None if no single capture could have kept that."""
    codec = dataset.info.codec
    if codec.id != "packed" or codec.kind not in ("topk", "adaptive", "sampled", "hybrid", "threshold"):
        return None
    return _of_kind({"kind": codec.kind, **KeepConfig.of(codec).settings()})


def _data(dataset: kdata.Dataset, plan: Plan | None, keep: dict[str, Any] | None) -> dict[str, Any]:
    rows, tokens = dataset.num_rows, dataset.num_tokens
    if plan is not None:
        chosen, _ = plan.choice(dataset)
        rows, tokens = len(chosen), int(dataset.index(["num_tokens"])["num_tokens"].to_numpy()[chosen].sum())
    about = dataset.info
    keep = {"kind": about.codec.kind} if keep is None else keep
    return {"keep": keep, "tail": about.tail, "vocab_size": about.vocab_size, "rows": rows, "tokens": tokens}


def _objectives(measured: list[Measured], kind: str) -> list[dict[str, Any]]:
    """Every kind of keeping on which objectives were compared, this kind first: the best, and the others by their gap."""
    by_keep: dict[str, list[Measured]] = defaultdict(list)
    for one in measured:
        if one.keep is not None and one.tail == "auto":
            by_keep[json.dumps(one.keep, sort_keys=True)].append(one)
    groups = [sorted(group, key=lambda m: m.gap.mean) for group in by_keep.values() if len(group) > 1]
    groups.sort(key=lambda group: _kind(group[0]) != kind)
    return [
        {
            "on": group[0].keep,
            "of_this_kind": _kind(group[0]) == kind,
            "best": group[0].facts(),
            "others": [m.facts() for m in group[1:]],
        }
        for group in groups
    ]


def _kind(one: Measured) -> Any:
    return None if one.keep is None else one.keep["kind"]


def _lacking(
    dataset: kdata.Dataset, plan: Plan | None, set_up: dict[str, Any], has_own: bool, alike: list[Measured]
) -> list[str]:
    """What no run was made for."""
    about, lacking = dataset.info, []
    known = set_up.get("vocab_size")
    if about.vocab_size != known:
        of_the_runs = "an unknown number" if known is None else f"{known:,}"
        lacking.append(f"a vocabulary of {about.vocab_size:,} ids: all runs had {of_the_runs}")
    if about.tail == "absent":
        lacking.append("imported rows without the tail and the actual tokens' log-probabilities")
    if not alike:
        lacking.append(f"what this dataset keeps: no run was of kind {about.codec.kind}")
    elif not has_own:
        names = "; ".join(m.name for m in alike)
        lacking.append(f"what this dataset keeps: the runs of kind {about.codec.kind} are {names}")
    if about.codec.keeps_some_positions or (plan is not None and plan.info.positions is not None):
        lacking.append("some positions only: in these runs every target counts")
    if about.codec.parameters.get("temperatures"):
        lacking.append("temperatures other than 1")
    lacking.append("sizes of students and teachers other than those, larger ones above all")
    lacking.append(
        "other teachers, students from random weights (but for the sizes), and longer training than the runs'"
    )
    return lacking
