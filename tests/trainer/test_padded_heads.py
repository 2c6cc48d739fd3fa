"""Teacher and student of one tokenizer whose heads are padded differently: rows that no token has are left out exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kdata
from kdata.errors import MismatchError
from kdata.loader.batches import BatchesConfig
from kdata.loader.packing import Place
from kdata.trainer.config import CheckpointStudent, ScratchStudent
from kdata.trainer.evaluate import _first_choice, evaluate
from kdata.trainer.fused import distillation_loss
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets
from kdata.trainer.student import build_student, fit_vocabulary, fitting_targets, head_of, hidden_states
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer
from tests.trainer.oracle import Problem, make_problem, oracle_values

TINY = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64, tied_embeddings=False)
MIX = ObjectiveConfig(weights={"cross_entropy": 0.3, "forward_kl": 0.7})
PADDED = 70  # rows of a padded head; the tokens are VOCAB


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", [9, 20, 13, 30, 7, 16])


def checkpoint(dataset: kdata.Dataset, folder: Path, rows: int) -> Path:
    """A student with so many rows in its head, those behind the tokens with large weights."""
    student = build_student(TINY, dataset, 0)
    with torch.no_grad():
        student.resize_token_embeddings(rows, mean_resizing=False)
        student.get_output_embeddings().weight[VOCAB:] = 3.0
    student.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def values_and_gradient(student: torch.nn.Module, dataset: kdata.Dataset) -> tuple[Tensor, Tensor]:
    """What training computes on one batch: each objective at each position, and the gradient of the whole head."""
    student.zero_grad()
    config = BatchesConfig(context_tokens=60, batch_rows=4)
    [batch] = Loader(dataset, None, config, order_key="0" * 64).epoch()
    total, values = Learner(student)(batch, MIX, "ghost", len(batch.targets))  # type: ignore[arg-type]
    total.backward()
    return values, student.get_output_embeddings().weight.grad  # type: ignore[operator]


def test_a_student_with_more_rows_learns_as_if_it_had_the_tokens_alone(dataset: kdata.Dataset, tmp_path: Path) -> None:
    large = build_student(CheckpointStudent(model=str(checkpoint(dataset, tmp_path / "s", PADDED))), dataset, 0)
    small = build_student(TINY, dataset, 0)
    assert head_of(large).shape[0] == VOCAB and large.get_output_embeddings().weight.shape[0] == PADDED
    values, gradient = values_and_gradient(large, dataset)
    expected, expected_gradient = values_and_gradient(small, dataset)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient[:VOCAB], expected_gradient)
    assert not gradient[VOCAB:].any()
    # Against the full softmax over the ids that tokens have, in float64.
    config = BatchesConfig(context_tokens=60, batch_rows=4)
    [batch] = Loader(dataset, None, config, order_key="0" * 64).epoch()
    hidden = hidden_states(large, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.predictor_M].double()
    logits = hidden @ large.get_output_embeddings().weight.double()[:VOCAB].T
    nll = -torch.log_softmax(logits, -1).gather(1, batch.targets.token_ids_C[:, None])[:, 0]
    torch.testing.assert_close(values[:, 0].double(), nll, rtol=1e-5, atol=1e-5)


def padded_problem(vocab: int, padded: int) -> tuple[Problem, Tensor]:
    """A student of `vocab` ids and a teacher of `padded`, whose entries hold ids behind; and its p [M, padded]."""
    whole = make_problem(vocab_size=padded, kept=8, ragged=True, exact=5)
    tokens = whole.targets.token_ids_C % vocab
    head = whole.head.detach()[:vocab].clone().requires_grad_()
    assert (whole.targets.ids_CK >= vocab).any()
    return Problem(whole.hidden, head, whole.p, replace(whole.targets, token_ids_C=tokens)), whole.p


@pytest.mark.parametrize("name", ["cross_entropy", "forward_kl", "reverse_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("tail", ["ghost", "draws"])
def test_a_teacher_with_more_rows_has_their_mass_in_the_tail(name: str, tail: str) -> None:
    """Against formulas on the full distributions: the teacher's bucket holds what is not kept or has no token."""
    problem, p = padded_problem(17, 23)
    if tail == "ghost":
        exact = problem.targets.ids_CK >= 0
        problem.targets = replace(problem.targets, num_exact_C=exact.sum(-1))
    targets = problem.targets.within(17)
    assert int(targets.ids_CK.max()) < 17
    # The oracle is given the same view, built from p itself.
    kept = (problem.targets.ids_CK >= 0) & (problem.targets.ids_CK < 17)
    places = torch.arange(kept.shape[1]) < targets.num_exact_C[:, None]
    ids = problem.targets.ids_CK.masked_fill(~kept, -1)
    of_exact = p.gather(1, ids.clamp_min(0)) * (kept & places)
    log_tail = (1 - of_exact.sum(-1)).log()
    if tail == "ghost":
        torch.testing.assert_close(targets.log_tail_C, log_tail)
    weights = problem.targets.logprobs_CK.masked_fill(~kept, -torch.inf)
    view = Problem(problem.hidden, problem.head, p, replace(targets, ids_CK=ids, logprobs_CK=weights))
    expected = oracle_values(view, name, tail)
    config = ObjectiveConfig(weights={name: 1.0})
    loss = distillation_loss(problem.hidden, problem.head, targets, config, tail)  # type: ignore[arg-type]
    torch.testing.assert_close(loss.values_MO[:, 0], expected.detach())
    gradient = torch.autograd.grad(loss.total, problem.head)[0]
    [oracle] = torch.autograd.grad(expected.mean(), problem.head)
    torch.testing.assert_close(gradient, oracle)


