"""Mixtures: DDK's formula on exact numbers, domains drawn by weights, nothing lost between periods, exact resume."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import kdata
from kdata.errors import ConfigError, DataError, MismatchError, TrainingError
from kdata.loader.batches import BatchesConfig
from kdata.selection.plan import make_plan
from kdata.trainer.config import PhaseConfig, ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDK, DDKMixture, Fixed, FixedMixture
from kdata.trainer.heldout import keep_aside, open_heldout, student_losses
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch
from kdata.trainer.mixed_loader import MixedLoader
from kdata.trainer.student import build_student, head_of, hidden_states
from kdata.trainer.train import train
from tests.trainer.datasets import make_dataset
from tests.trainer.runs import lines

LENGTHS = [5 + (i * 7) % 40 for i in range(120)]
TINY = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
ALONE = Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """60 documents of `code` (the even ones) and 60 of `prose`."""
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS)


def loader(dataset: kdata.Dataset, rank: int = 0, world_size: int = 1, **config: int) -> MixedLoader:
    settings = BatchesConfig(**{"context_tokens": 64, "batch_rows": 2, "window_documents": 16, **config})
    return MixedLoader(dataset, None, settings, rank=rank, world_size=world_size)


def read(source: MixedLoader, batches: int) -> list[Batch]:
    return list(islice(iter(source), batches))


def rows_of(batches: Sequence[Batch]) -> list[int]:
    return [int(row) for batch in batches for row in batch.rows]


# ------------------------------------------------------------------------------------------------------------ the formulas


def test_ddk_on_exact_numbers() -> None:
    """Two domains; perplexities 8 and 4 against 4 and 4: ratios 2 and 1."""
    ddk = DDK(DDKMixture(), {"a": math.log(4), "b": math.log(4)})
    assert ddk.weights == {"a": 0.5, "b": 0.5}
    ddk.update({"a": math.log(8), "b": math.log(4)})
    start = math.exp(2) / (math.exp(2) + math.exp(1))
    assert ddk.weights == pytest.approx({"a": start, "b": 1 - start})
    ddk.update({"a": math.log(6), "b": math.log(8)})
    psi = {"a": start * math.exp(1.5), "b": (1 - start) * math.exp(2)}
    total = sum(psi.values())
    expected = {d: 0.5 * p / total + 0.5 / 2 for d, p in psi.items()}
    assert ddk.weights == pytest.approx(expected)
    other = DDK(DDKMixture(), {"a": math.log(4), "b": math.log(4)})
    other.load_state_dict(json.loads(json.dumps(ddk.state_dict())))
    for mixture in (ddk, other):
        mixture.update({"a": 1.0, "b": 2.0})
    assert ddk.weights == other.weights


def test_ddk_weights_recover_from_zero_and_losses_must_be_finite() -> None:
    ddk = DDK(DDKMixture(alpha=1.0, exponent_limit=700.0), {"a": 0.0, "b": 0.0})
    for ahead, behind in (("a", "b"), ("a", "b"), ("b", "a"), ("b", "a"), ("b", "a")):
        ddk.update({ahead: 0.0, behind: 9.0})
        assert math.fsum(ddk.weights.values()) == pytest.approx(1.0)
    assert ddk.weights["a"] == pytest.approx(1.0)
    before = dict(ddk.weights)
    with pytest.raises(TrainingError, match="held-out text of domain 'b' is nan"):
        ddk.update({"a": 1.0, "b": math.nan})
    assert ddk.weights == before
    with pytest.raises(ValueError, match="exponent_limit"):
        DDKMixture(exponent_limit=math.inf)


def test_ddk_without_smoothing_and_with_smoothing_alone() -> None:
    for alpha, expected in ((1.0, 1 / (1 + math.e)), (0.0, 0.5)):
        ddk = DDK(DDKMixture(alpha=alpha), {"a": 0.0, "b": 0.0})
        ddk.update({"a": 0.0, "b": 0.0})
        ddk.update({"a": math.log(1.0), "b": math.log(2.0)})
        assert ddk.weights == pytest.approx({"a": expected, "b": 1 - expected})


def test_ddk_clips_the_exponent_of_a_student_that_knows_nothing() -> None:
    ddk = DDK(DDKMixture(exponent_limit=3.0), {"a": 1.0, "b": 1.0, "c": 1.0})
    ddk.update({"a": 1000.0, "b": 1.0 + math.log(4.0), "c": 1.0})
    weights = np.exp([3.0, 3.0, 1.0]) / np.exp([3.0, 3.0, 1.0]).sum()
    assert list(ddk.weights.values()) == pytest.approx(weights.tolist())


def test_fixed_weights_are_scaled_and_name_every_domain() -> None:
    mixture = Fixed(FixedMixture(weights={"b": 1, "a": 3}), ["a", "b"])
    assert mixture.weights == {"a": 0.75, "b": 0.25}
    wrong = (({"a": 1.0}, "name each"), ({"a": 0.0, "b": 0.0}, "not all 0"), ({"a": -1, "b": 2}, ">= 0"))
    for weights, message in wrong:
        with pytest.raises(ConfigError, match=message):
            Fixed(FixedMixture(weights=weights), ["a", "b"])


# ------------------------------------------------------------------------------------------------------------- the stream


def domain_tokens(rows: list[int]) -> dict[str, int]:
    return {name: sum(LENGTHS[row] for row in rows if row % 2 == n) for n, name in enumerate(("code", "prose"))}


@pytest.mark.parametrize("share", [0.8, 0.3, 0.0])
def test_weights_are_shares_of_tokens(dataset: kdata.Dataset, share: float) -> None:
    source = loader(dataset)
    source.begin({"code": share, "prose": 1 - share}, 400)
    tokens = domain_tokens(rows_of(read(source, 200)))
    code_share = tokens["code"] / sum(tokens.values())
    assert code_share == pytest.approx(share, abs=0.0 if share == 0 else 0.05)  # about 1,000 documents are drawn


def test_a_domain_is_read_through_before_it_begins_again(dataset: kdata.Dataset) -> None:
    """Over periods of changing weights, whatever was drawn and not reached before a period ended."""
    source, seen = loader(dataset), Counter[int]()
    for period in range(12):
        source.begin({"code": 0.9, "prose": 0.1} if period % 2 else {"code": 0.4, "prose": 0.6}, 10)
        seen.update(rows_of(read(source, 5)))
    source.begin({"code": 0.5, "prose": 0.5}, 2)  # settles the last period
    returned = 0
    for domain, queue in enumerate(source.state_dict()["queues"]):
        returned += len(queue["back"])
        waiting = Counter(source._rows_of(domain, np.array(queue["back"], np.int64)).tolist())
        cycle, place = divmod(queue["num_drawn"], 60)
        counts = [seen[row] + waiting[row] for row in range(domain, 120, 2)]
        assert counts.count(cycle + 1) == place and counts.count(cycle) == 60 - place
    assert (
        source.state_dict()["queues"][0]["num_drawn"] > 120 and returned > 0
    )  # it did begin again, and some came back


def test_the_order_does_not_depend_on_ranks_or_micro_batches(dataset: kdata.Dataset) -> None:
    def stream(batch_rows: int, ranks: int) -> list[list[int]]:
        sources = [loader(dataset, rank, ranks, batch_rows=batch_rows) for rank in range(ranks)]
        rows = []
        for weights in ({"code": 0.7, "prose": 0.3}, {"code": 0.2, "prose": 0.8}):
            for source in sources:
                source.begin(weights, 24)
            parts = [read(source, 24 // batch_rows) for source in sources]
            rows += [ids.tolist() for group in zip(*parts, strict=True) for b in group for ids in b.input_ids]
        return rows

    whole = stream(2, 1)
    assert len(whole) == 48 and stream(6, 1) == stream(4, 2) == stream(6, 3) == whole


@pytest.mark.parametrize("stop", [1, 7, 12, 13])
def test_a_stream_resumes_anywhere_and_on_another_number_of_ranks(dataset: kdata.Dataset, stop: int) -> None:
    """12 batches of a period, then 12 of the next."""
    periods = ({"code": 0.7, "prose": 0.3}, {"code": 0.1, "prose": 0.9})

    def go(source: MixedLoader, begin: int, end: int) -> list[list[int]]:
        rows = []
        for number in range(begin, end):
            if number % 12 == 0:
                source.begin(periods[number // 12], 24)
            rows += [ids.tolist() for b in read(source, 1) for ids in b.input_ids]
        return rows

    whole = go(loader(dataset), 0, 24)
    first = loader(dataset)
    begun = go(first, 0, stop)
    state = json.loads(json.dumps(first.state_dict()))
    halves = [loader(dataset, rank, 2) for rank in (0, 1)]
    for half in halves:
        half.load_state_dict(state)
    rest = [go(half, stop, 24) for half in halves]
    assert begun + [row for pair in zip(*rest, strict=True) for row in pair] == whole


def test_another_seed_or_plan_does_not_resume_and_no_period_is_refused(dataset: kdata.Dataset) -> None:
    source = loader(dataset)
    with pytest.raises(DataError, match="call begin"):
        iter(source)
    source.begin({"code": 0.5, "prose": 0.5}, 4)
    with pytest.raises(MismatchError, match="another seed"):
        loader(dataset, seed=3).load_state_dict(source.state_dict())
    plan = np.arange(60)
    other = MixedLoader(dataset, plan, BatchesConfig(context_tokens=64, batch_rows=2, window_documents=16))
    with pytest.raises(MismatchError, match="another identity"):
        other.load_state_dict(source.state_dict())


# ------------------------------------------------------------------------------------------------------------- held out


def test_rows_are_held_out_with_all_their_repeats(dataset: kdata.Dataset) -> None:
    planned = np.repeat(np.arange(120), 2)
    config = DDKMixture(heldout_share=0.1, heldout_documents=4)
    left, heldout = keep_aside(dataset, planned, config, seed=0)
    assert heldout.domains == ["code", "prose"] and len(heldout.rows) == 8
    assert sorted({*left.tolist(), *heldout.rows.tolist()}) == list(range(120)) and len(left) == 240 - 16
    assert not set(left.tolist()) & set(heldout.rows.tolist())
    index = dataset.index(["nll", "num_target_tokens", "domain"]).to_pandas().iloc[heldout.rows]
    for domain, part in index.groupby("domain"):
        expected = np.average(part["nll"], weights=part["num_target_tokens"])
        assert heldout.teacher_losses[domain] == pytest.approx(expected)
    other = keep_aside(dataset, None, config, seed=1)[1].rows
    assert other.tolist() != heldout.rows.tolist()


def test_the_students_losses_are_the_dense_ones(dataset: kdata.Dataset) -> None:
    model = build_student(TINY, dataset, 0)
    _, heldout = keep_aside(dataset, None, DDKMixture(heldout_share=0.2), seed=0)
    measured = student_losses(Learner(model), heldout, 64, 2, ALONE)
    totals = {domain: [0.0, 0] for domain in heldout.domains}
    for row in heldout.rows.tolist():
        sequence = dataset[row]
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            states = hidden_states(model, ids, torch.arange(ids.shape[1])[None])[0]
        log_q = torch.log_softmax((states @ head_of(model).T).double(), -1)
        counted = np.flatnonzero(sequence.target_mask)
        total = totals[heldout.domains[heldout.domain_R[row]]]
        total[0] -= float(log_q[counted - 1, ids[0, counted]].sum().detach())
        total[1] += len(counted)
    assert measured == pytest.approx({domain: nll / count for domain, (nll, count) in totals.items()}, rel=1e-5)
    assert model.training


def test_data_that_cannot_be_held_out_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"domain 'code' has 1 documents, too few to hold out 1"):
        keep_aside(dataset, np.array([0, 1, 3]), DDKMixture(), seed=0)
    few = make_dataset(tmp_path / "few", [9, 9], mask_every=1)  # no token counts
    with pytest.raises(ConfigError, match=r"domain 'code': the index holds no teacher's loss"):
        open_heldout(str(few.path), ["code", "prose"], DDKMixture())
    with pytest.raises(ConfigError, match="has no document of domain 'law'"):
        open_heldout(str(dataset.path), ["code", "law"], DDKMixture())


# ------------------------------------------------------------------------------------------------------------- in the loop


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": TINY,
        "steps": 20,
        "batch_tokens": 256,
        "context_tokens": 64,
        "warmup_steps": 3,
        "learning_rate": 5e-3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "window_documents": 16,
        "mixture": DDKMixture(every_steps=6, heldout_share=0.1),
    }
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def mixed_run(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "run"
    train(config(), dataset.path, None, out)
    return out


def test_a_run_measures_its_losses_every_k_steps_and_keeps_the_history(dataset: kdata.Dataset, mixed_run: Path) -> None:
    periods = {line["step"]: line["mixture"] for line in lines(mixed_run) if "mixture" in line}
    assert list(periods) == [1, 7, 13, 19]  # before steps 0, 6, 12 and 18 counted from 0
    _, heldout = keep_aside(dataset, None, DDKMixture(heldout_share=0.1), seed=0)
    fresh = student_losses(Learner(build_student(TINY, dataset, 0)), heldout, 64, 4, ALONE)
    assert periods[1]["losses"] == pytest.approx(fresh)
    ddk = DDK(DDKMixture(), heldout.teacher_losses)
    for entry in periods.values():
        ddk.update(entry["losses"])
        assert entry["weights"] == ddk.weights
    assert periods[19]["losses"]["code"] < periods[1]["losses"]["code"]


class Killed(BaseException):
    """Stands for a kill between two steps."""


@pytest.mark.parametrize("stop", [5, 6, 7, 18])
def test_a_mixed_run_resumes_bit_equal_at_any_step(
    dataset: kdata.Dataset, mixed_run: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside a period, at its end, and after its first step; the last checkpoint is that of the step before."""
    import kdata.trainer.train as module

    real = module._gradients

    def dying(*arguments):
        if arguments[-1] == stop + 1:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "_gradients", dying)
        train(config(), dataset.path, None, tmp_path)
    train(config(), dataset.path, None, tmp_path)
    keys = ("step", "loss", "grad_norm", "tokens", "mixture")
    got, want = ([[line.get(k) for k in keys] for line in lines(out)] for out in (tmp_path, mixed_run))
    assert got == want
    assert (tmp_path / "model/model.safetensors").read_bytes() == (mixed_run / "model/model.safetensors").read_bytes()


