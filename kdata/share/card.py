"""The dataset card, DATASET/README.md: written from the dataset, and its costs from the progress log beside it, if any.

The same dataset and log give the same bytes. Text from data (domains, licences, model names, settings) is escaped by default;
only the template's own Markdown is markup. What a person writes between the two notes marks is kept byte for byte.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import yaml
from pydantic import BaseModel, ValidationError

from kdata.errors import ConfigError, KdataError
from kdata.format.codec import codec_of
from kdata.format.files import inside, lock_of, storage_errors, write_atomically
from kdata.format.json_text import read_json
from kdata.format.plain import open_plain
from kdata.format.schema import FORMER, IDENTITY_KEYS, CodecError, DatasetInfo, SourceInfo, index_schema, payload_schema
from kdata.observe.journal import Took, find_journal, lines_of, read_journal, took
from kdata.observe.text import duration, energy_text, hours_text, human_bytes, number, one_line
from kdata.selection.plan import PlanInfo
from kdata.store.dataset import Dataset
from kdata.store.kept_counts import kept_by_domain, kept_lines
from kdata.store.listed import PLANS, SCORES, read_listing
from kdata.store.queryable import is_name

NOTES_BEGIN, NOTES_END = b"<!-- notes: begin -->", b"<!-- notes: end -->"
EMPTY_NOTES = (
    b"\nWhat a reader should know and the files do not say. This part is kept when the card is written again.\n"
)

AUDIT = "audit.json"  # what was looked at before the dataset was shared, see `kdata.share.publication`
MAX_AUDIT_BYTES = 10 << 20
MAX_CARD_BYTES = 64 << 20

# Licence identifiers that the Hub knows. Any other becomes `other`, and the table in the card gives its name.
HUB_LICENSES = frozenset(
    """
    apache-2.0 mit isc unlicense wtfpl zlib ncsa postgresql ofl-1.1 bsl-1.0 mpl-2.0 ms-pl epl-1.0
    epl-2.0 eupl-1.1 eupl-1.2 ecl-2.0 afl-3.0 artistic-2.0 osl-3.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 agpl-3.0 gfdl cc cc0-1.0 cc-by-2.0
    cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 odbl odc-by
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


class Looked(BaseModel):
    """One finding in audit.json; see `kdata.share.fitness.Finding`."""

    check: str
    level: str
    what: str
    source: str | None = None


class Said(BaseModel):
    """What whoever shared the dataset said; see `kdata.share.fitness.About`."""

    closed_teacher: bool = False
    teacher_license: str | None = None
    languages: list[str] = []


class Record(BaseModel):
    """audit.json. A stranger may have written it: all of it is text to show."""

    dataset: str = ""
    about: Said = Said()
    findings: list[Looked] = []


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
    kept_mass: float | None
    codec_error: CodecError | None
    domains: list[dict[str, Any]]
    sources: list[dict[str, Any]]
    licenses: list[dict[str, Any]]
    rejects: list[dict[str, Any]]


LEVELS = {  # of findings, for a person
    "stop": "against sharing", "ask": "ask", "keep": "conditions", "free": "clear", "skipped": "skipped",
    "unknown": "not known",
}  # fmt: skip
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
        kept_mass=_sql(dataset, f"select {_MEANS} from rows")[0]["kept_mass"],
        codec_error=codec_error(dataset),
        domains=_sql(dataset, f"select domain as name, {_MEANS} from rows group by 1 order by tokens desc, name"),
        sources=sources,
        licenses=facts_licenses(dataset),
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


def card_page(
    dataset: Dataset, *, title: str | None = None, cost: list[Took] | None = None, record: Record | None = None
) -> bytes:
    """The card as UTF-8 bytes; the notes of a card that is there are kept byte for byte.

    Args:
        title: headline; None writes one with the teacher's name.
        cost: what each source took; None reads the log beside the dataset (a copy of a dataset has none).
        record: what was looked at before it is shared; None reads audit.json, if it is of the dataset as it is.
    Raises:
        ConfigError: README.md exists and is not a card (it has no notes marks).
        CorruptError: a part of the index or of the rejects is missing or damaged.
    """
    notes = _notes(dataset.path / "README.md")
    took = cost_of(dataset) if cost is None else cost
    page = _render(dataset, title, took, _recorded(dataset) if record is None else record).encode()
    before, after = page.split(NOTES_BEGIN + NOTES_END)
    return before + NOTES_BEGIN + notes + NOTES_END + after


def _notes(path: Path) -> bytes:
    """The bytes between the marks of the card; EMPTY_NOTES where there is no card yet."""
    if not path.exists():
        return EMPTY_NOTES
    with open_plain(path) as file:
        content = file.read(MAX_CARD_BYTES + 1)
    begin, end = content.find(NOTES_BEGIN), content.rfind(NOTES_END)
    if begin < 0 or end < begin or len(content) > MAX_CARD_BYTES:
        raise ConfigError(
            f"{path} is not a card of kdata, lost its notes marks, or has more than {MAX_CARD_BYTES >> 20} MiB. "
            f"Move it away, or put its text between {NOTES_BEGIN.decode()} and {NOTES_END.decode()}, then run "
            "the same command again."
        )
    return content[begin + len(NOTES_BEGIN) : end]


