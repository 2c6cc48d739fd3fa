"""schemas/ is what the code does: schemas and tables equal, files of a dataset valid, and a reader that is
written from the document alone reads what kdata reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import kdata
from kdata.errors import QueryError
from kdata.format.codec import CODECS
from kdata.format.schema import index_schema, known_codecs, payload_schema, rejects_schema
from kdata.jobs.hidden import HiddenConfig, store_hidden
from kdata.selection.ranked import Difference
from kdata.selection.select import select
from kdata.teachers.config import TeacherConfig
from tests.fakes import codec_version, run_capture
from tests.kdata.selection.plans import score_with
from tests.schemas.raw import ids_by_number, plain_row
from tests.schemas.tables import (
    FOLDER,
    JSON_FILES,
    MARK,
    MODELS,
    README,
    document,
    json_schema,
    tables,
    with_tables,
)

REMEDY = "run `python -m tests.schemas.tables`"


@pytest.fixture(scope="module")
def furnished(captured: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """A dataset with a sidecar, a plan and hidden states."""
    dataset = kdata.open(shutil.copytree(captured, tmp_path_factory.mktemp("furnished") / "d"))
    score_with(dataset, dict.fromkeys(dataset.index(["id"])["id"].to_pylist(), 9.5))
    select(dataset, Difference(share=0.5))
    store_hidden(dataset, HiddenConfig(model=TeacherConfig(model=str(llama_dir), backend="transformers")))
    return dataset


@pytest.mark.parametrize("name", JSON_FILES)
def test_the_json_schemas_are_the_models(name: str) -> None:
    assert (FOLDER / "v1" / f"{name}.schema.json").read_text("utf-8") == json_schema(name), REMEDY


def test_the_files_of_a_dataset_follow_the_json_schemas(furnished: kdata.Dataset) -> None:
    root = furnished.path
    files = {
        "dataset": [(root / "dataset.json").read_text()],
        "manifest": (root / "manifest.jsonl").read_text().splitlines(),
        "plan": [(root / "plans/difference.json").read_text()],
        "score": [(root / "scores/ref.json").read_text()],
        "hidden": [(root / "hidden/states.json").read_text()],
        "recipe": [
            json.dumps(yaml.safe_load(path.read_text())) for path in (FOLDER.parent / "pipelines").glob("*.yaml")
        ],
    }
    assert files.keys() == JSON_FILES.keys()
    for name, contents in files.items():
        schema = json.loads((FOLDER / "v1" / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        for content in contents:
            jsonschema.validate(json.loads(content), schema)
            for key in schema["required"]:
                broken = {k: v for k, v in json.loads(content).items() if k != key}
                with pytest.raises(jsonschema.ValidationError):
                    jsonschema.validate(broken, schema)


def test_the_readme_s_tables_are_the_contracts() -> None:
    text = README.read_text("utf-8")
    assert set(tables()) == {match[1] for match in MARK.finditer(text)}
    assert with_tables(text) == text, REMEDY


def test_the_readme_names_every_column_and_key_and_says_what_it_is() -> None:
    text = README.read_text("utf-8")
    columns = [c for name in ("payload", "index", "rejects") for c in document(name)["columns"]]
    for codec in document("payload")["codecs"].values():
        columns += codec["columns"] + codec.get("coded", {"columns": []})["columns"]
    for column in columns:
        assert f"`{column['name']}`" in text and len(column["doc"]) > 10, column["name"]
    for model in MODELS:
        for name, field in model.model_fields.items():
            assert f"`{field.alias or name}`" in text and field.description, f"{model.__name__}.{name}"
    assert known_codecs().keys() == CODECS.keys()


def test_a_dataset_s_columns_are_those_of_the_documents(furnished: kdata.Dataset) -> None:
    entry = next(e for e in furnished.manifest if e.rejected)
    for path, schema in (
        (f"index/{entry.name}.parquet", index_schema()),
        (f"rejects/{entry.name}.parquet", rejects_schema()),
    ):
        assert pq.read_schema(furnished.path / path).equals(schema)
    payload = pa.ipc.open_file(furnished.path / f"data/{entry.name}.arrow")
    assert payload.schema.equals(payload_schema(furnished.info.codec.id, furnished.info.codec.version))
    metadata = {k.decode(): v.decode() for k, v in payload.schema.metadata.items()}
    assert json.loads(metadata["kdata.codec"]) == furnished.info.codec.model_dump()
    assert all(f"`{key}`" in README.read_text("utf-8") for key in metadata)


def test_the_documented_views_have_the_documented_columns(furnished: kdata.Dataset) -> None:
    generated = tables()
    views = {"rows": "index", "scores.ref": "scores", "plans.difference": "plans"}
    for view in ("rows", "tokens", "entries", "rejects", "manifest", "scores.ref", "plans.difference"):
        name = views.get(view, view)
        names = furnished.sql(f"select column_name from (describe {view})")["column_name"].to_pylist()
        assert names == re.findall(r"^\| `(\w+)`", generated[name](), re.MULTILINE)
    with pytest.raises(
        QueryError, match=r"Views: entries, manifest, plans.difference, rejects, rows, scores.ref, tokens$"
    ):
        furnished.sql("select * from nothing")


def test_every_example_query_works_as_written(furnished: kdata.Dataset) -> None:
    block = re.search(r"```sql\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert block is not None
    queries = [q for q in block[1].split("\n\n") if q.strip()]
    assert len(queries) >= 6
    for query in queries:
        assert furnished.sql(query).num_rows > 0, query


# ---------------------------------------------- a reader made from schemas/README.md, and from nothing else


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def without(value: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k not in keys}


def steps(code: int) -> int:
    return code if code < 240 else round(240 * 1.25 ** (code - 239))


def planes(row: dict[str, Any], name: str) -> list[int]:
    low, high, top = row[f"{name}_0"], row[f"{name}_1"], row[f"{name}_2"] or [0] * len(row[f"{name}_0"])
    return [a + 256 * b + 65536 * c for a, b, c in zip(low, high, top, strict=True)]


def decode(row: dict[str, Any], parameters: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """(id, log-weight) of every entry of every position of a packed row."""
    is_coded = "exact_ids" in row
    exact_ids = iter(row["exact_ids"] if is_coded else planes(row, "exact_id"))
    gaps = iter(row["exact_gaps"])
    draw_ids = iter(row["draw_ids"] if is_coded else [])
    draw_steps = iter([] if is_coded or row["draw_id_0"] is None else planes(row, "draw_id"))
    counts = iter(row["draw_counts"] or [])
    positions = []
    for tail, num_exact, num_drawn in zip(row["log_tail"], row["num_exact"], row["num_drawn"], strict=True):
        entries, u, reached = [], [], 0
        for _ in range(num_exact):
            reached += steps(next(gaps))
            u.append(reached)
        if u:
            height = math.log(1 - math.exp(tail)) - math.log(sum(math.exp(-x / 16) for x in u))
            entries += [(next(exact_ids), height - x / 16) for x in u]
        token = 0
        times = list(islice(counts, num_drawn))
        for count in times:
            token = next(draw_ids) if is_coded else token + next(draw_steps)
            entries.append((token, math.log(count / parameters.get("num_draws", sum(times))) + tail))
        positions.append(entries)
    return positions


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "topk", "k": 12},
        {"kind": "adaptive", "mass": 0.9},
        {"kind": "sampled"},
        {"kind": "hybrid", "k": 4},
        {"kind": "threshold"},
    ],
)
def test_a_reader_made_from_the_document_reads_the_same(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, settings: dict[str, Any], version: int
) -> None:
    if version < 3 and settings["kind"] == "threshold":
        pytest.skip("there is no such data")
    with codec_version(version):
        dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, reading={"limit": 6}, **settings)
    root = dataset.path
    info = json.loads((root / "dataset.json").read_bytes())
    assert sha256(canonical(without(info, "digest"))) == info["digest"]
    assert (
        sha256(canonical(without(info, "sources", "tokenizer_files", "fingerprint", "digest"))) == info["fingerprint"]
    )
    lines = [json.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]
    row_number = 0
    for line in sorted(lines, key=lambda e: e["name"]):
        assert sha256(canonical(without(line, "digest"))) == line["digest"]
        for path, about in line["files"].items():
            assert sha256((root / path).read_bytes()) == about["sha256"]
        index = pq.read_table(root / f"index/{line['name']}.parquet").to_pylist()
        shard = pa.ipc.open_file(root / f"data/{line['name']}.arrow")
        payload = shard.read_all().to_pylist()
        if version == 3:
            ids = ids_by_number(shard)
            payload = [plain_row(row, ids) for row in payload]
        inputs = b""
        for about, row in zip(index, payload, strict=True):
            raw = np.array(row["input_ids"], "<i4").tobytes()
            assert hashlib.blake2b(raw, digest_size=16).hexdigest() == about["content_hash"]
            inputs += row["id"].encode() + b"\0" + raw
            sequence = dataset[row_number]
            assert sequence.token_ids.tolist() == row["input_ids"]
            for t, entries in enumerate(decode(row, info["codec"]["parameters"])):
                span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
                assert sequence.entry_ids[span].tolist() == [token for token, _ in entries]
                np.testing.assert_allclose(sequence.entry_logprobs[span], [w for _, w in entries], rtol=1e-6, atol=1e-6)
            row_number += 1
        assert sha256(inputs) == line["inputs"]
    shards = sorted([e["name"], sorted([p, f["sha256"]] for p, f in e["files"].items())] for e in lines)
    assert dataset.content_digest == sha256(canonical({"identity": info["fingerprint"], "shards": shards}))
    assert info["tokenizer"]["hash"] == sha256(
        canonical(without(json.loads((root / "tokenizer/tokenizer.json").read_bytes()), "truncation", "padding"))
    )
    assert row_number == dataset.num_rows
    corpus = hashlib.sha256(hashlib.sha256(corpus_file.read_bytes()).digest()).hexdigest()
    assert info["sources"]["capture"]["settings"]["corpus"]["sha256"] == corpus
