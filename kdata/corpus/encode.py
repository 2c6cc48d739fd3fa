"""Text to token ids, and how many bytes of the text each token stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from kdata.errors import ConfigError
from kdata.format.records import RowError
from kdata.store.vocabulary import num_ids

SpecialTokensInText = Literal["keep", "split", "reject"]

MOST_BYTES = int(np.iinfo(np.uint16).max)  # of one token, as the payload stores them
# Characters that Unicode reserves for a program's own use. OPEN and CLOSE enclose a special token that stays one; GUARD
# stands inside the name of one that is text.
OPEN, CLOSE, GUARD = "\ufdd0", "\ufdd1", "\ufdd2"


@dataclass
class EncodingNotes:
    """What a run says of special tokens, in numbers of rows."""

    start_added: int = 0
    start_there: int = 0
    start_missing: int = 0
    end_added: int = 0
    end_there: int = 0
    spelled: int = 0

    def lines(self, prefix: str, suffix: str, mode: SpecialTokensInText) -> list[str]:
        """One line for each kind of special token that there is anything to say of.

        Args:
            prefix, suffix: names of the tokens that the tokenizer puts around a text.
            mode: what happens to names of special tokens in a text.
        """
        said = []
        for name, place, added, there in (
            (prefix, "before", self.start_added, self.start_there),
            (suffix, "behind", self.end_added, self.end_there),
        ):
            if name and (there or added):
                had = f"; {there:,} had it already" if there else ""
                said.append(f"{name} was put {place} {_rows(added)}, as the tokenizer does{had}")
        if self.start_missing:
            said.append(f"the chat template writes no {prefix} before {_rows(self.start_missing)}; none was added")
        if self.spelled:
            outcome = {
                "keep": "read as these tokens (keep)",
                "split": "read as plain text (split)",
                "reject": "rejected (reject)",
            }[mode]
            verb = "spells" if self.spelled == 1 else "spell"
            said.append(
                f"{_rows(self.spelled)} {verb} out special tokens, {outcome}; the setting is special_tokens_in_text"
            )
        return said


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


class TextEncoder:
    """Text to token ids, and how many bytes of the text each token stands for.

    Args:
        tokenizer: a fast tokenizer.
        vocab_size: rows of the teacher's head: a text with a larger id is refused. None: any id.
        special_tokens_in_text: what the name of a special token in a text is: that token (keep), plain text (split), or a
            reason to refuse the text (reject).
    Raises:
        RowError: by every method that encodes, where the text cannot be used; `reason` is special_tokens, vocabulary or
            token_bytes.
    """

    def __init__(
        self, tokenizer: Any, *, vocab_size: int | None = None, special_tokens_in_text: SpecialTokensInText = "keep"
    ) -> None:
        self._tokenizer, self._vocab_size, self.mode = tokenizer, vocab_size, special_tokens_in_text
        probe = tokenizer("a", return_special_tokens_mask=True)
        mask = np.array(probe["special_tokens_mask"], bool)
        ids = np.array(probe["input_ids"], np.int32)
        plain = np.flatnonzero(~mask)
        self.prefix, self.suffix = ids[: plain[0]], ids[plain[-1] + 1 :]
        self._byte_table = _byte_table(tokenizer)
        names = special_tokens(tokenizer)
        self._special = np.array(sorted({*names, *tokenizer.all_special_ids}), np.int64)
        self._spelled = _any_of(names.values())
        self.notes = EncodingNotes()

    @property
    def num_special(self) -> int:
        """Number of special tokens that the tokenizer puts around a text."""
        return len(self.prefix) + len(self.suffix)

    def note_lines(self) -> list[str]:
        """What is to be said of the special tokens of all texts so far."""
        prefix, suffix = (
            "".join(self._tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in (self.prefix, self.suffix)
        )
        return self.notes.lines(prefix, suffix, self.mode)

    def pieces(self, text: str, limit: int, *, end: int | None = None) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Encode a text, split at token borders so that no piece exceeds `limit` tokens, special ones included.

        The tokens that the tokenizer puts around a text stand around each piece, once where the text has them already. No
        piece has a single token, unless the text or the limit leaves no other way.

        Args:
            limit: at least `num_special` + 2.
            end: id of a token that must end the text; one place in every piece is kept free for it.
        Returns:
            One (text, token ids int32 [T], bytes per token uint16 [T]) per piece; the texts join to the whole.
        """
        ids, begins = self._encode_text(text)
        starts = self._spells(text, ids[: len(self.prefix)], begins, self.prefix)
        last = len(ids) - len(self.suffix)
        ends = last >= 0 and self._spells(text, ids[last:], begins[last:], self.suffix)
        self._note(starts, ends)
        room = limit - self.num_special - (end is not None)
        head = room + (len(self.prefix) if starts else 0)
        tail = room + (len(self.suffix) if ends else 0)
        closing = (0 if ends else len(self.suffix)) + (end is not None)
        borders = [0, *_cuts(len(ids), head, room, tail, len(self.prefix) + closing), len(ids)]
        cuts = [0, *(int(begins[border]) for border in borders[1:-1]), len(text)]
        final = len(borders) - 2
        pieces = [
            self._piece(
                text[cuts[n] : cuts[n + 1]], ids[a:b], begins[a:b] - cuts[n],
                opened=starts and n == 0, closed=ends and n == final,
            )
            for n, (a, b) in enumerate(pairwise(borders))
        ]  # fmt: skip
        if end is not None and (len(pieces[-1][1]) == 0 or pieces[-1][1][-1] != end):
            content, token_ids, token_bytes = pieces[-1]
            pieces[-1] = content, np.append(token_ids, np.int32(end)), np.append(token_bytes, np.uint16(0))
        return pieces

    def prompt(self, text: str) -> np.ndarray:
        """Token ids int32 [T] of a text that is to be continued: with what the tokenizer puts before it, once."""
        ids, begins = self._encode_text(text)
        starts = self._spells(text, ids[: len(self.prefix)], begins, self.prefix)
        self._note(starts, None)
        return ids if starts else np.concatenate([self.prefix, ids])

    def literal(self, text: str, plain: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Encode a text that contains its special tokens, as a rendered chat does; none are added.

        Args:
            plain: the same text with GUARD inside each name of a special token that is plain text; None: there is none.
        Returns:
            Token ids int32 [T] and bytes per token uint16 [T], where special tokens count the bytes of their names. The bytes
            sum to those of the text, so the running sum says exactly where each token begins.
        """
        ids, begins = self._encode(text) if plain is None else self._encode_spelled(plain)
        if len(self.prefix):
            there = self._spells(text, ids[: len(self.prefix)], begins, self.prefix)
            self.notes.start_there += there
            self.notes.start_missing += not there
        return ids, self._lengths(text, ids, begins)

    def spells_special_tokens(self, text: str) -> bool:
        """Whether a text holds the name of a special token."""
        return self._spelled is not None and self._spelled.search(text) is not None

    def guarded(self, text: str) -> str:
        """The text with GUARD inside each name of a special token. Raises RowError where it holds a reserved character."""
        if any(sign in text for sign in (OPEN, CLOSE, GUARD)):
            raise RowError(
                "special_tokens",
                "the row spells out special tokens and holds U+FDD0, U+FDD1 or U+FDD2, which are reserved",
            )
        return text if self._spelled is None else self._spelled.sub(_broken, text)

    def note_spelled(self) -> None:
        """Count a row that holds names of special tokens. Raises RowError where such a row is refused."""
        self.notes.spelled += 1
        if self.mode == "reject":
            raise RowError(
                "special_tokens", "the text spells out special tokens of the tokenizer (special_tokens_in_text: reject)"
            )

    def _spells(self, text: str, ids: np.ndarray, begins: np.ndarray, tokens: np.ndarray) -> bool:
        """Whether these ids are those tokens because the text has their names there, and not as the ids of unknown text."""
        if len(tokens) == 0 or not np.array_equal(ids, tokens):
            return False
        names = self._tokenizer.convert_ids_to_tokens(tokens.tolist())
        return all(text[begin:].lstrip().startswith(name) for name, begin in zip(names, begins.tolist(), strict=False))

    def _note(self, starts: bool, ends: bool | None) -> None:
        if len(self.prefix):
            self.notes.start_there += starts
            self.notes.start_added += not starts
        if len(self.suffix) and ends is not None:
            self.notes.end_there += ends
            self.notes.end_added += not ends

    def _encode_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text of the corpus, in which names of special tokens are what the setting says; see `_encode`."""
        if not self.spells_special_tokens(text):
            return self._encode(text)
        self.note_spelled()
        return self._encode_spelled(self.guarded(text)) if self.mode == "split" else self._encode(text)

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [T], and the character where each begins, int64 [T]."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
        return self._checked(np.array(encoded["input_ids"], np.int32)), begins

    def _encode_spelled(self, guarded: str) -> tuple[np.ndarray, np.ndarray]:
        """As `_encode`, of the text without GUARD; special tokens with a GUARD inside are plain text."""
        assert self._spelled is not None
        # Parts of the text that is encoded, and the place of each of their characters in the plain text.
        parts, places, at = list[str](), list[np.ndarray](), 0
        for part, is_token in _parts(guarded, self._spelled):
            plain = part.replace(GUARD, "")
            parts.append(_wrapped(plain) if is_token else plain)
            places.append(np.full(len(parts[-1]), at) if is_token else np.arange(at, at + len(plain)))
            at += len(plain)
        encoding = self._plain_tokenizer.encode("".join(parts), add_special_tokens=False)
        where = np.concatenate([*places, [at]]).astype(np.int64)
        begins = where[np.array([begin for begin, _ in encoding.offsets], np.int64)]
        return self._checked(np.array(encoding.ids, np.int32)), begins

    @cached_property
    def _plain_tokenizer(self) -> Any:
        return tokenizer_of_wrapped_names(self._tokenizer)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        if self._vocab_size is not None and len(ids) and int(ids.max()) >= self._vocab_size:
            raise RowError(
                "vocabulary", f"token id {int(ids.max())} is outside the teacher's head of {self._vocab_size:,} rows"
            )
        return ids

    def _lengths(self, text: str, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Bytes per token, uint16 [T]: what the tokens spell where that is the text, else from where they begin."""
        lengths = None if self._byte_table is None else self._byte_table[ids]
        if lengths is None or int(lengths.sum(dtype=np.int64)) != len(text.encode()):
            lengths = _lengths_from_begins(text, begins)
        longest = int(lengths.max(initial=0))
        if longest > MOST_BYTES:
            raise RowError(
                "token_bytes",
                f"one token stands for {longest:,} bytes of the text; at most {MOST_BYTES:,} can be stored",
            )
        return lengths.astype(np.uint16)

    def _piece(
        self, text: str, ids: np.ndarray, begins: np.ndarray, *, opened: bool, closed: bool
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """A piece of a text; opened, closed: it has what the tokenizer puts before and behind it."""
        prefix, suffix = self.prefix[: 0 if opened else None], self.suffix[: 0 if closed else None]
        whole = np.concatenate([prefix, ids, suffix])
        padded = np.zeros(len(whole), np.uint16)
        padded[len(prefix) : len(prefix) + len(ids)] = self._lengths(text, ids, begins)
        return text, whole, padded

    def byte_lengths(self, ids: np.ndarray, *, special: bool = False) -> np.ndarray | None:
        """Bytes per token of ids that a model wrote; None where they depend on the text.

        Args:
            ids: int32 [T]; an id that the tokenizer lacks has 0 bytes.
            special: the text contains special tokens, and each counts the bytes of its name; else 0.
        """
        if self._byte_table is None:
            return None
        known = ids < len(self._byte_table)
        lengths = np.where(known, self._byte_table[np.where(known, ids, 0)], 0)
        lengths = lengths if special else np.where(np.isin(ids, self._special), 0, lengths)
        return lengths.astype(np.uint16) if int(lengths.max(initial=0)) <= MOST_BYTES else None


def _cuts(count: int, first: int, room: int, last: int, beside: int) -> list[int]:
    """Where to cut `count` tokens into pieces of `room`.

    Args:
        first, last: room in the first piece, and in the last one.
        beside: further tokens of the last piece. Where they and one token would be a single token, the piece before gives it
            one of its own.
    """
    whole = first + last - room  # room of a piece that is first and last
    if count <= whole:
        return []
    cuts = [first]
    while count - cuts[-1] > last:
        cuts.append(cuts[-1] + room)
    before = cuts[-1] - (cuts[-2] if len(cuts) > 1 else 0)
    if beside + count - cuts[-1] < 2 and before > 2:
        cuts[-1] -= 1
    return cuts


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and names of the tokens that mark structure (<|im_end|>) and are not text."""
    return {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def _any_of(names: Any) -> re.Pattern[str] | None:
    """A pattern for any of these names, the longest one where several fit."""
    ordered = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _broken(match: re.Match[str]) -> str:
    return "".join(sign + GUARD for sign in match[0])


def _parts(text: str, names: re.Pattern[str]) -> Iterator[tuple[str, bool]]:
    """A text cut at the names that the pattern matches and that no GUARD breaks, and whether a part is one of them."""
    at = 0
    for match in re.finditer(f"(?:{names.pattern})(?!{GUARD})", text):
        if match.start() > at:
            yield text[at : match.start()], False
        yield match[0], True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def _wrapped(name: str) -> str:
    return f"{OPEN}{name}{CLOSE}"


def tokenizer_of_wrapped_names(tokenizer: Any) -> Any:
    """A tokenizer with the same ids, whose special tokens have other names: OPEN NAME CLOSE.

    In it the plain name is text like any other, even where the model's vocabulary lists it.

    Returns:
        A `tokenizers.Tokenizer`.
    Raises:
        ConfigError: its ids are not the same, because the tokenizer is of a kind that this cannot be done with.
    """
    from tokenizers import Tokenizer

    names = special_tokens(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    rename = _renaming(set(names.values()))
    for token in state["added_tokens"]:
        token["content"] = rename(token["content"]) if token["special"] else token["content"]
    model = state["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {rename(name): number for name, number in vocab.items()}
    elif vocab:
        model["vocab"] = [[rename(name), score] for name, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = rename(model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(state))
    if any(copy.token_to_id(_wrapped(name)) != number for number, name in names.items()):
        raise ConfigError(
            "special_tokens_in_text: split is not possible with this tokenizer, because its special tokens cannot be "
            "renamed; take keep or reject"
        )
    return copy


def _renaming(names: set[str]) -> Callable[[str], str]:
    return lambda name: _wrapped(name) if name in names else name


def _byte_table(tokenizer: Any) -> np.ndarray | None:
    """Bytes of each id of a byte-level BPE (one character of a token is one byte), int64 [ids]; None for other kinds."""
    if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
        return None
    table = np.zeros(num_ids(tokenizer.backend_tokenizer), np.int64)
    for token, number in tokenizer.get_vocab().items():
        table[number] = len(token)
    for number, token in tokenizer.added_tokens_decoder.items():
        table[number] = len(token.content.encode())
    return table


def _lengths_from_begins(text: str, begins: np.ndarray) -> np.ndarray:
    """Bytes per token, int64 [T], from the character where each begins; a character that tokens share goes to the last."""
    widths = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    per_char = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    byte_at = np.concatenate(([0], np.cumsum(per_char)))
    edges = np.concatenate((byte_at[begins], [byte_at[-1]]))
    if len(begins):
        edges[0] = 0
    return np.diff(np.maximum.accumulate(edges)).astype(np.int64)
