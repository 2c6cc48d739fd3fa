"""Datasets that somebody made to do harm: every digest fits, and the content is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import CorruptError, KdataError
from kdata.format.files import file_info
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.schema import NO_IDENTITY, canonical_json, json_digest
from kdata.selection.score_file import bring
from tests.fakes import codec_version, run_capture

Columns = dict[str, pa.Array]


def rewrite_info(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change dataset.json, and make its digests and the manifest fit."""
    content = json.loads((root / "dataset.json").read_text())
    change(content)
    content["fingerprint"] = json_digest({key: value for key, value in content.items() if key not in NO_IDENTITY})
    (root / "dataset.json").write_bytes(json_bytes({**content, "digest": digest_of(content)}))
    rewrite_lines(root, lambda line: line.update(fingerprint=content["fingerprint"]))


def rewrite_lines(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every line of the manifest and make its digest fit."""
    lines = [json.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]
    for line in lines:
        change(line)
        line["digest"] = digest_of(line)
    (root / "manifest.jsonl").write_bytes(b"".join(canonical_json(line) + b"\n" for line in lines))


def rewrite_shard(
    root: Path,
    change: Callable[[Columns], None],
    metadata: dict[bytes, bytes] | None = None,
    footer: dict[bytes, bytes] | None = None,
) -> None:
    """Change columns of the first shard, write it as one record batch, and make its digest fit."""
    path = root / "data/capture-00000.arrow"
    file = pa.ipc.open_file(path.read_bytes())
    table = file.read_all().combine_chunks()
    columns = {name: table[name].chunk(0) for name in table.schema.names}
    change(columns)
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    batch = batch.replace_schema_metadata({**table.schema.metadata, **(metadata or {})})
    footer = file.metadata if footer is None else footer
    with pa.ipc.new_file(str(path), batch.schema, metadata=footer) as writer:
        writer.write_batch(batch)

    def with_new_digest(line: dict[str, Any]) -> None:
        if line["name"] == "capture-00000":
            line["files"]["data/capture-00000.arrow"] = file_info(path).model_dump()

    rewrite_lines(root, with_new_digest)


def with_values(array: pa.ListArray, values: pa.Array) -> pa.ListArray:
    """The same lists over other values."""
    return pa.ListArray.from_arrays(array.offsets, values)


def longer(array: pa.ListArray, by: int) -> pa.ListArray:
    """The last list is `by` values longer, or shorter."""
    offsets = array.offsets.to_numpy().copy()
    values = array.values.to_numpy(zero_copy_only=False)
    offsets[-1] += by
    values = np.concatenate([values, np.zeros(max(by, 0), values.dtype)])[: offsets[-1]]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def moved(array: pa.ListArray) -> pa.ListArray:
    """The same values in all, one of them in another row."""
    offsets = array.offsets.to_numpy().copy()
    offsets[1] += 1
    return pa.ListArray.from_arrays(pa.array(offsets), array.values)


def changed(array: pa.ListArray, value: float, place: int = -1) -> pa.ListArray:
    """One value is another one."""
    values = array.values.to_numpy(zero_copy_only=False).copy()
    values[place] = value
    return with_values(array, pa.array(values))


def refused(root: Path, reason: str) -> None:
    """Reading, training and `verify --deep` all refuse the first shard."""
    dataset = kdata.open(root)
    with pytest.raises(CorruptError, match=reason):
        dataset.shard(0)
    with pytest.raises(CorruptError, match=reason):
        list(dataset)
    assert [p.path for p in verify(kdata.open(root), deep=True)] == ["data/capture-00000.arrow"]


def test_a_manifest_line_may_say_any_number_of_rows(copied: Path) -> None:
    """Of one shard: a list of their numbers would take the memory."""
    rewrite_lines(
        copied, lambda line: line.update(rows=9_999_999_999, tokens=9_999_999_999) if line["unit"] == 0 else None
    )
    with pytest.raises(CorruptError, match="the manifest says 9999999999"):
        kdata.open(copied).shard(0)


def test_text_of_the_index_that_is_no_utf_8_is_damage(copied: Path) -> None:
    """pyarrow reads it from Parquet as it is; nothing shows before Python asks for the value."""
    path = copied / "index/capture-00000.parquet"
    table = pq.read_table(path)
    texts = pa.array([b"\xac", *[b"text"] * (table.num_rows - 1)]).view(pa.string())
    place = table.schema.get_field_index("text")
    pq.write_table(table.set_column(place, table.schema.field("text"), texts), path)

    def with_new_digest(line: dict[str, Any]) -> None:
        if line["name"] == "capture-00000":
            line["files"]["index/capture-00000.parquet"] = file_info(path).model_dump()

    rewrite_lines(copied, with_new_digest)
    with pytest.raises(CorruptError, match="UTF8"):
        list(kdata.open(copied))
    with pytest.raises(KdataError, match=r"(?i)utf"):
        kdata.open(copied).sql("select text from rows")


@pytest.fixture
def with_temperature(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> Path:
    return run_capture(tmp_path / "warm", corpus_file, tokenizer_dir, temperatures=[2.0]).path


def test_the_helpers_leave_a_dataset_as_good_as_it_was(copied: Path) -> None:
    rewrite_info(copied, lambda content: None)
    rewrite_shard(copied, lambda columns: None)
    assert len(kdata.open(copied).shard(0)) and verify(kdata.open(copied), deep=True) == []


SOURCES = [
    "../../../x/data/capture",
    "/elsewhere/data/capture",
    "capture/../capture",
    ".",
    "",
    "a b",
    "a\nb",
    "caf\u00e9",
]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_cannot_lead_out_of_the_folder(copied: Path, tmp_path: Path, name: str) -> None:
    """Merge, head and split name files after sources, so a dataset with such a name is not opened."""
    rewrite_source(copied, "other_name")
    assert kdata.open(copied).num_rows, "a plain name is opened: what is refused below is the name alone"
    rewrite_source(copied, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptError, match=r"dataset\.json|manifest\.jsonl"):
        kdata.open(copied)
    assert sorted(tmp_path.rglob("*")) == before


def rewrite_source(root: Path, name: str) -> None:
    """Give the only source of a dataset another name, everywhere, and make every digest fit."""

    def renamed(content: dict[str, Any]) -> None:
        content["sources"] = {name: next(iter(content["sources"].values()))}

    def of_source(line: dict[str, Any]) -> None:
        line["source"], line["name"] = name, f"{name}-{line['unit']:05d}"
        line["files"] = {f"{p.split('/')[0]}/{line['name']}.{p.split('.')[-1]}": f for p, f in line["files"].items()}

    rewrite_info(root, renamed)
    rewrite_lines(root, of_source)


@pytest.mark.parametrize("changes", [{"unit": 7}, {"name": "other-00000"}, {"source": "other"}])
def test_a_shard_s_name_follows_from_source_and_unit(copied: Path, changes: dict[str, Any]) -> None:
    rewrite_lines(copied, lambda line: line.update(changes if line["unit"] == 0 else {}))
    with pytest.raises(CorruptError, match="cannot have the shard name"):
        kdata.open(copied)


@pytest.mark.parametrize("name", ["../out.json", "/etc/out", "a/b", "..", ".hidden", ""])
def test_a_tokenizer_s_file_is_a_plain_name(copied: Path, name: str) -> None:
    rewrite_info(copied, lambda content: content["tokenizer_files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(CorruptError, match=r"dataset\.json"):
        kdata.open(copied)


def sibling(content: dict[str, Any]) -> None:
    content["codec"]["parameters"]["num_draws"] = 50


def larger(content: dict[str, Any]) -> None:
    content["vocab_size"] += 1


def certain(content: dict[str, Any]) -> None:
    content["tail"] = "ghost"


@pytest.mark.parametrize("change", [sibling, larger, certain])
def test_a_sibling_s_dataset_json_does_not_fit_the_shards(
    copied: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite_info(copied, change)
    with pytest.raises(CorruptError, match="written for another dataset"):
        kdata.open(copied).shard(0)
    assert {p.path for p in verify(kdata.open(copied), deep=True)} >= {"data/capture-00000.arrow"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"num_draws": 0}, {"num_draws": 1e12}, {"num_draws": "8"}, {"num_draws": True}, {"tau": 0}, {"tau": "1"},
        {"temperatures": 2}, {"temperatures": [0]}, {"temperatures": ["x"]}, {"temperatures": [2.0] * 65}, {"k": -1},
        {"id_bytes": 9},
    ],
)  # fmt: skip
def test_codec_parameters_are_numbers_that_can_be(copied: Path, parameters: dict[str, Any]) -> None:
    rewrite_info(copied, lambda content: content["codec"]["parameters"].update(parameters))
    with pytest.raises(CorruptError, match="codec parameter"):
        kdata.open(copied)


@pytest.mark.parametrize(
    "parameters", [{}, {"threshold": 0.0}, {"threshold": 1e-9}, {"threshold": "x"}, {"threshold": 1}]
)
def test_the_kind_threshold_names_a_probability(copied: Path, parameters: dict[str, Any]) -> None:
    rewrite_info(
        copied, lambda content: content["codec"].update(kind="threshold", parameters={"id_bytes": 2, **parameters})
    )
    with pytest.raises(CorruptError, match="codec parameter threshold"):
        kdata.open(copied)


PLANES = ["exact_gaps", "exact_id_0", "exact_id_1", "draw_id_0", "draw_id_1", "draw_counts"]
CODES = ["exact_gaps", "exact_codes", "draw_codes", "entry_bits", "draw_counts"]
NUMBERS = ["logprob", "rank", "num_exact", "num_drawn"]
DISAGREE = "other lengths|bits|differ in number|counts say|more or fewer|without a code"


@pytest.mark.parametrize("by", [-3, -1, 1, 3])
@pytest.mark.parametrize("name", [*CODES, *(f"{name}_codes" for name in (*NUMBERS, "entropy", "tail")), "far_values"])
def test_columns_have_the_lengths_of_their_counts(copied: Path, name: str, by: int) -> None:
    rewrite_shard(
        copied, lambda columns: columns.update({name: longer(columns[name], max(by, -len(columns[name].values)))})
    )
    refused(copied, DISAGREE if by > 0 or name != "far_values" else ".")


@pytest.mark.parametrize("by", [-3, -1, 1, 3])
@pytest.mark.parametrize("name", PLANES)
def test_entry_columns_of_older_data_have_the_lengths_of_their_counts(older: Path, name: str, by: int) -> None:
    rewrite_shard(older, lambda columns: columns.update({name: longer(columns[name], by)}))
    refused(older, "other lengths")


@pytest.mark.parametrize("name", [*CODES, *(f"{name}_codes" for name in NUMBERS)])
def test_rows_of_all_columns_end_at_the_same_place(copied: Path, name: str) -> None:
    rewrite_shard(copied, lambda columns: columns.update({name: moved(columns[name])}))
    refused(copied, DISAGREE)


@pytest.mark.parametrize("name", [*PLANES, *NUMBERS])
def test_rows_of_older_data_end_at_the_same_place(older: Path, name: str) -> None:
    rewrite_shard(older, lambda columns: columns.update({name: moved(columns[name])}))
    refused(older, "other lengths")


def test_a_column_of_one_value_is_not_spread_over_all(older: Path) -> None:
    def single(columns: Columns) -> None:
        rows = len(columns["exact_gaps"])
        for name in ("exact_id_0", "exact_id_1", "draw_counts"):
            offsets = pa.array([0] * rows + [1], pa.int32())
            columns[name] = pa.ListArray.from_arrays(offsets, columns[name].values[:1])

    rewrite_shard(older, single)
    refused(older, "other lengths")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("exact_id_1", 255, "outside"),
        ("draw_id_1", 255, "outside"),
        ("draw_counts", 0, "count 0"),
        ("log_tail", np.nan, "log_tail"),
        ("log_tail", 0.5, "log_tail"),
    ],
)
def test_values_of_older_data_are_in_their_range(older: Path, name: str, value: float, reason: str) -> None:
    rewrite_shard(older, lambda columns: columns.update({name: changed(columns[name], value)}))
    refused(older, reason)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("exact_codes", 255, "bits|outside"),
        ("draw_codes", 255, "bits|outside"),
        ("draw_counts", 0, "count 0"),
        ("tail_codes", 254, "log_tail"),
        ("tail_codes", 255, "stands for nothing"),
        ("rank_codes", 254, "stands for nothing"),
        ("rank_codes", 255, "without a code"),
        ("num_exact_codes", 254, "stands for nothing"),
        ("logprob_codes", 255, "without a code"),
    ],
)
def test_codes_are_in_their_range(copied: Path, name: str, value: float, reason: str) -> None:
    rewrite_shard(copied, lambda columns: columns.update({name: changed(columns[name], value)}))
    refused(copied, reason)


def test_numbers_without_a_code_are_in_their_range(copied: Path) -> None:
    """The last token's rank, and then its number of entries, stand in the list."""

    def listed(name: str, column: int, number: int) -> Callable[[Columns], None]:
        def change(columns: Columns) -> None:
            columns[name] = changed(columns[name], 255)
            for part, value in (("far_columns", column), ("far_values", number)):
                columns[part] = changed(longer(columns[part], 1), value)

        return change

    rewrite_shard(copied, listed("rank_codes", 1, -5))
    refused(copied, "a rank is out of range")
    rewrite_shard(copied, listed("num_exact_codes", 9, 5))
    refused(copied, "list of numbers without a code is damaged")


@pytest.mark.parametrize("content", [None, b"", b"2:AAAA", b"9999999:AAAA"])
def test_the_table_of_common_ids_is_checked(copied: Path, content: bytes | None) -> None:
    footer = {} if content is None else {b"kdata.common_ids": content}
    rewrite_shard(copied, lambda columns: None, footer=footer)
    refused(copied, "common ids")


def test_log_z_has_one_number_per_token_and_temperature(with_temperature: Path) -> None:
    rewrite_shard(with_temperature, lambda columns: columns.update(log_z=longer(columns["log_z"], 1)))
    refused(with_temperature, "other lengths")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("exact_gaps", pa.uint16()), ("draw_counts", pa.int8()), ("input_ids", pa.int64()), ("tail_codes", pa.int16())],
)
def test_columns_have_the_types_of_the_format(copied: Path, name: str, kind: pa.DataType) -> None:
    def other_type(columns: Columns) -> None:
        columns[name] = with_values(columns[name], columns[name].values.cast(kind, safe=False))

    rewrite_shard(copied, other_type)
    refused(copied, f"column {name}")


