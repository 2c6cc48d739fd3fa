"""What each objective has of the whole distribution: equal where everything is kept, and how far off where it is not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from kdata.trainer.fused import distillation_loss
from kdata.trainer.objective_config import ObjectiveConfig
from tests.trainer.oracle import Problem, kl, make_problem

VOCAB = 23


def values(problem: Problem, name: str, tail: Any = "ghost", **settings: Any) -> Tensor:
    """One objective at each position, at temperature 1."""
    config = ObjectiveConfig(weights={name: 1.0}, **settings)
    return distillation_loss(problem.hidden, problem.head, problem.targets, config, tail).values_MO[:, 0]


def full(problem: Problem) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's whole distribution, float64 [M, V]."""
    return problem.p, torch.softmax(problem.hidden.detach() @ problem.head.detach().T, -1)


def towards(problem: Problem, share: float) -> Problem:
    """The same teacher before a student whose logits are `share` times as large: below 1 less certain, above 1 more."""
    return dataclasses.replace(problem, hidden=problem.hidden.detach() * share)


@pytest.mark.parametrize("share", [0.1, 4.0])
def test_balanced_kl_has_more_forward_kl_where_the_student_is_too_certain(share: float) -> None:
    problem = towards(make_problem(40, kept=VOCAB, ragged=False), share)
    p, q = full(problem)
    too_certain = torch.special.entr(p).sum(-1) > torch.special.entr(q).sum(-1)
    assert too_certain.double().mean() > 0.8 if share > 1 else too_certain.double().mean() < 0.2
    forward, reverse = kl(p, q), kl(q, p)
    want = torch.where(too_certain, 3 * forward + reverse, forward + 3 * reverse)
    torch.testing.assert_close(values(problem, "balanced_kl", balanced_delta=3.0), want)
    torch.testing.assert_close(values(problem, "balanced_kl", balanced_delta=1.0), forward + reverse)


def test_balanced_kl_is_at_most_delta_times_the_sum_of_the_full_divergences() -> None:
    problem = make_problem(40, kept=4, ragged=False)
    p, q = full(problem)
    got, whole = values(problem, "balanced_kl"), kl(p, q) + kl(q, p)
    parts = values(problem, "forward_kl") + values(problem, "reverse_kl")
    assert (got >= parts).all() and (got <= 2 * parts).all() and (parts <= whole + 1e-12).all()
