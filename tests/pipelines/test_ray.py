"""The Ray engine on a real cluster of two nodes: whatever dies on the way, the dataset is the local engine's, byte for byte.

The teacher of the fault tests is the stand-in (`Scripted`), which does to its own process what a test asks for; one test has
the real vLLM.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import ConfigError, MismatchError, StorageError, TeacherError
from kdata.format.files import journal_of
from kdata.format.keep import KeepConfig
from kdata.jobs.job import Engine, LocalEngine, run_job
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.observe.journal import read_journal
from kdata.pipelines.ray import engine as ray_engine
from kdata.pipelines.ray.engine import RayEngine
from kdata.pipelines.ray.workers import RayConfig
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.bucket import Bucket
from tests.fakes import StandInTeacher, digests, rows_of_text, write_jsonl

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
ROOT = Path(__file__).resolve().parents[2]
LONG_SEC = 300.0  # a teacher that hangs for so long is never waited for here


class Scripted(StandInTeacher):
    """The stand-in, with a script that its process follows; notes of what happened are files in a folder.

    Args:
        folder: of the notes; "pids/PID" holds the node of each process.
        peers: wait at loading until so many processes are loading.
        die_at: the first process that comes to its call of this number kills itself.
        hang_at: the first process that comes to its call of this number stays there.
        hang_on: a process on this node stays at its first call after one has died; the others wait for that at their third.
        poison: a process that reads these token ids kills itself.
        fail_at: raise ConfigError at this call.
        sleep_sec: before each call.
        pause_sec: after each sequence that is read.
    """

    def __init__(self, folder: Path, script: dict[str, Any]) -> None:
        import ray

        super().__init__(script.get("salts", {}).get(ray.get_runtime_context().get_node_id(), ""))
        self._folder, self._script, self._node = folder, script, ray.get_runtime_context().get_node_id()
        (folder / "pids").mkdir(parents=True, exist_ok=True)
        (folder / "pids" / str(os.getpid())).write_text(self._node)
        wait_until(lambda: len(list((folder / "pids").iterdir())) >= script.get("peers", 1))

    def _first(self, note: str) -> bool:
        try:
            (self._folder / note).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _count(self) -> None:
        script, died, hung = self._script, self._folder / "died", self._folder / "hung"
        time.sleep(script.get("sleep_sec", 0.0))
        if self.calls == script.get("die_at") and self._first("died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if (
            self.calls == script.get("hang_at") or (self._node == script.get("hang_on") and died.exists())
        ) and self._first("hung"):
            time.sleep(LONG_SEC)
        if "hang_on" in script and self.calls >= 3:
            wait_until(hung.exists)
        if self.calls == script.get("fail_at"):
            raise ConfigError("this engine cannot do that; use another one")
        super()._count()

    def read(self, sequences: Any, keep: KeepConfig, *on_tokens: Any) -> Any:
        """See `Teacher.read`."""
        if any(ids.tolist() == self._script.get("poison") for ids in sequences):
            os.kill(os.getpid(), signal.SIGKILL)
        pause_sec = self._script.get("pause_sec", 0.0)

        def slowly(tokens: int) -> None:
            for call in on_tokens:
                call(tokens)
            time.sleep(pause_sec)

        return super().read(sequences, keep, slowly)


def scripted(config: TeacherConfig, max_k: int, *, folder: Path, script: dict[str, Any]) -> tuple[Scripted, Any]:
    """The loader of the fault tests; runs in the actor."""
    if script.get("die_loading"):
        os.kill(os.getpid(), signal.SIGKILL)
    from transformers import PreTrainedTokenizerFast

    return Scripted(folder, script), PreTrainedTokenizerFast.from_pretrained(config.model)


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait for something; fail the test where it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of a head and, while nobody kills it, a second node; one core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)  # actors look for modules where the driver works
        from ray.cluster_utils import Cluster

        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield started
        started.shutdown()


@pytest.fixture
def two(cluster: Any) -> Any:
    """The same with its second node alive."""
    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text, one of them refused."""
    rows = rows_of_text(26)
    rows[7]["text"] = "  "
    return write_jsonl(tmp_path_factory.mktemp("ray") / "corpus.jsonl", rows)


