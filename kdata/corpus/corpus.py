"""Read texts, prompts and chats as a stream of rows with a stable id and a domain.

`files.py` reads local files. `library.py` reads data sets of the Hugging Face library `datasets`, saved to disk or on the
Hub. Both provide `Rows`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, model_validator

from kdata.config import Strict
from kdata.corpus.files import FileRows
from kdata.corpus.library import hub_name, is_saved, open_hub, open_saved
from kdata.corpus.messages import Chat, as_json, parse_chat
from kdata.errors import ConfigError, DataError, nearest
from kdata.format.records import Reject, RowError

COLUMNS = ("text_column", "messages_column", "tools_column", "id_column", "domain_column")
REMEDIES = {
    "id_column": "; null numbers the rows",
    "domain_column": "; null puts all rows in the domain `domain`",
    "text_column": "; chats are read with messages_column",
}


class CorpusConfig(Strict):
    """Where text comes from, and which of it."""

    path: str = Field(
        description="A file, or a folder of files of one kind: .parquet, .jsonl, .csv or .arrow (.jsonl also as .gz, .zst or "
        ".bz2, .csv as .gz); a folder that `datasets` saved; or a data set on the Hub: hf://datasets/OWNER/NAME[@REVISION]."
    )
    split: str | None = Field(None, description="Split of a `datasets` folder or Hub data set; null where it has one.")
    subset: str | None = Field(None, description="Configuration of a Hub data set; null takes its default.")
    text_column: str | None = Field(
        "text", description="Column with the text (or, for prompts, the prompt); null where there is a messages_column."
    )
    messages_column: str | None = Field(
        None,
        description="Column with chats: a list of {role, content, ...}, or such a list as JSON text. They are rendered "
        "with the model's own chat template.",
    )
    tools_column: str | None = Field(
        None, description="Column with a chat's tools: JSON Schemas of functions, or JSON text."
    )
    template_options: dict[str, Any] = Field(
        {}, description="Variables that the chat template takes, for instance enable_thinking: false."
    )
    template_date: str | None = Field(
        None, description="YYYY-MM-DD, the day that a chat template writes where it asks for today's."
    )
    id_column: str | None = Field(
        "id", description="Column with a stable id, unique in the corpus; null makes ids of row number and content."
    )
    domain_column: str | None = Field("domain", description="Column with the domain; null puts all in `domain`.")
    domain: str = Field("text", description="Domain of every row where there is no domain column.")
    domains: list[str] | None = Field(None, description="Only these domains; null takes all.")
    limit: int | None = Field(None, ge=1, description="Only the first rows (after the choice of domains); null: all.")

    @model_validator(mode="before")
    @classmethod
    def _messages_for_text(cls, values: Any) -> Any:
        """A messages column takes the place of the text column, unless that was asked for too."""
        if isinstance(values, dict) and values.get("messages_column") is not None:
            return {"text_column": None, **values}
        return values

    @model_validator(mode="after")
    def _one_of_both(self) -> CorpusConfig:
        if (self.text_column is None) == (self.messages_column is None):
            raise ValueError(
                f"text_column {self.text_column!r} and messages_column {self.messages_column!r}: name one of them"
            )
        for name in ("tools_column", "template_options", "template_date"):
            if self.messages_column is None and getattr(self, name):
                raise ValueError(f"{name} is for chats: name a messages_column")
        return self


@dataclass(frozen=True)
class Document:
    """One row of a corpus: a text, or a chat (then `text` is empty until a template renders it)."""

    id: str
    domain: str
    text: str
    origin: str | None
    license: str | None
    chat: Chat | None = None


class Rows(Protocol):
    """The rows of one corpus. Every method raises DataError where they cannot be read."""

    @property
    def names(self) -> list[str]:
        """Columns."""
        ...

    @property
    def num_rows(self) -> int | None:
        """Number of rows; None where it is known only after reading all of them."""
        ...

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Rows in a fixed order, with these columns (of `names`)."""
        ...

    def identity(self) -> dict[str, Any]:
        """What identifies the rows: their content, not their place."""
        ...


def open_rows(config: CorpusConfig) -> Rows:
    """The rows at a path.

    Raises:
        MissingError: the path does not exist.
        ConfigError: an unknown format or split.
        DataError: broken or empty files.
    """
    path = Path(config.path)
    remote = hub_name(config.path)
    if config.subset is not None and remote is None:
        raise ConfigError(
            f"subset {config.subset!r} names a configuration of a data set on the Hub, and {config.path} is not on the Hub; "
            "leave subset away"
        )
    if remote is not None:
        return open_hub(remote, config.subset, config.split)
    if is_saved(path):
        return open_saved(path, config.split)
    if config.split is not None:
        raise ConfigError(
            f"{config.path} has no splits (split {config.split!r}); name the file or folder of that split"
        )
    texts = [getattr(config, name) for name in COLUMNS]
    return FileRows(path, [name for name in texts if name])


