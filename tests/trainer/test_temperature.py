"""Training at a temperature other than 1 on stored data: against the dense float64 distribution at that temperature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdata
from kdata.errors import ConfigError
from kdata.format.keep import KeepConfig
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import FORMAT_VERSION, SourceInfo
from kdata.format.temper import at_temperature
from kdata.loader.batches import BatchesConfig
from kdata.store.writer import Writer
from kdata.teachers.reduce import draw_seed, readout_of, reduce_logits
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import LINEAR, ObjectiveConfig, Tail
from kdata.trainer.objectives import OBJECTIVES
from kdata.trainer.student import build_student, head_of, hidden_states
from kdata.trainer.train import train
from tests.trainer.oracle import AT_1

VOCAB, POSITIONS, HIDDEN = 97, 400, 12


def stored(tmp_path: Path, keep: KeepConfig) -> tuple[kdata.Dataset, torch.Tensor]:
    """One long sequence of random beliefs, written and opened; and its dense log-probabilities float64 [M, V]."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(POSITIONS, VOCAB, generator=generator) * 2.0
    ids = torch.randint(0, VOCAB, (POSITIONS + 1,), generator=generator).numpy().astype(np.int32)
    out = readout_of(ids, 1, reduce_logits(logits, torch.from_numpy(ids[1:]).long(), keep, draw_seed(ids, keep)))
    teacher = {
        "model": "random", "revision": None, "weights_hash": None, "backend": "stand-in", "backend_version": "-",
        "dtype": "float32", "logprobs": "raw", "deterministic": True,
    }  # fmt: skip
    info = new_info(
        format_version=FORMAT_VERSION, vocab_size=VOCAB, teacher=teacher, codec=keep.codec(VOCAB), tail=keep.tail,
        tokenizer={"hash": "-", "chat_template_hash": None, "bos_id": None, "eos_id": None},
    )  # fmt: skip
    record = Record(
        id="a", domain="d", token_ids=ids, target_mask=out.rank > 0, kept=out.kept, text="", **out.measures()
    )
    with Writer(tmp_path / "d", info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(UnitResult(0, [record]))
    return kdata.open(tmp_path / "d"), torch.log_softmax(logits.double(), -1)


def _top(k: int) -> KeepConfig:
    return KeepConfig(kind="topk", k=k, temperatures=[2.0, 0.7])


def only_batch(dataset: kdata.Dataset, temperature: float) -> Batch:
    """The dataset's one sequence, as the trainer gets it."""
    config = BatchesConfig(context_tokens=POSITIONS + 1, batch_rows=1)
    (batch,) = Loader(dataset, None, config, temperature=temperature).epoch()
    return batch


def loss_and_gradient(
    dataset: kdata.Dataset, tail: Tail, hidden: torch.Tensor, head: torch.Tensor, temperature: float, name="forward_kl"
) -> tuple[float, torch.Tensor]:
    """An objective of the fused loss on stored data at a temperature, float64."""
    targets = only_batch(dataset, temperature).targets
    wide = replace(targets, logprobs_CK=targets.logprobs_CK.double(), log_tail_C=targets.log_tail_C.double())
    own = hidden.clone().requires_grad_()
    config = ObjectiveConfig(weights={name: 1.0}, temperature=temperature, taid_t=0.7)
    loss = distillation_loss(own, head, wide, config, tail)
    loss.total.backward()
    assert own.grad is not None
    return float(loss.total.detach()), own.grad


def dense_loss_and_gradient(
    dense: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor, temperature: float
) -> tuple[float, torch.Tensor]:
    """T^2 KL(softmax(z_T / T) || softmax(z_S / T)) over the whole vocabulary."""
    own = hidden.clone().requires_grad_()
    log_q = torch.log_softmax(own @ head.T / temperature, -1)
    p = torch.softmax(dense / temperature, -1)
    exact = temperature**2 * (p * (p.log() - log_q)).sum(-1).mean()
    exact.backward()
    assert own.grad is not None
    return float(exact.detach()), own.grad


def student() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) * 0.5


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_tail_and_every_entry_are_those_of_the_dense_distribution(temperature: float, tmp_path: Path) -> None:
    dataset, dense = stored(tmp_path, KeepConfig(kind="topk", k=9, temperatures=[0.7, 2.0]))
    warm = at_temperature(dataset[0].sequence, temperature, dataset.info.codec)
    expected = torch.log_softmax(dense / temperature, -1)
    ids, logprobs = (x[1:] for x in warm.padded())
    own = np.take_along_axis(expected.numpy(), ids, 1)
    # What is left is the grid of 1/16 nat, divided by the temperature.
    assert np.abs(logprobs - own).max() < 0.05 / temperature
    assert (np.exp(logprobs.astype(np.float64)).sum(1) <= 1 + 1e-6).all()
    rest = 1 - np.exp(own).sum(1)
    np.testing.assert_allclose(np.exp(warm.log_tail[1:]), rest, atol=0.03)


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_loss_equals_the_dense_one(temperature: float, tmp_path: Path) -> None:
    """Everything kept: the fused loss on stored data is the dense KL at T, to the error of storing."""
    dataset, dense = stored(tmp_path, KeepConfig(kind="topk", k=VOCAB - 1, temperatures=[2.0, 0.7]))
    hidden, head = student()
    loss, gradient = loss_and_gradient(dataset, "ghost", hidden, head, temperature)
    exact, exact_gradient = dense_loss_and_gradient(dense, hidden, head, temperature)
    assert loss == pytest.approx(exact, rel=1e-3)
    assert float((gradient - exact_gradient).norm() / exact_gradient.norm()) < 0.03


