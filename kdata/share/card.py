"""The dataset card, DATASET/README.md: written from the dataset, and its costs from the progress log beside it, if any.

The same dataset and log give the same bytes. Text from data (domains, licences, model names, settings) is escaped by default;
only the template's own Markdown is markup. What a person writes between the two notes marks is kept byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import yaml
from pydantic import ValidationError

from kdata.errors import ConfigError, KdataError
from kdata.format.codec import codec_of
from kdata.format.files import lock_of, storage_errors, write_atomically
from kdata.format.schema import CodecError, index_schema, payload_schema
from kdata.observe.journal import Took, find_journal, lines_of, read_journal, took
from kdata.observe.text import duration, energy_text, hours_text, human_bytes, number, one_line
from kdata.selection.plan import PlanInfo
from kdata.store.dataset import Dataset
from kdata.store.kept_counts import kept_by_domain, kept_lines
from kdata.store.listed import PLANS, SCORES, read_listing
from kdata.store.sql import is_name

NOTES_BEGIN, NOTES_END = b"<!-- notes: begin -->", b"<!-- notes: end -->"
EMPTY_NOTES = (
    b"\nWhat a reader should know and the files do not say. This part is kept when the card is written again.\n"
)

# Licence identifiers that the Hub knows. Any other becomes `other`, and the table in the card gives its name.
HUB_LICENSES = frozenset(
    """
    apache-2.0 mit isc unlicense wtfpl zlib ncsa postgresql ofl-1.1 bsl-1.0 mpl-2.0 ms-pl epl-1.0
    epl-2.0 eupl-1.1 eupl-1.2 ecl-2.0 afl-3.0 artistic-2.0 osl-3.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 gfdl cc cc0-1.0 cc-by-2.0 cc-
    by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-
    nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 odbl odc-by
    pddl cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0 c-uda openrail llama2 llama3 llama3.1
    llama3.2 llama3.3 gemma unknown
    """.split()  # noqa: SIM905, a word list reads better than sixty quoted lines
)
_MARKS = re.compile(r"[\\*_\[\]#~$!]")
_ENTITIES = {ord(c): f"&#{ord(c)};" for c in "&<>|`\"'"}
_MEANS = (
    "count(*) as num_rows, sum(num_tokens)::bigint as tokens, sum(num_target_tokens)::bigint as target_tokens"
) + "".join(
    f", sum({column} * num_target_tokens)"
    f" / nullif(sum(num_target_tokens) filter (where {column} is not null), 0) as {name}"
    for column, name in (("nll", "nll"), ("mean_entropy", "entropy"), ("kept_mass", "kept_mass"))
)


@dataclass(frozen=True)
class Facts:
    """Numbers about a dataset: sizes in bytes, NLL and entropy in nats per target token.

    `domains` and `sources` have the columns of `_MEANS` beside their name; means are weighted by target tokens.
    """

    rows: int
    tokens: int
    target_tokens: int
    shards: int
    payload_bytes: int
    index_bytes: int
    codec_error: CodecError | None
    domains: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    licenses: list[dict[str, Any]]
    rejects: list[dict[str, Any]]


SOURCE_WORDS = {  # by the kind of a source
    "generate": "text that the teacher wrote",
    "capture": "text that the teacher read",
    "import": "rows of another tool",
    "split": "rows of another dataset",
    "reread": "rows of another dataset, read again",
    "combine": "the average of several teachers on the same rows",
    "retokenize": "rows of another dataset, for another tokenizer",
    "soften": "rows of another dataset, softer where the text may be private",
}


def facts(dataset: Dataset) -> Facts:
    """Numbers about a dataset, from its manifest and by SQL over its index and rejects."""
    entries = dataset.manifest

    def size(folder: str) -> int:
        return sum(f.bytes for e in entries for n, f in e.files.items() if n.startswith(f"{folder}/"))

    measured = {r["name"]: r for r in _sql(dataset, f"select source as name, {_MEANS} from rows group by 1")}
    nothing = {"num_rows": 0, "tokens": 0, "target_tokens": 0}
    sources = [
        {
            "name": name,
            "kind": source.kind,
            "shards": sum(e.source == name for e in entries),
            "num_units": source.num_units,
            "settings": flatten(source.settings),
            **measured.get(name, nothing),
        }
        for name, source in sorted(dataset.info.sources.items())
    ]
    return Facts(
        rows=dataset.num_rows,
        tokens=dataset.num_tokens,
        target_tokens=sum(e.target_tokens for e in entries),
        shards=len(entries),
        payload_bytes=size("data"),
        index_bytes=size("index"),
        codec_error=codec_error(dataset),
        domains=_sql(dataset, f"select domain as name, {_MEANS} from rows group by 1 order by tokens desc, name"),
        sources=sources,
        licenses=_sql(
            dataset,
            "select domain, license, count(*) as num_rows, count(distinct origin) as origins, "
            "min(origin) as example from rows group by all order by domain, license nulls last",
        ),
        rejects=_sql(
            dataset,
            "select source, reason, count(*) as num_rows, min(detail) as example from rejects group by all "
            "order by num_rows desc, source, reason",
        ),
    )


def _sql(dataset: Dataset, query: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = dataset.sql(query).to_pylist()
    return rows


def codec_error(dataset: Dataset) -> CodecError | None:
    """Codec error of the whole dataset: means weighted by the positions that keep entries, maxima over all shards."""
    return CodecError.joined((entry.num_kept_positions, entry.codec_error) for entry in dataset.manifest)


def flatten(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, value as JSON, strings bare), in the order of keys."""
    pairs: list[tuple[str, str]] = []
    for key, value in sorted(settings.items()):
        if isinstance(value, dict) and value:
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            pairs.append((f"{prefix}{key}", text))
    return pairs


