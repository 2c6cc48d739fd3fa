"""Text to ids at its edges: the last token of a context, special tokens in a text, ids and bytes that are out of range."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.corpus.encode import TextEncoder
from kdata.errors import ConfigError
from kdata.format.records import RowError
from kdata.teachers.model import load_tokenizer
from tests.fakes import VOCAB, StandInTeacher, run_capture, run_generate, save_tokenizer, write_jsonl

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
LONG = "the cat sat on the mat " * 40


def tokenizer_of(kind: str) -> Any:
    """A tokenizer of a kind that people use, with the special tokens <s>, </s> and <|end|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<|end|>"]
    lines = ["the cat sat on the mat <|end|> and the dog", "naïve café <s> x </s>", "a b c d e f g < > | / s end"] * 5
    backend: Any
    if kind in ("bpe", "bpe strips"):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=300, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token="<s>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=names, unk_token="<s>", show_progress=False)
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if kind == "bpe strips":
        backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: tokenizer_of(kind) for kind in ("bpe", "bpe strips", "wordpiece", "unigram")}


def with_frame(kind: str) -> Any:
    """A byte-level tokenizer that puts tokens around a text: none, bos, eos or both."""
    from tokenizers import processors

    tokenizer = tokenizer_of("bpe")
    single = {"none": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>"}[kind]
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.fixture(scope="module")
def framed() -> dict[str, TextEncoder]:
    return {kind: TextEncoder(with_frame(kind)) for kind in ("none", "bos", "eos", "both")}


# --------------------------------------------------------------------------------------------- the edge of the context


@given(
    frame=st.sampled_from(["none", "bos", "eos", "both"]),
    start=st.sampled_from(["", "<s>"]),
    text=TEXT,
    stop=st.sampled_from(["", "</s>"]),
    limit=st.integers(3, 20),
    end=st.sampled_from([None, 1]),
)
def test_pieces_lose_nothing_and_none_is_a_single_token(
    framed: dict[str, TextEncoder], frame: str, start: str, text: str, stop: str, limit: int, end: int | None
) -> None:
    encoder, text = framed[frame], start + text + stop
    limit = max(limit, encoder.num_special + 3 + (end is not None))
    pieces = encoder.pieces(text, limit, end=end)
    assert "".join(piece for piece, _, _ in pieces) == text
    plain = encoder.literal(text)[0].tolist()
    inner: list[int] = []
    for number, (piece, ids, lengths) in enumerate(pieces):
        assert len(ids) == len(lengths) <= limit and int(lengths.sum()) == len(piece.encode())
        own = ids.tolist()
        first, last = number == 0, number == len(pieces) - 1
        if len(encoder.prefix) and not (first and plain[:1] == [0]):
            assert own.pop(0) == 0
        ends_with_eos = plain[-1:] == [1]
        if (len(encoder.suffix) and not (last and ends_with_eos)) or (last and end is not None and not ends_with_eos):
            assert own.pop() == 1
        inner += own
        assert len(ids) > 1 or len(plain) < 2, "one token has nothing to predict"
    assert inner == plain
    whole = encoder.pieces(text, 10_000, end=end)
    assert len(whole) == 1
    size = len(whole[0][1])
    if size >= encoder.num_special + 3 + (end is not None) and end is None:
        [(_, exact, _)] = encoder.pieces(text, size)
        np.testing.assert_array_equal(exact, whole[0][1])
        assert len(encoder.pieces(text, size - 1)) == 2 or size - 1 < encoder.num_special + 3


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("over", [-1, 0, 1, 2, 64, 65])
def test_a_text_at_the_edge_of_the_context_is_read_in_whole(tmp_path: Path, bos: bool, over: int) -> None:
    """Every id of the text is in a row, in order; no row is rejected for having one token."""
    save_tokenizer(tmp_path / "t", bos=bos)
    tokenizer = load_tokenizer(tmp_path / "t")
    context, room = 64, 64 - bos
    ids = tokenizer(LONG, add_special_tokens=False)["input_ids"][: room + over]
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "a", "domain": "d", "text": text}])
    dataset = run_capture(tmp_path / "d", corpus, tmp_path / "t", teacher=StandInTeacher(context=context))
    assert not dataset.manifest[0].rejected
    rows = [sequence.token_ids.tolist() for sequence in dataset]
    assert [token for row in rows for token in row[bos:]] == ids and all(2 <= len(row) <= context for row in rows)
    assert len(rows) == 1 + (over > 0) + (over > room)
    names = dataset.index(["id"])["id"].to_pylist()
    assert names == (["a"] if over <= 0 else [f"a#{n}" for n in range(len(rows))])


# ------------------------------------------------------------------------------------- what begins and ends a text


