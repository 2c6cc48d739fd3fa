"""Tokenizers that somebody else wrote: ids that the library would reserve gigabytes for are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kdata.errors import CorruptError
from kdata.store.tokens import MAX_IDS, read_tokenizer, tokenizer_hash
from kdata.teachers.model import load_tokenizer
from tests.fakes import save_tokenizer


def with_id(folder: Path, token_id: int) -> Path:
    """A tokenizer whose last token has that id."""
    save_tokenizer(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_bytes())
    ids = content["model"]["vocab"]
    ids[max(ids, key=ids.__getitem__)] = token_id
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("token_id", [MAX_IDS, 2**31])
def test_an_id_that_would_take_all_memory_is_refused(tmp_path: Path, token_id: int) -> None:
    file = with_id(tmp_path, token_id)
    for read in (lambda: read_tokenizer(file), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(CorruptError, match="copy it again"):
            read()
    with pytest.raises(CorruptError, match="copy it again"):
        tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer)


def test_such_an_id_is_refused_before_the_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading alone reserves memory up to the id, and ends the process where there is not as much."""
    file = with_id(tmp_path, 2**31)

    def read(*_: object, **__: object) -> None:
        raise AssertionError("the library was asked")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr("tokenizers.Tokenizer.from_file", read, raising=False)
    for reader in (lambda: read_tokenizer(file), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(CorruptError, match="copy it again"):
            reader()


def test_an_id_far_beyond_the_others_is_read(tmp_path: Path) -> None:
    file = with_id(tmp_path, 300_000)
    assert tokenizer_hash(read_tokenizer(file)) == tokenizer_hash(load_tokenizer(tmp_path).backend_tokenizer)
