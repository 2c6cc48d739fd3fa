"""Do the checks on a dataset or a corpus, unit by unit, and write their columns.

For a dataset each check becomes a score: `scores/duplicates`, `scores/language` and so on. For a corpus all of them become
one Parquet file: id, domain, and a struct of columns for each check. So a condition reads the same for both:
`language.code = 'en'`.

While the work goes on, its units are in a hidden folder beside the result. After a kill the same command takes them up, and
the result has the same bytes. Only one process works on a result; further ones are refused.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdata.corpus.corpus import CorpusConfig
from kdata.corpus.hygiene import METADATA
from kdata.errors import ConfigError, DataError, MismatchError, MissingError, StorageError, settings_difference
from kdata.format.files import (
    lock_of,
    remove_leftover,
    removed_on_failure,
    require_writable,
    settle,
    storage_errors,
    write_atomically,
)
from kdata.format.json_text import parse_json
from kdata.format.schema import json_digest
from kdata.hygiene.checks import Check, Checked, HygieneConfig, check_texts, sets_of
from kdata.hygiene.duplicates import NUM_HASHES, Sketches, band_hashes, groups
from kdata.hygiene.texts import CorpusTexts, DatasetTexts, Texts, Unit
from kdata.observe.progress import Task
from kdata.selection.session import Pool
from kdata.selection.sidecar import (
    ScoreInfo,
    begin_sidecar,
    finish_sidecar,
    load_score_info,
    refuse_other_settings,
    write_part,
)
from kdata.store.dataset import Dataset
from kdata.store.listed import SCORES
from kdata.store.url import is_url

SETTINGS = "settings.json"
FEW_ROWS = 1_000  # take less time than a process takes to start
CHARS, SHINGLES = "_chars", "_shingles"  # columns of a unit's file for duplicates


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        rows: that were checked. rejected: of a corpus, that cannot be used.
        written: names of the scores, or the file. kept: those that were there already, with these settings.
        skipped_items: of each evaluation set, items without a text of as many words as a run has, and that number.
    """

    rows: int
    written: list[str]
    rejected: int = 0
    kept: list[str] = field(default_factory=list)
    skipped_items: dict[str, tuple[int, int]] = field(default_factory=dict)


def inspect_dataset(
    dataset: Dataset, config: HygieneConfig, *, log: Path | None = None, pool: Pool | None = None
) -> Report:
    """Write a score for each check. A score that is complete, with these settings, stays as it is.

    Args:
        pool: what checks the texts of a unit, in place of processes here; the result is the same.

    Raises:
        MismatchError: a score of that name has other settings.
        DependencyError: a package that a check takes is not installed.
        CorruptError: a part of the index is not what was committed.
        StorageError: another process is writing, the disk refused, or a worker process was killed.
    """
    if not dataset.manifest:
        raise DataError(f"{dataset.path} has no rows to look at; capture or generate some first")
    with storage_errors(dataset.path), lock_of(dataset.path):
        infos = {check: _info(dataset, config, check) for check in config.chosen}
        for info in infos.values():
            refuse_other_settings(dataset, info)
        missing = [check for check in infos if not _is_complete(dataset, infos[check])]
        kept = [infos[check].name for check in infos if check not in missing]
        folder = dataset.path.resolve().with_name(f".{dataset.path.resolve().name}.hygiene")
        if not missing:
            _Work(folder, DatasetTexts(dataset), config).forget()
            return Report(dataset.num_rows, [], kept=kept)
        require_writable(dataset.path / SCORES.folder / infos[missing[0]].name)
        config = config.model_copy(update={"checks": missing})
        with _work(DatasetTexts(dataset), config, folder, log, pool) as work:
            for check in missing:
                begin_sidecar(dataset, infos[check])
            for entry, table in zip(dataset.manifest, work.tables(), strict=True):
                for check in missing:
                    write_part(dataset, infos[check].name, entry, _flat(table, check))
            for check in missing:
                finish_sidecar(dataset, infos[check])
        return Report(dataset.num_rows, [infos[c].name for c in missing], kept=kept, skipped_items=_skipped(config))


