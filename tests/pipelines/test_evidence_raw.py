"""The raw corpus and its judge, and a tiny comparison of methods on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.pipelines.evidence import raw, small_runs
from kdata.pipelines.evidence.__main__ import app
from kdata.pipelines.evidence.raw import GOOD, SHARES, Judge, write_raw
from kdata.pipelines.evidence.raw_figures import write_report
from kdata.pipelines.evidence.raw_question import KEPT, NONE, ORACLE, SETTINGS, Raw, RawConfig, find, runs, settings_of
from kdata.pipelines.evidence.runs import load_runs, run_all
from kdata.pipelines.evidence.selection import key_of
from kdata.pipelines.evidence.tokenizers import byte_level
from kdata.pipelines.evidence.verdicts import COLUMNS, NO_RUNS, verdicts
from kdata.selection.select import METHODS
from kdata.selection.tables import REUSED, RegMix
from kdata.trainer.config import ScratchStudent
from tests.fakes import rows_of_text, save_llama

TOKENS = 24_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of two domains, two documents of which are equal."""
    rows = rows_of_text(900, words=160)
    rows[5]["text"] = rows[4]["text"]
    file = tmp_path_factory.mktemp("clean") / "corpus.parquet"
    pl.DataFrame([{n: r[n] for n in ("id", "domain", "text")} for r in rows]).write_parquet(file)
    return file


