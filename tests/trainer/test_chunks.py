"""ALM: value and gradient against a dense float64 softmax, chunks against a plain loop, and training from text to student."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdata
from kdata.errors import ConfigError
from kdata.jobs.retokenize import RetokenizeConfig, retokenize
from kdata.trainer import fused
from kdata.trainer.chunks import chunk_loss, chunks_of
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss, distillation_loss_of_logits
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.train import train
from tests.tokenizers_of_kinds import byte_tokenizer, saved
from tests.trainer.oracle import Problem, make_problem

T = 100.0


def chunked(seed: int = 0, dtype: torch.dtype = torch.float64, positions: int = 9) -> Problem:
    """A problem whose positions belong to chunks of one to three tokens."""
    problem = make_problem(positions, seed=seed, dtype=dtype)
    rng = torch.Generator().manual_seed(seed + 1)
    ends = torch.rand(positions, generator=rng) < 0.6
    actual = torch.where(ends, -3 * torch.rand(positions, generator=rng), 0.0).float()
    predictor = torch.arange(positions) + (torch.arange(positions) >= 5).long()  # a gap: another document
    targets = replace(problem.targets, actual_logprobs_C=actual, chunk_C=chunks_of(predictor, actual))
    return replace(problem, targets=targets)


def dense(problem: Problem, temperature: float = T) -> Tensor:
    """The sum over chunks, written out."""
    log_q = torch.log_softmax(problem.hidden.double() @ problem.head.double().T, -1)
    log_q = log_q.gather(1, problem.targets.token_ids_C[:, None])[:, 0]
    total = log_q.new_zeros(())
    assert problem.targets.chunk_C is not None and problem.targets.actual_logprobs_C is not None
    for chunk in problem.targets.chunk_C.unique():
        own = problem.targets.chunk_C == chunk
        p = (problem.targets.actual_logprobs_C[own].double().sum() / temperature).exp()
        q = (log_q[own].sum() / temperature).exp()
        rest = (1 - p) * ((1 - p).log() - (1 - q).log()) if p < 1 else 0.0
        total = total + temperature * (p * (p.log() - q.log()) + rest)
    return total


@pytest.mark.parametrize("temperature", [100.0, 1.0, 7.5])
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_a_dense_softmax(seed: int, temperature: float) -> None:
    problem = chunked(seed)
    config = ObjectiveConfig(weights={"alm": 0.7, "cross_entropy": 0.2, "forward_kl": 0.5}, alm_temperature=temperature)
    rest = config.model_copy(update={"weights": {"cross_entropy": 0.2, "forward_kl": 0.5}})
    loss = distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost", chunk_positions=4)
    without = distillation_loss(problem.hidden, problem.head, problem.targets, rest, "ghost")
    wanted = without.total + 0.7 * dense(problem, temperature) / len(problem.targets)
    assert float(loss.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9)
    ours = torch.autograd.grad(loss.total, [problem.hidden, problem.head])
    theirs = torch.autograd.grad(wanted, [problem.hidden, problem.head])
    for own, other in zip(ours, theirs, strict=True):
        assert (own - other).abs().max() < 1e-9 * other.abs().max()
    assert loss.names == ("alm", "cross_entropy", "forward_kl")
    assert float(loss.values_MO[:, 0].sum()) == pytest.approx(float(dense(problem, temperature).detach()), rel=1e-9)
    torch.testing.assert_close(loss.values_MO[:, 1:], without.values_MO)


def test_alone_of_logits_and_with_positions_elsewhere() -> None:
    """Positions without entries count too: a chunk needs none."""
    problem, config = chunked(3), ObjectiveConfig(weights={"alm": 1.0})
    chosen = torch.arange(len(problem.targets)) % 2 == 0
    empty = problem.targets.ids_CK.masked_fill(~chosen[:, None], -1)
    logprobs = problem.targets.logprobs_CK.masked_fill(~chosen[:, None], -math.inf)
    some = replace(problem.targets, chosen_C=chosen, ids_CK=empty, logprobs_CK=logprobs)
    logits = problem.hidden @ problem.head.T
    for loss in (
        distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost"),
        distillation_loss(problem.hidden, problem.head, some, config, "ghost"),
        distillation_loss_of_logits(logits, some, config, "ghost"),
    ):
        assert float(loss.total) == pytest.approx(float(dense(problem)) / len(some), rel=1e-9) and loss.names == (
            "alm",
        )
        (gradient,) = torch.autograd.grad(loss.total, [problem.hidden], retain_graph=True)
        (wanted,) = torch.autograd.grad(dense(problem) / len(some), [problem.hidden])
        assert (gradient - wanted).abs().max() < 1e-9 * wanted.abs().max()


def test_the_vocabulary_is_passed_over_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the log-probabilities, which other objectives share, and once for the gradient; without one, once."""
    passes, real = [], fused._logit_chunks
    monkeypatch.setattr(fused, "_logit_chunks", lambda *given: passes.append(1) or real(*given))  # type: ignore[func-returns-value]
    problem = chunked()
    for weights in ({"alm": 1.0}, {"alm": 1.0, "forward_kl": 1.0}):
        passes.clear()
        distillation_loss(problem.hidden, problem.head, problem.targets, ObjectiveConfig(weights=weights), "ghost")
        assert len(passes) == 2
        with torch.no_grad():
            config = ObjectiveConfig(weights=weights)
            loss = distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost")
        assert len(passes) == 3 and float(loss.values_MO[:, 0].sum()) == pytest.approx(
            float(dense(problem).detach()), rel=1e-9
        )


