"""Two machines, as two folders and a server: one captures and pushes, the other opens, asks in SQL, selects, trains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.loader.batches import Batches
from kdata.selection.query import Sql
from kdata.selection.select import select
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.train import train
from tests.browser import BROWSER, FLAGS, needs_browser
from tests.fakes import rows_of_text, run_capture, write_jsonl
from tests.hub_server import HubServer
from tests.web import Files

UNIT = 4000  # tokens of a shard
LARGER = 5000  # of another dataset, whose shards have 0.8 MB: far below the default, so footers are a great part of it


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """What the first machine pushed: 64 shards with 100 entries a token."""
    root = tmp_path_factory.mktemp("first")
    corpus = write_jsonl(root / "c.jsonl", rows_of_text(1500, words=120))
    captured = run_capture(root / "captured", corpus, tokenizer_dir, kind="topk", k=100, unit_tokens=UNIT)
    kdata.push(captured, root / "web" / "d")
    return root / "web"


@pytest.fixture
def server(published: Path, serve: Callable[[Path], Files]) -> Files:
    """The server, and the empty cache of the second machine."""
    return serve(published)


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


# The first machine: a capture as it runs, and `kdata` as it is called.
CAPTURE = """
import sys
from pathlib import Path
from tests.fakes import run_capture
out, corpus, tokenizer, unit = sys.argv[1:]
run_capture(Path(out), Path(corpus), Path(tokenizer), kind="topk", k=100, unit_tokens=int(unit))
"""
MAIN = "from kdata.pipelines.cli.main import main; main()"

# The second machine: a plan of what it opened by name, and training, which stops before its first step until it is told.
TRAIN = """
import json, sys
from pathlib import Path
import kdata
from kdata.loader.batches import Batches
from kdata.selection.query import Sql
from kdata.selection.select import select
from kdata.trainer.config import TrainConfig
from kdata.trainer.train import train
settings, address, out = TrainConfig.model_validate_json(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
opened = kdata.open(address)
plan = select(opened, Sql(name="half", sql="select id from rows where domain = 'prose' order by id"))
assemble = Batches.assemble
def asking(*arguments, **options):
    Batches.assemble = assemble
    print("first step", flush=True)
    input()
    return assemble(*arguments, **options)
Batches.assemble = asking
train(settings, address, "half", out)
print(json.dumps({"plan": str(opened.path / "plans/half"), "rows": plan.info.num_rows, "commit": opened.commit}))
"""


@pytest.mark.slow
@needs_browser
def test_by_the_hub_from_a_capture_that_runs_to_a_student(tmp_path: Path, tokenizer_dir: Path) -> None:
    """The real client, with xet, in processes of their own; the server counts what it sends to the second machine."""
    hub, first, second = HubServer(xet=True), tmp_path / "first", tmp_path / "second"
    one, two = hub.environment(first), hub.environment(second)
    first.mkdir()
    corpus = write_jsonl(first / "c.jsonl", rows_of_text(2000, words=120))
    arguments = [str(first / "d"), str(corpus), str(tokenizer_dir), str(LARGER)]
    capture = subprocess.Popen([sys.executable, "-c", CAPTURE, *arguments], stderr=subprocess.DEVNULL)
    while not (first / "d/dataset.json").exists():
        assert capture.poll() is None
    pushing = [sys.executable, "-c", MAIN, "push", str(first / "d"), "hf://me/logits", "--while", "--every", "1"]
    push = subprocess.Popen([*pushing, "--tag", "v1"], env=one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen_by_then = []
    hub.meanwhile = lambda: seen_by_then.append(capture.poll())
    output, _ = push.communicate(timeout=600)
    assert (capture.wait(), push.returncode) == (0, 0), output
    assert len(seen_by_then) > 1 and seen_by_then[0] is None, "it pushed while it captured"
    home, whole = kdata.open(first / "d"), sum(len(content) for content in hub.xet.xorbs.values())  # type: ignore[union-attr]
    assert hub.refs["v1"] == hub.refs["main"] and not hub.sent

    query = "select domain, count(*) as n, max(mean_entropy) as h from rows group by 1 order by 1"
    command = [sys.executable, "-c", MAIN, "sql", "hf://me/logits", query, "--format", "json"]
    asked = subprocess.run(command, env=two, capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout) == home.sql(query).to_pylist()
    sql_bytes = hub.bytes_sent()
    page, rows = seen_in_a_browser("hf://me/logits@v1", two, tmp_path)
    assert len(set(rows)) == 50 and f"of {len(home):,}" in page and "stand-in" in page
    assert 'role="gridcell"' in page or page.count("--share") > 2, "the tokens of the first row, colored"
    view_bytes = hub.bytes_sent() - sql_bytes

    student = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=128)
    settings = TrainConfig(
        student=student, steps=4, batch_tokens=512, context_tokens=128, shuffle_group_tokens=LARGER, warmup_steps=0
    )
    hub.bytes_per_sec = 5e6
    command = [sys.executable, "-c", TRAIN, settings.model_dump_json(), "hf://me/logits@v1", str(second / "run")]
    training = subprocess.Popen(command, env=two, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert training.stdout is not None and training.stdout.readline() == "first step\n"
    before_first = hub.bytes_sent()
    hub.bytes_per_sec = 0
    told, _ = training.communicate("go on\n", timeout=300)
    result = json.loads(told.splitlines()[-1])
    print(f"{whole:,} bytes: sql {sql_bytes:,}, view {view_bytes:,}, all before the first step {before_first:,}")
    assert before_first < whole / 10, (sql_bytes, view_bytes, before_first, whole)
    assert result["commit"] == hub.refs["v1"] and result["rows"] == len(
        home.sql("select id from rows where domain = 'prose'")
    )
    train(settings, first / "d", result["plan"], tmp_path / "local")
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (second / "run", tmp_path / "local")]
    assert weights[0] == weights[1]
    hub.close()


def seen_in_a_browser(address: str, environment: dict[str, str], folder: Path) -> tuple[str, list[str]]:
    """What `kdata view` shows: the page as it stands after its script ran, and ids of the rows in its list."""
    command = [sys.executable, "-c", MAIN, "view", address]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as view:
        lines = iter(view.stdout or [])
        url = next(match[0] for line in lines if (match := re.search(r"http://\S+", line)))
        profile = f"--user-data-dir={folder / 'profile'}"
        browser = [str(BROWSER), *FLAGS, "--virtual-time-budget=60000", profile, "--dump-dom", url]
        page = subprocess.run(browser, capture_output=True, text=True, timeout=180).stdout
        view.terminate()
    listed = re.search(r'<ol id="rows".*?</ol>', page, re.DOTALL)
    return page, re.findall(r"<b[^>]*>(doc-[\d#]+)</b>", listed[0] if listed else "")