def _recorded(dataset: Dataset) -> Record:
    """audit.json; nothing where there is none, or where it is of another state of the dataset, or damaged."""
    try:
        record = Record.model_validate(read_json(inside(dataset.path, AUDIT), MAX_AUDIT_BYTES))
    except (OSError, ValueError, KdataError):
        return Record()
    return record if record.dataset == dataset.content_digest else Record()


def headline(dataset: Dataset) -> str:
    """The title of a card to which nobody gave one."""
    return one_line(f"What {dataset.info.teacher.model} believed, token by token")


def licenses_of(dataset: Dataset) -> list[str]:
    """The licenses of the texts as the Hub names them: one that it does not know is `other`, none stated `unknown`."""
    return _hub_licenses(facts_licenses(dataset))


def facts_licenses(dataset: Dataset) -> list[dict[str, Any]]:
    """Licenses by domain: rows, origins, and one of these."""
    return _sql(
        dataset,
        "select domain, license, count(*) as num_rows, count(distinct origin) as origins, "
        "min(origin) as example from rows group by all order by domain, license nulls last",
    )


def _stated(licenses: list[dict[str, Any]]) -> set[str]:
    return {str(row["license"] or "unknown").strip().lower() for row in licenses}


def _hub_licenses(licenses: list[dict[str, Any]]) -> list[str]:
    return sorted({name if name in HUB_LICENSES else "other" for name in _stated(licenses)})


def command_of(source: SourceInfo, info: DatasetInfo) -> str | None:
    """The command that would make a source again; None for kinds that start from another dataset.

    The texts are named by their digest in "How it was made". A value that is no plain word is left as `...`: the command
    stands where a reader copies it from.
    """
    texts = {"capture": "--corpus", "generate": "--prompts"}.get(source.kind)
    if texts is None:
        return None
    teacher = info.teacher
    words = ["kdata", source.kind, "OUT", "--teacher", _plain_word(teacher.model), texts, "TEXTS"]
    if teacher.revision is not None:
        words += ["--set", f"teacher.revision={_plain_word(teacher.revision)}"]
    if teacher.backend in ("vllm", "vllm-server", "transformers"):
        words += ["--backend", teacher.backend]
    for key, value in flatten(source.settings):
        key = "num_draws" if key == "draws" else key
        is_identity = key.partition(".")[2] in IDENTITY_KEYS or key == FORMER
        if value not in ("null", "[]", "{}") and not is_identity:
            words += ["--set", f"{_plain_word(key)}={_plain_word(value)}"]
    lines = [""]
    for word in words:  # in an indented block of Markdown, which ends where a line is not indented
        if word.startswith("-") and len(lines[-1]) > 60:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n    ".join(lines)


def _plain_word(value: str) -> str:
    return shlex.quote(value) if re.fullmatch(r"[\w./:@+,\[\] \"{}-]{1,200}", value) and "\n" not in value else "..."


def _render(dataset: Dataset, title: str | None, cost: list[Took], record: Record) -> str:
    codec_of(dataset.info.codec)  # an unknown one is refused
    numbers = facts(dataset)
    name = headline(dataset) if title is None else one_line(title)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdata.share", ""),
        finalize=escape_markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        header=Markdown(_header(numbers, name, record.about.languages)),
        record=record,
        levels=LEVELS,
        licenses=sorted(_stated(numbers.licenses)),
        commands=[
            (source, Markdown(command))
            for source, own in sorted(dataset.info.sources.items())
            if (command := command_of(own, dataset.info)) is not None
        ],
        notes=Markdown((NOTES_BEGIN + NOTES_END).decode()),
        title=name,
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


def _header(numbers: Facts, title: str, languages: list[str]) -> str:
    """The YAML that the Hub reads. Configs name the Parquet index only: `datasets` reads all of a card's configurations with
    the reader of the first one, so the Arrow files of the payload cannot be one beside it."""
    # Not `huggingface_hub.DatasetCardData`: the client is an optional extra, and the card has the same bytes without it.
    stated, names = _stated(numbers.licenses), _hub_licenses(numbers.licenses)
    header: dict[str, Any] = {"pretty_name": re.sub(r"[<>]", "", title)}
    if names:
        header["license"] = names[0] if len(names) == 1 else names
    if names == ["other"] and len(stated) == 1:
        header["license_name"] = re.sub(r"[^a-z0-9.]+", "-", stated.pop()).strip("-.") or "other"
    if languages:
        header["language"] = [str(code) for code in languages]
    header["task_categories"] = ["text-generation"]
    header["tags"] = ["logits", "distillation", "kdata"]
    header["size_categories"] = [_size_category(numbers.rows)]
    data_files = [{"split": "train", "path": "index/*.parquet"}]
    header["configs"] = [{"config_name": "index", "default": True, "data_files": data_files}]
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")


def _size_category(rows: int) -> str:
    """The Hub's name for a number of rows."""
    names = ["1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T"]
    for power, name in enumerate(names):
        if rows < 1000 * 10**power:
            return f"n<{name}" if power == 0 else f"{names[power - 1]}<n<{name}"
    return "n>1T"