def test_a_student_that_agrees_has_no_loss_and_no_gradient() -> None:
    problem = chunked(5)
    log_q = torch.log_softmax(problem.hidden @ problem.head.T, -1).gather(1, problem.targets.token_ids_C[:, None])[:, 0]
    agreed = replace(problem.targets, actual_logprobs_C=log_q.detach(), chunk_C=torch.arange(len(log_q)))
    values, slope = chunk_loss(log_q.detach(), agreed, T)
    assert values.abs().max() < 1e-12 and slope.abs().max() < 1e-12


def test_a_student_that_is_sure_has_a_finite_loss() -> None:
    targets = replace(
        chunked().targets.rows(slice(0, 2)), actual_logprobs_C=torch.tensor([-2.0, 0.0]), chunk_C=torch.tensor([0, 1])
    )
    values, slope = chunk_loss(torch.zeros(2), targets, T)
    assert torch.isfinite(values).all() and torch.isfinite(slope).all()
    assert values[1] == 0 and slope[1] == -1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_chunks_are_those_of_a_plain_loop(steps: list[tuple[bool, bool]]) -> None:
    predictor, logprob, at = [], [], 0
    for is_end, gap in steps:
        predictor.append(at)
        logprob.append(-1.0 if is_end else 0.0)
        at += 3 if gap else 1
    expected, number = [], 0
    for place, (is_end, gap) in enumerate(steps):
        expected.append(number)
        number += is_end or gap
        assert place == len(expected) - 1
    assert chunks_of(torch.tensor(predictor), torch.tensor(logprob)).tolist() == expected


def test_what_is_not_known_is_refused() -> None:
    problem, config = chunked(), ObjectiveConfig(weights={"alm": 1.0})
    unknown = replace(problem.targets, actual_logprobs_C=torch.full((len(problem.targets),), math.nan))
    with pytest.raises(ConfigError, match="does not hold"):
        distillation_loss(problem.hidden, problem.head, unknown, config, "ghost")
    with pytest.raises(ConfigError, match="chunk_C"):
        bare = replace(problem.targets, chunk_C=None)
        distillation_loss(problem.hidden, problem.head, bare, config, "ghost")
    with pytest.raises(ConfigError, match="weights to single positions"):
        weighted = replace(problem.targets, weights_C=torch.ones(len(problem.targets)))
        distillation_loss(problem.hidden, problem.head, weighted, config, "ghost")


@pytest.fixture(scope="module")
def retokenized(tmp_path_factory: pytest.TempPathFactory, captured_once: Path) -> Path:
    folder = tmp_path_factory.mktemp("retokenized")
    config = RetokenizeConfig(tokenizer=str(saved(byte_tokenizer(), folder / "bytes")))
    return retokenize(folder / "dataset", kdata.open(captured_once), config)[0].path


@pytest.mark.parametrize("weights", [{"alm": 1.0}, {"forward_kl": 0.5, "alm": 0.5, "cross_entropy": 0.1}])
def test_a_student_of_bytes_learns_from_a_teacher_of_words(
    retokenized: Path, tmp_path: Path, weights: dict[str, float]
) -> None:
    """From a dataset of another tokenizer; micro-batches change nothing."""
    losses = []
    for micro in (2048, 512):
        config = TrainConfig(
            student=ScratchStudent(hidden_size=32, num_layers=1, num_heads=2), steps=6, batch_tokens=2048,
            micro_batch_tokens=micro, context_tokens=512, warmup_steps=1, learning_rate=1e-2, log_every_steps=1,
            objective=ObjectiveConfig(weights=weights), precision="fp32",
        )  # fmt: skip
        train(config, retokenized, None, tmp_path / str(micro))
        lines = [json.loads(line) for line in (tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert lines[-1]["alm"] < lines[0]["alm"]
        if set(weights) == {"alm"}:  # every target counts, with entries or without
            assert [line["alm"] for line in lines] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
