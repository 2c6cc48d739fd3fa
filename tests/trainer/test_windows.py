"""SinKD and span correlation: the authors' formula where all is kept, what is a bound, and what they do not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdata.errors import ConfigError
from kdata.loader.batches import BatchesConfig
from kdata.selection.plan import make_plan
from kdata.share.interchange.importer import ImportConfig, import_dataset
from kdata.trainer.config import TrainConfig
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import WINDOW_OBJECTIVES, ObjectiveConfig, resolve_tail
from kdata.trainer.objectives import Targets
from kdata.trainer.parts import PackedRows
from kdata.trainer.parts.collator import SparseTargets, join
from kdata.trainer.train import train
from kdata.trainer.windows import Windows, distances, follows, shared_places, transported, windows_of
from tests.fakes import write_jsonl
from tests.trainer import datasets
from tests.trainer.oracle import Problem, make_problem, source_sinkhorn, windows

VOCAB = 23
NAMES = sorted(WINDOW_OBJECTIVES)


def values(problem: Problem, name: str, compared_tokens: int = 4, **options: Any) -> Tensor:
    config = ObjectiveConfig(
        weights={name: 1.0}, compared_tokens=compared_tokens, temperature=problem.targets.temperature
    )
    return distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost", **options).values_MO[:, 0]


def student(problem: Problem) -> Tensor:
    """The student's whole distribution, [M, V]."""
    return torch.softmax(problem.hidden.detach() @ problem.head.detach().T / problem.targets.temperature, -1)


# ---------------------------------------------------------------------------------------------------------------- SinKD


