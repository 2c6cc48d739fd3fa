"""Rules that choose at which target positions a distribution is kept. At every other target only its numbers are kept.

These are the settings; `kdata.jobs.kept_positions` applies them. What a rule chooses in a row depends on the rule and on that
row alone, so no order of work, restart or number of machines changes a byte.

To add a rule: write a subclass with `rule: Literal["NAME"] = "NAME"` and `words()`, add a line to KEEP_RULES, and one to the
functions in `kdata.jobs.kept_positions`. Run `python -m tests.schemas.tables`, and name the rule in kdata/README.md.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError, field_validator, model_validator

from kdata.config import Strict
from kdata.errors import ConfigError
from kdata.format.schema import CodecInfo

MAX_PATTERN = 1_000  # characters of a marker's pattern


def checked_pattern(pattern: str) -> str:
    """The pattern of a marker (RE2). Raises ValueError where it does not compile, or has a group with a name."""
    try:
        pc.count_substring_regex(pa.array([""]), pattern)  # by itself, so that it cannot close the group around it
        if pc.extract_regex_span(pa.array([""]), f"(?P<span>{pattern})").type.num_fields > 1:
            raise pa.ArrowInvalid("it has a group with a name")
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{error}; write a pattern of RE2 without groups that have names, and (?:...) for others"
        ) from error
    return pattern


class KeepRule(Strict):
    """What every rule has. `rule` is its key in KEEP_RULES."""

    NEEDS_ENTROPY: ClassVar[bool] = False  # whether the teacher has to see the full distribution

    rule: str
    domains: list[str] = Field(
        [],
        exclude_if=lambda domains: not domains,
        description="Domains of which every target position is kept; the rule applies in the others.",
    )

    @abstractmethod
    def words(self) -> str:
        """What the rule keeps, for a person."""

    def describe(self) -> str:
        """The same, with the domains that are kept whole."""
        whole = f"every target of {', '.join(self.domains)}; elsewhere " if self.domains else ""
        return whole + self.words()

    def check(self, vocab_size: int) -> None:
        """Raise ConfigError where the rule can keep nothing of a teacher with so many token ids."""


class KeepEntropy(KeepRule):
    """The positions at which the teacher is least sure, by the entropy of its whole distribution; see arXiv 2506.01939."""

    NEEDS_ENTROPY = True

    rule: Literal["entropy"] = "entropy"
    threshold: float | None = Field(
        None,
        gt=0,
        exclude_if=lambda threshold: threshold is None,
        description="Lowest entropy that is kept, in nats; null where `share` is given.",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        exclude_if=lambda share: share is None,
        description="Share of the target positions of each row that is kept, those of the highest entropy; the number of "
        "them is rounded up. null where `threshold` is given.",
    )

    @model_validator(mode="after")
    def _one(self) -> KeepEntropy:
        if (self.threshold is None) == (self.share is None):
            raise ValueError("set one of threshold (nats) and share (of each row)")
        return self

    def words(self) -> str:
        """See `KeepRule.words`."""
        if self.threshold is not None:
            return f"targets with an entropy of at least {self.threshold:g} nats"
        return f"the {self.share:g} of each row's targets with the highest entropy"

    def check(self, vocab_size: int) -> None:
        """See `KeepRule.check`."""
        most = math.log(vocab_size)
        if self.threshold is not None and self.threshold >= most:
            raise ConfigError(
                f"positions.threshold is {self.threshold:g} nats, and no distribution over {vocab_size:,} ids has an entropy "
                f"above {most:.2f}: nothing would be kept; lower it"
            )


class KeepRandom(KeepRule):
    """A random share of each row: what every other rule is compared with. It follows from the seed and the row's id."""

    rule: Literal["random"] = "random"
    share: float = Field(
        gt=0, le=1, description="Share of the target positions of each row; the number of them is rounded up."
    )
    seed: int = Field(0, ge=0, description="Seed.")

    def words(self) -> str:
        """See `KeepRule.words`."""
        return f"a random {self.share:g} of each row's targets (seed {self.seed})"


