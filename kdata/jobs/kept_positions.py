"""Apply the rules of `kdata.format.keep_rules`: at which target positions of a row a distribution is kept.

The teacher's numbers at the other targets stay, and these remain targets. What is chosen depends on the rule and the row
alone.

Shapes: T tokens of the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from kdata.errors import ConfigError, TeacherError
from kdata.format.keep_rules import KeepEntropy, KeepRandom, KeepRule, KeepSpan
from kdata.format.measures import Measures
from kdata.selection.position_base import highest_of_rows, rising_keys
from kdata.selection.position_rules import random_numbers
from kdata.selection.spans import tokens_in_spans


class ReadRow(Protocol):
    """What a rule knows of a row beside the teacher's numbers; see `kdata.jobs.payloads.InputSequence`."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def domain(self) -> str:
        """Its domain."""
        ...

    @property
    def target_mask(self) -> np.ndarray:
        """Its targets, bool [T]."""
        ...

    @property
    def text(self) -> str | None:
        """Its text."""
        ...

    @property
    def token_bytes(self) -> np.ndarray | None:
        """Bytes of the text that each token stands for, uint16 [T]."""
        ...

    @property
    def marked(self) -> np.ndarray | None:
        """Tokens that the rule `role` or `stored` chooses, bool [T]; None: all of them."""
        ...


def kept_positions(rule: KeepRule, row: ReadRow, measures: Measures) -> np.ndarray:
    """Target positions of a row at which the distribution is kept, bool [T].

    Args:
        measures: the teacher's numbers at each position.
    Raises:
        TeacherError: the rule needs the entropy, and the teacher gave none.
        ConfigError: the rule needs the bytes of the tokens, and the tokenizer does not tell them.
    """
    if row.domain in rule.domains:
        return row.target_mask
    target_N = np.flatnonzero(row.target_mask)
    kept_T = np.zeros(len(row.target_mask), bool)
    kept_T[target_N] = CHOOSE[rule.rule](rule, row, measures, target_N)
    return kept_T


def _by_entropy(rule: Any, row: ReadRow, measures: Measures, target_N: np.ndarray) -> np.ndarray:
    assert isinstance(rule, KeepEntropy)
    entropy_N = measures.entropy[target_N].astype(np.float32)
    if np.isnan(entropy_N).any():
        raise TeacherError(
            f"{row.id}: the teacher gave no entropy, which decides what is kept (positions.rule entropy)"
        )
    if rule.threshold is not None:
        above_N: np.ndarray = entropy_N.astype(np.float64) >= rule.threshold
        return above_N
    assert rule.share is not None
    return highest_of_rows(rising_keys(entropy_N), np.zeros_like(target_N), target_N, 1, rule.share)


def _at_random(rule: Any, row: ReadRow, measures: Measures, target_N: np.ndarray) -> np.ndarray:
    assert isinstance(rule, KeepRandom)
    same_row_N = np.zeros_like(target_N)
    numbers_N = random_numbers(rule.seed, [row.id], same_row_N, target_N)
    return highest_of_rows(numbers_N, same_row_N, target_N, 1, rule.share)


def _in_spans(rule: Any, row: ReadRow, measures: Measures, target_N: np.ndarray) -> np.ndarray:
    assert isinstance(rule, KeepSpan)
    if row.text is None or row.token_bytes is None:
        raise ConfigError(
            f"row {row.id!r} lacks its text or the bytes of its tokens, so spans of the text cannot be found in its tokens; "
            "use another rule than positions.rule span"
        )
    if "\ufffd" in row.text.rstrip("\ufffd") and int(row.token_bytes.sum(dtype=np.int64)) != len(row.text.encode()):
        raise TeacherError(
            f"{row.id}: bytes in it are not UTF-8, so spans of its text cannot be found in its tokens (positions.rule span)"
        )
    inside_N: np.ndarray = tokens_in_spans(row.text, row.token_bytes, rule.begin, rule.end)[target_N]
    return inside_N


def _marked(rule: Any, row: ReadRow, measures: Measures, target_N: np.ndarray) -> np.ndarray:
    return np.ones(len(target_N), bool) if row.marked is None else row.marked[target_N]


CHOOSE: dict[str, Callable[[Any, ReadRow, Measures, np.ndarray], np.ndarray]] = {
    "entropy": _by_entropy,
    "random": _at_random,
    "span": _in_spans,
    "role": _marked,
    "stored": _marked,
}