def test_another_heldout_set_does_not_resume(dataset: kdata.Dataset, mixed_run: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", LENGTHS[:20], seed=4)
    mixture = DDKMixture(every_steps=6, heldout_share=0.1, heldout=str(other.path))
    with pytest.raises(MismatchError, match=r"phases\.train\.data"):
        train(config(mixture=mixture), dataset.path, None, mixed_run)
    result = train(config(mixture=mixture, steps=4), dataset.path, None, tmp_path / "own")
    assert result.steps == 4 and set(lines(tmp_path / "own")[0]["mixture"]["losses"]) == {"code", "prose"}


def test_fixed_weights_in_a_plan_and_a_phase(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """Only the plan's documents of the weighted domain are read."""
    ids = [f"doc-{i}" for i in range(10)]
    plan = make_plan(dataset, "few", ids, method="sql", parameters={}).save(tmp_path / "plans")
    phases = [PhaseConfig(name="only", mixture=FixedMixture(weights={"code": 1.0, "prose": 0.0}, every_steps=3))]
    result = train(config(phases=phases, mixture=None, steps=5), dataset.path, plan, tmp_path / "run")
    periods = [line["mixture"] for line in lines(tmp_path / "run") if "mixture" in line]
    assert periods == [{"weights": {"code": 1.0, "prose": 0.0}}] * 2
    assert 0 < result.tokens <= 5 * 256