def _info(dataset: Dataset, config: HygieneConfig, check: Check) -> ScoreInfo:
    return ScoreInfo(
        name=config.prefix + check,
        unit=f"what the check {check} says of each text",
        model=None,
        tokenizer_hash=None,
        dataset_digest=dataset.content_digest,
        columns=config.arrow_schema(check).names,
        settings=config.settings(check),
        files={},
    )


def _is_complete(dataset: Dataset, info: ScoreInfo) -> bool:
    if info.name not in dataset.listed(SCORES):
        return False
    before = load_score_info(dataset, info.name)
    return before.dataset_digest == info.dataset_digest and bool(before.files)


def inspect_corpus(
    corpus: CorpusConfig, config: HygieneConfig, file: Path, *, log: Path | None = None, pool: Pool | None = None
) -> Report:
    """Write the columns of a corpus as a Parquet file. It says of which corpus it is; `corpus.hygiene` compares that.

    A file that is there already and has these columns, of this corpus and with these settings, stays as it is.

    Args:
        pool: see `inspect_dataset`.

    Raises:
        ConfigError: the file does not end in .parquet, is read as the corpus, or is another program's; a column is not there.
        MissingError, DataError: see `kdata.corpus.corpus.Corpus`; its folder does not exist.
        MismatchError: the file has columns of further checks, of other rows or with other settings, which would be lost.
        DependencyError: a package that a check takes is not installed.
        StorageError: another process is writing, the disk refused, or a worker process was killed.
    """
    if file.suffix != ".parquet":
        raise ConfigError(f"{file} does not end in .parquet; name a Parquet file to write")
    if not file.parent.is_dir():
        raise MissingError(f"{file.parent} does not exist; make the folder, or name another file to write")
    file = file.resolve()
    _refuse_input(corpus, file)
    _about(file)
    texts = CorpusTexts(corpus)
    folder = file.with_name(f".{file.name}.hygiene")
    with storage_errors(file), lock_of(file):
        before = _about(file)
        settings: dict[str, Any] = {check: config.settings(check) for check in config.chosen}
        about = {"texts": texts.identity(), "corpus": texts.rows_identity(), "checks": settings}
        if corpus.where is not None and corpus.limit is None and corpus.domains is None:
            about["where"] = corpus.where  # a row of the corpus that is not in the file is left out by this
        if before is not None:
            of_file = before["checks"]
            same_texts = all(before.get(key) == about[key] for key in ("texts", "corpus"))
            if same_texts and settings == {check: of_file.get(check) for check in settings}:
                _Work(folder, texts, config).forget()
                return Report(pq.read_metadata(file).num_rows, [], kept=[str(file)])
            if before.get("corpus") == about["corpus"] and not same_texts:
                raise MismatchError(
                    f"{file} has the columns of other rows of the same corpus: it was written with other settings of it, "
                    "such as `limit`, `where`, `domains` or `hygiene`. Name another file, or remove this one"
                )
            _refuse_loss(file, of_file, settings)
        with _work(texts, config, folder, log, pool) as work:
            _write_file(work, file, {METADATA: json.dumps(about, sort_keys=True).encode()})
            return Report(work.rows, [str(file)], work.rejected, skipped_items=_skipped(config))


def _refuse_input(corpus: CorpusConfig, file: Path) -> None:
    """Raise ConfigError where a file to write is one that is read, or lies in a folder that is."""
    for place in (corpus.path, corpus.hygiene):
        if place is None or is_url(place):
            continue
        source = Path(place).resolve()
        if file == source:
            raise ConfigError(f"{file} is read as the corpus, and would be written over; name another file to write")
        if source.is_dir() and file.is_relative_to(source):
            raise ConfigError(
                f"{file} lies in the folder of the corpus, {place}, whose next reader would take it for texts; "
                "name a file outside of it"
            )


def _about(file: Path) -> dict[str, Any] | None:
    """What a file says of itself; None where there is none. Raises ConfigError where `kdata hygiene` did not write it."""
    if not file.exists():
        return None
    try:
        about = parse_json((pq.read_schema(file).metadata or {}).get(METADATA, b"null"))
    except (pa.ArrowException, OSError, ValueError):
        about = None
    if not isinstance(about, dict) or not isinstance(about.get("checks"), dict):
        raise ConfigError(
            f"{file} exists, and `kdata hygiene` did not write it, so it is not written over; name another file to write"
        )
    return about