@pytest.fixture(scope="module")
def made(corpus: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw corpus; its benchmark are the last documents."""
    folder = tmp_path_factory.mktemp("raw")
    frame = pl.read_parquet(corpus)
    frame.head(800).write_parquet(folder / "clean.parquet")
    frame.tail(100).write_parquet(folder / "benchmark.parquet")
    counts = write_raw(
        folder / "clean.parquet", folder / "benchmark.parquet", str(llama_dir), TOKENS, folder, context_tokens=64
    )
    assert counts == json.loads((folder / "raw.json").read_text())["tokens"]
    return folder


def test_every_origin_has_its_share_and_the_ids_do_not_tell(made: Path) -> None:
    counts = json.loads((made / "raw.json").read_text())["tokens"]
    assert set(counts) == set(SHARES)
    for origin, share in SHARES.items():
        # Documents are whole: the last one may pass the share, and texts in other languages have many tokens here.
        assert counts[origin] >= share * TOKENS and counts[origin] - share * TOKENS < 8_000
    text = pl.read_parquet(made / "train.parquet")
    assert text.columns == ["id", "domain", "text"] and text["id"].n_unique() == len(text)
    assert text["id"].is_sorted() and set(text["domain"]) == {"prose", "code"}
    origins = pl.read_parquet(made / "origins.parquet")
    assert origins["id"].to_list() == text["id"].to_list()
    runs_of_origin = (origins["origin"] != origins["origin"].shift()).sum()
    assert runs_of_origin > 0.3 * len(origins)  # mixed: the order does not tell either


def test_what_is_not_good_is_what_it_is_called(made: Path) -> None:
    frame = pl.read_parquet(made / "train.parquet").join(pl.read_parquet(made / "origins.parquet"), on="id")
    of = {origin: frame.filter(pl.col("origin") == origin) for origin in SHARES}
    clean = dict(of[GOOD].select("id", "text").iter_rows())
    assert len(set(clean.values())) == len(clean)  # of equal documents one
    assert all(clean[row["of"]] == row["text"] for row in of["exact duplicate"].iter_rows(named=True))
    for row in of["near duplicate"].iter_rows(named=True):
        own, other = set(row["text"].lower().split()), set(clean[row["of"]].lower().split())
        assert row["text"] != clean[row["of"]] and len(own & other) >= 0.8 * len(other)
    leaked = set(pl.read_parquet(made / "benchmark.parquet")["text"])
    assert set(of["benchmark"]["text"]) <= leaked and not leaked & set(clean.values())
    assert not set(of["shuffled words"]["text"]) & set(pl.read_parquet(made / "clean.parquet")["text"])
    assert all(len(set(text.split())) <= 9 for text in of["repeated n-grams"]["text"])
    assert any(not text.isascii() for text in of["other languages"]["text"])


def test_the_same_text_is_made_again(made: Path, llama_dir: Path, tmp_path: Path) -> None:
    write_raw(made / "clean.parquet", made / "benchmark.parquet", str(llama_dir), TOKENS, tmp_path, context_tokens=64)
    assert (tmp_path / "raw.json").read_text() == (made / "raw.json").read_text()


def test_too_little_text_is_one_error(made: Path, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"clean: .* tokens of text and .* are needed; set fewer train_tokens"):
        write_raw(made / "clean.parquet", made / "benchmark.parquet", str(llama_dir), 10**7, tmp_path)
    assert not (tmp_path / "train.parquet").exists()


def test_the_judge_counts_one_of_a_document_and_its_copies(tmp_path: Path) -> None:
    rows = [
        ("a", GOOD, "a"), ("b", GOOD, "b"), ("a2", "exact duplicate", "a"), ("a3", "near duplicate", "a"),
        ("x", "boilerplate", None),
    ]  # fmt: skip
    pl.DataFrame(rows, schema=["id", "origin", "of"], orient="row").write_parquet(tmp_path / "origins.parquet")
    judge = Judge(tmp_path / "origins.parquet", {"a": 10, "b": 30, "a2": 10, "a3": 12, "x": 20})
    assert judge.good() == ["a", "b"]
    every = judge.verdict({"a", "b", "a2", "a3", "x"})
    assert (every.precision, every.recall) == (40 / 82, 1.0) and set(every.kept.values()) == {1.0}
    for copies in ({"a2"}, {"a3"}, {"a2", "a3"}, {"a", "a3"}):
        verdict = judge.verdict(copies)
        assert verdict.recall == 10 / 40  # a copy that is longer holds no more of the document than there is
        assert verdict.precision == 10 / sum({"a": 10, "a2": 10, "a3": 12}[i] for i in copies)
    assert judge.verdict({"x"}).precision == 0.0 and judge.verdict(set()).recall == 0.0


def test_pieces_of_a_copy_stand_for_pieces_of_the_document(tmp_path: Path) -> None:
    rows = [("a", GOOD, "a"), ("c", "exact duplicate", "a")]
    pl.DataFrame(rows, schema=["id", "origin", "of"], orient="row").write_parquet(tmp_path / "origins.parquet")
    judge = Judge(tmp_path / "origins.parquet", {"a#0": 8, "a#1": 4, "c#0": 8, "c#1": 4})
    assert judge.verdict({"a#0", "c#1"}).recall == 1.0 and judge.verdict({"a#0", "c#0"}).precision == 0.5


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path, corpus: Path) -> RawConfig:
    return RawConfig(
        teacher=str(llama_dir), reference=str(save_llama(tmp_path_factory.mktemp("ref") / "m", seed=5)), corpus=str(corpus),
        train_tokens=8_000, heldout_tokens=300, benchmark_tokens=300, validation_tokens=300, context_tokens=64,
        student=ScratchStudent(hidden_size=32, num_layers=1, num_heads=2), steps=2, batch_tokens=256, warmup_steps=1,
        period_steps=1,
    )  # fmt: skip


def test_a_tiny_comparison_from_text_to_verdicts(
    config: RawConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "LENGTH", (100, 300))
    monkeypatch.setattr(small_runs, "RUNS", 7)
    monkeypatch.setattr(small_runs, "RUNS_FORMER", 3)
    asked = Raw(config, tmp_path / "data")
    wanted = [(f"{arm} ({family})", seed) for family in ("distillation", "cross-entropy") for seed in (0, 1)
              for arm in (NONE, ORACLE, "difference, half of each domain")]  # fmt: skip
    wanted += [(key, 0) for key, seed in runs(1) if (key, seed) not in wanted and key.endswith("(distillation)")]
    assert run_all(
        tmp_path / "runs", wanted, asked.measure, config.identity(), describe=lambda n: find(n).describe()
    ) == len(wanted)
    by_setting = load_runs(tmp_path / "runs", [key_of(s) for s in SETTINGS])
    kept = json.loads((tmp_path / "data" / KEPT).read_text())
    assert set(kept) == {s.name for s in SETTINGS}
    oracle, none = kept[ORACLE], kept[NONE]
    assert oracle["precision"] == oracle["recall"] == oracle["kept"][GOOD] == 1.0
    assert oracle["kept"]["boilerplate"] == 0.0 and none["recall"] == 1.0 and 0.4 < none["precision"] < 0.6
    scores = kdata.open(tmp_path / "data/train").sql("""select count(*) as a, count(ref.nll) as b, count(read_on.nll) as c,
        count(read_alone.nll) as d, count(*) filter (ref.nll <> read_on.nll) as e from rows join scores.ref as ref using (id)
        left join scores.read_on as read_on using (id) left join scores.read_alone as read_alone using (id)""")
    assert (
        len(set(scores.to_pylist()[0].values())) == 1
    )  # each has read every row, and reading on changed the small model
    table = write_report(tmp_path, by_setting)
    assert table.count(f"| {ORACLE} |") == 2 and (tmp_path / "evidence.png").stat().st_size > 10_000
    (tmp_path / "results.json").rename(tmp_path / "raw.json")
    raw_json = tmp_path / "raw.json"
    said = {name: verdict.cells() for name, verdict in verdicts(raw_json, raw_json).items()}
    assert set(said) == set(METHODS)
    for name in ("all", "regmix", "olmix", "band", "ddk"):
        assert said[name][0].endswith(", n=1")
        assert said[name][1:] == ["-", said[name][0]]
    assert said["uniform"][0].endswith("c") and said["uniform"][0] != said["temperature"][0]
    assert "±" in said["difference"][1] and set(said["sql"]) == {"-"}
    results = json.loads((tmp_path / "raw.json").read_text())["settings"]
    means = [one["nll_against_none"]["mean"] for name, one in results.items()
             if name.startswith("difference") and name.endswith("(distillation)")]  # fmt: skip
    assert len(means) == 8 and said["difference"][0].startswith(f"{100 * min(means):+.1f}")


def test_small_runs_vary_what_is_fitted_and_are_measured_once(tmp_path: Path) -> None:
    """On a loss that is linear in the weights, the tables have its slopes; Olmix's keep the ratios of the former weights."""
    units, slopes, calls = {"a": 50, "b": 30, "c": 20}, {"a": 5.0, "b": 4.0, "c": 3.0}, []

    def loss_of(weights: Mapping[str, float]) -> float:
        calls.append(weights)
        assert sum(weights.values()) == pytest.approx(1)
        return sum(slopes[name] * weight for name, weight in weights.items())

    runs_of_all = small_runs.regmix_table(tmp_path, units, loss_of)
    weights, facts = RegMix(runs=str(runs_of_all)).fitted(str(runs_of_all), units)
    assert facts["num_runs"] == small_runs.RUNS and facts["slopes"] == pytest.approx(slopes)
    assert weights["c"] > 0.2 and weights["a"] < 0.5
    former, runs_of_new = small_runs.olmix_tables(tmp_path, units, loss_of)
    assert len(calls) == 2 * small_runs.RUNS
    before = dict(pl.read_parquet(former).iter_rows())
    assert before.keys() == {"a", "b"} and before["b"] > 0.375
    added = small_runs.RUNS - small_runs.RUNS_FORMER
    assert all(of["a"] * before["b"] == pytest.approx(of["b"] * before["a"]) for of in calls[-added:])
    new = pl.read_parquet(runs_of_new)
    assert set(new.columns) == {REUSED, "c", "loss"} and new["c"].n_unique() == len(new) == added
    assert (small_runs.regmix_table(tmp_path, units, loss_of), len(calls)) == (runs_of_all, 2 * small_runs.RUNS)


def test_a_damaged_file_of_results_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(json.dumps({"settings": {"a": {"content": {}}}}))
    for file in ("path", "gemma", "clean"):
        with pytest.raises(CorruptError, match="is damaged"):
            verdicts(**{file: tmp_path / "raw.json"})


def test_the_size_of_a_language_model_needs_one(tmp_path: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "out")
    for words in (["raw", "--size", "llm"], ["mixture", "--size", "llm", "--teacher", str(tmp_path)]):
        done = runner.invoke(app, ["run", *words, "--out", out], env={"COLUMNS": "200"})
        assert done.exit_code == 2 and "needs --teacher: the language model" in done.output
    assert not (tmp_path / "out").exists()  # refused before any text is made


def test_every_method_has_a_verdict_or_brings_no_choice_of_its_own() -> None:
    of = verdicts()
    assert {name for name, verdict in of.items() if not verdict.best} == NO_RUNS
    assert all(len(verdict.cells()) == len(COLUMNS) for verdict in of.values())


def test_settings_have_names_of_their_own_and_an_unknown_one_is_refused() -> None:
    keys = [key_of(arm) for arm in SETTINGS]
    assert len(set(keys)) == len(keys)
    plans = [step.name or step.method for arm in SETTINGS for step in ([] if arm.step is None else [arm.step])]
    steps = {step.model_dump_json() for arm in SETTINGS for step in ([] if arm.step is None else [arm.step])}
    assert len(set(plans)) == len(steps)  # a plan is made once, so its name must mean one step
    with pytest.raises(ConfigError, match="there is no setting 'none'"):
        find("none")


def test_rows_of_a_language_model_are_chosen_and_taught_in_the_tokens_of_the_reference(
    config: RawConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher reads behind its <bos>; methods and students see retokenized rows, and bits per byte are told."""
    monkeypatch.setattr(raw, "LENGTH", (100, 300))
    reference = str(save_llama(tmp_path / "ref", seed=5, context=1024))
    byte_level([], 0).save_pretrained(reference)
    more = {"reference": reference, "tokenizer": reference, "bos": "add", "clean_times": 3, "batch_tokens": 1024}
    asked = Raw(config.model_copy(update=more), tmp_path / "data")
    figures = {name: asked.measure(f"{ORACLE} ({name})", 0) for name in ("distillation", "cross-entropy")}
    assert all(one["bits_per_byte"] > one["teacher_bits_per_byte"] > 0 for one in figures.values())
    assert figures["distillation"]["nll"] != figures["cross-entropy"]["nll"]
    read, train = (kdata.open(tmp_path / "data" / name) for name in ("train-read", "train"))
    nats_of = [
        dict(of.sql("select id, nll * num_target_tokens as nats from rows").to_pandas().itertuples(index=False))
        for of in (read, train)
    ]
    assert read.info.teacher.bos == "add" and set(nats_of[1]) == set(asked.judge.origins()) <= set(nats_of[0])
    assert len(nats_of[1]) > 0.7 * len(
        nats_of[0]
    )  # the teacher has no token for some signs, so the rest is not spelled
    # The same nats, but for those of the first token, which the other tokenizer puts nothing before.
    assert all(0.5 < nats / nats_of[0][row_id] < 1.005 for row_id, nats in nats_of[1].items())
    margins = [
        dict(of.sql("select id, margin from scores.margin").to_pandas().itertuples(index=False)) for of in (read, train)
    ]
    assert all(0 < margins[0][row_id] == margin < 1 for row_id, margin in margins[1].items())
    kept = json.loads((tmp_path / "data" / KEPT).read_text())
    assert {"margin, half of each domain", "robust (max-min), half"} < set(kept)
    assert set(kept) == {arm.name for arm in settings_of("any")} < {arm.name for arm in SETTINGS}
    assert [key for key, _ in runs(1, "any")] == [key_of(arm) for arm in settings_of("any")]
    identity = json.loads((tmp_path / "data/data.json").read_text())
    assert identity["bos"] == "add" and "/" not in identity["tokenizer"] and "dtype" not in identity
    with pytest.raises(MismatchError, match="clean_times: 3 -> None"):
        Raw(config.model_copy(update={**more, "clean_times": 2}), tmp_path / "data").judge_all()
