"""The format's contracts as objects: Arrow schemas read from `schemas/v1`, and typed models of the JSON files.

The Arrow schemas are the JSON documents in `schemas/v1`, and code reads them from there. The JSON files (dataset.json,
manifest lines, plan) are pydantic models here. Their published JSON Schemas are `schemas/v1/*.schema.json`; a test
compares the two.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

FORMAT_MAJOR, FORMAT_MINOR = 1, 0
FORMAT_VERSION = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"

_SCALARS = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float16": pa.float16(),
    "float32": pa.float32(),
    "float64": pa.float64(),
}


def _arrow_type(name: str) -> pa.DataType:
    if name.startswith("list<"):
        return pa.list_(pa.field("item", _SCALARS[name[5:-1]], nullable=False))
    return _SCALARS[name]


@cache
def _document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(resources.files("kdata.schemas").joinpath("v1", name).read_text("utf-8"))
    return document


def _fields(columns: list[dict[str, Any]]) -> list[pa.Field]:
    return [pa.field(c["name"], _arrow_type(c["type"]), c["nullable"], {"doc": c["doc"]}) for c in columns]


@cache
def payload_schema(codec: str, version: int) -> pa.Schema:
    """Arrow schema of a payload shard as it is stored: the common columns, then those of the codec with this id.

    A version that codes the common columns too has columns of its own. Readers see `stored.readable_schema`.
    """
    document = _document("payload.json")
    own = document["codecs"][codec]
    if is_coded(codec, version):
        return pa.schema(_fields(own["coded"]["columns"]))
    return pa.schema(_fields(document["columns"]) + _fields(own["columns"]))


def is_coded(codec: str, version: int) -> bool:
    """Whether this version of a codec stores codes in place of the common columns too (`kdata.format.stored`)."""
    coded = _document("payload.json")["codecs"].get(codec, {}).get("coded")
    return coded is not None and version >= coded["since"]


def known_codecs() -> dict[str, int]:
    """Codec ids that the format documents, with the version of each."""
    return {name: spec["version"] for name, spec in _document("payload.json")["codecs"].items()}


@cache
def index_schema() -> pa.Schema:
    """Arrow schema of an index part."""
    return pa.schema(_fields(_document("index.json")["columns"]))


@cache
def rejects_schema() -> pa.Schema:
    """Arrow schema of a rejects part."""
    return pa.schema(_fields(_document("rejects.json")["columns"]))


class Contract(BaseModel):
    """A file to which a newer minor version may have added keys: unknown keys are ignored."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class CodecInfo(Contract):
    """How kept entries are stored; all that a reader needs."""

    id: str = Field(description="Codec id, a key of `codecs` in payload.json.")
    version: int = Field(description="Version of that codec.")
    kind: str = Field(
        description="What is kept: topk, adaptive, sampled, hybrid, threshold, or combined (of several teachers)."
    )
    parameters: dict[str, Any] = Field(description="Parameters of the kind and of the codec.")

    @model_validator(mode="after")
    def _numbers(self) -> CodecInfo:
        """What decoding computes with is what it must be; other parameters are only shown."""
        for name, (low, high) in {"num_draws": (1, 2**16 - 1), "id_bytes": (1, 3), "k": (0, 2**31 - 1)}.items():
            value = self.parameters.get(name, low)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"codec parameter {name} is {value!r}, not a whole number from {low} to {high}")
        threshold = self.parameters.get("threshold") if self.kind == "threshold" else 0.5
        if type(threshold) is not float or not 1e-4 <= threshold < 1:
            raise ValueError(f"codec parameter threshold is {threshold!r}, not a probability from 0.0001 to 1")
        rule = self.parameters.get("positions")
        if rule is not None and not (isinstance(rule, dict) and isinstance(rule.get("rule"), str)):
            raise ValueError("codec parameter positions is not an object with the name of a rule")
        for name in ("domains", "roles"):
            names = [] if rule is None else rule.get(name, [])
            if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
                raise ValueError(f"codec parameter positions.{name} is not a list of names")
        temperatures = self.parameters.get("temperatures", [])
        if not isinstance(temperatures, list) or len(temperatures) > 64:
            raise ValueError("codec parameter temperatures is not a list of at most 64 numbers")
        for value in (*temperatures, self.parameters.get("tau", 1.0)):
            if type(value) not in (int, float) or not 0 < value < 1e6:
                raise ValueError(f"codec parameters tau and temperatures hold {value!r}, not a number above 0")
        return self

    @property
    def temperatures(self) -> list[float]:
        """Temperatures other than 1 at which the log-sum-exp is stored."""
        return [float(temperature) for temperature in self.parameters.get("temperatures", [])]

    @property
    def is_coded(self) -> bool:
        """Whether numbers beside the entries are stored as codes, see `is_coded`."""
        return is_coded(self.id, self.version)

    @property
    def most_draws(self) -> int:
        """Most draws at a position; 0 for kinds without draws."""
        if self.kind == "threshold":
            return math.ceil(1 / float(self.parameters["threshold"]))
        return int(self.parameters.get("num_draws", 0))

    @property
    def keeps_some_positions(self) -> bool:
        """Whether a target position may have no entries, because a rule chose where distributions are kept."""
        return self.parameters.get("positions") is not None

    @property
    def token_map(self) -> str | None:
        """How ids of another tokenizer became those of the entries (`kdata.jobs.retokenize`); None: they are as read."""
        rule = self.parameters.get("positions") or {}
        return str(rule.get("map")) if rule.get("rule") == "aligned" else None


