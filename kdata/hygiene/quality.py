"""Signals of length, repetition and form, as Gopher, C4 and FineWeb use them, and which of their rules a text fails.

Sources: Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A), C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2),
FineWeb (Penedo et al. 2024, arXiv 2406.17557, section 3.6). Thresholds are those of the papers, read as datatrove
(Apache-2.0) reads them. Why not datatrove itself: its filters stop at the first rule and return its name, so there is no
number to choose by. Words are parted at white space, where datatrove takes spaCy's; repeated n-grams are of the words of
`kdata.hygiene.words`.

The rules are for English prose. Code, verse, tables and other languages fail some of them; the numbers say which.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from kdata.hygiene.words import repeated

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
TERMINAL = (".", "!", "?", '"', "'", "\u201d", "\u2019", "\u3002", "\uff01", "\uff1f", "\u0964", "\u06d4", "\u061f")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SHORT_LINE = 30  # characters
COMPRESSED = 1 << 16  # bytes of a text that are compressed at most
# Replacement characters, control characters, and what UTF-8 looks like that was read as Latin-1 or Windows-1252.
_CONTINUED = "\u0080-\u00bf" + bytes(set(range(0x80, 0xA0)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D}).decode("cp1252")
_BROKEN = re.compile(
    f"[\ufffd\x00-\x08\x0b\x0e-\x1f\x7f-\x9f]|[\u00c2\u00c3][{_CONTINUED}]|\u00e2\u20ac[{_CONTINUED}]?"
)
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\u2026\u2022\u2013\u2014\u201c\u201d\u2018\u2019"

# Name of each number: its type and what it is.
COLUMNS: dict[str, tuple[str, str]] = {
    "chars": ("int32", "Characters."),
    "words": ("int32", "Words, parted by white space, without those of punctuation alone."),
    "lines": ("int32", "Lines that are not empty."),
    "mean_word_chars": ("float32", "Mean characters of a word; null without a word."),
    "alpha_words": ("float32", "Share of words with a letter."),
    "stop_words": ("int32", "How many of Gopher's eight stop words occur: the, be, to, of, and, that, have, with."),
    "symbols_per_word": ("float32", "Hash signs or ellipses for each word, whichever are more."),
    "bullet_lines": ("float32", "Share of lines that begin with a bullet or a hyphen."),
    "ellipsis_lines": ("float32", "Share of lines that end with an ellipsis."),
    "terminal_lines": ("float32", "Share of lines that end with a terminal punctuation mark (C4, FineWeb)."),
    "short_lines": ("float32", f"Share of lines of at most {SHORT_LINE} characters (FineWeb)."),
    "newlines_per_word": ("float32", "Line breaks for each word (FineWeb: list_ratio)."),
    "repeated_lines": ("float32", "Share of lines that occurred before."),
    "repeated_line_chars": ("float32", "Share of characters in lines that occurred before."),
    "repeated_paragraphs": ("float32", "Share of paragraphs that occurred before."),
    "repeated_paragraph_chars": ("float32", "Share of characters in paragraphs that occurred before."),
    **{f"top_{n}gram": ("float32", f"Share of letters in the most frequent run of {n} words.") for n in (2, 3, 4)},
    **{f"repeated_{n}grams": ("float32", f"Share of letters in repeated runs of {n} words.") for n in range(5, 11)},
    "digits": ("float32", "Share of characters that are digits."),
    "uppercase": ("float32", "Share of letters that are upper case."),
    "compressed": (
        "float32",
        f"Bytes of the first {COMPRESSED:,} after zlib, of those before; small where it repeats.",
    ),
    "broken": (
        "float32",
        "Share of characters that a wrong encoding left: replacement and control characters, mojibake.",
    ),
    "policy": ("int32", "Phrases of cookie banners and terms of use (C4)."),
    "gopher": ("string", "Rules of Gopher's quality and repetition filters that it fails, in order; empty: none."),
    "c4": ("string", "Rules of C4 for whole pages that it fails, and lines of policy; empty: none."),
    "fineweb": ("string", "Rules of FineWeb's own filter that it fails; empty: none."),
}
_REPEATED = (
    [f"top_{n}gram" for n in (2, 3, 4)] + [f"repeated_{n}grams" for n in range(5, 11)]
)  # fmt: skip  # as `repeated` returns them
# Largest values that pass; Gopher, table A1.
_MOST_REPEATED = {
    "repeated_lines": 0.30, "repeated_paragraphs": 0.30, "repeated_line_chars": 0.20, "repeated_paragraph_chars": 0.20,
    "top_2gram": 0.20, "top_3gram": 0.18, "top_4gram": 0.16, "repeated_5grams": 0.15, "repeated_6grams": 0.14,
    "repeated_7grams": 0.13, "repeated_8grams": 0.12, "repeated_9grams": 0.11, "repeated_10grams": 0.10,
}  # fmt: skip


def quality_of(text: str, words_W: np.ndarray, chars_W: np.ndarray) -> dict[str, Any]:
    """A value for each of COLUMNS.

    Args:
        words_W, chars_W: see `kdata.hygiene.words.hashed`.
    """
    chars_of_all = len(text)
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # a line ends as its system writes it
    lines = [line for line in text.splitlines() if not line.isspace() and line]
    paragraphs = [part for part in re.split(r"\n{2,}", text.strip()) if part]
    words = [word for part in text.split() if (word := part.strip(_PUNCTUATION))]
    lower = text.lower()
    num_chars, num_words, num_lines = max(len(text), 1), max(len(words), 1), max(len(lines), 1)
    letters, digits, uppercase = _kinds(text)
    content = text[:COMPRESSED].encode()[:COMPRESSED]
    signals: dict[str, Any] = {
        "chars": chars_of_all,
        "words": len(words),
        "lines": len(lines),
        "mean_word_chars": sum(map(len, words)) / num_words if words else None,
        "alpha_words": sum(1 for word in words if word.isalpha() or any(map(str.isalpha, word))) / num_words,
        "stop_words": len(STOP_WORDS.intersection(map(str.lower, words))),
        "symbols_per_word": max(text.count("#"), text.count("...") + text.count("\u2026")) / num_words,
        "bullet_lines": sum(line.lstrip().startswith(("\u2022", "-", "*")) for line in lines) / num_lines,
        "ellipsis_lines": sum(line.rstrip().endswith(("...", "\u2026")) for line in lines) / num_lines,
        "terminal_lines": sum(line.rstrip().endswith(TERMINAL) for line in lines) / num_lines,
        "short_lines": sum(len(line) <= SHORT_LINE for line in lines) / num_lines,
        "newlines_per_word": text.count("\n") / num_words,
        "digits": digits / num_chars,
        "uppercase": uppercase / max(letters, 1),
        "compressed": len(zlib.compress(content, 1)) / len(content) if content else None,
        "broken": sum(len(match[0]) for match in _BROKEN.finditer(text)) / num_chars,
        "policy": sum(map(lower.count, POLICY)),
    }
    for name, parts in (("repeated_line", lines), ("repeated_paragraph", paragraphs)):
        again, chars = _repeated(parts)
        signals[f"{name}s"], signals[f"{name}_chars"] = again / max(len(parts), 1), chars / num_chars
    shares = repeated(words_W, chars_W) / max(int(chars_W.sum()), 1)
    signals.update(zip(_REPEATED, shares.tolist(), strict=True))
    signals["gopher"] = ", ".join(_gopher(signals))
    signals["c4"] = ", ".join(_c4(signals, lower))
    signals["fineweb"] = ", ".join(_fineweb(signals))
    return signals


def _kinds(text: str) -> tuple[int, int, int]:
    """How many letters, digits and upper-case letters a text has, as Python's `str` sees them."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    counts = np.bincount(_table()[points], minlength=8)
    letters, digits, uppercase = (sum(int(counts[n]) for n in range(8) if n >> bit & 1) for bit in range(3))
    return letters, digits, uppercase