class Markdown(str):
    """Text that is already Markdown; any other string is escaped when it is put into the card."""


def escape_markdown(value: object) -> str:
    """Text from data as Markdown that shows exactly this text, also in a table cell."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        return "not stated"
    marked = _MARKS.sub(lambda match: "\\" + match[0], one_line(value))
    # After the backslashes: the `#` of a reference must stay bare.
    return marked.translate(_ENTITIES)


def cost_of(dataset: Dataset) -> list[Took]:
    """What it took to write each source, from the progress log; none where there is no log.

    Tokens are counted in the dataset, not in the log: a killed attempt may not have logged its last ones.
    """
    lines = read_journal(find_journal(dataset.path))
    return [
        one.model_copy(update={"name": name, "tokens": tokens_of(dataset, {name})})
        for name in sorted(dataset.info.sources)
        for one in took(lines_of(lines, name))
    ]


def tokens_of(dataset: Dataset, sources: Collection[str]) -> int:
    """Tokens of these sources that a teacher read, or wrote (generate)."""
    written = {name for name, source in dataset.info.sources.items() if source.kind == "generate"}
    entries = [entry for entry in dataset.manifest if entry.source in sources]
    return sum(entry.target_tokens if entry.source in written else entry.tokens for entry in entries)


def write_card(dataset: Dataset, *, title: str | None = None, cost: list[Took] | None = None) -> Path:
    """Write DATASET/README.md, as `card_page` gives it, and return its path."""
    path = dataset.path / "README.md"
    with storage_errors(path), lock_of(dataset.path):
        write_atomically(path, card_page(dataset, title=title, cost=cost))
    return path


def card_page(dataset: Dataset, *, title: str | None = None, cost: list[Took] | None = None) -> bytes:
    """The card as UTF-8 bytes; the notes of a card that is there are kept byte for byte.

    Args:
        title: headline; None writes one with the teacher's name.
        cost: what each source took; None reads the log beside the dataset (a copy of a dataset has none).
    Raises:
        ConfigError: README.md exists and is not a card (it has no notes marks).
        CorruptError: a part of the index or of the rejects is missing or damaged.
    """
    notes = _notes(dataset.path / "README.md")
    page = _render(dataset, title, cost_of(dataset) if cost is None else cost).encode()
    before, after = page.split(NOTES_BEGIN + NOTES_END)
    return before + NOTES_BEGIN + notes + NOTES_END + after


def _notes(path: Path) -> bytes:
    """The bytes between the marks of the card; EMPTY_NOTES where there is no card yet."""
    if not path.exists():
        return EMPTY_NOTES
    content = path.read_bytes()
    begin, end = content.find(NOTES_BEGIN), content.rfind(NOTES_END)
    if begin < 0 or end < begin:
        raise ConfigError(
            f"{path} is not a card of kdata, or it lost its notes marks. Move it away, or put its text between "
            f"{NOTES_BEGIN.decode()} and {NOTES_END.decode()}, then run the same command again."
        )
    return content[begin + len(NOTES_BEGIN) : end]


def _render(dataset: Dataset, title: str | None, cost: list[Took]) -> str:
    codec_of(dataset.info.codec)  # an unknown one is refused
    numbers = facts(dataset)
    headline = one_line(title or f"What {dataset.info.teacher.model} believed, token by token")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdata.share", ""),
        finalize=escape_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        header=Markdown(_header(numbers, headline)),
        notes=Markdown((NOTES_BEGIN + NOTES_END).decode()),
        title=headline,
        info=dataset.info,
        fingerprint=dataset.content_digest,
        facts=numbers,
        parameters=flatten(dataset.info.codec.parameters),
        cost=cost,
        duration=duration,
        hours_text=hours_text,
        energy_text=energy_text,
        scores=dataset.listed(SCORES),
        plans=dataset.listed(PLANS),
        positions=[(info.name, info.positions) for info in _plans(dataset)],
        kept_at=list(kept_lines(dataset)),
        source_words=SOURCE_WORDS,
        kept_domains=kept_by_domain(dataset) if dataset.info.codec.keeps_some_positions else [],
        has_tokenizer=(dataset.path / "tokenizer").is_dir() or bool(dataset.info.tokenizer_files),
        index_columns=_columns(index_schema()),
        payload_columns=_columns(payload_schema(dataset.info.codec.id, dataset.info.codec.version)),
        human_bytes=human_bytes,
        number=number,
    )


def _plans(dataset: Dataset) -> Iterator[PlanInfo]:
    """What the plans with positions say, of the dataset as it is now. A damaged one is passed over: `verify` names it."""
    for name in filter(is_name, dataset.listed(PLANS)):
        try:
            info = PlanInfo.model_validate(read_listing(dataset.path / "plans" / f"{name}.json", PLANS)[1])
        except (KdataError, ValidationError):
            continue
        if info.positions is not None and info.dataset_digest == dataset.content_digest:
            yield info


def _columns(schema: pa.Schema) -> list[tuple[Markdown, Markdown, Markdown]]:
    """Name, type and meaning of each column; they are from the package's own documents, not from data."""
    return [
        (
            Markdown(f"`{field.name}`"),
            Markdown(f"`{_type_name(field.type)}`"),
            Markdown(field.metadata[b"doc"].decode()),
        )
        for field in schema
    ]


