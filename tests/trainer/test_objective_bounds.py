"""What each objective has of the whole distribution: equal where everything is kept, and how far off where it is not."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from kdata.errors import ConfigError
from kdata.format.keep import KeepConfig
from kdata.format.records import Record
from kdata.selection.plan import make_plan
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import OBJECTIVES, Targets
from kdata.trainer.parts import Collator, PackedRows, attach_loss
from kdata.trainer.parts.student import loss_of
from kdata.trainer.student import build_student
from kdata.trainer.train import train
from tests.trainer import datasets
from tests.trainer.oracle import Problem, kl, make_problem
from tests.trainer.test_temperature import only_batch, stored

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


def test_taid_rises_with_t_to_forward_kl_so_it_is_at_most_the_full_one() -> None:
    problem = make_problem(40, kept=6, ragged=False)
    shares = (0.0, 0.2, 0.4, 0.7, 0.9, 1.0)
    rising = [values(problem, "taid", taid_t=t) for t in shares]
    torch.testing.assert_close(rising[0], torch.zeros_like(rising[0]))
    torch.testing.assert_close(rising[-1], values(problem, "forward_kl"))
    for one, next_one in pairwise(rising):
        assert (next_one >= one - 1e-12).all()
    assert (rising[-1] <= kl(*full(problem)) + 1e-12).all()


def test_taid_is_the_full_one_where_everything_is_kept() -> None:
    problem = make_problem(40, kept=VOCAB, ragged=False)
    p, q = full(problem)
    target = torch.softmax(0.6 * (problem.hidden @ problem.head.T).detach() + 0.4 * p.log(), -1)
    torch.testing.assert_close(values(problem, "taid", taid_t=0.4), kl(target, q))


def test_plackett_luce_is_that_of_the_vocabulary_where_everything_is_kept() -> None:
    problem = make_problem(40, kept=VOCAB, ragged=False)
    p, logits = problem.p, problem.hidden @ problem.head.T
    first = torch.zeros_like(p).scatter(1, problem.targets.token_ids_C[:, None], 1.0)
    order = (p + first).argsort(-1, descending=True)
    scores = logits.gather(1, order)
    left = torch.stack([scores[:, k:].logsumexp(-1) for k in range(VOCAB)], -1)
    want = (p.gather(1, order) * (left - scores)).sum(-1)
    torch.testing.assert_close(values(problem, "plackett_luce"), want, rtol=1e-9, atol=1e-9)


def test_plackett_luce_puts_the_actual_token_first_kept_or_not() -> None:
    """Two entries and the bucket; the same position with each of them as the actual token."""
    problem = make_problem(1, kept=2, ragged=False)
    targets = problem.targets
    p = torch.cat([targets.logprobs_CK[0], targets.log_tail_C]).exp()
    q = torch.softmax(problem.hidden @ problem.head.T, -1)[0]
    kept = targets.ids_CK[0].tolist()
    other = next(v for v in range(VOCAB) if v not in kept)
    q = torch.stack([q[kept[0]], q[kept[1]], 1 - q[kept].sum()])
    got = []
    for token, order in ((kept[0], [0, 1, 2]), (kept[1], [1, 0, 2]), (other, [2, 0, 1])):
        one = dataclasses.replace(targets, token_ids_C=torch.tensor([token]))
        got.append(values(dataclasses.replace(problem, targets=one), "plackett_luce"))
        a, b, _ = order
        torch.testing.assert_close(got[-1][0], -(p[a] * q[a].log() + p[b] * (q[b] / (1 - q[a])).log()))
    assert len({round(float(x), 6) for x in got}) == 3


@pytest.mark.parametrize("c", [0.05, 0.3, 1.0])
def test_first_is_exact_where_five_entries_are_kept(c: float) -> None:
    """And 0 for a student that has the recalibrated probabilities among the five, whatever it has elsewhere."""
    want = None
    for kept in (VOCAB, 9, 5):
        problem = make_problem(40, kept=kept, ragged=False)
        got = values(problem, "first", first_c=c)
        want = got if want is None else want
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    p, q = full(problem)
    top, ids = p.topk(5)
    student = q.gather(1, ids) / q.gather(1, ids).sum(-1, keepdim=True)
    torch.testing.assert_close(want, kl(torch.softmax(top / c, -1), student), rtol=1e-9, atol=1e-12)
    logits = (problem.hidden @ problem.head.T).detach().scatter(1, ids, top / c)
    own = dataclasses.replace(problem, hidden=logits, head=torch.eye(VOCAB, dtype=torch.float64))
    assert values(own, "first", first_c=c).abs().max() < 1e-12


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 0.6), (0.3, 0.8), (0.0, 1.0)])
def test_dac_kl_is_exact_where_the_kept_entries_reach_the_upper_bound(lower: float, upper: float) -> None:
    whole, sparse = (make_problem(60, kept=kept, ragged=False) for kept in (VOCAB, 8))
    p, q = full(whole)
    falling, order = p.sort(dim=-1, descending=True)
    before = falling.cumsum(-1) - falling
    inside = ((before >= lower - 1e-12) & (before < upper - 1e-12)).double()
    left_p, left_q = falling * inside, q.gather(1, order) * inside
    some = inside.any(-1)
    want = kl(left_p / left_p.sum(-1, keepdim=True), left_q / left_q.sum(-1, keepdim=True))
    got = values(whole, "dac_kl", dac_lower=lower, dac_upper=upper)
    torch.testing.assert_close(got[some], want[some], rtol=1e-9, atol=1e-12)
    assert (got[~some] == 0).all() and some.sum() > 20 and (some.all() or lower > 0)
    reach = sparse.targets.logprobs_CK.exp().sum(-1) >= upper
    kept = values(sparse, "dac_kl", dac_lower=lower, dac_upper=upper)
    torch.testing.assert_close(kept[reach], got[reach], rtol=1e-9, atol=1e-12)
    assert reach.sum() > 20 or upper == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_uld_is_exact_where_all_is_kept_and_else_a_lower_bound_that_rises(seed: int) -> None:
    """With more entries kept; and it is 0 where the student has the same probabilities of other tokens."""
    whole = make_problem(40, kept=VOCAB, ragged=False, seed=seed)
    p, q = full(whole)
    want = (p.sort(dim=-1)[0] - q.sort(dim=-1)[0]).abs().sum(-1)
    torch.testing.assert_close(values(whole, "uld"), want, rtol=1e-9, atol=1e-12)
    before = torch.zeros_like(want)
    for kept in (0, 1, 3, 9, VOCAB):
        got = values(make_problem(40, kept=kept, ragged=False, seed=seed), "uld")
        assert (got >= before - 1e-12).all() and (got <= want + 1e-12).all()
        before = got
    other = dataclasses.replace(whole, hidden=p.log().roll(1, -1), head=torch.eye(VOCAB, dtype=torch.float64))
    assert values(other, "uld").abs().max() < 1e-12 < float(values(other, "forward_kl").min())


def test_gold_weights_that_are_all_0_are_refused() -> None:
    with pytest.raises(ValueError, match="both 0"):
        ObjectiveConfig(weights={"gold": 1.0}, gold_weights=(0.0, 0.0))


def test_dac_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="must be the smaller one"):
        ObjectiveConfig(weights={"dac_kl": 1.0}, dac_lower=0.9, dac_upper=0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_a_mix_with_forward_kl_is_the_cross_entropy_with_a_mixed_target(alpha: float) -> None:
    """(1 - alpha) cross-entropy + alpha forward KL has the gradient of PS-KD's target, (1 - alpha) one-hot + alpha p."""
    problem = make_problem(40, kept=VOCAB, ragged=False)
    config = ObjectiveConfig(weights={"cross_entropy": 1 - alpha, "forward_kl": alpha})
    loss = distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost")
    one_hot = torch.nn.functional.one_hot(problem.targets.token_ids_C, VOCAB).double()
    target = (1 - alpha) * one_hot + alpha * problem.p
    want = -(target * torch.log_softmax(problem.hidden @ problem.head.T, -1)).sum(-1).mean()
    gradients = (torch.autograd.grad(total, problem.hidden)[0] for total in (loss.total, want))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- deviation_kl