def test_mass_is_kept_where_entries_leave() -> None:
    problem, _ = padded_problem(17, 23)
    every = replace(problem.targets, num_exact_C=(problem.targets.ids_CK >= 0).sum(-1))
    for targets in (every, replace(every, num_exact_C=None)):
        total = targets.within(17).logprobs_CK.exp().sum(-1) + targets.within(17).log_tail_C.exp()
        torch.testing.assert_close(total, torch.ones_like(total))
    assert every.within(23) is every


def test_draws_of_other_ids_leave_the_tail_as_it_is() -> None:
    """The tail holds the draws' mass already: adding it again would count it twice."""
    ids = torch.tensor([[3, 19, 5, 20]])
    targets = Targets(torch.tensor([3]), ids, torch.tensor([[0.5, 0.2, 0.1, 0.1]]).log(), torch.tensor([0.3]).log(), 1.0,
                      torch.tensor([2]))  # fmt: skip
    inside = targets.within(17)
    assert inside.ids_CK.tolist() == [[3, -1, 5, -1]]
    torch.testing.assert_close(inside.log_tail_C.exp(), torch.tensor([0.5]))
    torch.testing.assert_close(inside.logprobs_CK.exp(), torch.tensor([[0.5, 0.0, 0.1, 0.0]]))


def padded_dataset(dataset: kdata.Dataset, folder: Path, size: int) -> kdata.Dataset:
    """The same rows as a teacher with a larger head would give them."""
    return make_dataset(folder / "padded", [9, 20, 13, 30, 7, 16], vocab_size=size)


def test_a_dataset_of_a_larger_head_trains_a_student_of_the_tokens(dataset: kdata.Dataset, tmp_path: Path) -> None:
    larger = padded_dataset(dataset, tmp_path, PADDED)
    folder = checkpoint(dataset, tmp_path / "s", VOCAB)
    student = build_student(CheckpointStudent(model=str(folder)), larger, 0)
    values, gradient = values_and_gradient(student, larger)
    expected, expected_gradient = values_and_gradient(build_student(TINY, dataset, 0), dataset)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_both_are_padded_and_differently(dataset: kdata.Dataset, tmp_path: Path) -> None:
    larger = padded_dataset(dataset, tmp_path, PADDED)
    folder = checkpoint(dataset, tmp_path / "s", 64)
    student = build_student(CheckpointStudent(model=str(folder)), larger, 0, others=[dataset])
    assert head_of(student).shape[0] == VOCAB
    measured = [evaluate(folder, data.path)["overall"] for data in (larger, dataset)]
    small = evaluate(checkpoint(dataset, tmp_path / "t", VOCAB), dataset.path)["overall"]
    for result in (*measured, small):
        assert result.pop("bits_per_byte") is None  # the dataset does not have the bytes of its tokens
    for result in measured:
        assert result == pytest.approx(small, rel=1e-5, nan_ok=True)


def test_equal_sizes_leave_nothing_out(dataset: kdata.Dataset, tmp_path: Path) -> None:
    larger = padded_dataset(dataset, tmp_path, PADDED)
    student = build_student(TINY, larger, 0)
    assert head_of(student).shape[0] == PADDED
    [batch] = Loader(larger, None, BatchesConfig(context_tokens=60, batch_rows=4)).epoch()
    assert fitting_targets(student, batch.targets) is batch.targets


def test_a_head_without_a_row_for_a_token_is_refused(dataset: kdata.Dataset) -> None:
    student = build_student(TINY, dataset, 0)
    student.resize_token_embeddings(VOCAB - 1)
    with pytest.raises(MismatchError, match=rf"head has {VOCAB - 1} rows, .* and its tokens have ids below {VOCAB}"):
        fit_vocabulary(student, [dataset])


def test_the_first_choice_of_a_padded_teacher_is_the_first_that_has_a_token() -> None:
    ids = torch.tensor([[19, 3, 5]])
    targets = Targets(torch.tensor([3]), ids, torch.tensor([[0.5, 0.3, 0.1]]).log(), torch.tensor([0.1]).log(), 1.0,
                      torch.tensor([3]))  # fmt: skip
    empty = np.zeros(0)
    batch = Batch(ids, ids, ids, ids[0], targets.within(17), empty, empty, empty, empty, empty, empty, 1, Place())
    ids_M, weights_M = _first_choice(batch)
    assert ids_M.tolist() == [3]
    np.testing.assert_allclose(weights_M, [0.3], rtol=1e-6)
