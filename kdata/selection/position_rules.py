"""Rules that choose positions: which tokens of the chosen rows count in training.

To add a rule:

1. Choose the base class (`kdata.selection.position_base`): `ShareRule` gives every target position a number and chooses the
   share with the largest (or, with LOWEST, the smallest); `PositionRule` is for anything else.
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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from kdata.errors import ConfigError, DataError, TeacherError
from kdata.format.keep_rules import MAX_PATTERN, checked_pattern
from kdata.format.positions import ChosenPositions, position_problem
from kdata.selection.position_base import Marker, Piece, PositionRule, ShareRule
from kdata.selection.spans import tokens_in_spans
from kdata.store.dataset import Dataset
from kdata.store.queryable import NAME
from kdata.store.sql import check_recordable, mentions
from kdata.store.token_columns import has_entries
from kdata.store.token_views import named_scores


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
