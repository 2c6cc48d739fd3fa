"""The course of a run's models: figures against `evaluate`, flags and fits against their definitions."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, DataError, MismatchError, MissingError
from kdata.pipelines.cli.main import app
from kdata.pipelines.report.audits import course_words
from kdata.selection.ranked import Random
from kdata.store.pretrained import weights_digest
from kdata.trainer.config import CheckpointStudent, LoraConfig, PhaseConfig, ScratchStudent, TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.hacking import _check_teacher, fit_power_law, hacking, verdict
from kdata.trainer.train import train
from tests.fakes import run_generate
from tests.trainer.datasets import VOCAB, make_dataset
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 11) % 30 for i in range(30)]
CONFIG: dict[str, Any] = {
    "label": "tiny",
    "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64),
    "steps": 15,
    "batch_tokens": 128,
    "context_tokens": 64,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
    "keep_models_every_steps": 4,
    "checkpoint_every_steps": 4,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kdata.Dataset]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "train": make_dataset(folder / "train", LENGTHS, kept=VOCAB),
        "heldout": make_dataset(folder / "heldout", LENGTHS[:8], kept=VOCAB, seed=1),
        "oracle": make_dataset(folder / "oracle", LENGTHS[:8], kept=9, seed=1),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: dict[str, kdata.Dataset]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(TrainConfig(**CONFIG), data["train"].path, None, out)
    return out


def test_models_are_kept_whole_also_by_a_run_that_was_stopped(
    run: Path, data: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    """A run that stops behind a kept model, and goes on, has the models of one that did not stop, byte by byte."""
    names = ["step-00000004", "step-00000008", "step-00000012"]
    assert sorted(path.name for path in (run / "models").iterdir()) == names
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000015"]
    for path in (run / "models").iterdir():
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}

    class Stopped(Exception):
        pass

    from kdata.trainer.learner import Learner

    calls = 0

    class Stopping(Learner):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 11:
                raise Stopped
            return super().forward(*arguments, **options)

    with pytest.raises(Stopped):
        train(TrainConfig(**CONFIG), data["train"].path, None, tmp_path / "again", learner_of=Stopping)
    assert sorted(path.name for path in (tmp_path / "again/models").iterdir()) == names[:2]
    # How often models are kept may change on the way, as it changes no number.
    train(TrainConfig(**{**CONFIG, "keep_models_every_steps": 6}), data["train"].path, None, tmp_path / "again")
    for name in names:
        weights = [root / "models" / name / "model.safetensors" for root in (run, tmp_path / "again")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_starts_anew_removes_the_models_of_the_former_one(
    data: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    """Only what a run wrote: other folders, and other names, stay."""
    out, unasked = tmp_path / "run", {**CONFIG, "checkpoint_every_steps": 0}
    stop_before(9, TrainConfig(**{**unasked, "seed": 5}), data["train"], out)
    names = ["step-00000004", "step-00000008"]
    assert sorted(path.name for path in (out / "models").iterdir()) == names and not (out / "checkpoints").exists()
    for mine in ("step-notes", "best", "step-00000006"):
        (out / "models" / mine).mkdir()
        (out / "models" / mine / "notes.txt").write_text("of a person")
    train(TrainConfig(**{**unasked, "keep_models_every_steps": 15}), data["train"].path, None, out)
    assert sorted(path.name for path in (out / "models").iterdir()) == [
        "best", "step-00000006", "step-00000015", "step-notes",
    ]  # fmt: skip


def test_steps_above_the_last_one_are_no_part_of_the_course(
    run: Path, data: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(run / "models/step-00000004", tmp_path / "run/models/step-00000016")
    assert [model["step"] for model in hacking(tmp_path / "run", data["heldout"].path)["models"]] == [4, 8, 12, 15]


def test_of_a_student_with_adapters_these_are_kept(run: Path, data: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    """Adapters, also where the last model is merged: the base is on disk already."""
    student = CheckpointStudent(model=str(run / "model"), lora=LoraConfig(rank=2, merge=True))
    config = TrainConfig(**{**CONFIG, "student": student, "steps": 8})
    train(config, data["train"].path, None, tmp_path / "run")
    for path in (tmp_path / "run/models").iterdir():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in path.iterdir()}
    measured = hacking(tmp_path / "run", data["heldout"].path)
    whole = evaluate(tmp_path / "run/model", data["heldout"].path)["overall"]
    assert [model["step"] for model in measured["models"]] == [4, 8]
    assert measured["models"][-1]["proxy"] == pytest.approx(whole["kl"], rel=1e-5), (
        "the adapter of the last step, merged"
    )
    assert measured["models"][0]["proxy"] != measured["models"][1]["proxy"]


def test_figures_are_those_of_evaluate(run: Path, data: dict[str, kdata.Dataset]) -> None:
    heldout, oracle = data["heldout"].path, data["oracle"].path
    measured = hacking(run, heldout, oracle=oracle, trained_on=data["train"].path)
    assert [model["step"] for model in measured["models"]] == [4, 8, 12, 15]
    folders = [*sorted((run / "models").iterdir()), run / "model"]
    for model, folder in zip(measured["models"], folders, strict=True):
        own, theirs = evaluate(folder, heldout)["overall"], evaluate(folder, oracle)["overall"]
        assert (model["proxy"], model["nll"], model["golden"]) == (own["kl"], own["nll"], theirs["kl"])
    assert measured["data"]["unique_prompts"] == measured["data"]["rows"] == len(LENGTHS)
    tokens = json.loads((run / "train.json").read_text())["tokens"]
    assert measured["data"]["epochs"] == pytest.approx(tokens / sum(LENGTHS))
    assert measured["models"][-1]["epochs"] == pytest.approx(measured["data"]["epochs"])
    without = hacking(run, heldout)
    assert [m["golden"] for m in without["models"]] == [m["nll"] for m in without["models"]] and without["data"] is None


@pytest.mark.parametrize(
    ("proxy", "golden", "expected", "words"),
    [
        ([4, 3, 2, 1], [4, 3, 2, 1], {"hacking": False, "best_step": 40}, "least at the last model"),
        (
            [4, 3, 2, 1],
            [4, 2, 3, 5],
            {"hacking": True, "best_step": 20, "golden_rise": 3, "proxy_fall": 2},
            "at each model",
        ),
        ([4, 2, 3, 1], [4, 2, 3, 5], {"hacking": True, "proxy_monotone": False, "proxy_fall": 1}, "not at each model"),
        ([4, 2, 3, 5], [4, 2, 3, 5], {"hacking": False, "proxy_fall": -3, "best_step": 20}, "overfitting"),
    ],
)
def test_hacking_is_a_golden_that_rises_while_the_proxy_falls(
    proxy: list[float], golden: list[float], expected: dict[str, Any], words: str
) -> None:
    found = verdict([10, 20, 30, 40], proxy, golden)
    assert expected.items() <= found.items()
    assert words in course_words(found)[0]


def test_the_fit_has_the_z_of_a_prediction() -> None:
    """Against least squares written out, in float64; and a power law of no noise is found exactly."""
    steps = [10, 20, 30, 50, 80, 100, 150]
    rng = np.random.default_rng(0)
    proxy = [
        2.0 * step**-0.4 * math.exp(0.02 * noise) for step, noise in zip(steps, rng.standard_normal(7), strict=True)
    ]
    fit = fit_power_law(steps, proxy)
    assert fit is not None and fit["models"] == 4
    x, y = np.log(steps[:4]), np.log(proxy[:4])
    design = np.stack([np.ones(4), x], 1)
    inverse = np.linalg.inv(design.T @ design)
    a, slope = inverse @ design.T @ y
    s2 = ((y - design @ [a, slope]) ** 2).sum() / 2
    for one, step, value in zip(fit["z"], steps[4:], proxy[4:], strict=True):
        row = np.array([1.0, math.log(step)])
        error = math.sqrt(s2 * (1 + row @ inverse @ row))
        assert one == {"step": step, "z": pytest.approx((math.log(value) - row @ [a, slope]) / error, rel=1e-6)}
    exact = fit_power_law(steps, [3.0 * step**-0.5 for step in steps])
    assert exact is not None and exact["a"] == pytest.approx(math.log(3)) and exact["b"] == pytest.approx(0.5)
    assert not exact["departs"]
    faster = fit_power_law(steps, [3.0 * step**-0.5 / (2 if step > 90 else 1) for step in steps])
    assert faster is not None and not faster["departs"] and faster["z"][-1]["z"] < -3
    turned = fit_power_law(steps, [3.0 * step**-0.5 * (2 if step > 90 else 1) for step in steps])
    assert turned is not None and turned["departs"]
    assert fit_power_law(steps[:5], proxy[:5]) is None and fit_power_law(steps, [*proxy[:6], -0.1]) is None


def test_answers_per_prompt_are_counted_in_the_plan(data: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    shutil.copytree(data["train"].path, tmp_path / "train")
    dataset = kdata.open(tmp_path / "train")
    kdata.select(dataset, Random(name="some", share=0.5))
    train(TrainConfig(**CONFIG), dataset.path, "some", tmp_path / "run")
    measured = hacking(tmp_path / "run", data["heldout"].path, trained_on=dataset.path)["data"]
    rows = kdata.open(dataset.path).sql(
        "select count(*) as n, sum(num_tokens) as t from rows join plans.some using (id)"
    )
    assert (measured["rows"], measured["tokens"]) == (rows["n"][0].as_py(), rows["t"][0].as_py())
    assert measured["answers_per_prompt"] == 1


def test_bad_input_is_refused(
    run: Path, data: dict[str, kdata.Dataset], corpus_file: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    heldout = data["heldout"].path
    with pytest.raises(MissingError, match=r"no train\.json"):
        hacking(tmp_path, heldout)
    with pytest.raises(MismatchError, match="does not have the rows"):
        hacking(run, heldout, oracle=data["train"].path)
    with pytest.raises(MismatchError, match="is not the dataset"):
        hacking(run, heldout, trained_on=heldout)
    shutil.copytree(heldout, tmp_path / "same")
    with pytest.raises(ConfigError, match="is the held-out set itself"):
        hacking(run, heldout, oracle=tmp_path / "same")
    for number, change in enumerate([{"weights_hash": "1" * 64}, {"lora_hash": "2" * 64}]):
        other = make_dataset(tmp_path / f"other{number}", LENGTHS[:8], kept=VOCAB, seed=1, teacher=change).path
        with pytest.raises(MismatchError, match="beliefs of chain"):
            hacking(run, other, trained_on=data["train"].path)
    assert hacking(run, other)["data"] is None, "nothing says who the run's teacher is"
    shutil.copytree(run, tmp_path / "last", ignore=shutil.ignore_patterns("models"))
    with pytest.raises(MissingError, match="keep_models_every_steps"):
        hacking(tmp_path / "last", heldout)
    two = TrainConfig(**{**CONFIG, "phases": [PhaseConfig(name="a", steps=4), PhaseConfig(name="b", steps=4)]})
    train(two, data["train"].path, None, tmp_path / "phases")
    with pytest.raises(ConfigError, match="several phases"):
        hacking(tmp_path / "phases", heldout, trained_on=data["train"].path)
    run_generate(tmp_path / "written", corpus_file, tokenizer_dir)
    with pytest.raises(DataError, match="the teacher wrote the text"):
        hacking(run, tmp_path / "written")


def test_a_teacher_from_the_hub_and_its_copy_in_a_folder_are_one(
    run: Path, data: dict[str, kdata.Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the commit's files are in the Hub's cache. The run's teacher is a folder, the held-out set's a commit."""
    commit = "c" * 40
    snapshot = tmp_path / "hub" / "models--owner--chain" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    heldout = {"model": "owner/chain", "revision": commit, "weights_hash": None}
    from_hub = make_dataset(tmp_path / "hub-heldout", LENGTHS[:8], kept=VOCAB, seed=1, teacher=heldout)
    here = weights_digest(shutil.copytree(snapshot, tmp_path / "chain"))
    copied = make_dataset(tmp_path / "copied", LENGTHS[:8], kept=VOCAB, seed=1, teacher={"weights_hash": here})
    _check_teacher(from_hub, copied)
    _check_teacher(copied, from_hub)
    with pytest.raises(MismatchError, match="beliefs of owner/chain"):
        hacking(run, from_hub.path, trained_on=data["train"].path)
    shutil.rmtree(snapshot)
    with pytest.raises(MismatchError, match="beliefs of owner/chain"):
        _check_teacher(from_hub, copied)


def test_the_command(run: Path, data: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    command = ["hacking", str(run), str(data["heldout"].path), "--oracle", str(data["oracle"].path)]
    more = [
        "--trained-on",
        str(data["train"].path),
        "--save",
        str(tmp_path / "h.json"),
        "--picture",
        str(tmp_path / "h.svg"),
    ]
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 0, done.exception
    saved = json.loads((tmp_path / "h.json").read_text())
    for model in saved["models"]:
        assert f"{model['proxy']:.4f}" in done.output and f"{model['golden']:.4f}" in done.output
    assert "30 different prompts" in done.output and course_words(saved)[0] in done.output
    assert "golden: KL to" in (tmp_path / "h.svg").read_text()
    wrong = CliRunner().invoke(app, [*command, "--picture", str(tmp_path / "h.txt")])
    assert isinstance(wrong.exception, ConfigError) and "a picture ends in" in str(wrong.exception)
