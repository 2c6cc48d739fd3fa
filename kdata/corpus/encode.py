"""Text to token ids, and how many bytes of the text each token stands for."""

from __future__ import annotations

from typing import Any

import numpy as np


class TextEncoder:
    """Text to token ids, and how many bytes of the text each token stands for.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        probe = tokenizer("a", return_special_tokens_mask=True)
        mask = np.array(probe["special_tokens_mask"], bool)
        ids = np.array(probe["input_ids"], np.int32)
        plain = np.flatnonzero(~mask)
        self.prefix, self.suffix = ids[: plain[0]], ids[plain[-1] + 1 :]
        self._byte_table = _byte_table(tokenizer)
        self._special = np.array(sorted({*special_tokens(tokenizer), *tokenizer.all_special_ids}), np.int64)

    @property
    def num_special(self) -> int:
        """Number of special tokens that the tokenizer puts around a text."""
        return len(self.prefix) + len(self.suffix)

    def pieces(self, text: str, limit: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Encode a text, split at token borders so that no piece exceeds `limit` tokens, specials included.

        Returns:
            One (text, token ids int32 [T], bytes per token uint16 [T]) per piece; the texts join to the whole.
        """
        ids, begins = self._encode(text)
        room = limit - self.num_special
        cuts = [0, *(begins[start] for start in range(room, len(ids), room)), len(text)]
        return [
            self._piece(text[cuts[n] : cuts[n + 1]], ids[start : start + room], begins[start : start + room] - cuts[n])
            for n, start in enumerate(range(0, max(len(ids), 1), room))
        ]

    def literal(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text that contains its special tokens, as a rendered chat does; none are added.

        Returns:
            Token ids int32 [T] and bytes per token uint16 [T], where special tokens count the bytes of their names. The bytes
            sum to those of the text, so the running sum says exactly where each token begins.
        """
        ids, begins = self._encode(text)
        return ids, self._lengths(text, ids, begins)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [T], and the character where each begins, int64 [T]."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
        return np.array(encoded["input_ids"], np.int32), begins

    def _lengths(self, text: str, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Bytes per token, uint16 [T]: what the tokens spell where that is the text, else from where they begin."""
        lengths = None if self._byte_table is None else self._byte_table[ids]
        if lengths is None or int(lengths.sum()) != len(text.encode()):
            lengths = _lengths_from_begins(text, begins)
        return lengths

    def _piece(self, text: str, ids: np.ndarray, begins: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        whole = np.concatenate([self.prefix, ids, self.suffix])
        padded = np.zeros(len(whole), np.uint16)
        padded[len(self.prefix) : len(self.prefix) + len(ids)] = self._lengths(text, ids, begins)
        return text, whole, padded

    def byte_lengths(self, ids: np.ndarray, *, special: bool = False) -> np.ndarray | None:
        """Bytes per token of ids that a model wrote; None where they depend on the text.

        Args:
            ids: int32 [T].
            special: the text contains special tokens, and each counts the bytes of its name; else 0.
        """
        if self._byte_table is None:
            return None
        lengths = self._byte_table[ids]
        return lengths if special else np.where(np.isin(ids, self._special), 0, lengths).astype(np.uint16)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and names of the tokens that mark structure (<|im_end|>) and are not text."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _byte_table(tokenizer: Any) -> np.ndarray | None:
    """Bytes of each id of a byte-level BPE (one character of a token is one byte), uint16 [V]; None for other kinds."""
    if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
        return None
    table = np.zeros(len(tokenizer), np.uint16)
    for token, number in tokenizer.get_vocab().items():
        table[number] = len(token)
    for number, added in tokenizer.added_tokens_decoder.items():
        table[number] = len(added.content.encode())
    return table


def _lengths_from_begins(text: str, begins: np.ndarray) -> np.ndarray:
    """Bytes per token from the character where each begins; a character that tokens share goes to the last of them."""
    widths = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    per_char = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    byte_at = np.concatenate(([0], np.cumsum(per_char)))
    edges = np.concatenate((byte_at[begins], [byte_at[-1]]))
    if len(begins):
        edges[0] = 0
    return np.diff(np.maximum.accumulate(edges)).astype(np.uint16)
