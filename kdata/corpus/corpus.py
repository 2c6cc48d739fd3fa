"""Read texts, prompts and chats as a stream of rows with a stable id and a domain.

`files.py` reads local files. `library.py` reads data sets of the Hugging Face library `datasets`, saved to disk or on the
Hub. Both provide `Rows`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator, model_validator

from kdata.config import Strict
from kdata.corpus.encode import SpecialTokensInText
from kdata.corpus.files import FileRows, exists
from kdata.corpus.hygiene import Passing, passing
from kdata.corpus.library import hub_name, is_saved, open_hub, open_saved
from kdata.corpus.messages import ALPACA, COMPANIONS, SHAREGPT, Chat, as_json, chat_of_row
from kdata.corpus.values import as_text, checked_text, printable, text_of_column
from kdata.errors import ConfigError, DataError, MissingError, nearest
from kdata.format.records import Reject, RowError

COLUMNS = ("text_column", "messages_column", "tools_column", "id_column", "domain_column")
MAX_TEMPLATE_BYTES = 4 << 20
OPTIONAL = ("source", "license")
WAYS_TO_SAVE = {  # by a method of what people have their rows in: datasets, pandas, polars, pyarrow
    "save_to_disk": 'rows.save_to_disk("rows")',
    "to_parquet": 'rows.to_parquet("rows.parquet")',
    "write_parquet": 'rows.write_parquet("rows.parquet")',
    "to_pylist": 'pyarrow.parquet.write_table(rows, "rows.parquet")',
}
# Settings that were added later: left out of what is recorded where they are null, as in the datasets before.
ADDED = ("chat_template", "special_tokens_in_text", "where")
REMEDIES = {
    "id_column": "; null numbers the rows",
    "domain_column": "; null puts all rows in the domain `domain`",
    "text_column": "; chats are read with messages_column",
}


class CorpusConfig(Strict):
    """Where text comes from, and which of it."""

    path: str = Field(
        description="A file, or a folder of files of one kind: .parquet, .jsonl, .json (also one array), .csv or .arrow "
        "(.jsonl also as .gz, .zst or .bz2, .csv as .gz); a folder that `datasets` saved; or a data set on the Hub: "
        "hf://datasets/OWNER/NAME[@REVISION]. In a folder, names that begin with a dot and folders that begin with an "
        "underscore are passed over, and a folder KEY=VALUE is a column."
    )
    split: str | None = Field(None, description="Split of a `datasets` folder or Hub data set; null where it has one.")
    subset: str | None = Field(None, description="Configuration of a Hub data set; null takes its default.")
    text_column: str | None = Field(
        "text", description="Column with the text (or, for prompts, the prompt); null where there is a messages_column."
    )
    messages_column: str | None = Field(
        None,
        description="Column with chats: a list of {role, content, ...} or of {from, value} (ShareGPT), or such a list as "
        "JSON text. `instruction` reads the columns instruction, input and output (Alpaca). Chats are rendered with the "
        "model's own chat template.",
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
    chat_template: str | None = Field(
        None,
        description="Chat template in place of the model's own: a path to a Jinja file, or the template's text.",
    )
    special_tokens_in_text: SpecialTokensInText | None = Field(
        None,
        description="What the name of a special token (<|im_end|>) in a text or a message is: keep, that token; split, plain "
        "text; reject, a reason to put the row aside. null: split in chats, so that nobody's message can end a turn or begin "
        "one; keep in texts, which may be rendered already.",
    )
    id_column: str | None = Field(
        "id", description="Column with a stable id, unique in the corpus; null makes ids of row number and content."
    )
    domain_column: str | None = Field("domain", description="Column with the domain; null puts all in `domain`.")
    domain: str = Field("text", description="Domain of every row where there is no domain column.")
    domains: list[str] | None = Field(None, description="Only these domains; null takes all.")
    hygiene: str | None = Field(
        None, description="Parquet file that `kdata hygiene` wrote of this corpus, for `where`; null without one."
    )
    where: str | None = Field(
        None,
        description="Only rows for which this is true: SQL over the columns of `hygiene`, such as duplicates.near_keep and "
        "language.code = 'en'. null: all rows.",
    )
    limit: int | None = Field(
        None, ge=1, description="Only the first rows (after the choice of domains and `where`); null: all."
    )

    @field_validator("path", mode="before")
    @classmethod
    def _names_files(cls, path: Any) -> Any:
        """Rows in memory have no digest that a later run could compare, so they are written first."""
        if not isinstance(path, str | Path):
            way = next(
                (way for kind, way in WAYS_TO_SAVE.items() if hasattr(path, kind)), "one JSON object a line (.jsonl)"
            )
            raise ValueError(f"{type(path).__name__} is no path; save the rows to a file first, and name it: {way}")
        return path

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
        if (self.hygiene is None) != (self.where is None):
            raise ValueError("hygiene (a file) and where (a condition on its columns) go together: name both")
        for name in ("tools_column", "template_options", "template_date", "chat_template"):
            if self.messages_column is None and getattr(self, name):
                raise ValueError(f"{name} is for chats: name a messages_column")
        return self

    @property
    def spelled(self) -> SpecialTokensInText:
        """`special_tokens_in_text`, resolved."""
        return self.special_tokens_in_text or ("split" if self.messages_column else "keep")

    @property
    def columns(self) -> list[str]:
        """Columns that are read and must exist."""
        return [name for name in (getattr(self, field) for field in COLUMNS) if name]

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Columns that are read where they exist."""
        return (*OPTIONAL, *COMPANIONS.get(self.messages_column or "", ()))

    def own_template(self) -> str | None:
        """Text of the chat template that takes the place of the model's; None: the model's own.

        Raises MissingError where it names a file that does not exist.
        """
        if self.chat_template is None or "{%" in self.chat_template or "{{" in self.chat_template:
            return self.chat_template
        path = Path(self.chat_template)
        if not (exists(path) and path.is_file()):
            raise MissingError(
                f"chat_template {self.chat_template[:200]!r} is neither a file nor a Jinja template; name a file, or write "
                "the template itself"
            )
        try:
            with path.open("rb") as file:
                content = file.read(MAX_TEMPLATE_BYTES + 1)
            if len(content) > MAX_TEMPLATE_BYTES:
                raise ConfigError(f"chat_template {path} has more than {MAX_TEMPLATE_BYTES:,} bytes; name a Jinja file")
            return content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"chat_template {path} is not a text in UTF-8; name a Jinja file") from error


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

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
        """Rows in a fixed order, with these columns (of `names`); a row that cannot be read comes as its error."""
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
    read = {*config.columns, *config.further_columns}
    if config.subset is not None and remote is None:
        raise ConfigError(
            f"subset {config.subset!r} names a configuration of a data set on the Hub, and {config.path} is not on the Hub; "
            "leave subset away"
        )
    if remote is not None:
        return open_hub(remote, config.subset, config.split, read)
    if is_saved(path):
        return open_saved(path, config.split, read)
    if config.split is not None:
        raise ConfigError(
            f"{config.path} has no splits (split {config.split!r}); name the file or folder of that split"
        )
    return FileRows(path, config.columns, config.further_columns)


