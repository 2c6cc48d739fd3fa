"""Alignment by bytes against its definition, over random cuts of a text."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdata.corpus.align import align


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Bytes per token of two tokenizations of one text."""
    text = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
    pieces = [draw(st.integers(1, 4)) for _ in text]

    def of(side: int) -> list[int]:
        """Cut at the pieces whose number is odd, or join them; now and then a token without bytes before its character."""
        lengths, open_bytes = list[int](), 0
        for piece, choice in zip(pieces, text, strict=True):
            open_bytes += piece
            if choice[side] == 0:
                continue
            lengths += [0] * (choice[side] == 3) + [open_bytes]
            open_bytes = 0
        return lengths + ([open_bytes] if open_bytes else [])

    return of(0), of(1)


@given(cuts(), st.booleans(), st.booleans())
def test_every_token_is_where_its_bytes_are(both: tuple[list[int], list[int]], bos: bool, eos: bool) -> None:
    teacher, student = both
    teacher_special = np.array([True] * bos + [False] * len(teacher) + [True] * eos)
    teacher_bytes = np.array([0] * bos + teacher + [0] * eos)
    aligned = align(teacher_bytes, np.array(student), teacher_special, np.zeros(len(student), bool))
    t_ends, s_ends = list(accumulate(teacher_bytes.tolist())), list(accumulate(student))
    shared = sorted(
        {e for e, n in zip(t_ends, teacher_bytes, strict=True) if n}
        & {e for e, n in zip(s_ends, student, strict=True) if n}
    )
    assert aligned.num_chunks == len(shared)
    for place, (end, size) in enumerate(zip(s_ends, student, strict=True)):
        # The chunk of a token is the number of boundaries at or before its first byte.
        assert aligned.chunk_S[place] == sum(boundary <= end - size for boundary in shared)
        found, rest = int(aligned.within_S[place]), int(aligned.rest_S[place])
        is_whole = size > 0 and (place == 0 or student[place - 1] > 0)
        expected = [
            t
            for t, (t_end, t_size) in enumerate(zip(t_ends, teacher_bytes.tolist(), strict=True))
            if t_size > 0 and t_end - t_size <= end - size and t_end >= end
            and (t == 0 or teacher_bytes[t - 1] > 0 or teacher_special[t - 1])
        ]  # fmt: skip
        assert found == (expected[0] if expected and is_whole else -1) and len(expected) <= (
            1 if size else len(student)
        )
        assert rest == (t_ends[found] - (end - size) if found >= 0 else 0)
    for place, (end, size) in enumerate(zip(t_ends, teacher_bytes.tolist(), strict=True)):
        chunk = aligned.chunk_T[place]
        assert chunk == (-1 if teacher_special[place] else sum(boundary <= end - size for boundary in shared))
    for last in (False, True):  # each chunk begins at one byte on both sides, and so it ends
        met = aligned.met_at(last=last)
        places = np.flatnonzero(met >= 0)
        assert aligned.chunk_S[places].tolist() == list(range(len(shared))) == aligned.chunk_T[met[places]].tolist()
        for s, t, begin, end in zip(places.tolist(), met[places].tolist(), [0, *shared], shared, strict=False):
            assert (
                (s_ends[s], t_ends[t]) == (end, end)
                if last
                else (s_ends[s] - student[s] == t_ends[t] - teacher_bytes[t] == begin)
            )


def test_tokens_of_other_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        align(np.array([2, 1]), np.array([2]), np.zeros(2, bool), np.zeros(1, bool))


def test_a_worked_example() -> None:
    """The teacher's `un|believ|able`, the student's `unbe|liev|able`: one chunk of two tokens each, and one of one."""
    aligned = align(
        np.array([0, 2, 6, 4]), np.array([4, 4, 4]), np.array([True, False, False, False]), np.zeros(3, bool)
    )
    assert (
        aligned.chunk_T.tolist() == [-1, 0, 0, 1] and aligned.chunk_S.tolist() == [0, 0, 1] and aligned.num_chunks == 2
    )
    # `unbe` begins in `un`, which ends before it; of `believ` `liev` is left.
    assert aligned.within_S.tolist() == [-1, 2, 3] and aligned.rest_S.tolist() == [0, 4, 4]