ONE = {"min_teachers": 1}


def engine_on(
    cluster: Any, tokenizer: Path, notes: Path, config: dict[str, Any] | None = None, **script: Any
) -> RayEngine:
    """The engine with the scripted stand-in: one actor on each node, unless said otherwise."""
    settings = RayConfig(address=cluster.address, **{"min_teachers": 2, "start_timeout_sec": 120.0, **(config or {})})
    who = TeacherConfig(model=str(tokenizer), backend="transformers")
    loader = functools.partial(scripted, folder=notes, script={"peers": settings.min_teachers, **script})
    return RayEngine(settings, who, max_k=8, loader=loader)


def reading(corpus: Path, **settings: Any) -> CaptureJob:
    config = CaptureConfig(
        corpus=CorpusConfig(path=str(corpus)), **{"kind": "hybrid", "k": 8, "unit_tokens": 40, **settings}
    )
    return CaptureJob(config, Corpus(config.corpus))


class Counted(CaptureJob):
    """A job that notes the most units that were cut and not committed yet."""

    def __init__(self, corpus: Path, root: Path) -> None:
        plain = reading(corpus)
        super().__init__(plain.config, Corpus(plain.config.corpus))
        self.most, self._manifest = 0, root / "manifest.jsonl"

    def units(self, facts: Any, tokenizer: Any) -> Iterator[Any]:
        """See `Job.units`."""
        for unit in super().units(facts, tokenizer):
            self.most = max(self.most, unit.number + 1 - lines_of(self._manifest))
            yield unit


def writing(corpus: Path) -> GenerateJob:
    sampling = SamplingConfig(max_tokens=6)
    config = GenerateConfig(
        prompts=CorpusConfig(path=str(corpus)), kind="hybrid", k=8, unit_prompts=3, sampling=sampling
    )
    return GenerateJob(config, Corpus(config.prompts))


def make(root: Path | str, corpus: Path, engine: Engine) -> kdata.Dataset:
    """Both ways of making rows, into one dataset."""
    run_job(root, writing(corpus), engine)
    return run_job(root, reading(corpus), engine)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> dict[str, str]:
    """Digests of the local engine's dataset."""
    root = tmp_path_factory.mktemp("local") / "dataset"
    make(root, corpus, LocalEngine(StandInTeacher(), load_tokenizer(tokenizer_dir)))
    assert len((root / "manifest.jsonl").read_bytes().splitlines()) > 15
    return digests(root)


def processes(notes: Path) -> dict[int, str]:
    """Number and node of every actor's process that there was."""
    return {int(path.name): path.read_text() for path in (notes / "pids").iterdir()}


def gone(notes: Path) -> bool:
    """Whether none of them is left."""
    return not any(Path(f"/proc/{pid}/cmdline").exists() for pid in processes(notes))


def test_two_nodes_write_the_bytes_of_the_local_engine(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path, expected: dict[str, str]
) -> None:
    """The second actor is started once units wait for it, and not before."""
    notes = tmp_path / "notes"
    with engine_on(two, tokenizer_dir, notes, {**ONE, "max_teachers": 2}, sleep_sec=0.1) as engine:
        run_job(tmp_path / "one", reading(corpus, unit_tokens=10_000), engine)
        assert len(processes(notes)) == 1
        counted = Counted(corpus, tmp_path / "counted")
        run_job(tmp_path / "counted", counted, engine)
        assert 2 <= counted.most <= 2 * 2 + 1  # what two actors hold, and one
        dataset = make(tmp_path / "d", corpus, engine)
        wait_until(lambda: len(processes(notes)) == 2)
        again = make(tmp_path / "d", corpus, engine)
    assert digests(tmp_path / "d") == expected and again.content_digest == dataset.content_digest
    assert not [p for p in (tmp_path / "d").iterdir() if p.name.startswith("units-")]
    assert len(set(processes(notes).values())) == 2
    wait_until(lambda: gone(notes))


