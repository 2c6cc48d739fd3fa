"""Rules that choose positions: which tokens of the chosen rows count in training.

To add a rule:

1. Choose the base class: `ShareRule` gives every target position a number and chooses the share with the largest (or, with
   LOWEST, the smallest); `PositionRule` is for anything else.
2. Write a subclass with its settings as pydantic fields and `rule: Literal["NAME"] = "NAME"`, its source in the docstring.
3. Implement `numbers()` of `ShareRule`, or `marker()` of `PositionRule`.
4. Add a line to RULES below, and run `python -m tests.schemas.tables`, which writes the recipe's JSON Schema.
5. Test it on numbers worked out by hand in tests/kdata/selection/test_position_rules.py, and name it in kdata/README.md.

`kdata.selection.choose_positions` reads the dataset and writes what a rule chooses.

Shapes: S rows of a piece, T tokens of a piece, C candidates among them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from kdata.config import Strict
from kdata.errors import ConfigError, DataError, TeacherError
from kdata.format.keep_rules import MAX_PATTERN, checked_pattern
from kdata.format.positions import ChosenPositions, position_problem
from kdata.format.sequences import Sequences
from kdata.selection.apportion import as_written
from kdata.store.dataset import Dataset
from kdata.store.queryable import NAME
from kdata.store.sql import check_recordable, mentions
from kdata.store.token_columns import TokenColumns, has_entries
from kdata.store.token_scores import TokenScore
from kdata.store.token_views import named_scores


class TokenReader(Protocol):
    """A model that says how likely it finds the tokens of a text; `kdata.jobs.selecting` opens one."""

    @property
    def recorded(self) -> dict[str, Any]:
        """What a plan records of the model."""
        ...

    def logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of each token of some sequences (token ids int32 [T] each), float32 [T], nats; the first is NaN."""
        ...


