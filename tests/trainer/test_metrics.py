"""Metrics: metrics.jsonl through kills, the loggers beside it (real where installed), and none of it on other ranks."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

import kdata
import kdata.trainer.train as module
from kdata.errors import DependencyError
from kdata.trainer.config import ScratchStudent, TrainConfig, TrainResult
from kdata.trainer.domain_weights import FixedMixture
from kdata.trainer.metrics import Metrics, check_installed, forget_after
from kdata.trainer.train import train
from tests.trainer.datasets import make_dataset

LINE = {"step": 3, "phase": "task", "loss": 2.5, "tokens": 7, "mixture": {"weights": {"code": 0.25}}}
NUMBERS = {"loss": 2.5, "tokens": 7, "mixture/weights/code": 0.25}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", [5 + (i * 7) % 40 for i in range(60)])


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64),
        "steps": 6,
        "batch_tokens": 128,
        "context_tokens": 64,
        "warmup_steps": 1,
        "log_every_steps": 2,
        "checkpoint_every_steps": 3,
    }
    return TrainConfig(**{**base, **changes})


def metrics(out: Path, loggers: list, step: int = 0, write: bool = True) -> Metrics:
    out.mkdir(exist_ok=True)
    return Metrics(out, loggers, label="run", settings={"steps": 4}, step=step, write=write)


@pytest.mark.parametrize("end", [b'{"step": 3}\n{"st', b'{"step": 3, "\xa9": 1}\n'])
def test_lines_after_the_checkpoint_and_a_damaged_line_are_removed(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + end)
    forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_silent_rank_writes_nothing(tmp_path: Path) -> None:
    with metrics(tmp_path / "run", ["tensorboard"], write=False) as quiet:
        quiet.write(LINE)
    assert not list((tmp_path / "run").iterdir())


def test_every_line_and_the_summary_report_the_time_of_waiting_for_data(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks once a look: two ticks of waiting in every step's ticks."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(ticks)))
    result = train(config(log_every_steps=1, prefetch_batches=0), dataset.path, None, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # Looks: the step begins, waiting begins, waiting ends, the step ends.
    assert [line["wait_share"] for line in lines] == [pytest.approx(1 / 3)] * 6
    assert result.wait_share == pytest.approx(1 / 3) and result.train_seconds == 18.0
    assert json.loads((tmp_path / "train.json").read_text())["wait_share"] == pytest.approx(1 / 3)


def test_tensorboard_gets_every_number(dataset: kdata.Dataset, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mixture = FixedMixture(weights={"code": 0.5, "prose": 0.5}, every_steps=4)
    train(config(loggers=["tensorboard"], mixture=mixture), dataset.path, None, tmp_path)
    lines = {line["step"]: line for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())}
    assert list(lines) == [1, 2, 4, 5, 6]  # every second, the first, and the first of a period
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "wait_share"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({step: line[name] for step, line in lines.items()}, rel=1e-6)
    assert [event.step for event in events.Scalars("mixture/weights/code")] == [1, 5]


def test_tensorboard_purges_steps_that_are_repeated(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((0, 1.0), (2, 5.0)):
        with metrics(tmp_path / "run", ["tensorboard"], step=first) as run:
            for step in range(first + 1, 5):
                run.write({"step": step, "loss": value})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]


def test_wandb_writes_offline_beside_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with metrics(tmp_path / "run", ["wandb"]) as run:
        run.write(LINE)
        assert wandb.run.settings.mode == "offline" and wandb.run.config["steps"] == 4
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_writes_its_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    import subprocess

    code = (
        "import sys; from pathlib import Path; from kdata.trainer.metrics import Metrics\n"
        "with Metrics(Path(sys.argv[1]), ['trackio'], label='run', settings={'steps': 4}) as run:\n"
        "    run.write({'step': 3, 'loss': 2.5, 'mixture': {'weights': {'code': 0.25}}})\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(name,) = SQLiteStorage.get_runs('kdata')\n"
        "print(SQLiteStorage.get_logs('kdata', name))\n"
    )
    env = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "run").mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'loss': 2.5" in done.stdout and "'mixture/weights/code': 0.25" in done.stdout and "'step': 3" in done.stdout


class StandIn(types.ModuleType):
    """A stand-in for wandb and trackio that records the arguments of `init` and `log`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.received: dict = {}
        self.logged: list[tuple[int, dict]] = []
        self.finished = False

    def init(self, **settings: object) -> StandIn:
        self.received = settings
        return self

    def log(self, numbers: dict, step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_logger_receives(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline unless the environment says otherwise; each attempt a run, those of a folder a group."""
    names, groups = [], []
    for folder, mode, step in (
        ("a/my run", None, 0),
        ("a/my run", "online", 2),
        ("a/my run", None, 2),
        ("b/my run", None, 0),
    ):
        stand_in = StandIn(name)
        monkeypatch.setitem(sys.modules, name, stand_in)
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with metrics(tmp_path / folder, [name], step=step) as run:
            run.write(LINE)
        assert stand_in.logged == [(3, NUMBERS)] and stand_in.finished
        assert stand_in.received["config"] == {"steps": 4} and "resume" not in stand_in.received
        names.append(stand_in.received["id" if name == "wandb" else "name"])
        groups.append(stand_in.received["group"])
        if name == "wandb":
            assert stand_in.received["mode"] == (mode or "offline") and stand_in.received["dir"] == str(
                tmp_path / folder
            )
        else:
            assert not stand_in.received["embed"] and "space_id" not in stand_in.received
    assert len(set(names)) == 4 and all("-my-run-" in n and "/" not in n for n in names)
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_installed([])
    with pytest.raises(DependencyError, match=r"pip install 'kdata\[wandb\]'"):
        train(config(loggers=["wandb"]), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert TrainResult.model_fields["wait_share"].description
