"""Ids of one tokenizer as ids of another one, by the bytes that their tokens stand for.

`prefix` gives each teacher's token the student's token with which its text begins. Every probability then goes to one id of
the student, so the map is linear: what was unbiased stays unbiased, and the sum stays 1. It is the distribution of the
student's next token, if the text goes on with a token of the teacher and is then cut as this token alone would be; that it
might be cut otherwise together with what follows is the method's error. For a student that reads bytes there is none: its
next token is the first byte.

`exact` keeps the tokens that both tokenizers have, by equal bytes. What the student lacks has no id (-1).

`ranks` and `matched` are for objectives that compare sorted probabilities, so no id of the teacher may be merged with another
one. Of the entries at a position, `ranks` gives the first the id 0, the second 1, and so on. `matched` gives tokens of equal
bytes the student's id; the others get, by falling probability, the ids that the student has and the teacher lacks, from the
lowest on (`kdata.jobs.retokenize`). Such ids say nothing of what comes next.

Source: the exact map is that of X-Token (arXiv 2605.21699; read at second hand), with one bucket for what does not match;
that tokens match by equal strings is GOLD's (TRL) too, there as the vocabularies write them, here by bytes; the prefix map is
ours.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from kdata.errors import CorruptError
from kdata.store.tokens import REPLACED
from kdata.store.vocabulary import num_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenMap = Literal["prefix", "exact", "ranks", "matched"]
MATCHED = "matched_ids.npy"  # beside a tokenizer's files
# The characters that byte-level tokenizers write for bytes: printable ones for themselves, the others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")  # as sentencepiece writes a byte that it has no token for
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


class TokenMapper:
    """Texts as ids of the student, each text once.

    kind: see the file; of matched the ids that match, as of exact. ranks needs no ids.
    """

    def __init__(self, student: Tokenizer, kind: TokenMap) -> None:
        self._student, self._kind = student, kind
        self._theirs = token_bytes_of(student)
        self._by_bytes = {content: n for n, content in reversed(list(enumerate(self._theirs))) if content}
        self._known: dict[bytes, int] = {}

    def ids_of(self, contents: list[bytes]) -> list[int]:
        """The student's id for the text of each token; -1 where there is none."""
        wanted = [content for content in dict.fromkeys(contents) if content not in self._known]
        self._known.update((content, self._by_bytes.get(content, -1)) for content in wanted)
        missing = [content for content in wanted if content and self._known[content] < 0]
        if self._kind == "prefix" and missing:
            for content, first in zip(missing, _first_tokens(self._student, self._theirs, missing), strict=True):
                self._known[content] = _longest_prefix(content, self._by_bytes) if first is None else first
        return [self._known[content] for content in contents]


def token_map(mapper: TokenMapper, teacher: Tokenizer, num_teacher: int) -> np.ndarray:
    """The student's id for each id of the teacher.

    Args:
        num_teacher: V, ids that the teacher's data may hold.
    Returns:
        int32 [V]; -1 where there is none: special tokens, ids without a token, and tokens of which no byte is known.
    """
    mapped_V = np.full(num_teacher, -1, np.int32)
    contents = [content or b"" for content in token_bytes_of(teacher)[:num_teacher]]
    mapped_V[: len(contents)] = mapper.ids_of(contents)
    return mapped_V


class Beginnings:
    """Which tokens begin with some bytes, by the order of their bytes.

    size_V: int64 [V], bytes of each token; 0 where they are not known.
    """

    def __init__(self, contents: list[bytes | None]) -> None:
        order = sorted((content, number) for number, content in enumerate(contents) if content)
        self._sorted = [content for content, _ in order]
        self._place_V = np.full(len(contents) + 1, -1, np.int64)  # the last stands for every id behind them
        self._place_V[[number for _, number in order]] = np.arange(len(order))
        self.size_V = np.array([len(content or b"") for content in contents], np.int64)
        self._spans: dict[bytes, tuple[int, int]] = {}

    def span(self, begin: bytes) -> tuple[int, int]:
        """First place, and the one behind the last, of the tokens that begin so."""
        if begin not in self._spans:
            last = begin.rstrip(b"\xff")  # the first bytes behind all that begin so
            stop = bisect_left(self._sorted, last[:-1] + bytes([last[-1] + 1])) if last else len(self._sorted)
            self._spans[begin] = bisect_left(self._sorted, begin), stop
        return self._spans[begin]

    def places_of(self, ids: np.ndarray) -> np.ndarray:
        """Places of tokens in the order, int64 like `ids`; -1 where the bytes are not known, or there is no such token."""
        places: np.ndarray = self._place_V[np.minimum(ids, len(self._place_V) - 1)]
        return places


