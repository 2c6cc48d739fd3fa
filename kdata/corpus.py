"""Reading text and prompts: local Parquet, JSONL, CSV or Arrow files, streamed, as rows with a stable id and a domain."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads
import pyarrow.json as pajson
from pydantic import Field

from kdata.errors import ConfigError, DataError, KdataError, MissingError
from kdata.schema import Strict

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".arrow": "ipc",
}

BLOCK_BYTES = 1 << 24  # a line of JSONL or a row of CSV must fit a block; pyarrow's own default is 1 MiB


class CorpusConfig(Strict):
    """Where text comes from, and which of it."""

    path: str = Field(description="A file, or a folder of files of one kind: .parquet, .jsonl, .csv or .arrow.")
    text_column: str = Field("text", description="Column with the text (or, for prompts, the prompt).")
    id_column: str = Field("id", description="Column with a stable id, unique in the corpus.")
    domain_column: str | None = Field("domain", description="Column with the domain; null puts all in `domain`.")
    domain: str = Field("text", description="Domain of every row where there is no domain column.")
    domains: list[str] | None = Field(None, description="Only these domains; null takes all.")
    limit: int | None = Field(None, ge=1, description="Only the first rows (after the choice of domains); null: all.")


@dataclass(frozen=True)
class Document:
    """One row of a corpus."""

    id: str
    domain: str
    text: str
    origin: str | None
    license: str | None


class Corpus:
    """A corpus on disk.

    Raises:
        MissingError: the file or folder is not there.
        ConfigError: an unknown format, column or domain; the message names the nearest.
        DataError: no row is left.
    """

    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self._files = _files(Path(config.path))
        with self._readable():
            self._data = pads.dataset([str(f) for f in self._files], format=_format(self._files[0], config))
        names = self._data.schema.names
        for field_name in ("text_column", "id_column", "domain_column"):
            column = getattr(config, field_name)
            if column is not None and column not in names:
                hint = nearest(column, names)
                raise ConfigError(f"{config.path} has no column {column!r} ({field_name}){hint}; it has {names}")
        with self._readable():
            self._filter = self._domain_filter()
            self.num_rows: int = min(self._data.count_rows(filter=self._filter), config.limit or 2**62)
        if self.num_rows == 0:
            raise DataError(f"{config.path} holds no row; give it some text")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn what pyarrow says of broken input into one DataError."""
        try:
            yield
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, KdataError):
                raise
            kind, reason = FORMATS[self._files[0].suffix], str(error).splitlines()[0]
            if "straddl" in reason:
                reason = f"a row is longer than {BLOCK_BYTES:,} bytes; store such text as Parquet"
            raise DataError(f"{self.config.path} cannot be read as {kind}: {reason}") from error

    def _domain_filter(self) -> pads.Expression | None:
        wanted, column = self.config.domains, self.config.domain_column
        if wanted is None:
            return None
        if column is None:
            raise ConfigError("`domains` chooses by the domain column, and domain_column is null")
        table = self._data.to_table(columns=[column])
        known = sorted(str(v) for v in table[column].unique().to_pylist() if v is not None)
        for name in wanted:
            if name not in known:
                raise ConfigError(f"{self.config.path} has no domain {name!r}{nearest(name, known)}; it has {known}")
        return pads.field(column).cast(pa.string()).isin(wanted)

    def settings(self) -> dict[str, Any]:
        """What decides the rows, by content and not by place: goes into the dataset's settings."""
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return {"sha256": digest.hexdigest(), **self.config.model_dump(exclude={"path"})}

    def documents(self) -> Iterator[Document]:
        """Rows in file order. Raises DataError at a duplicate id or a value that is not text."""
        config, left, seen = self.config, self.num_rows, set[str]()
        columns = {config.id_column, config.text_column, config.domain_column, "source", "license"}
        present = [name for name in self._data.schema.names if name in columns]
        with self._readable():
            for batch in self._data.to_batches(columns=present, filter=self._filter, batch_size=1024):
                for row in batch.to_pylist()[:left]:
                    document = self._document(row)
                    if document.id in seen:
                        raise DataError(f"{config.path}: id {document.id!r} stands twice; ids must be unique")
                    seen.add(document.id)
                    yield document
                left -= min(left, batch.num_rows)
                if left == 0:
                    return

    def _document(self, row: dict[str, Any]) -> Document:
        config = self.config
        if row[config.id_column] is None:
            raise DataError(f"{config.path}: a row has no id in column {config.id_column!r}; every row needs one")
        text = row[config.text_column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"{config.path}: row {row[config.id_column]!r} has {type(text).__name__} as text")
        domain = config.domain if config.domain_column is None else row[config.domain_column]
        if domain is None:
            raise DataError(f"{config.path}: row {row[config.id_column]!r} has no domain")
        return Document(str(row[config.id_column]), str(domain), text or "", row.get("source"), row.get("license"))


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' where something close is known, else ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _format(file: Path, config: CorpusConfig) -> pads.FileFormat | str:
    """How pyarrow reads such a file: rows of any length up to BLOCK_BYTES, and a CSV's ids and texts as they stand."""
    kind = FORMATS[file.suffix]
    if kind == "json":
        return pads.JsonFileFormat(read_options=pajson.ReadOptions(block_size=BLOCK_BYTES))
    if kind == "csv":
        text = {name: pa.string() for name in (config.id_column, config.text_column, config.domain_column) if name}
        return pads.CsvFileFormat(
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            read_options=pacsv.ReadOptions(block_size=BLOCK_BYTES),
            convert_options=pacsv.ConvertOptions(column_types=text),
        )
    return kind


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise MissingError(f"{path} does not exist; name a file or folder of text rows")
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ConfigError(f"{path}: unknown ending; kdata reads {', '.join(FORMATS)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in FORMATS)
    if not files:
        raise DataError(f"{path} holds no file that kdata reads ({', '.join(FORMATS)})")
    if len({FORMATS[p.suffix] for p in files}) > 1:
        raise ConfigError(f"{path} mixes formats; name a folder with one kind of file")
    return files


class TextEncoder:
    """Text to token ids, and how many bytes of the text each token stands for.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        probe = tokenizer("a", return_special_tokens_mask=True)
        mask = np.array(probe["special_tokens_mask"], bool)
        ids = np.array(probe["input_ids"], np.int32)
        plain = np.flatnonzero(~mask)
        self.prefix, self.suffix = ids[: plain[0]], ids[plain[-1] + 1 :]
        self._byte_table = _byte_table(tokenizer)

    @property
    def num_special(self) -> int:
        """Special tokens that the template adds to a text."""
        return len(self.prefix) + len(self.suffix)

    def pieces(self, text: str, limit: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """Encode a text, split at token borders so that no piece exceeds `limit` tokens, specials included.

        Returns:
            One (text, token ids int32 [T], bytes per token uint16 [T]) per piece; the texts join to the whole.
        """
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int32)
        begins = np.array([begin for begin, _ in encoded["offset_mapping"]], np.int64)
        room = limit - self.num_special
        cuts = [0, *(begins[start] for start in range(room, len(ids), room)), len(text)]
        return [
            self._piece(text[cuts[n] : cuts[n + 1]], ids[start : start + room], begins[start : start + room] - cuts[n])
            for n, start in enumerate(range(0, max(len(ids), 1), room))
        ]

    def _piece(self, text: str, ids: np.ndarray, begins: np.ndarray) -> tuple[str, np.ndarray, np.ndarray]:
        lengths = None if self._byte_table is None else self._byte_table[ids]
        if lengths is None or int(lengths.sum()) != len(text.encode()):
            lengths = _lengths_from_begins(text, begins)
        whole = np.concatenate([self.prefix, ids, self.suffix])
        padded = np.zeros(len(whole), np.uint16)
        padded[len(self.prefix) : len(self.prefix) + len(ids)] = lengths
        return text, whole, padded

    def byte_lengths(self, ids: np.ndarray) -> np.ndarray | None:
        """Bytes per token of ids that a model wrote; None where only a text could tell."""
        return None if self._byte_table is None else self._byte_table[ids]


def _byte_table(tokenizer: Any) -> np.ndarray | None:
    """Bytes of each id of a byte-level BPE (one character of a token is one byte), uint16 [V]; None for other kinds."""
    if type(tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
        return None
    table = np.zeros(len(tokenizer), np.uint16)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        table[number] = 0 if number in special else len(token)
    return table


def _lengths_from_begins(text: str, begins: np.ndarray) -> np.ndarray:
    """Bytes per token from the character where each begins; a character that tokens share goes to the last of them."""
    widths = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    per_char = 1 + (widths >= 0x80) + (widths >= 0x800) + (widths >= 0x10000)
    byte_at = np.concatenate(([0], np.cumsum(per_char)))
    edges = np.concatenate((byte_at[begins], [byte_at[-1]]))
    if len(begins):
        edges[0] = 0
    return np.diff(np.maximum.accumulate(edges)).astype(np.uint16)
