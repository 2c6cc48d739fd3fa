"""GOLD against TRL's formulas on dense float64 distributions: value and gradient, bounds on sparse data, and its data."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kdata
from kdata.errors import ConfigError
from kdata.jobs.retokenize import RetokenizeConfig, retokenize
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss, distillation_loss_of_logits
from kdata.trainer.merged import _least_share
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Matched, Targets
from kdata.trainer.train import train
from tests.fakes import LINES
from tests.tokenizers_of_kinds import bpe_tokenizer, saved
from tests.trainer.oracle import Problem, make_problem

VOCAB, TEACHERS, SHARED = 23, 17, 9  # ids of the student, of the teacher, and those that match: the first ones of both
CHUNKS = [0, 0, 0, 1, 2, 2, 3, 4, 4]
FIRST, LAST = [0, 3, 4, 6, 7], [2, 3, 5, 6, 8]


def two_tokenizers(
    seed: int = 0, kept: int = TEACHERS, places: list[int] = FIRST, dtype: torch.dtype = torch.float64
) -> Problem:
    """Chunks of one to three tokens of the student; in the first two the teacher has two tokens, in the others one.

    `p` is the teacher's distribution over its own ids at the places; its first SHARED ids are the student's.
    """
    problem = make_problem(len(CHUNKS), vocab_size=VOCAB, seed=seed, dtype=dtype)
    rng = torch.Generator().manual_seed(seed + 100)
    p = torch.softmax(2 * torch.randn(len(CHUNKS), TEACHERS, generator=rng, dtype=torch.float64), -1)
    chosen = torch.isin(torch.arange(len(CHUNKS)), torch.tensor(places))
    ids = torch.full((len(CHUNKS), TEACHERS + 1), -1)
    logprobs, rank = torch.full(ids.shape, -math.inf, dtype=torch.float64), torch.zeros(len(CHUNKS), dtype=torch.int64)
    tail = torch.zeros(len(CHUNKS), dtype=torch.float64)
    for m in places:
        order = p[m].argsort(descending=True).tolist()[:kept]
        actual = int(torch.randint(TEACHERS, (1,), generator=rng))
        entries = [*order, *([] if actual in order or CHUNKS[m] > 1 else [actual])]
        spare = iter(range(SHARED, VOCAB))
        ids[m, : len(entries)] = torch.tensor([v if v < SHARED else next(spare) for v in entries])
        logprobs[m, : len(entries)] = p[m, entries].log()
        tail[m] = 1 - p[m, entries].sum()
        if CHUNKS[m] <= 1:
            rank[m] = entries.index(actual) + 1 + (actual not in order)
    sums = torch.zeros(len(CHUNKS), dtype=torch.float64)
    for m in LAST:
        sums[m] = -3 * torch.rand(1, generator=rng, dtype=torch.float64) - 0.1
    for m in places:  # of a chunk, what its place says times what the other tokens say
        if CHUNKS[m] <= 1:
            own = logprobs[m, min(int(rank[m]), int((ids[m] >= 0).sum())) - 1]
            sums[LAST[CHUNKS[m]]] += own
    shared = torch.arange(VOCAB) < SHARED
    targets = Targets(
        problem.targets.token_ids_C, ids, logprobs, tail.clamp_min(0).log(), chosen_C=chosen, actual_logprobs_C=sums,
        chunk_C=torch.tensor(CHUNKS), rank_C=rank, matched=Matched(shared, SHARED / TEACHERS),
    )  # fmt: skip
    return replace(problem, p=p, targets=targets)


def trl(problem: Problem, weights: tuple[float, float] | None = None, beta: float = 0.5) -> Tensor:
    """The sum over chunks as TRL writes it: merged distributions, JSD of matched ones, sorted L1 of the others, padded."""
    log_q = torch.log_softmax(problem.hidden.double() @ problem.head.double().T, -1)
    own = log_q.gather(1, problem.targets.token_ids_C[:, None])[:, 0]
    total, (w_m, w_u) = log_q.new_zeros(()), weights or (SHARED / TEACHERS, 1 - SHARED / TEACHERS)
    t = problem.targets
    assert t.chosen_C is not None and t.actual_logprobs_C is not None and t.rank_C is not None
    for m in t.chosen_C.nonzero()[:, 0].tolist():
        others = [n for n in range(len(CHUNKS)) if CHUNKS[n] == CHUNKS[m] and n != m]
        q = log_q[m].exp() * own[others].sum().exp()
        p, rank = problem.p[m], int(t.rank_C[m])
        if rank:
            count = int((t.ids_CK[m] >= 0).sum())
            p = p * (t.actual_logprobs_C[LAST[CHUNKS[m]]] - t.logprobs_CK[m, min(rank, count) - 1]).exp()
        a, b = p[:SHARED], q[:SHARED]
        mix = beta * a + (1 - beta) * b
        jsd = (beta * a * (a.log() - mix.log()) + (1 - beta) * b * (b.log() - mix.log())).sum()
        a, b = p[SHARED:].sort(descending=True)[0], q[SHARED:].sort(descending=True)[0]
        size = max(len(a), len(b))
        a, b = (torch.nn.functional.pad(x, (0, size - len(x))) for x in (a, b))
        total = total + w_m * jsd + w_u * (a - b).abs().sum()
    return total


def gold_of(problem: Problem, **settings: object) -> Tensor:
    config = ObjectiveConfig(weights={"gold": 1.0}, **settings)
    loss = distillation_loss(
        problem.hidden, problem.head, problem.targets, config, "ghost", counted_tokens=1, chunk_positions=4
    )
    torch.testing.assert_close(loss.values_MO.sum(), loss.total.detach())
    return loss.total


@pytest.mark.parametrize("places", [FIRST, LAST], ids=["observed", "bayesian"])
@pytest.mark.parametrize(("weights", "beta"), [(None, 0.5), ((0.7, 0.1), 0.2), ((1.0, 0.0), 0.8), ((0.0, 1.0), 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_trls_where_all_is_kept(
    seed: int, weights: tuple[float, float] | None, beta: float, places: list[int]
) -> None:
    problem = two_tokenizers(seed, places=places)
    ours, theirs = gold_of(problem, gold_weights=weights, gold_beta=beta), trl(problem, weights, beta)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for own, other in zip(
        *(torch.autograd.grad(x, [problem.hidden, problem.head]) for x in (ours, theirs)), strict=True
    ):
        assert (own - other).abs().max() < 1e-8 * other.abs().max()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000), st.integers(1, TEACHERS - 1), st.floats(0.05, 0.95), st.floats(0, 2, allow_subnormal=False),
    st.floats(0.01, 2), st.sampled_from([FIRST, LAST]),
)  # fmt: skip
def test_what_is_kept_gives_a_lower_bound(
    seed: int, kept: int, beta: float, w_m: float, w_u: float, places: list[int]
) -> None:
    sparse, whole = (two_tokenizers(seed, n, places) for n in (kept, TEACHERS))
    wanted = trl(replace(sparse, p=whole.p), (w_m, w_u), beta)
    value = float(gold_of(sparse, gold_weights=(w_m, w_u), gold_beta=beta).detach())
    assert 0 <= value <= float(wanted.detach()) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("kept", [1, 4, 11])
def test_the_gradient_of_sparse_data_is_that_of_its_value(kept: int) -> None:
    """By finite differences, over entries in and out of the ranks, the rest, and the other tokens of chunks."""
    for seed in range(4):
        problem = two_tokenizers(seed, kept)
        gradients = torch.autograd.grad(gold_of(problem), [problem.hidden, problem.head])
        rng = torch.Generator().manual_seed(seed)
        for name, gradient in zip(("hidden", "head"), gradients, strict=True):
            way, value = (
                torch.randn(gradient.shape, generator=rng, dtype=torch.float64),
                getattr(problem, name).detach(),
            )
            ends = [gold_of(replace(problem, **{name: (value + h * way).requires_grad_()})) for h in (1e-6, -1e-6)]
            slope = float(ends[0].detach() - ends[1].detach()) / 2e-6
            assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-4, abs=1e-7)


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1), st.floats(0.05, 0.95), st.floats(0, 3), st.floats(0, 3),
)  # fmt: skip
def test_the_tail_is_divided_so_that_the_loss_is_least(
    rest: float, tail: float, even: float, beta: float, w_m: float, w_u: float
) -> None:
    def loss(a: Tensor) -> Tensor:
        x, r = a.clamp_min(1e-30), torch.tensor(max(rest, 1e-30), dtype=torch.float64)
        log_m = (beta * x + (1 - beta) * r).log()
        return w_m * (beta * x * (x.log() - log_m) + (1 - beta) * r * (r.log() - log_m)) + w_u * (a - even).abs()

    one = (torch.tensor([x], dtype=torch.float64) for x in (rest, tail, even))
    share = _least_share(*one, (w_m, w_u), beta)
    assert 0 <= float(share) <= tail
    grid = torch.linspace(0, tail, 2001, dtype=torch.float64)
    assert float(loss(share)) <= float(loss(grid).min()) + 1e-9


def test_of_logits_in_a_mix_and_in_float32() -> None:
    problem, single = two_tokenizers(1, 6), two_tokenizers(1, 6, dtype=torch.float32)
    config = ObjectiveConfig(weights={"gold": 0.5, "alm": 0.3, "cross_entropy": 0.2}, cross_entropy_elsewhere=0.2)
    losses = [
        distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost"),
        distillation_loss_of_logits(problem.hidden @ problem.head.T, problem.targets, config, "ghost"),
        distillation_loss(single.hidden, single.head, single.targets, config, "ghost"),
    ]
    rest = config.model_copy(update={"weights": {"alm": 0.3, "cross_entropy": 0.2}})
    without = distillation_loss(problem.hidden, problem.head, problem.targets, rest, "ghost")
    wanted = without.total + 0.5 * gold_of(problem) / len(CHUNKS)
    (theirs,) = torch.autograd.grad(wanted, [problem.hidden])
    for loss, hidden in zip(losses, (problem.hidden, problem.hidden, single.hidden), strict=True):
        exact = hidden.dtype == torch.float64
        assert float(loss.total.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9 if exact else 1e-5)
        (own,) = torch.autograd.grad(loss.total, [hidden])
        assert (own.double() - theirs).abs().max() < (1e-9 if exact else 1e-5) * theirs.abs().max()


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    """The teacher's distribution on tokens that match, in chunks of one token: the loss and its gradient are 0."""
    problem = two_tokenizers(0)
    logits = torch.full((2, VOCAB), -30.0, dtype=torch.float64)
    logits[:, :SHARED] = torch.randn(2, SHARED, dtype=torch.float64)
    ids = torch.arange(SHARED).expand(2, -1)
    log_q = torch.log_softmax(logits, -1)[:, :SHARED]
    targets = Targets(
        torch.tensor([1, 2]), ids, log_q, torch.full((2,), -math.inf, dtype=torch.float64), chunk_C=torch.tensor([0, 1]),
        actual_logprobs_C=torch.tensor([-1.0, -1.0]), rank_C=torch.zeros(2, dtype=torch.int64),
        matched=problem.targets.matched,
    )  # fmt: skip
    logits.requires_grad_()
    loss = distillation_loss_of_logits(logits, targets, ObjectiveConfig(weights={"gold": 1.0}), "ghost")
    (gradient,) = torch.autograd.grad(loss.total, [logits])
    assert float(loss.total.detach()) < 1e-9 and gradient.abs().max() < 1e-9


