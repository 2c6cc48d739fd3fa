"""Sidecars, selections and plans: exact on numbers worked out by hand, and refused where they do not fit."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.errors import (
    ConfigError,
    CorruptError,
    DataError,
    KdataError,
    MismatchError,
    MissingError,
    QueryError,
    TeacherError,
)
from kdata.format.keep import KeepConfig
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TokenizerInfo
from kdata.jobs.scoring import ScoreConfig, score, sequence_nll
from kdata.pipelines.cli.main import app
from kdata.selection.plan import Plan, make_plan
from kdata.selection.position_rules import Excess, Gap
from kdata.selection.query import Sql
from kdata.selection.ranked import All, Difference, Random
from kdata.selection.select import select
from kdata.selection.show import compare
from kdata.selection.sidecar import load_score_info
from kdata.store.token_scores import stored_nll
from kdata.store.writer import Writer
from kdata.teachers.config import TeacherConfig
from tests.fakes import VOCAB, StandInTeacher, digests, run_capture, save_llama, save_tokenizer
from tests.kdata.selection.plans import score_with

TEACHER = StandInTeacher()


def tiny(
    root: Path, nlls: dict[str, float], *, source: str = "capture", domains: str = "ab", shard_rows: int = 2
) -> kdata.Dataset:
    """A dataset of two-token rows whose teacher's NLL is given, domains in turn."""
    info = new_info(
        format_version="1.0",
        vocab_size=VOCAB,
        teacher=TEACHER.info,
        tokenizer=TokenizerInfo(hash="0" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 2}),
        tail="ghost",
    )
    records = []
    for number, (name, nll) in enumerate(nlls.items()):
        readout = TEACHER.readout(np.array([3, 4], np.int32), KeepConfig(kind="topk", k=2))
        records.append(
            Record(
                id=name,
                domain=domains[number % len(domains)],
                token_ids=readout.token_ids,
                target_mask=np.array([False, True]),
                kept=readout.kept,
                text="text",
                **{**readout.measures(), "logprob": np.array([np.nan, -nll], np.float32)},
            )
        )
    with Writer(root, info, source, SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        for number in range(0, len(records), shard_rows):
            writer.commit(UnitResult(number // shard_rows, records[number : number + shard_rows]))
    return kdata.open(root)


# ------------------------------------------------------------------------------------------------ selection


def test_difference_chooses_where_the_reference_is_worst_against_the_teacher(tmp_path: Path) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0, "c": 1.0, "d": 3.0})
    score_with(dataset, {"a": 4.0, "b": 2.5, "c": 2.0, "d": 3.25})  # differences 3, 0.5, 1, 0.25
    plan = select(dataset, Difference(share=0.5))
    assert plan.ids == ["a", "c"] and plan.repeats.tolist() == [1, 1]
    settings = {"share": 0.5, "unit": "sequences", "by_domain": False, "score": "ref"}
    assert plan.info.parameters == {**settings, "threshold": 1.0}
    assert plan.info.shares == {"a": {"dataset": 0.5, "plan": 1.0}, "b": {"dataset": 0.5, "plan": 0.0}}
    assert plan.info.num_tokens == 4 and set(plan.info.scores) == {"ref"}
    again = Plan.load(tmp_path / "d/plans/difference")
    assert again.ids == plan.ids and again.info == plan.info
    assert again.rows(dataset).tolist() == [0, 2]


def test_ties_are_broken_by_id_and_a_share_is_never_off_by_one(tmp_path: Path) -> None:
    names = [f"r{n:03}" for n in range(100)]
    dataset = tiny(tmp_path / "d", dict.fromkeys(reversed(names), 1.0), shard_rows=60)
    score_with(dataset, dict.fromkeys(names, 2.0))
    for share, count in ((0.07, 7), (0.29, 29), (0.5, 50), (0.501, 51), (0.001, 1), (1.0, 100)):
        assert select(dataset, Difference(share=share)).ids == names[:count]
        assert len(select(dataset, Random(share=share)).ids) == count


def test_random_is_a_function_of_the_seed_and_the_ids(tmp_path: Path) -> None:
    names = [f"r{n}" for n in range(40)]
    forward = tiny(tmp_path / "a", dict.fromkeys(names, 1.0))
    backward = tiny(tmp_path / "b", dict.fromkeys(reversed(names), 1.0))
    chosen = [select(d, Random(share=0.25, seed=3)).ids for d in (forward, backward)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == 10
    assert select(forward, Random(share=0.25, seed=4)).ids != chosen[0]


def test_all_chooses_every_row_with_a_target(tmp_path: Path) -> None:
    assert select(tiny(tmp_path / "d", {"b": 1, "a": 2, "c": 1}), All()).ids == [
        "a",
        "b",
        "c",
    ]


def test_sql_chooses_ids_and_repeats(tmp_path: Path) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0, "c": 3.0})
    query = (
        "select id, (case when nll > 2 then 3 else 1 end)::bigint as repeats from rows where nll > 1 order by nll desc"
    )
    plan = select(dataset, Sql(sql=query, name="mine"))
    assert plan.ids == ["c", "b"] and plan.repeats.tolist() == [3, 1] and plan.info.sql == query
    assert Plan.load(tmp_path / "d/plans/mine.parquet").rows(dataset).tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("query", "error", "message"),
    [
        (None, ConfigError, "needs a query"),
        ("select nll from rows", ConfigError, "must return a column `id`"),
        ("select 5 as id", ConfigError, "ids as text"),
        ("select id from rows where false", DataError, "selects no row"),
        ("select id from rows union all select id from rows", DataError, "returns id 'a' twice"),
        ("select 'nobody' as id", MissingError, "no row with id 'nobody'"),
        ("select id, 0 as repeats from rows", DataError, "whole numbers >= 1, but row 0 has 0"),
        ("select id, 1.5 as repeats from rows", DataError, "whole numbers"),
        ("select id, null::int as repeats from rows", DataError, "whole numbers"),
        ("select id from rowz", QueryError, "rowz"),
    ],
)
def test_a_query_that_gives_no_plan_is_refused(
    tmp_path: Path, query: str, error: type[Exception], message: str
) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0})
    with pytest.raises(error, match=message):
        select(dataset, Sql(sql=query))
    assert not (tmp_path / "d/plans").exists()


