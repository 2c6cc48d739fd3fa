"""The evidence runner: exact means and intervals, runs done once, full distillation exact, one tiny comparison."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.format.keep import KeepConfig
from kdata.loader.batches import BatchesConfig
from kdata.pipelines.evidence import advice, figures, offline
from kdata.pipelines.evidence.__main__ import app
from kdata.pipelines.evidence.data import DataConfig, EvidenceData, bytes_per_token, unit_hash
from kdata.pipelines.evidence.offline import BASELINE, REFERENCE, SETTINGS, Offline, OfflineConfig, Setting
from kdata.pipelines.evidence.online import OnlineLearner
from kdata.pipelines.evidence.runs import load_runs, path_of, run_all
from kdata.pipelines.evidence.summary import T_975, estimate, relative_difference, summarise
from kdata.teachers.transformers import TransformersTeacher
from kdata.trainer.config import CheckpointStudent, ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets
from kdata.trainer.student import build_student, head_of, hidden_states
from kdata.trainer.train import train
from tests.fakes import BOS, rows_of_text, save_llama, save_tokenizer

# ------------------------------------------------------------------------------------------------ means and intervals


def test_an_interval_is_students_t() -> None:
    interval = estimate([1.0, 2.0, 4.0])
    assert interval.mean == pytest.approx(7 / 3, rel=1e-15)
    # s^2 = 7/3; t(0.975, 2) = 0.95 * sqrt(2 / (0.975 * 0.025)) / 2 in closed form
    t = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))
    assert interval.half_width == pytest.approx(t * math.sqrt(7 / 9), rel=1e-6)
    assert estimate([3.0]).half_width is None
    assert estimate([5.0, 5.0]).half_width == 0.0


def test_the_quantiles_are_those_of_the_distribution() -> None:
    """The density of Student's t, integrated from -t to t, is 0.95 for each entry of the table."""
    for freedom, t in enumerate(T_975, 1):
        x = np.linspace(0, t, 20_001)
        log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
        density = np.exp(log_scale) * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
        assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=2e-7)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_an_interval_moves_and_stretches_with_its_values(values: list[float], shift: float, scale: float) -> None:
    a, b = estimate(values), estimate([v * scale + shift for v in values])
    assert b.mean == pytest.approx(a.mean * scale + shift, abs=1e-6)
    assert a.half_width is not None and b.half_width == pytest.approx(a.half_width * scale, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "error"), [([], DataError), ([1.0, math.nan], DataError), ([0.0] * 32, ConfigError)]
)
def test_values_without_an_interval_are_refused(values: list[float], error: type[Exception]) -> None:
    with pytest.raises(error):
        estimate(values)


def test_differences_are_paired() -> None:
    reference = {0: {"nll": 4.0}, 1: {"nll": 5.0}, 2: {"nll": 8.0}}
    other = {0: {"nll": 4.04}, 1: {"nll": 5.05}, 7: {"nll": 1.0}}
    difference = relative_difference(other, reference, "nll")
    assert difference is not None and difference.count == 2
    assert difference.mean == pytest.approx(0.01) and difference.half_width == pytest.approx(0, abs=1e-12)
    assert relative_difference({9: {"nll": 1.0}}, reference, "nll") is None


def test_a_figure_that_one_seed_lacks_has_no_mean() -> None:
    assert set(summarise({0: {"a": 1.0, "b": None}, 1: {"a": 2.0, "b": 3.0}})) == {"a"}


# ------------------------------------------------------------------------------------------------ runs


def test_a_finished_run_is_not_measured_again(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def measure(name: str, seed: int) -> dict[str, float | None]:
        asked.append((name, seed))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"nll": seed + len(name)}

    wanted = [("a", 0), ("a b", 0), ("a", 1)]
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, wanted, measure, {"steps": 3})
    assert run_all(tmp_path, wanted, measure, {"steps": 3}) == 2
    assert asked == [("a", 0), ("a b", 0), ("a b", 0), ("a", 1)]
    assert run_all(tmp_path, wanted, measure, {"steps": 3}) == 0
    assert load_runs(tmp_path, ["a b", "a", "c"]) == {"a b": {0: {"nll": 3.0}}, "a": {0: {"nll": 1.0}, 1: {"nll": 2.0}}}
    with pytest.raises(MismatchError, match="steps"):
        run_all(tmp_path, wanted, measure, {"steps": 4})
    descriptions = {"a": {"k": 1}, "a b": {"k": 2}}
    with pytest.raises(MismatchError, match="setting"):  # a name that stands for something else now
        run_all(tmp_path, wanted, measure, {"steps": 3}, describe=descriptions.__getitem__)
    path_of(tmp_path, "a", 0).write_text("{")
    with pytest.raises(CorruptError, match="delete it"):
        load_runs(tmp_path, ["a"])


