"""One row of a dataset as a person reads it: text and tokens beside the teacher's numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from kdata.errors import OutOfRangeError
from kdata.format.json_text import parse_row
from kdata.format.sequences import Sequences
from kdata.store.tokens import TokenText


class RowSource(Protocol):
    """What a row needs of its dataset to show tokens."""

    @property
    def token_text(self) -> TokenText:
        """The dataset's tokenizer."""
        ...

    @property
    def entry_text(self) -> TokenText:
        """Ids of entries as text."""
        ...

    def token_bytes(self, row: int) -> np.ndarray | None:
        """Bytes of text per token, uint16 [T]; None where they are not stored."""
        ...


@dataclass(frozen=True)
class KeptTokens:
    """What the teacher thought likely at one position: K kept entries, exact ones first and by falling probability.

    ids int32 [K]. logprobs float32 [K], nats, not renormalised: of an exact entry its log-probability, of a draw the log of
    its unbiased weight. is_draw bool [K]: which entries are random draws.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    is_draw: np.ndarray
    _text: TokenText = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def tokens(self) -> list[str]:
        """The entries as text. Raises as `Row.tokens`."""
        return self._text.of_ids(self.ids)


class Row:
    """One sequence of T tokens: who it is, and what the teacher believed. Entry t is the prediction OF token t.

    number: its global row number. columns: all columns of its index row (listed in schemas/README.md). sequence: its
    numbers as `Sequences`, of one.
    """

    def __init__(self, number: int, columns: dict[str, Any], sequence: Sequences, source: RowSource) -> None:
        self.number, self.columns, self.sequence = number, columns, sequence
        self._source = source

    def __repr__(self) -> str:
        text = self.text if self.text is None or len(self.text) <= 40 else self.text[:40] + "..."
        return f"Row(id={self.id!r}, domain={self.domain!r}, tokens={len(self)}, text={text!r})"

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return len(self.token_ids)

    @property
    def id(self) -> str:
        """Its id, unique in the dataset."""
        row_id: str = self.columns["id"]
        return row_id

    @property
    def domain(self) -> str:
        """Its domain."""
        domain: str = self.columns["domain"]
        return domain

    @property
    def text(self) -> str | None:
        """Its text; None where the dataset does not hold it."""
        text: str | None = self.columns["text"]
        return text

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The messages of a chat; None where the row is no chat."""
        content = self.columns["messages"]
        return None if content is None else parse_row(content)

    @cached_property
    def tokens(self) -> list[str]:
        """Its T tokens as text: the piece of the text that each stands for, or its name where it is not in the text (<s>).

        A token that holds a part of a character only reads as U+FFFD.

        Raises:
            MissingError: the dataset carries no tokenizer.
            DependencyError: the package tokenizers is not installed.
        """
        token_bytes = self._source.token_bytes(self.number)
        return self._source.token_text.in_text(self.token_ids, self.text, token_bytes)

    @property
    def whole_tokens(self) -> list[str]:
        """`tokens`, but a character that several tokens make is whole with the first of them; the others read as "".

        Raises as `tokens`.
        """
        token_bytes = self._source.token_bytes(self.number)
        return self._source.token_text.whole_in_text(self.token_ids, self.text, token_bytes)

    def texts_of(self, token_ids: np.ndarray) -> list[str]:
        """Any ids of entries as text. Raises as `tokens`."""
        return self._source.entry_text.of_ids(token_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [T]."""
        return self.sequence.token_ids

    @property
    def target_mask(self) -> np.ndarray:
        """Positions that count in training, bool [T]."""
        return self.sequence.target_mask

    @property
    def logprob(self) -> np.ndarray:
        """The teacher's log-probability of each token, float32 [T], nats; NaN where nothing was recorded."""
        return self.sequence.logprob

    @property
    def rank(self) -> np.ndarray:
        """Rank of each token for the teacher, int32 [T]: 1 is its first choice, 0 where nothing was recorded."""
        return self.sequence.rank

    @property
    def log_tail(self) -> np.ndarray:
        """Log of the probability outside of the exact entries, float32 [T], nats."""
        return self.sequence.log_tail

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of the teacher's distribution, float32 [T], nats; NaN where it is not known."""
        return self.sequence.entropy

    @property
    def num_exact(self) -> np.ndarray:
        """Exact entries at each position, int32 [T]."""
        return self.sequence.num_exact

    @property
    def num_kept(self) -> np.ndarray:
        """Exact entries and draws at each position, int32 [T]."""
        return self.sequence.num_kept

    @property
    def log_z(self) -> np.ndarray | None:
        """Log-sum-exp at the further temperatures, float32 [T, temperatures]; None without any."""
        return self.sequence.log_z

    @property
    def entry_offsets(self) -> np.ndarray:
        """Where the kept entries of each position begin, int64 [T+1]; `kept` gives those of one position."""
        return self.sequence.entry_offsets

    @property
    def entry_ids(self) -> np.ndarray:
        """Token ids of all kept entries, int32 [N]."""
        return self.sequence.entry_ids

    @property
    def entry_logprobs(self) -> np.ndarray:
        """Their log-probabilities, or log-weights of draws, float32 [N], nats."""
        return self.sequence.entry_logprobs

    @property
    def draw_logprobs(self) -> np.ndarray | None:
        """Log-probabilities of the draws, float32 [N], NaN for exact entries; None where they are not stored."""
        return self.sequence.draw_logprobs

    def kept(self, position: int) -> KeptTokens:
        """What the teacher thought likely instead of token `position`; negative positions count from the end.

        Raises:
            OutOfRangeError: the row has no such position.
        """
        if not -len(self) <= position < len(self):
            raise OutOfRangeError(f"row {self.id!r} has {len(self)} tokens; there is no position {position}")
        position %= len(self)
        begin, end = self.sequence.entry_offsets[position : position + 2]
        return KeptTokens(
            self.sequence.entry_ids[begin:end],
            self.sequence.entry_logprobs[begin:end],
            np.arange(end - begin) >= self.num_exact[position],
            self._source.entry_text,
        )

    def padded(self, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All kept entries as a grid: ids int32 [T, K] padded with -1, logprobs float32 [T, K] padded with -inf.

        See `Sequences.padded`.
        """
        return self.sequence.padded(width)