class KeepSpan(KeepRule):
    """The tokens between two markers in the text, as the rule `span` of `kdata select --positions` chooses them."""

    rule: Literal["span"] = "span"
    begin: str = Field(
        min_length=1, max_length=MAX_PATTERN, description="Regular expression (RE2) of the marker before a span."
    )
    end: str = Field(min_length=1, max_length=MAX_PATTERN, description="The same of the marker behind it.")

    @field_validator("begin", "end")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)

    def words(self) -> str:
        """See `KeepRule.words`."""
        return f"targets in the text between {self.begin!r} and {self.end!r}"


class KeepRole(KeepRule):
    """The messages of some roles in a chat; `targets` still says which tokens count."""

    rule: Literal["role"] = "role"
    roles: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1,
        description="Roles of messages, for instance assistant: its turns as `targets` has them. Of another role the message "
        "with what the template writes around it.",
    )

    def words(self) -> str:
        """See `KeepRule.words`."""
        return f"targets in messages of {', '.join(self.roles)}"


class KeepStored(KeepRule):
    """The positions that the dataset keeps whose rows are read again (`kdata reread`)."""

    rule: Literal["stored"] = "stored"
    of: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda rule: rule is None,
        description="The rule of that dataset. `kdata reread` sets it, so that rows of two rules are not taken for one.",
    )

    def words(self) -> str:
        """See `KeepRule.words`."""
        of = "" if self.of is None else f" ({described(self.of)})"
        return f"the targets that the dataset keeps whose rows were read again{of}"


class KeepAligned(KeepRule):
    """Not a setting: what `kdata retokenize` records of a dataset that it made for another tokenizer."""

    rule: Literal["aligned"] = "aligned"
    map: str = Field(description="How the teacher's ids became the student's.")
    inside: bool = Field(False, description="Whether entries are kept inside of the teacher's tokens too.")
    merge: str | None = Field(
        None,
        exclude_if=lambda merge: merge is None,
        description="Only of map matched: observed or bayesian, whose place in a chunk of equal bytes has the entries.",
    )
    matched: int | None = Field(
        None,
        exclude_if=lambda count: count is None,
        description="Only of map matched: number of the teacher's ids whose bytes are those of a token of the student.",
    )
    num_teacher: int | None = Field(
        None, exclude_if=lambda count: count is None, description="Only of map matched: number of the teacher's ids."
    )
    of: dict[str, Any] | None = Field(None, description="The rule of the dataset that it was made of; null: none.")

    def words(self) -> str:
        """See `KeepRule.words`."""
        of = "" if self.of is None else f", of {described(self.of)}"
        where = "end where a token of the teacher ends"
        if self.merge != "bayesian":
            where = "lie in one token of the teacher" if self.inside else "begin where a token of the teacher begins"
        return f"targets of another tokenizer that {where} (map {self.map}){of}"


# Maps of `KeepAligned` whose ids are no tokens of the dataset.
SORTED_MAPS = ("ranks", "matched")


def refuse_sorted(codec: CodecInfo, place: str, use: str) -> None:
    """Raise ConfigError where the ids of a dataset's entries are no tokens, so that what is asked for would be wrong.

    Args:
        use: what needs the tokens of entries, as the subject of a sentence.
    """
    if codec.token_map in SORTED_MAPS:
        raise ConfigError(
            f"{use} needs the tokens that the teacher believed in, and {place} has sorted probabilities (map "
            f"{codec.token_map}) for the objectives uld and gold; use the dataset that it was made of, or `kdata retokenize` "
            "that one with --map prefix"
        )


KEEP_RULES: dict[str, type[KeepRule]] = {
    "entropy": KeepEntropy,
    "random": KeepRandom,
    "span": KeepSpan,
    "role": KeepRole,
    "stored": KeepStored,
}

if TYPE_CHECKING:
    KeepPositions = KeepRule
else:  # for pydantic: the settings of any rule, told apart by `rule`
    KeepPositions = Annotated[Union[tuple(KEEP_RULES.values())], Field(discriminator="rule")]  # noqa: UP007


def described(parameters: dict[str, Any]) -> str:
    """The rule that a dataset records, for a person; of a rule that this kdata does not know, its settings."""
    known: dict[str, type[KeepRule]] = {**KEEP_RULES, "aligned": KeepAligned}
    kind = known.get(str(parameters.get("rule")))
    if kind is not None:
        with suppress(ValidationError):  # settings that a newer kdata has
            return kind.model_validate(parameters).describe()
    return ", ".join(f"{name} {value}" for name, value in parameters.items())