@dataclass(frozen=True)
class Piece:
    """The rows of one record batch, and which of their tokens may be chosen.

    wanted_S: bool [S], the chosen rows. candidate_C: int64 [C], rising indices of tokens: targets of the chosen rows, and of
    the parent plan's positions where it has any. parent_weights_C: float32 [C], those of the parent plan, or None. index_of:
    reads columns of the index of a shard. reader: the model of the rule `gap`, None for other rules. scores: those of which
    the rule needs the number of each token, by name.
    """

    dataset: Dataset
    read: TokenColumns
    wanted_S: np.ndarray
    candidate_C: np.ndarray
    parent_weights_C: np.ndarray | None
    index_of: Callable[[int, tuple[str, ...]], pa.Table]
    reader: TokenReader | None = None
    scores: Mapping[str, TokenScore] = field(default_factory=dict)

    @cached_property
    def row_C(self) -> np.ndarray:
        """Row of each candidate, int64 [C], from 0 in this piece."""
        rows: np.ndarray = np.searchsorted(self.read.offsets, self.candidate_C, side="right") - 1
        return rows

    @cached_property
    def position_C(self) -> np.ndarray:
        """Position of each candidate in its row, int64 [C]."""
        positions: np.ndarray = self.candidate_C - self.read.offsets[self.row_C]
        return positions

    @property
    def rows(self) -> np.ndarray:
        """Global rows of the piece, int64 [S]."""
        return np.arange(self.read.first_row, self.read.first_row + len(self.read.offsets) - 1)

    def index(self, *columns: str) -> pa.Table:
        """Columns of the index, a line for each row of the piece."""
        table = self.index_of(self.read.shard, columns)
        return table.slice(self.read.first_row - int(self.dataset.shard_starts[self.read.shard]), len(self.rows))

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the rows."""
        ids: list[str] = self.index("id")["id"].to_pylist()
        return ids

    def nll(self, score: str) -> np.ndarray:
        """NLL of each candidate by one of the scores, float32 [C], nats."""
        first = self.read.first_row - int(self.dataset.shard_starts[self.read.shard])
        rows = np.arange(first, first + len(self.rows))
        nll_T = self.scores[score].nll(self.read.shard, rows, np.diff(self.read.offsets))
        nll_C: np.ndarray = nll_T[self.candidate_C]
        return nll_C

    def sequences(self) -> Sequences:
        """The rows with their kept entries, decoded."""
        return self.dataset.decode([self.dataset.record_batch(self.read.shard, self.read.batch)])


# What a rule chooses of a piece: bool [C], and the weights of the candidates, float32 [C], or None.
Marker = Callable[[Piece], tuple[np.ndarray, np.ndarray | None]]


class PositionRule(Strict):
    """Settings that every rule has. `rule` is its key in RULES."""

    COLUMNS: ClassVar[tuple[str, ...]] = ()  # of the payload that it reads, beside target_mask

    rule: str

    @abstractmethod
    def marker(self, dataset: Dataset) -> Marker:
        """Check the dataset, and return what chooses the candidates of a piece.

        Raises:
            DataError, ConfigError, MissingError: the rule does not fit the dataset.
        """

    @property
    def query(self) -> str | None:
        """The query that chooses, for the plan to record; None: no query does."""
        return None

    def token_scores(self) -> list[str]:
        """Names of the scores of which the rule reads the number of each token."""
        return []

    def named_scores(self) -> list[str]:
        """The same, and those that a query names, whose case does not count."""
        return self.token_scores()

    def mentions(self, dataset: Dataset) -> dict[str, list[str]]:
        """Names of the `scores` and `plans` that the rule reads."""
        return {"scores": self.token_scores(), "plans": []}

    def recorded(self) -> dict[str, Any]:
        """The settings that a plan records."""
        return self.model_dump(exclude={"rule"})


class ShareRule(PositionRule):
    """A rule that chooses a share of the candidates: those with the largest number, or with LOWEST the smallest."""

    LOWEST: ClassVar[bool] = False
    MEANS_SOMETHING: ClassVar[bool] = True  # whether a reader learns something from the number at which the choice ends

    share: float = Field(
        gt=0,
        le=1,
        examples=[0.2],
        description="Share of the target positions to choose; the number of them is rounded up.",
    )
    per: Literal["dataset", "row"] = Field(
        "dataset",
        description="dataset: the share of all positions of the chosen rows, each row counted once. row: of each row alone.",
    )

    @abstractmethod
    def numbers(self, piece: Piece) -> np.ndarray:
        """A number for each candidate of a piece, float32 or uint32 [C]; NaN where it is not known."""

    def keys(self, piece: Piece) -> np.ndarray:
        """The same as uint32 [C] that rise with the preference. Raises DataError where a number is not known."""
        numbers_C = self.numbers(piece)
        if numbers_C.dtype == np.uint32:
            return numbers_C
        unknown_C = np.flatnonzero(np.isnan(numbers_C))
        if len(unknown_C):
            row_id, position = piece.ids[piece.row_C[unknown_C[0]]], piece.position_C[unknown_C[0]]
            raise DataError(
                f"the rule {self.rule!r} needs a number that is not known at position {position} of row {row_id!r}; "
                "imported data often lacks it. Use another rule, or choose rows that have it (--parent PLAN)"
            )
        keys_C = rising_keys(numbers_C)
        return ~keys_C if self.LOWEST else keys_C

    def number_of(self, key: int) -> float | None:
        """The number that a key stands for; None where it means nothing to a reader."""
        if not self.MEANS_SOMETHING:
            return None
        bits = np.array([key], np.uint32)
        bits = ~bits if self.LOWEST else bits
        bits = np.where(bits >> 31, bits ^ np.uint32(1 << 31), ~bits).astype(np.uint32)
        return float(bits.view(np.float32)[0])

    def marker(self, dataset: Dataset) -> Marker:
        """See `PositionRule.marker`: the share of each row of a piece."""

        def mark(piece: Piece) -> tuple[np.ndarray, None]:
            return highest_of_rows(self.keys(piece), piece.row_C, piece.position_C, len(piece.rows), self.share), None

        return mark


class Entropy(ShareRule):
    """The positions at which the teacher is least sure: the highest entropy of its whole distribution.

    Source: "high-entropy minority tokens", Wang et al., arXiv 2506.01939, who train on a fifth of the positions. They use the
    entropy of the model in training; here it is the stored entropy of the teacher.
    """

    COLUMNS = ("entropy",)

    rule: Literal["entropy"] = "entropy"

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`."""
        entropy_C: np.ndarray = piece.read.values["entropy"].astype(np.float32)[piece.candidate_C]
        return entropy_C


