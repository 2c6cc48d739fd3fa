"""Shards, scores and plans name what they belong to: mixed from several datasets, each is refused with one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import kdata
from kdata.check.repair import repair
from kdata.check.verify import unbound, verify
from kdata.errors import CorruptError, KdataError, MismatchError
from kdata.format.files import file_info
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.schema import canonical_json, json_digest
from kdata.selection.ranked import All, Difference
from kdata.selection.select import select
from kdata.selection.sidecar import load_score_info
from kdata.share.arrange import head, merge, split
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, write_jsonl
from tests.kdata.selection.plans import score_with

GOLDEN = Path(__file__).resolve().parents[2] / "golden/v1"


def info_of(root: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "dataset.json").read_bytes())
    return content


def write_info(root: Path, content: dict[str, Any]) -> None:
    (root / "dataset.json").write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def lines_of(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "manifest.jsonl").read_bytes().splitlines()]


def write_lines(root: Path, lines: list[dict[str, Any]]) -> None:
    content = [canonical_json({**line, "digest": digest_of(line)}) + b"\n" for line in lines]
    (root / "manifest.jsonl").write_bytes(b"".join(content))


def bound(dataset: kdata.Dataset) -> bool:
    return all(source.shards_bound for source in dataset.info.sources.values())


def take_shard(source: Path, target: Path, number: int = 0) -> None:
    """Put one shard of a dataset, with its manifest line, in the place of the same shard of another."""
    lines, theirs = lines_of(target), lines_of(source)[number]
    lines[number] = theirs
    write_lines(target, lines)
    for folder in ("data", "index", "rejects"):
        for path in (source / folder).glob(f"{theirs['name']}.*"):
            shutil.copyfile(path, target / folder / path.name)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> dict[str, Path]:
    """Datasets that differ from `captured` in one thing each."""
    root = tmp_path_factory.mktemp("others")
    rows = [{**row, "id": f"other-{row['id']}"} for row in rows_of_text(24)]
    corpus = write_jsonl(root / "corpus.jsonl", rows)
    return {
        "draws": run_capture(root / "draws", corpus_file, tokenizer_dir, num_draws=50).path,
        "teacher": run_capture(root / "teacher", corpus_file, tokenizer_dir, teacher=StandInTeacher("salt")).path,
        "corpus": run_capture(root / "corpus", corpus, tokenizer_dir).path,
        "settings": run_capture(root / "settings", corpus_file, tokenizer_dir, unit_tokens=100).path,
    }


SWAPS = ["draws", "teacher", "corpus", "settings"]


@pytest.mark.parametrize("name", SWAPS)
def test_the_dataset_json_of_a_sibling_is_refused(copied: Path, others: dict[str, Path], name: str) -> None:
    about = info_of(others[name])
    about["sources"]["capture"]["num_units"] = len(lines_of(copied))  # so that nothing else is wrong
    write_info(copied, about)
    with pytest.raises(CorruptError, match=r"capture-00000 does not belong to this dataset: it was written (for|by)"):
        kdata.open(copied)


@pytest.mark.parametrize("name", SWAPS)
def test_a_shard_with_its_line_from_elsewhere_is_refused(copied: Path, others: dict[str, Path], name: str) -> None:
    before = digests(copied)
    take_shard(others[name], copied)
    with pytest.raises(CorruptError, match=r"capture-00000 does not belong to this dataset: it was written (for|by)"):
        kdata.open(copied)
    done = repair(copied)
    assert done.units == {"capture": [0]} and "data/capture-00000.arrow" in done.moved and not done.remaining
    assert {name for name in before if "capture-00000" in name} & set(digests(copied)) == set()


@pytest.mark.parametrize("name", SWAPS)
def test_a_payload_from_elsewhere_is_refused_when_it_is_first_read(
    copied: Path, others: dict[str, Path], name: str
) -> None:
    """The line has the digests of the file, and names this dataset."""
    lines, path = lines_of(copied), "data/capture-00000.arrow"
    shutil.copyfile(others[name] / path, copied / path)
    lines[0]["files"][path] = file_info(copied / path).model_dump()
    write_lines(copied, lines)
    dataset = kdata.open(copied)
    with pytest.raises(CorruptError, match=r"capture-00000.arrow is damaged"):
        dataset.shard(0)
    with pytest.raises(CorruptError, match=r"written for another dataset|written by other work"):
        head(kdata.open(copied), copied.parent / "head", 1)
    assert [p.path for p in verify(kdata.open(copied))] == [path]


def more_draws(about: dict[str, Any]) -> None:
    about["codec"]["parameters"]["num_draws"] = 50


def other_teacher(about: dict[str, Any]) -> None:
    about["teacher"]["weights_hash"] = "0" * 64


def other_tail(about: dict[str, Any]) -> None:
    about["tail"] = "ghost"


@pytest.mark.parametrize("change", [more_draws, other_teacher, other_tail])
def test_an_edited_dataset_json_is_refused(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    about = info_of(copied)
    change(about)
    write_info(copied, about)
    with pytest.raises(CorruptError, match="its fingerprint is not that of its content"):
        kdata.open(copied)


def test_a_shard_of_an_older_kdata_is_refused_where_all_are_bound(copied: Path) -> None:
    lines = lines_of(copied)
    for key in ("fingerprint", "work_digest"):
        del lines[1][key]
    write_lines(copied, lines)
    with pytest.raises(CorruptError, match=r"its line names no dataset, and all of source 'capture' do"):
        kdata.open(copied)


def unbind(root: Path) -> None:
    """Make a dataset as an older kdata wrote it: neither lines nor shards nor dataset.json say what belongs together."""
    lines = lines_of(root)
    for line in lines:
        for key in ("fingerprint", "work_digest"):
            del line[key]
        path = root / f"data/{line['name']}.arrow"
        file = pa.ipc.open_file(path.read_bytes())
        table = file.read_all()
        old = {k: v for k, v in table.schema.metadata.items() if k not in (b"kdata.fingerprint", b"kdata.work_digest")}
        with pa.ipc.new_file(str(path), table.schema.with_metadata(old), metadata=file.metadata) as writer:
            writer.write_table(table.replace_schema_metadata(old))
        line["files"][f"data/{line['name']}.arrow"] = file_info(path).model_dump()
    write_lines(root, lines)
    about = info_of(root)
    del about["sources"]["capture"]["shards_bound"]
    write_info(root, about)


def test_a_dataset_of_an_older_kdata_is_read_continued_and_taken_apart(
    copied: Path, tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]
) -> None:
    corpus = jsonl(rows_of_text(24), "corpus.jsonl")
    old = run_capture(tmp_path / "old", corpus, tokenizer_dir).path
    unbind(old)
    number = len(lines_of(old))
    assert verify(kdata.open(old), deep=True) == [] and len(unbound(kdata.open(old))) == number
    jsonl([*rows_of_text(24), {"id": "new", "domain": "code", "text": "for item in items"}], "corpus.jsonl")
    grown = run_capture(old, corpus, tokenizer_dir)
    assert len(grown.manifest) > number and verify(grown, deep=True) == []
    assert len(unbound(grown)) == number and not bound(grown)
    part = head(grown, tmp_path / "head", 5)
    assert bound(part) and not unbound(part) and verify(part, deep=True) == []


def test_golden_datasets_of_before_are_not_bound_and_verify_says_so() -> None:
    dataset = kdata.open(GOLDEN / "packed-hybrid")
    assert unbound(dataset) == ["capture-00000"] and verify(dataset, deep=True) == []


def test_what_kdata_writes_is_bound_and_what_it_makes_of_that_too(
    copied: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    dataset = kdata.open(copied)
    made = [dataset, merge([dataset, kdata.open(others["corpus"])], tmp_path / "merged")]
    made += split(dataset, tmp_path / "parts", by="domain").values()
    made += [head(dataset, tmp_path / "head", 3)]
    for one in made:
        assert bound(one) and not unbound(one) and verify(one, deep=True) == []
        for line in lines_of(one.path):
            assert line["fingerprint"] == one.info.identity_digest
            schema = pa.ipc.open_file(str(one.path / f"data/{line['name']}.arrow")).schema
            assert schema.metadata[b"kdata.fingerprint"] == line["fingerprint"].encode()
            assert schema.metadata[b"kdata.work_digest"] == line["work_digest"].encode()


def test_shards_of_another_file_of_the_tokenizer_are_bound_anew_by_merge(
    copied: Path, tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    """Ids mean the same, hashes differ: merge takes both, and then every shard names the merged dataset."""
    other_dir = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    state = json.loads((other_dir / "tokenizer.json").read_text())
    state["added_tokens"][0]["normalized"] = not state["added_tokens"][0]["normalized"]
    (other_dir / "tokenizer.json").write_text(json.dumps(state))
    rows = [{**row, "id": f"other-{row['id']}"} for row in rows_of_text(9)]
    other = run_capture(tmp_path / "other", jsonl(rows), other_dir)
    first = kdata.open(copied)
    assert other.info.identity_digest != first.info.identity_digest
    merged = merge([first, other], tmp_path / "merged")
    assert verify(merged, deep=True) == [] and bound(merged)
    assert [s.token_ids.tolist() for s in merged.iter_sequences()][-1] == list(other.iter_sequences())[
        -1
    ].token_ids.tolist()


def test_a_corpus_that_changes_keeps_old_shards_and_binds_new_ones(
    tmp_path: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]
) -> None:
    rows = rows_of_text(24)
    dataset = run_capture(tmp_path / "d", jsonl(rows, "c.jsonl"), tokenizer_dir)
    first = dataset.info.sources["capture"].work_digest
    for change in ([*rows, {**rows[0], "id": "new", "text": "the cat"}], rows[:20], rows):
        dataset = run_capture(tmp_path / "d", jsonl(change, "c.jsonl"), tokenizer_dir)
        assert verify(dataset, deep=True) == [] and bound(dataset) and not unbound(dataset)
    about = dataset.info.sources["capture"]
    assert first == about.former_digests[0] and len(about.former_digests) == 3


def test_repair_refuses_a_dataset_json_that_no_shard_names(
    copied: Path, others: dict[str, Path], tmp_path: Path
) -> None:
    """The shards are many and agree: the stranger is dataset.json, and nothing is set aside."""
    mine = Path(shutil.copyfile(copied / "dataset.json", tmp_path / "dataset.json"))
    before = digests(copied)
    shutil.copyfile(others["teacher"] / "dataset.json", copied / "dataset.json")
    with pytest.raises(CorruptError, match="--copy FILE"):
        repair(copied)
    with pytest.raises(MismatchError, match="name another copy"):
        repair(copied, copy=others["draws"] / "dataset.json")
    done = repair(copied, copy=mine)
    assert done.moved == ["dataset.json"] and not done.remaining and digests(copied) == before


# ------------------------------------------------------------------------------------------------- scores and plans


@pytest.fixture
def furnished(copied: Path) -> Path:
    """With a score and two plans."""
    furnish(copied)
    return copied


def furnish(root: Path) -> None:
    dataset = kdata.open(root)
    score_with(dataset, dict.fromkeys(dataset.index(["id"])["id"].to_pylist(), 9.5))
    select(dataset, Difference(share=0.5))
    select(dataset, All())


USES: dict[str, Callable[[Path], Any]] = {
    "sql": lambda root: kdata.open(root).sql("select * from scores.ref"),
    "pivot": lambda root: kdata.open(root).sql("pivot scores.ref on id using count(*)"),
    "select": lambda root: select(kdata.open(root), Difference(share=0.4, name="again")),
    "sql of select": lambda root: kdata.select(kdata.open(root), kdata_sql("select id from scores.ref order by nll")),
}


def kdata_sql(text: str) -> Any:
    from kdata.selection.query import Sql

    return Sql(sql=text, name="again")


PLAN_USES: dict[str, Callable[[Path], Any]] = {
    "sql": lambda root: kdata.open(root).sql('select * from plans."all"'),
    "open": lambda root: kdata.Plan.load(root / "plans/all").rows(kdata.open(root)),
    "parent": lambda root: select(kdata.open(root), All(parent="all", name="again")),
    "sql of select": lambda root: select(kdata.open(root), kdata_sql('select id from plans."all"')),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["draws", "teacher", "corpus"])
def test_a_score_of_another_dataset_is_refused(
    furnished: Path, others: dict[str, Path], tmp_path: Path, name: str, use: str
) -> None:
    theirs = Path(shutil.copytree(others[name], tmp_path / "theirs"))
    furnish(theirs)
    shutil.rmtree(furnished / "scores")
    shutil.copytree(theirs / "scores", furnished / "scores")
    with pytest.raises(KdataError, match=r"written for another dataset|does not cover the dataset as it is now"):
        USES[use](furnished)
    found = {p.path for p in verify(kdata.open(furnished))}
    assert ("scores/ref.json" in found) == (name != "corpus"), (
        "of another state of the same teacher's data: not damaged"
    )


@pytest.mark.parametrize("use", PLAN_USES)
@pytest.mark.parametrize("name", ["draws", "teacher", "corpus"])
def test_a_plan_of_another_dataset_is_refused(
    furnished: Path, others: dict[str, Path], tmp_path: Path, name: str, use: str
) -> None:
    theirs = Path(shutil.copytree(others[name], tmp_path / "theirs"))
    furnish(theirs)
    for ending in ("json", "parquet"):
        shutil.copyfile(theirs / f"plans/all.{ending}", furnished / f"plans/all.{ending}")
    with pytest.raises(MismatchError, match=r"written for another dataset|belongs to another state"):
        PLAN_USES[use](furnished)
    found = {p.path for p in verify(kdata.open(furnished))}
    assert ("plans/all.json" in found) == (name != "corpus")


def test_a_renamed_or_copied_score_or_plan_is_refused(furnished: Path) -> None:
    for ending in ("json", "parquet"):
        shutil.copyfile(furnished / f"plans/difference.{ending}", furnished / f"plans/all.{ending}")
    shutil.copytree(furnished / "scores/ref", furnished / "scores/judge")
    shutil.copyfile(furnished / "scores/ref.json", furnished / "scores/judge.json")
    dataset = kdata.open(furnished)
    for use in PLAN_USES.values():
        with pytest.raises(CorruptError, match="is the plan 'difference', renamed or copied"):
            use(furnished)
    for call in (
        lambda: dataset.sql("select * from scores.judge"),
        lambda: load_score_info(dataset, "judge"),
        lambda: select(dataset, Difference(share=0.5, score="judge", name="again")),
    ):
        with pytest.raises(CorruptError, match="is the score 'ref', renamed or copied"):
            call()
    assert dataset.sql("select count(*) as n from scores.ref")["n"].to_pylist() == [dataset.num_rows]
    damaged = {p.path for p in verify(dataset) if not p.stray}
    assert damaged == {"plans/all.json", "scores/judge.json"}


def test_scores_and_plans_that_name_no_dataset_are_read_as_before(furnished: Path) -> None:
    """Those of an older kdata: the content digest is all that they say."""
    for name in ("scores/ref.json", "plans/difference.json"):
        content = json.loads((furnished / name).read_bytes())
        del content["dataset_identity"]
        (furnished / name).write_bytes(json_bytes({**content, "digest": digest_of(content)}))
    dataset = kdata.open(furnished)
    assert verify(dataset) == [] and dataset.sql("select * from scores.ref, plans.difference limit 3").num_rows == 3
    assert "dataset_identity" not in load_score_info(dataset, "ref").model_dump()
    assert json_digest(load_score_info(dataset, "ref").model_dump())
