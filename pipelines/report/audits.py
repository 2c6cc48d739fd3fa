"""Audits of a run, as their commands wrote them into its folder: what the report says of each.

kdata audit RUN/dataset --format json > RUN/audit.json
kdata exposure MODEL ... --canaries FILE --format json > RUN/exposure.json
kdata hacking RUN/students/NAME RUN/heldout --save RUN/hacking.json
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from kdata.config import first_problem
from kdata.errors import CorruptError, DataError
from kdata.format.json_text import read_json


class _Part(BaseModel):
    """A part of an audit, as far as it is read."""

    model_config = ConfigDict(strict=True)


class _Leak(_Part):
    verdict: str
    reasons: list[str]
    positions: int


class _Exposed(_Part):
    model: str
    mean: FiniteFloat


class _Exposure(_Part):
    by_chance: FiniteFloat
    models: list[_Exposed] = Field(min_length=1)


class _Model(_Part):
    step: int


class _Course(_Part):
    """What `kdata hacking` found, as far as words need it."""

    label: str
    models: list[_Model] = Field(min_length=1)
    best_step: int
    golden_rise: FiniteFloat
    proxy_fall: FiniteFloat
    proxy_monotone: bool
    hacking: bool


def course_words(measured: dict[str, Any]) -> list[str]:
    """What the course of proxy and golden says."""
    rise, fall, best = measured["golden_rise"], measured["proxy_fall"], measured["best_step"]
    if rise <= 0:
        return ["no hacking: golden is least at the last model"]
    since = f"golden is least at step {best:,} and rises by {rise:.4f} to the end"
    if not measured["hacking"]:
        return [f"no hacking, but overfitting: {since}, and the proxy rises by {-fall:.4f}"]
    steadily = "at each model" if measured["proxy_monotone"] else "not at each model"
    return [f"teacher hacking: {since}, while the proxy falls by {fall:.4f}, {steadily}"]


def _leak(found: Any) -> list[str]:
    leak = _Leak.model_validate(found)
    return [f"{leak.verdict}, from {leak.positions:,} positions", *leak.reasons]


def _exposure(found: Any) -> list[str]:
    exposure = _Exposure.model_validate(found)
    known = [f"{one.model}: {one.mean:.2f} bits on average" for one in exposure.models]
    return [*known, f"a model that knows nothing: {exposure.by_chance:.2f}"]


def _course(found: Any) -> list[str]:
    course = _Course.model_validate(found)
    return [f"{course.label}: {words}" for words in course_words(course.model_dump())]


KINDS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "audit": ("Does what is kept reveal the teacher’s weights?", _leak),
    "exposure": ("How far do models give planted secrets away?", _exposure),
    "hacking": ("Does the student learn its teacher’s errors?", _course),
}


def audits_of(run: Path) -> dict[str, list[str]]:
    """Question and sentences of each audit in RUN/audit.json, RUN/exposure.json and RUN/hacking.json; empty without any.

    Raises:
        CorruptError: a file is not what its command writes.
    """
    found = {}
    for name, (question, words_of) in KINDS.items():
        path = run / f"{name}.json"
        if not path.exists():
            continue
        try:
            found[question] = words_of(read_json(path))
        except (DataError, ValidationError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise CorruptError(
                f"{path} is not what `kdata {name}` writes as JSON ({problem}); write it again, or remove it"
            ) from error
    return found
