"""Two machines, as two folders and a server: one captures and pushes, the other opens, asks in SQL, selects, trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.loader.batches import Batches
from kdata.selection.query import Sql
from kdata.selection.select import select
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.train import train
from tests.fakes import rows_of_text, run_capture, write_jsonl
from tests.web import Files

UNIT = 4000  # tokens of a shard


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """What the first machine pushed: 64 shards with 100 entries a token."""
    root = tmp_path_factory.mktemp("first")
    corpus = write_jsonl(root / "c.jsonl", rows_of_text(1500, words=120))
    captured = run_capture(root / "captured", corpus, tokenizer_dir, kind="topk", k=100, unit_tokens=UNIT)
    kdata.push(captured, root / "web" / "d")
    return root / "web"


@pytest.fixture
def server(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    """The server, and the empty cache of the second machine."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    files = Files(published)
    yield files
    files.close()


@pytest.mark.slow
def test_the_second_machine_trains_long_before_it_has_the_dataset(
    published: Path, server: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, home = f"{server.url}/d", kdata.open(published / "d")
    size = sum(path.stat().st_size for path in (published / "d").rglob("*") if path.is_file())
    opened = kdata.open(url)
    assert server.bytes_sent() == sum(
        (published / "d" / name).stat().st_size for name in ("dataset.json", "manifest.jsonl")
    )
    query = "select domain, count(*) as n, max(mean_entropy) as h from rows group by 1 order by 1"
    assert opened.sql(query).equals(home.sql(query))
    plan = select(opened, Sql(name="half", sql="select id from rows where domain = 'prose' order by id"))
    assert plan.info.num_rows and not any("/data/" in path for path, _, _ in server.sent)

    before_first: list[int] = []
    assemble = Batches.assemble

    def counted(self: Batches, *arguments: Any) -> Any:
        before_first.append(server.bytes_sent())
        server.bytes_per_sec = 0
        return assemble(self, *arguments)

    monkeypatch.setattr(Batches, "assemble", counted)
    server.bytes_per_sec = 5e6
    student = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=128)
    settings = TrainConfig(
        student=student, steps=4, batch_tokens=512, context_tokens=128, shuffle_group_tokens=UNIT, warmup_steps=0
    )
    train(settings, url, "half", tmp_path / "run")
    assert before_first[0] < size / 10, (before_first[0], size)
    rows = home.index(["domain"])["domain"].to_pylist()
    assert set(rows) == {"prose", "code"}
    train(settings, published / "d", opened.path / "plans/half", tmp_path / "local")
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("run", "local")]
    assert weights[0] == weights[1], "the order is that of a folder with the same setting"