@pytest.mark.parametrize("name", ["input_ids", "exact_gaps", "draw_codes", "entry_bits", "logprob_codes", "far_values"])
@pytest.mark.parametrize("by", [2**28, -(2**28), 2**31 - 1])
def test_offsets_that_leave_the_buffer_are_never_followed(copied: Path, name: str, by: int) -> None:
    """Without a full validation pyarrow hands out views of memory that is not there."""

    def wild(columns: Columns) -> None:
        array = columns[name]
        offsets = array.offsets.to_numpy().copy()
        offsets[1] = by
        columns[name] = pa.ListArray.from_buffers(
            array.type, len(array), [None, pa.py_buffer(offsets.tobytes())], children=[array.values]
        )

    rewrite_shard(copied, wild)
    dataset = kdata.open(copied)
    with pytest.raises(CorruptError, match="is damaged"):
        dataset.shard(0)
    assert verify(kdata.open(copied), deep=True)


@pytest.mark.parametrize(
    "name", ["exact_codes", "draw_codes", "rank_codes", "entry_bits", "far_values", "draw_counts", "target_mask"]
)
def test_an_item_that_is_null_is_refused(copied: Path, name: str) -> None:
    def with_null(columns: Columns) -> None:
        array = columns[name]
        values = array.values.to_pylist()
        if not values:
            values, array = [0], longer(array, 1)
        values[-1] = None
        columns[name] = pa.ListArray.from_arrays(array.offsets, pa.array(values, array.type.value_type))

    rewrite_shard(copied, with_null)
    refused(copied, "null")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: rewrite_shard(root, lambda columns: None, {b"kdata.fingerprint": b"abc"}),
        lambda root: rewrite_shard(root, lambda columns: None, {b"kdata.codec": b"{}"}),
        lambda root: rewrite_shard(root, lambda columns: None, footer={}),
        lambda root: rewrite_shard(root, lambda columns: columns.pop("tail_codes") and None),
        lambda root: rewrite_shard(root, lambda columns: columns.update(entry_bits=longer(columns["entry_bits"], -2))),
    ],
    ids=["fingerprint", "codec", "footer", "column", "bits"],
)
def test_a_merge_of_two_versions_takes_no_foreign_or_damaged_shard(
    copied: Path, tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path, change: Callable[[Path], None]
) -> None:
    from kdata.share.arrange import merge

    with codec_version(1):
        other = run_capture(tmp_path / "other", jsonl([{"id": "x", "domain": "d", "text": "a cat"}]), tokenizer_dir)
    merge([kdata.open(copied), other], tmp_path / "fine")
    change(copied)
    with pytest.raises(CorruptError, match="is damaged"):
        merge([kdata.open(copied), other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def rewrite_index(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the index of the first shard, and make its digest fit."""
    path = root / "index/capture-00000.parquet"
    pq.write_table(change(pq.read_table(path)), path)

    def with_new_digest(line: dict[str, Any]) -> None:
        if line["name"] == "capture-00000":
            line["files"]["index/capture-00000.parquet"] = file_info(path).model_dump()

    rewrite_lines(root, with_new_digest)


def with_column(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[pa.Table], pa.Table]:
    def changed_table(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index(name)
        field = table.schema.field(name)
        return table.set_column(place, field, pa.array(change(table[name].to_numpy().copy()), field.type))

    return changed_table


INDEXES: list[tuple[Callable[[pa.Table], pa.Table], str]] = [
    (lambda table: pa.concat_tables([table, table]), "rows, the manifest says"),
    (lambda table: table.slice(1), "rows, the manifest says"),
    (with_column("num_tokens", lambda counts: counts + 1), "num_tokens has the sum"),
    (
        with_column("num_tokens", lambda counts: np.append(-1, [counts.sum() + 1, *[0] * (len(counts) - 2)])),
        "num_tokens",
    ),
    (with_column("num_target_tokens", lambda counts: counts * 0), "num_target_tokens has the sum 0"),
    (
        lambda table: table.set_column(2, "domain", table["domain"].dictionary_encode()),
        "column domain has the type dict",
    ),
    (lambda table: table.append_column("id", table["id"]), "column 'id' is repeated"),
]


@pytest.mark.parametrize(("change", "reason"), INDEXES)
def test_an_index_has_the_rows_and_tokens_of_the_manifest(
    copied: Path, change: Callable[[pa.Table], pa.Table], reason: str
) -> None:
    """Rows that were there twice were counted twice by SQL and chosen by `select`, and `repair` called it whole."""
    rewrite_index(copied, lambda table: table)
    assert kdata.open(copied).sql("select count(*) n from rows")["n"].to_pylist() == [kdata.open(copied).num_rows]
    rewrite_index(copied, change)
    for read in (lambda d: d.sql("from rows"), lambda d: d.index(["id"]), lambda d: d.take(np.arange(2)), list):
        with pytest.raises(CorruptError, match=reason):
            _ = read(kdata.open(copied)), kdata.open(copied).index(["id"])
    assert [p.path for p in verify(kdata.open(copied))] == ["index/capture-00000.parquet"]
    assert kdata.repair(copied).units == {"capture": [0]}
    assert verify(kdata.open(copied), deep=True) == []


def test_verify_deep_compares_each_row_s_counts_with_its_payload(copied: Path) -> None:
    rewrite_index(copied, with_column("num_tokens", lambda counts: counts[::-1] + np.arange(len(counts)) - 1))
    total = kdata.open(copied).manifest[0].tokens
    path = copied / "index/capture-00000.parquet"
    difference = total - sum(pq.read_table(path)["num_tokens"].to_pylist())
    rewrite_index(copied, with_column("num_tokens", lambda counts: np.append(counts[0] + difference, counts[1:])))
    assert verify(kdata.open(copied)) == []
    [problem] = verify(kdata.open(copied), deep=True)
    assert problem.path == "data/capture-00000.arrow" and "another num_tokens than its index says" in problem.what


def test_a_shard_has_no_more_record_batches_than_rows(copied: Path) -> None:
    """Twenty thousand empty ones took `head` half a minute."""
    path = copied / "data/capture-00000.arrow"
    file = pa.ipc.open_file(path.read_bytes())
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    with pa.ipc.new_file(str(path), file.schema, metadata=file.metadata) as writer:
        for batch in [*batches, *[batches[0].slice(0, 0)] * 50]:
            writer.write_batch(batch)

    def with_new_digest(line: dict[str, Any]) -> None:
        if line["name"] == "capture-00000":
            line["files"]["data/capture-00000.arrow"] = file_info(path).model_dump()

    rewrite_lines(copied, with_new_digest)
    refused(copied, "record batches for")
    with pytest.raises(CorruptError, match="record batches for"):
        kdata.head(copied, copied.parent / "head", 2)


def rewrite_listed(root: Path, relative: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a part of a score, or a plan, and make its digest fit."""
    path = root / relative
    pq.write_table(change(pq.read_table(path, partitioning=None)), path)
    listing = root / relative.split("/")[0] / f"{relative.split('/')[1].removesuffix('.parquet')}.json"
    content = json.loads(listing.read_text())
    if relative in content.get("files", {}):
        content["files"][relative] = file_info(path).model_dump()
    else:
        content["table"] = file_info(path).model_dump()
    listing.write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def test_a_score_has_each_row_once(copied: Path, tmp_path: Path) -> None:
    """A part whose rows are there twice doubled every join with it, and `verify --deep` called it whole."""
    data, part = kdata.open(copied), "scores/judge/capture-00000.parquet"
    ids = data.index(["id"])["id"].to_pylist()
    pq.write_table(pa.table({"id": ids, "mark": [float(n) for n in range(len(ids))]}), tmp_path / "marks.parquet")
    bring(data, tmp_path / "marks.parquet", "judge")
    joined = "select count(*) n from rows join scores.judge using (id)"
    rewrite_listed(copied, part, lambda table: table)
    assert verify(data) == [] and kdata.open(copied).sql(joined)["n"].to_pylist() == [len(ids)]
    rewrite_listed(copied, part, lambda table: pa.concat_tables([table, table]))
    with pytest.raises(CorruptError, match=r"capture-00000\.parquet is damaged: it holds .* rows, its shard"):
        kdata.open(copied).sql(joined)
    assert [(p.path, "twice" in p.what) for p in verify(kdata.open(copied))] == [(part, True)]
    rewrite_listed(copied, part, lambda table: table.slice(0, 1).take([0] * kdata.open(copied).manifest[0].rows))
    assert [p.path for p in verify(kdata.open(copied))] == [part]


def test_verify_reads_the_rows_of_a_plan(copied: Path) -> None:
    data = kdata.open(copied)
    kdata.make_plan(data, "some", [row.id for row in data][:3], method="sql", parameters={}).save(copied / "plans")
    assert verify(data) == []
    rewrite_listed(
        copied,
        "plans/some.parquet",
        lambda table: table.set_column(0, table.schema.field(0), pa.array(["x", "y", "z"])),
    )
    assert [(p.path, "'x'" in p.what) for p in verify(data)] == [("plans/some.json", True)]
    repeats = pa.array([-1] * 3, pa.int32())
    rewrite_listed(copied, "plans/some.parquet", lambda table: table.set_column(1, table.schema.field(1), repeats))
    assert [(p.path, "repeats below 1" in p.what) for p in verify(data)] == [("plans/some.json", True)]


def test_a_token_that_is_another_one_than_its_index_means(copied: Path) -> None:
    def other_token(columns: Columns) -> None:
        last = columns["input_ids"].values[-1].as_py()
        columns["input_ids"] = changed(columns["input_ids"], 7 if last != 7 else 8)

    rewrite_shard(copied, other_token)
    assert verify(kdata.open(copied)) == []
    refused(copied, "other token ids than the index says")
