"""Phases in a row: each with its data, learning rate and mix; one chain of checkpoints that resumes anywhere in it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import kdata
import kdata.trainer.train as module
from kdata.config import parse_config
from kdata.errors import ConfigError, MismatchError, MissingError
from kdata.format.schema import ManifestEntry
from kdata.pipelines.cli.main import app
from kdata.selection.plan import make_plan
from kdata.trainer.config import PhaseConfig, ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.phases import open_phases
from kdata.trainer.schedule import Ramp
from kdata.trainer.train import train
from tests.trainer.datasets import VOCAB, make_dataset
from tests.trainer.runs import lines

LENGTHS = [5 + (i * 7) % 40 for i in range(120)]
GENERAL, TASK = 8, 6  # steps
MIX = ObjectiveConfig(weights={"cross_entropy": Ramp(start=1.0, end=0.0), "reverse_kl": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def general(folder: Path) -> kdata.Dataset:
    return make_dataset(folder / "general", LENGTHS)


@pytest.fixture(scope="module")
def task(folder: Path) -> kdata.Dataset:
    return make_dataset(folder / "task", LENGTHS[:50], seed=5)


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": ScratchStudent(hidden_size=32, num_layers=1, num_heads=2, max_positions=64),
        "steps": GENERAL,
        "batch_tokens": 256,
        "context_tokens": 64,
        "warmup_steps": 2,
        "learning_rate": 5e-3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
    }
    return TrainConfig(**{**base, **changes})


def phased(task: kdata.Dataset, **changes: object) -> TrainConfig:
    own = {"steps": TASK, "learning_rate": 1e-3, "warmup_steps": 0, "decay": "constant", "objective": MIX}
    phases = [PhaseConfig(name="general"), PhaseConfig(name="task", dataset=str(task.path), **own)]
    return config(phases=phases, **changes)


def losses(out: Path) -> list[tuple]:
    keys = ("step", "phase", "loss", "cross_entropy", "grad_norm", "lr", "tokens", "weights")
    return [tuple(line.get(key) for key in keys) for line in lines(out)]


@pytest.fixture(scope="module")
def whole(general: kdata.Dataset, task: kdata.Dataset, folder: Path) -> Path:
    train(phased(task), general.path, None, folder / "whole")
    return folder / "whole"


def test_each_phase_has_its_data_rate_and_mix(
    general: kdata.Dataset, task: kdata.Dataset, whole: Path, tmp_path: Path
) -> None:
    logged = lines(whole)
    assert [line["phase"] for line in logged] == ["general"] * GENERAL + ["task"] * TASK
    train(config(), general.path, None, tmp_path / "alone")  # the first phase is the run without the second
    keys = ("step", "loss", "grad_norm", "lr", "tokens")
    assert [[line[k] for k in keys] for line in logged[:GENERAL]] == [
        [line[k] for k in keys] for line in lines(tmp_path / "alone")
    ]
    assert logged[GENERAL - 1]["lr"] == pytest.approx(5e-4) and {line["lr"] for line in logged[GENERAL:]} == {1e-3}
    assert [line["weights"]["cross_entropy"] for line in logged[GENERAL:]] == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0])
    train(config(steps=TASK), task.path, None, tmp_path / "task")  # the second begins at the start of its data
    own = [line["tokens"] for line in lines(tmp_path / "task")]
    assert [line["tokens"] - logged[GENERAL - 1]["tokens"] for line in logged[GENERAL:]] == own
    fresh = lines(tmp_path / "task")[0]["cross_entropy"]
    assert logged[GENERAL]["cross_entropy"] < fresh - 0.1  # the student goes on
    result = json.loads((whole / "train.json").read_text())
    assert result["steps"] == GENERAL + TASK and result["dataset_fingerprint"] == task.content_digest


@pytest.mark.parametrize("stop", [3, GENERAL, GENERAL + 1, GENERAL + 4])
def test_a_run_resumes_bit_equal_in_any_phase(
    general: kdata.Dataset, task: kdata.Dataset, whole: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after step `stop`; the task's dataset has been moved meanwhile."""
    real = module._gradients

    def dying(*arguments):
        if arguments[-1] == stop + 1:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_gradients", dying)
        train(phased(task), general.path, None, tmp_path / "run")
    moved = kdata.open(shutil.copytree(task.path, tmp_path / "moved"))
    train(phased(moved), general.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)
    models = [(out / "model/model.safetensors").read_bytes() for out in (tmp_path / "run", whole)]
    assert models[0] == models[1]


def test_a_changed_phase_does_not_resume(general: kdata.Dataset, task: kdata.Dataset, whole: Path) -> None:
    for changes, message in (
        ({"learning_rate": 1e-4}, r"^  phases\.general\.learning_rate: 0\.005 -> 0\.0001$"),
        ({"steps": GENERAL + 1}, r"^  phases\.task\.first_step: 8 -> 9$"),
        ({"clip_norm": 2.0}, r"^  clip_norm: 1\.0 -> 2\.0$"),
    ):
        with pytest.raises(MismatchError, match=f"(?m){message}"):
            train(phased(task, **changes), general.path, None, whole)
    with pytest.raises(MismatchError, match=r"phases\.task\.data: "):
        train(phased(general), general.path, None, whole)


