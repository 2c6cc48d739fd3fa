"""Token ids as readable text, by the tokenizer files that a dataset carries."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kdata.errors import CorruptError, DependencyError, KdataError, MissingError, first_line
from kdata.format.json_text import MAX_TOKENIZER_BYTES, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_IDS = 1 << 24  # the largest vocabularies have 2^18
REPLACED = "\ufffd"  # what a decoder writes for a part of a character
MOST_JOINED = (
    8  # tokens that are joined to whole characters: a character has four bytes, and a token may hold parts of two
)
LONG_NUMBER = re.compile(rb"[:,\[]\s*[1-9][0-9]{7}")


def read_tokenizer(file: Path) -> Tokenizer:
    """Read tokenizer.json.

    Raises:
        CorruptError: it is not the JSON of a tokenizer.
        DependencyError: the package tokenizers is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise DependencyError(
            "reading a tokenizer needs the package tokenizers: pip install tokenizers (kdata[train] brings it too)"
        ) from error
    try:
        refuse_far_ids_of(file)
        read_json(file, MAX_TOKENIZER_BYTES, finite=False)
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself, of no further kind
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | TypeError):
            raise
        reason = first_line(error)
        raise CorruptError(f"{file} is not a tokenizer ({reason}); copy it again from the model") from error
    refuse_far_ids(tokenizer, file)
    return tokenizer


def refuse_far_ids_of(file: Path) -> None:
    """The same of tokenizer.json, before the library reads it: where memory is short, that alone ends the process.

    A file without a number of eight digits, which is every usual one, is not parsed for this. One that cannot be parsed is
    for the library to refuse.
    """
    if not file.is_file() or file.stat().st_size > MAX_TOKENIZER_BYTES or not LONG_NUMBER.search(file.read_bytes()):
        return
    try:
        content: Any = read_json(file, MAX_TOKENIZER_BYTES, finite=False)
        vocab = content["model"]["vocab"]
        ids = [*vocab.values()] if isinstance(vocab, dict) else []
        ids += [token["id"] for token in content.get("added_tokens") or ()]
        highest = max((number for number in ids if isinstance(number, int)), default=0)
    except (KdataError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    _refuse_far_id(highest, file)


def refuse_far_ids(tokenizer: Tokenizer, place: Path | str) -> None:
    """Raise CorruptError where an id is so high that the library, which reserves memory up to it, could end the process."""
    _refuse_far_id(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0), place)


