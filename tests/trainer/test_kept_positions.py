"""Training on a dataset that keeps distributions at some positions only: as on a whole one with a plan of these positions."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdata
from kdata.errors import ConfigError, DataError
from kdata.format.temper import at_temperature
from kdata.loader.batches import Batches, BatchesConfig, keeps_something
from kdata.selection.plan import make_plan, open_plan
from kdata.trainer.config import PhaseConfig, ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.domain_weights import DDKMixture, FixedMixture
from kdata.trainer.evaluate import evaluate
from kdata.trainer.fused import distillation_loss
from kdata.trainer.heldout import keep_aside, student_losses
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.mixed_loader import MixedLoader
from kdata.trainer.objective_config import ObjectiveConfig, resolve_tail
from kdata.trainer.parts import Collator, PackedRows, RowStream
from kdata.trainer.phases import open_phases
from kdata.trainer.student import build_student
from kdata.trainer.train import train
from tests.fakes import VOCAB, rows_of_text, run_capture, write_jsonl
from tests.trainer.runs import lines

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"temperatures": [2.0]},
    "adaptive": {"mass": 0.8, "min_k": 2, "k": 20},
    "sampled": {"num_draws": 20},
    "hybrid": {"num_draws": 12, "temperatures": [2.0]},
    "threshold": {"threshold": 0.05, "temperatures": [2.0]},
}
CONFIG = BatchesConfig(context_tokens=64, batch_rows=2, window_documents=16)
ORDER = "0" * 64  # so that two datasets of the same text give the same batches
Pair = tuple[kdata.Dataset, kdata.Dataset]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Pair]:
    """For each kind: the dataset with some positions, and the whole one with the plan `same`. Some rows keep nothing."""
    root = tmp_path_factory.mktemp("pairs")
    corpus = write_jsonl(root / "corpus.jsonl", rows_of_text(60))
    by_kind = {}
    for kind, settings in KINDS.items():
        rule = {"rule": "entropy", "threshold": 3.3}
        some = run_capture(root / f"{kind}-some", corpus, tokenizer_dir, kind=kind, positions=rule, **settings)
        whole = run_capture(root / f"{kind}-whole", corpus, tokenizer_dir, kind=kind, **settings)
        kept = {row.id: np.flatnonzero(row.num_kept) for row in some}
        ids = [row_id for row_id, own in kept.items() if len(own)]
        assert 0.4 * len(kept) < len(ids) < len(kept)
        plan = make_plan(whole, "same", ids, method="mine", parameters={}, positions=[kept[row_id] for row_id in ids])
        plan.save(whole.path / "plans")
        make_plan(some, "rows", ids, method="mine", parameters={}).save(some.path / "plans")
        by_kind[kind] = some, whole
    return by_kind


def both(pair: Pair, *, elsewhere: bool = False, temperature: float = 1.0) -> tuple[list[Batch], list[Batch]]:
    """Batches of both datasets in one order."""
    some, whole = pair
    rows, positions = open_plan(whole, "same").choice(whole)
    own = open_plan(some, "rows").choice(some)[0] if elsewhere else None
    options: dict[str, Any] = {"order_key": ORDER, "elsewhere": elsewhere, "temperature": temperature}
    ours = Loader(some, own, CONFIG, **options)
    theirs = Loader(whole, rows, CONFIG, positions=positions, **options)
    return list(islice(ours, 12)), list(islice(theirs, 12))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_a_plan_with_the_same_positions(
    pairs: dict[str, Pair], kind: str, elsewhere: bool, temperature: float
) -> None:
    if temperature != 1.0 and "temperatures" not in KINDS[kind]:
        return
    ours, theirs = both(pairs[kind], elsewhere=elsewhere, temperature=temperature)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("input_ids", "position_ids", "segment_ids", "predictor_M"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        for name, values in vars(other.targets).items():
            own = getattr(one.targets, name)
            assert torch.equal(own, values) if isinstance(values, torch.Tensor) else own == values, name
        assert np.array_equal(one.logprob_M, other.logprob_M) and np.array_equal(one.rows, other.rows)
        assert (one.targets.chosen_C is not None) == elsewhere


@pytest.mark.parametrize("kind", [kind for kind, settings in KINDS.items() if "temperatures" in settings])
def test_the_tail_at_a_temperature_is_known_where_entries_are(pairs: dict[str, Pair], kind: str) -> None:
    """It is that of the whole dataset there. Elsewhere it is NaN, and batches, whose losses do not use it there, have 0."""
    some, whole = pairs[kind]
    for own, full in zip(some, whole, strict=True):
        warm, wanted = (at_temperature(row.sequence, 2.0, some.info.codec).log_tail for row in (own, full))
        kept = own.num_kept > 0
        np.testing.assert_array_equal(warm[kept], wanted[kept])
        assert np.isnan(warm[~kept]).all() and np.isnan(own.log_tail).tolist() == np.isnan(full.log_tail).tolist()
        np.testing.assert_array_equal(at_temperature(own.sequence, 1.0, some.info.codec).log_tail, own.log_tail)
    for batch in both(pairs[kind], elsewhere=True, temperature=2.0)[0]:
        assert batch.targets.chosen_C is not None
        assert not batch.targets.log_tail_C[~batch.targets.chosen_C].any()
        assert not batch.targets.log_tail_C.isnan().any()


@pytest.mark.parametrize("elsewhere", [None, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_a_plan_with_the_same_positions(
    pairs: dict[str, Pair], kind: str, elsewhere: float | None
) -> None:
    some, _ = pairs[kind]
    objective = ObjectiveConfig(
        weights={"cross_entropy": 0.2, "forward_kl": 0.8, **({} if kind == "sampled" else {"jsd": 0.3})},
        cross_entropy_elsewhere=elsewhere,
    )
    tail = resolve_tail(objective, some.info.tail, kind=kind)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    head_VD = torch.randn(VOCAB, 12, generator=rng).double().requires_grad_()
    ours, theirs = both(pairs[kind], elsewhere=elsewhere is not None)
    for one, other in zip(ours, theirs, strict=True):
        hidden_MD = torch.randn(len(one.targets), 12, generator=rng).double().requires_grad_()
        results = []
        for batch in (one, other):
            loss = distillation_loss(hidden_MD, head_VD, batch.targets, objective, tail)
            results.append((loss.total, *torch.autograd.grad(loss.total, (hidden_MD, head_VD))))
        for value, wanted in zip(*results, strict=True):
            assert torch.equal(value, wanted)


def test_targets_without_entries_have_the_gradient_of_cross_entropy_alone(pairs: dict[str, Pair]) -> None:
    """Against the dense softmax: nothing of KL, and the divisor counts each as one position."""
    objective = ObjectiveConfig(weights={"forward_kl": 1.0}, cross_entropy_elsewhere=0.5)
    batch = both(pairs["topk"], elsewhere=True)[0][0]
    chosen_C = batch.targets.chosen_C
    assert chosen_C is not None and 0 < int(chosen_C.sum()) < len(chosen_C)
    rng = torch.Generator().manual_seed(1)
    head_VD = torch.randn(VOCAB, 12, generator=rng).double()
    hidden_MD = torch.randn(len(chosen_C), 12, generator=rng).double().requires_grad_()
    total = distillation_loss(hidden_MD, head_VD, batch.targets, objective, "ghost").total
    [gradient_MD] = torch.autograd.grad(total, hidden_MD)
    loss = 0.5 * torch.nn.functional.cross_entropy(
        (hidden_MD @ head_VD.T)[~chosen_C], batch.targets.token_ids_C[~chosen_C], reduction="sum"
    )
    [wanted_MD] = torch.autograd.grad(loss / len(chosen_C), hidden_MD)
    torch.testing.assert_close(gradient_MD[~chosen_C], wanted_MD[~chosen_C], rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- the training


def config(**changes: object) -> TrainConfig:
    base: dict[str, object] = {
        "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64), "steps": 5,
        "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0, "learning_rate": 5e-3, "log_every_steps": 1,
        "checkpoint_every_steps": 0, "window_documents": 16, "data_order": "seed",
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


@pytest.mark.parametrize("elsewhere", [None, 0.4])
def test_a_run_has_the_losses_of_a_run_with_the_plan(
    pairs: dict[str, Pair], tmp_path: Path, elsewhere: float | None
) -> None:
    some, whole = pairs["hybrid"]
    settings = config(
        objective={"weights": {"cross_entropy": 0.1, "forward_kl": 0.9}, "cross_entropy_elsewhere": elsewhere}
    )
    train(settings, some.path, None if elsewhere is None else "rows", tmp_path / "some")
    train(settings, whole.path, "same", tmp_path / "whole")
    names = ["loss", "cross_entropy", "forward_kl", "grad_norm", "target_tokens"]
    for ours, theirs in zip(lines(tmp_path / "some"), lines(tmp_path / "whole"), strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]


def test_all_rows_are_read_where_other_targets_count(pairs: dict[str, Pair]) -> None:
    some, _ = pairs["topk"]
    without = Batches(some, None, CONFIG)
    with_all = Batches(some, None, CONFIG, elsewhere=True)
    assert len(without.rows) < len(with_all.rows) == some.num_rows
    counted = sum(len(batch.token_ids) for batch in with_all.epoch())
    assert counted == sum(entry.target_tokens for entry in some.manifest)
    assert sum(len(b.token_ids) for b in without.epoch()) == sum(entry.kept_positions for entry in some.manifest)


def test_other_loops_read_the_same_targets(pairs: dict[str, Pair]) -> None:
    some, whole = pairs["topk"]
    total = sum(entry.kept_positions for entry in some.manifest)
    rows = PackedRows(some, context_tokens=64, epochs=1)
    assert sum(len(item["targets"]) for item in (rows[n] for n in range(len(rows)))) == total
    planned = PackedRows(whole, "same", context_tokens=64, epochs=1)
    assert sum(len(item["targets"]) for item in (planned[n] for n in range(len(planned)))) == total
    objective = {"weights": {"forward_kl": 1.0}, "cross_entropy_elsewhere": 1.0}
    stream = RowStream(some, objective=objective, config=CONFIG, epochs=1)
    batches = [batch["targets"].targets for batch in stream]
    assert sum(len(targets) - targets.num_elsewhere for targets in batches) == total
    both_items = Collator()([rows[0], rows[1]])
    assert len(both_items["targets"]) == len(rows[0]["targets"]) + len(rows[1]["targets"])


def test_mixtures_draw_from_rows_that_keep_something(pairs: dict[str, Pair], tmp_path: Path) -> None:
    some, _ = pairs["hybrid"]
    every = MixedLoader(some, None, CONFIG, elsewhere=True)
    assert len(every.rows) == some.num_rows > len(MixedLoader(some, None, CONFIG).rows)
    phases = [PhaseConfig(name="mixed", mixture=DDKMixture(every_steps=2, heldout_share=0.2), steps=4)]
    train(config(phases=phases, data_order="dataset", steps=4), some.path, None, tmp_path / "out")
    periods = [line for line in lines(tmp_path / "out") if "mixture" in line]
    assert periods and lines(tmp_path / "out")[-1]["target_tokens"] < lines(tmp_path / "out")[-1]["tokens"]


def test_the_losses_of_ddk_are_those_of_the_whole_dataset(pairs: dict[str, Pair]) -> None:
    losses = []
    for dataset in pairs["topk"]:
        learner = Learner(build_student(config().student, dataset, 0))
        _, heldout = keep_aside(dataset, None, DDKMixture(heldout_share=0.3), seed=0)
        losses.append(student_losses(learner, heldout, 64, 2, Ranks(torch.device("cpu"))))
        losses.append(heldout.teacher_losses)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6) and losses[1] == pytest.approx(losses[3], rel=1e-6)


@pytest.fixture(scope="module")
def one_domain(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> kdata.Dataset:
    """Two domains, of which `prose` keeps nothing."""
    root = tmp_path_factory.mktemp("one-domain")
    corpus = write_jsonl(root / "corpus.jsonl", rows_of_text(40))
    dataset = run_capture(
        root / "d", corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": 5.69, "domains": ["code"]}
    )
    assert {row.domain for row in dataset if row.num_kept.any()} == {"code"}
    return dataset


def mixed(mixture: FixedMixture | DDKMixture, elsewhere: float | None) -> TrainConfig:
    objective = {"weights": {"forward_kl": 1.0}, "cross_entropy_elsewhere": elsewhere}
    return config(mixture=mixture, objective=objective, data_order="dataset", steps=4)


def domains_read(dataset: kdata.Dataset, settings: TrainConfig) -> set[str]:
    """Domains of the rows of the first period, with fixed weights."""
    phase = open_phases(settings, dataset.path, None, Ranks(torch.device("cpu")))[0]
    phase.begin_period(0, torch.nn.Identity(), 4, 64, Ranks(torch.device("cpu")))
    rows = [int(row) for batch in islice(phase.loader, 4) for row in batch.rows]
    return {dataset[row].domain for row in rows}


@pytest.mark.parametrize(
    ("mixture", "remedy"),
    [
        (FixedMixture(weights={"code": 0.5, "prose": 0.5}), "set its weight in mixture.weights to 0"),
        (FixedMixture(weights={"code": 1.0}), "set its weight in mixture.weights to 0"),
        (DDKMixture(every_steps=2, heldout_share=0.2), "leave it out with a plan"),
    ],
)
def test_a_mixture_with_a_domain_that_keeps_nothing_is_refused_before_training(
    one_domain: kdata.Dataset, tmp_path: Path, mixture: FixedMixture | DDKMixture, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=f"domain 'prose' keeps no distribution.*{remedy}"):
        train(mixed(mixture, None), one_domain.path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_domain_that_keeps_nothing_may_have_weight_0(one_domain: kdata.Dataset, tmp_path: Path) -> None:
    settings = mixed(FixedMixture(weights={"code": 1.0, "prose": 0.0}), None)
    train(settings, one_domain.path, None, tmp_path / "out")
    assert lines(tmp_path / "out")[0]["mixture"]["weights"] == {"code": 1.0, "prose": 0.0}
    assert domains_read(one_domain, settings) == {"code"}


def test_a_domain_that_keeps_nothing_is_drawn_where_other_targets_count(
    one_domain: kdata.Dataset, tmp_path: Path
) -> None:
    half = FixedMixture(weights={"code": 0.5, "prose": 0.5})
    assert domains_read(one_domain, mixed(half, 0.5)) == {"code", "prose"}
    for name, mixture in {"fixed": half, "ddk": DDKMixture(every_steps=2, heldout_share=0.2)}.items():
        train(mixed(mixture, 0.5), one_domain.path, None, tmp_path / name)
        last = lines(tmp_path / name)[-1]
        assert last["cross_entropy_elsewhere"] > 0 and last["forward_kl"] > 0
    with pytest.raises(DataError, match="none of 20 rows has a position at which a distribution is kept"):
        train(mixed(FixedMixture(weights={"code": 0, "prose": 1}), 0.5), one_domain.path, None, tmp_path / "none")


def test_a_mixture_is_refused_where_all_that_a_domain_keeps_is_held_out(
    one_domain: kdata.Dataset, pairs: dict[str, Pair], tmp_path: Path
) -> None:
    some, _ = pairs["topk"]
    index = some.index(["id", "domain"])
    keeps = keeps_something(some)
    of_prose = {name: [r for r, d in enumerate(index["domain"].to_pylist()) if d == "prose" and keeps[r] == name]
                for name in (True, False)}  # fmt: skip
    rows = [*of_prose[True][:1], *of_prose[False][:4]]  # one of five prose rows keeps something
    rows += [r for r, d in enumerate(index["domain"].to_pylist()) if d == "code"]
    make_plan(some, "few", index["id"].take(rows).to_pylist(), method="mine", parameters={}).save(some.path / "plans")
    messages = []
    for seed in range(30):
        settings = mixed(DDKMixture(every_steps=2, heldout_share=0.2), None).model_copy(update={"seed": seed})
        planned = open_plan(some, "few").choice(some)[0]
        left, _ = keep_aside(some, planned, DDKMixture(heldout_share=0.2), seed)
        held_out = rows[0] not in left
        if held_out:
            with pytest.raises(ConfigError, match="domain 'prose' keeps no distribution") as caught:
                open_phases(settings, some.path, "few", Ranks(torch.device("cpu")))
            messages.append(str(caught.value))
        else:
            open_phases(settings, some.path, "few", Ranks(torch.device("cpu")))
    assert 0 < len(messages) < 30


def test_evaluation_counts_every_target_for_nll_and_those_with_entries_for_kl(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    some, whole = pairs["topk"]
    train(config(), whole.path, None, tmp_path / "student")
    model = tmp_path / "student" / "model"
    ours, full = evaluate(model, some.path)["overall"], evaluate(model, whole.path)["overall"]
    for name in ("nll", "teacher_nll", "ece", "tokens"):
        assert ours[name] == pytest.approx(full[name], rel=1e-6)
    assert ours["kept_tokens"] == sum(entry.kept_positions for entry in some.manifest) and "kept_tokens" not in full
    rows, positions = open_plan(whole, "same").choice(whole)
    chosen = Loader(whole, rows, CONFIG, positions=positions).epoch()
    measured = _mean_kl(model, chosen)
    assert ours["kl"] == pytest.approx(measured, rel=1e-5) and ours["kl"] != pytest.approx(full["kl"], rel=1e-3)


def _mean_kl(model_dir: Path, batches: Any) -> float:
    from transformers import AutoModelForCausalLM

    from kdata.trainer.fused import measure
    from kdata.trainer.student import head_of, hidden_states

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    values = []
    for batch in batches:
        with torch.no_grad():
            hidden_MD = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.predictor_M]
        values.append(measure(hidden_MD, head_of(model), batch.targets, ("forward_kl",), "ghost").values_MO[:, 0])
    return float(torch.cat(values).double().mean())


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> kdata.Dataset:
    """A dataset that keeps no distribution at all."""
    root = tmp_path_factory.mktemp("bare")
    corpus = write_jsonl(root / "corpus.jsonl", rows_of_text(8))
    return run_capture(root / "d", corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": 5.69})


@pytest.mark.parametrize("elsewhere", [None, 1.0])
def test_a_dataset_without_any_distribution_is_refused_before_training(
    bare: kdata.Dataset, tmp_path: Path, elsewhere: float | None
) -> None:
    objective = {"weights": {"forward_kl": 1.0}, "cross_entropy_elsewhere": elsewhere}
    with pytest.raises(DataError, match="none of 8 rows has a position at which a distribution is kept"):
        train(config(objective=objective), bare.path, None, tmp_path / "out")
    with pytest.raises(DataError, match="has a position at which a distribution is kept"):
        PackedRows(bare, context_tokens=64, items=2, objective=objective)
    assert not (tmp_path / "out").exists()


def test_rows_that_keep_nothing_are_refused_where_a_plan_has_only_these(pairs: dict[str, Pair], tmp_path: Path) -> None:
    some, _ = pairs["topk"]
    empty = [row.id for row in some if not row.num_kept.any()]
    make_plan(some, "empty", empty, method="mine", parameters={}).save(some.path / "plans")
    with pytest.raises(DataError, match=f"none of {len(empty)} rows has a position"):
        train(config(), some.path, "empty", tmp_path / "out")


def test_a_plan_that_chooses_a_position_without_entries_is_refused_before_training(
    pairs: dict[str, Pair], tmp_path: Path
) -> None:
    some, _ = pairs["topk"]
    row = next(row for row in some if row.num_kept.any() and not row.num_kept[1:].all())
    place = int(np.flatnonzero(row.num_kept[1:] == 0)[0]) + 1
    plan = make_plan(some, "bare", [row.id], method="mine", parameters={}, positions=[[place]])
    plan.save(some.path / "plans")
    with pytest.raises(ConfigError, match=f"chooses position {place} of row '{row.id}', at which"):
        train(config(), some.path, "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows, positions = plan.choice(some)
    with pytest.raises(
        ConfigError, match=f"row '{row.id}': the plan chooses position {place}, at which the dataset keeps"
    ):
        list(Batches(some, rows, CONFIG, positions=positions).epoch())


def test_a_held_out_domain_without_distributions_is_not_measured(
    bare: kdata.Dataset, tmp_path: Path, pairs: dict[str, Pair]
) -> None:
    train(config(steps=1), pairs["topk"][1].path, None, tmp_path / "student")
    with pytest.raises(DataError, match="no distribution is kept at any target of domain 'code'"):
        evaluate(tmp_path / "student" / "model", bare.path)
