"""Texts as words and hashed n-grams: what duplicates, overlap and repetition have in common.

A text is compared in a normal form: NFKC, case folded, without characters that nobody sees. Its words are runs of letters,
digits and underscores, with the marks on them (vowel signs, accents); where a script has no spaces between words (Chinese,
Japanese, Thai, Lao, Khmer, Burmese), each letter with its marks is a word. Punctuation and the kind of white space do not
count.

Hashes have 64 bits and no key: two different n-grams of a million documents share one with a probability of 1e-2 in all.
Whoever wants to can make two texts that share one, so a hash marks a text and proves nothing.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby
from typing import Any

import numpy as np

from kdata.format.compiled import compiled

# Scripts that are written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
# Unicode's Default_Ignorable_Code_Point: soft hyphen, zero-width space and joiners, marks of direction, variation selectors.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)


def _marks(begin: int, end: int) -> str:
    """The marks of a range of code points, as ranges of a character class."""
    marks = [point for point in range(begin, end) if unicodedata.category(chr(point))[0] == "M"]
    runs = [[point for _, point in run] for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)


# A mark is no letter to Python: without them a word of Hindi is cut at each vowel sign, and which one it is is lost. In two
# classes, because `re` searches one with code points above U+FFFF from its beginning (x 2). Marks above U+1FFFF are unseen.
_MARK = rf"(?:[{_marks(0x300, 0x10000)}]|[\U00010000-\U0001ffff](?<=[{_marks(0x10000, 0x20000)}]))"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+(?:{_MARK}+[^\W{_UNSPACED}]*)*|(?=\w)[{_UNSPACED}]{_MARK}*")
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_A, _MIX_B, _STEP = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)


def normal_form(text: str) -> str:
    """NFKC, case folded, no characters that nobody sees, runs of white space as one space, none at the ends."""
    # Before NFKC, which does not join a letter and its accent where such a character is between them.
    plain = text if text.isascii() else unicodedata.normalize("NFKC", _UNSEEN.sub("", text))
    folded = plain.casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFKC", folded)  # a letter of two marks may fold into three characters
    return " ".join(folded.split())


def words_of(normal: str) -> list[str]:
    """The words of a text in normal form."""
    return _WORD.findall(normal)


def hashed(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hash of each word, uint64 [W], and its characters, int64 [W]."""
    if not words:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    hashes_W, chars_W = _hash_words(np.frombuffer("\n".join(words).encode(), np.uint8), len(words))
    return hashes_W, chars_W


def ngrams(words_W: np.ndarray, n: int) -> np.ndarray:
    """Hash of each run of `n` words, uint64 [W - n + 1]; of a shorter text that has words one hash, of all of them.

    Args:
        words_W: uint64 [W], hashes of words.
    """
    if not len(words_W):
        return np.zeros(0, np.uint64)
    hashes: np.ndarray = _ngrams(words_W, min(n, len(words_W)))
    return hashes


@compiled()
def _mixed(value: Any) -> Any:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_A
    value = (value ^ (value >> np.uint64(27))) * _MIX_B
    return value ^ (value >> np.uint64(31))


@compiled()
def _hash_words(content: Any, count: int) -> Any:
    """FNV-1a of each word of a UTF-8 text with a word a line, mixed; and its number of characters."""
    hashes = np.empty(count, np.uint64)
    chars = np.empty(count, np.int64)
    place, value, length = 0, _FNV_OFFSET, 0
    for byte in content:
        if byte == 10:
            hashes[place], chars[place] = _mixed(value), length
            place, value, length = place + 1, _FNV_OFFSET, 0
        else:
            value = (value ^ np.uint64(byte)) * _FNV_PRIME
            length += (byte & 0xC0) != 0x80
    hashes[place], chars[place] = _mixed(value), length
    return hashes, chars


@compiled()
def _ngrams(words: Any, n: int) -> Any:
    hashes = np.empty(len(words) - n + 1, np.uint64)
    for begin in range(len(hashes)):
        value = np.uint64(n)
        for word in words[begin : begin + n]:
            value = _mixed(value * _STEP + word)
        hashes[begin] = value
    return hashes


@compiled()
def repeated(words: Any, chars: Any) -> Any:
    """Characters in repeated n-grams, int64 [9].

    Of n = 2, 3, 4: the characters of the most frequent n-gram, times how often it occurs; 0 where none occurs twice. Of n = 5
    to 10: the characters of n-grams that occurred before, counted from the left and without overlap. Only letters count, no
    spaces.

    Args:
        words: uint64 [W], hashes of words. chars: int64 [W], their characters.
    Source: Gopher (arXiv 2112.11446, table A1), read as datatrove's `GopherRepetitionFilter` reads it.
    """
    result = np.zeros(9, np.int64)
    size = 16
    while size < 2 * len(words):
        size *= 2
    bits = np.uint64(size - 1)
    sums = np.zeros(len(words) + 1, np.int64)
    sums[1:] = np.cumsum(chars)
    keys = np.empty(size, np.uint64)
    counts = np.empty(size, np.int64)
    for n in range(2, 11):
        if len(words) < n:
            break
        hashes = _ngrams(words, n)
        counts[:] = 0
        most, place = 1, 0
        while place < len(hashes):
            slot = hashes[place] & bits
            while counts[slot] and keys[slot] != hashes[place]:
                slot = (slot + np.uint64(1)) & bits
            keys[slot] = hashes[place]
            length = sums[place + n] - sums[place]
            counts[slot] += 1
            if n < 5:
                if counts[slot] > most or (counts[slot] == most and most > 1):
                    longest = (
                        max(result[n - 2], length * counts[slot]) if counts[slot] == most else length * counts[slot]
                    )
                    most, result[n - 2] = counts[slot], longest
                place += 1
            elif counts[slot] > 1:
                result[n - 2] += length
                place += n
            else:
                place += 1
    return result