def test_deviation_kl_is_forward_kl_by_the_entropy_of_the_whole_teacher() -> None:
    problem = make_problem(40, kept=4, ragged=False)
    p, q = full(problem)
    forward = values(problem, "forward_kl")
    torch.testing.assert_close(values(problem, "deviation_kl", deviation_gamma=0.0), forward)
    share = torch.special.entr(p).sum(-1) / torch.log(torch.tensor(float(VOCAB)))
    for gamma in (0.1, 1.0, 2.0):
        got = values(problem, "deviation_kl", deviation_gamma=gamma)
        torch.testing.assert_close(got, share**gamma * forward)
        assert (got <= share**gamma * kl(p, q) + 1e-12).all()


def test_on_draws_deviation_kl_has_the_gradient_of_the_whole_teacher_on_average() -> None:
    """400 positions of one teacher and one student, each with 50 draws of its own; in standard errors of their mean."""
    one = make_problem(1, seed=2)
    p, hidden, head = one.p[0], one.hidden.detach(), one.head.detach()
    rounds, draws = 400, 50
    counts = torch.zeros(rounds, VOCAB, dtype=torch.float64)
    drawn = torch.multinomial(p.expand(rounds, -1), draws, True, generator=torch.Generator().manual_seed(0))
    weights, ids = (counts.scatter_add_(1, drawn, torch.ones_like(drawn).double()) / draws).topk(VOCAB, dim=-1)
    entropy = torch.special.entr(p).sum()
    targets = Targets(
        torch.zeros(rounds, dtype=torch.int64), ids.masked_fill(weights == 0, -1), weights.log(),
        torch.full((rounds,), -torch.inf, dtype=torch.float64), entropy_C=entropy.expand(rounds),
    )  # fmt: skip
    hidden_MD = hidden.expand(rounds, -1).clone().requires_grad_()
    config = ObjectiveConfig(weights={"deviation_kl": 1.0})
    loss = distillation_loss(hidden_MD, head, targets, config, "draws", counted_tokens=1)
    (gradients,) = torch.autograd.grad(loss.total, hidden_MD)
    share = entropy / torch.log(torch.tensor(float(VOCAB)))
    want = share * (torch.softmax(hidden[0] @ head.T, -1) - p) @ head
    error = gradients.std(0) / rounds**0.5
    assert ((gradients.mean(0) - want).abs() < 4.5 * error).all() and (error < 0.1 * want.norm()).all()