@pytest.mark.parametrize(
    ("name", "temperature"),
    [(n, x) for n in OBJECTIVES if n not in LINEAR for x in (1.0, 2.0, 0.7) if x == 1.0 or n not in AT_1],
)
def test_on_a_hybrid_a_biased_objective_is_that_of_the_exact_entries(
    name: str, temperature: float, tmp_path: Path
) -> None:
    """A hybrid of 8 exact entries and draws trains on such an objective as a top 8 of the same text does."""
    hidden, head = student()
    results = []
    for keep in (KeepConfig(kind="hybrid", k=8, num_draws=20, temperatures=[2.0, 0.7]), _top(8)):
        dataset, _ = stored(tmp_path / keep.kind, keep)
        results.append(loss_and_gradient(dataset, dataset.info.tail, hidden, head, temperature, name))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 1e-4


@pytest.mark.parametrize(
    "settings", [{"kind": "hybrid", "k": 8, "num_draws": 200}, {"kind": "threshold", "threshold": 0.006}]
)
@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_gradient_of_draws_is_the_dense_one_on_average(
    temperature: float, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Along one direction at each of 400 positions: the difference is noise, and small beside what T^2 would change."""
    dataset, dense = stored(tmp_path, KeepConfig(**settings, temperatures=[2.0, 0.7]))
    hidden, head = student()
    _, gradient = loss_and_gradient(dataset, "draws", hidden, head, temperature)
    _, exact_gradient = dense_loss_and_gradient(dense, hidden, head, temperature)
    along = [(g * hidden).sum(-1) for g in (gradient, exact_gradient)]
    gap = along[0] - along[1]
    error = float(gap.std() / POSITIONS**0.5)
    assert abs(float(gap.mean())) < 4 * error < 0.1 * float(along[1].mean().abs())


@pytest.mark.parametrize("kind", ["topk", "hybrid", "threshold"])
def test_batches_hold_the_values_of_sequences(kind: str, tmp_path: Path) -> None:
    dataset, _ = stored(tmp_path, KeepConfig(kind=kind, k=5, num_draws=20, temperatures=[0.7, 2.0]))
    batch, warm = only_batch(dataset, 2.0), at_temperature(dataset[0].sequence, 2.0, dataset.info.codec)
    ids, logprobs = (x[1:] for x in warm.padded())
    assert batch.targets.temperature == 2.0
    assert np.array_equal(batch.targets.ids_CK.numpy(), ids)
    assert np.array_equal(batch.targets.logprobs_CK.numpy(), logprobs)
    assert np.array_equal(batch.targets.log_tail_C.numpy(), warm.log_tail[1:])
    assert not np.array_equal(only_batch(dataset, 1.0).targets.logprobs_CK.numpy(), logprobs)


def test_a_run_at_a_temperature_reports_the_divergence_times_its_square(tmp_path: Path) -> None:
    """The first step's loss, against the same student's dense one; and what was not captured is refused."""
    keep = KeepConfig(kind="topk", k=VOCAB - 1, temperatures=[2.0])
    dataset, dense = stored(tmp_path, keep)
    scratch = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=512, init_std=0.5)
    settings = {"student": scratch, "steps": 2, "warmup_steps": 0, "batch_tokens": 512, "context_tokens": 512}
    objective = {"weights": {"cross_entropy": 0.25, "forward_kl": 0.75}, "temperature": 2.0}
    train(TrainConfig(**settings, objective=objective), dataset.path, None, tmp_path / "run")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    model = build_student(scratch, dataset, 0)
    batch = only_batch(dataset, 1.0)
    with torch.no_grad():
        hidden = hidden_states(model, batch.input_ids, batch.position_ids)[0, batch.predictor_M].double()
    exact, _ = dense_loss_and_gradient(dense, hidden, head_of(model).detach().double(), 2.0)
    assert line["forward_kl"] == pytest.approx(exact, rel=2e-3)
    nll = torch.nn.functional.cross_entropy(hidden @ head_of(model).detach().double().T, batch.targets.token_ids_C)
    assert line["cross_entropy"] == pytest.approx(float(nll), rel=1e-5)
    assert line["loss"] == pytest.approx(0.25 * line["cross_entropy"] + 0.75 * line["forward_kl"], rel=1e-6)
    with pytest.raises(ConfigError, match=r"log-sum-exp only at \[1\.0, 2\.0\].*--set temperatures=\[3\.0\]"):
        train(TrainConfig(**settings, objective={**objective, "temperature": 3.0}), dataset.path, None, tmp_path / "no")


def test_draws_are_unbiased_at_the_other_temperature(tmp_path: Path) -> None:
    """A random test function's mean under the tempered weights, over all positions: within four standard errors."""
    dataset, dense = stored(tmp_path, KeepConfig(kind="hybrid", k=3, num_draws=60, temperatures=[2.0]))
    warm = at_temperature(dataset[0].sequence, 2.0, dataset.info.codec)
    values = np.random.default_rng(0).normal(size=VOCAB)
    ids, logprobs = (x[1:] for x in warm.padded())
    estimate_M = np.where(ids >= 0, np.exp(logprobs.astype(np.float64)) * values[ids], 0).sum(1)
    gap = estimate_M - torch.softmax(dense / 2.0, -1).numpy() @ values
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap))


def test_a_temperature_that_was_not_captured_is_refused(tmp_path: Path) -> None:
    dataset, _ = stored(tmp_path, KeepConfig(kind="topk", k=9, temperatures=[2.0]))
    assert at_temperature(dataset[0].sequence, 1.0, dataset.info.codec).log_tail is not None
    with pytest.raises(ConfigError, match=r"capture with --set temperatures=\[3.0\]"):
        at_temperature(dataset[0].sequence, 3.0, dataset.info.codec)