@pytest.mark.parametrize(
    ("frame", "text", "wanted"),
    [
        ("both", "cat", "<s>cat</s>"),
        ("both", "<s>cat", "<s>cat</s>"),
        ("both", "<s>cat</s>", "<s>cat</s>"),
        ("both", "cat</s>", "<s>cat</s>"),
        ("bos", "<s>cat<s>", "<s>cat<s>"),
        ("none", "<s>cat", "<s>cat"),
        ("eos", "cat</s></s>", "cat</s></s>"),
    ],
)
def test_a_text_has_what_begins_and_ends_it_once(
    framed: dict[str, TextEncoder], frame: str, text: str, wanted: str
) -> None:
    tokenizer = with_frame("none")
    [(piece, ids, lengths)] = framed[frame].pieces(text, 100)
    assert piece == text and ids.tolist() == tokenizer(wanted)["input_ids"] and int(lengths.sum()) == len(text)
    before = wanted if frame == "none" or text.startswith("<s>") else "<s>" + text
    if frame in ("bos", "none"):
        assert framed[frame].prompt(text).tolist() == tokenizer(before)["input_ids"]


def test_an_end_that_is_asked_for_is_there_once(framed: dict[str, TextEncoder]) -> None:
    for frame, text in (("none", "cat"), ("none", "cat</s>"), ("eos", "cat"), ("both", "cat</s>")):
        [(_, ids, _)] = framed[frame].pieces(text, 100, end=1)
        assert ids.tolist().count(1) == 1 and ids[-1] == 1