@pytest.mark.parametrize(("temperature", "compared_tokens"), [(1.0, 4), (2.0, 4), (2.0, 50), (1.0, 2)])
def test_sinkd_is_the_authors_of_each_window_where_everything_is_kept(temperature: float, compared_tokens: int) -> None:
    """Their code on the whole distributions of a window is the sum over its positions; times T^2, as every divergence."""
    problem = make_problem(23, kept=VOCAB, ragged=False, temperature=temperature)
    got, q = values(problem, "sinkd", compared_tokens), student(problem)
    members = windows(problem.targets, compared_tokens)
    assert max(map(len, members)) > 1
    for own in members:
        want = source_sinkhorn(torch.cdist(q[own], problem.p[own], p=1)).sum()
        torch.testing.assert_close(got[own].sum(), temperature**2 * want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_distance_is_exact_where_all_is_kept_and_else_a_lower_bound_that_rises(seed: int) -> None:
    whole = make_problem(12, kept=VOCAB, ragged=False, seed=seed)
    q, want = student(whole), torch.cdist(student(whole), whole.p, p=1)
    before = torch.zeros_like(want)
    for kept in (1, 2, 5, 12, VOCAB):
        targets = make_problem(12, kept=kept, ragged=False, seed=seed).targets
        p_NJ = torch.cat([targets.logprobs_CK, targets.log_tail_C[:, None]], -1).exp()
        q_CNK = q[:, targets.ids_CK]
        got = distances(q_CNK, p_NJ.expand(12, -1, -1))
        assert (got >= before - 1e-12).all() and (got <= want + 1e-12).all()
        before = got
    torch.testing.assert_close(before, want, rtol=1e-9, atol=1e-12)


@given(
    places=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=25, unique=True),
    compared_tokens=st.integers(2, 17),
    seed=st.integers(0, 9),
)
def test_positions_are_moved_within_their_window_and_each_wholly(
    places: list[tuple[int, int]], compared_tokens: int, seed: int
) -> None:
    """Where all distances of a window are equal, that is the value at each of its positions that counts; elsewhere 0."""
    document_C, position_C = torch.tensor(sorted(places)).unbind(-1)
    counts_C = torch.rand(len(places), generator=torch.Generator().manual_seed(seed)) < 0.8
    made: Windows = windows_of(document_C, position_C, counts_C, compared_tokens)
    own_C = (100 * document_C + position_C // compared_tokens) % 7 / 4.0 + 0.25
    got = transported(own_C[:, None].expand(-1, made.place_GN.shape[1]).double(), made)
    torch.testing.assert_close(got, own_C.double() * counts_C)
    assert made.place_GN.shape[1] <= min(compared_tokens, len(places))
    counted = {place for place, counts in zip(sorted(places), counts_C.tolist(), strict=True) if counts}
    follows_C = follows(document_C, position_C, counts_C, compared_tokens)
    for c, (document, position) in enumerate(sorted(places)):
        is_one = {(document, position), (document, position - 1)} <= counted and position % compared_tokens > 0
        assert bool(follows_C[c]) == is_one and (not is_one or sorted(places)[c - 1] == (document, position - 1))


def test_a_student_that_is_the_teacher_is_nearer_than_another_but_not_at_0() -> None:
    """Because P blurs, as the docstring says."""
    problem = make_problem(9, kept=VOCAB, ragged=False)
    same = replace(problem, hidden=problem.p.log(), head=torch.eye(VOCAB, dtype=torch.float64))
    got = values(same, "sinkd", 50)
    assert (got >= 0).all() and 0 < got.sum() < 0.5 * values(problem, "sinkd", 50).sum()


# ------------------------------------------------------------------------------------------------------ span correlation


def test_span_correlation_is_a_part_of_the_error_of_the_joint_distribution() -> None:
    """At most the whole; where all is kept the two actual tokens and the diagonal, without counting one pair twice."""
    whole, sparse = (make_problem(40, kept=kept, ragged=False) for kept in (VOCAB, 5))
    tokens = whole.targets.token_ids_C.clone()
    tokens[6] = tokens[5]  # two equal actual tokens
    whole, sparse = (replace(x, targets=replace(x.targets, token_ids_C=tokens)) for x in (whole, sparse))
    log_p = whole.p.log().gather(1, tokens[:, None])[:, 0]
    whole, sparse = (replace(x, targets=replace(x.targets, actual_logprobs_C=log_p)) for x in (whole, sparse))
    got, few = (values(x, "span_correlation", 50) for x in (whole, sparse))
    q, previous = student(whole), [c for c in range(1, 40) if c not in (2, 4, 6)]
    for c in previous:
        gaps = (whole.p[c - 1][:, None] * whole.p[c] - q[c - 1][:, None] * q[c]).square()
        counted = torch.eye(VOCAB, dtype=torch.bool)
        counted[tokens[c - 1], tokens[c]] = True
        torch.testing.assert_close(got[c], gaps[counted].sum())
        assert gaps[tokens[c - 1], tokens[c]] <= few[c] + 1e-15 and few[c] <= got[c] + 1e-15 <= gaps.sum() + 2e-15
    assert not got[[0, 2, 4, 6]].any()


def test_span_correlation_of_a_student_that_is_the_teacher_is_0() -> None:
    problem = make_problem(12, kept=5, ragged=False)
    same = replace(problem, hidden=problem.p.log(), head=torch.eye(VOCAB, dtype=torch.float64))
    assert values(same, "span_correlation").abs().max() < 1e-15 < values(problem, "span_correlation").max()


@given(count=st.integers(0, 5), kept=st.integers(0, 9), seed=st.integers(0, 99))
def test_shared_places_are_those_of_every_pair_of_entries(count: int, kept: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(count, 12, generator=rng).argsort(-1)[:, :kept] for _ in range(2)]
    ids, others = (x.masked_fill(torch.rand(x.shape, generator=rng) < 0.3, -1) for x in drawn)
    is_shared, place = shared_places(ids, others)
    pairs = (ids[:, :, None] == others[:, None, :]) & (ids >= 0)[:, :, None]
    assert torch.equal(is_shared, pairs.any(-1)) and is_shared.shape == place.shape
    assert torch.equal(others.gather(1, place)[is_shared], ids[is_shared])


# ------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compared_tokens", [2, 5, 64])
def test_chunks_of_logits_change_nothing(name: str, compared_tokens: int) -> None:
    problem = make_problem(40)
    config = ObjectiveConfig(weights={name: 1.0, "forward_kl": 0.3}, compared_tokens=compared_tokens)
    results = []
    for size in (None, 1, 3, 16):
        loss = distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost", chunk_positions=size)
        results.append((loss.values_MO, *torch.autograd.grad(loss.total, (problem.hidden, problem.head))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_longer_than_every_document_costs_no_more_and_changes_nothing(name: str) -> None:
    problem = make_problem(40)
    want = values(problem, name, 64)
    for compared_tokens in (100_000, 2**62):
        torch.testing.assert_close(values(problem, name, compared_tokens), want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_packing_batches_and_order_change_nothing(name: str, tmp_path: Path) -> None:
    """The values of each document, of a student that sees one token alone, are the same however documents are packed."""
    dataset = datasets.make_dataset(tmp_path / "set", [30, 7, 19, 2, 40, 11, 25, 3])
    rng = torch.Generator().manual_seed(2)
    table, head = (torch.randn(datasets.VOCAB, 6, generator=rng, dtype=torch.float64) for _ in range(2))
    config = ObjectiveConfig(weights={name: 1.0}, compared_tokens=8)
    sums = []
    for rows, context, seed in ((1, 40, 0), (4, 64, 0), (2, 48, 5), (1, 256, 1)):
        of_document = torch.zeros(dataset.num_rows, dtype=torch.float64)
        for batch in Loader(dataset, None, BatchesConfig(context_tokens=context, batch_rows=rows, seed=seed)).epoch():
            targets = replace(batch.targets, logprobs_CK=batch.targets.logprobs_CK.double())
            hidden = table[batch.input_ids.flatten()[batch.predictor_M]]
            value_M = distillation_loss(hidden, head, targets, config, "ghost").values_MO[:, 0]
            of_document.index_add_(0, torch.from_numpy(batch.rows[batch.document_M]), value_M)
        sums.append(of_document)
    assert (sums[0] > 0).sum() >= 7  # of two tokens one is a target, which is no pair
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(4,), (2, 2, 20), (0, 7, 40)])
def test_joined_rows_have_the_values_of_each_alone(name: str, cuts: tuple[int, ...]) -> None:
    """Rows number their documents from anywhere, also as others do; one of them may have no position."""
    problem = make_problem(40)
    ends = [0, *cuts, 40]
    parts = [slice(*pair) for pair in pairwise(ends)]
    each = [problem.targets.rows(part) for part in parts]
    each = [replace(t, document_C=t.document_C + number % 2) for number, t in enumerate(each)]
    joined = join([SparseTargets(torch.arange(len(t)), t) for t in each], [100 * n for n in range(len(each))]).targets
    got = values(replace(problem, targets=joined), name)
    alone = [
        values(replace(problem, hidden=problem.hidden[part], targets=t), name)
        for part, t in zip(parts, each, strict=True)
    ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-10, atol=1e-13)
    assert (got > 0).sum() > 20


@pytest.mark.parametrize("name", NAMES)
def test_targets_without_documents_are_refused(name: str) -> None:
    problem = make_problem()
    bare = replace(problem, targets=replace(problem.targets, document_C=None))
    with pytest.raises(ConfigError, match=rf"objective {name} needs document_C and position_C"):
        values(bare, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("documents", "positions"),
    [
        ([0, 0, 0, 0], [1, 2, 1, 2]),
        ([0, 0, 0, 0], [1, 2, 2, 3]),
        ([1, 1, 0, 0], [1, 2, 3, 4]),
        ([0, 0, 1, 0], [1, 2, 3, 4]),
    ],
)
def test_targets_whose_documents_or_positions_are_out_of_order_are_refused(
    name: str, documents: list[int], positions: list[int]
) -> None:
    """As of two rows that were joined without numbering their documents again."""
    problem = make_problem(4)
    other = replace(problem.targets, document_C=torch.tensor(documents), position_C=torch.tensor(positions))
    with pytest.raises(ConfigError, match=rf"objective {name} needs document_C that does not fall.*collator\.join"):
        values(replace(problem, targets=other), name)
    values(replace(problem, targets=replace(other, document_C=torch.arange(4))), name)


def test_span_correlation_is_refused_where_a_token_of_the_teacher_is_not_known() -> None:
    problem = make_problem()
    for unknown in (problem.targets.actual_logprobs_C.index_fill(0, torch.tensor([1]), math.nan), None):
        targets = replace(problem.targets, actual_logprobs_C=unknown)
        with pytest.raises(ConfigError, match="do not hold that of some"):
            values(replace(problem, targets=targets), "span_correlation")
    for token_map in ("prefix", "exact", "matched"):
        with pytest.raises(ConfigError, match="objective span_correlation needs the teacher's probability of every"):
            resolve_tail(
                ObjectiveConfig(weights={"span_correlation": 1.0}), "draws", kind="hybrid", token_map=token_map
            )
    with pytest.raises(ValueError, match=r"temperature is 2\.0, at which the teacher's probability of an actual token"):
        ObjectiveConfig(weights={"span_correlation": 1.0}, temperature=2.0)


def test_rows_without_a_log_probability_of_an_actual_token_are_refused_before_training(tmp_path: Path) -> None:
    """Of another tool's files one format holds none, and the other rounds that of a token in one row to 0."""
    numbers = ({"20": -0.5, "21": -1.5, "22": -9999.0}, {"30": -0.1})
    lists = [{key: {"logprob": value, "rank": 1} for key, value in part.items()} for part in numbers]
    rows = {
        "plain": [
            {"id": name, "input_ids": [10, 20, 30], "topk_ids": [[], [20], [30]], "topk_logprobs": [[], [-0.5], [-0.1]]}
            for name in ("a", "b", "c")
        ],
        "vllm": [
            {"id": name, "prompt_token_ids": [10, second, 30], "prompt_logprobs": [None, *lists]}
            for name, second in (("a", 20), ("b", 22), ("c", 21))
        ],
    }
    objective = ObjectiveConfig(weights={"forward_kl": 1.0, "span_correlation": 1.0}, tail="renormalise")
    for format, bare in (
        ("plain", "3 of 3 rows, the first of them 'a'"),
        ("vllm", "1 of 3 rows, the first of them 'b'"),
    ):
        write_jsonl(tmp_path / f"{format}.jsonl", rows[format])
        settings = ImportConfig(format=format, vocab_size=40)
        dataset, _ = import_dataset(tmp_path / f"{format}.jsonl", tmp_path / format, settings)
        with pytest.raises(ConfigError, match=rf"log-probability of every target.* in {bare}.*where nll is not null"):
            PackedRows(dataset, items=4, objective=objective)
        with pytest.raises(ConfigError, match=rf"log-probability of every target.* in {bare}"):
            train(TrainConfig(objective=objective, context_tokens=64), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    PackedRows(dataset, items=4, objective=ObjectiveConfig(tail="renormalise"))
    PackedRows(
        dataset, make_plan(dataset, "known", ["a", "c"], method="mine", parameters={}), items=4, objective=objective
    )


def test_only_log_probabilities_that_are_read_need_to_be_known() -> None:
    """Not those of positions that are not chosen, or without a neighbor in their window; a probability of 0 is known."""
    problem = make_problem()  # at 1, 2, 4, 5 of a document and 1, 2, 4 of the next one
    logprobs = problem.targets.actual_logprobs_C.index_fill(0, torch.tensor([4, 5, 6]), math.nan)
    chosen = torch.arange(7) != 4
    targets = replace(problem.targets, actual_logprobs_C=logprobs, chosen_C=chosen)
    mix = {"weights": {"span_correlation": 1.0}, "cross_entropy_elsewhere": 1.0}

    def of(targets: Targets) -> tuple[Tensor, ...]:
        loss = distillation_loss(
            problem.hidden, problem.head, targets, ObjectiveConfig(**mix, compared_tokens=4), "ghost"
        )
        return loss.values_MO[:, 0], *torch.autograd.grad(loss.total, (problem.hidden, problem.head))

    known = replace(targets, actual_logprobs_C=problem.targets.actual_logprobs_C)
    for got, want in zip(of(targets), of(known), strict=True):
        assert torch.equal(got, want)
    zero, least = (
        replace(targets, actual_logprobs_C=logprobs.index_fill(0, torch.tensor([1]), x)) for x in (-math.inf, -800)
    )
    for got, want in zip(of(zero), of(least), strict=True):
        assert torch.equal(got, want) and got.isfinite().all()
    with pytest.raises(ConfigError, match="do not hold that of some"):
        of(replace(targets, actual_logprobs_C=logprobs.index_fill(0, torch.tensor([0]), math.nan)))


@pytest.mark.parametrize("name", NAMES)
def test_data_of_draws_alone_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not linear in the teacher's probabilities"):
        resolve_tail(ObjectiveConfig(weights={name: 1.0}), "draws", kind="sampled")
    assert resolve_tail(ObjectiveConfig(weights={name: 1.0}), "draws", kind="threshold") == "draws"