def test_runs_of_another_process_are_skipped(tmp_path: Path) -> None:
    def inner(name: str, seed: int) -> dict[str, float | None]:
        # As another process would: the run that is being measured is locked.
        assert run_all(tmp_path, [("a", 0), ("b", 0)], lambda *_: {"x": 2.0}, {}) == 1
        return {"x": 1.0}

    assert run_all(tmp_path, [("a", 0), ("b", 0)], inner, {}) == 1
    assert load_runs(tmp_path, ["a", "b"]) == {"a": {0: {"x": 1.0}}, "b": {0: {"x": 2.0}}}


def test_no_run_starts_after_the_time_limit(tmp_path: Path) -> None:
    assert run_all(tmp_path, [("a", 0)], lambda *_: {"x": 1.0}, {}, keep_going=lambda: False) == 0


def test_every_setting_has_a_file_of_its_own() -> None:
    assert len({path_of(Path(), s.name, 0) for s in SETTINGS}) == len(SETTINGS)


def test_the_shared_identity_of_runs_holds_no_path() -> None:
    data = DataConfig(teacher="/a/teacher", corpus="/a/corpus.parquet")
    config = OfflineConfig(data=data, student=CheckpointStudent(model="/a/student"))
    assert "/" not in json.dumps(config.identity()) and config.identity()["student"]["model"] == "student"


# ------------------------------------------------------------------------------------------------ students


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> EvidenceData:
    """A tiny random teacher's data."""
    folder = tmp_path_factory.mktemp("evidence")
    rows = rows_of_text(120)
    frame = pl.DataFrame([{"id": r["id"], "domain": r["domain"], "text": r["text"]} for r in rows])
    frame.write_parquet(folder / "corpus.parquet")
    config = DataConfig(
        teacher=str(llama_dir), corpus=str(folder / "corpus.parquet"), train_tokens=1500, heldout_tokens=100,
        context_tokens=64,
    )  # fmt: skip
    return EvidenceData(config, folder / "data")


def tiny(data: EvidenceData, **changes: object) -> OfflineConfig:
    student = ScratchStudent(hidden_size=32, num_layers=1, num_heads=2)
    values = {"steps": 4, "batch_tokens": 256, "warmup_steps": 1, "precision": "fp32", **changes}
    return OfflineConfig.model_validate({"data": data.config, "student": student, **values})


def test_held_out_text_is_not_trained_on_and_every_kind_has_the_same_rows(data: EvidenceData) -> None:
    keeps = [KeepConfig(), KeepConfig(kind="topk", k=8)]
    first, second = (data.train(keep).index(["id", "content_hash"]) for keep in keeps)
    assert first.equals(second)
    held = data.heldout.index(["id"])["id"].to_pylist()
    assert not {name.split("#")[0] for name in held} & {name.split("#")[0] for name in first["id"].to_pylist()}
    assert all(unit_hash(name.split("#")[0]) < 0.1 for name in held)
    assert bytes_per_token(data.train(keeps[1])) > 0


def data_without_bos(data: EvidenceData, folder: Path, bos: Literal["add", "omit"] | None) -> EvidenceData:
    """Data of a teacher whose tokenizer has <s> and puts it nowhere."""
    save_llama(folder / "teacher")
    save_tokenizer(folder / "teacher", bos=False)
    changes = {"teacher": str(folder / "teacher"), "bos": bos, "train_tokens": 200}
    return EvidenceData(data.config.model_copy(update=changes), folder / "data")