def test_one_line_says_what_was_put_around_the_texts(
    tmp_path: Path, jsonl: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = with_frame("both")
    tokenizer.save_pretrained(tmp_path / "t")
    rows = [
        {"id": str(n), "domain": "d", "text": text} for n, text in enumerate(["<s>the cat</s>", "the dog", "a cat"])
    ]
    run_capture(tmp_path / "d", jsonl(rows), tmp_path / "t")
    said = " ".join(capsys.readouterr().err.split())
    assert "<s> was put before 2 rows, as the tokenizer does; 1 had it already" in said
    assert "</s> was put behind 2 rows, as the tokenizer does; 1 had it already" in said
    assert "1 row spells out special tokens, read as these tokens (keep); the setting is special_tokens_in_text" in said
    prompts = [{"id": str(n), "domain": "d", "text": text} for n, text in enumerate(["<s>the cat", "the dog"])]
    written = run_generate(tmp_path / "g", jsonl(prompts), tmp_path / "t")
    assert [sequence.token_ids[:2].tolist().count(0) for sequence in written] == [1, 1]
    said = " ".join(capsys.readouterr().err.split())
    assert "<s> was put before 1 row, as the tokenizer does; 1 had it already" in said and "behind" not in said


# --------------------------------------------------------------------------------------- special tokens in a text

PARTS = st.lists(TEXT | st.sampled_from(["<s>", "</s>", "<|end|>", "the cat ", " ", "<|", "end|>"]), max_size=6)


@pytest.mark.parametrize("kind", ["bpe", "bpe strips", "wordpiece", "unigram"])
@given(parts=PARTS)
def test_split_makes_no_special_token_and_loses_no_byte(
    tokenizers: dict[str, Any], kind: str, parts: list[str]
) -> None:
    text, tokenizer = "".join(parts), tokenizers[kind]
    encoder = TextEncoder(tokenizer, special_tokens_in_text="split")
    [(piece, ids, lengths)] = encoder.pieces(text, 10_000)
    assert piece == text and ids[0] == 0
    assert int(lengths.sum()) == len(text.encode()) or len(ids) == 1, "white space may be no token at all"
    spelled = any(name in text for name in ("<s>", "</s>", "<|end|>"))
    unknown = [0] if kind in ("wordpiece", "unigram") else []  # the id of unknown text
    assert not set(ids[1:].tolist()) & ({0, 1, 2} - {*unknown})
    if not spelled:
        assert ids.tolist() == tokenizer(text)["input_ids"]
    elif kind == "bpe":
        assert tokenizer.decode(ids[1:], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("kind", ["bpe", "bpe strips", "wordpiece", "unigram"])
@given(
    parts=st.lists(
        st.tuples(TEXT | st.sampled_from(["the cat ", " "]), st.sampled_from(["<s>", "<|end|>", ""])), max_size=4
    )
)
def test_a_special_token_that_stays_one_is_encoded_as_ever(
    tokenizers: dict[str, Any], kind: str, parts: list[tuple[str, str]]
) -> None:
    """The way in which parts of a text are split gives the tokenizer's own ids and places for what is not split."""
    text, encoder = "".join(a + b for a, b in parts), TextEncoder(tokenizers[kind])
    ids, begins = encoder._encode_spelled(text)
    plain, places = encoder._encode(text)
    assert ids.tolist() == plain.tolist() and begins.tolist() == places.tolist()


def test_keep_makes_special_tokens_and_reject_refuses(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["bpe"]
    [(_, kept, _)] = TextEncoder(tokenizer).pieces("the <|end|> cat", 99)
    assert kept.tolist() == tokenizer("the <|end|> cat")["input_ids"] and 2 in kept
    strict = TextEncoder(tokenizer, special_tokens_in_text="reject")
    with pytest.raises(RowError, match="special_tokens"):
        strict.pieces("the <|end|> cat", 99)
    assert len(strict.pieces("the <|end> cat", 99)) == 1 and strict.notes.spelled == 1


def test_characters_that_mark_a_split_are_refused_beside_special_tokens(tokenizers: dict[str, Any]) -> None:
    """Else a text could write the mark itself."""
    encoder = TextEncoder(tokenizers["bpe"], special_tokens_in_text="split")
    for sign in "\ufdd0\ufdd1\ufdd2":
        assert len(encoder.pieces(f"a{sign}b", 99)) == 1
        with pytest.raises(RowError, match="reserved"):
            encoder.pieces(f"a{sign}b<|end|>", 99)


def test_the_setting_is_recorded_where_it_is_given_and_counts_as_keep_elsewhere(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    rows = [{"id": n, "domain": "d", "text": text} for n, text in enumerate(["the cat", "the </s> dog"])]
    corpus = jsonl(rows)
    sizes = {}
    for mode in ("keep", "split", "reject", None):
        reading = {} if mode is None else {"special_tokens_in_text": mode}
        dataset = run_capture(tmp_path / str(mode), corpus, tokenizer_dir, reading=reading)
        settings = dataset.info.sources["capture"].settings["corpus"]
        assert settings.get("special_tokens_in_text", "absent") == (mode or "absent")
        sizes[mode] = [1 in sequence.token_ids for sequence in dataset]
    assert sizes == {"keep": [False, True], "split": [False, False], "reject": [False], None: [False, True]}
    [reject] = rejects_of(tmp_path / "reject")
    assert (reject["id"], reject["reason"]) == ("1", "special_tokens")
    with pytest.raises(kdata.MismatchError, match="special_tokens_in_text"):
        run_capture(tmp_path / "split", corpus, tokenizer_dir, reading={"special_tokens_in_text": "keep"})


def rejects_of(root: Path) -> list[dict[str, Any]]:
    return kdata.open(root).sql("select * from rejects").to_pylist()


# ----------------------------------------------------------------------------------------------- ids and bytes


def moved(folder: Path, name: str, number: int) -> Path:
    """A tokenizer in which one entry of the vocabulary has another id, far beyond the others."""
    save_tokenizer(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"][name] = number
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def test_what_counts_is_ids_that_occur(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """An id beyond len(tokenizer), and ids that the head lacks: a text with none of these is read."""
    from transformers import AutoTokenizer

    folder = moved(tmp_path / "t", "z", 350)
    rows = [{"id": text, "domain": "d", "text": text} for text in ("the cat", "a zebra")]
    big = run_capture(tmp_path / "big", jsonl(rows), folder, teacher=StandInTeacher(vocab_size=360))
    assert 350 in big[1].token_ids and not big.manifest[0].rejected
    small = run_capture(tmp_path / "small", jsonl(rows), folder, teacher=StandInTeacher(vocab_size=VOCAB))
    assert small.index(["id"])["id"].to_pylist() == ["the cat"]
    [reject] = rejects_of(tmp_path / "small")
    assert (reject["id"], reject["reason"]) == ("a zebra", "vocabulary") and "token id 350" in reject["detail"]
    written = run_generate(tmp_path / "g", jsonl(rows), folder, teacher=StandInTeacher(vocab_size=VOCAB))
    assert written.num_rows == 1 and rejects_of(tmp_path / "g")[0]["reason"] == "vocabulary"
    padded = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path / "p") and tmp_path / "p")
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(tmp_path / "p")
    assert len(load_tokenizer(tmp_path / "p")) == VOCAB + 1
    assert run_capture(tmp_path / "pad", jsonl(rows), tmp_path / "p").num_rows == 2


def test_a_tokenizer_of_another_model_is_refused_by_name(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    folder = moved(tmp_path / "t", "z", 350)
    rows = [{"id": "a", "domain": "d", "text": "a zebra"}]
    with pytest.raises(ConfigError, match=r"token id 350 .* of 300 rows; name a model folder with its own tokenizer"):
        run_capture(tmp_path / "d", jsonl(rows), folder)


@pytest.mark.parametrize("size", [65_535, 65_536, 70_001])
def test_a_token_of_too_many_bytes_is_a_reject(tmp_path: Path, jsonl: Callable[..., Path], size: int) -> None:
    """A WordPiece tokenizer makes one unknown token of a word however long; the payload stores up to 65,535 bytes."""
    tokenizer_of("wordpiece").save_pretrained(tmp_path / "t")
    rows = [{"id": name, "domain": "d", "text": text} for name, text in (("a", "the cat"), ("b", "the " + "x" * size))]
    dataset = run_capture(tmp_path / "d", jsonl(rows), tmp_path / "t")
    if size - 1 < 65_535:
        lengths = dataset.token_bytes(1)
        assert lengths is not None and lengths.max() == size
        return
    assert dataset.num_rows == 1
    [reject] = rejects_of(tmp_path / "d")
    assert reject["reason"] == "token_bytes" and "65,535 can be stored" in reject["detail"]