def test_two_nodes_keep_the_positions_that_the_local_engine_keeps(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path
) -> None:
    jobs = [
        reading(corpus, positions={"rule": "entropy", "threshold": 3.0, "domains": ["code"]}),
        reading(corpus, positions={"rule": "entropy", "share": 0.3}),
    ]
    local = LocalEngine(StandInTeacher(), load_tokenizer(tokenizer_dir))
    with engine_on(two, tokenizer_dir, tmp_path / "notes", {**ONE, "max_teachers": 2}, sleep_sec=0.05) as engine:
        for number, job in enumerate(jobs):
            expected = run_job(tmp_path / f"local-{number}", job, local)
            run_job(tmp_path / f"ray-{number}", job, engine)
            assert digests(tmp_path / f"ray-{number}") == digests(tmp_path / f"local-{number}")
            counts = [(entry.kept_positions, entry.target_tokens) for entry in expected.manifest]
            assert 0 < sum(kept or 0 for kept, _ in counts) < sum(targets for _, targets in counts)


def test_tokens_of_a_unit_under_way_reach_the_driver(
    two: Any, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    """All is one unit: before its commit the log shows the tokens that the actor has read."""
    with engine_on(two, tokenizer_dir, tmp_path / "notes", ONE, pause_sec=0.3) as engine:
        dataset = run_job(tmp_path / "d", reading(corpus, unit_tokens=10**6), engine)
    assert len(dataset.manifest) == 1
    lines = read_journal(journal_of(dataset.path))
    under_way = [line.tokens for line in lines if line.done == 0]
    assert under_way == sorted(under_way) and len({n for n in under_way if 0 < n < dataset.num_tokens}) >= 3
    assert {line.tokens_total for line in lines if line.tokens} == {dataset.num_tokens}
    assert (lines[-1].tokens, lines[-1].done) == (dataset.num_tokens, 26)


@pytest.mark.slow
def test_a_slow_unit_is_repeated_by_another_actor(
    tmp_path: Path,
    two: Any,
    corpus: Path,
    tokenizer_dir: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One actor hangs at its second unit for longer than this test may take; a unit that waits behind that comes back."""
    monkeypatch.setattr(ray_engine, "SLOW_SEC", 0.5)
    with engine_on(two, tokenizer_dir, tmp_path / "notes", {"slow_factor": 2.0}, hang_at=1) as engine:
        make(tmp_path / "d", corpus, engine)
    assert (tmp_path / "notes" / "hung").exists()
    assert digests(tmp_path / "d") == expected


@pytest.mark.slow
def test_a_unit_that_kills_its_actors_ends_the_run_and_is_named(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path
) -> None:
    engine = LocalEngine(StandInTeacher(), load_tokenizer(tokenizer_dir))
    units = list(reading(corpus).units(engine.facts, engine.tokenizer))
    bad = units[3]
    poison = bad.sequences[0].token_ids.tolist()
    with (
        engine_on(two, tokenizer_dir, tmp_path / "notes", ONE, poison=poison) as cluster_engine,
        pytest.raises(
            TeacherError, match=rf"unit 3 \(rows '{bad.ids[0]}' to '{bad.ids[-1]}'\) was with 3 actors that died"
        ),
    ):
        run_job(tmp_path / "d", reading(corpus), cluster_engine)
    done = {entry.unit for entry in kdata.open(tmp_path / "d").manifest}
    assert 3 not in done and done >= {0, 1, 2}  # its neighbours were not taken for it
    assert len(processes(tmp_path / "notes")) == 3
    run_job(tmp_path / "d", reading(corpus), engine)
    run_job(tmp_path / "local", reading(corpus), engine)
    assert digests(tmp_path / "d") == digests(tmp_path / "local")


def test_an_error_of_the_teacher_is_raised_unchanged(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path
) -> None:
    with (
        engine_on(two, tokenizer_dir, tmp_path / "notes", ONE, fail_at=2) as engine,
        pytest.raises(ConfigError) as caught,
    ):
        run_job(tmp_path / "d", reading(corpus), engine)
    assert type(caught.value) is ConfigError
    assert str(caught.value).startswith("this engine cannot do that; use another one (on machine ")
    assert "\n" not in str(caught.value)
    wait_until(lambda: gone(tmp_path / "notes"))


def test_machines_with_different_teachers_are_refused(
    tmp_path: Path, two: Any, tokenizer_dir: Path, corpus: Path
) -> None:
    salts = {node.node_id: "other" for node in two.worker_nodes}
    with (
        pytest.raises(MismatchError, match=r"do not have the same teacher[\s\S]*teacher.weights_hash"),
        engine_on(two, tokenizer_dir, tmp_path / "notes", salts=salts, sleep_sec=0.5) as engine,
    ):
        run_job(tmp_path / "d", reading(corpus), engine)


@pytest.mark.slow
def test_actors_that_die_while_they_load_end_the_run(tmp_path: Path, two: Any, tokenizer_dir: Path) -> None:
    config = {**ONE, "max_deaths": 2}
    with (
        pytest.raises(TeacherError, match="2 actors in a row died while they loaded the teacher"),
        engine_on(two, tokenizer_dir, tmp_path / "notes", config, die_loading=True),
    ):
        pass


def test_resources_that_no_machine_has_are_named(tmp_path: Path, two: Any, tokenizer_dir: Path) -> None:
    config = {"gpus_per_teacher": 8, "start_timeout_sec": 1.0}
    with (
        pytest.raises(TeacherError, match=r"no teacher was ready .*'gpus_per_teacher': 8.* the cluster has .*'GPU': 0"),
        engine_on(two, tokenizer_dir, tmp_path / "notes", config),
    ):
        pass


# ------------------------------------------------------------------------------------------------------- the driver


def drive(root: str, corpus: str, tokenizer: str, notes: str, address: str) -> None:
    """What a driver of its own does; prints what it has loaded at the end."""
    config = RayConfig(address=address)
    who = TeacherConfig(model=tokenizer, backend="transformers")
    loader = functools.partial(scripted, folder=Path(notes), script={"sleep_sec": 0.1})
    with RayEngine(config, who, max_k=8, loader=loader) as engine:
        make(root, Path(corpus), engine)
        from ray._common.usage import usage_lib
        from ray._private.worker import _global_node

        print("statistics of use:", usage_lib.usage_stats_enabled(), "session:", _global_node.get_session_dir_path())
    print(*sorted({name.split(".")[0] for name in sys.modules}))


def start_driver(*arguments: object) -> subprocess.Popen[str]:
    # Where the tests run in the background, SIGINT may be ignored from birth on.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.pipelines.test_ray import drive; drive(*sys.argv[1:])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def lines_of(manifest: Path) -> int:
    return manifest.read_bytes().count(b"\n") if manifest.exists() else 0


@pytest.mark.slow
def test_a_killed_driver_resumes_and_never_imports_torch(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path, expected: dict[str, str]
) -> None:
    root, notes = tmp_path / "d", tmp_path / "notes"
    manifest, complaints = root / "manifest.jsonl", {}
    for deadly, lines in ((signal.SIGKILL, 3), (signal.SIGINT, 6)):
        driver = start_driver(root, corpus, tokenizer_dir, notes, two.address)
        wait_until(lambda: lines_of(manifest) >= lines or driver.poll() is not None)  # noqa: B023  called in this round
        os.kill(driver.pid, deadly)
        _, complaints[deadly] = driver.communicate(timeout=60)
        assert driver.returncode != 0 and lines <= lines_of(manifest) < 15, complaints
        wait_until(lambda: gone(notes))
    assert "KeyboardInterrupt" in complaints[signal.SIGINT]
    assert kdata.open(root).num_rows > 0
    driver = start_driver(root, corpus, tokenizer_dir, notes, two.address)
    loaded, rest = driver.communicate(timeout=120)
    assert driver.returncode == 0, rest
    assert digests(root) == expected
    assert not {"torch", "vllm"} & set(loaded.split()) and "ray" in loaded.split()


@pytest.mark.slow
def test_without_a_cluster_ray_starts_here_and_ends_with_the_run(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    driver = start_driver(tmp_path / "d", corpus, tokenizer_dir, tmp_path / "notes", "local")
    printed, complaints = driver.communicate(timeout=120)
    assert driver.returncode == 0, complaints
    assert digests(tmp_path / "d") == expected
    assert "statistics of use: False" in printed
    session = printed.partition("session: ")[2].splitlines()[0]
    assert Path(session).is_dir()
    wait_until(lambda: gone(tmp_path / "notes") and not any(session in line for line in command_lines()))


def command_lines() -> list[str]:
    """Of every process of this machine; all that Ray starts name its session."""
    return subprocess.check_output(["ps", "-eo", "args="], text=True).splitlines()


# ------------------------------------------------------------------------------------------------------------ a URL


@pytest.mark.slow
def test_a_dataset_at_a_url_survives_a_killed_actor_and_resumes_elsewhere(
    tmp_path: Path,
    two: Any,
    corpus: Path,
    tokenizer_dir: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second driver has another cache, as on another machine: all it goes on from is at the URL."""
    url, behind = f"{Bucket.protocol}://{tmp_path}/bucket/d", tmp_path / "bucket" / "d"
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "first"))
    with engine_on(two, tokenizer_dir, tmp_path / "a", ONE, die_at=1, fail_at=3) as engine, pytest.raises(ConfigError):
        make(url, corpus, engine)
    assert (tmp_path / "a" / "died").exists()
    committed = lines_of(behind / "manifest.jsonl")
    assert 0 < committed < 15 and not list((tmp_path / "first" / "writing").rglob("*.arrow"))
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "second"))
    with engine_on(two, tokenizer_dir, tmp_path / "b") as engine:
        make(url, corpus, engine)
    assert digests(behind) == expected
    dataset = kdata.open(url)
    dataset.fetch()
    assert digests(dataset.path) == expected and verify(dataset, deep=True) == []


