"""Whether ids mean the same tokens in two tokenizers.

Tokenizers are compared by the token that each id stands for, not by their files. Stored ids keep their meaning where another
tokenizer has another post-processor, other flags of an added token, or further tokens that the data does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdata.errors import MismatchError
from kdata.store.dataset import Dataset
from kdata.store.tokens import read_tokenizer, tokenizer_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer


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
