"""Ids of one tokenizer as ids of another one, by the bytes that their tokens stand for.

`prefix` gives each teacher's token the student's token with which its text begins. Every probability then goes to one id of
the student, so the map is linear: what was unbiased stays unbiased, and the sum stays 1. It is the distribution of the
student's next token, if the text goes on with a token of the teacher and is then cut as this token alone would be; that it
might be cut otherwise together with what follows is the method's error. For a student that reads bytes there is none: its
next token is the first byte.

`exact` keeps the tokens that both tokenizers have, by equal bytes. What the student lacks has no id (-1).

Source: the exact map is that of X-Token (arXiv 2605.21699; read at second hand), with one bucket for what does not match;
the prefix map is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from kdata.store.vocabulary import num_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TokenMap = Literal["prefix", "exact"]
REPLACED = "\ufffd"  # what a decoder writes for a part of a character
# The characters that byte-level tokenizers write for bytes: printable ones for themselves, the others from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def token_map(teacher: Tokenizer, student: Tokenizer, kind: TokenMap, num_teacher: int) -> np.ndarray:
    """The student's id for each id of the teacher.

    Args:
        kind: see the file.
        num_teacher: V, ids that the teacher's data may hold.
    Returns:
        int32 [V]; -1 where there is none: special tokens, ids without a token, and tokens of which no byte is known.
    """
    theirs = token_bytes_of(student)
    by_bytes = {content: number for number, content in reversed(list(enumerate(theirs))) if content}
    mapped_V = np.full(num_teacher, -1, np.int32)
    contents = token_bytes_of(teacher)[:num_teacher]
    open_ids = []
    for number, content in enumerate(contents):
        if content:
            mapped_V[number] = by_bytes.get(content, -1)
            if mapped_V[number] < 0:
                open_ids.append(number)
    if kind == "exact" or not open_ids:
        return mapped_V
    for number, first in zip(open_ids, _first_tokens(student, [contents[n] or b"" for n in open_ids]), strict=True):
        content = contents[number] or b""
        own = None if first is None else theirs[first]
        if first is not None and own and content.startswith(own):
            mapped_V[number] = first
        else:
            mapped_V[number] = _longest_prefix(content, by_bytes)
    return mapped_V


def token_bytes_of(tokenizer: Tokenizer, *, names: bool = False) -> list[bytes | None]:
    """The bytes that each id stands for inside a text; None where they are not known.

    Args:
        names: a special token stands for its name, as it does where a text spells it out; else it is None.
    """
    table: list[bytes | None] = [None] * num_ids(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    decoder, is_byte_level = tokenizer.decoder, type(tokenizer.decoder).__name__ == "ByteLevel"
    lead = "" if decoder is None else decoder.decode(["a"])
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number in added:
            table[number] = None if added[number].special and not names else added[number].content.encode()
        elif is_byte_level:
            table[number] = bytes(BYTE_OF[sign] for sign in token) if all(sign in BYTE_OF for sign in token) else None
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            table[number] = bytes.fromhex(token[3:5])
        else:
            # Behind another token, since decoders drop the space at the start of a text.
            text = token if decoder is None else decoder.decode(["a", token]).removeprefix(lead)
            table[number] = None if REPLACED in text else text.encode()
    return table


def _first_tokens(student: Tokenizer, contents: list[bytes]) -> list[int | None]:
    """The first token of each text by itself, None where the bytes are no text."""
    texts: list[str | None] = []
    for content in contents:
        try:
            texts.append(content.decode())
        except UnicodeDecodeError:
            texts.append(None)
    encoded = iter(student.encode_batch_fast([text for text in texts if text is not None], add_special_tokens=False))
    return [None if text is None else next(iter(next(encoded).ids), None) for text in texts]


def _longest_prefix(content: bytes, by_bytes: dict[bytes, int]) -> int:
    return next((by_bytes[content[:n]] for n in range(len(content) - 1, 0, -1) if content[:n] in by_bytes), -1)
