"""What token ids mean: as readable text, and whether they mean the same in two tokenizers.

Two tokenizers are compared by the token that each id stands for, not by their files. Stored ids keep their meaning where
another tokenizer has another post-processor, other flags of an added token, or further tokens that the data does not use.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdata.errors import DependencyError, MismatchError, MissingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kdata.store.dataset import Dataset


def read_tokenizer(file: Path) -> Tokenizer:
    """Read tokenizer.json. Raises DependencyError without the package tokenizers."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise DependencyError(
            "reading a tokenizer needs the package tokenizers: pip install tokenizers (kdata[train] brings it too)"
        ) from error
    return Tokenizer.from_file(str(file))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) of a tokenizer's JSON without truncation and padding: the hash that datasets store."""
    state = json.loads(tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return hashlib.sha256(json.dumps(state, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id that a token has. (The number of tokens is less where ids are left out.)"""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


@dataclass(frozen=True)
class Vocabulary:
    """What ids stand for: whose (for messages), the tokenizer's stored hash, and the tokenizer where it is at hand."""

    owner: str
    hash: str
    tokenizer: Tokenizer | None

    @classmethod
    def of_dataset(cls, dataset: Dataset) -> Vocabulary:
        """That of a dataset, by its own copy of the tokenizer."""
        folder = dataset.tokenizer_dir
        file = None if folder is None else folder / "tokenizer.json"
        own = read_tokenizer(file) if file is not None and file.is_file() else None
        return cls(str(dataset.place), dataset.info.tokenizer.hash, own)

    @classmethod
    def of_model(cls, owner: str, tokenizer: Any) -> Vocabulary:
        """That of a model, by its fast tokenizer of transformers."""
        return cls(owner, tokenizer_hash(tokenizer.backend_tokenizer), tokenizer.backend_tokenizer)

    @property
    def tokens(self) -> dict[int, str]:
        """The token of each id, added tokens included."""
        assert self.tokenizer is not None
        return {number: token for token, number in self.tokenizer.get_vocab(with_added_tokens=True).items()}

    @property
    def added(self) -> set[int]:
        """Ids of added tokens."""
        assert self.tokenizer is not None
        return set(self.tokenizer.get_added_tokens_decoder())


def refuse_other_ids(first: Vocabulary, second: Vocabulary, remedy: str) -> None:
    """Raise MismatchError unless ids mean the same tokens in both.

    Every id that both have is one token, and what only one of them has are tokens that were added to it.
    """
    for one in (first, second):
        if one.hash == "unknown":
            raise MismatchError(
                f"the tokenizer of {one.owner} is not known (it was imported without), so that nobody can say whether "
                "its ids mean the same; import it again with --tokenizer FOLDER"
            )
    if first.hash == second.hash:
        return
    names = f"the tokenizers of {first.owner} ({first.hash[:12]}) and {second.owner} ({second.hash[:12]})"
    for one in (first, second):
        if one.tokenizer is None:
            raise MismatchError(
                f"{names} differ, and {one.owner} carries no tokenizer.json whose ids could be compared; {remedy}"
            )
    ours, theirs = first.tokens, second.tokens
    for number in sorted(ours.keys() & theirs.keys()):
        if ours[number] != theirs[number]:
            raise MismatchError(
                f"{names} are not the same: id {number} is {ours[number]!r} in one and {theirs[number]!r} in the other, so "
                f"stored ids would mean other tokens; {remedy}"
            )
    lacking = (ours.keys() - theirs.keys() - first.added) | (theirs.keys() - ours.keys() - second.added)
    if lacking:
        token = ours.get(min(lacking), theirs.get(min(lacking)))
        raise MismatchError(
            f"{names} are not the same: only one has a token of id {min(lacking)} ({token!r}); {remedy}"
        )


class TokenText:
    """The text of tokens.

    Args:
        folder: the dataset's tokenizer/, or None where it carries none.
        place: the dataset, for messages.
    """

    def __init__(self, folder: Path | None, place: Path) -> None:
        self._folder, self._place = folder, place

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        file = None if self._folder is None else self._folder / "tokenizer.json"
        if file is None or not file.is_file():
            raise MissingError(
                f"{self._place} has no tokenizer/tokenizer.json, so its tokens cannot be shown as text; use token_ids"
            )
        return read_tokenizer(file)

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
        return decoder.decode(["a", token]).removeprefix(decoder.decode(["a"]))

    def of_ids(self, token_ids: np.ndarray) -> list[str]:
        """`of_id` of each of token_ids int [T]."""
        return [self.of_id(token_id) for token_id in token_ids.tolist()]

    def in_text(self, token_ids: np.ndarray, text: str | None, token_bytes: np.ndarray | None) -> list[str]:
        """The piece of the text that each token stands for; by `of_id` for tokens that are not in the text.

        Args:
            token_ids: int32 [T].
            text: what they were made from; None where it is not stored.
            token_bytes: uint16 [T], bytes of the text's UTF-8 per token; None where it is not stored.
        """
        content = b"" if text is None else text.encode()
        if token_bytes is None or int(token_bytes.sum(dtype=np.int64)) != len(content):
            return self.of_ids(token_ids)
        ends = np.cumsum(token_bytes, dtype=np.int64)
        return [
            content[end - size : end].decode(errors="replace") if size else self.of_id(token_id)
            for token_id, size, end in zip(token_ids.tolist(), token_bytes.tolist(), ends.tolist(), strict=True)
        ]
