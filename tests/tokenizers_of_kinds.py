"""Tokenizers of several kinds, as students bring them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def _fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def byte_tokenizer() -> Any:
    """259 ids: three special tokens and every byte."""
    vocab = {token: n for n, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return _fast(backend)


def bpe_tokenizer(lines: Sequence[str], size: int = 400) -> Any:
    """A byte-level BPE that joins words to phrases: its tokens lie across those of others."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[.;!?]"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return _fast(backend)


def sentence_tokenizer(lines: Sequence[str], size: int = 400) -> Any:
    """As Llama 2's: a sign for spaces, one before the text, and bytes for what the vocabulary lacks."""
    known = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # so that tokens are words, in training alone
    trained.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=size, special_tokens=known, show_progress=False))
    backend = Tokenizer(models.BPE(**_model(trained), unk_token=None, byte_fallback=True, fuse_unk=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIAL)
    return _fast(backend)


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}


def lowercasing_tokenizer(lines: Sequence[str]) -> Any:
    """A byte-level BPE that reads every text in lower case."""
    tokenizer = bpe_tokenizer([line.lower() for line in lines])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def compatibility_tokenizer(lines: Sequence[str]) -> Any:
    """A byte-level BPE that puts a space before every text, and reads compatible characters as one (NFKC)."""
    tokenizer = bpe_tokenizer(lines)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


def unigram_tokenizer(lines: Sequence[str], size: int = 400) -> Any:
    """As SentencePiece's: likely pieces, a sign for spaces, one before the text, an id for what it does not know."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    known = [*SPECIAL, "<unk>"]
    backend.train_from_iterator(
        lines, trainers.UnigramTrainer(vocab_size=size, special_tokens=known, unk_token="<unk>", show_progress=False)
    )
    return _fast(backend)


def word_tokenizer(lines: Sequence[str], size: int = 400) -> Any:
    """As BERT's: words in lower case without accents, in pieces; marks around the text."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer, backend.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    known = [*SPECIAL, "<unk>"]
    backend.train_from_iterator(
        lines, trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))]
    )
    return _fast(backend)


def saved(tokenizer: Any, folder: Path) -> Path:
    """Its folder."""
    tokenizer.save_pretrained(folder)
    return folder