def test_rows_that_the_score_does_not_cover_are_refused(tmp_path: Path) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0, "c": 1.0})
    with pytest.raises(MissingError, match=r"no score 'ref': .* \(scores: none\); write it with `kdata score`"):
        select(dataset, Difference())
    score_with(dataset, {"a": 4.0, "c": 2.0})
    with pytest.raises(DataError, match="1 rows have no value: score 'ref' lacks them"):
        select(dataset, Difference())


def test_a_dataset_that_has_grown_needs_new_scores_and_plans(tmp_path: Path) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0})
    score_with(dataset, {"a": 4.0, "b": 2.0})
    plan = select(dataset, Difference(share=0.5))
    grown = tiny(tmp_path / "d", {"c": 1.0}, source="more")
    with pytest.raises(
        MismatchError, match=r"plan 'difference' belongs to another state of .* Run `kdata select` again"
    ):
        plan.rows(grown)
    with pytest.raises(MissingError, match="does not cover the dataset as it is now; run `kdata score` again"):
        select(grown, Difference(share=0.5))


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6), order=st.randoms())
def test_a_plan_survives_its_files(
    captured: Path, tmp_path_factory: pytest.TempPathFactory, counts: list[int], order
) -> None:  # type: ignore[no-untyped-def]
    dataset = kdata.open(captured)
    ids = dataset.index(["id"])["id"].to_pylist()
    order.shuffle(ids)
    plan = make_plan(dataset, "p", ids[: len(counts)], method="sql", parameters={}, repeats=np.array(counts))
    back = Plan.load(plan.save(tmp_path_factory.getbasetemp() / "plan"))
    assert back.ids == plan.ids and back.repeats.tolist() == counts and back.info == plan.info
    assert dataset.index(["id"])["id"].take(pa.array(back.rows(dataset))).to_pylist() == [
        i for i, n in zip(plan.ids, counts, strict=True) for _ in range(n)
    ]
    assert sum(s["plan"] for s in plan.info.shares.values()) == pytest.approx(1)