class Corpus:
    """A corpus: rows that are read as documents.

    Raises:
        MissingError: the file or folder is not there.
        ConfigError: an unknown format, column or domain; the message names the nearest.
        DataError: there is no row.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self._template = config.own_template()
        self._rows = open_rows(config)
        names = self._rows.names
        for field_name in COLUMNS:
            column = getattr(config, field_name)
            if column is not None and column not in names:
                hint = nearest(column, names)
                raise ConfigError(
                    f"{config.path} has no column {column!r} ({field_name}){hint}{_remedy(field_name, names)}; it has {names}"
                )
        self._passing: Passing | None = None
        self._num_left_out = 0  # by `where`, of the rows that were read last
        if config.hygiene is not None and config.where is not None:
            self._passing = passing(Path(config.hygiene), config.where, self.rows_identity(), config.domains)
        count = self._rows.num_rows if config.domains is None else self._count_domains(config.domains)
        if self._passing is not None:
            count = self._passing.count
        self.num_rows: int | None = count if count is None else min(count, config.limit or count)
        """Documents in all; None where the number is known only after reading all of them."""
        if self.num_rows == 0:
            raise DataError(f"{config.path} holds no row; give it some text")

    def _count_domains(self, wanted: list[str]) -> int | None:
        """Rows in the wanted domains, each of which must exist, and rows that cannot be read.

        Returns:
            None where counting would download the corpus.
        """
        column = self.config.domain_column
        if column is None:
            raise ConfigError("`domains` selects by the domain column, but domain_column is null; name the column")
        if self._rows.num_rows is None:
            return None
        counts, unknown = Counter[str](), 0
        for row in self._rows.rows([column]):
            if isinstance(row, RowError):
                unknown += 1
            elif (domain := as_text(row[column])) is not None:
                counts[domain] += 1
        for name in wanted:
            if name not in counts:
                known = sorted(counts)
                raise ConfigError(f"{self.config.path} has no domain {name!r}{nearest(name, known)}; it has {known}")
        return unknown + sum(counts[name] for name in set(wanted))

    def settings(self) -> dict[str, Any]:
        """What determines the rows, by content and not by place; part of the dataset's settings."""
        own = self.config.model_dump(exclude={"path", "hygiene"})
        own = {name: value for name, value in own.items() if value is not None or name not in ADDED}
        template = {} if self._template is None else {"chat_template": self._template}
        chosen = {} if self._passing is None else {"hygiene": self._passing.digest}
        return {**self._rows.identity(), **own, **template, **chosen}

    def rows_identity(self) -> dict[str, Any]:
        """What determines texts and ids of the rows, whichever of them are read; a file of `hygiene` records it."""
        names = ("text_column", "messages_column", "tools_column", "id_column")
        return {**self._rows.identity(), **{name: getattr(self.config, name) for name in names}}

    def documents(self) -> Iterator[Document | Reject]:
        """Rows in their order; a row that cannot be used comes as a reject with its reason."""
        config, seen, count = self.config, set[str](), 0
        self._num_left_out = 0
        columns = {*config.columns, *config.further_columns}
        present = [name for name in self._rows.names if name in columns]
        for number, row in enumerate(self._rows.rows(present)):
            if isinstance(row, RowError):
                document: Document | Reject = self._unreadable(number, row)
            elif config.domains is not None and not self._is_wanted(row[str(config.domain_column)]):
                continue
            else:
                document = self._document(number, row)
            if isinstance(document, Document) and self._is_left_out(document):
                seen.add(document.id)
                self._num_left_out += 1
                continue
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

    def note_lines(self) -> list[str]:
        """A line for people on the rows that were read last: how many `where` left out."""
        if self._passing is None:
            return []
        return [f"corpus.where: {self._num_left_out:,} rows are left out by {self.config.where}"]

    def _is_left_out(self, document: Document) -> bool:
        """Whether `where` leaves a row out. Raises DataError where `hygiene` has no such row."""
        if self._passing is None:
            return False
        if document.id not in self._passing.ids:
            if self._passing.lacks_left_out:
                return True
            raise DataError(
                f"{self.config.hygiene} has no row {document.id!r} of {self.config.path}: it was made with a limit, or of "
                "some domains; run `kdata hygiene` with the same corpus settings"
            )
        return not self._passing.ids[document.id]

    def _is_wanted(self, domain: Any) -> bool:
        return as_text(domain) in (self.config.domains or ())

    def _unreadable(self, number: int, error: RowError) -> Reject:
        """The reject for a row that cannot be read. Nobody knows its domain, so it counts whichever domains are chosen."""
        domain = self.config.domain if self.config.domain_column is None else None
        return Reject(_place(number), domain, error.reason, printable(error.detail))

    def _document(self, number: int, row: dict[str, Any]) -> Document | Reject:
        """A row as a document, or the reason why it cannot be one."""
        config = self.config
        text_of = {name: as_text(row.get(name)) for name in (config.id_column, config.domain_column, *OPTIONAL) if name}
        name = str(number) if config.id_column is None else text_of[config.id_column]
        domain = config.domain if config.domain_column is None else text_of[config.domain_column]
        try:
            if name is None:
                raise RowError("no_id", f"column {config.id_column!r} is empty; every row needs an id")
            if domain is None:
                detail = f"column {config.domain_column!r} is empty; fill it, or set domain_column to null"
                raise RowError("no_domain", detail)
            text, chat = self._content(row)
            for column, value in text_of.items():
                checked_text(value or "", column)
        except RowError as error:
            where = _place(number) if name is None else printable(name)
            return Reject(where, None if domain is None else printable(domain), error.reason, printable(error.detail))
        if config.id_column is None:
            name = _content_id(number, chat.content if chat else text)
        return Document(name, domain, text, text_of["source"], text_of["license"], chat)

    def _content(self, row: dict[str, Any]) -> tuple[str, Chat | None]:
        """Text or chat of a row. Raises RowError."""
        config = self.config
        if config.messages_column is None:
            return text_of_column(row.get(str(config.text_column)), str(config.text_column)) or "", None
        try:
            chat = chat_of_row(row, config.messages_column, config.tools_column, "the chat")
        except DataError as error:
            raise RowError("chat", str(error)) from error
        checked_text(as_json([chat.messages, chat.tools]), config.messages_column)
        return "", chat


def _remedy(field_name: str, names: list[str]) -> str:
    """What to do where a column is missing."""
    if field_name == "text_column":
        for name, what in (("messages", "chats"), (SHAREGPT, "chats"), (ALPACA, "instructions (Alpaca)")):
            if name in names:
                return f"; column {name!r} holds {what}: messages_column={name}"
    return REMEDIES.get(field_name, "")


def _place(number: int) -> str:
    """What stands for the id of a row that has none."""
    return f"row-{number:07d}"


def _content_id(number: int, content: str) -> str:
    """An id from row number and content: the same in every run, and different where either changes."""
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    return f"row-{number:07d}-{digest}"
