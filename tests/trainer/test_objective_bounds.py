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


def reference_adaptive(p: Tensor, q: Tensor, head: float) -> Tensor:
    """As its authors compute it over the whole vocabulary: the share of the head in the gaps."""
    falling, order = p.sort(dim=-1, descending=True)
    gaps = (falling - q.gather(-1, order)).abs()
    in_tail = falling.cumsum(-1) > head
    in_tail[:, 0] = False
    return (gaps * ~in_tail).sum(-1) / gaps.sum(-1)


@pytest.mark.parametrize("head", [0.3, 0.5, 0.9])
def test_adaptive_kl_is_the_authors_where_everything_is_kept(head: float) -> None:
    problem = make_problem(40, kept=VOCAB, ragged=False)
    p, q = full(problem)
    share = reference_adaptive(p, q, head)
    assert share.std() > 0.05
    want = share * kl(p, q) + (1 - share) * kl(q, p)
    torch.testing.assert_close(values(problem, "adaptive_kl", adaptive_head=head), want)


def test_adaptive_kl_has_at_least_the_full_share_of_forward_kl() -> None:
    """Where the kept entries hold the head. The share follows from the values of both divergences."""
    problem = make_problem(60, kept=6, ragged=False)
    holds_head = problem.targets.logprobs_CK.exp().sum(-1) > 0.5
    forward, reverse, both = (values(problem, name) for name in ("forward_kl", "reverse_kl", "adaptive_kl"))
    share, whole = (both - reverse) / (forward - reverse), reference_adaptive(*full(problem), 0.5)
    assert holds_head.sum() > 20
    assert (share >= whole - 1e-9)[holds_head].all() and (share > whole + 1e-3)[holds_head].any()


def test_tail_aware_kl_at_weight_1_is_forward_kl() -> None:
    problem = make_problem(40)
    for tail in ("ghost", "renormalise"):
        forward = values(problem, "forward_kl", tail)
        torch.testing.assert_close(values(problem, "tail_aware_kl", tail, tail_weight=1.0), forward)
        assert not torch.allclose(values(problem, "tail_aware_kl", tail), forward)


@pytest.mark.parametrize("weight", [0.1, 2.0, 30.0])
def test_tail_aware_kl_weighs_the_masses_alone_and_stays_least_at_the_teacher(weight: float) -> None:
    """With one entry kept it is w KL of the masses; where the student is the teacher, value and gradient are 0 at every w."""
    problem = make_problem(5, kept=1, ragged=False)
    masses = [values(problem, "tail_aware_kl", tail_weight=w) for w in (1.0, weight)]
    torch.testing.assert_close(masses[1], weight * masses[0])
    teacher = make_problem(5, hidden_size=VOCAB, kept=6, ragged=False)
    teacher = dataclasses.replace(teacher, hidden=teacher.p.log(), head=torch.eye(VOCAB, dtype=torch.float64))
    teacher.hidden.requires_grad_()
    config = ObjectiveConfig(weights={"tail_aware_kl": 1.0}, tail_weight=weight)
    loss = distillation_loss(teacher.hidden, teacher.head, teacher.targets, config, "ghost")
    (gradient,) = torch.autograd.grad(loss.total, teacher.hidden)
    assert loss.values_MO.abs().max() < 1e-12 and gradient.abs().max() < 1e-12
