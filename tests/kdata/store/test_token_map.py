"""Ids as another tokenizer's ids: by bytes, one id for each, whatever the kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from kdata.store.token_map import Beginnings, TokenMap, TokenMapper, token_bytes_of, token_map
from tests.tokenizers_of_kinds import bpe_tokenizer, byte_tokenizer, sentence_tokenizer


@pytest.fixture(scope="module")
def teacher(tokenizer_dir: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tokenizer_dir).backend_tokenizer


def test_the_bytes_of_a_token_are_those_it_stands_for_in_a_text(teacher: Tokenizer) -> None:
    contents = token_bytes_of(teacher)
    text = "the quick 🙂 brown fox; naïve Ünïcode"
    assert b"".join(contents[n] or b"?" for n in teacher.encode(text, add_special_tokens=False).ids) == text.encode()
    assert contents[teacher.token_to_id("<s>")] is None


def test_of_a_tokenizer_with_a_sign_for_spaces() -> None:
    backend = sentence_tokenizer(["the cat sat on the mat", "a dog"]).backend_tokenizer
    contents = token_bytes_of(backend)
    by_name = {name: contents[number] for name, number in backend.get_vocab().items()}
    assert by_name["▁the"] == b" the" and by_name["<0xE2>"] == b"\xe2" and by_name["</s>"] is None


def map_of(student: Tokenizer, kind: TokenMap, teacher: Tokenizer, size: int) -> np.ndarray:
    return token_map(TokenMapper(student, kind), teacher, size)


def test_each_id_becomes_the_first_byte_of_its_text(teacher: Tokenizer) -> None:
    bytes_ = byte_tokenizer().backend_tokenizer
    theirs, own = token_bytes_of(teacher), token_bytes_of(bytes_)
    mapped = map_of(bytes_, "prefix", teacher, len(theirs))
    for content, number in zip(theirs, mapped.tolist(), strict=True):
        assert (number == -1) == (content is None)
        assert content is None or own[number] == content[:1]


def test_exact_keeps_equal_tokens_alone(teacher: Tokenizer) -> None:
    other = sentence_tokenizer(["the cat sat on the mat", "a dog"]).backend_tokenizer
    theirs, own = token_bytes_of(teacher), token_bytes_of(other)
    exact, prefix = (map_of(other, kind, teacher, len(theirs)) for kind in ("exact", "prefix"))
    shared = {content for content in theirs if content} & {content for content in own if content}
    assert shared and {theirs[n] for n in range(len(theirs)) if exact[n] >= 0} == shared
    for number, content in enumerate(theirs):
        if exact[number] >= 0:
            assert own[exact[number]] == content and prefix[number] == exact[number]
        elif content is not None and prefix[number] >= 0:
            assert content.startswith(own[prefix[number]] or b"?")


def test_a_text_is_cut_as_the_student_cuts_it_and_not_at_its_longest_token() -> None:
    """Merges say a+b first, then c+d; `abc` is a token that they never make of `abcd`."""
    alphabet = {sign: n for n, sign in enumerate("abcd")}
    vocab = {**alphabet, "ab": 4, "cd": 5, "bc": 6, "abc": 7}
    student = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("c", "d"), ("b", "c"), ("a", "bc")]))
    student.pre_tokenizer, student.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    teacher = Tokenizer(models.BPE(vocab={"a": 0, "abcd": 1, "zz": 2}, merges=[]))
    teacher.decoder = decoders.ByteLevel()
    assert map_of(student, "prefix", teacher, 3).tolist() == [0, 4, -1]  # nothing begins with z
    assert map_of(student, "exact", teacher, 3).tolist() == [0, -1, -1]


def test_ids_without_a_token_have_none(teacher: Tokenizer) -> None:
    """A head may be larger than its tokenizer."""
    mapped = map_of(byte_tokenizer().backend_tokenizer, "prefix", teacher, len(token_bytes_of(teacher)) + 20)
    assert (mapped[-20:] == -1).all()
    assert json.loads(teacher.to_str())["model"]["type"] == "BPE"


def test_a_token_that_only_looks_like_a_byte_is_its_text() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<0xZZ>": 0, "<0x4f>": 1, "<0x4F>": 2}, merges=[]))
    tokenizer.decoder = decoders.ByteFallback()
    assert token_bytes_of(tokenizer) == [b"<0xZZ>", b"O", b"O"]
    tokenizer.decoder = decoders.Fuse()  # it has no such tokens
    assert token_bytes_of(tokenizer)[2] == b"<0x4F>"


@pytest.mark.parametrize("kind", ["sentence", "phrases", "bytes"])
def test_a_token_becomes_what_begins_its_text_inside_a_text(teacher: Tokenizer, kind: str) -> None:
    """The student's own cut of the same characters behind another word, where it cuts before them."""
    lines = ["the cat sat on the mat, and information for the others", "a dog; naïve café"]
    makers = {"sentence": sentence_tokenizer, "phrases": bpe_tokenizer, "bytes": lambda _: byte_tokenizer()}
    student = makers[kind](lines).backend_tokenizer
    theirs, own = token_bytes_of(teacher), token_bytes_of(student)
    mapped, seen = map_of(student, "prefix", teacher, len(theirs)), 0
    lead = student.encode("zq", add_special_tokens=False).ids
    for number, content in enumerate(theirs):
        text = (content or b"\xff").decode(errors="replace")
        cut = student.encode(f"zq{text}", add_special_tokens=False).ids
        if "\ufffd" in text or cut[: len(lead)] != lead:
            continue
        assert own[mapped[number]] == own[cut[len(lead)]], (content, own[mapped[number]])
        seen += 1
    assert seen > 150


@given(st.lists(st.one_of(st.none(), st.binary(max_size=4)), max_size=20), st.binary(min_size=1, max_size=3))
@example([b"a\xff", b"a\xff\xff", b"b", b"a", None, b""], b"a\xff")
@example([b"\xff", b"\xfe\xff", b"\xff\xff", b"\xff\x00"], b"\xff")
def test_tokens_that_begin_with_some_bytes(contents: list[bytes | None], begin: bytes) -> None:
    beginnings = Beginnings(contents)
    first, stop = beginnings.span(begin)
    places = beginnings.places_of(np.arange(len(contents) + 2))
    assert [first <= place < stop for place in places.tolist()] == [
        bool(content) and (content or b"").startswith(begin) for content in [*contents, None, None]
    ]
    assert beginnings.size_V.tolist() == [len(content or b"") for content in contents]
