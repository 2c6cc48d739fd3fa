"""Make the golden datasets of format 1.0 in tests/golden/v1, and what a reader must find in them.

`python -m tests.golden.make FOLDER [NAME ...]` writes them anew. They are committed, and are not made again: a reader of any
later version has to read the bytes that stand there. A later minor version gets a folder of its own beside them. Optional
keys that version 1.0 got later are in datasets of their own: packed-bound is the first whose shards name their dataset,
packed-coded the first with version 3 of its codec.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import kdata
from kdata.format.keep import KeepConfig
from kdata.format.kept import Kept, log_tail
from kdata.format.manifest import new_info
from kdata.format.records import Record, Reject, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TeacherInfo, TokenizerInfo
from kdata.store.writer import Writer
from tests.fakes import StandInTeacher

VERSIONS = {"packed-hybrid": 1, "packed-bound": 1, "packed-coded": 3, "packed-threshold": 3}  # of the codec packed
# name, what is kept, codec (None: the kind's own)
DATASETS: dict[str, tuple[KeepConfig, CodecInfo | None]] = {
    "packed-hybrid": (KeepConfig(kind="hybrid", k=4, num_draws=6, temperatures=[2.0], draw_method="independent"), None),
    "packed-bound": (KeepConfig(kind="hybrid", k=4, num_draws=6, temperatures=[2.0]), None),
    "packed-coded": (KeepConfig(kind="hybrid", k=4, num_draws=6, temperatures=[2.0]), None),
    "packed-threshold": (KeepConfig(kind="threshold", threshold=0.03), None),
    "plain-topk": (
        KeepConfig(kind="topk", k=6),
        CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 6}),
    ),
}
ARRAYS = ("token_ids", "rank", "num_exact", "num_kept", "entry_ids", "target_mask")
REALS = ("logprob", "log_tail", "entropy", "entry_logprobs", "log_z", "draw_logprobs")


def record(name: str, ids: list[int], teacher: StandInTeacher, keep: KeepConfig, codec: CodecInfo) -> Record:
    """One sequence as the stand-in teacher believes it."""
    readout = teacher.readout(np.array(ids), keep)
    tail = readout.log_tail
    if codec.id == "plain":  # of what is stored, as a top-k teacher tells it
        recorded = readout.rank > 0
        kept = Kept(readout.kept.num_exact, readout.kept.num_drawn, readout.kept.ids, readout.kept.logprobs)
        tail = np.where(recorded, log_tail(kept.mass()), np.nan).astype(np.float32)
    return Record(
        id=name,
        domain="even" if len(ids) % 2 == 0 else "odd",
        token_ids=readout.token_ids,
        target_mask=readout.rank > 0,
        kept=readout.kept,
        text=f"text of {name}, ünïcode 日本",
        **{**readout.measures(), "log_tail": tail},
        token_bytes=np.arange(len(ids), dtype=np.uint16),
        license="CC0-1.0",
    )


def make(root: Path, name: str) -> kdata.Dataset:
    """Write one of the datasets: three rows and a reject."""
    keep, codec = DATASETS[name]
    if codec is None:
        codec = keep.codec(300).model_copy(update={"version": VERSIONS[name]})
    teacher = StandInTeacher("golden")
    info = new_info(
        format_version="1.0",
        vocab_size=300,
        teacher=TeacherInfo.model_validate({**teacher.info.model_dump(), "model": "golden"}),
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=codec,
        tail=keep.tail,
    )
    rows = {"a": [0, 17, 256, 299, 5], "b": [0, 3], "c": [0, 80, 80, 81, 2, 1]}
    records = [record(key, ids, teacher, keep, codec) for key, ids in rows.items()]
    source = SourceInfo(kind="capture", settings={"made": "for the tests"}, num_units=None)
    with Writer(root, info, "capture", source) as writer:
        writer.commit(UnitResult(0, records, [Reject("r", "odd", "empty", "the text is empty")]))
        writer.finish(1)
    return kdata.open(root)


def decoded(dataset: kdata.Dataset) -> dict[str, Any]:
    """All that a reader gets, as JSON values (NaN and -Infinity as Python writes them)."""
    content: dict[str, Any] = {"fingerprint": dataset.content_digest, "index": dataset.index().to_pylist(), "rows": []}
    for sequence in dataset:
        row = {name: getattr(sequence, name).tolist() for name in ARRAYS}
        for name in REALS:
            values = getattr(sequence, name)
            row[name] = (
                None if values is None else [float(str(value)) for value in values.reshape(-1).astype(np.float32)]
            )
        content["rows"].append(row)
    return content


def main(folder: Path, names: list[str]) -> None:
    """Write datasets, all unless some are named, and their expected values."""
    for name in names or DATASETS:
        expected = decoded(make(folder / name, name))
        text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