def _refuse_loss(file: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise MismatchError where a file has columns that would not be there, or have other numbers, once written again."""
    if difference := settings_difference(before, {check: now.get(check) for check in before}):
        raise MismatchError(
            f"{file} has columns of other checks or settings (before -> now):\n{difference}\n"
            "Name all its checks with the same settings, name another file, or remove this one."
        )


def _write_file(work: _Work, file: Path, metadata: dict[bytes, bytes]) -> None:
    temporary = file.with_name(file.name + ".tmp")
    remove_leftover(temporary)
    with removed_on_failure(temporary):
        writer: pq.ParquetWriter | None = None
        for table in work.tables():
            table = table.replace_schema_metadata(metadata)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None  # a corpus has a row
        writer.close()
        settle(temporary, file)


def _skipped(config: HygieneConfig) -> dict[str, tuple[int, int]]:
    sets = sets_of(config) if "overlap" in config.chosen else ()
    return {one.name: (one.num_skipped, one.n) for one in sets if one.num_skipped}


def _flat(table: pa.Table, check: str) -> pa.Table:
    """Id and the columns of one check."""
    struct = table[check].combine_chunks()
    names = [column.name for column in struct.type]
    return pa.table({"id": table["id"].combine_chunks(), **dict(zip(names, struct.flatten(), strict=True))})


class _Work:
    """The units that are done, in a folder.

    Attributes:
        rows: of all units. rejected: rows of the corpus that cannot be used.
    """

    def __init__(self, folder: Path, texts: Texts, config: HygieneConfig) -> None:
        self._folder, self._texts, self._config = folder, texts, config
        self.rows, self.rejected = 0, 0
        self._found: dict[str, pa.Array] = {}  # the columns of duplicates

    def begin(self) -> tuple[int, int, int]:
        """Take up the units that an earlier run left, or begin anew. Returns their number, their rows and their shingles."""
        path = self._folder / SETTINGS
        if path.is_file() and path.read_bytes() == self._digest:
            try:
                return self._counted()
            except (pa.ArrowException, OSError, ValueError, KeyError):
                pass  # a unit is damaged; what is here can be made again
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        write_atomically(path, self._digest)
        return 0, 0, 0

    def forget(self) -> None:
        """Remove what a run left that was killed after its result was written; work with other settings stays."""
        path = self._folder / SETTINGS
        if not path.is_file() or path.read_bytes() == self._digest:
            shutil.rmtree(self._folder, ignore_errors=True)

    @cached_property
    def _digest(self) -> bytes:
        checks = {check: self._config.settings(check) for check in self._config.chosen}
        return json_digest({"texts": self._texts.identity(), "checks": checks}).encode()

    def _counted(self) -> tuple[int, int, int]:
        num_units = rows = shingles = 0
        while (part := self._part(num_units)).is_file():
            numbers = pq.read_table(part, columns=[SHINGLES])[SHINGLES]
            num_units, rows, shingles = num_units + 1, rows + len(numbers), shingles + (pc.sum(numbers).as_py() or 0)
        if "duplicates" in self._config.chosen:
            Sketches.check(self._folder, (rows, shingles))
        return num_units, rows, shingles

    def _part(self, number: int) -> Path:
        return self._folder / f"unit-{number:06d}.parquet"

    def do(self, task: Task, pool: Pool | None) -> None:
        """Do the units that are left, and then look for duplicates among all."""
        num_units, rows, shingles = self.begin()
        task.skip(rows)
        looks_for_duplicates = "duplicates" in self._config.chosen
        sketches = Sketches(self._folder, (rows, shingles)) if looks_for_duplicates else None
        try:
            with _workers(self._config, self._texts.num_rows, pool) as check:
                for number, (unit, checked) in enumerate(_in_order(self._texts.units(num_units), check), num_units):
                    if sketches is not None:
                        sketches.append(checked.sketches, checked.signatures)
                    self._write(number, unit, checked)
                    task.advance(len(unit.ids))
        finally:
            if sketches is not None:
                sketches.close()
        self.rejected = getattr(self._texts, "num_rejected", 0)
        if sketches is not None:
            self._found = self._duplicates(sketches)

    def _write(self, number: int, unit: Unit, checked: Checked) -> None:
        counts = [len(one.shingles) for one in checked.sketches] or [0] * len(unit.ids)
        columns = {
            "id": pa.array(unit.ids, pa.string()),
            **{column.name: pa.array(unit.more[column.name], column.type) for column in self._texts.columns},
            CHARS: pa.array(checked.chars, pa.int64()),
            SHINGLES: pa.array(counts, pa.int64()),
            **checked.columns,
        }
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd")
        write_atomically(self._part(number), sink.getvalue().to_pybytes())

    def _duplicates(self, sketches: Sketches) -> dict[str, pa.Array]:
        numbers = pa.concat_tables(self._units(["id", CHARS, SHINGLES])).combine_chunks()
        counts = numbers[SHINGLES].to_numpy()
        with Task("hygiene: duplicates", NUM_HASHES // band_hashes(self._config.jaccard), "bands") as task:
            return groups(
                numbers["id"].combine_chunks(),
                numbers[CHARS].combine_chunks(),
                sketches.read(counts),
                self._config.jaccard,
                partial(task.advance, 1),
            )

    def _units(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        number = 0
        while (part := self._part(number)).is_file():
            yield pq.read_table(part, columns=columns)
            number += 1

    def tables(self) -> Iterator[pa.Table]:
        """The rows of each unit: id, further columns, and a struct for each check."""
        self.rows = 0
        for table in self._units():
            columns = {name: table[name] for name in table.column_names if name not in (CHARS, SHINGLES)}
            if self._found:
                own = {name: column.slice(self.rows, table.num_rows) for name, column in self._found.items()}
                fields = list(self._config.arrow_schema("duplicates"))
                columns["duplicates"] = pa.StructArray.from_arrays([own[f.name] for f in fields], fields=fields)
            self.rows += table.num_rows
            names = [name for name in columns if name not in self._config.chosen]
            yield pa.table({name: columns[name] for name in [*names, *self._config.chosen]})


@contextmanager
def _work(texts: Texts, config: HygieneConfig, folder: Path, log: Path | None, pool: Pool | None) -> Iterator[_Work]:
    """All units done; the folder is removed once the result is written."""
    if "overlap" in config.chosen:
        sets_of(config)  # refuses a set that cannot be used before time is spent
    work = _Work(folder, texts, config)
    with Task("hygiene: reading", texts.num_rows, "rows", log) as task:
        work.do(task, pool)
    yield work
    shutil.rmtree(folder, ignore_errors=True)


Checker = Callable[[Unit], "Future[Checked] | Checked"]


@contextmanager
def _workers(config: HygieneConfig, num_rows: int | None, spread: Pool | None) -> Iterator[tuple[Checker, int]]:
    """What checks a unit, and how many units may be under way. Few rows need no further processes."""
    if spread is not None:
        yield (lambda unit: spread.submit(check_texts, unit.texts, config)), spread.under_way
        return
    count = config.workers or cpu_count() or 1
    if count == 1 or (num_rows is not None and num_rows <= FEW_ROWS):
        yield (lambda unit: check_texts(unit.texts, config)), 1
        return
    with ProcessPoolExecutor(count, get_context("spawn")) as pool:
        try:
            yield (lambda unit: pool.submit(check_texts, unit.texts, config)), count + 1
        except BrokenProcessPool as error:
            raise StorageError(
                "a worker process was killed, as systems do where memory runs out; run the same command again with fewer: "
                f"--set workers={max(1, count // 2)} (now {count}). What was done so far is kept."
            ) from error
        except BaseException:  # Ctrl-C too: what waits is not begun
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _in_order(units: Iterator[Unit], check: tuple[Checker, int]) -> Iterator[tuple[Unit, Checked]]:
    """Units with what became of them, in their order; a few are under way at once."""
    checker, most = check
    under_way: deque[tuple[Unit, Future[Checked] | Checked]] = deque()
    for unit in units:
        under_way.append((unit, checker(unit)))
        if len(under_way) >= most:
            yield _done(*under_way.popleft())
    while under_way:
        yield _done(*under_way.popleft())


def _done(unit: Unit, checked: Future[Checked] | Checked) -> tuple[Unit, Checked]:
    return unit, checked.result() if isinstance(checked, Future) else checked
