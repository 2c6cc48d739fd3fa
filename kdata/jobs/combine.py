"""Combine payloads of the same rows: the weighted average of several teachers, or one teacher for each domain.

`average.py` says what is stored of an average and why it is right. If each domain has one teacher and all payloads have one
codec, rows are copied as they are, with ranks, entropies and further temperatures. Memory holds one shard of the first input
at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from kdata.calls import validated
from kdata.config import VERSION, Strict
from kdata.errors import ConfigError, DataError, MismatchError
from kdata.format.keep import packed_version
from kdata.format.keep_rules import refuse_sorted
from kdata.format.manifest import new_info
from kdata.format.records import Shard, UnitResult, inputs_digest, inputs_of
from kdata.format.schema import (
    FORMAT_VERSION,
    CodecError,
    CodecInfo,
    DatasetInfo,
    ManifestEntry,
    MemberInfo,
    SourceInfo,
    TeacherInfo,
    json_digest,
)
from kdata.format.sequences import Sequences
from kdata.jobs.average import mix
from kdata.jobs.payloads import (
    OTHER_TEACHER,
    goes_on,
    inputs_of_shard,
    refuse_other_rows,
    refuse_other_targets,
)
from kdata.observe.progress import Task
from kdata.store.dataset import Dataset
from kdata.store.open import AnyDataset, open_dataset, opened
from kdata.store.pick import tables
from kdata.store.shard import kept_positions_of, write_tables
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.store.writer import Writer


class CombineConfig(Strict):
    """The share of each teacher, in general and by domain."""

    weights: list[float] | None = Field(
        None,
        description="Share of each payload, in their order, divided by their sum; in domains that by_domain does not name. "
        "Null: equal shares; where by_domain is given, it has to name every domain then.",
    )
    by_domain: dict[str, list[float]] = Field(
        {}, description="Shares in rows of a domain: [1, 0] is the first teacher alone."
    )


@dataclass
class CombineReport:
    """What was counted of averages: target positions; of ghost payloads the bound of the mass that lies in the tail though it
    may belong to kept ids (mean over target positions, and the largest); what could not be kept."""

    lossless: bool
    ghost: bool
    positions: int = 0
    unknown_sum: float = 0.0
    unknown_max: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def unknown_mean(self) -> float:
        """Mean over target positions."""
        return self.unknown_sum / max(self.positions, 1)

    def add(self, unknown_M: np.ndarray) -> None:
        """Count target positions."""
        self.positions += len(unknown_M)
        self.unknown_sum += float(unknown_M.sum())
        self.unknown_max = max(self.unknown_max, float(unknown_M.max(initial=0.0)))

    def lines(self) -> list[str]:
        """The same for a person."""
        if self.lossless:
            return ["every row is that of one teacher, number for number"]
        if not self.ghost:
            return [f"unbiased: draws stand for what is not exact, at {self.positions:,} target positions", *self.notes]
        return [
            f"kept probabilities are lower bounds: a mass of at most {self.unknown_mean:.2g} on average, and "
            f"{self.unknown_max:.2g} at one position, lies in the tail that belongs to kept ids ({self.positions:,} target "
            "positions)",
            *self.notes,
        ]


@dataclass(frozen=True)
class _Plan:
    """Inputs, and the share of each, float64 [M], by domain; `lossless` where rows are copied as they are."""

    inputs: list[Dataset]
    shares: dict[str, np.ndarray]
    lossless: bool


@validated
def combine(
    root: Path | str,
    inputs: Sequence[AnyDataset],
    config: CombineConfig,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> tuple[Dataset, CombineReport]:
    """Average payloads of the same rows into a dataset.

    Args:
        root: dataset folder, created if needed.
        inputs: two or more payloads, one for each teacher; the result has the rows, texts and shards of the first.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress.
    Returns:
        The dataset, and what was counted, over all rows (of those committed by a former run too).
    Raises:
        MismatchError: rows or vocabularies differ, or kinds that cannot be averaged; or `root` was begun with other settings.
        ConfigError: weights that are not shares, an unknown domain, or a domain without a weight.
        DataError: an input is not complete, is a combination itself, or lacks the mass of the tail.
        CorruptError: an input is damaged.
    """
    payloads = [opened(dataset) for dataset in inputs]
    root = Path(root)
    _refuse_unfit(payloads)
    for other in payloads[1:]:
        a, b = payloads[0], other
        refuse_other_ids(Vocabulary.of_dataset(a), Vocabulary.of_dataset(b), OTHER_TEACHER)
        refuse_other_rows(a, b)
    shares = _shares(config, payloads)
    pure = all(np.count_nonzero(share) == 1 for share in shares.values())
    alike = all(_alike(dataset) == _alike(payloads[0]) for dataset in payloads)
    plan = _Plan(payloads, shares, pure and alike)
    info, report = _identity(plan, config), CombineReport(plan.lossless, ghost=payloads[0].info.tail == "ghost")
    dropped = sorted({t for d in payloads for t in d.info.codec.temperatures})
    if dropped and not plan.lossless:
        report.notes.append(
            f"without the further temperatures {dropped}: the sum over the vocabulary at another temperature does not follow "
            "from those of the teachers"
        )
    with Task("combine", payloads[0].num_tokens, "tokens", log) as task:
        for source in payloads[0].info.sources:
            _run(root, info, plan, source, report, task, resume)
            resume = goes_on(resume)
    return open_dataset(root), report


def _run(
    root: Path, info: DatasetInfo, plan: _Plan, source: str, report: CombineReport, task: Task, resume: str
) -> None:
    """Combine the shards of one source."""
    first = plan.inputs[0]
    about = first.info.sources[source]
    settings = {
        "of": [{"fingerprint": d.content_digest, "codec": d.info.codec.model_dump()} for d in plan.inputs],
        "made_by": {"kind": about.kind, **about.settings},
    }
    inputs = [d.as_input(source) for d in plan.inputs]
    about_result = SourceInfo(kind="combine", settings=settings, num_units=None, inputs=inputs)
    with Writer(root, info, source, about_result, resume=resume, tokenizer_dir=first.tokenizer_dir) as writer:
        shards = [number for number, entry in enumerate(first.manifest) if entry.source == source]
        for number in shards:
            entry, members = first.manifest[number], _members(plan, number)
            unit = None if plan.lossless else _averaged(plan, number, members, report)
            if entry.unit in writer.committed:
                task.skip(entry.tokens)
            elif unit is None:
                task.advance(entry.tokens, shard=writer.accept(_chosen(root, writer.info, plan, number)))
            else:
                task.advance(entry.tokens, shard=writer.commit(unit))
        writer.finish(len(shards))


def _members(plan: _Plan, number: int) -> list[Sequences]:
    """The rows of a shard of the first input, from each input. Raises MismatchError where they are not the same rows."""
    first = plan.inputs[0]
    start, end = (int(x) for x in first.shard_starts[number : number + 2])
    members = [dataset.take(np.arange(start, end)) for dataset in plan.inputs]
    if any(dataset.info.codec.keeps_some_positions for dataset in plan.inputs):
        _refuse_other_positions(plan, members, start)
    for dataset, member in zip(plan.inputs[1:], members[1:], strict=True):
        refuse_other_targets(members[0], member, (first, dataset), start)
    return members


def _refuse_other_positions(plan: _Plan, members: list[Sequences], start: int) -> None:
    """Raise MismatchError where inputs keep distributions at other positions, whatever their weights there."""
    first = members[0]
    for dataset, member in zip(plan.inputs[1:], members[1:], strict=True):
        other_T = (first.num_kept > 0) != (member.num_kept > 0)
        if other_T.any():
            token = int(np.flatnonzero(other_T)[0])
            row = int(np.searchsorted(first.offsets, token, side="right")) - 1
            raise MismatchError(
                f"{plan.inputs[0].path} and {dataset.path} keep distributions at other positions (row {start + row}, "
                f"position {token - int(first.offsets[row])}). Have the other teacher keep those of the first: "
                "kdata reread FIRST OUT --teacher MODEL"
            )


def _averaged(plan: _Plan, number: int, members: list[Sequences], report: CombineReport) -> UnitResult:
    """The rows of a shard with the average of all inputs."""
    first = plan.inputs[0]
    rows = inputs_of_shard(first, number, members[0])
    weights_SM = np.array([plan.shares[row.domain] for row in rows]).reshape(-1, len(members))
    tail, some = cast(Literal["ghost", "draws"], first.info.tail), first.info.codec.keeps_some_positions
    mixture = mix(members, weights_SM, tail, keeps_some=some)
    report.add(mixture.unknown[members[0].target_mask & (mixture.sequences.num_kept > 0)])
    records = [row.record_from(mixture.sequences, place) for place, row in enumerate(rows)]
    return UnitResult(first.manifest[number].unit, records, inputs=inputs_digest(records))


def _chosen(root: Path, info: DatasetInfo, plan: _Plan, number: int) -> Shard:
    """A shard whose rows are copied as they are stored, each from the payload of its domain's teacher."""
    first, entry = plan.inputs[0], plan.inputs[0].manifest[number]
    start = int(first.shard_starts[number])
    payload, index = tables(first, entry, np.arange(entry.rows), entry.name, info.codec)
    who_S = np.array([plan.shares[domain].argmax() for domain in index["domain"].to_pylist()], np.int64)
    order, payloads, indexes = [np.flatnonzero(who_S == 0)], [payload.filter(who_S == 0)], [index.filter(who_S == 0)]
    errors = [(_measured(first, payloads[0], indexes[0]), entry.codec_error)]
    for member, dataset in enumerate(plan.inputs[1:], 1):
        rows = np.flatnonzero(who_S == member) + start
        shards = np.searchsorted(dataset.shard_starts, rows, side="right") - 1
        for shard in np.unique(shards).tolist():
            local, theirs = rows[shards == shard], dataset.manifest[shard]
            their_payload, their_index = tables(
                dataset, theirs, local - dataset.shard_starts[shard], entry.name, info.codec
            )
            order.append(local - start)
            payloads.append(their_payload)
            indexes.append(their_index)
            errors.append((_measured(dataset, their_payload, their_index), theirs.codec_error))
    return _joined(root, info, entry, index, np.concatenate(order), payloads, indexes, CodecError.joined(errors))