@pytest.mark.parametrize("bos", ["add", "omit", None])
def test_the_states_are_of_the_texts_behind_bos_where_that_is_asked_for(
    data: EvidenceData, tmp_path: Path, bos: Literal["add", "omit"] | None
) -> None:
    """The stored log-probabilities are those of a plain forward pass over the ids of the row, with or without <s>."""
    own = data_without_bos(data, tmp_path, bos)
    dataset = own.train(KeepConfig(kind="topk", k=4))
    assert dataset.info.teacher.bos == bos
    rows = list(dataset)
    assert {row.token_ids[0] == BOS for row in rows} == {bos == "add"}
    teacher = AutoModelForCausalLM.from_pretrained(own.config.teacher, dtype=torch.float32).eval()
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(teacher(ids[None]).logits[0, :-1], -1)
        expected = logprobs.gather(1, ids[1:, None])[:, 0].numpy()
        rounding = np.sqrt(-expected) / 32 + 1e-3
        assert (np.abs(row.logprob[1:] - expected) <= rounding).all()
    assert ("bos" in own.config.model_dump()) == (bos is not None)  # data of before this setting stay comparable


def test_a_teacher_that_needs_bos_is_refused_before_it_reads(
    data: EvidenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is gained for a random teacher, so its readings behind <s> are made better by a nat."""
    own = data_without_bos(data, tmp_path, None)
    read = TransformersTeacher.read

    def better(self: Any, sequences: Any, *rest: Any) -> list[Any]:
        answers = read(self, sequences, *rest)
        for ids, answer in zip(sequences, answers, strict=True):
            answer.logprob[1:] += float(ids[0] == BOS)
        return answers

    monkeypatch.setattr(TransformersTeacher, "read", better)
    with pytest.raises(ConfigError, match=r"teacher\.bos=add"):
        own.states("heldout")
    assert not (own.folder / "states-heldout" / "states.npy").exists()


def test_a_name_chooses_one_setting_and_a_part_of_one_all_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Offline, "measure", lambda _, name, seed: asked.append(name) or {"nll": 1.0, "kl": 1.0})
    sources = [argument for name in ("teacher", "reference", "corpus") for argument in (f"--{name}", "x")]
    command = ["run", "offline", "--out", str(tmp_path), *sources, "--seeds", "1", "--only"]
    assert CliRunner().invoke(app, [*command, "sampled 12"]).exit_code == 0 and asked == ["sampled 12"]
    assert CliRunner().invoke(app, [*command, "8 + 28", "--only", "topk 16"]).exit_code == 0
    assert asked[1:] == ["hybrid 8 + 28", "topk 16, ghost", "topk 16, renormalised"]
    bad = CliRunner().invoke(app, ["run", "selection", "--out", str(tmp_path), *sources, "--bos", "add"])
    assert bad.exit_code == 2 and "takes no --bos" in bad.output


def test_students_of_a_seed_see_the_same_batches_whatever_is_kept(data: EvidenceData, tmp_path: Path) -> None:
    """Losses on the text alone are then equal up to rounding; with the order of the dataset they are not."""
    losses: dict[str, list[list[float]]] = {"seed": [], "dataset": []}
    for order, runs_of_order in losses.items():
        for number, keep in enumerate((KeepConfig(), KeepConfig(kind="topk", k=8))):
            config = Offline(tiny(data), data).train_config(Setting("x", "x", keep, objective="cross_entropy"), 3)
            config = config.model_copy(update={"log_every_steps": 1, "data_order": order})
            train(config, data.train(keep).path, None, tmp_path / f"{order}-{number}")
            lines = (tmp_path / f"{order}-{number}" / "metrics.jsonl").read_text().splitlines()
            runs_of_order.append([json.loads(line)["loss"] for line in lines])
    assert losses["seed"][0] == pytest.approx(losses["seed"][1], rel=1e-6) and len(losses["seed"][0]) == 4
    assert losses["dataset"][0] != pytest.approx(losses["dataset"][1], rel=1e-4)


def test_full_distillation_runs_in_the_trainers_loop(data: EvidenceData, tmp_path: Path) -> None:
    """Its cross-entropy is that of a student trained on the stored targets at the first step, before they part."""
    dataset, states = data.train(KeepConfig()), data.states("train")
    first: dict[str, dict[str, float]] = {}
    for name, learner_of in (("online", partial(OnlineLearner, states=states, dataset=dataset)), ("stored", Learner)):
        config = Offline(tiny(data), data).train_config(Setting("x", "x", KeepConfig()), 3)
        result = train(config, dataset.path, None, tmp_path / name, learner_of=learner_of)
        assert result.steps == 4 and set(result.losses) == {"loss", "cross_entropy", "forward_kl"}
        first[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
    assert first["online"]["loss"] == pytest.approx(first["online"]["forward_kl"], rel=1e-6)
    assert first["online"]["cross_entropy"] == pytest.approx(first["stored"]["cross_entropy"], rel=1e-5)
    assert first["online"]["loss"] != first["stored"]["loss"]


def test_full_distillation_is_the_dense_loss(data: EvidenceData) -> None:
    """Value and gradients of the fused core with every id of the vocabulary kept, and the teacher's own forward pass."""
    dataset, states = data.train(KeepConfig()), data.states("train")
    grads, totals = [], []
    for way in ("online", "dense"):
        config = TrainConfig(student=ScratchStudent(hidden_size=32, num_layers=1, num_heads=2), context_tokens=64)
        student = build_student(config.student, dataset, 0)
        batch = next(iter(Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=4))))
        if way == "online":
            total, _ = OnlineLearner(student, "fp32", states, dataset)(batch, ObjectiveConfig(), "ghost", 100)
        else:
            teacher = AutoModelForCausalLM.from_pretrained(data.config.teacher, dtype=torch.float32).eval()
            with torch.no_grad():
                hidden = hidden_states(teacher, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.predictor_M]
                logprobs = torch.log_softmax(hidden @ head_of(teacher).T, -1)
            ids = torch.arange(logprobs.shape[1]).expand_as(logprobs)
            nothing = torch.full((len(ids),), -math.inf)
            targets = Targets(batch.targets.token_ids_C, ids, logprobs, nothing)
            mine = hidden_states(student, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.predictor_M]
            objective = ObjectiveConfig(weights={"forward_kl": 1.0})
            total = distillation_loss(mine, head_of(student), targets, objective, "ghost", counted_tokens=100).total
        total.backward()
        totals.append(float(total.detach()))
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert (grads[0] - grads[1]).abs().max() < 1e-5 * grads[1].abs().max()


