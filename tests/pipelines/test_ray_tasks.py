"""Hygiene and selection on a real cluster of two nodes: the bytes of one machine, whatever dies on the way."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import kdata
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, MismatchError, OutOfRangeError, StorageError
from kdata.format.files import file_info
from kdata.hygiene.checks import HygieneConfig
from kdata.hygiene.inspect import inspect_corpus, inspect_dataset
from kdata.pipelines.cli.main import app
from kdata.pipelines.ray.tasks import RayTasks, RayTasksConfig
from kdata.selection import session
from kdata.selection.mixtures import Temperature
from kdata.selection.ranked import Difference, Random
from kdata.selection.score_file import bring
from kdata.selection.select import select
from kdata.selection.step import Step
from tests.benchmarks.planted import Planted
from tests.bucket import Bucket
from tests.fakes import digests, write_jsonl
from tests.kdata.selection.plans import Row, dataset_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
ROOT = Path(__file__).resolve().parents[2]
STEPS: list[Step] = [
    Difference(name="half", share=0.5),
    Difference(name="each", share=0.3, by_domain=True, count_by="tokens"),
    Random(name="chance", share=0.4, where=["ref.nll > 0.5", "num_tokens > 6"]),
    Temperature(name="mixed", temperature=2.0, size=700, max_repeats=4.0),
    Random(name="of_half", share=0.5, parent="half"),
]


@pytest.fixture(scope="module")
def tasks() -> Iterator[RayTasks]:
    """Tasks on two nodes of one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)  # tasks look for modules where the driver works
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        with RayTasks(RayTasksConfig(address=cluster.address)) as running:
            assert running.under_way == 4
            yield running
        cluster.shutdown()


def scored(folder: Path) -> kdata.Dataset:
    """A dataset of many shards, with ties, and a score."""
    rows = [Row(f"r{n:03}", "abc"[n % 7 % 3], tokens=4 + n % 11, nll=n % 13 / 4.0) for n in range(120)]
    data = dataset_of(folder, rows, shard_rows=9)
    table = pa.table({"id": [row.id for row in rows], "nll": [n % 5 * 1.0 for n in range(120)]})
    pq.write_table(table, folder.parent / "ref.parquet")
    bring(data, folder.parent / "ref.parquet", "ref")
    return kdata.open(folder)


def node_of(_: Any) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def fall_once(note: str) -> str:
    """Kill the process at the first call."""
    if not Path(note).exists():
        Path(note).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


class KnowsBucket:
    """A pool whose processes have imported this module, and with it the protocol of the URL."""

    def __init__(self, tasks: RayTasks) -> None:
        self._tasks, self.under_way = tasks, tasks.under_way

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        """See `Pool`."""
        return self._tasks.submit(here, function, *arguments)


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def refuse() -> None:
    raise OutOfRangeError("no such thing")


def fail() -> None:
    raise ZeroDivisionError


def test_tasks_run_on_both_nodes_and_their_errors_are_raised(tasks: RayTasks, tmp_path: Path) -> None:
    nodes = {future.result() for future in [tasks.submit(node_of, n) for n in range(12)]}
    assert len(nodes) == 2
    assert tasks.submit(fall_once, str(tmp_path / "note")).result() == "done"
    with pytest.raises(OutOfRangeError, match="no such thing"):
        tasks.submit(refuse).result()
    with pytest.raises(ZeroDivisionError):
        tasks.submit(fail).result()
    with pytest.raises(StorageError, match="was lost"):
        tasks.submit(os._exit, 1).result()


def test_hygiene_of_a_corpus_is_that_of_one_machine(
    tasks: RayTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdata.hygiene import texts

    monkeypatch.setattr(texts, "UNIT_ROWS", 30)
    source = Planted(words=60)
    corpus = CorpusConfig(path=str(write_jsonl(tmp_path / "corpus.jsonl", source.documents(300))))
    exam = write_jsonl(tmp_path / "exam.jsonl", source.items)
    config = HygieneConfig(overlap={"exam": str(exam)}, workers=1)
    inspect_corpus(corpus, config, tmp_path / "here.parquet")
    inspect_corpus(corpus, config, tmp_path / "there.parquet", pool=tasks)
    here, there = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("here", "there"))
    assert (
        here.equals(there, check_metadata=True)
        and not here["duplicates"].combine_chunks().field("near_keep").null_count
    )
    assert file_info(tmp_path / "here.parquet").sha256 == file_info(tmp_path / "there.parquet").sha256


def test_plans_and_scores_have_the_bytes_of_one_machine(
    tasks: RayTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PIECE_ROWS", 20)
    here = scored(tmp_path / "here" / "data")
    shutil.copytree(here.path, tmp_path / "there" / "data")
    there = kdata.open(tmp_path / "there" / "data")
    config = HygieneConfig(workers=1)
    inspect_dataset(here, config)
    inspect_dataset(there, config, pool=tasks)
    for step in STEPS:
        plans = [select(here, step), select(there, step, pool=tasks)]
        assert plans[0].ids == plans[1].ids and plans[0].plan_digest == plans[1].plan_digest
    assert digests(here.path) == digests(there.path)


def test_pieces_at_a_url_are_read_by_the_tasks(
    tasks: RayTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "PIECE_ROWS", 20)
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    here = scored(tmp_path / "here" / "data")
    shutil.copytree(here.path, tmp_path / "bucket" / "data")
    there = kdata.open(f"{Bucket.protocol}://{tmp_path}/bucket/data")
    step = Difference(share=0.5)
    assert select(there, step, pool=KnowsBucket(tasks)).ids == select(here, step).ids


def test_an_old_copy_on_a_machine_is_refused(tasks: RayTasks, tmp_path: Path) -> None:
    data = scored(tmp_path / "data")
    for digest, scores in (("0" * 64, ()), (data.content_digest, (("ref", "0" * 64),))):
        state = session.State(str(data.path), digest, scores)
        call = tasks.submit(session.piece_of, state, [], session.Conditions(), [], "from rows", {}, {})
        with pytest.raises(MismatchError, match="same folder"):
            call.result()


def test_the_commands_take_the_engine(tasks: RayTasks, tmp_path: Path) -> None:
    data = scored(tmp_path / "data")
    for words in (["hygiene", "--checks", "duplicates"], ["select", "--method", "difference", "--share", "0.5"]):
        command = [words[0], str(data.path), *words[1:], "--engine", "ray"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert kdata.open(data.path).listed(session.SCORES) == ["duplicates", "ref"]
    for words, message in (
        (["--engine", "rey"], "did you mean 'ray'"),
        (["--set", "engine.tasks=2"], "add --engine ray"),
        (["--engine", "ray", "--set", "engine.task=2"], "tasks"),
        (["--engine", "ray", "--set", "engine.address=ray://x:1"], "must run on a machine of the cluster"),
    ):
        outcome = CliRunner().invoke(app, ["select", str(data.path), "--name", "x", *words])
        assert isinstance(outcome.exception, ConfigError) and message in str(outcome.exception), outcome.exception