class TokenizerInfo(Contract):
    """Which tokenizer made the ids."""

    hash: str = Field(description="SHA-256 of the tokenizer's canonical JSON; students are checked against it.")
    chat_template_hash: str | None = Field(description="SHA-256 of the chat template; null without one.")
    bos_id: int | None = Field(description="Id that begins a sequence; null without one.")
    eos_id: int | None = Field(description="Id that ends a sequence; null without one.")


class TeacherInfo(Contract):
    """Who believed what is stored."""

    model: str = Field(description="Hub name, or the name of a local model's folder or GGUF file.")
    revision: str | None = Field(description="Hub commit; null for a local model.")
    weights_hash: str | None = Field(
        description="SHA-256 over a local model's config and weights, or of its GGUF file; null for Hub; of a combination "
        "that of `members`."
    )
    backend: str = Field(description="vllm, vllm-server, transformers, ...")
    backend_version: str = Field(description="Version of the backend.")
    dtype: str = Field(description="Arithmetic of the forward pass.")
    logprobs: str = Field(description="What the recorded numbers are: raw log-softmax at temperature 1.")
    deterministic: bool = Field(description="True: a work unit submitted again gives the same bytes.")
    engine_args: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda args: args is None,
        description="Arguments of vLLM's engine that change numbers, such as quantization; the key is absent without any.",
    )
    speed_args: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda args: args is None,
        description="Arguments of vLLM's engine that change speed and memory only; no part of the identity; absent without "
        "any.",
    )
    lora_hash: str | None = Field(
        None,
        exclude_if=lambda digest: digest is None,
        description="SHA-256 over the config and weights of the LoRA adapter; the key is absent without one.",
    )
    bos: Literal["add", "omit"] | None = Field(
        None,
        exclude_if=lambda bos: bos is None,
        description="What teacher.bos says: the beginning-of-sequence token was added to texts, or left out knowingly; the "
        "key is absent where nothing was said, and the tokenizer decided.",
    )
    members: list[MemberInfo] | None = Field(
        None,
        exclude_if=lambda members: members is None,
        description="The teachers that were combined; the key is absent where it is one teacher.",
    )


class MemberInfo(Contract):
    """One of the teachers of a combination."""

    teacher: TeacherInfo = Field(description="Who it is.")
    weight: float | None = Field(
        description="Its share, in [0, 1], in rows of the domains that `by_domain` does not name; null where it names all."
    )
    by_domain: dict[str, float] = Field(description="Its share in rows of these domains.")


TeacherInfo.model_rebuild()


# Setting of a source whose inputs have changed: how they were identified before, oldest first.
FORMER = "former"
# Keys of a source's corpus or prompts that identify it by content.
IDENTITY_KEYS = ("sha256", "hub", "commit", "class_labels")
# SHA-256 as text.
Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class InputInfo(Contract):
    """A dataset that rows were made from."""

    digest: Digest = Field(description="Its content digest.")
    kind: str = Field(description="`kind` of the source there whose rows they are.")
    teacher: str = Field(description="`model` of its teacher.")
    teacher_revision: str | None = Field(description="Hub commit of that teacher; null for a local model.")
    teacher_weights_hash: str | None = Field(
        None,
        exclude_if=lambda digest: digest is None,
        description="`weights_hash` of a local one; absent for one on the Hub.",
    )
    address: str | None = Field(
        None,
        exclude_if=lambda address: address is None,
        description="URL or hf://OWNER/NAME by which it was opened; absent for a folder.",
    )
    commit: str | None = Field(
        None, exclude_if=lambda commit: commit is None, description="Commit of its repository on the Hub; else absent."
    )
    inputs: list[InputInfo] = Field(
        [],
        exclude_if=lambda inputs: not inputs,
        description="What the rows there were made from; absent where that is not recorded, or they are no dataset's.",
    )


