"""What tools leave beside files, such as ._x of macOS and .ipynb_checkpoints of Jupyter, is no part of a dataset."""

from __future__ import annotations

from pathlib import Path

import kdata
from kdata.check.verify import verify
from kdata.pipelines.report.plots import plans_of
from kdata.share.card import card_page
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.share.push import push
from tests.fakes import digests, run_capture, write_jsonl

JUNK = b"\0\5\x16\7\0\2\0\0Mac OS X"


def leave_hidden_files(root: Path) -> None:
    """In every folder a double of each file, .DS_Store, and a folder of checkpoints."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for path in list(folder.iterdir()):
            if path.is_file():
                (folder / f"._{path.name}").write_bytes(JUNK)
        (folder / ".DS_Store").write_bytes(JUNK)
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints/x-checkpoint.parquet").write_bytes(JUNK)


def test_hidden_files_are_no_part_of_a_dataset(
    tmp_path: Path, captured: Path, copied: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    root = copied
    first = kdata.open(root)
    kdata.make_plan(first, "some", first.index(["id"])["id"].to_pylist()[:3], method="test", parameters={}).save(
        root / "plans"
    )
    (root / "scores/ref").mkdir(parents=True)
    leave_hidden_files(root)
    dataset = kdata.open(root)
    assert dataset.num_rows == kdata.open(captured).num_rows and dataset[0].id
    assert dataset.sql("select count(*) as n from plans.some")["n"].to_pylist() == [3]
    assert kdata.Plan.load(root / "plans/some").ids and not verify(dataset)
    assert [plan.info.name for plan in plans_of(dataset)] == ["some"]
    card = card_page(dataset).decode()
    assert "some" in card and "._" not in card and "ipynb" not in card
    push(dataset, str(tmp_path / "copy"))
    copied = [path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*")]
    assert copied and not any(part.startswith(".") for path in copied for part in path.parts)
    again = run_capture(root, corpus_file, tokenizer_dir)
    assert again.content_digest == kdata.open(captured).content_digest
    assert digests(captured).keys() <= digests(root).keys()


def test_hidden_files_are_not_imported(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    row = {"id": "a", "input_ids": [1, 2], "topk_ids": [[], [1]], "topk_logprobs": [[], [-0.5]]}
    write_jsonl(tmp_path / "files/rows.jsonl", [row])
    (tmp_path / "files/._rows.jsonl").write_bytes(JUNK)
    dataset, _ = import_dataset(tmp_path / "files", tmp_path / "d", ImportConfig(format="plain", vocab_size=100))
    assert dataset.num_rows == 1 and dataset.rejected() == {}
