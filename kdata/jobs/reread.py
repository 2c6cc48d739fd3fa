"""Reread: another teacher reads the rows of a dataset, and its distributions become a further payload of the same rows.

The result is a separate dataset with the same ids, token ids, target masks and texts, in shards of the same names: row n of
one is row n of the other. Token ids come from the payload and nothing is tokenized again, so a teacher with another
tokenizer is refused. Only targets are recorded: of rows that a teacher wrote, nothing of the prompt. A row at which the
second teacher fails is a reject, as in a capture; then the rows are no longer the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from kdata.config import RowsConfig, parse_config
from kdata.errors import ConfigError, DataError
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import KeepStored
from kdata.format.records import UnitResult, inputs_digest
from kdata.format.rejects import checked
from kdata.format.schema import FORMER, ManifestEntry, SourceInfo, TeacherInfo, json_digest
from kdata.jobs.changes import CORPUS_IDENTITY, LABELS, say_changes
from kdata.jobs.job import Engine, LocalEngine, TeacherFacts, check_k, devices_of, run_job
from kdata.jobs.payloads import OTHER_TEACHER, InputSequence, goes_on, inputs_of_shard, source_digest
from kdata.jobs.reading import ReadingUnit, read_unit
from kdata.store.dataset import Dataset
from kdata.store.index import read_index
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.store.writer import Writer
from kdata.teachers.base import OnTokens, Teacher, ignore_tokens
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import Work


def reread(
    root: Path | str,
    dataset: Dataset,
    teacher_config: TeacherConfig,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """Have a second teacher read the rows of a dataset; the result, in `root`, is a dataset of its own.

    Args:
        root: dataset folder, created if needed, or a URL; not the dataset that is read.
        settings: fields of KeepConfig that differ from those of `dataset`, see `keep_like`; and of RowsConfig.
        resume: auto, never or must; see `Writer`.
        log: JSONL file for progress; see `run_job`.
    Raises:
        MismatchError: token ids mean other tokens to the teacher; or the result was begun from other rows or settings.
        ConfigError: a row is longer than the teacher can read.
        DataError: the dataset is not complete; `strict` is set and a row cannot be used.
    """
    max_k = keep_like(dataset, None, settings).k
    teacher = load_teacher(teacher_config, max_k=max_k, work=work_on(dataset))
    try:
        tokenizer = load_tokenizer(teacher_config.model, teacher.info.revision, bos=teacher_config.bos)
        engine = LocalEngine(teacher, tokenizer, devices_of(teacher_config))
        return reread_with(root, engine, dataset, settings, resume=resume, log=log)
    finally:
        teacher.close()


def reread_with(
    root: Path | str,
    engine: Engine,
    dataset: Dataset,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: str = "auto",
    log: Path | None = None,
) -> Dataset:
    """As `reread`, with an engine whose teacher is loaded: one job for each source of the dataset."""
    facts, about = engine.facts, dataset.info
    if not about.sources:
        raise DataError(f"{dataset.path} has no rows to read; name a dataset that has some")
    if "://" not in str(root) and Path(root).resolve() == dataset.path.resolve():
        raise ConfigError(f"{root} is the dataset that is read; a further payload needs a folder of its own")
    own = Vocabulary.of_model(facts.info.model, engine.tokenizer)
    refuse_other_ids(Vocabulary.of_dataset(dataset), own, OTHER_TEACHER)
    keep, strict = keep_like(dataset, facts.info, settings), rows_config(settings).strict
    for source in about.sources:
        result = run_job(root, RereadJob(dataset, source, keep, strict=strict), engine, resume=resume, log=log)
        resume = goes_on(resume)
    return result


def keep_like(dataset: Dataset, teacher: TeacherInfo | None, settings: Mapping[str, Any] | None = None) -> KeepConfig:
    """What a second teacher keeps: as the dataset does (hybrid where it was imported or combined), but for `settings`.

    Where the dataset keeps distributions at some positions only, the second teacher keeps them at the same ones.

    Draws get a seed of the teacher's own. With one seed two teachers would draw at the same quantiles; their average would
    still be unbiased, but the errors of like teachers would add up instead of cancelling.

    Args:
        teacher: whose draws; None where that does not matter yet.
        settings: fields of KeepConfig.
    Raises:
        ConfigError: a setting is wrong, or the rule of positions needs the chat template.
    """
    codec = dataset.info.codec
    plain = codec.id == "verbatim" or codec.kind == "combined"
    own = {} if plain else KeepConfig.of(codec).model_dump()
    recorded = codec.parameters.get("positions")
    stored = {"rule": "stored", "of": recorded.get("of", recorded) if recorded else None}
    if recorded is not None:
        own["positions"] = stored
    if teacher is not None:
        who = json_digest([teacher.model, teacher.revision, teacher.weights_hash])
        own["draw_seed"] = int(who[:8], 16)
    named = {key: value for key, value in (settings or {}).items() if key not in RowsConfig.model_fields}
    keep = parse_config(KeepConfig, {**own, **named}, "reread settings")
    if keep.positions is not None and keep.positions.rule == "stored":  # said by a person, it lacks the rule
        keep = keep.model_copy(
            update={"positions": KeepStored.model_validate({**keep.positions.model_dump(), **stored})}
        )
    if keep.positions is not None and keep.positions.rule == "role":
        raise ConfigError(
            "positions.rule role needs the turns of chats, which are known only while a template renders them; use the rule "
            "stored, span, entropy or random"
        )
    return keep


def rows_config(settings: Mapping[str, Any] | None) -> RowsConfig:
    """What the settings of a reread say about rows that cannot be used."""
    named = {key: value for key, value in (settings or {}).items() if key in RowsConfig.model_fields}
    return parse_config(RowsConfig, named, "reread settings")


def work_on(dataset: Dataset) -> Work:
    """What a teacher is loaded for that reads the rows of a dataset."""
    return Work(max(dataset.index(["num_tokens"])["num_tokens"].to_pylist(), default=0), writes=False)


class RereadJob:
    """One source of a dataset for another teacher to read; see `kdata.jobs.job.Job`."""

    doing, noun = "reading again", "rows"

    # A source that has grown: its shards are others, and the corpus that it was made from is another.
    follows: Sequence[str] = ("of", *(f"made_by.{key}" for key in (FORMER, *CORPUS_IDENTITY)))

    def __init__(self, dataset: Dataset, source: str, keep: KeepConfig, *, strict: bool = False) -> None:
        self.name, self.keep, self.strict = source, keep, strict
        self._dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        """Without the dataset: another process gets units, and needs no more to perform them."""
        return {**self.__dict__, "_dataset": None}

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(entry.rows for entry in self._dataset.manifest if entry.source == self.name)

    def source(self, facts: TeacherFacts) -> SourceInfo:
        """Whose rows they are, and what is kept. Raises as `reread` does."""
        dataset, about = self._dataset, self._dataset.info.sources[self.name]
        check_k(self.keep, facts)
        if about.num_units is None:
            raise DataError(
                f"source {self.name!r} of {dataset.path} is not complete, so its rows may still change; run the same "
                f"`kdata {about.kind}` again first"
            )
        self._refuse_long(facts)
        settings = {**self.keep.settings(), "kind": self.keep.kind, "of": source_digest(dataset, self.name)}
        made_by, inputs = {"kind": about.kind, **about.settings}, [dataset.as_input(self.name)]
        return SourceInfo(kind="reread", settings={**settings, "made_by": made_by}, num_units=None, inputs=inputs)

    def _refuse_long(self, facts: TeacherFacts) -> None:
        index = self._dataset.index(["id", "num_tokens", "source"])
        own = index.filter(pc.equal(index["source"], self.name))
        lengths = own["num_tokens"].to_numpy()
        if len(lengths) and lengths.max() > facts.context:
            raise ConfigError(
                f"row {own['id'][int(lengths.argmax())].as_py()!r} of {self._dataset.path} has {lengths.max():,} tokens, "
                f"{facts.info.model} reads {facts.context:,}; take a part with shorter rows (kdata split --by plan), or "
                "another teacher"
            )

    def follow(self, writer: Writer, facts: TeacherFacts, tokenizer: Any) -> None:
        """Take out the shards whose rows are not those of the dataset any more. Raises as `kdata.jobs.changes.follow`."""
        writer.sweep()
        committed = writer.committed
        units = (unit for unit in self.units(facts, tokenizer) if unit.number in committed)
        same = {
            unit.number
            for unit in units
            if _is_of(committed[unit.number], unit, writer.root) and self._keeps_as(writer, unit)
        }
        changed, stay = [entry for number, entry in committed.items() if number not in same], len(same)
        if changed and not stay:
            writer.refuse_other_inputs()
        if changed or writer.has_other_inputs:
            say_changes(
                f"{self.name}: the rows of {self._dataset.path} have changed: {stay:,} of {len(committed):,} shards stay; "
                f"{len(changed):,} were taken out and are read again"
            )
            writer.follow(changed, [])

    def _keeps_as(self, writer: Writer, unit: ReadingUnit) -> bool:
        """Whether a committed shard keeps distributions where the rows of a unit have them, if the rule is to do so."""
        rule = self.keep.positions
        if rule is None or rule.rule != "stored":
            return True
        writer.fetch(writer.committed[unit.number])
        written = Dataset(writer.root)
        number = next(n for n, entry in enumerate(written.manifest) if entry == writer.committed[unit.number])
        stored = written.shard(number)
        ids = written.shard_index(written.manifest[number], ["id"])["id"].to_pylist()
        kept = {row: stored.num_kept[a:b] > 0 for row, (a, b) in zip(ids, stored.spans(), strict=True)}

        def asked(sequence: InputSequence) -> np.ndarray:
            whole = sequence.marked is None or sequence.domain in rule.domains
            asked_T: np.ndarray = sequence.target_mask if whole else sequence.target_mask & sequence.marked
            return asked_T

        return all(np.array_equal(kept[s.id], asked(s)) for s in unit.sequences if s.id in kept)

    def units(self, facts: TeacherFacts, tokenizer: Any) -> Iterator[ReadingUnit]:
        """The shards of the source, one after another."""
        for number, entry in enumerate(self._dataset.manifest):
            if entry.source == self.name:
                sequences = inputs_of_shard(self._dataset, number, self._dataset.shard(number))
                yield ReadingUnit(entry.unit, sequences, documents=entry.rows)

    def perform(
        self, teacher: Teacher, tokenizer: Any, unit: ReadingUnit, on_tokens: OnTokens = ignore_tokens
    ) -> UnitResult:
        """Have one unit read."""
        return checked(read_unit(teacher, self.keep, unit, on_tokens), self.strict)


def _is_of(entry: ManifestEntry, unit: ReadingUnit, root: Path) -> bool:
    """Whether a committed shard holds the rows of a unit, with their domains, sources and licenses."""
    if entry.inputs != inputs_digest(unit.sequences):
        return False
    stored = read_index(root / f"index/{entry.name}.parquet", list(LABELS)).to_pylist()
    labels = {s.id: {name: getattr(s, name) for name in LABELS} for s in unit.sequences}
    return all(row == labels[row["id"]] for row in stored)
