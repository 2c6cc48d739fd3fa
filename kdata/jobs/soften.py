"""Soften: a dataset to publish, in which beliefs are softer where a position may hold private content.

A teacher that was trained on secrets gives them away in its distributions, also where the text itself has another name or
number in their place. `softening.py` has the formulas. Which positions are private is said by patterns of the text, or by a
plan of the dataset: its positions, and as their weights how likely each is private.

What this is not: a formal guarantee. Texts stay as they are. A known temperature can be inverted, and noise averages out
where the same rows are published again and again with other noise. Where nothing may be learned, drop the position
(`drop_above`): then nothing of it is stored. `kdata exposure` measures what a model gives away.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator, model_validator

from kdata.calls import validated
from kdata.config import Strict
from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.format.keep import packed_version
from kdata.format.keep_rules import MAX_PATTERN, checked_pattern
from kdata.format.manifest import new_info, read_info
from kdata.format.positions import ChosenPositions
from kdata.format.records import Reject, UnitResult, inputs_digest
from kdata.format.schema import FORMAT_VERSION, CodecInfo, DatasetInfo, SourceInfo, canonical_json, json_digest
from kdata.jobs.payloads import InputSequence, goes_on, inputs_of_shard
from kdata.jobs.softening import Law, soften_sequences
from kdata.observe.progress import Task
from kdata.selection.plan import open_plan
from kdata.selection.spans import spans_of
from kdata.store.dataset import Dataset
from kdata.store.open import AnyDataset, open_dataset, opened
from kdata.store.writer import Writer


class SoftenConfig(Strict):
    """Which positions are private, and how much softer they become."""

    patterns: list[str] = Field(
        [], description="Regular expressions (RE2) of private text. A token with a byte in a match is private."
    )
    plan: str | None = Field(
        None,
        description="Name of a plan of the dataset whose positions are private. Its weights, where it has them, say how "
        "likely each is, in (0, 1].",
    )
    likelihood: float = Field(
        1.0, gt=0, le=1, description="How likely a match, or a position of a plan without weights, is private."
    )
    temperature_rise: float = Field(
        1.0,
        ge=0,
        description="The temperature at a position is 1 + this x likelihood. 0: it stays 1. 1 is our default.",
    )
    noise: float = Field(
        0.5, ge=0, le=1, description="Share of random noise, times likelihood. 0: none. 0.5 is our default."
    )
    drop_above: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Positions that are more likely private are no targets, and nothing of them is stored. 1: all are "
        "softened.",
    )
    key_file: str | None = Field(
        None,
        description="File whose content seeds the noise, to be kept as a secret: who has it can take the noise away. null: "
        "a new seed in each run, kept nowhere; a run with patterns cannot be resumed then.",
    )

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for number, pattern in enumerate(patterns, 1):
            if not pattern or len(pattern) > MAX_PATTERN:
                raise ValueError(f"a pattern has 1 to {MAX_PATTERN:,} characters")
            checked_pattern(pattern)
            if pc.match_substring_regex(pa.scalar(""), pattern).as_py():
                raise ValueError(f"pattern {number} matches the empty string too; write x+ in place of x*")
        return patterns

    @model_validator(mode="after")
    def _changes_something(self) -> SoftenConfig:
        # Of a plan with weights only 1 says that nothing is dropped.
        drops = self.drop_above < (1.0 if self.plan is not None else self.likelihood)
        if self.temperature_rise == 0 and self.noise == 0 and not drops:
            raise ValueError(
                "temperature_rise 0 and noise 0 soften nothing, and no position is dropped; raise one of them, or take "
                "a drop_above that is below the likelihood"
            )
        return self


@dataclass
class SoftenReport:
    """What was counted in the rows that this call wrote: targets before, and those that were softened and dropped."""

    targets: int = 0
    softened: int = 0
    dropped: int = 0

    def lines(self) -> list[str]:
        """The same for a person."""
        return [
            f"of {self.targets:,} targets {self.softened:,} were softened, and {self.dropped:,} dropped: nothing of them is "
            "stored",
            "texts stay as they are; scores and plans are not taken along",
        ]


@dataclass(frozen=True)
class _Work:
    """chosen: positions of the plan, None without one. key: bytes that seed the noise."""

    dataset: Dataset
    config: SoftenConfig
    chosen: ChosenPositions | None
    key: bytes

    @property
    def private_digest(self) -> str | None:
        """Digest of what is private, which a resume has to repeat; None where nothing can be told without giving it away.

        Patterns may name a short secret, which a plain digest gives to whoever tries all, so it takes the key to make one.
        """
        config = self.config
        positions = None if self.chosen is None else self.chosen.digest
        private = {"patterns": config.patterns, "positions": positions, "likelihood": config.likelihood}
        if config.key_file is not None:
            return hmac.digest(self.key, b"kdata soften\0" + canonical_json(private), "sha256").hex()
        return None if config.patterns else json_digest(private)

    @property
    def law(self) -> Law:
        return Law(self.config.temperature_rise, self.config.noise, self.config.drop_above)


@validated
def soften(
    root: Path | str, dataset: AnyDataset, config: SoftenConfig, *, resume: str = "auto", log: Path | None = None
) -> tuple[Dataset, SoftenReport]:
    """Write a dataset of the same rows whose distributions are softer at private positions.

    Args:
        root: dataset folder, created if needed.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress.
    Returns:
        The dataset, and what was counted.
    Raises:
        ConfigError: nothing says what is private, or `root` is the dataset.
        DataError: the dataset cannot be softened, a likelihood is above 1, texts or bytes of tokens that a pattern needs are
            missing, or a pattern matches nothing.
        MissingError: there is no such plan or file.
        MismatchError: the plan is not of this dataset; `root` was begun with other settings or another key, or it was begun
            and there are patterns without a key.
        CorruptError: the dataset is damaged.
    """
    dataset = opened(dataset)
    root = Path(root)
    if root.resolve() == dataset.path.resolve():
        raise ConfigError(f"{root} is the dataset that is read; the result needs a folder of its own")
    _refuse_to_go_on_without_a_key(root, dataset, config)
    work = _open(dataset, config)
    info, report = _identity(dataset), SoftenReport()
    with Task("soften", dataset.num_tokens, "tokens", log) as task:
        for source in dataset.info.sources:
            _run(root, info, work, source, report, task, resume)
            resume = goes_on(resume)
    return open_dataset(root), report


def _refuse_to_go_on_without_a_key(root: Path, dataset: Dataset, config: SoftenConfig) -> None:
    if not config.patterns or config.key_file is not None or not (root / "dataset.json").exists():
        return
    if read_info(root).sources.keys() & dataset.info.sources.keys():
        raise MismatchError(
            f"{root} was begun before, and without a key nothing says with which patterns; remove it or name another folder. "
            "A run that can be resumed has a key from its start: --set key_file=FILE"
        )


def _open(dataset: Dataset, config: SoftenConfig) -> _Work:
    """Check everything that can be known before a row is written."""
    if not config.patterns and config.plan is None:
        raise ConfigError("nothing says what is private; name a pattern of the text, or a plan that has positions")
    about = dataset.info
    if about.tail == "absent" or about.codec.kind == "sampled":
        what = "the mass outside the kept entries" if about.tail == "absent" else "an exact entry (kind sampled)"
        raise DataError(
            f"{dataset.path} does not hold {what}, so its distributions cannot be softened; have the teacher read the rows "
            "with another kind: kdata reread --kind threshold"
        )
    if (about.codec.parameters.get("positions") or {}).get("rule") == "aligned":
        raise DataError(
            f"{dataset.path} was made for another tokenizer, and its log-probabilities are of chunks; soften the dataset "
            "that it was made of, and retokenize the result"
        )
    unfinished = [name for name, source in about.sources.items() if source.num_units is None]
    if unfinished:
        raise DataError(f"source {unfinished[0]!r} of {dataset.path} is not complete; finish it first")
    chosen = None if config.plan is None else _chosen(dataset, config.plan)
    _refuse_a_plan_that_changes_nothing(dataset, config, chosen)
    _refuse_patterns_without_a_match(dataset, config.patterns)
    return _Work(dataset, config, chosen, _key(config))


def _chosen(dataset: Dataset, name: str) -> ChosenPositions:
    _, chosen = open_plan(dataset, name).choice(dataset)
    if chosen is None:
        raise ConfigError(
            f"plan {name!r} chooses rows and no positions; choose them with `kdata select --positions`, or name a pattern"
        )
    if chosen.weights is not None and chosen.weights.max(initial=0) > 1:
        raise DataError(
            f"plan {name!r} has a weight of {chosen.weights.max():g}, and a likelihood is at most 1; divide the weights"
        )
    return chosen


def _refuse_a_plan_that_changes_nothing(dataset: Dataset, config: SoftenConfig, chosen: ChosenPositions | None) -> None:
    """What `SoftenConfig` cannot see: how likely the positions of a plan are private."""
    if chosen is None or config.temperature_rise > 0 or config.noise > 0:
        return
    likeliest = config.likelihood if chosen.weights is None else float(chosen.weights.max(initial=0))
    if config.patterns:
        likeliest = max(likeliest, config.likelihood)
    if likeliest <= config.drop_above:
        raise ConfigError(
            f"temperature_rise 0 and noise 0 soften nothing, and plan {config.plan!r} of {dataset.path} drops nothing: its "
            f"likelihoods are at most {likeliest:g}, and drop_above is {config.drop_above:g}; raise one of the former, or "
            "lower drop_above"
        )


def _refuse_patterns_without_a_match(dataset: Dataset, patterns: list[str]) -> None:
    left = dict(enumerate(patterns, 1))
    for entry in dataset.manifest:
        if not left:
            return
        texts = dataset.shard_index(entry, ["text"])["text"]
        for number, pattern in list(left.items()):
            found = texts.filter(pc.match_substring_regex(texts, f"(?s)(?:{pattern})"))
            if any(_matches(text.as_py(), pattern) for text in found):
                del left[number]
    if left:
        # By its number: the pattern itself may be a secret.
        raise DataError(
            f"no text of {dataset.path} matches pattern {min(left)} of {len(patterns)}, so nothing would be softened by it; "
            "correct or remove it. `kdata sql DATASET \"select id from rows where regexp_matches(text, '...')\"` says what "
            "a pattern matches"
        )


def _matches(text: str, pattern: str) -> list[tuple[int, int]]:
    """Byte offsets of what a pattern matches in a text, without matches of no byte, as of `\\b`."""
    spans = spans_of(text.encode(), f"(?s)(?P<whole>(?P<span>{pattern}))")
    return [(start, stop) for start, stop in spans if start < stop]


def _key(config: SoftenConfig) -> bytes:
    if config.key_file is None:
        return secrets.token_bytes(32)
    try:
        content = Path(config.key_file).read_bytes()
    except OSError as error:
        raise MissingError(f"key_file {config.key_file} cannot be read ({error.strerror}); name a file") from error
    if len(content) < 16:
        raise ConfigError(
            f"key_file {config.key_file} has {len(content)} bytes, which can be guessed; fill it with 16 random bytes or more"
        )
    return content


def _identity(dataset: Dataset) -> DatasetInfo:
    about, size = dataset.info, dataset.info.vocab_size
    parameters: dict[str, Any] = {"id_bytes": 2 if size <= 2**16 else 3}
    if about.tail == "draws":
        parameters["num_draws"] = about.codec.most_draws
    rule = about.codec.parameters.get("positions")
    if rule is not None:
        parameters["positions"] = rule
    version = packed_version(size, rule is not None)
    return new_info(
        format_version=FORMAT_VERSION,
        vocab_size=size,
        teacher=about.teacher.model_copy(update={"logprobs": "softened where a position may be private"}),
        tokenizer=about.tokenizer,
        codec=CodecInfo(id="packed", version=version, kind="combined", parameters=parameters),
        tail=about.tail,
    )


def _run(
    root: Path, info: DatasetInfo, work: _Work, source: str, report: SoftenReport, task: Task, resume: str
) -> None:  # fmt: skip
    """Soften the shards of one source."""
    dataset, config = work.dataset, work.config
    about = dataset.info.sources[source]
    settings = {
        "of": {"fingerprint": dataset.content_digest, "codec": dataset.info.codec.model_dump()},
        "temperature_rise": config.temperature_rise,
        "noise": config.noise,
        "drop_above": config.drop_above,
        "private_digest": work.private_digest,
        "made_by": {"kind": about.kind, **about.settings},
    }
    result = SourceInfo(kind="soften", settings=settings, num_units=None, inputs=[dataset.as_input(source)])
    with Writer(root, info, source, result, resume=resume, tokenizer_dir=dataset.tokenizer_dir) as writer:
        shards = [number for number, entry in enumerate(dataset.manifest) if entry.source == source]
        for number in shards:
            entry = dataset.manifest[number]
            if entry.unit in writer.committed:
                task.skip(entry.tokens)
                continue
            task.advance(entry.tokens, shard=writer.commit(_unit(work, number, report)))
        writer.finish(len(shards))


def _unit(work: _Work, number: int, report: SoftenReport) -> UnitResult:
    dataset = work.dataset
    stored = dataset.shard(number)
    rows = inputs_of_shard(dataset, number, stored)
    likelihood_T = _likelihood(work, number, rows, stored.offsets)
    generators = [_generator(work.key, row.id) for row in rows]
    soft = soften_sequences(
        stored, likelihood_T, dataset.info.vocab_size, work.law, generators, draws=dataset.info.tail == "draws"
    )
    report.targets += int(stored.target_mask.sum())
    report.softened += int(soft.softened.sum())
    report.dropped += int(soft.dropped.sum())
    result = UnitResult(dataset.manifest[number].unit, [])
    for place, row in enumerate(rows):
        target_T = soft.sequences.one(place).target_mask
        if row.target_mask.any() and not target_T.any():
            result.rejects.append(Reject(row.id, row.domain, "no_targets", "every target of the row is private"))
            continue
        result.records.append(dataclasses.replace(row, target_mask=target_T).record_from(soft.sequences, place))
    result.inputs = inputs_digest(result.records)
    return result


def _likelihood(work: _Work, number: int, rows: list[InputSequence], offsets: np.ndarray) -> np.ndarray:
    """How likely each token of a shard is private, float64 [T]: the largest of what plan and patterns say."""
    likelihood_T = np.zeros(int(offsets[-1]))
    if work.chosen is not None:
        first = int(work.dataset.shard_starts[number])
        own = np.isin(np.arange(first, first + len(rows)), work.chosen.rows)
        tokens, weights = work.chosen.tokens(np.arange(first, first + len(rows))[own], np.append(offsets[:-1][own], 0))
        likelihood_T[tokens] = work.config.likelihood if weights is None else weights
    for row, begin in zip(rows, offsets[:-1].tolist(), strict=True):
        if not work.config.patterns:
            break
        if row.text is None or row.token_bytes is None:
            raise DataError(
                f"row {row.id!r} lacks its text or the bytes of its tokens, so a pattern cannot be found in its tokens; name "
                "a plan instead"
            )
        sizes = row.token_bytes.astype(np.int64)
        ends = np.cumsum(sizes)
        for pattern in work.config.patterns:
            for start, stop in _matches(row.text, pattern):
                inside = (ends - sizes < stop) & (ends > start) & (sizes > 0)
                own_T = likelihood_T[begin : begin + len(sizes)]
                own_T[inside] = np.maximum(own_T[inside], work.config.likelihood)
    return likelihood_T


def _generator(key: bytes, row_id: str) -> np.random.Generator:
    """The noise of a row follows from the key and its id, not from its place."""
    digest = hashlib.sha256(key + b"\0" + row_id.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
