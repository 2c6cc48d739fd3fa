"""The questions of choice: equal terms, plans and mixtures as they are named, one tiny comparison from text to table."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

import kdata
from kdata.errors import ConfigError, MismatchError
from kdata.pipelines.evidence.__main__ import LARGE
from kdata.pipelines.evidence.data import unit_hash
from kdata.pipelines.evidence.runs import load_runs, run_all
from kdata.pipelines.evidence.selection import SETTINGS, Selection, SelectionConfig, find, key_of, runs
from kdata.pipelines.evidence.selection_figures import baseline, write_report
from kdata.selection.plan import Plan
from kdata.trainer.config import CheckpointStudent, ScratchStudent
from kdata.trainer.domain_weights import DDKMixture, FixedMixture
from tests.fakes import rows_of_text, save_llama


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> SelectionConfig:
    """Tiny random models and text of two domains, one of them three times as large."""
    folder = tmp_path_factory.mktemp("choice")
    rows = rows_of_text(400)
    for number, row in enumerate(rows):
        row["domain"] = "code" if number % 4 == 0 else "prose"
    pl.DataFrame([{n: r[n] for n in ("id", "domain", "text")} for r in rows]).write_parquet(folder / "corpus.parquet")
    return SelectionConfig(
        teacher=str(llama_dir), reference=str(save_llama(folder / "reference", seed=5)),
        corpus=str(folder / "corpus.parquet"), train_tokens=1500, heldout_tokens=80, validation_tokens=60, context_tokens=64,
        student=ScratchStudent(hidden_size=32, num_layers=1, num_heads=2), steps=4, batch_tokens=256, warmup_steps=1,
        period_steps=2, precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("asked")


def asked(config: SelectionConfig, question: str, folder: Path) -> Selection:
    return Selection(config, question, folder / "data")  # type: ignore[arg-type]


@pytest.mark.parametrize("question", ["selection", "mixture"])
def test_a_tiny_comparison_from_text_to_table(question: str, config: SelectionConfig, folder: Path) -> None:
    wanted = runs(question, 2)  # type: ignore[arg-type]
    out = folder / question
    assert run_all(out / "runs", wanted, asked(config, question, folder).measure, config.identity()) == len(wanted)
    keys = [key_of(s) for s in SETTINGS[question]]  # type: ignore[index]
    by_setting = load_runs(out / "runs", keys)
    assert list(by_setting) == keys and all(len(seeds) == 2 for seeds in by_setting.values())
    for seeds in by_setting.values():
        for figures in seeds.values():
            gaps = [v for n, v in figures.items() if n.startswith("gap ") and v is not None]
            shares = [v for n, v in figures.items() if n.startswith("share ") and v is not None]
            assert len(gaps) == len(shares) == 2
            assert figures["worst_gap"] == max(gaps) and figures["mean_gap"] == pytest.approx(sum(gaps) / 2)
            assert sum(shares) == pytest.approx(1)
    table = write_report(question, out, by_setting)  # type: ignore[arg-type]
    assert table.count("\n| ") == len(keys) and table.count("| baseline |") == len(
        {baseline(question, k) for k in keys}
    )  # type: ignore[arg-type]
    results = json.loads((out / "results.json").read_text())["settings"]
    a, b = keys[0], keys[1]
    pairs = [(by_setting[b][s]["mean_gap"], by_setting[a][s]["mean_gap"]) for s in (0, 1)]
    mean = sum((x - y) / y for x, y in pairs) / 2  # type: ignore[operator]
    assert results[b]["mean_gap_against_baseline"]["mean"] == pytest.approx(mean)
    assert (out / "evidence.png").stat().st_size < 200_000


def test_the_parts_are_disjoint_and_domains_keep_their_shares(config: SelectionConfig, folder: Path) -> None:
    asked(config, "mixture", folder).train_config(SETTINGS["mixture"][0], 0)
    ids = {
        name: {i.split("#")[0] for i in kdata.open(folder / "data" / name).index(["id"])["id"].to_pylist()}
        for name in ("heldout", "validation", "train")
    }
    bounds = {"heldout": (0.0, 0.1), "validation": (0.1, 0.16), "train": (0.16, 1.0)}
    for name, (low, high) in bounds.items():
        assert ids[name] and all(low <= unit_hash(i) < high for i in ids[name])
    domains = kdata.open(folder / "data" / "train").index(["domain"])["domain"].to_pylist()
    assert 0.6 < domains.count("prose") / len(domains) < 0.9


def test_data_of_other_settings_are_refused(config: SelectionConfig, folder: Path) -> None:
    other = config.model_copy(update={"train_tokens": 1400})
    with pytest.raises(MismatchError, match="train_tokens: 1500 -> 1400"):
        asked(other, "mixture", folder).train_config(SETTINGS["mixture"][0], 0)


def test_settings_match_their_names(config: SelectionConfig, folder: Path) -> None:
    mixture_question = asked(config, "mixture", folder)
    tokens = dict(
        kdata.open(folder / "data/train")
        .sql("select domain, sum(num_tokens)::bigint from rows group by 1")
        .to_pandas()
        .to_numpy()
    )
    of = {s.name: mixture_question.train_config(s, 3) for s in SETTINGS["mixture"]}
    for name, power in (("uniform", 0.0), ("proportional", 1.0), ("static (square root of tokens)", 0.5)):
        mixture = of[name].mixture
        assert isinstance(mixture, FixedMixture)
        assert mixture.weights["prose"] / mixture.weights["code"] == pytest.approx(
            (tokens["prose"] / tokens["code"]) ** power
        )
    ddk = of["DDK"].mixture
    assert isinstance(ddk, DDKMixture) and ddk.heldout == str(folder / "data" / "validation") and ddk.alpha == 0.5
    assert all(c.steps == 4 and c.seed == 3 for c in of.values())
    choice = asked(config, "selection", folder)
    twice = find("selection", "whole corpus, twice the compute (distillation)")
    assert choice.train_config(twice, 0).steps == 8
    halves = {}
    for name in ("half", "difference", "each"):
        plan = Plan.load(folder / "data" / "train" / "plans" / name)
        halves[name] = plan.info.num_tokens / sum(d.dataset_tokens for d in plan.info.domains.values())
        assert 0.45 < halves[name] <= 0.52
    each = Plan.load(folder / "data" / "train" / "plans" / "each").info
    assert all(abs(s["plan"] - s["dataset"]) < 0.05 for s in each.shares.values())


def test_the_large_size_is_a_configuration() -> None:
    config = SelectionConfig(teacher="t", reference="r", corpus="c", **LARGE)  # type: ignore[arg-type]
    tokens = config.steps * config.batch_tokens
    assert tokens <= config.train_tokens / 2  # no document twice, of half of them too
    small = SelectionConfig(teacher="t", reference="r", corpus="c")
    assert small.steps * small.batch_tokens <= small.train_tokens / 2


def test_an_unknown_setting_is_refused_and_paths_stay_out() -> None:
    with pytest.raises(ConfigError, match="the settings are uniform"):
        find("mixture", "uniforn")
    sources = {"teacher": "/a/teacher", "reference": "/a/ref", "corpus": "/a/corpus.parquet"}
    config = SelectionConfig(student=CheckpointStudent(model="/a/student"), **sources)  # type: ignore[arg-type]
    assert "/" not in json.dumps(config.identity())
