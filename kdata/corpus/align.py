"""Two tokenizations of one text, aligned by bytes.

A boundary is the end of a token in both tokenizations. Between two boundaries lies a chunk: the same bytes, as one or more
tokens of each side. Nothing is compared but byte offsets, so no token can be off by one: where offsets do not add up to the
text, the row is refused before it comes here.

Special tokens around a text (the beginning and the end of a sequence) stand for no byte. A tokenizer that spells one
character with several tokens, and says where it begins but not where its bytes part, gives the first of them no byte and the
last one all: such tokens belong to the chunk of their character.

Shapes: T tokens of the first tokenization (the teacher's), S tokens of the second one (the student's), C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Alignment:
    """How the tokens of a text belong together.

    within_S: int64 [S], the teacher's token that holds all bytes of the student's token, or -1 where there is none.
    rest_S: int64 [S], bytes from where the student's token begins to the end of that token of the teacher; 0 without one.
    chunk_T: int64 [T] and chunk_S: int64 [S], chunk of each token, -1 of special tokens. num_chunks: C.
    """

    within_S: np.ndarray
    rest_S: np.ndarray
    chunk_T: np.ndarray
    chunk_S: np.ndarray
    num_chunks: int

    def met_at(self, *, last: bool) -> np.ndarray:
        """int64 [S], at the first token of each chunk the teacher's first token of it, or the last of both; else -1."""
        met_S = np.full(len(self.chunk_S), -1, np.int64)
        met_S[self.ends(self.chunk_S, last=last)] = self.ends(self.chunk_T, last=last)
        return met_S

    def ends(self, chunk_N: np.ndarray, *, last: bool) -> np.ndarray:
        """int64 [C], the first or the last token of each chunk, of `chunk_T` or `chunk_S`."""
        inside = np.flatnonzero(chunk_N >= 0)
        ends = np.searchsorted(chunk_N[inside], np.arange(self.num_chunks), side="right" if last else "left")
        own: np.ndarray = inside[ends - last]
        return own


def align(
    teacher_bytes: np.ndarray, student_bytes: np.ndarray, teacher_special: np.ndarray, student_special: np.ndarray
) -> Alignment:
    """Align the tokens of two tokenizations of one text.

    Args:
        teacher_bytes: [T], bytes of the text that each token stands for; student_bytes: [S]. Both sum to those of the text.
        teacher_special: bool [T], tokens around the text, of 0 bytes; student_special: bool [S].
    Raises:
        ValueError: the sums differ.
    """
    ends_T, ends_S = (np.cumsum(own, dtype=np.int64) for own in (teacher_bytes, student_bytes))
    if (ends_T[-1] if len(ends_T) else 0) != (ends_S[-1] if len(ends_S) else 0):
        raise ValueError(f"the tokens stand for {ends_T[-1:]} and {ends_S[-1:]} bytes")
    plain_T, plain_S = ~teacher_special, ~student_special
    whole_T, whole_S = _whole(teacher_bytes, plain_T), _whole(student_bytes, plain_S)
    starts_T, starts_S = ends_T - teacher_bytes, ends_S - student_bytes
    boundaries = np.intersect1d(ends_T[plain_T & (teacher_bytes > 0)], ends_S[plain_S & (student_bytes > 0)])
    within_S, rest_S = np.full(len(ends_S), -1, np.int64), np.zeros(len(ends_S), np.int64)
    candidates = np.flatnonzero(whole_T)
    if len(candidates):
        place_S = np.searchsorted(starts_T[candidates], starts_S, side="right") - 1
        teacher_S = candidates[np.maximum(place_S, 0)]
        found_S = whole_S & (place_S >= 0) & (ends_T[teacher_S] >= ends_S)
        within_S[found_S] = teacher_S[found_S]
        rest_S[found_S] = (ends_T[teacher_S] - starts_S)[found_S]
    return Alignment(
        within_S,
        rest_S,
        np.where(plain_T, np.searchsorted(boundaries, starts_T, side="right"), -1),
        np.where(plain_S, np.searchsorted(boundaries, starts_S, side="right"), -1),
        len(boundaries),
    )


def _whole(num_bytes: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Tokens whose bytes are known one by one: they have some, and none before them shares their character."""
    has_some = num_bytes > 0
    shares = np.concatenate([[False], (plain & ~has_some)[:-1]])
    whole: np.ndarray = plain & has_some & ~shares
    return whole
