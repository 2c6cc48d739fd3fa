"""Import rows of another tool as they are (codec `verbatim`, tail absent), and count everything that is wrong with them."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from kdata.calls import validated
from kdata.config import RowsConfig
from kdata.corpus.encode import TextEncoder
from kdata.errors import ConfigError, DataError, first_line
from kdata.format.files import journal_of, local_path, temporary_folder
from kdata.format.json_text import MAX_TOKENIZER_BYTES, parse_row, row_lines
from kdata.format.manifest import new_info
from kdata.format.records import Record, Reject, RowError, UnitResult, inputs_digest
from kdata.format.rejects import checked
from kdata.format.schema import FORMAT_VERSION, CodecInfo, DatasetInfo, SourceInfo, TeacherInfo, TokenizerInfo
from kdata.observe.progress import Task
from kdata.share.interchange import axolotl, distillkit, megatron, nemo, plain, vllm_json
from kdata.share.interchange.rows import (
    Aligned,
    ImportReport,
    OverOne,
    PeerRow,
    as_ids,
    flat,
    place,
    spans,
    unusable,
)
from kdata.share.interchange.source import PeerFile, Source, identity_of
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset
from kdata.store.shard import stored_rejects, stored_shard
from kdata.store.vocabulary import num_ids
from kdata.store.writer import Writer
from kdata.teachers.model import load_tokenizer, tokenizer_files, tokenizer_info

Format = Literal["distillkit", "axolotl", "plain", "vllm", "nemo", "megatron"]
ALIGNED: dict[Format, Aligned] = {
    "distillkit": "after", "axolotl": "end", "plain": "with", "vllm": "with", "nemo": "after", "megatron": "after",
}  # fmt: skip
PEER_SUFFIXES = (".parquet", ".jsonl")
SUFFIXES: dict[Format, tuple[str, ...]] = {"vllm": vllm_json.SUFFIXES, "megatron": (".tar",)}
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ROWS_AT_ONCE = 64
ENOUGH_POSITIONS, ENOUGH_ENTRIES = 200, 4  # positions, and entries of each, from which the base of logarithms shows
MOST_HELD = 8  # units that wait for so many positions
ReadRows = Callable[[Iterator[pa.RecordBatch]], Iterator[PeerRow]]


class ImportConfig(RowsConfig):
    """What is imported, and how to read it."""

    format: Format = Field(
        description="Which tool wrote it; plain: nested lists, also under other names; vllm: its JSON with prompt_logprobs; "
        "nemo: NeMo-Aligner's top-k logits; megatron: its cache."
    )
    aligned: Aligned | None = Field(
        None,
        description="Token that list j is about: with (token j), after (j + 1), end (the last list is about the last token). "
        "Null takes the format's own: distillkit, nemo and megatron after, axolotl end, plain and vllm with.",
    )
    over_one: OverOne = Field(
        "keep",
        description="A position whose probabilities sum to more than 1: keep it as it is, mask (leave it out), or refuse "
        "the import. It is counted in any case.",
    )
    values: plain.Values | None = Field(
        None,
        description="What the numbers of plain lists are. Null reads it from the column's name, or the numbers. logprobs is "
        "for axolotl, too: its numbers are natural logarithms, even where they look like others.",
    )
    ids_column: str | None = Field(None, description="Column with the ids of plain lists, where several could be it.")
    values_column: str | None = Field(None, description="Column with their values, where several could be it.")
    samples: str | None = Field(
        None,
        description="Parquet or JSON lines with the token ids (input_ids) of the samples of Megatron's cache, in the order "
        "in which the run drew them.",
    )
    tokenizer: str | None = Field(
        None,
        description="Folder or Hub name of the tokenizer that produced the ids. Null takes the one beside the files, unless "
        "vocab_size is given.",
    )
    vocab_size: int | None = Field(None, gt=1, lt=2**31, description="Null takes the format's own, or the tokenizer's.")
    teacher: str = Field("unknown", description="Name of the model that gave the log-probabilities.")
    domain: str = Field("imported", description="Domain of rows without one.")
    compression: str | None = Field(None, description="DistillKit's YAML, where it is not beside the files.")
    unit_tokens: int = Field(32768, ge=1, description="Tokens of one work unit, which is one shard.")
    name: str = Field("import", pattern=r"^[a-z0-9][a-z0-9_-]*$", description="Name of the source; prefix of shards.")


@validated
def import_dataset(
    source: Path | str, root: Path | str, config: ImportConfig, *, resume: str = "auto", log: Path | None = None
) -> tuple[Dataset, ImportReport]:
    """Import another tool's files into the dataset at `root`.

    Args:
        source: a file or folder of Parquet or JSONL files (vllm: .jsonl or .json; megatron: .tar), here, on the Hub
            (hf://OWNER/NAME) or at a URL; files are read where they are, a few rows at a time.
        resume: auto, never or must; see `Writer`.
    Returns:
        The dataset, and the counts of all rows of the source that are in it.
    Raises:
        MissingError: the source does not exist.
        ConfigError: the vocabulary's size is not known, `root` is a URL, or `values` are not for this format.
        DataError: the columns are not the format's, the numbers are not log-probabilities, or no row at all can be used;
            `strict` is set and a row cannot be used.
        MismatchError: the dataset was begun with other settings.
    """
    root = local_path(root, "import into a folder, and copy it to the Hub with `kdata push`")
    if config.format == "megatron" and config.samples is None:
        raise ConfigError(
            "Megatron's cache holds no tokens, because a student run draws them again; name a file with the token ids of its "
            "samples in their order: --set samples=FILE (Parquet or JSON lines, column input_ids)"
        )
    if (
        config.values is not None
        and config.format != "plain"
        and (config.format, config.values) != ("axolotl", "logprobs")
    ):
        raise ConfigError(
            f"values={config.values!r} is for plain lists; the format {config.format} says what its numbers are"
        )
    where = Source(source)
    files = where.files(SUFFIXES.get(config.format, PEER_SUFFIXES))
    tokenizer = _tokenizer(where, config)
    compression = None
    if config.format == "distillkit":
        compression = distillkit.find_compression(where, config.compression, lambda: next(_first(batches(files)), None))
    info = _identity(config, compression, tokenizer)
    apart = {"name", "strict", "tokenizer", "compression", "teacher", "vocab_size", "samples"}
    new = {"values", "ids_column", "values_column"}  # absent where not set, as an older kdata wrote it
    settings = {
        **config.model_dump(exclude=apart | {name for name in new if getattr(config, name) is None}),
        "aligned": config.aligned or ALIGNED[config.format],
        "sha256": identity_of(
            [*files, *([] if config.samples is None else Source(config.samples).files(PEER_SUFFIXES))]
        ),
        "compression": None if compression is None else compression.model_dump(),
    }
    report = ImportReport(notes=compression.notes() if compression else [])
    rows = _peer_rows(config, compression, files)
    with ExitStack() as stack:
        folder = None if tokenizer is None else stack.enter_context(tokenizer_files(tokenizer))
        kind = SourceInfo(kind="import", settings=settings, num_units=None)
        writer = stack.enter_context(Writer(root, info, config.name, kind, resume=resume, tokenizer_dir=folder))
        title, journal = f"{config.name}: reading", log or journal_of(root)
        task = stack.enter_context(Task(title, None, "rows", journal, source=config.name))
        units, usable = 0, False
        for unit, counts in _units(rows, config, info.vocab_size, tokenizer):
            rows_read = len(unit.records) + len(unit.rejects)
            if unit.number in writer.committed:
                entry = writer.committed[unit.number]
                rejects = stored_rejects(root, entry)[len(unit.rejects) :] if entry.rejected else []
                for reject in rejects:  # rows whose id the dataset had already
                    counts.pop(reject.id, None)
                task.skip(rows_read, shard=stored_shard(root, entry))
            else:
                unit = _without_present(unit, writer, usable)
                counts = {record.id: counts[record.id] for record in unit.records}
                if not unit.records and not usable:
                    reject = unit.rejects[0]
                    raise DataError(f"not one row could be imported. Row {reject.id!r}: {reject.detail}")
                checked(unit, config.strict)
                shard = writer.commit(unit)
                task.advance(rows_read, tokens=shard.entry.tokens, shard=shard)
            for row in counts.values():
                report.add(row)
            units, usable = unit.number + 1, True
        if not units:
            raise DataError(f"{source} has no rows to import; name files with rows")
        writer.finish(units)
    return open_dataset(root), report


def _tokenizer(where: Source, config: ImportConfig) -> Any:
    """The tokenizer that is named, or the one beside the files; None without any."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer, None)
    if config.vocab_size is not None:
        return None
    beside = {file.name.rpartition("/")[2]: file for file in where.beside(*TOKENIZER_NAMES, most=MAX_TOKENIZER_BYTES)}
    if "tokenizer.json" not in beside:
        return None
    with temporary_folder("tokenizer") as folder:
        for name, file in beside.items():
            with file.open() as content:
                (folder / name).write_bytes(content.read())
        return load_tokenizer(folder, None)


def _first(read: Iterator[pa.RecordBatch | RowError]) -> Iterator[pa.RecordBatch]:
    return (batch for batch in read if isinstance(batch, pa.RecordBatch))


def _samples(config: ImportConfig) -> Iterator[np.ndarray]:
    """Token ids of the samples of Megatron's cache."""
    assert config.samples is not None
    for batch in _first(batches(Source(config.samples).files(PEER_SUFFIXES))):
        if megatron.TOKENS_COLUMN not in batch.schema.names:
            raise DataError(f"{config.samples} has no column {megatron.TOKENS_COLUMN!r} with the token ids of samples")
        lengths, token_ids = flat(batch.column(megatron.TOKENS_COLUMN), as_ids)
        yield from (token_ids[part] for part in spans(lengths))


def batches(files: list[PeerFile]) -> Iterator[pa.RecordBatch | RowError]:
    """Rows of all files, a few at a time, and lines that are no rows. Raises DataError for a file that cannot be read."""
    for peer in files:
        path = peer.place
        try:
            if peer.suffix == ".parquet":
                file = pq.ParquetFile(peer.open())
                names = file.schema_arrow.names
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise DataError(f"{path} has the column {twice[0]!r} twice; leave one out")
                yield from file.iter_batches(batch_size=ROWS_AT_ONCE)
                continue
            with peer.open() as lines:
                numbered = ((number, line) for number, line in enumerate(row_lines(lines), 1) if line.strip())
                while some := list(itertools.islice(numbered, ROWS_AT_ONCE)):
                    yield from _of_lines([_parsed(line, f"line {number} of {peer.name}") for number, line in some])
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read: {first_line(error)}") from error


def _parsed(line: bytes, place: str) -> dict[str, Any] | RowError:
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{place} is in UTF-16; convert the file to UTF-8 first: iconv -f UTF-16 -t UTF-8")
    try:
        row = parse_row(line)
    except DataError as error:
        return RowError("not_json", f"{place} is not JSON: {first_line(error)}")
    if not isinstance(row, dict):
        return RowError("not_json", f"{place} is not a JSON object")
    return row or RowError("form", f"{place} is an object without a value")  # of which pyarrow makes no row


def _of_lines(rows: list[dict[str, Any] | RowError]) -> Iterator[pa.RecordBatch | RowError]:
    """Rows as columns, null where a row lacks one, and errors in their places.

    Rows whose values have different types make batches of their own. (pyarrow keeps only the columns of the first row.)
    """
    for is_error, some in itertools.groupby(rows, lambda row: isinstance(row, RowError)):
        if is_error:
            yield from cast(Iterator[RowError], some)
            continue
        good = cast(list[dict[str, Any]], list(some))
        names = list(dict.fromkeys(name for row in good for name in row))
        try:
            yield pa.RecordBatch.from_pylist([{name: row.get(name) for name in names} for row in good])
        except (pa.ArrowException, OverflowError):
            for row in good:
                yield _of_one_line(row)


def _of_one_line(row: dict[str, Any]) -> pa.RecordBatch | RowError:
    try:
        return pa.RecordBatch.from_pylist([row])
    except (pa.ArrowException, OverflowError) as error:
        return RowError("form", f"the values of row {row.get('id')!r} cannot be columns: {first_line(error)}")


def _peer_rows(
    config: ImportConfig, compression: distillkit.AnyCompression | None, files: list[PeerFile]
) -> Iterator[PeerRow]:
    """Rows of all files, before they are placed."""
    if config.format == "vllm":
        return vllm_json.read_rows(files)
    if config.format == "megatron":
        return megatron.read_rows(files, _samples(config))
    read: ReadRows
    if compression is not None:
        read = partial(distillkit.read_rows, compression=compression)
    elif config.format == "plain":
        read = plain.Reader(config.ids_column, config.values_column, config.values)
    else:
        read = axolotl.read_rows if config.format == "axolotl" else nemo.read_rows
    return _row_by_row(read, batches(files))


def _row_by_row(read: ReadRows, source_batches: Iterator[pa.RecordBatch | RowError]) -> Iterator[PeerRow]:
    """Rows of all batches; a row that makes its batch unreadable carries the reason.

    Raises DataError where no row of the first batch can be read: then the files are not of this format.
    """
    any_read = False
    for batch in source_batches:
        if isinstance(batch, RowError):
            yield unusable(batch)
            continue
        try:
            rows = list(read(iter([batch])))
        except DataError as error:
            rows = [row for n in range(batch.num_rows) for row in _single_row(read, batch.slice(n, 1))]
            if not any_read and all(row.refusal for row in rows):
                raise error
        any_read = any_read or bool(rows)
        yield from rows


def _single_row(read: ReadRows, row: pa.RecordBatch) -> list[PeerRow]:
    try:
        return list(read(iter([row])))
    except DataError as error:
        [about] = plain.about_rows(row)
        return [unusable(RowError("misaligned", str(error)), **about)]


def _without_present(unit: UnitResult, writer: Writer, usable: bool) -> UnitResult:
    """A unit in which rows whose id the dataset has already are rejects. Raises DataError where it is all of them."""
    present = writer.present(record.id for record in unit.records)
    if not present:
        return unit
    if len(present) == len(unit.records) and not usable:
        writer.refuse_twice(sorted(present))
    detail = "the dataset has a row with this id already"
    rejects = [Reject(r.id, r.domain, "id_twice", detail) for r in unit.records if r.id in present]
    records = [record for record in unit.records if record.id not in present]
    return UnitResult(unit.number, records, [*unit.rejects, *rejects], inputs_digest(records))


def _identity(config: ImportConfig, compression: distillkit.AnyCompression | None, tokenizer: Any) -> DatasetInfo:
    """The identity of the dataset; what the files do not say is marked unknown."""
    own = compression.d if compression else None
    vocab_size = config.vocab_size or own or (None if tokenizer is None else num_ids(tokenizer.backend_tokenizer))
    if vocab_size is None:
        raise ConfigError("the files do not hold the vocabulary's size; set --vocab-size N or --tokenizer FOLDER")
    unknown = TokenizerInfo(hash="unknown", chat_template_hash=None, bos_id=None, eos_id=None)
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=vocab_size,
        teacher=TeacherInfo(
            model=config.teacher,
            revision=None,
            weights_hash=None,
            backend=f"imported from {config.format}",
            backend_version="unknown",
            dtype="unknown",
            logprobs="as the other tool returns them",
            deterministic=False,
        ),
        tokenizer=unknown if tokenizer is None else tokenizer_info(tokenizer),
        codec=CodecInfo(
            id="verbatim", version=1, kind="topk", parameters={} if compression is None else {"k": compression.k}
        ),
        tail="absent",
    )