def _type_name(kind: pa.DataType) -> str:
    """The name of an Arrow type in the documents of `schemas/v1`."""
    if isinstance(kind, pa.ListType):
        return f"list<{_type_name(kind.value_type)}>"
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _header(numbers: Facts, title: str) -> str:
    """The YAML that the Hub reads. Configs name the Parquet index only, as one folder cannot mix formats."""
    # Not `huggingface_hub.DatasetCardData`: the client is an optional extra, and the card has the same bytes without it.
    stated = {str(row["license"] or "unknown").strip().lower() for row in numbers.licenses}
    names = sorted({name if name in HUB_LICENSES else "other" for name in stated})
    header: dict[str, Any] = {"pretty_name": re.sub(r"[<>]", "", title)}
    if names:
        header["license"] = names[0] if len(names) == 1 else names
    if names == ["other"] and len(stated) == 1:
        header["license_name"] = re.sub(r"[^a-z0-9.]+", "-", stated.pop()).strip("-.") or "other"
    header["tags"] = ["logits", "distillation", "kdata"]
    header["size_categories"] = [_size_category(numbers.rows)]
    data_files = [{"split": "train", "path": "index/*.parquet"}]
    header["configs"] = [{"config_name": "default", "data_files": data_files}]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, name in enumerate(names):
        if rows < 1000 * 10**power:
            return f"n<{name}" if power == 0 else f"{names[power - 1]}<n<{name}"
    return "n>1T"
