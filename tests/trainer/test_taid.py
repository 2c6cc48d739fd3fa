"""`taid` in training: a share of the teacher that follows the loss, exact after a resume and the same on every rank."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import kdata
from kdata.errors import ConfigError, CorruptError
from kdata.trainer.config import PhaseConfig, ScratchStudent, TrainConfig
from kdata.trainer.interpolation import AdaptiveInterpolation
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.parts import DistillationLoss, PackedRows
from kdata.trainer.train import train
from tests.trainer.datasets import make_dataset
from tests.trainer.oracle import make_problem
from tests.trainer.runs import lines
from tests.trainer.stopping import stop_before
from tests.trainer.test_distributed import BASE, run_ranks

MIX = {"weights": {"cross_entropy": 0.2, "taid": 0.8}}
STEPS = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", [5 + (i * 7) % 40 for i in range(90)])


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64),
        "objective": MIX, "steps": STEPS, "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0,
        "log_every_steps": 1, "checkpoint_every_steps": 1,
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


def shares(out: Path) -> list[float]:
    return [line["taid_t"] for line in lines(out)]


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config(), dataset.path, None, out)
    return out


def test_the_share_follows_the_formula() -> None:
    """Written out again, over many steps of a loss that falls, rises and stays."""
    losses = [2.0 * math.exp(-n / 300) + 0.3 * math.sin(n / 7) + 1 for n in range(2000)]
    own, t, m, got = AdaptiveInterpolation(), 0.4, 0.0, []
    for n, loss in enumerate(losses):
        own.update(loss, n, 10_000)
        if n:
            m = 0.99 * m + 0.01 * (losses[n - 1] - loss) / losses[n - 1]
            t = min(1.0, max(0.4 + 0.6 * n / 10_000, t + 5e-4 / (1 + math.exp(-m)) * (1 - t)))
        got.append(own.t)
        assert own.t == pytest.approx(t, rel=1e-12)
    assert got == sorted(got) and got[-1] > 0.4 + 0.6 * 0.2 + 0.05  # well ahead of the line


def test_the_share_is_1_at_the_end_and_a_step_without_a_position_changes_nothing() -> None:
    own = AdaptiveInterpolation()
    for n in range(100):
        own.update(1.0, n, 99)
    assert own.t == 1.0
    before = own.state_dict()
    own.update(0.0, 5, 99)
    assert own.state_dict() == before
    own.update(1e300, 5, 99)  # the change is as large as a float is
    own.update(1e-300, 6, 99)
    assert own.t == 1.0 and math.isfinite(own.momentum)


def test_metrics_hold_the_share_that_the_losses_decide(whole: Path) -> None:
    own, expected = AdaptiveInterpolation(), []
    for number, line in enumerate(lines(whole)):
        expected.append(own.t)
        own.update(line["taid"], number, STEPS)
    assert shares(whole) == expected
    assert expected[:2] == [0.4, 0.4] and expected[-1] >= 0.4 + 0.6 * 6 / STEPS
    assert "weights" not in lines(whole)[0]


@pytest.mark.parametrize("stop", [2, 3, 6])
def test_a_run_resumes_bit_equal(dataset: kdata.Dataset, whole: Path, tmp_path: Path, stop: int) -> None:
    out = stop_before(stop, config(), dataset, tmp_path / "run")
    train(config(), dataset.path, None, out)
    keys = ("step", "loss", "taid", "taid_t", "grad_norm")
    assert [[line[k] for k in keys] for line in lines(out)] == [[line[k] for k in keys] for line in lines(whole)]
    models = [(folder / "model/model.safetensors").read_bytes() for folder in (out, whole)]
    assert models[0] == models[1]


def test_each_phase_begins_anew(dataset: kdata.Dataset, tmp_path: Path) -> None:
    plain = PhaseConfig(name="plain", objective=ObjectiveConfig(weights={"forward_kl": 1.0}))
    phases = [PhaseConfig(name="one"), plain, PhaseConfig(name="two")]
    out = stop_before(4 + 2, config(steps=2, phases=phases), dataset, tmp_path / "run")
    train(config(steps=2, phases=phases), dataset.path, None, out)
    assert [line.get("taid_t") for line in lines(out)] == [0.4, 0.4, None, None, 0.4, 0.4]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"t": 0.3, "momentum": 0.0, "former_loss": 1.0},
        {"t": 0.5, "momentum": math.inf, "former_loss": 1.0},
        {"t": 0.5, "momentum": 0.0, "former_loss": "1"},
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    own = AdaptiveInterpolation()
    with pytest.raises(CorruptError, match="the state of taid is damaged"):
        own.load_state_dict(state)
    assert own.t == 0.4


def test_the_state_is_the_same_after_json() -> None:
    own, other = AdaptiveInterpolation(), AdaptiveInterpolation()
    other.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert other.state_dict() == own.state_dict()
    for n in range(5):
        own.update(1.7 / (n + 3), n, 9)
    other.load_state_dict(json.loads(json.dumps(own.state_dict())))
    assert other.state_dict() == own.state_dict()


def test_a_share_that_is_a_number_or_changes_with_the_step(dataset: kdata.Dataset, tmp_path: Path) -> None:
    for name, t, expected in (
        ("number", 0.5, [0.5] * 4),
        ("ramp", {"start": 0.4, "end": 1.0}, [0.4, 0.6, 0.8, 1.0]),
    ):
        settings = config(steps=4, objective={**MIX, "taid_t": t})
        train(settings, dataset.path, None, tmp_path / name)
        assert shares(tmp_path / name) == pytest.approx(expected)
    for t in (1.5, {"start": 0.4, "end": 1.5}):
        with pytest.raises(ValueError, match="taid_t"):
            ObjectiveConfig(weights={"taid": 1.0}, taid_t=t)


def test_trainers_without_state_refuse_a_share_that_follows_the_loss(dataset: kdata.Dataset) -> None:
    with pytest.raises(ConfigError, match=r"taid_t is adaptive.*set objective\.taid_t to a number"):
        PackedRows(dataset, items=4, objective=MIX)
    problem = make_problem()
    loss = DistillationLoss(ObjectiveConfig(**MIX), "ghost")
    loss.set_step(1, 3)
    with pytest.raises(ConfigError, match="taid_t is adaptive"):
        loss(problem.hidden, problem.head, problem.targets)
    ramp = ObjectiveConfig(weights={"taid": 1.0}, taid_t={"start": 0.4, "end": 1.0})
    loss = DistillationLoss(ramp, "ghost")
    with pytest.raises(ConfigError, match=r"taid_t changes with the step; call config\.at"):
        loss(problem.hidden, problem.head, problem.targets)
    PackedRows(dataset, items=4, objective=ramp)
    at = [DistillationLoss(ObjectiveConfig(weights={"taid": 1.0}, taid_t=t), "ghost") for t in (0.4, 0.7, 1.0)]
    for step, fixed in enumerate(at):
        loss.set_step(step, 3)
        totals = [each(problem.hidden, problem.head, problem.targets).total for each in (loss, fixed)]
        torch.testing.assert_close(*totals, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_two_ranks_have_the_shares_and_losses_of_one(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """t is of the loss over all ranks. With a large share of the loss in it, ranks with their own would part."""
    jobs = [
        {
            "config": {**BASE, "objective": MIX, "parallel": kind},
            "dataset": str(dataset.path),
            "out": str(tmp_path / kind),
        }
        for kind in ("ddp", "fsdp")
    ]
    run_ranks(jobs, tmp_path)
    train(TrainConfig(**BASE, objective=MIX), dataset.path, None, tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        assert shares(tmp_path / kind) == pytest.approx(shares(tmp_path / "one"), rel=1e-6)
        losses = [[line["loss"] for line in lines(tmp_path / name)] for name in (kind, "one")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