InputInfo.model_rebuild()


class SourceInfo(Contract):
    """One piece of work that wrote rows: a capture of a corpus, or a generation from prompts."""

    kind: Literal["capture", "generate", "import", "split", "reread", "combine", "retokenize", "soften"] = Field(
        description="capture reads text, generate writes it, import takes another tool's rows, split a dataset's; reread: "
        "another teacher read a dataset's rows; combine: the average of several teachers' distributions; retokenize: the "
        "same distributions for another tokenizer; soften: softer distributions where a position may be private."
    )
    settings: dict[str, Any] = Field(description="Everything that decides the rows; a resume must repeat it.")
    num_units: int | None = Field(description="Work units in all, once the work is complete; null before.")
    shards_bound: bool = Field(
        False,
        exclude_if=lambda bound: not bound,
        description="True: every shard and its manifest line name their dataset (`fingerprint`) and their work "
        "(`work_digest`); the key is absent where some were written before they did.",
    )
    former_digests: list[Digest] = Field(
        [],
        exclude_if=lambda digests: not digests,
        description="`work_digest` of shards that were written before the inputs changed; the key is absent without any.",
    )
    inputs: list[InputInfo] = Field(
        [],
        exclude_if=lambda inputs: not inputs,
        description="Datasets that the rows were made from, where a command made them from datasets; else the key is absent.",
    )

    @property
    def work_digest(self) -> str:
        """SHA-256 (hex) of kind and settings: shards name it, so that one of another corpus or other settings is noticed."""
        settings = {key: value for key, value in self.settings.items() if key != FORMER}
        return json_digest({"kind": self.kind, "settings": settings})


# A name that becomes part of a path: it cannot lead out of the dataset's folder.
SourceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]


def shard_name(source: str, unit: int) -> str:
    """Name of the shard that holds a unit of a source."""
    return f"{source}-{unit:05d}"


def shard_files(name: str) -> dict[str, str]:
    """Relative paths of a shard's files by their folder; a shard without rejects has no file in rejects/."""
    return {"data": f"data/{name}.arrow", "index": f"index/{name}.parquet", "rejects": f"rejects/{name}.parquet"}