class Surprise(ShareRule):
    """The tokens that the teacher found least likely: the lowest log-probability.

    Source: selection by loss, Loshchilov and Hutter, arXiv 1511.06343, of tokens instead of examples, by the teacher's loss.
    Text with errors in it is surprising too.
    """

    COLUMNS, LOWEST = ("logprob",), True

    rule: Literal["surprise"] = "surprise"

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`."""
        logprob_C: np.ndarray = piece.read.values["logprob"].astype(np.float32)[piece.candidate_C]
        return logprob_C


class RandomPositions(ShareRule):
    """A random share: what every other rule is compared with.

    The number follows from the seed, the id of the row and the position alone (the first 8 bytes of the MD5 of "SEED:ID" as a
    little-endian integer, plus the position, mixed as in SplitMix64). So it is the same on every machine and in any order of
    shards, and with the same seed a larger share contains the smaller one.
    """

    MEANS_SOMETHING = False

    rule: Literal["random"] = "random"
    seed: int = Field(0, ge=0, description="Seed.")

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`."""
        return random_numbers(self.seed, piece.ids, piece.row_C, piece.position_C)


class Margin(ShareRule):
    """The positions at which the teacher's first two choices are closest: the smallest p1 - p2 of the exact entries.

    Source: margin sampling, Scheffer et al. (Active hidden Markov models for information extraction, 2001). Where one exact
    entry is kept, the second is at most the rest of the probability (and of kind threshold at most the threshold), and the
    margin is the smallest that it can be.
    """

    LOWEST = True

    rule: Literal["margin"] = "margin"

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`. NaN where no exact entry is kept."""
        seqs, candidate_C = piece.sequences(), piece.candidate_C
        num_exact_C, first_C = seqs.num_exact[candidate_C], seqs.entry_offsets[candidate_C]
        if not len(seqs.entry_logprobs):
            return np.full(len(candidate_C), np.nan, np.float32)
        last = len(seqs.entry_logprobs) - 1
        one_C, two_C = (np.exp(seqs.entry_logprobs[np.minimum(first_C + place, last)]) for place in (0, 1))
        most = np.float32(piece.dataset.info.codec.parameters.get("threshold", 1.0))
        rest_C = np.minimum(np.minimum(np.exp(seqs.log_tail[candidate_C]), one_C), most)
        margin_C = one_C - np.where(num_exact_C > 1, two_C, rest_C)
        return np.where(num_exact_C > 0, margin_C, np.nan).astype(np.float32)