def _measured(dataset: Dataset, payload: pa.Table, index: pa.Table) -> int | None:
    """Positions of some rows of a dataset that the error of its codec is a mean over."""
    if dataset.info.codec.keeps_some_positions:
        return kept_positions_of(payload)
    targets: int | None = pc.sum(index["num_target_tokens"]).as_py()
    return targets


def _joined(
    root: Path, info: DatasetInfo, entry: ManifestEntry, own: pa.Table, order: np.ndarray, payloads: list[pa.Table],
    indexes: list[pa.Table], error: CodecError | None,
) -> Shard:  # fmt: skip
    """Write pieces of payload and index, brought into the order of rows, as a shard of their own source and unit."""
    back = pa.array(np.argsort(order))
    payload = pa.concat_tables([piece.replace_schema_metadata() for piece in payloads]).take(back).combine_chunks()
    index = pa.concat_tables(indexes).take(back)
    for column in ("source", "row"):
        place = index.schema.get_field_index(column)
        index = index.set_column(place, index.schema.field(place), own[column])
    return write_tables(root, info, entry.source, entry.unit, payload, index, error, inputs=inputs_of(payload))


def _refuse_unfit(inputs: list[Dataset]) -> None:
    if len(inputs) < 2:
        raise ConfigError("name two payloads or more to combine")
    for dataset in inputs:
        if dataset.info.tail == "absent":
            raise DataError(
                f"{dataset.path} was imported from a format that does not hold the mass outside the kept entries, so no "
                "average can be formed; have its teacher read the rows: kdata reread"
            )
        refuse_sorted(dataset.info.codec, dataset.place, "an average")
        if dataset.info.teacher.members is not None:
            raise DataError(
                f"{dataset.path} is a combination itself; name the payloads that it was made from, weights multiplied out"
            )
        unfinished = [name for name, source in dataset.info.sources.items() if source.num_units is None]
        if unfinished:
            raise DataError(f"source {unfinished[0]!r} of {dataset.path} is not complete; finish it first")
    for other in inputs[1:]:
        a, b = inputs[0].info, other.info
        if a.codec.keeps_some_positions != b.codec.keeps_some_positions:
            some, every = (inputs[0], other) if a.codec.keeps_some_positions else (other, inputs[0])
            raise MismatchError(
                f"{some.path} keeps distributions at some of its target positions, {every.path} at all, so they have no "
                f"average at the others. Have the other teacher read the rows of {some.path}; that keeps the same positions: "
                f"kdata reread {some.path} OUT --teacher MODEL"
            )
        if a.tail != b.tail:
            raise MismatchError(
                f"{inputs[0].path} keeps {a.codec.kind} (tail {a.tail}), {other.path} {b.codec.kind} (tail {b.tail}). Draws "
                "average to draws, and tails to tails, but not one with the other. Reread the rows with one of the teachers "
                f"as the other has them: kdata reread --kind {a.codec.kind}, or {b.codec.kind}"
            )