@cache
def _table() -> np.ndarray:
    """Of each code point: 1 for a letter, 2 for a digit, 4 for upper case, added, uint8."""
    every = map(chr, range(sys.maxunicode + 1))
    return np.array([one.isalpha() + 2 * one.isdigit() + 4 * one.isupper() for one in every], np.uint8)


def _repeated(parts: list[str]) -> tuple[int, int]:
    """How many of some parts occurred before, and their characters."""
    seen, again, chars = set[str](), 0, 0
    for part in parts:
        if part in seen:
            again, chars = again + 1, chars + len(part)
        seen.add(part)
    return again, chars


def _gopher(signals: dict[str, Any]) -> Iterable[str]:
    mean = signals["mean_word_chars"] or 0.0
    fails = {
        "words": not 50 <= signals["words"] <= 100_000,
        "mean_word_chars": not 3 <= mean <= 10,
        "symbols_per_word": signals["symbols_per_word"] > 0.1,
        "bullet_lines": signals["bullet_lines"] > 0.9,
        "ellipsis_lines": signals["ellipsis_lines"] > 0.3,
        "alpha_words": signals["alpha_words"] < 0.8,
        "stop_words": signals["stop_words"] < 2,
        **{name: signals[name] > most for name, most in _MOST_REPEATED.items()},
    }
    return [name for name, failed in fails.items() if failed]


def _c4(signals: dict[str, Any], lower: str) -> Iterable[str]:
    fails = {
        "curly_bracket": "{" in lower,
        "lorem_ipsum": "lorem ipsum" in lower,
        "javascript": "javascript" in lower,
        "policy": signals["policy"] > 0,
    }
    return [name for name, failed in fails.items() if failed]


def _fineweb(signals: dict[str, Any]) -> Iterable[str]:
    fails = {
        "terminal_lines": signals["terminal_lines"] <= 0.12,
        "repeated_line_chars": signals["repeated_line_chars"] >= 0.1,
        "short_lines": signals["short_lines"] >= 0.67,
        "newlines_per_word": signals["newlines_per_word"] > 0.3,
    }
    return [name for name, failed in fails.items() if failed]
