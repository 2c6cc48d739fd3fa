"""Students learn from combined payloads: the fused loss against the dense float64 one of the average of two teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdata
from kdata.errors import ConfigError
from kdata.jobs.combine import CombineConfig, combine
from kdata.jobs.job import LocalEngine
from kdata.jobs.reread import reread_with
from kdata.loader.batches import BatchesConfig
from kdata.teachers.model import load_tokenizer
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.evaluate import _first_choice, evaluate
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import ObjectiveConfig, resolve_tail
from kdata.trainer.student import build_student
from kdata.trainer.train import train
from tests.fakes import VOCAB, StandInTeacher, run_capture
from tests.trainer.oracle import Problem, kl, oracle_values

SHARES = (0.3, 0.7)


def combined(root: Path, corpus: Path, tokenizer: Path, **settings: Any) -> list[kdata.Dataset]:
    """The average of two stand-in teachers, and the payload of the first."""
    one = run_capture(root / "one", corpus, tokenizer, teacher=StandInTeacher("one"), **settings)
    two = reread_with(root / "two", LocalEngine(StandInTeacher("two"), load_tokenizer(tokenizer)), one)
    return [combine(root / "out", [one, two], CombineConfig(weights=list(SHARES)))[0], one]


def batch_of(dataset: kdata.Dataset) -> tuple[Batch, np.ndarray]:
    """All rows in one batch, and the dense float64 average of the teachers at its M counted positions."""
    [batch] = Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=64)).epoch()
    dense = []
    for document, row in enumerate(batch.rows):
        ids = dataset[int(row)].token_ids
        p_TV = sum(s * np.exp(StandInTeacher(n).dense(ids)) for s, n in zip(SHARES, ("one", "two"), strict=True))
        assert (batch.document_M == document).sum() == len(ids) - 1
        dense.append(p_TV[1:])
    return batch, np.concatenate(dense)


def student(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and a head, float64."""
    rng = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(positions, 12, generator=rng, dtype=torch.float64)
    return hidden_MD.requires_grad_(), torch.randn(VOCAB, 12, generator=rng, dtype=torch.float64)


