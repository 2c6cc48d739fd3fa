"""Tokenizers are compared by the token of each id, whatever else is in their files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

import kdata
from kdata.errors import MismatchError
from kdata.store.tokens import read_tokenizer, tokenizer_hash
from kdata.store.vocabulary import Vocabulary, num_ids, refuse_other_ids
from kdata.teachers.model import load_tokenizer, tokenizer_info
from tests.fakes import save_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Vocabulary:
    """A tokenizer whose JSON was changed."""
    other = Path(shutil.copytree(folder, folder.parent / "changed"))
    state = json.loads((other / "tokenizer.json").read_text())
    change(state)
    (other / "tokenizer.json").write_text(json.dumps(state))
    return Vocabulary.of_model("other", load_tokenizer(other))


def own(folder: Path) -> Vocabulary:
    return Vocabulary.of_model("own", load_tokenizer(folder))


def swap(state: dict[str, Any], first: int, second: int) -> None:
    """Give two tokens each other's id."""
    vocab = state["model"]["vocab"]
    names = {number: token for token, number in vocab.items()}
    vocab[names[first]], vocab[names[second]] = second, first


def test_other_files_with_the_same_ids_are_the_same(folder: Path) -> None:
    def post_processor(state: dict[str, Any]) -> None:
        state["post_processor"] = None

    def flag(state: dict[str, Any]) -> None:
        state["added_tokens"][0]["lstrip"] = not state["added_tokens"][0]["lstrip"]

    def normalizer(state: dict[str, Any]) -> None:
        state["normalizer"] = {"type": "NFC"}

    for change in (post_processor, flag, normalizer):
        other = changed(folder, change)
        assert other.hash != own(folder).hash
        refuse_other_ids(own(folder), other, "-")
        shutil.rmtree(folder.parent / "changed")


def test_a_further_added_token_on_one_side_is_no_difference(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    larger = Vocabulary.of_model("larger", tokenizer)
    refuse_other_ids(own(folder), larger, "-")
    refuse_other_ids(larger, own(folder), "-")
    other = load_tokenizer(folder)
    other.add_tokens([AddedToken("[OTHER]")])
    with pytest.raises(MismatchError, match=r"id 300 is '\[PAD\]' in one and '\[OTHER\]' in the other"):
        refuse_other_ids(larger, Vocabulary.of_model("other", other), "-")


def test_two_ids_that_changed_places_are_refused(folder: Path) -> None:
    other = changed(folder, lambda state: swap(state, 40, 41))
    with pytest.raises(
        MismatchError, match=r"^the tokenizers of own \(\w+\) and other \(\w+\) are not .* id 40 is .*; ask$"
    ):
        refuse_other_ids(own(folder), other, "ask")


def test_a_token_that_one_of_them_lacks_is_refused(folder: Path) -> None:
    def without_the_last_merge(state: dict[str, Any]) -> None:
        token = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
        del state["model"]["vocab"][token]
        state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) != token]

    other = changed(folder, without_the_last_merge)
    for pair in ((own(folder), other), (other, own(folder))):
        with pytest.raises(MismatchError, match="only one has a token of id 299"):
            refuse_other_ids(*pair, "-")


def test_what_is_not_known_is_refused(folder: Path, captured: Path) -> None:
    first = own(folder)
    with pytest.raises(MismatchError, match=r"of imported is not known .*--tokenizer FOLDER"):
        refuse_other_ids(first, Vocabulary("imported", "unknown", None), "-")
    refuse_other_ids(first, Vocabulary("hash only", first.hash, None), "-")
    with pytest.raises(MismatchError, match=r"hash only carries no tokenizer\.json"):
        refuse_other_ids(first, Vocabulary("hash only", "0" * 64, None), "-")


def test_a_dataset_s_vocabulary_is_that_of_its_own_copy(captured: Path) -> None:
    dataset = kdata.open(captured)
    vocabulary = Vocabulary.of_dataset(dataset)
    assert vocabulary.tokenizer is not None and tokenizer_hash(vocabulary.tokenizer) == dataset.info.tokenizer.hash
    assert tokenizer_info(load_tokenizer(captured / "tokenizer")).hash == vocabulary.hash


def test_the_number_of_ids_counts_those_that_are_left_out(folder: Path) -> None:
    assert num_ids(read_tokenizer(folder / "tokenizer.json")) == 300

    def moved(state: dict[str, Any]) -> None:
        token = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
        state["model"]["vocab"][token] = 350

    other = changed(folder, moved)
    assert other.tokenizer is not None and num_ids(other.tokenizer) == 351