def test_targets_that_lack_what_it_needs_are_refused() -> None:
    problem, config = two_tokenizers(), ObjectiveConfig(weights={"gold": 1.0})
    for change, message in (
        ({"chunk_C": None}, "chunk_C"),
        ({"matched": None}, "matched"),
        ({"weights_C": torch.ones(len(CHUNKS))}, "without weights"),
        ({"actual_logprobs_C": torch.full((len(CHUNKS),), math.nan)}, "does not hold that of some"),
    ):
        targets = replace(problem.targets, **change)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            distillation_loss(problem.hidden, problem.head, targets, config, "ghost")
    warm = replace(problem.targets, temperature=2.0)
    with pytest.raises(ConfigError, match="at temperature 1"):
        distillation_loss(problem.hidden, problem.head, warm, config.model_copy(update={"temperature": 2.0}), "ghost")


# --------------------------------------------------------------------------------------------------------------- from text


@pytest.fixture(scope="module")
def phrases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose tokens lie across those of the teacher: chunks have several tokens of both."""
    return saved(bpe_tokenizer(LINES), tmp_path_factory.mktemp("phrases") / "tokenizer")


@pytest.fixture(scope="module")
def sorted_data(tmp_path_factory: pytest.TempPathFactory, captured_once: Path, phrases: Path) -> dict[str, Path]:
    folder, source = tmp_path_factory.mktemp("sorted"), kdata.open(captured_once)
    configs = {
        "ranks": RetokenizeConfig(tokenizer=str(phrases), map="ranks"),
        "matched": RetokenizeConfig(tokenizer=str(phrases), map="matched"),
        "bayesian": RetokenizeConfig(tokenizer=str(phrases), map="matched", merge="bayesian"),
    }
    return {name: retokenize(folder / name, source, config)[0].path for name, config in configs.items()}


@pytest.mark.parametrize(
    ("data", "weights"),
    [
        ("ranks", {"cross_entropy": 1.0, "uld": 1.5}),
        ("matched", {"gold": 1.0}),
        ("bayesian", {"gold": 1.0, "alm": 0.5, "cross_entropy": 0.5}),
    ],
)
def test_a_student_learns_whatever_the_size_of_its_micro_batches(
    sorted_data: dict[str, Path], tmp_path: Path, data: str, weights: dict[str, float]
) -> None:
    student = ScratchStudent(hidden_size=32, num_layers=1, num_heads=2, max_positions=1024)
    lines: dict[int, list[dict[str, float]]] = {}
    for micro in (2048, 1024):
        config = TrainConfig(
            student=student, steps=12, batch_tokens=2048, micro_batch_tokens=micro, context_tokens=1024, precision="fp32",
            learning_rate=1e-2, warmup_steps=2, objective=ObjectiveConfig(weights=weights, cross_entropy_elsewhere=1.0),
            log_every_steps=1, checkpoint_every_steps=0,
        )  # fmt: skip
        train(config, sorted_data[data], None, tmp_path / str(micro))
        lines[micro] = [json.loads(line) for line in (tmp_path / str(micro) / "metrics.jsonl").read_text().splitlines()]
    name = "uld" if "uld" in weights else "gold"
    assert lines[2048][-1]["loss"] < lines[2048][0]["loss"] and lines[2048][0][name] > 0
    for whole, parts in zip(lines[2048], lines[1024], strict=True):
        for key in ("loss", name):
            assert parts[key] == pytest.approx(whole[key], rel=2e-3)
