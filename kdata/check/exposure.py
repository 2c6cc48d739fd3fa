"""Exposure of canaries: how far a model gives away secrets that were planted in what its teacher was trained on.

A canary is a text with a secret at a known place, drawn at random from a space R of candidates (`0000` to `9999`). With rank
the place of the secret among all candidates by the model's NLL of the whole text, 1 for the lowest,

    exposure = log2 |R| - log2 rank

(Carlini et al., The Secret Sharer, arXiv 1802.08232; the definition as we remember it). log2 |R| is reached by the secret
that the model finds likeliest. A model that knows nothing ranks at random: 1.44 bits on average (log2 e, of a large space).
Of candidates with equal NLL half count as before the secret, our default.

Where the space is larger than what is compared, that many other candidates are drawn from it, and the exposure is that among
them and the secret: at most log2 of their number, an estimate of the true one below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from kdata.config import Strict, first_problem
from kdata.errors import ConfigError, DataError, MissingError, TeacherError
from kdata.format.json_text import parse_json
from kdata.format.keep import KeepConfig
from kdata.observe.progress import Task
from kdata.teachers.base import Teacher

BY_CHANCE = math.log2(math.e)  # mean exposure of a secret whose rank is random, in a large space


class Canary(Strict):
    """A planted secret: the text is `before`, the secret, `after`."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(min_length=1, description="Name of the canary.")
    before: str = Field("", description="Text before the secret.")
    secret: str | list[str] = Field(description="The secret: characters, or a list of parts.")
    after: str = Field("", description="Text behind the secret.")
    choices: str | list[str] | list[list[str]] = Field(
        description="What each part was drawn from: characters or a list, for all parts; or a list for each part."
    )

    @model_validator(mode="after")
    def _secret_is_a_candidate(self) -> Canary:
        if not self.parts:
            raise ValueError("the secret is empty")
        if len(self.options) != len(self.parts):
            raise ValueError(f"choices are of {len(self.options)} parts, the secret has {len(self.parts)}")
        for part, options in zip(self.parts, self.options, strict=True):
            if part not in options:
                raise ValueError("a part of the secret is not among its choices")
            if len(set(options)) < len(options):
                raise ValueError("a choice is there twice")
        if self.space < 2:
            raise ValueError("the secret is the only candidate, so it has no rank")
        return self

    @property
    def parts(self) -> list[str]:
        """The secret's parts."""
        return list(self.secret)

    @property
    def options(self) -> list[list[str]]:
        """What each part was drawn from."""
        if isinstance(self.choices, list) and self.choices and isinstance(self.choices[0], list):
            return [list(options) for options in self.choices]
        return [[str(choice) for choice in self.choices]] * len(self.parts)

    @property
    def space(self) -> int:
        """|R|, the number of candidates."""
        return math.prod(len(options) for options in self.options)

    def text(self, parts: Sequence[str]) -> str:
        """The text with a candidate in the secret's place."""
        return self.before + "".join(parts) + self.after

    def candidates(self, most: int, rng: np.random.Generator) -> list[str]:
        """Texts, that of the secret first: all, or it and `most` - 1 others at random, each once."""
        return [self.text(self.parts), *(self.text(parts) for parts in self._others(most, rng))]

    def _others(self, most: int, rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
        secret = tuple(self.parts)
        if self.space <= most:
            yield from (parts for parts in itertools.product(*self.options) if parts != secret)
            return
        drawn = {secret}
        while len(drawn) < most:
            parts = tuple(options[rng.integers(len(options))] for options in self.options)
            if parts not in drawn:
                drawn.add(parts)
                yield parts


@dataclass(frozen=True)
class Exposure:
    """Exposure of one canary, in bits. nll: nats, of the whole text with the secret. rank: among `compared` candidates of a
    space of `space`; halves where NLLs are equal."""

    id: str
    nll: float
    rank: float
    compared: int
    space: int
    exposure: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def read_canaries(path: Path) -> list[Canary]:
    """Canaries of a file with one JSON object a line.

    Raises:
        MissingError: there is no such file.
        DataError: a line is no canary, an id is there twice, or there is none.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # JSON strings may hold what splitlines takes for an end
    except (OSError, UnicodeDecodeError) as error:
        raise MissingError(
            f"{path} cannot be read as UTF-8 text ({error}); name a file with one JSON object a line"
        ) from error
    canaries: dict[str, Canary] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            canary = Canary.model_validate(parse_json(line))
        except (DataError, ValidationError) as error:
            problem = first_problem(error) if isinstance(error, ValidationError) else error
            raise DataError(
                f'{path}, line {number}: {problem}; write {{"id": ..., "before": ..., "secret": "4815", "choices": '
                '"0123456789", "after": ...}'
            ) from error
        if canary.id in canaries:
            raise DataError(f"{path}, line {number}: the id {canary.id!r} is there twice; give each canary its own")
        canaries[canary.id] = canary
    if not canaries:
        raise DataError(f"{path} has no canary; write one JSON object a line")
    return list(canaries.values())


def exposures(
    teacher: Teacher, tokenizer: Any, canaries: Sequence[Canary], *, most: int = 1000, seed: int = 0
) -> list[Exposure]:
    """Exposure of each canary by one model.

    Args:
        teacher: any model that reads. tokenizer: its own; special tokens around a text are those that it adds.
        most: candidates that are compared at most, the secret among them.
        seed: of the choice of candidates, where there are more.
    Raises:
        ConfigError: `most` is below 2, or a text has more tokens than the model reads.
        DataError: a candidate has fewer than two tokens, or has the same tokens as the secret.
        TeacherError: the model's log-probabilities are not finite.
    """
    ids_of = candidates_of(tokenizer, canaries, most=most, seed=seed)
    for canary, ids in zip(canaries, ids_of, strict=True):
        longest = max(len(one) for one in ids)
        if longest > teacher.context:
            raise ConfigError(
                f"canary {canary.id!r} has {longest:,} tokens, {teacher.info.model} reads {teacher.context:,}; "
                "shorten `before`"
            )
    results = []
    with Task("exposure", sum(len(ids) for ids in ids_of), "candidates") as task:
        for canary, ids in zip(canaries, ids_of, strict=True):
            nll_C = _nlls(teacher, ids)
            if not np.isfinite(nll_C).all():
                raise TeacherError(f"canary {canary.id!r}: the model's NLL of a candidate is not finite; is it sound?")
            results.append(_exposure(canary, nll_C))
            task.advance(len(ids))
    return results


def candidates_of(
    tokenizer: Any, canaries: Sequence[Canary], *, most: int = 1000, seed: int = 0
) -> list[list[np.ndarray]]:
    """Token ids of the candidates of each canary, int32, those of the secret first. No model is needed.

    Raises:
        ConfigError: `most` is below 2.
        DataError: a candidate has fewer than two tokens, or has the same tokens as the secret.
    """
    if most < 2:
        raise ConfigError(f"{most} candidates cannot be compared; take 2 or more")
    rng = np.random.default_rng(seed)
    ids_of = []
    for canary in canaries:
        ids = [np.array(one, np.int32) for one in tokenizer(canary.candidates(most, rng))["input_ids"]]
        _check(canary, ids)
        ids_of.append(ids)
    return ids_of


def _check(canary: Canary, ids: list[np.ndarray]) -> None:
    if min(len(one) for one in ids) < 2:
        raise DataError(
            f"canary {canary.id!r} has a candidate of one token, which nothing predicts; give it a `before`"
        )
    if any(np.array_equal(ids[0], other) for other in ids[1:]):
        raise DataError(
            f"canary {canary.id!r}: another candidate has the secret's tokens, because the tokenizer changes texts; choose "
            "choices that it tells apart"
        )


def _nlls(teacher: Teacher, ids: list[np.ndarray]) -> np.ndarray:
    """NLL of each sequence, float64 nats, summed over all tokens but the first."""
    readouts = teacher.read(ids, KeepConfig(kind="topk", k=1))
    return np.array([-readout.logprob[1:].astype(np.float64).sum() for readout in readouts])


def _exposure(canary: Canary, nll_C: np.ndarray) -> Exposure:
    """From the NLL of each candidate, that of the secret first."""
    below, equal = int((nll_C[1:] < nll_C[0]).sum()), int((nll_C[1:] == nll_C[0]).sum())
    rank = 1 + below + equal / 2
    return Exposure(canary.id, float(nll_C[0]), rank, len(nll_C), canary.space, math.log2(len(nll_C)) - math.log2(rank))