def test_objectives_that_draws_bias_are_refused(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    """Two hybrids need not share an exact entry, so their average promises none."""
    dataset, _ = combined(tmp_path, corpus_file, tokenizer_dir, kind="hybrid", k=8)
    config = TrainConfig(objective=ObjectiveConfig(weights={"jsd": 1.0}), steps=2, warmup_steps=1)
    with pytest.raises(ConfigError, match=r"jsd is not linear.*'combined'"):
        train(config, dataset.path, None, tmp_path / "run")


def loss_of(
    batch: Batch, hidden_MD: torch.Tensor, head_VD: torch.Tensor, tail: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward KL at each position, and the gradient of its mean by the hidden states."""
    config = ObjectiveConfig(weights={"forward_kl": 1.0})
    loss = distillation_loss(hidden_MD, head_VD, batch.targets, config, resolve_tail(config, tail))  # type: ignore[arg-type]
    return loss.values_MO[:, 0], torch.autograd.grad(loss.total, hidden_MD)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> kdata.Dataset:
    """Nearly all of the vocabulary is kept, so that the bucket holds next to nothing."""
    return combined(tmp_path_factory.mktemp("whole"), corpus_file, tokenizer_dir, kind="topk", k=290)[0]


def test_the_loss_on_kept_entries_and_tails_is_that_of_the_average(whole: kdata.Dataset) -> None:
    """Value and gradient, against the full vocabulary; what is left is the grid of 1/16 nat, twice."""
    batch, p_MV = batch_of(whole)
    hidden_MD, head_VD = student(len(p_MV))
    values_M, grad_MD = loss_of(batch, hidden_MD, head_VD, "ghost")
    log_q_MV = torch.log_softmax(hidden_MD @ head_VD.T, -1)
    dense_M = kl(torch.from_numpy(p_MV), log_q_MV.exp())
    want_MD = torch.autograd.grad(dense_M.mean(), hidden_MD)[0]
    torch.testing.assert_close(values_M.double(), dense_M.detach(), rtol=0.02, atol=0.02)
    assert float(values_M.mean()) == pytest.approx(float(dense_M.mean()), rel=1e-3)
    assert float((grad_MD - want_MD).norm() / want_MD.norm()) < 0.02


@pytest.mark.parametrize(
    ("kind", "tail"), [("topk", "ghost"), ("hybrid", "draws"), ("sampled", "draws"), ("threshold", "draws")]
)
def test_the_loss_is_the_formula_on_stored_entries(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, kind: str, tail: str
) -> None:
    dataset, _ = combined(tmp_path, corpus_file, tokenizer_dir, kind=kind)
    assert dataset.info.tail == tail
    batch, p_MV = batch_of(dataset)
    hidden_MD, head_VD = student(len(p_MV))
    values_M, _ = loss_of(batch, hidden_MD, head_VD, tail)
    problem = Problem(hidden_MD, head_VD, torch.from_numpy(p_MV), batch.targets)
    want_M = oracle_values(problem, "forward_kl", tail).detach()
    torch.testing.assert_close(values_M.double(), want_M, rtol=1e-5, atol=1e-5)


def test_draws_give_the_gradient_of_full_distillation_from_the_average(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    """The mean of what is linear in the weights is within 4 standard deviations; the gradient is near, one teacher's far."""
    dataset, one = combined(tmp_path, corpus_file, tokenizer_dir, kind="hybrid", k=8, num_draws=64)
    batch, p_MV = batch_of(dataset)
    hidden_MD, head_VD = student(len(p_MV))
    log_q_MV = torch.log_softmax(hidden_MD @ head_VD.T, -1)
    targets = batch.targets
    weights_MK = targets.logprobs_CK.double().exp()
    drawn_M = (weights_MK * log_q_MV.gather(1, targets.ids_CK.clamp_min(0))).sum(-1).detach()
    errors_M = drawn_M - (torch.from_numpy(p_MV) * log_q_MV).sum(-1).detach()
    assert float(errors_M.sum().abs() / errors_M.square().sum().sqrt()) < 4
    want_MD = torch.autograd.grad(kl(torch.from_numpy(p_MV), log_q_MV.exp()).mean(), hidden_MD)[0]

    def angle(dataset: kdata.Dataset) -> float:
        grad_MD = loss_of(batch_of(dataset)[0], hidden_MD, head_VD, "draws")[1]
        cosine = (grad_MD * want_MD).sum() / (grad_MD.norm() * want_MD.norm())
        return float(torch.rad2deg(torch.arccos(cosine)))

    assert angle(dataset) < 10 < 15 < angle(one)


def test_a_student_is_evaluated_on_a_combination(tmp_path: Path, whole: kdata.Dataset) -> None:
    """The teacher's first choice and its calibration need no ranks, which a combination does not have."""
    model = build_student(ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64), whole, 0)
    model.save_pretrained(tmp_path / "model")
    result = evaluate(tmp_path / "model", whole.path)
    batch, p_MV = batch_of(whole)
    assert result["kl_is"].startswith("approximate")
    confidence_M, hit_M = p_MV.max(-1), p_MV.argmax(-1) == batch.targets.token_ids_C.numpy()
    bins_M = np.minimum((confidence_M * 15).astype(int), 14)
    gaps = [abs((confidence_M - hit_M)[bins_M == b].sum()) for b in range(15)]
    assert result["overall"]["teacher_ece"] == pytest.approx(sum(gaps) / len(p_MV), abs=0.02)
    assert (_first_choice(batch, combined=True)[0] == p_MV.argmax(-1)).mean() > 0.95
    assert not batch.rank_M.any()


def test_what_one_teacher_alone_knows_can_be_the_first_choice(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    """It is stored as a draw, as the other teacher's part is not exact; the first exact entry is seldom the likeliest."""
    batch, p_MV = batch_of(combined(tmp_path, corpus_file, tokenizer_dir, kind="hybrid", k=16)[0])
    agreement = [(_first_choice(batch, combined=flag)[0] == p_MV.argmax(-1)).mean() for flag in (True, False)]
    assert agreement[0] > 0.9 > agreement[1] + 0.2


def test_combined_draws_alone_give_no_bounds(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    """Reverse KL and total variation need exact entries: the average of samples has none, that of the others has."""
    measured, alone = {}, {}
    for kind in ("sampled", "hybrid", "threshold"):
        dataset, one = combined(tmp_path / kind, corpus_file, tokenizer_dir, kind=kind)
        model = build_student(ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64), dataset, 0)
        model.save_pretrained(tmp_path / kind / "model")
        measured[kind] = evaluate(tmp_path / kind / "model", dataset.path)
        alone[kind] = evaluate(tmp_path / kind / "model", one.path)["overall"]
    assert measured["sampled"]["overall"]["tv"] is None and measured["sampled"]["bounds_are"] is None
    for kind in ("hybrid", "threshold"):
        assert measured[kind]["overall"]["tv"] > 0 and measured[kind]["bounds_are"].startswith("lower bounds")
        assert alone[kind]["tv"] > 0
    # Of one teacher's hybrid the first choice is an exact entry, and of its draws by need too: the same calibration.
    assert alone["sampled"]["teacher_ece"] is None
    assert alone["threshold"]["teacher_ece"] == pytest.approx(alone["hybrid"]["teacher_ece"], abs=0.02)