def test_plans_of_phases(general: kdata.Dataset, tmp_path: Path) -> None:
    """A phase takes the run's plan with the run's dataset, its own where it names one, and none with a dataset of its own."""
    paths = {
        name: str(make_plan(general, name, ids, method="sql", parameters={}).save(tmp_path))
        for name, ids in (("few", ["doc-1", "doc-3"]), ("one", ["doc-7"]))
    }
    phases = [
        PhaseConfig(name="a"), PhaseConfig(name="b", plan=paths["one"]), PhaseConfig(name="c", dataset=str(general.path))
    ]  # fmt: skip
    result = train(
        config(phases=phases, steps=1, batch_tokens=64, warmup_steps=0), general.path, paths["few"], tmp_path / "run"
    )
    tokens = [line["tokens"] for line in lines(tmp_path / "run")]
    assert tokens[0] == LENGTHS[1] + LENGTHS[3] and tokens[1] - tokens[0] == LENGTHS[7]
    assert tokens[2] - tokens[1] > LENGTHS[7] and result.plan is None


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_rank_of_a_machine_copies_the_shards_before_the_others_open_the_data(
    general: kdata.Dataset, monkeypatch: pytest.MonkeyPatch, local_rank: int
) -> None:
    events: list[str] = []
    real = kdata.Dataset.shard_file

    def shard_file(self: kdata.Dataset, entry: ManifestEntry, folder: str) -> Path:
        events.append(folder)
        return real(self, entry, folder)

    monkeypatch.setattr(kdata.Dataset, "shard_file", shard_file)
    monkeypatch.setattr(Ranks, "wait", lambda self: events.append("wait"))
    ranks = Ranks(torch.device("cpu"), rank=local_rank, world_size=2, local_rank=local_rank)
    open_phases(config(), general.path, None, ranks)
    assert events.count("data") == len(general.manifest) and events.count("wait") == 1
    assert events.index("wait") == (len(events) - 1 if local_rank == 0 else 0)
    events.clear()
    with pytest.raises(MissingError):
        open_phases(config(), general.path / "nowhere", None, ranks)
    assert events == ["wait"]  # the other ranks do not wait for ever
    open_phases(config(), general.path, None, Ranks(torch.device("cpu")))
    assert "data" not in events  # alone, a shard is copied when it is read


def test_the_example_of_the_readme_is_a_run() -> None:
    text = (Path(__file__).resolve().parents[2] / "trainer" / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    phases = parse_config(TrainConfig, yaml.safe_load(example), "README").resolved_phases()
    assert [(s.name, s.first_step, s.end, s.objective.temperature) for s in phases] == [
        ("general", 0, 2000, 1.0), ("task", 2000, 2300, 2.0)
    ]  # fmt: skip
    assert isinstance(phases[0].mixture, DDKMixture) and phases[1].mixture is None


def test_the_command_takes_a_file_of_settings(
    general: kdata.Dataset, task: kdata.Dataset, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(phased(task).model_dump(mode="json", exclude={"label"})))
    arguments = ["train", str(general.path), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert losses(tmp_path / "run") == losses(whole)
    done = CliRunner().invoke(app, [*arguments, "--set", "phsaes=[]"])
    assert isinstance(done.exception, ConfigError) and "did you mean 'phases'" in str(done.exception)


def test_phases_that_do_not_fit_are_refused(general: kdata.Dataset, folder: Path, tmp_path: Path) -> None:
    other = make_dataset(folder / "other", LENGTHS[:10], vocab=VOCAB - 1)
    for phases, message in (
        ([PhaseConfig(name="a"), PhaseConfig(name="b", dataset=str(other.path))], "only one has a token of id"),
        ([PhaseConfig(name="a"), PhaseConfig(name="a")], "a name of its own"),
        ([PhaseConfig(name="a", steps=2)], r"phase 'a': warmup_steps=2 must be less than steps=2"),
        ([PhaseConfig(name="a", objective=ObjectiveConfig(temperature=2.0))], "log-sum-exp"),
    ):
        with pytest.raises((ConfigError, MismatchError), match=message):
            train(config(phases=phases), general.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_objectives_that_draws_bias_train_on_exact_entries_or_are_refused(folder: Path, tmp_path: Path) -> None:
    """A run on a hybrid starts as one on its exact entries alone does (documents come in another order); on draws alone there
    is none."""
    mixed = make_dataset(folder / "mixed", LENGTHS, kept=VOCAB, tail="draws", exact=4)
    objective = ObjectiveConfig(weights={"jsd": 1.0, "reverse_kl": 0.5})
    run_losses = {}
    for name, dataset in (("mixed", mixed), ("four", make_dataset(folder / "four", LENGTHS, kept=4))):
        train(config(objective=objective), dataset.path, None, tmp_path / name)
        run_losses[name] = [line["loss"] for line in lines(tmp_path / name) if "loss" in line]
    assert run_losses["mixed"][0] > 0.1 and len(run_losses["mixed"]) == GENERAL
    assert np.mean(run_losses["mixed"][:3]) == pytest.approx(np.mean(run_losses["four"][:3]), rel=0.05)
    drawn = make_dataset(folder / "drawn", LENGTHS[:20], kept=VOCAB, tail="draws")
    with pytest.raises(ConfigError, match=r"jsd is not linear.*'sampled'"):
        train(config(objective=objective), drawn.path, None, tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()