def test_a_tiny_comparison_from_text_to_table(
    data: EvidenceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = (
        Setting(REFERENCE, "online"),
        Setting(BASELINE, "none", objective="cross_entropy"),
        Setting("hybrid 8 + 28", "hybrid", KeepConfig(kind="hybrid")),
        Setting("topk 8, renormalised", "topk, renormalised", KeepConfig(kind="topk", k=8), "renormalise", peer="some"),
    )
    monkeypatch.setattr(offline, "SETTINGS", chosen)
    monkeypatch.setattr(figures, "SETTINGS", chosen)
    config = tiny(data)
    names = [(s.name, seed) for s in chosen for seed in (0, 1)]
    assert run_all(tmp_path / "runs", names, Offline(config, data).measure, config.identity()) == 8
    runs = load_runs(tmp_path / "runs", [s.name for s in chosen])
    assert all(f["nll"] > 0 and f["kl"] > 0 and 0 <= f["ece"] <= 1 for s in runs.values() for f in s.values())  # type: ignore[operator]
    assert runs[REFERENCE][0]["bytes_per_token"] is None and runs["topk 8, renormalised"][0]["bytes_per_token"]
    (tmp_path / "data").symlink_to(data.folder)
    table = figures.write_report(tmp_path, runs, describe=offline.describe)
    assert table.count("\n| ") == len(chosen) and "some" in table
    results = json.loads((tmp_path / "results.json").read_text())
    nll = [runs["topk 8, renormalised"][s]["nll"] for s in (0, 1)]
    assert results["settings"]["topk 8, renormalised"]["nll"]["mean"] == pytest.approx(np.mean(nll), rel=1e-12)
    assert results["settings"]["topk 8, renormalised"]["content"] == offline.describe("topk 8, renormalised")
    assert results["set_up"]["steps"] == config.steps
    assert results["set_up"]["vocab_size"] == data.heldout.info.vocab_size and results["set_up"]["teacher_params"] > 0
    assert len(advice.read_results(tmp_path / "results.json")[1]) == len(chosen)
    assert (tmp_path / "evidence.png").stat().st_size < 150_000