def _units(
    rows: Iterator[PeerRow], config: ImportConfig, vocab_size: int, tokenizer: Any
) -> Iterator[tuple[UnitResult, dict[str, ImportReport]]]:
    """Rows in units of about `unit_tokens`, each with the counts of its records by id.

    Raises DataError where most positions so far cannot be probabilities.
    """
    aligned = config.aligned or ALIGNED[config.format]
    encoder = None if tokenizer is None else TextEncoder(tokenizer)
    number, read, unit = 0, ImportReport(), _Unit()
    may_refuse = config.format == "plain" and config.values is None
    held: list[tuple[UnitResult, dict[str, ImportReport]]] = []  # so that nothing is written before a refusal
    seen = set[str]()
    for row_number, row in enumerate(rows):
        row_id, domain = row.id or f"row-{row_number:07d}", row.domain or config.domain
        try:
            if row_id in seen:
                raise RowError("id_twice", "an earlier row has the same id; ids must be unique")
            record, counts = place(replace(row, id=row_id, domain=domain), aligned, vocab_size, config.over_one)
        except RowError as error:
            unit.rejects.append(Reject(row_id, domain, error.reason, error.detail))
        else:
            seen.add(row_id)
            read.add(counts)
            unit.counts[row_id] = counts
            unit.records.append(record if encoder is None else _with_text(record, tokenizer, encoder))
            unit.tokens += counts.tokens
        if unit.tokens >= config.unit_tokens:
            held.append((unit.result(number), unit.counts))
            number, unit = number + 1, _Unit()
            if not may_refuse or read.positions >= ENOUGH_POSITIONS or len(held) > MOST_HELD:
                _refuse_other_numbers(read, config)
                yield from held
                held.clear()
    _refuse_other_numbers(read, config)
    yield from held
    if unit.records or unit.rejects:
        yield unit.result(number), unit.counts