def _shares(config: CombineConfig, inputs: list[Dataset]) -> dict[str, np.ndarray]:
    """Share of each input, float64 [M], for each domain that there is."""
    domains = sorted(set(inputs[0].index(["domain"])["domain"].to_pylist()))
    unknown = sorted(set(config.by_domain) - set(domains))
    if unknown:
        raise ConfigError(f"there is no domain {unknown[0]!r} in {inputs[0].path}; it has {', '.join(domains)}")
    unnamed = [domain for domain in domains if domain not in config.by_domain]
    if config.by_domain and config.weights is None and unnamed:
        raise ConfigError(
            f"domain {unnamed[0]!r} has no weights; add it to by_domain, or set weights for all domains that are not named"
        )
    general = [1.0] * len(inputs) if config.weights is None else config.weights
    return {domain: _normalised(config.by_domain.get(domain, general), len(inputs)) for domain in domains}


def _normalised(weights: list[float], count: int) -> np.ndarray:
    share: np.ndarray = np.array(weights, np.float64)
    if len(share) != count:
        raise ConfigError(f"weights {weights} are {len(share)} numbers for {count} payloads")
    if not np.isfinite(share).all() or (share < 0).any() or not share.sum() > 0:
        raise ConfigError(f"weights {weights} must be finite, not negative, and not all 0")
    normalised: np.ndarray = share / share.sum()
    return normalised