class Gap(ShareRule):
    """The tokens at which a model, usually the student before training, is furthest behind the teacher.

    The number is the model's NLL of the token minus the teacher's, as of the rule `excess`, which takes it from a score. This
    rule reads the text with the model and stores nothing of it.
    """

    COLUMNS = ("logprob", "input_ids")

    rule: Literal["gap"] = "gap"
    model: str = Field(description="Folder of the model, GGUF file or Hub name; it must have the teacher's tokenizer.")
    revision: str | None = Field(None, description="Commit, tag or branch on the Hub; null: the default branch.")
    backend: Literal["vllm", "transformers"] = Field("transformers", description="What runs the model.")

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`. Raises TeacherError where the model's log-probability is not finite."""
        assert piece.reader is not None  # `kdata.selection.select.select` refuses the rule without one
        offsets, ids = piece.read.offsets, piece.read.values["input_ids"]
        rows = np.unique(piece.row_C).tolist()
        logprob_T = np.full(len(ids), np.nan, np.float32)
        if rows:
            sequences = [ids[offsets[row] : offsets[row + 1]] for row in rows]
            for row, own in zip(rows, piece.reader.logprobs(sequences), strict=True):
                logprob_T[offsets[row] : offsets[row + 1]] = own
        bad_C = np.flatnonzero(~np.isfinite(logprob_T[piece.candidate_C]))
        if len(bad_C):
            raise TeacherError(
                f"{self.model} gives position {piece.position_C[bad_C[0]]} of row {piece.ids[piece.row_C[bad_C[0]]]!r} a "
                "log-probability that is not finite; are its weights sound?"
            )
        gap_C: np.ndarray = (piece.read.values["logprob"].astype(np.float32) - logprob_T)[piece.candidate_C]
        return gap_C


class Excess(ShareRule):
    """The tokens with the highest excess loss: a student's NLL minus that of a reference, or of the teacher.

    Both NLLs are scores of tokens (`kdata score --tokens`), so the text is read once, whatever the number of plans.

    Source: excess loss, L(token; model) - L(token; reference), of selective language modeling, Rho-1, arXiv 2404.07965. There
    the model is the one in training, and the share (60 to 70 %) is of each batch. Here the numbers are of one state of the
    student, usually that before training, and the share is of all chosen rows, or of each row (`per`).
    """

    COLUMNS = ("logprob",)

    rule: Literal["excess"] = "excess"
    score: str = Field(
        pattern=NAME.pattern, examples=["student"], description="Score with the student's NLL of each token."
    )
    reference: str | None = Field(
        None, pattern=NAME.pattern, description="Score with the reference's NLL of each token; null: the teacher's NLL."
    )

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.score == self.reference:
            raise ValueError(f"score and reference are both {self.score!r}, so no token has an excess; name two scores")
        return self

    def token_scores(self) -> list[str]:
        """See `PositionRule.token_scores`."""
        return [name for name in dict.fromkeys((self.score, self.reference)) if name is not None]

    def numbers(self, piece: Piece) -> np.ndarray:
        """See `ShareRule.numbers`."""
        if self.reference is None:
            reference_C = -piece.read.values["logprob"].astype(np.float32)[piece.candidate_C]
        else:
            reference_C = piece.nll(self.reference)
        excess_C: np.ndarray = piece.nll(self.score) - reference_C
        return excess_C


class Span(PositionRule):
    """The tokens between two markers in the text, for instance <think> and </think>; the markers themselves do not count.

    A token counts where one of its bytes lies between them. The patterns are RE2's: time grows with the text and no faster.
    A begin without an end counts nothing; with the end `</think>|\\\\z` it counts to the end of the text.
    """

    COLUMNS = ("token_bytes",)

    rule: Literal["span"] = "span"
    begin: str = Field(
        min_length=1, max_length=MAX_PATTERN, description="Regular expression (RE2) of the marker before a span."
    )
    end: str = Field(min_length=1, max_length=MAX_PATTERN, description="The same of the marker behind it.")

    @field_validator("begin", "end")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return checked_pattern(pattern)

    def marker(self, dataset: Dataset) -> Marker:
        """See `PositionRule.marker`."""

        def mark(piece: Piece) -> tuple[np.ndarray, None]:
            row_C = piece.row_C
            texts = piece.index("text")["text"]
            unknown = ~piece.read.known["token_bytes"] | texts.is_null().to_numpy(zero_copy_only=False)
            bad = np.intersect1d(np.flatnonzero(unknown), row_C)
            if len(bad):
                raise DataError(
                    f"row {piece.ids[bad[0]]!r} lacks its text or the bytes of its tokens, so spans of the text cannot be "
                    "found in its tokens; use another rule, or choose rows that have them (--parent PLAN)"
                )
            inside_T = np.zeros(int(piece.read.offsets[-1]), bool)
            starts = np.cumsum(np.concatenate([[0], np.where(unknown, 0, np.diff(piece.read.offsets))]))
            for row in np.unique(row_C).tolist():
                num_bytes = piece.read.values["token_bytes"][starts[row] : starts[row + 1]]
                covered = tokens_in_spans(texts[row].as_py(), num_bytes, self.begin, self.end)
                inside_T[piece.read.offsets[row] : piece.read.offsets[row + 1]] = covered
            return inside_T[piece.candidate_C], None

        return mark


class SqlPositions(PositionRule):
    """The positions that a query returns as `id` and `position`, perhaps with `weight`.

    Those of rows that the step does not choose are left out.
    """

    rule: Literal["sql"] = "sql"
    sql: str = Field(
        min_length=1,
        description="Query that returns columns `id` and `position`, and optionally `weight`, a number above 0.",
    )

    @property
    def query(self) -> str | None:
        """See `PositionRule.query`."""
        return self.sql.strip()

    def named_scores(self) -> list[str]:
        """See `PositionRule.named_scores`: those whose column the query names, in any case."""
        return named_scores(self.sql)

    def mentions(self, dataset: Dataset) -> dict[str, list[str]]:
        """See `PositionRule.mentions`."""
        return mentions(dataset, self.sql)

    def recorded(self) -> dict[str, Any]:
        """See `PositionRule.recorded`."""
        return {}

    def marker(self, dataset: Dataset) -> Marker:
        """See `PositionRule.marker`."""
        answer = self._answer(dataset)

        def mark(piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
            here = np.isin(piece.rows, answer.rows) & piece.wanted_S
            rows, offsets = piece.rows[here], piece.read.offsets[:-1][here]
            token_N, weights_N = answer.tokens(rows, np.append(offsets, 0))
            masked_N = token_N[~piece.read.values["target_mask"][token_N]]
            if len(masked_N):
                row = int(np.searchsorted(piece.read.offsets, masked_N[0], side="right")) - 1
                raise DataError(
                    f"the query of positions returns position {masked_N[0] - piece.read.offsets[row]} of row "
                    f"{piece.ids[row]!r}, which is no target; leave it out of the query"
                )
            if piece.dataset.info.codec.keeps_some_positions:
                bare_N = token_N[~has_entries(piece.read)[token_N]]
                if len(bare_N):
                    row = int(np.searchsorted(piece.read.offsets, bare_N[0], side="right")) - 1
                    raise DataError(
                        f"the query of positions returns position {bare_N[0] - piece.read.offsets[row]} of row "
                        f"{piece.ids[row]!r}, at which the dataset keeps no distribution; add `num_exact + num_drawn > 0`"
                    )
            weights_T = np.zeros(len(piece.read.values["target_mask"]), np.float32)
            weights_T[token_N] = 1 if weights_N is None else weights_N
            weights_C = weights_T[piece.candidate_C]
            return weights_C > 0, None if weights_N is None else weights_C

        return mark

    def _answer(self, dataset: Dataset) -> ChosenPositions:
        """What the query returns, checked. Raises DataError and ConfigError, which say what is wrong with it."""
        check_recordable(self.sql)
        query = self.sql.strip().rstrip(";")
        types = {field.name.lower(): field.type for field in dataset.sql(f"select * from (\n{query}\n) limit 0").schema}
        if types.get("id") not in (pa.string(), pa.large_string()) or not _is_whole(types.get("position")):
            shown = ", ".join(f"{name} {kind}" for name, kind in types.items())
            raise ConfigError(
                f"the query of positions returns {shown}; it must return `id` as text and `position` as a whole number"
            )
        weighted = "weight" in types
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
        if weighted and not any(is_kind(types["weight"]) for is_kind in kinds):
            raise ConfigError(
                f"the column `weight` of the query of positions is {types['weight']}; write ::double behind it"
            )
        weights = ", list(weight::double order by position) as weights" if weighted else ""
        table = dataset.sql(
            f"select id as id, list(position::bigint order by position) as positions{weights} from (\n{query}\n) "
            "group by id order by id"
        )
        if not table.num_rows:
            raise DataError("the query of positions returns no row; loosen its condition")
        if table["id"].null_count:
            raise DataError("the query of positions returns an id that is null; leave it out of the query")
        ids = table["id"].to_pylist()
        rows = dataset.rows_of(ids)
        offsets, lists = _lists(table, "positions", ids)
        with np.errstate(over="ignore"):  # what is infinite is refused below
            numbers = _lists(table, "weights", ids)[1].astype(np.float32) if weighted else None
        num_tokens = dataset.index(["num_tokens"])["num_tokens"].to_numpy()[rows]
        problem = position_problem(offsets, lists, num_tokens, numbers)
        if problem is not None:
            raise DataError(f"the query of positions, row {ids[problem[0]]!r}: {problem[1]}")
        return ChosenPositions.of(rows, offsets, lists.astype(np.int32), numbers)


RULES: dict[str, type[PositionRule]] = {
    "entropy": Entropy,
    "surprise": Surprise,
    "random": RandomPositions,
    "margin": Margin,
    "gap": Gap,
    "excess": Excess,
    "span": Span,
    "sql": SqlPositions,
}


def rule_words(rule: str) -> str | None:
    """Which positions a rule chooses, for a person: the first sentence of its class; None for rules of other programs."""
    words = inspect.getdoc(RULES[rule]) if rule in RULES else None
    return None if words is None else words.partition("\n")[0].rstrip(".")


if TYPE_CHECKING:
    PositionsConfig = PositionRule
else:  # for pydantic: the settings of any rule, told apart by `rule`
    PositionsConfig = Annotated[Union[tuple(RULES.values())], Field(discriminator="rule")]  # noqa: UP007


def rising_keys(numbers: np.ndarray) -> np.ndarray:
    """float32 as uint32 in the same order; -0 and 0 are equal."""
    bits = (numbers + np.float32(0)).astype(np.float32, copy=False).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).astype(np.uint32)


def number_to_choose(share: float, count: int) -> int:
    """How many of `count` a share is, rounded up, in exact arithmetic."""
    return math.ceil(as_written(share) * count)


def highest_of_rows(
    keys_C: np.ndarray, row_C: np.ndarray, position_C: np.ndarray, num_rows: int, share: float
) -> np.ndarray:
    """The share of each row's candidates that has the largest keys (uint32 [C]), bool [C].

    Its number is rounded up; of equal keys the first positions are taken. row_C, position_C: int64 [C].
    """
    order = np.lexsort((position_C, ~keys_C, row_C))
    counts = np.bincount(row_C, minlength=num_rows)
    place_C = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen_C = np.zeros(len(order), bool)
    chosen_C[order] = place_C < np.array([number_to_choose(share, n) for n in counts.tolist()])[row_C]
    return chosen_C


def random_numbers(seed: int, ids: Sequence[str], row_C: np.ndarray, position_C: np.ndarray) -> np.ndarray:
    """Numbers of C positions, uint32 [C], that follow from seed, id of the row and position; see `RandomPositions`.

    Args:
        ids: of the rows. row_C: int64 [C], which of them each position is in. position_C: int64 [C].
    """
    digests = [hashlib.md5(f"{seed}:{row_id}".encode(), usedforsecurity=False).digest() for row_id in ids]
    start_S = np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z_C = start_S[row_C] + position_C.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z_C = (z_C ^ (z_C >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_C = (z_C ^ (z_C >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    upper_C: np.ndarray = ((z_C ^ (z_C >> np.uint64(31))) >> np.uint64(32)).astype(np.uint32)
    return upper_C


def tokens_in_spans(text: str, token_bytes: np.ndarray, begin: str, end: str) -> np.ndarray:
    """The tokens of which a byte lies between two markers of the text, bool [T]; see `Span`.

    Args:
        token_bytes: uint16 [T], bytes of the text that each token stands for.
        begin, end: patterns of the markers (RE2).
    """
    num_bytes = token_bytes.astype(np.int64)
    ends = np.cumsum(num_bytes)
    inside_T = np.zeros(len(ends), bool)
    for first, last in spans_of(text.encode(), f"(?s)(?P<whole>(?:{begin})(?P<span>.*?)(?:{end}))"):
        inside_T |= (ends - num_bytes < last) & (ends > first) & (num_bytes > 0)
    return inside_T


def spans_of(text: bytes, pattern: str) -> list[tuple[int, int]]:
    """Byte offsets (begin, end) of the group `span` in each match of a pattern, one behind the other.

    Behind the first match, the text begins one character before the place to search from: so `^`, `\\A` and `\\b` mean what
    they mean in the whole text.
    """
    behind = rf"(?s)\A.(?P<skip>.*?){pattern}"
    spans, start = [], 0
    while start < len(text):
        first = start and _character_before(text, start)
        part = pa.array([text[first:].decode()], pa.large_string())
        [match] = pc.extract_regex_span(part, behind if start else pattern).to_pylist()
        if match is None:
            break
        begin, length = match["span"]
        spans.append((first + begin, first + begin + length))
        start = first + sum(match["whole"])
        if not match["whole"][1]:  # markers that match nothing: on to the next character
            start += 1
            while start < len(text) and text[start] & 0xC0 == 0x80:
                start += 1
    return spans


def _character_before(text: bytes, place: int) -> int:
    """Where the character before a place in UTF-8 text begins."""
    place -= 1
    while text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _is_whole(kind: pa.DataType | None) -> bool:
    return kind is not None and pa.types.is_integer(kind)


def _lists(table: pa.Table, name: str, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets int64 [R+1] and values of a list column. Raises DataError where a value is null."""
    column = table[name].combine_chunks()
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    values = column.flatten()
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise DataError(
            f"the query of positions returns {name[:-1]} null for row {ids[row]!r}; leave it out of the query"
        )
    return offsets, values.to_numpy()
