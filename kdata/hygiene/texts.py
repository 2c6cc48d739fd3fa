"""Where the texts are: in a dataset, whose units are its shards, or in a corpus, whose units are its rows in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from kdata.corpus.corpus import Corpus, CorpusConfig, Document
from kdata.corpus.messages import as_json
from kdata.errors import DataError
from kdata.format.schema import json_digest
from kdata.store.dataset import Dataset
from kdata.store.index import read_index

UNIT_ROWS, UNIT_CHARS = 2_000, 1 << 24  # of a corpus, at most; a unit has one text at least


@dataclass(frozen=True)
class Unit:
    """Some rows in their order: ids, texts (None where there is none), and further columns of `Texts.columns`."""

    ids: list[str]
    texts: list[str | None]
    more: dict[str, list[Any]]


class Texts(Protocol):
    """Rows with texts, in units."""

    @property
    def place(self) -> str:
        """What a message calls them."""
        ...

    @property
    def columns(self) -> list[pa.Field]:
        """Further columns of a unit, which the result takes over."""
        ...

    @property
    def num_rows(self) -> int | None:
        """How many; None where that is not known."""
        ...

    def identity(self) -> str:
        """SHA-256 (hex) of what identifies the rows."""
        ...

    def units(self, first: int) -> Iterator[Unit]:
        """The units from number `first` on."""
        ...


class DatasetTexts:
    """See `Texts`. A chat is what its template wrote."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.place, self.num_rows, self.columns = str(dataset.path), dataset.num_rows, list[pa.Field]()

    def identity(self) -> str:
        """See `Texts`."""
        return self._dataset.content_digest

    def units(self, first: int) -> Iterator[Unit]:
        """See `Texts`."""
        for entry in self._dataset.manifest[first:]:
            table = read_index(self._dataset.checked_file(entry, "index"), ["id", "text"])
            yield Unit(table["id"].to_pylist(), table["text"].to_pylist(), {})


class CorpusTexts:
    """See `Texts`. Of a chat the contents and tool calls of its messages, parted by an empty line; no rejected rows."""

    columns = [pa.field("domain", pa.string())]  # noqa: RUF012

    def __init__(self, config: CorpusConfig) -> None:
        self._corpus = Corpus(config)
        self.place, self.num_rows, self.num_rejected = config.path, self._corpus.num_rows, 0

    def identity(self) -> str:
        """See `Texts`."""
        return json_digest(self._corpus.settings())

    def rows_identity(self) -> dict[str, Any]:
        """What identifies the texts and ids, whichever of them were read; see `Corpus.rows_identity`."""
        return self._corpus.rows_identity()

    def units(self, first: int) -> Iterator[Unit]:
        """See `Texts`. Those before `first` are read, and passed over."""
        self.num_rejected, number = 0, 0
        ids: list[str] = []
        texts: list[str | None] = []
        domains: list[Any] = []
        chars = 0
        for document in self._corpus.documents():
            if not isinstance(document, Document):
                self.num_rejected += 1
                continue
            text = document.text if document.chat is None else chat_text(document.chat.messages)
            if ids and (len(ids) == UNIT_ROWS or chars + len(text) > UNIT_CHARS):
                if number >= first:
                    yield Unit(ids, texts, {"domain": domains})
                number, ids, texts, domains, chars = number + 1, [], [], [], 0
            ids.append(document.id)
            texts.append(text)
            domains.append(document.domain)
            chars += len(text)
        if not ids and not number:
            raise DataError(f"{self.place} has no row that can be used; give it some text")
        if ids and number >= first:
            yield Unit(ids, texts, {"domain": domains})


def chat_text(messages: list[dict[str, Any]]) -> str:
    """Contents and tool calls of messages, parted by an empty line."""
    parts = [text for message in messages for text in _parts(message)]
    return "\n\n".join(parts)


def _parts(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    if content:
        yield content if isinstance(content, str) else as_json(content)
    if message.get("tool_calls"):
        yield as_json(message["tool_calls"])


def is_dataset(place: str) -> bool:
    """Whether a path on this machine is a folder with a dataset."""
    return (Path(place) / "dataset.json").is_file()