@pytest.mark.parametrize("keep", [KeepConfig(kind="topk", k=5), KeepConfig(kind="sampled", num_draws=20)])
def test_the_entropy_of_stored_data_is_that_of_the_whole_teacher(keep: KeepConfig, tmp_path: Path) -> None:
    dataset, log_p = stored(tmp_path, keep)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(only_batch(dataset, 1.0).targets.entropy_C.double(), entropy, rtol=0.01, atol=0.01)


def test_deviation_kl_is_refused_without_the_entropy_of_every_position() -> None:
    problem = make_problem()
    for entropy, message in ((None, "entropy_C of the targets is None"), (torch.nan, "do not hold at every position")):
        entropy_C = None if entropy is None else problem.targets.entropy_C.index_fill(0, torch.tensor([3]), entropy)
        other = dataclasses.replace(problem, targets=dataclasses.replace(problem.targets, entropy_C=entropy_C))
        with pytest.raises(ConfigError, match=message):
            values(other, "deviation_kl")
        values(other, "forward_kl")


def test_rows_without_the_entropy_are_refused_before_training(tmp_path: Path) -> None:
    """Two of 9 rows, whose entropy is not known at one target or at any; a plan of the others is read."""
    real, bare = datasets._record, {"doc-3": slice(2, 3), "doc-7": slice(None)}

    def record(name: str, *arguments: Any) -> Record:
        made = real(name, *arguments)
        if name in bare:
            made.entropy[bare[name]] = np.nan
        return made

    with mock.patch.object(datasets, "_record", record):
        dataset = datasets.make_dataset(tmp_path / "set", [9] * 9)
    for objective in ({"weights": {"deviation_kl": 1.0}}, {"weights": {"forward_kl": 1.0, "deviation_kl": 0.0}}):
        with pytest.raises(ConfigError, match=r"does not hold it in 2 of 9 rows, the first of them 'doc-3'"):
            PackedRows(dataset, items=4, objective=objective)
        with pytest.raises(ConfigError, match=r"does not hold it in 2 of 9 rows"):
            train(TrainConfig(objective=objective, context_tokens=64), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    others = [f"doc-{i}" for i in range(9) if f"doc-{i}" not in bare]
    plan = make_plan(dataset, "known", others, method="mine", parameters={})
    PackedRows(dataset, plan, items=4, objective=objective)


# ------------------------------------------------------------------------------------------------------------------- in use


@pytest.mark.parametrize("kind", ["topk", "hybrid"])
def test_every_objective_trains_in_one_mix_here_and_in_the_parts(kind: str, tmp_path: Path) -> None:
    """Three steps that report each; and the first of them with the parts for other trainers has the same figures."""
    dataset = datasets.make_dataset(
        tmp_path / "set", [20] * 12, tail="ghost" if kind == "topk" else "draws", exact=0 if kind == "topk" else 4
    )
    objective = {"weights": dict.fromkeys(OBJECTIVES, 0.1), "taid_t": {"start": 0.4, "end": 1.0}}
    scratch = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    settings = {"student": scratch, "steps": 3, "warmup_steps": 0, "batch_tokens": 128, "context_tokens": 64}
    config = TrainConfig(**settings, objective=objective, log_every_steps=1)
    train(config, dataset.path, None, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line[name] > 0 for line in lines for name in OBJECTIVES)
    assert all(line["loss"] == pytest.approx(0.1 * sum(line[n] for n in OBJECTIVES), rel=1e-5) for line in lines)
    assert lines[2]["cross_entropy"] < lines[0]["cross_entropy"]

    rows = PackedRows(dataset, items=2, context_tokens=64, objective=objective)
    model = attach_loss(build_student(scratch, dataset, 0), rows)
    loss_of(model).set_step(0, 3)
    batch = Collator()([rows[0], rows[1]])
    sums = model(**batch).sums_O / len(batch["targets"])
    torch.testing.assert_close(sums, torch.tensor([lines[0][n] for n in OBJECTIVES]), rtol=1e-4, atol=1e-6)
