"""Plans that choose positions, in training: the same order, only those targets, and a loss that is exact on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import kdata
from kdata.errors import ConfigError, CorruptError, MismatchError
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import Batches, BatchesConfig
from kdata.selection.plan import Plan, make_plan, open_plan
from kdata.trainer.config import PhaseConfig, ScratchStudent, TrainConfig, TrainResult
from kdata.trainer.domain_weights import DDKMixture
from kdata.trainer.fused import Loss, distillation_loss, distillation_loss_of_logits
from kdata.trainer.loader import Batch, IterableBatches, Loader
from kdata.trainer.mixed_loader import MixedLoader
from kdata.trainer.objective_config import NEEDS_BUCKET, ObjectiveConfig
from kdata.trainer.objectives import OBJECTIVES, Targets
from kdata.trainer.parts import Collator, DistillationLoss, Documents, PackedRows, RowStream, attach_loss
from kdata.trainer.train import train
from tests.trainer import rank
from tests.trainer.datasets import make_dataset
from tests.trainer.oracle import AT_1, TAID_T, WINDOW, Problem, make_problem, oracle_values
from tests.trainer.runs import lines
from tests.trainer.stopping import stop_before
from tests.trainer.test_distributed import BASE, ONE, run_ranks, tensors

LENGTHS = [5 + (i * 7) % 40 for i in range(90)]
CONFIG = BatchesConfig(context_tokens=64, batch_rows=2, window_documents=16)
TINY = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """90 documents with plans `some` (positions of 60 rows, one row twice), `heavy` (with weights), `every` and `all`."""
    dataset = make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, mask_every=4)
    rng = np.random.default_rng(0)
    ids, some, heavy, every = [], [], [], []
    for row in dataset:
        targets = np.flatnonzero(row.target_mask)
        every.append(targets)
        if row.number % 3:
            ids.append(row.id)
            some.append(np.sort(rng.choice(targets, max(len(targets) // 3, 1), replace=False)))
            heavy.append(rng.uniform(0.1, 3, len(some[-1])).astype(np.float32))
    repeats = np.where(np.arange(len(ids)) == 5, 2, 1)
    of = {"method": "mine", "parameters": {}}
    make_plan(dataset, "some", ids, **of, positions=some, repeats=repeats).save(dataset.path / "plans")
    make_plan(dataset, "heavy", ids, **of, positions=some, weights=heavy, repeats=repeats).save(dataset.path / "plans")
    all_ids = dataset.index(["id"])["id"].to_pylist()
    make_plan(dataset, "every", all_ids, **of, positions=every).save(dataset.path / "plans")
    make_plan(dataset, "all", all_ids, **of).save(dataset.path / "plans")
    return dataset


def choice(dataset: kdata.Dataset, plan: str) -> tuple[np.ndarray, ChosenPositions]:
    rows, positions = open_plan(dataset, plan).choice(dataset)
    assert positions is not None
    return rows, positions


def is_chosen(batch: Batch, positions: ChosenPositions) -> np.ndarray:
    """Which counted tokens of a batch the plan chooses, one by one, bool [M]."""
    cells = batch.predictor_M.numpy() + 1
    places = batch.position_ids.reshape(-1).numpy()[cells]
    pairs = zip(batch.rows[batch.document_M].tolist(), places.tolist(), strict=True)
    per_row = {
        int(row): set(positions.positions[a:b].tolist())
        for row, a, b in zip(positions.rows, positions.offsets[:-1], positions.offsets[1:], strict=True)
    }
    return np.array([place in per_row[row] for row, place in pairs], bool)


def picked(targets: Targets, mask: np.ndarray) -> Targets:
    return targets.each(lambda tensor: tensor[torch.from_numpy(mask)])


def same_targets(one: Targets, other: Targets) -> bool:
    width = min(one.ids_CK.shape[1], other.ids_CK.shape[1])
    pairs = [
        (one.ids_CK[:, :width], other.ids_CK[:, :width]),
        (one.logprobs_CK[:, :width], other.logprobs_CK[:, :width]),
    ]
    pairs += [(one.token_ids_C, other.token_ids_C), (one.log_tail_C, other.log_tail_C)]
    return all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------------------------------------------------- the loader


@pytest.mark.parametrize("plan", ["some", "heavy"])
def test_only_chosen_positions_count_and_the_order_is_that_of_the_rows(dataset: kdata.Dataset, plan: str) -> None:
    rows, positions = choice(dataset, plan)
    whole = list(islice(Loader(dataset, rows, CONFIG), 40))
    chosen = list(islice(Loader(dataset, rows, CONFIG, positions=positions), 40))
    for full, batch in zip(whole, chosen, strict=True):
        assert torch.equal(full.input_ids, batch.input_ids) and torch.equal(full.position_ids, batch.position_ids)
        assert np.array_equal(full.rows, batch.rows) and full.num_tokens == batch.num_tokens
        mask = is_chosen(full, positions)
        assert torch.equal(batch.predictor_M, full.predictor_M[torch.from_numpy(mask)])
        assert same_targets(batch.targets, picked(full.targets, mask))
        assert np.array_equal(batch.document_M, full.document_M[mask])
        assert np.array_equal(batch.logprob_M, full.logprob_M[mask])
        assert (batch.targets.weights_C is None) == (plan == "some")
    total = sum(len(batch.targets) for batch in Loader(dataset, rows, CONFIG, positions=positions).epoch())
    own = dict(zip(positions.rows.tolist(), np.diff(positions.offsets).tolist(), strict=True))
    assert total == sum(own[row] for row in rows.tolist())


def test_weights_are_those_of_the_positions(dataset: kdata.Dataset) -> None:
    rows, positions = choice(dataset, "heavy")
    assert positions.weights is not None
    for batch in Loader(dataset, rows, CONFIG, positions=positions).epoch():
        assert batch.targets.weights_C is not None
        places = batch.position_ids.reshape(-1)[batch.predictor_M + 1].tolist()
        for row, place, weight in zip(
            batch.rows[batch.document_M].tolist(), places, batch.targets.weights_C.tolist(), strict=True
        ):
            number = int(np.searchsorted(positions.rows, row))
            own = slice(*positions.offsets[number : number + 2].tolist())
            at = positions.positions[own].tolist().index(place)
            assert weight == positions.weights[own][at]


def test_other_targets_come_without_entries_where_they_are_wanted(dataset: kdata.Dataset) -> None:
    rows, positions = choice(dataset, "heavy")
    whole = list(Loader(dataset, rows, CONFIG).epoch())
    both = list(Loader(dataset, rows, CONFIG, positions=positions, elsewhere=True).epoch())
    for full, batch in zip(whole, both, strict=True):
        targets = batch.targets
        assert targets.chosen_C is not None and targets.weights_C is not None
        mask = is_chosen(full, positions)
        assert torch.equal(batch.predictor_M, full.predictor_M) and np.array_equal(targets.chosen_C.numpy(), mask)
        assert same_targets(picked(targets, mask), picked(full.targets, mask))
        other = picked(targets, ~mask)
        assert torch.equal(other.token_ids_C, picked(full.targets, ~mask).token_ids_C)
        assert (other.ids_CK == -1).all() and (other.log_tail_C == 0).all() and (other.num_exact_C == 0).all()
        assert (other.weights_C == 1).all() and targets.num_elsewhere == int((~mask).sum())


def test_the_state_refuses_other_positions(dataset: kdata.Dataset) -> None:
    rows, positions = choice(dataset, "some")
    _, heavy = choice(dataset, "heavy")
    first = Loader(dataset, rows, CONFIG, positions=positions)
    stream = list(islice(first, 9))
    state = json.loads(json.dumps(first.state_dict()))
    again = Loader(dataset, rows, CONFIG, positions=positions)
    again.load_state_dict(state)
    rest = list(islice(Loader(dataset, rows, CONFIG, positions=positions), 12))[9:]
    for got, want in zip(again, rest, strict=False):
        assert torch.equal(got.predictor_M, want.predictor_M)
    assert len(stream) == 9
    plain = Loader(dataset, rows, CONFIG)
    with pytest.raises(MismatchError, match="positions differ"):
        plain.load_state_dict(state)
    with pytest.raises(MismatchError, match="positions differ"):
        Loader(dataset, rows, CONFIG, positions=heavy).load_state_dict(state)
    with pytest.raises(MismatchError, match="positions differ"):
        again.load_state_dict(plain.state_dict())
    assert len({first.identity, plain.identity, Loader(dataset, rows, CONFIG, positions=heavy).identity}) == 3


def test_rows_without_positions_are_refused(dataset: kdata.Dataset) -> None:
    _, positions = choice(dataset, "some")
    with pytest.raises(ConfigError, match="'doc-0' is to be read, and no position of it is chosen"):
        Batches(dataset, None, CONFIG, positions=positions)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_chosen_positions(dataset: kdata.Dataset, workers: int) -> None:
    rows, positions = choice(dataset, "heavy")
    alone = list(Loader(dataset, rows, CONFIG, positions=positions).epoch())
    shares = []
    for part in range(2):
        own = Loader(dataset, rows, CONFIG, rank=part, world_size=2, positions=positions)
        shares.append(list(DataLoader(IterableBatches(own, epochs=1), batch_size=None, num_workers=workers)))
    for number, batch in enumerate(alone):
        parts = [share[number].targets for share in shares if number < len(share)]
        assert torch.equal(batch.targets.token_ids_C, torch.cat([part.token_ids_C for part in parts]))
        assert batch.targets.weights_C is not None
        assert torch.equal(batch.targets.weights_C, torch.cat([part.weights_C for part in parts]))


def test_a_mixture_draws_the_same_documents_and_counts_the_chosen_positions(dataset: kdata.Dataset) -> None:
    rows, positions = choice(dataset, "some")

    def read(source: MixedLoader) -> list[Batch]:
        source.begin({"code": 0.7, "prose": 0.3}, 60)
        first = list(islice(source, 20))
        source.begin({"code": 0.2, "prose": 0.8}, 60)
        return first + list(islice(source, 20))

    with_positions = MixedLoader(dataset, rows, CONFIG, positions=positions)
    for full, batch in zip(read(MixedLoader(dataset, rows, CONFIG)), read(with_positions), strict=True):
        assert torch.equal(full.input_ids, batch.input_ids)
        assert same_targets(batch.targets, picked(full.targets, is_chosen(full, positions)))
    again = MixedLoader(dataset, rows, CONFIG, positions=positions)
    again.load_state_dict(with_positions.state_dict())
    assert torch.equal(next(iter(again)).predictor_M, next(iter(with_positions)).predictor_M)
    with pytest.raises(MismatchError, match="another identity"):
        MixedLoader(dataset, rows, CONFIG).load_state_dict(with_positions.state_dict())


# ---------------------------------------------------------------------------------------------------------------- the loss

CASES = [(n, t) for t in ("ghost", "draws") for n in OBJECTIVES]
CASES += [(n, "renormalise") for n in OBJECTIVES if n not in NEEDS_BUCKET]


def weighted(problem: Problem, *, weights: bool, elsewhere: bool) -> Problem:
    """The problem with weights, and with positions 1, 4, 5, ... not chosen, as the loader hands them over."""
    targets, count = problem.targets, len(problem.targets)
    rng = torch.Generator().manual_seed(9)
    weights_C = torch.rand(count, generator=rng) * 3 + 0.1 if weights else None
    chosen_C = None
    if elsewhere:
        chosen_C = torch.arange(count) % 4 > 1
        assert targets.num_exact_C is not None
        targets = replace(
            targets,
            ids_CK=targets.ids_CK.masked_fill(~chosen_C[:, None], -1),
            logprobs_CK=targets.logprobs_CK.masked_fill(~chosen_C[:, None], -torch.inf),
            log_tail_C=targets.log_tail_C.masked_fill(~chosen_C, 0.0),
            num_exact_C=targets.num_exact_C.masked_fill(~chosen_C, 0),
        )
        weights_C = None if weights_C is None else weights_C.masked_fill(~chosen_C, 1.0)
    return replace(problem, targets=replace(targets, weights_C=weights_C, chosen_C=chosen_C))


def oracle_loss(problem: Problem, mix: dict[str, float], tail: str, elsewhere: float | None) -> Tensor:
    """Position by position in float64: the weighted mix where chosen, else the cross-entropy; over the sum of weights."""
    targets, count = problem.targets, len(problem.targets)
    weights = [1.0] * count if targets.weights_C is None else targets.weights_C.double().tolist()
    chosen = [True] * count if targets.chosen_C is None else targets.chosen_C.tolist()
    values = {name: oracle_values(problem, name, tail) for name in {*mix, "cross_entropy"}}
    total = torch.zeros((), dtype=torch.float64)
    for number in range(count):
        if chosen[number]:
            for name, share in mix.items():
                total = total + weights[number] * share * values[name][number]
        else:
            assert elsewhere is not None
            total = total + weights[number] * elsewhere * values["cross_entropy"][number]
    return total / sum(weights)


def both_ways(problem: Problem, config: ObjectiveConfig, tail: Any, **options: Any) -> list[Loss]:
    logits = problem.hidden @ problem.head.T
    return [
        distillation_loss(problem.hidden, problem.head, problem.targets, config, tail, **options),
        distillation_loss_of_logits(logits, problem.targets, config, tail, **options),
    ]


def gradients(problem: Problem, loss: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(loss, (problem.hidden, problem.head))


@pytest.mark.parametrize(("weights", "elsewhere"), [(True, None), (False, 0.7), (True, 0.7)])
@pytest.mark.parametrize(
    ("name", "tail", "temperature"), [(n, t, x) for n, t in CASES for x in (1.0, 2.0) if x == 1.0 or n not in AT_1]
)
def test_value_and_gradient_equal_the_dense_oracle(
    name: str, tail: str, weights: bool, elsewhere: float | None, temperature: float
) -> None:
    problem = weighted(make_problem(9, temperature=temperature), weights=weights, elsewhere=elsewhere is not None)
    mix = {name: 1.7} if name == "cross_entropy" else {name: 1.7, "cross_entropy": 0.2}
    config = ObjectiveConfig(
        weights=mix, temperature=temperature, cross_entropy_elsewhere=elsewhere, taid_t=TAID_T, compared_tokens=WINDOW
    )
    expected = oracle_loss(problem, mix, tail, elsewhere)
    wanted = gradients(problem, expected)
    for loss in both_ways(problem, config, tail, chunk_positions=4):
        torch.testing.assert_close(loss.total, expected, rtol=1e-7, atol=1e-10)  # the weights are float32
        for got, want in zip(gradients(problem, loss.total), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-10)


def test_the_mix_need_not_name_the_cross_entropy_that_counts_elsewhere() -> None:
    problem = weighted(make_problem(9), weights=True, elsewhere=True)
    config = ObjectiveConfig(weights={"forward_kl": 1.0}, cross_entropy_elsewhere=0.3)
    for loss in both_ways(problem, config, "ghost"):
        assert loss.names == ("forward_kl",) and loss.values_MO.shape == (9, 1)
        torch.testing.assert_close(
            loss.total, oracle_loss(problem, {"forward_kl": 1.0}, "ghost", 0.3), rtol=1e-7, atol=0
        )


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_parts_of_a_step_add_up_by_weights(name: str) -> None:
    problem = weighted(make_problem(10), weights=True, elsewhere=True)
    config = ObjectiveConfig(weights={name: 0.9}, cross_entropy_elsewhere=0.5, taid_t=TAID_T)
    whole = distillation_loss(problem.hidden, problem.head, problem.targets, config, "ghost").total
    total = problem.targets.total_weight
    parts = [
        distillation_loss(
            problem.hidden[part], problem.head, problem.targets.rows(part), config, "ghost", counted_tokens=total
        ).total
        for part in (slice(0, 4), slice(4, 10))  # documents are whole
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    for got, want in zip(gradients(problem, torch.stack(parts).sum()), gradients(problem, whole), strict=True):
        torch.testing.assert_close(got, want)


def test_small_weights_are_as_good_as_large_ones() -> None:
    """Only their proportions matter, also where they sum to less than 1."""
    problem = weighted(make_problem(9), weights=True, elsewhere=False)
    assert problem.targets.weights_C is not None
    tiny = replace(problem, targets=replace(problem.targets, weights_C=problem.targets.weights_C * 2.0**-20))
    for one, other in zip(
        both_ways(problem, ObjectiveConfig(), "ghost"), both_ways(tiny, ObjectiveConfig(), "ghost"), strict=True
    ):
        torch.testing.assert_close(one.total, other.total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e5, 1e30])
def test_the_parts_have_the_same_loss_and_gradients_at_every_size_of_weights(size: float, dtype: torch.dtype) -> None:
    problem = weighted(make_problem(), weights=True, elsewhere=False)
    module = DistillationLoss(ObjectiveConfig(), "ghost")
    results = []
    for factor in (1.0, size):
        assert problem.targets.weights_C is not None
        targets = replace(problem.targets, weights_C=(problem.targets.weights_C.double() * factor).float())
        hidden_MD, head_VD = (x.detach().to(dtype).requires_grad_() for x in (problem.hidden, problem.head))
        loss = module(hidden_MD, head_VD, targets).total
        (loss * 1024).backward()  # as a loss scaler does
        results.append((float(loss), hidden_MD.grad, head_VD.grad))
    (loss, *gradients), (other, *others) = results
    assert other == pytest.approx(loss, rel=1e-3)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(two, one, rtol=5e-3, atol=1e-3 * float(one.abs().max()))


def test_without_weights_the_loss_is_the_sum_of_each_objective_as_before() -> None:
    """Bit for bit, in float32: the sum over positions first, then the mix, then one division."""
    problem = make_problem(64, 16, 61, dtype=torch.float32)
    mix = {"cross_entropy": 0.1, "forward_kl": 0.9}
    loss = distillation_loss(problem.hidden, problem.head, problem.targets, ObjectiveConfig(weights=mix), "ghost")
    expected = (loss.values_MO.sum(0) @ torch.tensor([0.1, 0.9])) * (1.0 / 64)
    assert torch.equal(loss.total, expected)
    assert torch.equal(problem.targets.sums(loss.values_MO), loss.values_MO.sum(0))


def test_positions_that_are_not_chosen_need_a_weight() -> None:
    problem = weighted(make_problem(9), weights=False, elsewhere=True)
    with pytest.raises(ConfigError, match="cross_entropy_elsewhere is null"):
        distillation_loss(problem.hidden, problem.head, problem.targets, ObjectiveConfig(), "ghost")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cross_entropy_elsewhere"):
            ObjectiveConfig(cross_entropy_elsewhere=value)
    assert "cross_entropy_elsewhere" not in ObjectiveConfig().model_dump()


# ------------------------------------------------------------------------------------------------------------ the training


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": TINY, "steps": 6, "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0, "learning_rate": 5e-3,
        "log_every_steps": 1, "checkpoint_every_steps": 0, "window_documents": 16, "clip_norm": 0.0,
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


def run(
    dataset: kdata.Dataset, plan: str | None, out: Path, **changes: object
) -> tuple[TrainResult, list[dict[str, Any]]]:
    return train(config(**changes), dataset.path, plan, out), lines(out)


def test_positions_that_are_all_targets_train_the_same_student(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """Bit for bit: the order is that of the rows, and nothing else changed."""
    result, every = run(dataset, "every", tmp_path / "every")
    _, whole = run(dataset, "all", tmp_path / "all")
    assert [line["loss"] for line in every] == [line["loss"] for line in whole]
    assert result.plan == "every"


def test_counted_tokens_are_the_chosen_ones(dataset: kdata.Dataset, tmp_path: Path) -> None:
    rows, positions = choice(dataset, "heavy")
    result, metrics = run(dataset, "heavy", tmp_path / "out")
    batches = list(islice(Loader(dataset, rows, BatchesConfig(context_tokens=64, batch_rows=4, window_documents=16),
                                 positions=positions), 6))  # fmt: skip
    assert result.target_tokens == metrics[-1]["target_tokens"] == sum(len(b.targets) for b in batches)
    assert result.tokens == sum(batch.num_tokens for batch in batches)
    assert "cross_entropy_elsewhere" not in result.losses


@pytest.mark.parametrize("elsewhere", [None, 0.4])
def test_micro_batches_give_the_losses_of_one_batch(
    dataset: kdata.Dataset, tmp_path: Path, elsewhere: float | None
) -> None:
    objective = {"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": elsewhere}
    _, whole = run(dataset, "heavy", tmp_path / "whole", objective=objective)
    _, split = run(dataset, "heavy", tmp_path / "split", objective=objective, micro_batch_tokens=64)
    names = ["loss", "cross_entropy", "forward_kl", *([] if elsewhere is None else ["cross_entropy_elsewhere"])]
    for one, other in zip(whole, split, strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-5)
        assert one["target_tokens"] == other["target_tokens"]


def test_the_loss_is_made_of_its_parts(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """sum(w mix) + elsewhere x sum(cross-entropy), over the weights of the chosen and the number of the others."""
    rows, positions = choice(dataset, "heavy")
    objective = {"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": 0.4}
    result, metrics = run(dataset, "heavy", tmp_path / "out", objective=objective)
    settings = BatchesConfig(context_tokens=64, batch_rows=4, window_documents=16)
    stream = Loader(dataset, rows, settings, positions=positions, elsewhere=True)
    total = 0
    for batch, line in zip(stream, metrics, strict=False):
        chosen, others = batch.targets.chosen_weight, batch.targets.num_elsewhere
        mix = 0.1 * line["cross_entropy"] + 0.9 * line["forward_kl"]
        expected = (chosen * mix + others * 0.4 * line["cross_entropy_elsewhere"]) / (chosen + others)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
        total += len(batch.targets)
    assert result.target_tokens == total and "cross_entropy_elsewhere" in result.losses


def test_the_cross_entropy_of_all_targets_is_that_of_both_parts(dataset: kdata.Dataset, tmp_path: Path) -> None:
    objective = {"weights": {"cross_entropy": 1.0}, "cross_entropy_elsewhere": 1.0}
    _, both = run(dataset, "some", tmp_path / "both", objective=objective)
    rows = open_plan(dataset, "some")
    whole = make_plan(
        dataset, "whole", rows.ids, method="mine", parameters={}, repeats=rows.repeats
    ).save(dataset.path / "plans")  # fmt: skip
    _, plain = run(dataset, whole.stem, tmp_path / "plain", objective={"weights": {"cross_entropy": 1.0}})
    assert [line["loss"] for line in both] == pytest.approx([line["loss"] for line in plain], rel=1e-5)


def test_a_run_resumes_bit_equal_and_refuses_other_positions(dataset: kdata.Dataset, tmp_path: Path) -> None:
    settings = config(checkpoint_every_steps=2)
    whole = train(settings, dataset.path, "heavy", tmp_path / "whole")
    out = stop_before(4, settings, dataset, tmp_path / "halves", plan="heavy")
    for other in ("some", None):
        with pytest.raises(MismatchError):
            train(settings, dataset.path, other, out)
    assert train(settings, dataset.path, "heavy", out).losses == whole.losses
    assert lines(out)[-1]["loss"] == lines(tmp_path / "whole")[-1]["loss"]


def test_a_mixture_and_phases_count_the_chosen_positions(dataset: kdata.Dataset, tmp_path: Path) -> None:
    mixture = DDKMixture(every_steps=2, heldout_share=0.1)
    phases = [PhaseConfig(name="chosen", mixture=mixture, steps=4), PhaseConfig(name="whole", plan="all", steps=2)]
    result, metrics = run(dataset, "some", tmp_path / "out", phases=phases)
    assert metrics[3]["target_tokens"] < 0.5 * metrics[3]["tokens"]
    last = metrics[-1]["target_tokens"] - metrics[3]["target_tokens"]
    assert last > 0.5 * (metrics[-1]["tokens"] - metrics[3]["tokens"])
    assert result.plan == "all"


def test_settings_that_do_not_fit_the_plan_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    for plan in (None, "all"):
        with pytest.raises(ConfigError, match="every target counts: it is for plans that choose positions"):
            run(dataset, plan, tmp_path / "out", objective={"cross_entropy_elsewhere": 1.0})
        with pytest.raises(ConfigError, match="every target counts"):
            PackedRows(dataset, plan, context_tokens=64, items=2, objective={"cross_entropy_elsewhere": 1.0})
    assert not (tmp_path / "out").exists()


def test_a_plan_with_a_masked_position_is_refused_by_the_row(dataset: kdata.Dataset, tmp_path: Path) -> None:
    make_plan(dataset, "masked", ["doc-7"], method="mine", parameters={}, positions=[[3, 4]]).save(
        dataset.path / "plans"
    )
    with pytest.raises(CorruptError, match="row 'doc-7': the plan chooses position 4, which is no target"):
        run(dataset, "masked", tmp_path / "out")


@pytest.mark.slow
def test_two_ranks_have_the_gradients_and_counts_of_one(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """With weights and the cross-entropy elsewhere, by DDP and FSDP2, in micro-batches; one step without clipping."""
    objective = {"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": 0.4}
    one = {**ONE, "objective": objective, "micro_batch_tokens": 64}

    def job(kind: str, **changes: object) -> dict[str, Any]:
        settings = {**BASE, "parallel": "fsdp" if kind == "fsdp" else "ddp", **one, **changes}
        return {"config": settings, "dataset": str(dataset.path), "plan": "heavy", "out": str(tmp_path / kind)}

    rank.run(job("one"))
    run_ranks([job("ddp"), job("fsdp")], tmp_path / "jobs")
    [want] = lines(tmp_path / "one")
    for kind in ("ddp", "fsdp"):
        [got] = lines(tmp_path / kind)
        assert got["target_tokens"] == want["target_tokens"]
        for name in ("loss", "cross_entropy", "forward_kl", "cross_entropy_elsewhere", "grad_norm"):
            assert got[name] == pytest.approx(want[name], rel=1e-5)
        moments = tensors(tmp_path / kind)
        for name, tensor in tensors(tmp_path / "one").items():
            if name.startswith("exp_avg."):
                torch.testing.assert_close(moments[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()))


# ---------------------------------------------------------------------------------------------------------- other trainers


def student() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("elsewhere", [None, 0.4])
@pytest.mark.parametrize("layout", ["rows", "flat", "padded"])
def test_items_and_labels_count_the_chosen_tokens(dataset: kdata.Dataset, layout: Any, elsewhere: float | None) -> None:
    """Items are the rows of our stream; every layout and split gives the loss of the whole."""
    rows, positions = choice(dataset, "heavy")
    plan = open_plan(dataset, "heavy")
    objective = {"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": elsewhere}
    data = PackedRows(dataset, plan, context_tokens=64, items=6, objective=objective, window_documents=16)
    settings = BatchesConfig(context_tokens=64, batch_rows=6, window_documents=16)
    ours = next(iter(Loader(dataset, rows, settings, positions=positions, elsewhere=elsewhere is not None)))
    batch = Collator(layout)([data[number] for number in range(6)])
    targets = batch["targets"].targets
    assert same_targets(targets, ours.targets) and targets.total_weight == ours.targets.total_weight
    assert int((batch["labels"] != -100).sum()) == len(targets)
    model = attach_loss(student(), data, layout=layout)
    whole = model(**batch)
    halves = [Collator(layout)([data[n] for n in part]) for part in (range(2), range(2, 6))]
    parts = [model(**half, counted_tokens=targets.total_weight) for half in halves]
    assert float(sum(part.loss.detach() for part in parts)) == pytest.approx(float(whole.loss.detach()), rel=1e-5)
    torch.testing.assert_close(sum(part.sums_O for part in parts), whole.sums_O)
    if elsewhere is None:
        mix = torch.tensor([0.1, 0.9]) @ whole.sums_O / targets.chosen_weight
        assert float(whole.loss.detach()) == pytest.approx(float(mix), rel=1e-5)


@pytest.mark.parametrize("weights", [{"cross_entropy": 0.1, "forward_kl": 0.9}, {"forward_kl": 1.0}])
@pytest.mark.parametrize("over", ["hidden", "logits"])
def test_the_cross_entropy_elsewhere_is_that_of_the_logits(
    dataset: kdata.Dataset, over: Any, weights: dict[str, float]
) -> None:
    """Against a log-softmax in float64, whether the mix has a cross-entropy or not."""
    objective = {"weights": weights, "cross_entropy_elsewhere": 0.4}
    data = PackedRows(dataset, "heavy", context_tokens=64, items=6, objective=objective, window_documents=16)
    batch = Collator("rows")([data[number] for number in range(6)])
    model = attach_loss(student(), data, over=over)
    output = model(**batch)
    inputs = {name: value for name, value in batch.items() if name not in ("targets", "labels")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1).double()
    targets = batch["targets"].targets
    logprobs = torch.log_softmax(logits[batch["targets"].predictor_M], -1)
    each = -logprobs.gather(1, targets.token_ids_C[:, None])[:, 0]
    others = ~targets.chosen_C
    assert int(others.sum()) == targets.num_elsewhere > 10
    assert float(output.elsewhere) == pytest.approx(float(each[others].sum()), rel=1e-5)


def test_trainer_logs_the_cross_entropy_elsewhere(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """In training and evaluation; the loss is made of its parts. Without the setting there is no such number."""
    from transformers import TrainingArguments

    from kdata.trainer.parts.huggingface import DistillTrainer

    def log(elsewhere: float | None) -> list[dict[str, float]]:
        objective = {"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": elsewhere}
        data = PackedRows(dataset, "heavy", context_tokens=64, items=6, objective=objective, window_documents=16)
        arguments = TrainingArguments(
            str(tmp_path / f"{elsewhere}"), use_cpu=True, report_to=[], max_steps=1, logging_steps=1, disable_tqdm=True,
            per_device_train_batch_size=3, gradient_accumulation_steps=2, per_device_eval_batch_size=6, learning_rate=0.0,
        )  # fmt: skip
        trainer = DistillTrainer(model=student(), args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        trainer.evaluate()
        targets = Collator("rows")([data[number] for number in range(6)])["targets"].targets
        counts = {"chosen": targets.chosen_weight, "others": float(targets.num_elsewhere)}
        lines = trainer.state.log_history
        return [next(line for line in lines if name in line) | counts for name in ("loss", "eval_loss")]

    for prefix, line in zip(("", "eval_"), log(0.4), strict=True):
        loss, elsewhere, chosen, others = (
            line[name] for name in (f"{prefix}loss", f"{prefix}cross_entropy_elsewhere", "chosen", "others")
        )
        mix = 0.1 * line[f"{prefix}cross_entropy"] + 0.9 * line[f"{prefix}forward_kl"]
        assert loss == pytest.approx((chosen * mix + 0.4 * others * elsewhere) / (chosen + others), rel=1e-4)
    assert not any("elsewhere" in name for line in log(None) for name in line)


def test_documents_streams_and_empty_items(dataset: kdata.Dataset) -> None:
    plan: Plan = open_plan(dataset, "heavy")
    documents = Documents(dataset, plan, context_tokens=64, epochs=1, window_documents=16)
    assert sum(len(documents[n]["targets"]) for n in range(len(documents))) == sum(
        len(batch["targets"]) for batch in RowStream(dataset, plan, config=CONFIG, epochs=1)
    )
    filled = documents.filled_to(7)
    batch = Collator("padded")([filled[0], filled[len(filled) - 1]])
    assert batch["targets"].targets.weights_C is not None
    assert len(batch["targets"]) == len(documents[0]["targets"])
    stream = RowStream(dataset, plan, config=CONFIG)
    state = stream.state_dict()
    assert state["positions"] == choice(dataset, "heavy")[1].digest
