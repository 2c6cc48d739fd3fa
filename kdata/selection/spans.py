"""Spans of a text between two markers, and the tokens in them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


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