def _identity(plan: _Plan, config: CombineConfig) -> DatasetInfo:
    """Identity of the result: its teacher consists of teachers."""
    first, count = plan.inputs[0].info, len(plan.inputs)
    general = None
    if not config.by_domain or config.weights is not None:
        general = _normalised([1.0] * count if config.weights is None else config.weights, count)
    by_domain = {domain: _normalised(weights, count) for domain, weights in sorted(config.by_domain.items())}
    members = [
        MemberInfo(
            teacher=dataset.info.teacher,
            weight=None if general is None else float(general[number]),
            by_domain={domain: float(share[number]) for domain, share in by_domain.items()},
        )
        for number, dataset in enumerate(plan.inputs)
    ]
    teacher = TeacherInfo(
        model=" + ".join(member.teacher.model for member in members),
        revision=None,
        weights_hash=json_digest([member.model_dump() for member in members]),
        backend="combine",
        backend_version=VERSION,
        dtype="float64",
        logprobs="average of the probabilities of `members`",
        deterministic=True,
        members=members,
    )
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=_vocab_size(plan.inputs),
        teacher=teacher,
        tokenizer=first.tokenizer,
        codec=_common(plan) if plan.lossless else _codec(plan),
        tail=first.tail,
    )


def _vocab_size(inputs: list[Dataset]) -> int:
    """The largest of the vocabulary sizes: a teacher whose head lacks a row gives that id probability 0."""
    return max(dataset.info.vocab_size for dataset in inputs)


def _unseeded(dataset: Dataset) -> CodecInfo:
    """The codec without what the draws come from: each teacher has its own seed, and no reader needs it."""
    codec = dataset.info.codec
    kept = {k: v for k, v in codec.parameters.items() if k not in ("draw_seed", "draws_by")}
    return codec.model_copy(update={"parameters": kept})


def _alike(dataset: Dataset) -> tuple[CodecInfo, int]:
    """What datasets must share for rows of both to stand in one. Positions are compared row by row."""
    codec = _unseeded(dataset)
    others = {k: v for k, v in codec.parameters.items() if k != "positions"}
    return codec.model_copy(update={"parameters": others, "version": 0}), dataset.info.vocab_size


def _common(plan: _Plan) -> CodecInfo:
    """The codec of rows that are copied: the earliest version, so that none is rounded again."""
    earliest = min(dataset.info.codec.version for dataset in plan.inputs)
    return _unseeded(plan.inputs[0]).model_copy(update={"version": earliest})


def _codec(plan: _Plan) -> CodecInfo:
    parameters: dict[str, Any] = {"id_bytes": 2 if _vocab_size(plan.inputs) <= 2**16 else 3}
    if plan.inputs[0].info.tail == "draws":
        parameters["num_draws"] = sum(max(dataset.info.codec.most_draws, 1) for dataset in plan.inputs)
    rule = plan.inputs[0].info.codec.parameters.get("positions")
    if rule is not None:  # the other inputs keep the same positions
        parameters["positions"] = rule
    version = packed_version(_vocab_size(plan.inputs), rule is not None)
    return CodecInfo(id="packed", version=version, kind="combined", parameters=parameters)