def _refuse_far_id(highest: int, place: Path | str) -> None:
    if highest >= MAX_IDS:
        raise CorruptError(
            f"the tokenizer of {place} has a token with the id {highest:,}; kdata reads ids below {MAX_IDS:,}: copy it "
            "again from the model"
        )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of a tokenizer's JSON without truncation and padding: the hash that datasets store.

    Raises CorruptError as `refuse_far_ids`.
    """
    refuse_far_ids(tokenizer, "the model")
    state = json.loads(tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TokenText:
    """The text of tokens.

    Args:
        folder: the dataset's tokenizer/, or None where it carries none.
        place: the dataset, for messages.
    """

    def __init__(self, folder: Path | None, place: Path) -> None:
        self._folder, self._place = folder, place
        self._texts: dict[int, str] = {}  # of the ids that `column` has shown

    @property
    def is_there(self) -> bool:
        """Whether the dataset carries a tokenizer."""
        return self._folder is not None and (self._folder / "tokenizer.json").is_file()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self._folder is None or not self.is_there:
            raise MissingError(
                f"{self._place} has no tokenizer/tokenizer.json, so its tokens cannot be shown as text; use token_ids"
            )
        return read_tokenizer(self._folder / "tokenizer.json")

    @cached_property
    def _added(self) -> dict[int, str]:
        return {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}

    def of_id(self, token_id: int) -> str:
        """One token as text, with the space before it where it has one.

        Where a token holds a part of a character only, that part reads as U+FFFD. An id without a token is "<ID>".

        Raises:
            MissingError: the dataset carries no tokenizer.
            DependencyError: the package tokenizers is not installed.
        """
        token = self._added.get(token_id) or self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"<{token_id}>"
        decoder = self._tokenizer.decoder
        if decoder is None or token_id in self._added:
            return token
        # Behind another token, since decoders drop the space at the start of a text.
        text: str = decoder.decode(["a", token]).removeprefix(decoder.decode(["a"]))
        return text

    def of_ids(self, token_ids: np.ndarray) -> list[str]:
        """`of_id` of each of token_ids int [T]."""
        return [self.of_id(token_id) for token_id in np.asarray(token_ids).tolist()]

    def column(self, token_ids: np.ndarray) -> pa.Array:
        """`of_id` of each of token_ids int32 [T], dictionary-encoded; null where the dataset carries no tokenizer.

        Raises DependencyError where the package tokenizers is not installed.
        """
        kind = pa.dictionary(pa.int32(), pa.string())
        if not self.is_there or not len(token_ids):
            return pa.nulls(len(token_ids), kind)
        occurs_V = np.zeros(int(token_ids.max()) + 1, bool)
        occurs_V[token_ids] = True
        distinct = np.flatnonzero(occurs_V)
        place_V = np.cumsum(occurs_V, dtype=np.int32) - 1
        for token_id in distinct.tolist():
            if token_id not in self._texts:
                self._texts[token_id] = self.of_id(token_id)
        texts = pa.array([self._texts[token_id] for token_id in distinct.tolist()], pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(place_V[token_ids], pa.int32()), texts)

    def in_text(self, token_ids: np.ndarray, text: str | None, token_bytes: np.ndarray | None) -> list[str]:
        """The piece of the text that each token stands for; by `of_id` for tokens that are not in the text.

        Args:
            token_ids: int32 [T].
            text: what they were made from; None where it is not stored.
            token_bytes: uint16 [T], bytes of the text's UTF-8 per token; None where it is not stored.
        """
        ends = _ends(text, token_bytes)
        if text is None or token_bytes is None or ends is None:
            return self.of_ids(token_ids)
        content = text.encode()
        return [
            content[end - size : end].decode(errors="replace") if size else self.of_id(token_id)
            for token_id, size, end in zip(token_ids.tolist(), token_bytes.tolist(), ends.tolist(), strict=True)
        ]

    def whole_in_text(self, token_ids: np.ndarray, text: str | None, token_bytes: np.ndarray | None) -> list[str]:
        """`in_text`, but a character that several tokens make is whole with the first of them; the others have "".

        Args: as `in_text`.
        """
        pieces, ends = self.in_text(token_ids, text, token_bytes), _ends(text, token_bytes)
        content = b"" if text is None else text.encode()
        begin = 0
        while begin < len(pieces):
            end = begin + 1
            if pieces[begin].endswith(REPLACED):
                for last in range(begin + 2, min(begin + MOST_JOINED, len(pieces)) + 1):
                    if ends is not None:
                        first = int(ends[begin - 1]) if begin else 0
                        joined = content[first : int(ends[last - 1])].decode(errors="replace")
                    else:
                        joined = self._joined(token_ids[begin:last].tolist())
                    if not joined or REPLACED in joined or not all(REPLACED in one for one in pieces[begin : last - 1]):
                        continue
                    # A long text that was cut gives a character's bytes to the last of its tokens.
                    if REPLACED in pieces[last - 1] or joined == self._joined(token_ids[begin:last].tolist()):
                        pieces[begin:last] = [joined, *[""] * (last - begin - 1)]
                        end = last
                        break
            begin = end
        return pieces

    def _joined(self, token_ids: list[int]) -> str:
        """Tokens as one text, as `of_id` has one of them."""
        tokens, decoder = [self._tokenizer.id_to_token(number) or "" for number in token_ids], self._tokenizer.decoder
        if decoder is None or any(number in self._added for number in token_ids):
            return REPLACED
        text: str = decoder.decode(["a", *tokens]).removeprefix(decoder.decode(["a"]))
        return text


def _ends(text: str | None, token_bytes: np.ndarray | None) -> np.ndarray | None:
    """Where each token ends in the UTF-8 of a text, int64 [T]; None where that is not known."""
    if text is None or token_bytes is None or int(token_bytes.sum(dtype=np.int64)) != len(text.encode()):
        return None
    return np.cumsum(token_bytes, dtype=np.int64)


class NumberText(TokenText):
    """Ids that are no tokens, such as ranks (`kdata retokenize --map ranks`): each is shown as its number."""

    @property
    def is_there(self) -> bool:
        """True: nothing is needed."""
        return True

    def of_id(self, token_id: int) -> str:
        """The id as "[ID]"."""
        return f"[{token_id}]"
