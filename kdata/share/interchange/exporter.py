"""Export a dataset for other tools, as nested lists or as axolotl's columns, and report what these cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kdata.calls import validated
from kdata.errors import ConfigError, DataError
from kdata.format.files import (
    local_path,
    lock_of,
    new_file,
    removed_on_failure,
    settle,
    storage_errors,
    write_atomically,
)
from kdata.format.keep_rules import refuse_sorted
from kdata.observe.progress import Task
from kdata.share.interchange import axolotl, plain
from kdata.store.dataset import Dataset
from kdata.store.index import read_index

ExportFormat = Literal["plain", "axolotl"]


@validated
def export_dataset(dataset: Dataset, target: Path | str, format: ExportFormat, *, version: int = 2) -> list[str]:
    """Write every row to one Parquet file; return what the file does not hold, one line each.

    The same lines stand in FILE.README.md beside it.

    Args:
        target: a file that does not exist yet.
        version: of axolotl's columns, 1 or 2.
    Raises:
        ConfigError: the file exists, `target` is a URL, or there is no such version.
        DataError: the dataset has no rows.
    """
    target = local_path(target, "name a file here, and upload it afterwards")
    if version not in axolotl.SCHEMAS:
        raise ConfigError(f"axolotl's columns have versions 1 and 2, not {version}; choose one of these")
    if not dataset.num_rows:
        raise DataError(f"{dataset.path} has no rows to export; capture or import some first")
    refuse_sorted(dataset.info.codec, dataset.place, "an export")
    schema = plain.SCHEMA if format == "plain" else axolotl.SCHEMAS[version]
    temporary = target.with_name(target.name + ".tmp")
    with storage_errors(target), lock_of(target), Task("export", dataset.num_tokens, "tokens") as task:
        if target.exists():
            raise ConfigError(f"{target} exists; name a new file")
        page = target.with_name(f"{target.name}.README.md")
        with removed_on_failure(temporary, page, target):
            with new_file(temporary) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for number, entry in enumerate(dataset.manifest):
                    if entry.rows:
                        writer.write_table(_table(dataset, number, format, version))
                    task.advance(entry.tokens)
            lines = losses(dataset, format)
            write_atomically(page, _readme(dataset, format, lines))
            settle(temporary, target)  # last: a file that exists is not written again, so its page must be there
    return lines


def _readme(dataset: Dataset, format: ExportFormat, lines: list[str]) -> bytes:
    """The page beside the file: what it is, and what it does not hold."""
    page = f"# Distributions of {dataset.info.teacher.model}\n\nWritten by `kdata export --format {format}`.\n"
    return (page + "\nNot in it:\n\n" * bool(lines) + "".join(f"- {line}\n" for line in lines)).encode()


def _table(dataset: Dataset, number: int, format: ExportFormat, version: int) -> pa.Table:
    path = dataset.checked_file(dataset.manifest[number], "index")
    index = read_index(path, ["id", "domain", "text"])
    ids, domains = index["id"].to_pylist(), index["domain"].to_pylist()
    sequences = dataset.shard(number)
    if format == "plain":
        return plain.table(sequences, ids, domains, index["text"].to_pylist())
    return axolotl.table(sequences, ids, domains, version)


def losses(dataset: Dataset, format: ExportFormat) -> list[str]:
    """What the other format does not hold, one line each."""
    lines = []
    if dataset.info.tail == "ghost":
        mass = dataset.sql("select 1 - avg(kept_mass) as rest from rows")["rest"][0].as_py() or 0.0
        lines.append(
            f"the mass of the rest (log_tail), {mass:.1%} on average: a student that reads lists alone never sees it"
        )
    if dataset.info.tail == "draws":
        lines.append(
            "which entries are exact and which are draws: the exported log-weights sum to 1 together with the draws, and "
            "only their expectation is the distribution"
        )
    if dataset.info.codec.keeps_some_positions:
        lines.append(
            "which targets keep no distribution on purpose: the lists of these are empty, as before a first token"
        )
    if dataset.info.tail != "absent":
        lines.append("the actual token's log-probability and rank, the entropy, further temperatures")
    if format == "axolotl":
        lines.append("text, and which positions count (target_mask); axolotl masks by its own labels")
    return lines
