"""How many sequences a teacher gets at once, and what happens when it fails at one of them.

The sequences of a unit are read in windows of similar length. A window is bounded in tokens, so memory is bounded by the
settings and not by the longest prompt. If a window fails, its sequences are read again one by one. A sequence that fails
alone while others succeed becomes a reject, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from kdata.errors import DistributionError, TeacherError
from kdata.teachers.base import Readout

T = TypeVar("T")
GIB = 1 << 30
ENTRY_BYTES = 100  # of one log-probability as vLLM returns it: three Python objects in three lists (measured 96)


def windows(lengths: Sequence[int], max_tokens: int, *, padded: bool = False) -> list[list[int]]:
    """Cut sequences into groups of similar length.

    Args:
        lengths: tokens of each.
        max_tokens: tokens of a group at most; a longer sequence is a group of its own.
        padded: every sequence costs as much as the longest of its group.
    Returns:
        Positions in `lengths`, longest first, equal ones in their order.
    """
    groups: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[groups[-1][0]] if padded and groups else lengths[number]
        if not groups or cost > room:
            groups.append([])
            room, cost = max_tokens, lengths[number]
        groups[-1].append(number)
        room -= cost
    return groups


def by_windows(
    read: Callable[[list[int]], list[Readout]], lengths: Sequence[int], max_tokens: int, *, padded: bool = False
) -> list[Readout]:
    """Read sequences window by window: `read` gets their numbers; the readouts come back in the order of `lengths`."""
    readouts: dict[int, Readout] = {}
    for group in windows(lengths, max_tokens, padded=padded):
        readouts.update(zip(group, read(group), strict=True))
    return [readouts[number] for number in range(len(lengths))]


def rows_per_step(vocab_size: int, logits_gib: float, *, copies: int = 3) -> int:
    """Positions whose logits an engine may hold at once: float32 [rows, V] and what is computed from it, `copies` in all."""
    return max(int(logits_gib * GIB / (4 * vocab_size * copies)), 1)


def each(ask: Callable[[list[int]], Sequence[T]], count: int) -> list[T | TeacherError]:
    """Ask a teacher for `count` answers at once; where that fails, for each alone.

    Args:
        ask: gets the numbers of inputs, returns their answers in that order; raises TeacherError.
    Returns:
        An answer, or the error of an input that failed twice: with the others, and alone.
    Raises:
        TeacherError: every input failed, and not each of them by its own numbers (DistributionError).
    """
    if count == 0:
        return []
    try:
        return list(ask(list(range(count))))
    except TeacherError as error:
        if count == 1 and not isinstance(error, DistributionError):
            raise
    answers: list[T | TeacherError] = []
    for number in range(count):
        try:
            answers += ask([number])
        except TeacherError as error:
            answers.append(error)
    failed = [answer for answer in answers if isinstance(answer, TeacherError)]
    if len(failed) == count and not all(isinstance(error, DistributionError) for error in failed):
        raise failed[0]
    return answers