def write_matched(folder: Path, map_V: np.ndarray, num_student: int) -> None:
    """Write which of the student's ids a map gives, as the file `MATCHED` beside its tokenizer: bits, the first highest."""
    own = np.zeros(num_student, bool)
    own[map_V[map_V >= 0]] = True
    np.save(folder / MATCHED, np.packbits(own), allow_pickle=False)


def read_matched(folder: Path | None, num_student: int) -> np.ndarray:
    """bool [num_student], as `write_matched` wrote it. Raises CorruptError where it is not there or has another size."""
    try:
        bits = np.load((folder or Path()) / MATCHED, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CorruptError(
            f"{folder} lacks {MATCHED}, which says what tokens match; run `kdata retokenize` again"
        ) from error
    if bits.dtype != np.uint8 or bits.shape != (-(-num_student // 8),):
        raise CorruptError(f"{folder}/{MATCHED} is not of {num_student:,} ids; run `kdata retokenize` again")
    return np.unpackbits(bits)[:num_student].astype(bool)


def token_bytes_of(tokenizer: Tokenizer, *, names: bool = False) -> list[bytes | None]:
    """The bytes that each id stands for inside a text; None where they are not known.

    Args:
        names: a special token stands for its name, as it does where a text spells it out; else it is None.
    """
    table: list[bytes | None] = [None] * num_ids(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    decoder, is_byte_level = tokenizer.decoder, type(tokenizer.decoder).__name__ == "ByteLevel"
    lead = "" if decoder is None else decoder.decode(["a"])
    has_bytes = decoder is not None and decoder.decode(["a", "<0x41>"]).removeprefix(lead) == "A"
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            table[number] = None if added[number].special and not names else added[number].content.encode()
        elif is_byte_level:
            table[number] = bytes(BYTE_OF[sign] for sign in token) if all(sign in BYTE_OF for sign in token) else None
        elif has_bytes and (byte := _BYTE_TOKEN.fullmatch(token)):
            table[number] = bytes.fromhex(byte[1])
        else:
            # Behind another token, since decoders drop the space at the start of a text.
            text = token if decoder is None else decoder.decode(["a", token]).removeprefix(lead)
            table[number] = None if REPLACED in text else text.encode()
    return table


def _first_tokens(student: Tokenizer, theirs: list[bytes | None], contents: list[bytes]) -> list[int | None]:
    """The first token of each text as the student cuts it, None where that is not known.

    The text is cut by itself. A tokenizer that puts a space before every text would cut another one; then the text is cut
    behind a line break, whose tokens are left out.

    Args:
        theirs: bytes of the student's ids.
    """
    first: list[int | None] = [None] * len(contents)
    for lead in (b"", b"\n"):
        places = [place for place, content in enumerate(contents) if first[place] is None and _is_text(content)]
        texts = [(lead + contents[place]).decode() for place in places]
        for place, encoding in zip(places, student.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            first[place] = _token_behind(lead, contents[place], encoding.ids, theirs)
    return first


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _token_behind(lead: bytes, content: bytes, ids: list[int], theirs: list[bytes | None]) -> int | None:
    """The token with which the content begins behind the lead; None where tokens spell another text, or one lies across."""
    spelled, begins = b"", {}
    for number in ids:
        begins[len(spelled)] = number
        spelled += theirs[number] or b"\xff"  # no text holds it
    for before in (lead, b" " + lead) if lead else (lead,):
        if spelled == before + content:
            return begins.get(len(before))
    return None


def _longest_prefix(content: bytes, by_bytes: dict[bytes, int]) -> int:
    return next((by_bytes[content[:n]] for n in range(len(content) - 1, 0, -1) if content[:n] in by_bytes), -1)