def test_a_damaged_plan_gives_one_error(tmp_path: Path) -> None:
    dataset = tiny(tmp_path / "d", {"a": 1.0, "b": 2.0})
    select(dataset, All())
    path = tmp_path / "d/plans/all.parquet"
    content, about = path.read_bytes(), path.with_suffix(".json").read_bytes()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            ids = Plan.load(path).ids
        except CorruptError:
            continue
        assert all(isinstance(i, str) for i in ids)
    for size in range(0, len(content), 50):
        path.write_bytes(content[:size])
        with pytest.raises(CorruptError, match="is not the plan that was saved"):
            Plan.load(path)
    path.write_bytes(content)
    path.with_suffix(".json").write_bytes(about.replace(b'"num_tokens": 4', b'"num_tokens": 5'))
    with pytest.raises(CorruptError, match="does not match its own digest"):
        Plan.load(path)
    path.with_suffix(".json").write_bytes(about[:40])
    with pytest.raises(CorruptError, match="does not describe a plan"):
        Plan.load(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(MissingError, match="kdata select"):
        Plan.load(path)


# ---------------------------------------------------------------------------------------------------- score


@pytest.fixture
def read_by_llama(tmp_path: Path, llama_dir: Path, corpus_file: Path, tokenizer_dir: Path) -> kdata.Dataset:
    """A dataset whose tokenizer is the tiny Llama's."""
    return run_capture(tmp_path / "d", corpus_file, tokenizer_dir)


def config(model: Path, name: str = "ref") -> ScoreConfig:
    return ScoreConfig(model=TeacherConfig(model=str(model), backend="transformers"), name=name)


def test_a_score_is_the_model_s_nll_over_the_same_positions(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    info = score(read_by_llama, config(llama_dir))
    assert len(info.files) == len(read_by_llama.manifest) and verify(read_by_llama) == []
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    table = read_by_llama.sql(
        "select id, rows.num_target_tokens as n, ref.num_target_tokens as m, ref.nll as nll "
        "from rows join scores.ref as ref using (id)"
    ).to_pylist()
    assert len(table) == read_by_llama.num_rows
    for row in table:
        ids = read_by_llama[int(read_by_llama.rows_of([row["id"]])[0])].token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids.tolist()])).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:].tolist()))
        assert row["nll"] == pytest.approx(expected.item(), rel=1e-5) and row["n"] == row["m"]