class FileInfo(Contract):
    """One file that was committed."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the file.")
    bytes: int = Field(ge=0, description="Its size.")


# Keys of dataset.json that are no part of the identity.
NO_IDENTITY = frozenset({"sources", "tokenizer_files", "fingerprint", "digest"})


class DatasetInfo(Contract):
    """dataset.json: what the dataset is."""

    format: Literal["kdata"] = Field("kdata", description="Always kdata.")
    format_version: str = Field(description="MAJOR.MINOR; a newer minor is readable, a newer major is not.")
    vocab_size: int = Field(gt=1, description="Number of token ids; every stored id is below it.")
    teacher: TeacherInfo = Field(description="Who believed what is stored.")
    tokenizer: TokenizerInfo = Field(description="Which tokenizer made the ids.")
    codec: CodecInfo = Field(description="How kept entries are stored.")
    tail: Literal["ghost", "draws", "absent"] = Field(
        description="ghost: kept entries are exact and log_tail is the rest; draws: weights already sum to 1; absent: "
        "the rest is not known (imported rows)."
    )
    tokenizer_files: dict[FileName, FileInfo] = Field(
        {}, description="Files in tokenizer/, by name, to find a damaged byte; no part of the identity."
    )
    sources: dict[SourceName, SourceInfo] = Field(description="Work that wrote rows, by name.")
    identity_digest: str = Field(
        alias="fingerprint",
        description="SHA-256 of the identity: everything but `sources`, `tokenizer_files`, `teacher.speed_args`, "
        "`fingerprint` and `digest`.",
    )
    digest: str = Field("", description="SHA-256 of everything else in the file: finds a damaged byte.")

    @model_validator(mode="after")
    def _ids_fit(self) -> DatasetInfo:
        if self.vocab_size >= 2**31:
            raise ValueError("vocab_size is above 2,147,483,647, what an id can be")
        return self

    def identity(self) -> dict[str, Any]:
        """What must stay the same for as long as rows are added."""
        return self.without_speed({k: v for k, v in self.model_dump().items() if k not in NO_IDENTITY})

    @staticmethod
    def without_speed(content: dict[str, Any]) -> dict[str, Any]:
        """The identity without what changes speed alone, in place."""
        for teacher in (content["teacher"], *(m["teacher"] for m in content["teacher"].get("members") or ())):
            teacher.pop("speed_args", None)
        return content


class CodecError(Contract):
    """What storing cost, measured at write time against what the teacher returned."""

    mean_nats: float = Field(description="Mean |log p - log p stored| over kept entries.")
    max_nats: float = Field(description="Largest of the same.")
    kl_nats: float = Field(description="Mean KL(teacher || stored), kept entries plus one bucket for the rest.")
    max_sum: float = Field(
        description="Largest sum of stored probabilities at one position, without draws that have a weight each (tau not 1, "
        "or kind combined); above 1 only in imported rows (codec verbatim)."
    )
    sums_over_one: int = Field(0, ge=0, description="Positions whose sum is above 1: imported rows only.")

    @staticmethod
    def joined(measured: Iterable[tuple[int | None, CodecError | None]]) -> CodecError | None:
        """The error of several parts, each with its target tokens: weighted means and largest maxima; None without any."""
        known = [(tokens, error) for tokens, error in measured if error and tokens]
        if not known:
            return None
        weight = sum(tokens for tokens, _ in known)
        return CodecError(
            mean_nats=sum(tokens * error.mean_nats for tokens, error in known) / weight,
            max_nats=max(error.max_nats for _, error in known),
            kl_nats=sum(tokens * error.kl_nats for tokens, error in known) / weight,
            max_sum=max(error.max_sum for _, error in known),
            sums_over_one=sum(error.sums_over_one for _, error in known),
        )


class ManifestEntry(Contract):
    """One line of manifest.jsonl: one committed shard."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*-\d{5,}$", description="Shard: source and unit, for instance capture-00000."
    )
    source: SourceName = Field(description="Key of `sources` in dataset.json.")
    unit: int = Field(ge=0, description="Work unit of that source.")
    rows: int = Field(ge=0, description="Sequences in the shard.")
    tokens: int = Field(ge=0, description="Tokens in the shard.")
    target_tokens: int = Field(ge=0, description="Positions that count as targets.")
    rejected: int = Field(ge=0, description="Inputs refused in this unit.")
    inputs: str = Field(description="SHA-256 over ids and content of the unit's inputs.")
    files: dict[str, FileInfo] = Field(
        description="Relative path to digest and size: data/NAME.arrow, index/NAME.parquet and, where inputs were refused, "
        "rejects/NAME.parquet."
    )
    kept_positions: int | None = Field(
        None,
        ge=0,
        exclude_if=lambda count: count is None,
        description="Target positions that have entries, where the codec has the parameter `positions`; else the key is "
        "absent, and all of them are meant to have some.",
    )
    codec_error: CodecError | None = Field(description="Null for an empty shard.")
    identity_digest: Digest | None = Field(
        None,
        alias="fingerprint",
        exclude_if=lambda digest: digest is None,
        description="`fingerprint` of the dataset that the shard was written for; absent from older shards.",
    )
    work_digest: Digest | None = Field(
        None,
        exclude_if=lambda digest: digest is None,
        description="SHA-256 of kind and settings of its source when it was written; absent from older shards.",
    )
    digest: str = Field("", description="SHA-256 of everything else in the line: finds a damaged byte.")

    @model_validator(mode="after")
    def _follows_from_its_unit(self) -> ManifestEntry:
        counts = (self.unit, self.rows, self.tokens, self.target_tokens, self.rejected, self.kept_positions or 0)
        if max(*counts, *(info.bytes for info in self.files.values())) >= 2**40:
            raise ValueError("a number is larger than any shard's")
        if (self.kept_positions or 0) > self.target_tokens:
            raise ValueError(f"{self.kept_positions} kept positions are more than the {self.target_tokens} targets")
        if self.name != shard_name(self.source, self.unit):
            raise ValueError(f"unit {self.unit} of source {self.source} cannot have the shard name {self.name!r}")
        expected = shard_files(self.name)
        if not {expected["data"], expected["index"]} <= set(self.files) <= set(expected.values()):
            raise ValueError(f"shard {self.name} cannot have the files {sorted(self.files)}")
        if (self.identity_digest is None) != (self.work_digest is None):
            raise ValueError(f"shard {self.name} has only one of fingerprint and work_digest")
        return self

    @property
    def num_kept_positions(self) -> int:
        """Target positions that have entries: what means over kept distributions are weighted by."""
        return self.target_tokens if self.kept_positions is None else self.kept_positions

    @property
    def is_bound(self) -> bool:
        """Whether the line names its dataset; those of older versions do not."""
        return self.identity_digest is not None


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def json_digest(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def content_hash(token_ids: np.ndarray) -> str:
    """BLAKE2b-128 (hex) of token ids [T] as little-endian int32."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<i4").tobytes(), digest_size=16).hexdigest()