@dataclass
class _Unit:
    """Rows that are committed together; `counts`: of each record, by id."""

    records: list[Record] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    counts: dict[str, ImportReport] = field(default_factory=dict)
    tokens: int = 0

    def result(self, number: int) -> UnitResult:
        """With its digest."""
        return UnitResult(number, self.records, self.rejects, inputs_digest(self.records))


def _refuse_other_numbers(report: ImportReport, config: ImportConfig) -> None:
    """Raise DataError where most positions cannot be probabilities, or where the numbers look like logarithms to base 2.

    The latter are lower than natural ones, so no sum above 1 shows them. But where a list holds nearly all of the
    probability, it sums to 1 when it is read to base 2, and to clearly less as it is. Natural lists do so by chance, and then
    others sum to more than 1 to base 2. On lists of a language model: at 13 % of the positions and above 1 at none with 4
    entries to base 2; at 3 and 63 % with natural ones. Lists that hold little, or always all, show nothing.
    """
    if report.sums_over_one > report.positions / 2 and report.max_sum > 1.5:
        raise DataError(
            f"{report.sums_over_one:,} of {report.positions:,} positions sum to more than 1 (up to {report.max_sum:.3g}), so "
            "the numbers are not natural log-probabilities but perhaps logits, or logarithms to another base; convert them "
            "to natural log-probabilities first"
        )
    enough = report.positions >= ENOUGH_POSITIONS and report.entries >= ENOUGH_ENTRIES * report.positions
    shown = (
        report.about_one_in_base_two >= 0.05 * report.positions
        and report.over_one_in_base_two <= 0.01 * report.positions
    )
    if config.format in ("plain", "axolotl") and config.values is None and enough and shown:
        raise DataError(
            f"the numbers look like logarithms to base 2: read so, {report.about_one_in_base_two:,} of {report.positions:,} "
            f"positions sum to about 1, and {report.over_one_in_base_two:,} to more. Multiply them by ln 2 = 0.6931; if they "
            "are natural, say so with --values logprobs, and name a new folder"
        )


def _with_text(record: Record, tokenizer: Any, encoder: TextEncoder) -> Record:
    """The record with the text of its tokens, where it has none, and the bytes of each token."""
    text = record.text
    if text is None:
        text = tokenizer.decode(record.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return replace(record, text=text, token_bytes=encoder.byte_lengths(record.token_ids))
