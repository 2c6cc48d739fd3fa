"""The fused sparse loss against a dense float64 oracle: values, gradients, tails, pads, chunks, precision."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kdata.errors import ConfigError, ShapeError
from kdata.format.keep import KeepConfig
from kdata.format.kept import pad
from kdata.teachers.reduce import reduce_logits
from kdata.trainer.fused import Loss, _chunk_positions, _exact_only, _Student, distillation_loss, measure
from kdata.trainer.objective_config import NEEDS_BUCKET, OBJECTIVE_NAMES, ObjectiveConfig, resolve_tail
from kdata.trainer.objectives import OBJECTIVES, Targets
from kdata.trainer.schedule import Ramp
from tests.trainer.oracle import AT_1, TAID_T, WINDOW, Problem, kl, make_problem, oracle_values

BUCKETLESS = [n for n in OBJECTIVES if n not in NEEDS_BUCKET]
# These hold a function of the student constant, so their gradient is not that of their value. The oracle does the same.
CONSTANT_PARTS = ("adaptive_kl", "taid")
CASES = [(n, t) for t in ("ghost", "draws") for n in OBJECTIVES] + [(n, "renormalise") for n in BUCKETLESS]


def fused(problem: Problem, weights: dict[str, float], tail: str, **kwargs: object) -> Loss:
    config = ObjectiveConfig(
        weights=weights,
        temperature=problem.targets.temperature,
        taid_t=TAID_T,
        compared_tokens=WINDOW,
        **{k: kwargs.pop(k) for k in ("jsd_beta",) if k in kwargs},
    )
    return distillation_loss(problem.hidden, problem.head, problem.targets, config, tail, **kwargs)


def grads(problem: Problem, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(loss, (problem.hidden, problem.head))


def test_draws_by_need_give_the_value_and_the_gradient_of_the_whole_distribution_on_average() -> None:
    """Over 400 seeds and each position alone, in units of its standard error; V = 259, more columns than any position needs.

    Position 0 is certain, 1 uniform, 2 has ids at the threshold, 3 its first choice below it; the others are random.
    """
    vocab, width, seeds, threshold = 259, 40, 400, 0.05
    rng = torch.Generator().manual_seed(3)
    teacher = torch.randn(12, vocab, generator=rng) * torch.linspace(0.5, 5, 12)[:, None]
    teacher[0] = -torch.inf
    teacher[0, 7] = 0
    teacher[1] = 0
    teacher[2] = math.log((1 - 4 * threshold) / (vocab - 4))
    teacher[2, 30:34] = math.log(threshold) + 1e-4
    teacher[3] = torch.randn(vocab, generator=rng) * 0.3
    p = torch.softmax(teacher.double(), -1)
    hidden = torch.randn(12, 5, generator=rng, dtype=torch.float64).requires_grad_()
    head = torch.randn(vocab, 5, generator=rng, dtype=torch.float64)
    log_q = torch.log_softmax(hidden @ head.T, -1)
    want = -(p * log_q).sum(-1)
    (want_gradient,) = torch.autograd.grad(want.sum(), hidden)
    keep = KeepConfig(kind="threshold", threshold=threshold)
    values, gradients = [], []
    for seed in range(seeds):
        out = reduce_logits(teacher, teacher.argmax(-1), keep, seed)
        ids, logprobs = (torch.from_numpy(x) for x in pad(out.kept.num_kept, out.kept.ids, out.kept.logprobs, width))
        targets = Targets(
            teacher.argmax(-1), ids.long(), logprobs.double(), torch.from_numpy(out.log_tail).double(),
            num_exact_C=torch.from_numpy(out.kept.num_exact),
        )  # fmt: skip
        loss = distillation_loss(hidden, head, targets, ObjectiveConfig(weights={"forward_kl": 1.0}), "draws")
        gradients.append(torch.autograd.grad(12 * loss.total, hidden)[0])
        weights = targets.logprobs_CK.exp()
        values.append((loss.values_MO[:, 0] - torch.special.xlogy(weights, weights).sum(-1)).detach())
    for samples, exact in ((torch.stack(values), want.detach()), (torch.stack(gradients), want_gradient)):
        error = samples.std(0) / seeds**0.5
        gap = (samples.mean(0) - exact).abs()
        torch.testing.assert_close(samples[0, 0], exact[0], rtol=1e-6, atol=1e-6)  # certain: nothing is drawn
        assert (gap <= 4.5 * error + 1e-6).all(), (gap / error).max()
        assert float(((gap[1:] / error[1:]) ** 2).mean()) < 1.5, "errors are as large as their spread says"


@pytest.mark.parametrize(("name", "tail"), CASES)
@pytest.mark.parametrize("ragged", [False, True])
def test_value_and_gradient_equal_the_dense_oracle(name: str, tail: str, ragged: bool) -> None:
    problem = make_problem(ragged=ragged)
    loss = fused(problem, {name: 1.7}, tail)
    expected = oracle_values(problem, name, tail)
    torch.testing.assert_close(loss.values_MO[:, 0], expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.total, 1.7 * expected.mean(), rtol=1e-10, atol=1e-12)
    for got, want in zip(grads(problem, loss.total), grads(problem, 1.7 * expected.mean()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [2.0, 0.6])
@pytest.mark.parametrize(("name", "tail"), [case for case in CASES if case[0] not in AT_1])
def test_at_a_temperature_value_and_gradient_equal_the_dense_oracle(name: str, tail: str, temperature: float) -> None:
    """Both sides at T and times T^2, but the cross-entropy at 1; alone and in a mix with the cross-entropy."""
    problem = make_problem(temperature=temperature)
    loss = fused(problem, {name: 0.9, "cross_entropy": 0.1}, tail, chunk_positions=3)
    values = [oracle_values(problem, n, tail) for n in dict.fromkeys((name, "cross_entropy"))]
    torch.testing.assert_close(loss.values_MO, torch.stack(values, -1), rtol=1e-10, atol=1e-12)
    expected = 0.1 * values[-1].mean() + (0.9 * values[0].mean() if len(values) > 1 else 0.0)
    torch.testing.assert_close(loss.total, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(grads(problem, loss.total), grads(problem, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_at_a_temperature_the_gradient_equals_finite_differences(tail: str) -> None:
    problem = make_problem(num_positions=3, hidden_size=3, vocab_size=9, kept=4, seed=3, temperature=1.7)
    weights = {"forward_kl": 0.7, "skewed_reverse_kl": 0.2, "cross_entropy": 0.1}
    analytic = grads(problem, fused(problem, weights, tail).total)
    for leaf, gradient in zip((problem.hidden, problem.head), analytic, strict=True):
        for i in range(leaf.numel()):
            around = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.view(-1)[i] += sign * 1e-6
                    around.append(float(fused(problem, weights, tail).total))
                    leaf.view(-1)[i] -= sign * 1e-6
            assert math.isclose((around[0] - around[1]) / 2e-6, float(gradient.reshape(-1)[i]), abs_tol=2e-8)


def test_at_a_high_temperature_the_gradient_is_the_difference_of_centred_logits() -> None:
    """What T^2 is for (Hinton et al., equation 4): T^2 dKL/dz goes to (z_q - z_p) / V, neither to 0 nor to infinity."""
    vocab, temperature = 13, 2000.0
    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(4, vocab, generator=rng, dtype=torch.float64).requires_grad_()
    head = torch.eye(vocab, dtype=torch.float64)  # hidden states are the logits
    teacher = torch.randn(4, vocab, generator=rng, dtype=torch.float64)
    logprobs = torch.log_softmax(teacher / temperature, -1)
    targets = Targets(
        torch.zeros(4, dtype=torch.long), torch.arange(vocab).expand(4, -1), logprobs,
        torch.full((4,), -math.inf, dtype=torch.float64), temperature,
    )  # fmt: skip
    config = ObjectiveConfig(weights={"forward_kl": 1.0}, temperature=temperature)
    (gradient,) = torch.autograd.grad(distillation_loss(hidden, head, targets, config, "ghost").total, hidden)
    centred = [z - z.mean(-1, keepdim=True) for z in (hidden.detach(), teacher)]
    torch.testing.assert_close(gradient, (centred[0] - centred[1]) / vocab / 4, rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_at_a_temperature_low_precision_errs_no_more_than_the_naive_version(dtype: torch.dtype) -> None:
    exact = make_problem(64, 32, 512, 16, seed=1, scale=0.3, temperature=2.0)
    rounded = make_problem(64, 32, 512, 16, seed=1, scale=0.3, dtype=dtype, temperature=2.0)
    reference = dataclasses.replace(
        exact,
        hidden=rounded.hidden.detach().double().requires_grad_(),
        head=rounded.head.detach().double().requires_grad_(),
    )
    true_grads = grads(reference, oracle_values(reference, "forward_kl", "ghost").mean())
    low_grads = grads(rounded, fused(rounded, {"forward_kl": 1.0}, "ghost").total)
    naive_grads = grads(rounded, 4.0 * _naive_low_precision(rounded, "ghost", 2.0).mean())
    for got, naive, want in zip(low_grads, naive_grads, true_grads, strict=True):
        assert (got.double() - want).norm() <= 1.1 * (naive.double() - want).norm()


def test_targets_at_another_temperature_than_the_objective_are_refused() -> None:
    problem = make_problem(temperature=2.0)
    with pytest.raises(ConfigError, match=r"targets are at temperature 2\.0, the objective at 1\.0"):
        distillation_loss(problem.hidden, problem.head, problem.targets, ObjectiveConfig(), "ghost")


@pytest.mark.parametrize("tail", ["ghost", "draws"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalised_jsd_and_its_ends(beta: float, tail: str) -> None:
    problem = make_problem()
    loss = fused(problem, {"jsd": 1.0}, tail, jsd_beta=beta)
    expected = oracle_values(problem, "jsd", tail, beta=beta)
    torch.testing.assert_close(loss.values_MO[:, 0], expected, rtol=1e-10, atol=1e-12)
    end = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta)
    if end:
        torch.testing.assert_close(expected, oracle_values(problem, end, tail))


@pytest.mark.parametrize("tail", ["ghost", "draws"])
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in CONSTANT_PARTS])
def test_gradient_equals_finite_differences(name: str, tail: str) -> None:
    problem = make_problem(num_positions=3, hidden_size=3, vocab_size=9, kept=4, seed=3, exact=2)
    analytic = grads(problem, fused(problem, {name: 1.0}, tail).total)
    step = 1e-6
    for leaf, gradient in zip((problem.hidden, problem.head), analytic, strict=True):
        for i in range(leaf.numel()):
            around = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf.view(-1)[i] += sign * step
                    around.append(float(fused(problem, {name: 1.0}, tail).total))
                    leaf.view(-1)[i] -= sign * step
            assert math.isclose((around[0] - around[1]) / (2 * step), float(gradient.reshape(-1)[i]), abs_tol=2e-8)


def test_a_mix_is_the_weighted_sum_and_weight_0_only_measures() -> None:
    problem = make_problem()
    loss = fused(problem, {"cross_entropy": 0.1, "forward_kl": 0.9, "total_variation": 0.0}, "ghost")
    expected = 0.1 * oracle_values(problem, "cross_entropy", "ghost") + 0.9 * oracle_values(
        problem, "forward_kl", "ghost"
    )
    torch.testing.assert_close(loss.total, expected.mean())
    torch.testing.assert_close(loss.values_MO[:, 2], oracle_values(problem, "total_variation", "ghost"))
    for got, want in zip(grads(problem, loss.total), grads(problem, expected.mean()), strict=True):
        torch.testing.assert_close(got, want)


def test_a_mix_that_changes_is_a_function_of_the_step() -> None:
    down, up = Ramp(start=1.0, end=0.1, steps=10), Ramp(kind="cosine", start=0.0, end=0.8)
    config = ObjectiveConfig(weights={"cross_entropy": down, "forward_kl": up, "jsd": 0.3})
    assert config.at(0, 21).weights == {"cross_entropy": 1.0, "forward_kl": 0.0, "jsd": 0.3}
    assert config.at(5, 21).weights == pytest.approx({"cross_entropy": 0.55, "forward_kl": 0.11715729, "jsd": 0.3})
    assert config.at(10, 21).weights == pytest.approx({"cross_entropy": 0.1, "forward_kl": 0.4, "jsd": 0.3})
    assert config.at(20, 21).weights == pytest.approx({"cross_entropy": 0.1, "forward_kl": 0.8, "jsd": 0.3})
    assert config.at(0, 1).weights["cross_entropy"] == 1.0
    problem = make_problem()
    with pytest.raises(ConfigError, match=r"change with the step; call config\.at"):
        distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost")
    again = ObjectiveConfig.model_validate_json(config.model_dump_json())
    assert again == config
    loss = distillation_loss(problem.hidden, problem.head, problem.targets, again.at(5, 21), "ghost")
    weights = torch.tensor([0.55, 0.4 * (1 - math.cos(math.pi / 4)), 0.3], dtype=torch.float64)
    torch.testing.assert_close(loss.total, (loss.values_MO @ weights).mean())


def test_linear_objectives_use_draws_and_the_others_exact_entries() -> None:
    """In one mix: forward KL on all entries, the others on the exact ones, whatever the draws are."""
    problem = make_problem(num_positions=5, kept=6, ragged=False, exact=2)
    top = make_problem(num_positions=5, kept=2, ragged=False)
    assert torch.equal(top.targets.ids_CK, problem.targets.ids_CK[:, :2])
    problem.targets = dataclasses.replace(problem.targets, log_tail_C=top.targets.log_tail_C)
    weights = {"forward_kl": 0.5, "jsd": 0.3, "reverse_kl": 0.2}
    want = torch.stack(
        [
            oracle_values(problem, "forward_kl", "draws"),
            *(oracle_values(top, n, "ghost") for n in ("jsd", "reverse_kl")),
        ],
        dim=-1,
    )
    loss = fused(problem, weights, "draws", chunk_positions=2)
    torch.testing.assert_close(loss.values_MO, want)
    got = measure(problem.hidden, problem.head, problem.targets, tuple(weights), "draws", chunk_positions=2)
    torch.testing.assert_close(got.values_MO, want)
    expected = oracle_values(problem, "forward_kl", "draws").mean() * 0.5
    for name in ("jsd", "reverse_kl"):
        part = dataclasses.replace(top, hidden=problem.hidden, head=problem.head)
        expected = expected + weights[name] * oracle_values(part, name, "ghost").mean()
    for analytic, true in zip(grads(problem, loss.total), grads(problem, expected), strict=True):
        torch.testing.assert_close(analytic, true)


def test_every_objective_has_a_name_in_the_settings() -> None:
    assert list(OBJECTIVES) == OBJECTIVE_NAMES


def test_settings_of_one_objective_are_recorded_where_they_are_not_the_default() -> None:
    """So a run that began before there were such settings resumes, and its record is the same."""
    assert set(ObjectiveConfig().model_dump()) == {"weights", "tail", "temperature", "jsd_beta", "skew"}
    changed = ObjectiveConfig(tail_weight=3.0, taid_t=0.5)
    assert changed.model_dump()["tail_weight"] == 3.0 and changed.model_dump()["taid_t"] == 0.5
    assert ObjectiveConfig.model_validate_json(changed.model_dump_json()) == changed


def test_draws_without_num_exact_serve_linear_objectives_only() -> None:
    problem = make_problem()
    problem.targets = dataclasses.replace(problem.targets, num_exact_C=None)
    fused(problem, {"forward_kl": 1.0, "jsd": 1.0}, "draws", jsd_beta=0.0)
    with pytest.raises(ConfigError, match="num_exact_C of the targets is None"):
        fused(problem, {"jsd": 1.0}, "draws")


def test_a_student_without_mass_outside_the_exact_entries_has_a_finite_gradient() -> None:
    problem = make_problem(2, 4, 50, 2, ragged=False, dtype=torch.float32, exact=2)
    with torch.no_grad():
        problem.head.zero_()
        problem.hidden.zero_()
        problem.hidden[:, 0] = 1.0
        problem.targets.ids_CK.copy_(torch.tensor([[0, 1], [0, 1]]))
        problem.head[:2, 0] = 200.0  # e^-200 is 0 in float32
    loss = fused(problem, {"jsd": 0.5, "reverse_kl": 0.5}, "draws")
    assert torch.isfinite(loss.total) and all(torch.isfinite(g).all() for g in grads(problem, loss.total))
    rest_C = torch.full((2,), -math.inf, requires_grad=True)
    student = _Student(torch.zeros(2, 2), rest_C, torch.zeros(2), torch.zeros(2))
    moved, _ = _exact_only(student, problem.targets)
    moved.rest_C.exp().sum().backward()
    assert rest_C.grad is not None and torch.isfinite(rest_C.grad).all()


@pytest.mark.parametrize(
    ("name", "tail", "temperature"), [(n, t, x) for n, t in CASES for x in (1.0, 2.0) if x == 1.0 or n not in AT_1]
)
def test_a_student_that_is_certain_has_finite_values_and_gradients(name: str, tail: str, temperature: float) -> None:
    """Two tokens have all of its probability, by 80 nats and by 200, in float32; entries are among them, or not, or none."""
    for gap in (80.0, 200.0):
        problem = make_problem(4, 4, 50, 4, dtype=torch.float32, exact=2, temperature=temperature)
        with torch.no_grad():
            problem.head.zero_()
            problem.hidden.zero_()
            problem.hidden[:, 0] = 1.0
            problem.head[:2, 0] = gap
            problem.targets.ids_CK[3, :2] = torch.tensor([0, 1])
            problem.targets.token_ids_C.copy_(torch.tensor([0, 7, 1, 9]))
        loss = fused(problem, {name: 1.0}, tail)
        assert torch.isfinite(loss.values_MO).all()
        assert all(torch.isfinite(gradient).all() for gradient in grads(problem, loss.total))
        if gap / temperature < 87:  # e^-87 is the smallest normal number
            want = oracle_values(problem, name, tail)
            torch.testing.assert_close(loss.values_MO[:, 0].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", ["ghost", "draws"])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "span_correlation"])
def test_targets_of_no_width_say_nothing_beyond_the_actual_token(name: str, tail: str) -> None:
    problem = make_problem(4)
    targets = problem.targets
    problem.targets = dataclasses.replace(
        targets, ids_CK=targets.ids_CK[:, :0], logprobs_CK=targets.logprobs_CK[:, :0],
        log_tail_C=torch.zeros_like(targets.log_tail_C), num_exact_C=torch.zeros(4, dtype=torch.int64),
    )  # fmt: skip
    loss = fused(problem, {name: 1.0}, tail)
    if name == "cross_entropy":
        torch.testing.assert_close(loss.values_MO[:, 0], oracle_values(problem, name, tail))
        return
    assert loss.values_MO.abs().max() < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in grads(problem, loss.total))


def test_all_entries_kept_is_the_full_divergence_and_ghost_is_a_lower_bound() -> None:
    full = make_problem(kept=23, ragged=False)
    q = torch.softmax(full.hidden @ full.head.T, -1)
    loss = fused(full, {"forward_kl": 1.0}, "ghost")
    torch.testing.assert_close(loss.values_MO[:, 0], kl(full.p, q), rtol=1e-9, atol=1e-9)
    for got, want in zip(grads(full, loss.total), grads(full, kl(full.p, q).mean()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    sparse = fused(make_problem(kept=6, ragged=False), {"forward_kl": 1.0}, "ghost")
    assert (sparse.values_MO[:, 0] <= kl(full.p, q) + 1e-12).all()


def test_draws_have_the_gradient_of_full_distillation_on_average() -> None:
    problem = make_problem(num_positions=2, vocab_size=11, ragged=False)
    rng = torch.Generator().manual_seed(0)
    q = torch.softmax(problem.hidden @ problem.head.T, -1)
    want = grads(problem, kl(problem.p, q).mean())[0]
    total, rounds, draws = torch.zeros_like(want), 3000, 12
    for _ in range(rounds):
        counts = torch.zeros_like(problem.p).scatter_add_(
            1,
            torch.multinomial(problem.p, draws, True, generator=rng),
            torch.ones(2, draws, dtype=torch.float64),
        )
        weights, ids = (counts / draws).topk(11, dim=-1)
        ids = ids.masked_fill(weights == 0, -1)
        problem.targets = Targets(problem.targets.token_ids_C, ids, weights.log(), weights.new_full((2,), -math.inf))
        total += grads(problem, fused(problem, {"forward_kl": 1.0}, "draws").total)[0]
    torch.testing.assert_close(total / rounds, want, atol=0.02, rtol=0.02)


def test_padded_entries_and_chunk_size_change_nothing() -> None:
    problem = make_problem(num_positions=9)
    loss = fused(problem, {"cross_entropy": 0.5, "jsd": 0.5}, "ghost")
    want = grads(problem, loss.total)
    pad = torch.full((9, 4), -1)
    t = problem.targets
    wider = Targets(
        t.token_ids_C,
        torch.cat([t.ids_CK, pad], -1),
        torch.cat([t.logprobs_CK, torch.full((9, 4), -math.inf, dtype=torch.float64)], -1),
        t.log_tail_C,
    )
    for targets, chunk_positions in ((wider, None), (t, 1), (t, 4)):
        again = dataclasses.replace(problem, targets=targets)
        other = fused(again, {"cross_entropy": 0.5, "jsd": 0.5}, "ghost", chunk_positions=chunk_positions)
        torch.testing.assert_close(other.values_MO, loss.values_MO, rtol=1e-12, atol=1e-13)
        for got, expected in zip(grads(again, other.total), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_no_counted_position_gives_zero_loss_and_zero_gradient() -> None:
    problem = make_problem()
    problem.targets = problem.targets.rows(slice(0, 0))
    loss = distillation_loss(problem.hidden[:0], problem.head, problem.targets, ObjectiveConfig(), "ghost")
    assert float(loss.total.detach()) == 0.0 and loss.values_MO.shape == (0, 2)
    assert not grads(problem, loss.total)[1].any()


def test_accumulation_by_counted_tokens_equals_one_batch() -> None:
    problem = make_problem(num_positions=10)
    config = ObjectiveConfig()
    want = grads(problem, fused(problem, config.weights, "ghost").total)
    parts = [slice(0, 3), slice(3, 4), slice(4, 10)]
    total = sum(
        distillation_loss(
            problem.hidden[s], problem.head, problem.targets.rows(s), config, "ghost", counted_tokens=10
        ).total
        for s in parts
    )
    for got, expected in zip(grads(problem, total), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_low_precision_errs_no_more_than_the_naive_version(dtype: torch.dtype, tail: str) -> None:
    exact = make_problem(64, 32, 512, 16, seed=1, scale=0.3)
    rounded = make_problem(64, 32, 512, 16, seed=1, scale=0.3, dtype=dtype)
    reference = dataclasses.replace(
        exact,
        hidden=rounded.hidden.detach().double().requires_grad_(),
        head=rounded.head.detach().double().requires_grad_(),
    )
    true_value = oracle_values(reference, "forward_kl", tail)
    true_grads = grads(reference, true_value.mean())
    low = fused(dataclasses.replace(rounded), {"forward_kl": 1.0}, tail)
    low_grads = grads(rounded, low.total)
    naive_value = _naive_low_precision(rounded, tail)
    naive_grads = grads(rounded, naive_value.mean())
    error = (low.values_MO[:, 0].double() - true_value).abs().max()
    assert error <= 1.1 * (naive_value.double() - true_value).abs().max()
    for got, naive, want in zip(low_grads, naive_grads, true_grads, strict=True):
        assert (got.double() - want).norm() <= 1.1 * (naive.double() - want).norm()


def _naive_low_precision(problem: Problem, tail: str, temperature: float = 1.0) -> torch.Tensor:
    """What people write: logits in low precision, log_softmax in float32, gather."""
    log_q = torch.log_softmax((problem.hidden @ problem.head.T).float() / temperature, -1)
    t = problem.targets
    live = t.ids_CK >= 0
    q_kept = log_q.gather(1, t.ids_CK.clamp_min(0))
    p = t.logprobs_CK.float().exp()
    value = (p * torch.where(live, t.logprobs_CK.float() - q_kept, 0.0).nan_to_num()).sum(-1)
    if tail == "ghost":
        rest = (1 - (q_kept.exp() * live).sum(-1)).clamp_min(1e-30)
        value = value + t.log_tail_C.float().exp() * (t.log_tail_C.float() - rest.log())
    return value


def test_a_tiny_student_tail_keeps_its_value_in_float32() -> None:
    """1 - sum of kept q has no digit left in float32 here; the summed rest has them all."""
    problem = make_problem(3, 4, 50, 2, ragged=False, dtype=torch.float32)
    with torch.no_grad():
        problem.head.zero_()
        problem.hidden.zero_()
        problem.hidden[:, 0] = 1.0
        for row in range(3):
            problem.targets.ids_CK[row] = torch.tensor([0, 1])
        problem.head[:2, 0] = 30.0
    loss = fused(problem, {"forward_kl": 1.0}, "ghost")
    torch.testing.assert_close(
        loss.values_MO[:, 0].double(), oracle_values(problem, "forward_kl", "ghost"), rtol=1e-5, atol=1e-6
    )


def test_measure_finds_the_students_top_tokens_and_confidence() -> None:
    problem = make_problem(9)
    got = measure(problem.hidden, problem.head, problem.targets, ("reverse_kl",), "ghost", chunk_positions=2)
    q = torch.softmax(problem.hidden @ problem.head.T, -1)
    assert torch.equal(got.top_ids_MN, q.topk(5).indices)
    torch.testing.assert_close(got.confidence_M, q.amax(-1))
    torch.testing.assert_close(got.values_MO[:, 0], oracle_values(problem, "reverse_kl", "ghost"))


def test_ids_outside_the_vocabulary_and_wrong_shapes_are_refused() -> None:
    problem = make_problem()
    problem.targets.ids_CK[2, 0] = 23
    with pytest.raises(ShapeError, match=r"outside the student's \[0, 23\)"):
        fused(problem, {"forward_kl": 1.0}, "ghost")
    with pytest.raises(ShapeError, match="do not fit"):
        distillation_loss(problem.hidden[:3], problem.head, problem.targets, ObjectiveConfig(), "ghost")


def test_a_second_backward_is_refused() -> None:
    problem = make_problem()
    total = fused(problem, {"forward_kl": 1.0}, "ghost").total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        total.backward()


@pytest.mark.parametrize(
    ("config", "held", "message"),
    [
        ({"weights": {"forward_lk": 1.0}}, "ghost", "known objectives"),
        ({"weights": {"forward_kl": 0.0}}, "ghost", "not all 0"),
        ({"weights": {"forward_kl": -1.0}}, "ghost", "must be finite"),
        ({"temperature": 2.0}, "ghost", r"log-sum-exp only at \[1\.0\].*--set temperatures=\[2\.0\]"),
        ({"weights": {"forward_kl": Ramp(start=0.0, end=1.0)}}, "ghost", "not all 0 at the start"),
        ({"tail": "ghost"}, "draws", "use draws"),
        ({"tail": "draws"}, "ghost", "use ghost or renormalise"),
        ({"weights": {"reverse_kl": 1.0}, "tail": "renormalise"}, "ghost", "infinite"),
        ({"weights": {"jsd": 1.0}, "jsd_beta": 1.0, "tail": "renormalise"}, "ghost", "infinite"),
        ({"weights": {"jsd": 0.0, "forward_kl": 1.0}}, "draws", "jsd is not linear.*'sampled'.*remove it"),
    ],
)
def test_impossible_objectives_are_refused(config: dict, held: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_tail(ObjectiveConfig(**config), held)


def test_the_default_tail_is_what_the_dataset_holds() -> None:
    assert resolve_tail(ObjectiveConfig(), "draws") == "draws"
    for kind in ("hybrid", "threshold"):
        assert resolve_tail(ObjectiveConfig(weights={"reverse_kl": 1.0}), "draws", kind=kind) == "draws"
    assert resolve_tail(ObjectiveConfig(weights={"jsd": 1.0}, jsd_beta=0.0), "draws") == "draws"
    assert resolve_tail(ObjectiveConfig(), "ghost") == "ghost"
    assert resolve_tail(ObjectiveConfig(tail="renormalise"), "ghost") == "renormalise"


def test_chunks_are_of_the_size_that_the_device_needs() -> None:
    sizes = {place: _chunk_positions(128_256, torch.bfloat16, torch.device(place)) for place in ("cpu", "cuda")}
    assert sizes == {"cpu": 128, "cuda": 1024}
    assert _chunk_positions(8192, torch.float32, torch.device("cpu")) == 256