# ------------------------------------------------------------------------------------------------- command and recipe


@pytest.mark.slow
def test_command_and_recipe_write_the_bytes_of_the_local_engine(
    tmp_path: Path, two: Any, corpus: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a real (tiny) model. The command's process holds no torch; the recipe's would, once it trains."""
    from kdata.pipelines.recipe import load_recipe
    from kdata.pipelines.run import Run
    from kdata.pipelines.runner import run_capture
    from kdata.teachers.load import load_teacher

    monkeypatch.setenv("RAY_ADDRESS", two.address)
    who = TeacherConfig(model=str(llama_dir), backend="transformers")
    local = LocalEngine(load_teacher(who, max_k=4), load_tokenizer(llama_dir))
    run_job(tmp_path / "local", reading(corpus, kind="hybrid", k=4, num_draws=4, unit_tokens=100), local)
    code = (
        "import sys\nfrom kdata.pipelines.cli.main import main\ntry: main()\n"
        "finally: print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    command = ["capture", tmp_path / "command", "--teacher", llama_dir, "--backend", "transformers", "--corpus", corpus,
               "--kind", "hybrid", "--k", 4, "--num-draws", 4, "--engine", "ray", "--set", "unit_tokens=100",
               "--set", "engine.slow_factor=5"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "command") == digests(tmp_path / "local")
    loaded = set(done.stdout.partition("LOADED")[2].split())
    assert "ray" in loaded and not {"torch", "vllm"} & loaded
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: small\nteacher: {{model: '{llama_dir}', backend: transformers}}\nengine: {{kind: ray}}\n"
        f"keep: {{kind: hybrid, k: 4, num_draws: 4}}\ncorpus: {{path: '{corpus}'}}\ncapture: {{unit_tokens: 100}}\n"
        "students: {a: {label: A, objective: {}}}\n"
    )
    run = Run(load_recipe(recipe, []), tmp_path / "run", {})
    run.out.mkdir()
    try:
        run_capture(run)
    finally:
        run.close_engine()
    assert digests(run.dataset_path) == digests(tmp_path / "local")


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_teachers": 1, "min_teachers": 2}, "max_teachers 1 is below min_teachers 2"),
        ({"address": "ray://head:10001"}, "the driver must run on a machine of the cluster"),
        ({"slow_factor": 1.0}, "slow_factor"),
    ],
)
def test_invalid_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayConfig(**values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "rey"], r"--engine rey: there is no such engine \(did you mean 'ray'\?\)"),
        (["--engine", "ray", "--set", "engine.min_teacher=2"], r"'min_teacher' \(did you mean 'min_teachers'\?\)"),
        (["--set", "engine.min_teachers=2"], "unknown key 'min_teachers'"),
        (["--engine", "ray", "--set", "engine=2"], "engine must be a mapping"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(corpus: Path, arguments: list[str], message: str) -> None:
    from typer.testing import CliRunner

    from kdata.pipelines.cli.main import app

    command = ["capture", "nowhere", "--teacher", "x", "--corpus", str(corpus), *arguments]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_mistake_in_a_recipe_s_engine_names_the_nearest_key(tmp_path: Path) -> None:
    from kdata.pipelines.recipe import load_recipe

    with pytest.raises(ConfigError, match=r"unknown key 'engine\.max_teacher' \(did you mean 'max_teachers'\?\)"):
        load_recipe(Path("quickstart"), ["engine.kind=ray", "engine.max_teacher=4"])


def settings_table() -> str:
    """The table of pipelines/README.md, from the model."""
    rows = []
    for name, field in RayConfig.model_fields.items():
        if name != "kind":
            default = "null" if field.default is None else field.default
            rows.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


def test_the_table_in_the_readme_matches_the_model() -> None:
    assert settings_table() in (ROOT / "pipelines" / "README.md").read_text("utf-8")


def test_fewer_gpus_than_the_teacher_is_spread_over_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpus_per_teacher=2, .* tensor_parallel=4"):
        RayEngine(RayConfig(gpus_per_teacher=2), TeacherConfig(model="x", tensor_parallel=4), max_k=8)


def test_an_unreachable_cluster_is_named(tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster can be joined at 127\.0\.0\.1:1"):
        RayEngine(RayConfig(address="127.0.0.1:1"), TeacherConfig(model=str(tokenizer_dir)), max_k=8).__enter__()


def test_a_folder_that_actors_do_not_see_is_refused(tmp_path: Path) -> None:
    from kdata.store.staging import FolderStaging

    with pytest.raises(StorageError, match="must lie on a file system that all of them mount"):
        FolderStaging(tmp_path / "d" / "units-0.tmp").check()


# -------------------------------------------------------------------------------------------------------- the real vLLM


def noted(config: TeacherConfig, max_k: int, *, folder: Path) -> tuple[Any, Any]:
    """The engine's own loader, with a note of the process."""
    import ray

    from kdata.pipelines.ray.actor import load_both

    (folder / "pids").mkdir(parents=True, exist_ok=True)
    (folder / "pids" / str(os.getpid())).write_text(ray.get_runtime_context().get_node_id())
    return load_both(config, max_k)


def read_here(root: Path, corpus: Path, llama: Path) -> None:
    """The local engine with vLLM, in a process of its own, as an engine keeps memory and threads."""
    from kdata.teachers.load import load_teacher

    teacher = load_teacher(TeacherConfig(model=str(llama)), max_k=8)
    run_job(root, reading(corpus, kind="topk", unit_tokens=200), LocalEngine(teacher, load_tokenizer(llama)))
    teacher.close()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_on_two_nodes_with_an_actor_killed(tmp_path: Path, two: Any, llama_dir: Path) -> None:
    corpus, notes = write_jsonl(tmp_path / "c.jsonl", rows_of_text(300)), tmp_path / "notes"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(read_here, tmp_path / "local", corpus, llama_dir).result(timeout=300)
    whole = kdata.open(tmp_path / "local")
    left = []

    def kill_one() -> None:
        wait_until(lambda: lines_of(tmp_path / "d" / "manifest.jsonl") >= 3, 300.0)
        os.kill(min(processes(notes)), signal.SIGKILL)
        left.append(len(whole.manifest) - lines_of(tmp_path / "d" / "manifest.jsonl"))

    killer = threading.Thread(target=kill_one)
    killer.start()
    config = RayConfig(address=two.address, min_teachers=2, start_timeout_sec=300.0)
    loader = functools.partial(noted, folder=notes)
    with RayEngine(config, TeacherConfig(model=str(llama_dir)), max_k=8, loader=loader) as engine:
        run_job(tmp_path / "d", reading(corpus, kind="topk", unit_tokens=200), engine)
    killer.join()
    assert left[0] > 0, "it was done before an actor could be killed: give it more rows"
    assert len(set(processes(notes).values())) == 2
    assert verify(kdata.open(tmp_path / "d"), deep=True) == []
    if whole.info.teacher.deterministic:
        assert digests(tmp_path / "d") == digests(tmp_path / "local")


# ------------------------------------------------------------------------------------ last, as it takes a node away


def test_an_actor_and_then_a_node_are_killed(
    tmp_path: Path, two: Any, corpus: Path, tokenizer_dir: Path, expected: dict[str, str]
) -> None:
    notes, [victim] = tmp_path / "notes", list(two.worker_nodes)

    def kill_the_node() -> None:
        wait_until((notes / "hung").exists)
        two.remove_node(victim, allow_graceful=False)

    killer = threading.Thread(target=kill_the_node)
    killer.start()
    with engine_on(two, tokenizer_dir, notes, die_at=1, hang_on=victim.node_id) as engine:
        make(tmp_path / "d", corpus, engine)
    killer.join()
    assert digests(tmp_path / "d") == expected
    assert (notes / "died").exists() and len(processes(notes)) >= 3
    assert verify(kdata.open(tmp_path / "d"), deep=True) == []


@pytest.mark.slow
def test_two_nodes_fill_what_a_repair_at_a_url_set_aside(
    tmp_path: Path,
    two: Any,
    corpus: Path,
    tokenizer_dir: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shards are lost and damaged at the URL; the machine that repairs and those that capture share nothing else."""
    url, behind = f"{Bucket.protocol}://{tmp_path}/bucket/d", tmp_path / "bucket" / "d"
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "first"))
    make(url, corpus, LocalEngine(StandInTeacher(), load_tokenizer(tokenizer_dir)))
    shards = sorted((behind / "data").glob("capture-*.arrow"))
    for path in shards[::3]:
        path.unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "second"))
    done = repair(url)
    assert len(done.units["capture"]) == len(shards[::3]) + 1 and done.remaining == []
    assert verify(kdata.open(url), deep=True) == []
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "third"))
    with engine_on(two, tokenizer_dir, tmp_path / "notes") as engine:
        make(url, corpus, engine)
    assert digests(behind) == expected