def stopped_at_the_third(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose scoring begins, in order; the third time it is stopped, as by Ctrl-C."""
    import kdata.jobs.scoring as module

    calls, real = list[str](), module._score_shard

    def counted(dataset, number, entry, *others, **settings):  # type: ignore[no-untyped-def]
        calls.append(entry.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(dataset, number, entry, *others, **settings)

    monkeypatch.setattr(module, "_score_shard", counted)
    return calls


def test_scoring_continues_where_it_stopped_and_follows_growth(
    read_by_llama: kdata.Dataset,
    llama_dir: Path,
    corpus_file: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = stopped_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        score(read_by_llama, config(llama_dir))
    assert not load_score_info(read_by_llama, "ref").files
    score(read_by_llama, config(llama_dir))
    assert calls == [f"capture-{n:05}" for n in (0, 1, 2, 2, 3)]
    complete = load_score_info(read_by_llama, "ref")
    score(read_by_llama, config(llama_dir))
    assert len(calls) == 5 and load_score_info(read_by_llama, "ref") == complete
    rows = [{"id": "new", "domain": "prose", "text": "the dog sat on the log"}]
    from tests.fakes import write_jsonl

    grown = run_capture(
        read_by_llama.path,
        write_jsonl(read_by_llama.path.parent / "n.jsonl", rows),
        tokenizer_dir,
        name="more",
    )
    score(grown, config(llama_dir))
    assert calls[5:] == ["more-00000"]
    assert grown.sql("select count(*) as n from rows join scores.ref using (id)")["n"][0].as_py() == 26


def test_a_model_that_does_not_fit_is_refused(read_by_llama: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(llama_dir, tmp_path / "other"))
    save_tokenizer(other, lines=["other text zzz qqq"])
    with pytest.raises(MismatchError, match=r"are not the same: id 258 .* name a model of the teacher's"):
        score(read_by_llama, config(other))
    short = save_llama(tmp_path / "short", context=16)
    with pytest.raises(ConfigError, match=r"a sequence of 64 tokens, .* reads at most 16"):
        score(read_by_llama, config(short))
    with pytest.raises(MissingError, match="does not exist"):
        score(read_by_llama, config(tmp_path / "nowhere"))
    assert not (read_by_llama.path / "scores").exists()


def test_another_model_cannot_take_over_a_score(read_by_llama: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    score(read_by_llama, config(llama_dir))
    second = save_llama(tmp_path / "second", seed=5)
    with pytest.raises(MismatchError, match=r"scores.ref exists with other settings .*weights_hash"):
        raise_on_one_line(lambda: score(read_by_llama, config(second)))
    assert len(score(read_by_llama, config(second, "second")).files) == len(read_by_llama.manifest)


def raise_on_one_line(call) -> None:  # type: ignore[no-untyped-def]
    """Join a message's lines, for matching."""
    try:
        call()
    except KdataError as error:
        raise type(error)(" ".join(str(error).split())) from error


def test_a_damaged_sidecar_is_found(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    score(read_by_llama, config(llama_dir))
    part = read_by_llama.path / "scores/ref/capture-00001.parquet"
    content = bytearray(part.read_bytes())
    content[40] ^= 1
    part.write_bytes(content)
    assert [p.path for p in verify(read_by_llama)] == ["scores/ref/capture-00001.parquet"]
    about = read_by_llama.path / "scores/ref.json"
    about.write_bytes(about.read_bytes()[:-20])
    assert [p.path for p in verify(read_by_llama)] == ["scores/ref.json"]
    with pytest.raises(CorruptError, match=r"ref.json is damaged"):
        select(read_by_llama, Difference())


def test_a_log_probability_that_is_not_finite_is_no_score() -> None:
    mask = np.array([False, True, True])
    assert sequence_nll(np.array([np.nan, -1.0, -3.0]), mask) == 2.0
    assert sequence_nll(np.array([np.nan, -1.0, -3.0]), np.zeros(3, bool)) is None
    with pytest.raises(TeacherError, match="not finite"):
        sequence_nll(np.array([np.nan, np.nan, -3.0]), mask)


# ----------------------------------------------------------------------------------------------------- a score of tokens


def token_config(model: Path, name: str = "student") -> ScoreConfig:
    return config(model, name).model_copy(update={"tokens": True})


def test_a_score_of_tokens_is_the_model_s_nll_of_each(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    """Against a log-softmax in float64 of the model's logits; off by no more than the rounding to float16."""
    import torch
    from transformers import AutoModelForCausalLM

    info = score(read_by_llama, token_config(llama_dir))
    assert info.columns == ["nll", "num_target_tokens", "token_nll"] and verify(read_by_llama, deep=True) == []
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    table = read_by_llama.sql("select id, list(nll_student order by position) as nll from tokens group by id")
    stored = dict(zip(table["id"].to_pylist(), table["nll"].to_pylist(), strict=True))
    worst = 0.0
    for row in read_by_llama:
        ids = torch.tensor(row.token_ids.tolist())
        with torch.inference_mode():
            logits = model(ids[None]).logits[0].double()
        exact = -torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0].numpy()
        assert len(stored[row.id]) == len(row)  # DuckDB's list() keeps the null of position 0
        error = np.abs(np.array(stored[row.id][1:]) - exact)
        assert (error <= 2**-11 * exact + 1e-5).all()
        worst = max(worst, float((error / exact).max()))
    assert 2**-13 < worst < 2**-11 + 1e-5, "float16 shows, and no more than it"


def test_a_score_of_tokens_answers_for_rows_too(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    score(read_by_llama, config(llama_dir))
    score(read_by_llama, token_config(llama_dir))
    both = read_by_llama.sql(
        "select r.nll as r, s.nll as s, r.num_target_tokens as n, s.num_target_tokens as m "
        "from scores.ref r join scores.student s using (id)"
    )
    assert both["r"] == both["s"] and both["n"] == both["m"]
    by_rows, by_tokens = (select(read_by_llama, Difference(name=name, score=name)) for name in ("ref", "student"))
    assert by_rows.ids == by_tokens.ids


def test_scoring_tokens_continues_where_it_stopped(
    read_by_llama: kdata.Dataset, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as without the stop; a damaged part is written again, whole ones stay."""
    score(read_by_llama, token_config(llama_dir))
    folder = read_by_llama.path / "scores"
    want = digests(folder)
    (folder / "student.json").unlink()
    shutil.rmtree(folder / "student")
    calls = stopped_at_the_third(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        score(read_by_llama, token_config(llama_dir))
    with pytest.raises(QueryError, match="score 'student' does not cover the dataset as it is now"):
        read_by_llama.sql("select sum(nll_student) from tokens")
    score(read_by_llama, token_config(llama_dir))
    assert calls == [f"capture-{n:05}" for n in (0, 1, 2, 2, 3)] and digests(folder) == want
    part = folder / "student/capture-00001.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    score(read_by_llama, token_config(llama_dir))
    assert calls[5:] == ["capture-00001"] and digests(folder) == want


def test_a_model_that_does_not_fit_scores_no_token(
    read_by_llama: kdata.Dataset, llama_dir: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(llama_dir, tmp_path / "other"))
    save_tokenizer(other, lines=["other text zzz qqq"])
    with pytest.raises(MismatchError, match="are not the same: id 258"):
        score(read_by_llama, token_config(other))
    assert not (read_by_llama.path / "scores").exists()
    score(read_by_llama, config(llama_dir))
    with pytest.raises(MismatchError, match=r"scores.ref exists with other settings .*token_nll.* Choose another name"):
        raise_on_one_line(lambda: score(read_by_llama, token_config(llama_dir, "ref")))


def test_a_token_that_the_model_finds_impossible_is_refused(
    read_by_llama: kdata.Dataset, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over targets may be finite where another token's number is not."""
    import kdata.jobs.scoring as module

    monkeypatch.setattr(module, "sequence_nll", lambda logprob_T, mask_T: 1.0)
    monkeypatch.setattr(
        module, "stored_nll", lambda logprob_T: stored_nll(np.where(logprob_T < -1, -np.inf, logprob_T))
    )
    with pytest.raises(TeacherError, match="the log-probability -inf, which is not finite"):
        score(read_by_llama, token_config(llama_dir))
    assert not list((read_by_llama.path / "scores").glob("*/*"))


def test_the_command_line_scores_tokens(read_by_llama: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    arguments = ["score", str(read_by_llama.path), "--model", str(llama_dir), "--backend", "transformers", "--tokens"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*arguments, "--name", "student"], catch_exceptions=False)
    assert result.exit_code == 0 and f"each of their {read_by_llama.num_tokens:,} tokens: nll_student" in result.output
    assert read_by_llama.sql("select count(nll_student) as n from tokens")["n"].to_pylist() == [
        read_by_llama.num_tokens - read_by_llama.num_rows
    ]
    bad = CliRunner().invoke(app, ["score", str(read_by_llama.path), "--from", "x.parquet", "--tokens"])
    assert bad.exit_code != 0


def test_the_excess_over_the_teacher_is_the_gap(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    """The same number from a score as from a model that reads now, but for the rounding of the score."""
    score(read_by_llama, token_config(llama_dir))
    now, stored = (
        kdata.select(read_by_llama, All(name=name, positions=rule))
        for name, rule in (
            ("now", Gap(share=0.3, model=str(llama_dir))), ("stored", Excess(share=0.3, score="student")),
        )
    )  # fmt: skip
    comparison = compare(read_by_llama, "now", "stored").positions
    assert comparison is not None and comparison.jaccard > 0.98
    assert now.info.positions is not None and stored.info.positions is not None
    assert now.info.positions.positions == stored.info.positions.positions


# --------------------------------------------------------------------------------------------------------- the rule `gap`


def test_the_gap_is_the_model_s_nll_minus_the_teacher_s(read_by_llama: kdata.Dataset, llama_dir: Path) -> None:
    """By brute force, with the model's own logits; the plan records which model it was."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    gaps = []
    for row in read_by_llama:
        with torch.inference_mode():
            logits = model(torch.tensor([row.token_ids.tolist()])).logits[0]
        logprobs = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(row.token_ids[1:].tolist())[:, None])[:, 0]
        own = row.logprob[1:] - logprobs.numpy()
        gaps += [(-float(gap), row.id, position) for position, gap in enumerate(own, 1) if row.target_mask[position]]
    count = math.ceil(0.3 * len(gaps))
    taken = sorted(gaps)[:count]
    assert taken[-1][0] < sorted(gaps)[count][0] - 1e-5  # no tie at the edge, where rounding would decide
    plan = kdata.select(read_by_llama, All(name="behind", positions=Gap(share=0.3, model=str(llama_dir))))
    expected: dict[str, list[int]] = {}
    for _, row_id, position in taken:
        expected.setdefault(row_id, []).append(position)
    table = plan.table
    chosen = dict(zip(table["id"].to_pylist(), table["positions"].to_pylist(), strict=True))
    assert chosen == {row_id: sorted(positions) for row_id, positions in expected.items()}
    assert plan.info.positions is not None
    parameters = plan.info.positions.parameters
    assert parameters["threshold"] == pytest.approx(-taken[-1][0], abs=1e-4) and len(parameters["weights_hash"]) == 64


def test_a_gap_needs_a_model_that_fits(read_by_llama: kdata.Dataset, llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which opens it"):
        select(read_by_llama, All(positions=Gap(share=0.3, model=str(llama_dir))))
    other = Path(shutil.copytree(llama_dir, tmp_path / "other"))
    save_tokenizer(other, lines=["other text zzz qqq"])
    with pytest.raises(MismatchError, match="a model of the teacher's"):
        kdata.select(read_by_llama, All(positions=Gap(share=0.3, model=str(other))))
    with pytest.raises(ConfigError, match=r"a sequence of 64 tokens, .* reads at most 16"):
        kdata.select(
            read_by_llama, All(positions=Gap(share=0.3, model=str(save_llama(tmp_path / "short", context=16))))
        )
    assert not list(read_by_llama.path.glob("plans/*"))


def test_a_gap_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    class Broken:
        @property
        def recorded(self) -> dict[str, Any]:
            return {}

        def logprobs(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
            return [np.full(len(ids), np.nan, np.float32) for ids in sequences]

    dataset = tiny(tmp_path / "d", {"x": 1.0, "y": 2.0})
    with pytest.raises(TeacherError, match="position 1 of row 'x' a log-probability that is not finite"):
        select(dataset, All(positions=Gap(share=0.3, model="small")), reader=Broken())