class Corpus:
    """A corpus: rows that are read as documents.

    Raises:
        MissingError: the file or folder is not there.
        ConfigError: an unknown format, column or domain; the message names the nearest.
        DataError: there is no row.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self._rows = open_rows(config)
        names = self._rows.names
        for field_name in COLUMNS:
            column = getattr(config, field_name)
            if column is not None and column not in names:
                hint = nearest(column, names)
                raise ConfigError(
                    f"{config.path} has no column {column!r} ({field_name}){hint}{REMEDIES.get(field_name, '')}; "
                    f"it has {names}"
                )
        count = self._rows.num_rows if config.domains is None else self._count_domains(config.domains)
        self.num_rows: int | None = count if count is None else min(count, config.limit or count)
        """Documents in all; None where the number is known only after reading all of them."""
        if self.num_rows == 0:
            raise DataError(f"{config.path} holds no row; give it some text")

    def _count_domains(self, wanted: list[str]) -> int | None:
        """Rows in the wanted domains, each of which must exist; None where counting would download the corpus."""
        column = self.config.domain_column
        if column is None:
            raise ConfigError("`domains` selects by the domain column, but domain_column is null; name the column")
        if self._rows.num_rows is None:
            return None
        counts = Counter(str(row[column]) for row in self._rows.rows([column]) if row[column] is not None)
        for name in wanted:
            if name not in counts:
                known = sorted(counts)
                raise ConfigError(f"{self.config.path} has no domain {name!r}{nearest(name, known)}; it has {known}")
        return sum(counts[name] for name in set(wanted))

    def settings(self) -> dict[str, Any]:
        """What determines the rows, by content and not by place; part of the dataset's settings."""
        return {**self._rows.identity(), **self.config.model_dump(exclude={"path"})}

    def documents(self) -> Iterator[Document | Reject]:
        """Rows in their order; a row that cannot be used comes as a reject with its reason."""
        config, seen, count = self.config, set[str](), 0
        columns = {*(getattr(config, name) for name in COLUMNS), "source", "license"}
        present = [name for name in self._rows.names if name in columns]
        for number, row in enumerate(self._rows.rows(present)):
            if config.domains is not None and not self._is_wanted(row[str(config.domain_column)]):
                continue
            document = self._document(number, row)
            if isinstance(document, Document) and document.id in seen:
                detail = "an earlier row has the same id; ids must be unique (id_column null makes new ones)"
                document = Reject(document.id, document.domain, "id_twice", detail)
            elif isinstance(document, Document):
                seen.add(document.id)
            yield document
            count += 1
            if count == config.limit:
                return
        if not count:
            raise DataError(f"{config.path} holds no row{f' of {config.domains}' if config.domains else ''}")

    def _is_wanted(self, domain: Any) -> bool:
        return domain is not None and str(domain) in (self.config.domains or ())

    def _document(self, number: int, row: dict[str, Any]) -> Document | Reject:
        """A row as a document, or the reason why it cannot be one."""
        config = self.config
        name = str(number) if config.id_column is None else row.get(config.id_column)
        domain = config.domain if config.domain_column is None else row.get(config.domain_column)
        try:
            if name is None:
                raise RowError("no_id", f"column {config.id_column!r} is empty; every row needs an id")
            if domain is None:
                detail = f"column {config.domain_column!r} is empty; fill it, or set domain_column to null"
                raise RowError("no_domain", detail)
            text, chat = self._content(row)
            about = [_plain(value) for value in (name, domain, row.get("source"), row.get("license"))]
            _check_encoding(as_json([chat.messages, chat.tools]) if chat else text, *about)
        except RowError as error:
            where = f"row-{number:07d}" if name is None else _printable(name)
            return Reject(where, None if domain is None else _printable(domain), error.reason, _printable(error.detail))
        if config.id_column is None:
            about[0] = _content_id(number, chat.content if chat else text)
        return Document(str(about[0]), str(about[1]), text, about[2], about[3], chat)

    def _content(self, row: dict[str, Any]) -> tuple[str, Chat | None]:
        """Text or chat of a row. Raises RowError."""
        config = self.config
        if config.messages_column is not None:
            tools = row.get(config.tools_column) if config.tools_column else None
            try:
                return "", parse_chat(row.get(config.messages_column), tools, "the chat")
            except DataError as error:
                raise RowError("chat", str(error)) from error
        text = row.get(str(config.text_column))
        if text is not None and not isinstance(text, str):
            detail = f"column {config.text_column!r} must hold text, not {type(text).__name__}"
            raise RowError("not_text", detail)
        return text or "", None


def _plain(value: Any) -> str | None:
    """An id, domain, source or license as text, whatever the type of its column. Raises RowError for bytes of no text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise RowError("not_text", f"{value[:20]!r} is not UTF-8") from error
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)


def _check_encoding(*texts: str | None) -> None:
    """Raise RowError for a text with half of a surrogate pair, or with a byte that was not UTF-8."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            broken = ascii(error.object[error.start])
            detail = f"character {error.start} is {broken}, half of a surrogate pair or a byte that is not UTF-8"
            raise RowError("not_text", detail) from error


def _printable(value: Any) -> str:
    """Text of any value, with a backslash escape for what cannot be encoded."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _content_id(number: int, content: str) -> str:
    """An id from row number and content: the same in every run, and different where either changes."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"row-{number:07d}-{digest}"
