"""Distributions at some target positions only: what each rule keeps, and that everything else is as in a whole capture."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.remeasure import against_teacher
from kdata.check.verify import verify
from kdata.config import parse_config
from kdata.errors import ConfigError, CorruptError, DataError, FormatError, MismatchError
from kdata.format import codec as codecs
from kdata.format.keep import KeepConfig
from kdata.format.keep_rules import described
from kdata.format.schema import known_codecs
from kdata.jobs.combine import CombineConfig, combine
from kdata.jobs.job import LocalEngine
from kdata.jobs.reading import CaptureConfig
from kdata.jobs.reread import reread_with
from kdata.jobs.writing import GenerateConfig
from kdata.pipelines.cli.main import app
from kdata.selection.position_rules import Entropy, Margin, RandomPositions, Span, SqlPositions
from kdata.selection.ranked import All
from kdata.share.arrange import merge
from kdata.share.card import card_page
from kdata.store.kept_counts import kept_by_domain, kept_lines
from kdata.teachers.config import refuse_kept
from kdata.teachers.model import load_tokenizer
from tests.fakes import (
    TURN_END,
    StandInTeacher,
    digests,
    rows_of_text,
    run_capture,
    run_generate,
    write_jsonl,
)
from tests.kdata.store.test_hostile import rewrite_info
from tests.rounding import assert_logprobs

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload", __name__])
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "adaptive": {"mass": 0.8, "min_k": 2, "k": 20},
    "sampled": {"num_draws": 20},
    "hybrid": {"num_draws": 12, "temperatures": [2.0]},
    "threshold": {"threshold": 0.05, "temperatures": [2.0]},
}
THRESHOLD = 3.0  # nats, near the stand-in's median


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 rows in two domains, one of them refused."""
    rows = rows_of_text(22)
    rows[5]["text"] = "  "
    rows[7]["text"] = "def add(a, b): return a + b for item in items: print(item)"
    return write_jsonl(tmp_path_factory.mktemp("kept") / "corpus.jsonl", rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> dict[str, kdata.Dataset]:
    """The corpus with a distribution at every target, of each kind."""
    root = tmp_path_factory.mktemp("whole")
    return {kind: run_capture(root / kind, corpus, tokenizer_dir, kind=kind, **KINDS[kind]) for kind in KINDS}


def everything(dataset: kdata.Dataset) -> Any:
    return dataset.take(np.arange(dataset.num_rows))


def kept_of(dataset: kdata.Dataset) -> dict[str, list[int]]:
    """Positions with entries, by row."""
    return {row.id: np.flatnonzero(row.num_kept).tolist() for row in dataset}


def positions_of(plan: kdata.Plan, dataset: kdata.Dataset) -> dict[str, list[int]]:
    """The same of a plan; rows that it leaves out have none."""
    _, chosen = plan.choice(dataset)
    assert chosen is not None
    ids = dataset.index(["id"])["id"].to_pylist()
    own = {
        ids[row]: part.tolist()
        for row, part in zip(chosen.rows, np.split(chosen.positions, chosen.offsets[1:-1]), strict=True)
    }
    return {row_id: own.get(row_id, []) for row_id in ids}


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_keeps_what_the_entropy_of_the_dense_distribution_says_and_nothing_else_changes(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, whole: dict[str, kdata.Dataset], kind: str
) -> None:
    rule = {"rule": "entropy", "threshold": THRESHOLD}
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, kind=kind, positions=rule, **KINDS[kind])
    teacher, kept = StandInTeacher(), 0
    for row, full in zip(dataset, whole[kind], strict=True):
        dense_TV = teacher.dense(row.token_ids)
        entropy_T = -(np.exp(dense_TV) * dense_TV).sum(1)
        wanted = full.target_mask & (entropy_T >= THRESHOLD)
        assert np.nanmin(np.abs(entropy_T - THRESHOLD)) > 1e-5  # rounding decides nothing here
        np.testing.assert_array_equal(row.num_kept > 0, wanted)
        kept += int(wanted.sum())
    some, full = everything(dataset), everything(whole[kind])
    for name in ("token_ids", "target_mask", "logprob", "rank", "log_tail", "entropy", "log_z"):
        np.testing.assert_array_equal(getattr(some, name), getattr(full, name))
    kept_T = some.num_kept > 0
    np.testing.assert_array_equal(some.num_exact[kept_T], full.num_exact[kept_T])
    stays_N = np.repeat(kept_T, full.num_kept)
    for name in ("entry_ids", "entry_logprobs", "draw_logprobs"):
        ours, theirs = getattr(some, name), getattr(full, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs[stays_N])
    assert 0.2 < kept / full.target_mask.sum() < 0.8
    assert sum(entry.kept_positions for entry in dataset.manifest) == kept
    assert verify(dataset, deep=True) == []


def test_a_share_of_each_row_is_that_of_a_plan_and_of_the_dense_entropy(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, whole: dict[str, kdata.Dataset]
) -> None:
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions={"rule": "entropy", "share": 0.3})
    teacher = StandInTeacher()
    for row in dataset:
        dense_TV = teacher.dense(row.token_ids)
        entropy_T = np.where(row.target_mask, -(np.exp(dense_TV) * dense_TV).sum(1), -1)
        count = -(-3 * int(row.target_mask.sum()) // 10)
        assert np.flatnonzero(row.num_kept).tolist() == sorted(np.argsort(-entropy_T, kind="stable")[:count].tolist())
    plan = kdata.select(whole["hybrid"], All(name="unsure", positions=Entropy(share=0.3, per="row")))
    planned, ours = positions_of(plan, whole["hybrid"]), kept_of(dataset)
    for row in dataset:  # the plan reads entropies as they are stored, where two may be equal
        assert sorted(row.entropy[planned[row.id]].tolist()) == sorted(row.entropy[ours[row.id]].tolist())


def test_a_random_share_is_that_of_a_plan_and_keeps_domains_whole(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, whole: dict[str, kdata.Dataset]
) -> None:
    rule = {"rule": "random", "share": 0.25, "seed": 3}
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    plan = kdata.select(whole["hybrid"], All(name="any", positions=RandomPositions(share=0.25, seed=3, per="row")))
    assert kept_of(dataset) == positions_of(plan, whole["hybrid"])
    of_code = run_capture(tmp_path / "code", corpus, tokenizer_dir, positions={**rule, "domains": ["code"]})
    for row, other in zip(of_code, dataset, strict=True):
        wanted = row.target_mask if row.domain == "code" else other.num_kept > 0
        np.testing.assert_array_equal(row.num_kept > 0, wanted)


def test_a_span_is_that_of_a_plan(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, whole: dict[str, kdata.Dataset]
) -> None:
    markers = {"begin": r"\bdef ", "end": r"return|\z"}
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions={"rule": "span", **markers})
    plan = kdata.select(whole["hybrid"], All(name="spans", positions=Span(**markers)))
    assert kept_of(dataset) == positions_of(plan, whole["hybrid"])
    assert sum(len(own) for own in kept_of(dataset).values()) > 0


MESSAGES = [
    {"role": "system", "content": "the log"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "and the dog"},
    {"role": "assistant", "content": "café"},
]


@pytest.mark.parametrize(
    ("roles", "targets", "expected"),
    [
        (["assistant"], "all", f"sat on the mat{TURN_END}café{TURN_END}"),
        (["user"], "all", "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>user\nand the dog<|im_end|>\n"),
        (["system", "assistant"], "last_assistant", f"café{TURN_END}"),
        (["system", "assistant"], "all", f"system\nthe log<|im_end|>\nsat on the mat{TURN_END}café{TURN_END}"),
    ],
)  # fmt: skip
def test_roles_keep_their_messages_and_targets_stay_targets(
    tmp_path: Path, chatty: Path, roles: list[str], targets: str, expected: str
) -> None:
    corpus = write_jsonl(tmp_path / "chats.jsonl", [{"id": "a", "domain": "chat", "messages": MESSAGES}])
    common: dict[str, Any] = {
        "teacher": StandInTeacher(context=200), "reading": {"messages_column": "messages"}, "targets": targets,
    }  # fmt: skip
    [plain] = run_capture(tmp_path / "plain", corpus, chatty, **common)
    [row] = run_capture(tmp_path / "d", corpus, chatty, positions={"rule": "role", "roles": roles}, **common)
    np.testing.assert_array_equal(row.target_mask, plain.target_mask)
    tokenizer = load_tokenizer(chatty)
    assert tokenizer.decode(row.token_ids[row.num_kept > 0]) == expected
    assert np.isfinite(row.logprob[row.target_mask]).all()


def test_generation_keeps_positions_by_the_same_rule(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    whole = run_generate(tmp_path / "whole", corpus, tokenizer_dir)
    some = run_generate(tmp_path / "d", corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": THRESHOLD})
    for row, full in zip(some, whole, strict=True):
        dense_TV = StandInTeacher().dense(full.token_ids)
        wanted = full.target_mask & (-(np.exp(dense_TV) * dense_TV).sum(1) >= THRESHOLD)
        np.testing.assert_array_equal(row.num_kept > 0, wanted)
        np.testing.assert_array_equal(row.token_ids, full.token_ids)
    role = run_generate(tmp_path / "role", corpus, tokenizer_dir, positions={"rule": "role", "roles": ["assistant"]})
    assert kept_of(role) == kept_of(whole)


def test_rows_written_and_read_share_a_dataset(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    rule = {"rule": "entropy", "threshold": THRESHOLD}
    run_generate(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    assert set(dataset.info.sources) == {"generate", "capture"} and verify(dataset, deep=True) == []
    with pytest.raises(MismatchError, match="positions"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, positions={**rule, "threshold": 2.0}, name="other")
    with pytest.raises(MismatchError, match="positions"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, name="other")


# ---------------------------------------------------------------------------------------------------- the same bytes

RULES: list[dict[str, Any]] = [
    {"rule": "entropy", "threshold": THRESHOLD, "domains": ["code"]},
    {"rule": "entropy", "share": 0.3},
    {"rule": "random", "share": 0.3},
]


def slow_capture(root: Path, corpus: Path, tokenizer: Path, rule: dict[str, Any]) -> None:
    teacher = StandInTeacher(before_call=lambda call: time.sleep(0.1))
    run_capture(root, corpus, tokenizer, teacher=teacher, unit_tokens=40, positions=rule)


@pytest.mark.parametrize("rule", RULES, ids=["threshold", "share", "random"])
def test_a_killed_capture_goes_on_to_the_same_bytes(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, rule: dict[str, Any]
) -> None:
    expected = run_capture(tmp_path / "whole", corpus, tokenizer_dir, unit_tokens=40, positions=rule)
    process = CONTEXT.Process(target=slow_capture, args=(tmp_path / "d", corpus, tokenizer_dir, rule))
    process.start()
    manifest, end = tmp_path / "d" / "manifest.jsonl", time.monotonic() + 60
    while not manifest.exists() or len(manifest.read_bytes().splitlines()) < 2:
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.002)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert 2 <= len(kdata.open(tmp_path / "d").manifest) < len(expected.manifest)
    run_capture(tmp_path / "d", corpus, tokenizer_dir, unit_tokens=40, positions=rule)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@pytest.mark.parametrize("rule", RULES, ids=["threshold", "share", "random"])
def test_what_a_row_keeps_does_not_depend_on_units_or_other_rows(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, rule: dict[str, Any]
) -> None:
    first = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    other = run_capture(tmp_path / "large", corpus, tokenizer_dir, unit_tokens=10_000, positions=rule)
    assert kept_of(first) == kept_of(other) and len(first.manifest) > len(other.manifest)
    changed = tmp_path / "corpus.jsonl"
    lines = corpus.read_text("utf-8").splitlines(keepends=True)
    changed.write_text("".join(lines[4:]) + "".join(lines[:2]), "utf-8")
    before = kept_of(first)
    again = run_capture(tmp_path / "d", changed, tokenizer_dir, positions=rule)
    assert kept_of(again) == {row_id: before[row_id] for row_id in kept_of(again)}
    assert len(again) < len(before) and verify(again, deep=True) == []


def test_without_the_setting_nothing_is_recorded(captured: Path) -> None:
    dataset = kdata.open(captured)
    assert "positions" not in dataset.info.codec.parameters
    assert "positions" not in dataset.info.sources["capture"].settings
    assert b"kept_positions" not in (captured / "manifest.jsonl").read_bytes()
    assert list(kept_lines(dataset)) == []


# ------------------------------------------------------------------------------------------------------ what reads it


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> kdata.Dataset:
    """By a threshold, with a row in which nothing is kept."""
    root = tmp_path_factory.mktemp("some") / "d"
    return run_capture(root, corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": THRESHOLD})


@pytest.mark.parametrize("kind", ["some", "threshold"])
def test_an_older_kdata_refuses_it_by_the_version_of_the_codec(
    some: kdata.Dataset, whole: dict[str, kdata.Dataset], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dataset = some if kind == "some" else whole[kind]
    assert dataset.info.codec.version == 3 < known_codecs()["packed"]
    monkeypatch.setattr(codecs, "known_codecs", lambda: {"packed": 2, "plain": 1, "verbatim": 1})
    with pytest.raises(FormatError, match="codec packed has version 3, this kdata reads up to 2; upgrade"):
        everything(kdata.open(dataset.path))


def test_sql_sees_every_token_and_the_entries_that_there_are(
    some: kdata.Dataset, whole: dict[str, kdata.Dataset]
) -> None:
    query = "select id, position, token_id, logprob, rank, entropy, log_tail, target from tokens order by id, position"
    assert some.sql(query).to_pylist() == whole["hybrid"].sql(query).to_pylist()
    counts = some.sql(
        "select count(*) filter (target) as targets, count(logprob) filter (target) as known, "
        "count(*) filter (num_exact + num_drawn > 0) as kept, count(kept_mass) as masses from tokens"
    ).to_pylist()[0]
    assert counts["targets"] == counts["known"] > counts["kept"] == counts["masses"] > 0
    entries = some.sql("select distinct id, position from entries").num_rows
    assert entries == counts["kept"] == sum(entry.kept_positions for entry in some.manifest)


def test_the_kept_mass_of_a_row_is_a_mean_over_its_positions_with_entries(some: kdata.Dataset) -> None:
    for row, stored in zip(some, some.index(["kept_mass"])["kept_mass"].to_pylist(), strict=True):
        kept_T = row.num_kept > 0
        if not kept_T.any():
            assert stored is None
        else:
            assert stored == pytest.approx(1 - np.exp(row.log_tail[kept_T]).mean(), abs=0.01)


def test_card_and_info_say_what_is_kept_where_and_why(some: kdata.Dataset, tmp_path: Path) -> None:
    kept, targets = sum(e.kept_positions for e in some.manifest), sum(e.target_tokens for e in some.manifest)
    [line] = kept_lines(some)
    assert line == (
        f"distributions are kept at {kept:,} of {targets:,} target positions: targets with an entropy of at least 3 nats"
    )
    by_domain = {d["name"]: (d["targets"], d["kept"]) for d in kept_by_domain(some)}
    assert sum(n for n, _ in by_domain.values()) == targets and sum(n for _, n in by_domain.values()) == kept
    for row in some:
        targets_left, kept_left = by_domain[row.domain]
        by_domain[row.domain] = (targets_left - int(row.target_mask.sum()), kept_left - int((row.num_kept > 0).sum()))
    assert set(by_domain.values()) == {(0, 0)}
    page = card_page(some).decode()
    assert f"kept at {kept:,} of {targets:,} target positions" in page and "| with a distribution |" in page
    shown = CliRunner().invoke(app, ["info", str(some.path)])
    assert shown.exit_code == 0 and f"{kept:,} of {targets:,} target positions" in shown.output.replace("\n", " ")


def test_measuring_again_finds_what_was_kept(
    some: kdata.Dataset, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    again = against_teacher(some, StandInTeacher(), some.num_rows)
    assert again.positions == sum(entry.kept_positions for entry in some.manifest)
    assert again.max_logprob_nats < 0.01 and again.codec.mean_nats < 0.05
    assert again.same_draws == 1.0
    rule = {"rule": "entropy", "threshold": 5.69}
    nothing = run_capture(tmp_path / "nothing", corpus, tokenizer_dir, positions=rule, reading={"limit": 3})
    compared = against_teacher(nothing, StandInTeacher(), 3)
    assert (compared.rows, compared.positions) == (3, 0) and compared.max_logprob_nats < 0.01


def test_parts_and_unions_keep_their_counts(
    some: kdata.Dataset, tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    parts = kdata.split(some, tmp_path / "parts", by="domain")
    for part in parts.values():
        assert sum(e.kept_positions for e in part.manifest) == sum(len(p) for p in kept_of(part).values())
        assert verify(part, deep=True) == []
    merged = kdata.merge(list(parts.values()), tmp_path / "merged")
    assert kept_of(merged) == {row_id: kept_of(some)[row_id] for row_id in kept_of(merged)}
    other = run_capture(
        tmp_path / "other", corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": 2.0}, reading={"limit": 4}
    )
    with pytest.raises(MismatchError, match="cannot be merged"):
        kdata.merge([some, other], tmp_path / "refused")


def test_a_changed_count_is_noticed(some: kdata.Dataset, tmp_path: Path) -> None:
    from kdata.format.manifest import read_manifest, write_manifest

    copy = Path(shutil.copytree(some.path, tmp_path / "d"))
    entries = read_manifest(copy)
    wrong = entries[0].model_copy(update={"kept_positions": (entries[0].kept_positions or 0) + 1})
    write_manifest(copy, [wrong, *entries[1:]])
    problems = verify(kdata.open(copy), deep=True)
    assert any("target positions, the manifest says" in problem.what for problem in problems)


def test_another_teacher_reads_the_same_positions_and_both_are_averaged(
    some: kdata.Dataset, whole: dict[str, kdata.Dataset], tmp_path: Path, tokenizer_dir: Path
) -> None:
    engine = LocalEngine(StandInTeacher("other"), load_tokenizer(tokenizer_dir))
    second = reread_with(tmp_path / "second", engine, some)
    of = some.info.codec.parameters["positions"]
    assert kept_of(second) == kept_of(some)
    assert second.info.codec.parameters["positions"] == {"rule": "stored", "of": of}
    again = reread_with(tmp_path / "again", engine, second)
    assert again.info.codec.parameters == second.info.codec.parameters, "whose rows they are does not grow"
    assert next(kept_lines(again)).endswith("(targets with an entropy of at least 3 nats)")
    both, _ = combine(tmp_path / "both", [some, second], CombineConfig(weights=[0.25, 0.75]))
    assert kept_of(both) == kept_of(some) and verify(both, deep=True) == []
    teachers = StandInTeacher(), StandInTeacher("other")
    for row in both:
        dense = [np.exp(teacher.dense(row.token_ids)) for teacher in teachers]
        own = (0.25 * dense[0] + 0.75 * dense[1])[np.arange(len(row.token_ids)), row.token_ids]
        assert_logprobs(row.logprob[1:], np.log(own[1:]), times=2)
    rows_of_one = combine(tmp_path / "pure", [some, some], CombineConfig(by_domain={"code": [1, 0], "prose": [0, 1]}))[
        0
    ]
    assert kept_of(rows_of_one) == kept_of(some)
    assert sum(e.kept_positions for e in rows_of_one.manifest) == sum(e.kept_positions for e in some.manifest)
    with pytest.raises(MismatchError, match="keeps distributions at some of its target positions"):
        combine(tmp_path / "no", [some, whole["hybrid"]], CombineConfig())
    third = reread_with(tmp_path / "third", engine, some, {"positions": {"rule": "random", "share": 0.5}})
    by_domain = CombineConfig(by_domain={"code": [1, 0], "prose": [0, 1]})
    for name, config in (("even", CombineConfig()), ("by domain", by_domain)):
        with pytest.raises(MismatchError, match="keep distributions at other positions"):
            combine(tmp_path / name, [some, third], config)
    copied, report = combine(tmp_path / "copied", [some, second], by_domain)
    assert report.lossless and kept_of(copied) == kept_of(some), "rows of each teacher, as they are"
    other_rule = reread_with(tmp_path / "fourth", engine, third)
    with pytest.raises(MismatchError, match="positions"):
        merge([second, other_rule], tmp_path / "no")
    plain = reread_with(tmp_path / "plain", engine, some, {"positions": None})
    assert kept_of(plain) == kept_of(whole["hybrid"])
    with pytest.raises(ConfigError, match="role needs the turns of chats"):
        reread_with(tmp_path / "no", engine, some, {"positions": {"rule": "role", "roles": ["user"]}})


def test_a_reread_does_not_go_on_from_other_positions(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> None:
    """The same rows and the same rule, by another teacher: its entropies pass the threshold elsewhere."""
    rule = {"rule": "entropy", "threshold": THRESHOLD}
    engine = LocalEngine(StandInTeacher("other"), load_tokenizer(tokenizer_dir))
    first = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    before = kept_of(reread_with(tmp_path / "r", engine, first))
    shutil.rmtree(tmp_path / "d")
    first = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule, teacher=StandInTeacher("third"))
    assert kept_of(first) != before
    with pytest.raises(MismatchError, match="another folder"):  # of what was read nothing stays
        reread_with(tmp_path / "r", engine, first)


@pytest.mark.parametrize(
    "rule", [{"rule": "random", "share": 0.4}, {"rule": "entropy", "threshold": THRESHOLD, "domains": ["code"]}]
)
def test_new_names_and_domains_of_rows_decide_as_in_a_fresh_capture(
    tmp_path: Path, tokenizer_dir: Path, rule: dict[str, Any]
) -> None:
    rows = rows_of_text(8)
    corpus = write_jsonl(tmp_path / "c.jsonl", rows)
    run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    rows[0]["id"], rows[1]["domain"], rows[2]["domain"] = "renamed", "code", "prose"
    write_jsonl(corpus, rows)
    grown = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    assert kept_of(grown) == kept_of(run_capture(tmp_path / "fresh", corpus, tokenizer_dir, positions=rule))


def test_a_capture_to_a_url_keeps_positions_and_says_how_many(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/store"
    rule = {"rule": "entropy", "threshold": THRESHOLD, "domains": ["none"]}
    run_capture(url, corpus, tokenizer_dir, positions=rule)  # type: ignore[arg-type]
    assert "distributions are kept at" in capsys.readouterr().err
    here = run_capture(tmp_path / "d", corpus, tokenizer_dir, positions=rule)
    assert kept_of(kdata.open(url)) == kept_of(here)
    assert "no row has the domain 'none'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "rule",
    [
        "entropy", True, [], {}, {"rule": 5}, {"rule": "entropy", "domains": 5}, {"rule": "x", "domains": [5]},
        {"rule": "x", "roles": "a"},
    ],
)  # fmt: skip
def test_a_rule_that_a_stranger_wrote_is_an_object_with_a_name(some: kdata.Dataset, tmp_path: Path, rule: Any) -> None:
    root = Path(shutil.copytree(some.path, tmp_path / "d"))
    rewrite_info(root, lambda content: content["codec"]["parameters"].update(positions=rule))
    with pytest.raises(CorruptError, match="codec parameter positions"):
        kdata.open(root)


@pytest.mark.parametrize(
    "rule", [{"rule": "entropy"}, {"rule": "entropy", "threshold": 1, "later": 2}, {"rule": "later"}]
)
def test_a_rule_of_a_newer_kdata_is_shown_and_needs_no_understanding(
    some: kdata.Dataset, tmp_path: Path, tokenizer_dir: Path, rule: dict[str, Any]
) -> None:
    codec = some.info.codec.model_copy(update={"parameters": {**some.info.codec.parameters, "positions": rule}})
    assert KeepConfig.of(codec).positions is None
    assert str(rule["rule"]) in described(rule)


def test_spans_of_written_text_need_a_tokenizer_that_tells_bytes(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdata.corpus.encode._byte_table", lambda tokenizer: None)
    with pytest.raises(ConfigError, match="depend on the text; use the rule"):
        run_generate(tmp_path / "d", corpus, tokenizer_dir, positions={"rule": "span", "begin": "a", "end": "b"})
    assert not (tmp_path / "d/manifest.jsonl").exists() or not kdata.open(tmp_path / "d").num_rows


def test_plans_choose_among_the_positions_that_are_kept(some: kdata.Dataset, tmp_path: Path) -> None:
    copy = kdata.open(Path(shutil.copytree(some.path, tmp_path / "d")))
    kept = kept_of(copy)
    for rule in (Entropy(share=0.5), RandomPositions(share=0.5), Margin(share=0.5)):
        plan = kdata.select(copy, All(name=f"some_{rule.rule}", positions=rule))
        chosen = positions_of(plan, copy)
        assert all(set(own) <= set(kept[row_id]) for row_id, own in chosen.items())
        assert sum(map(len, chosen.values())) == -(-sum(map(len, kept.values())) // 2)
    query = "select id, position from tokens where target"
    with pytest.raises(DataError, match="at which the dataset keeps no distribution; add `num_exact"):
        kdata.select(copy, All(name="sql", positions=SqlPositions(sql=query)))
    fitting = SqlPositions(sql=f"{query} and num_exact + num_drawn > 0")
    assert positions_of(kdata.select(copy, All(name="fits", positions=fitting)), copy) == kept


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"rule": "entropy"}, "set one of threshold"),
        ({"rule": "entropy", "threshold": 1, "share": 0.5}, "set one of threshold"),
        ({"rule": "entropy", "threshold": 0}, "greater than 0"),
        ({"rule": "entropy", "share": 1.5}, "less than or equal to 1"),
        ({"rule": "random"}, "'positions.share' is missing"),
        (
            {"rule": "random", "share": 0.5, "sed": 1},
            "unknown key 'positions.sed'",
        ),
        ({"rule": "entropie", "threshold": 1}, "'entropie' is none of"),
        ({"threshold": 1}, "'positions.rule' is missing"),
        ({"rule": "span", "begin": "(", "end": "x"}, "write a pattern of RE2"),
        ({"rule": "role", "roles": []}, "at least 1"),
        ({"rule": "role", "roles": ["user"]}, "name a messages_column"),
        ({"rule": "stored"}, "is for `kdata reread`"),
        ({"rule": "random", "share": 0.5, "domains": ["prose"]}, "'prose', which corpus.domains leaves out"),
    ],
)
def test_settings_that_cannot_be_are_one_error(positions: dict[str, Any], message: str) -> None:
    settings = {"corpus": {"path": "x", "domains": ["code"]}, "positions": positions}
    with pytest.raises(ConfigError, match=message):
        parse_config(CaptureConfig, settings, "capture settings")


def test_generation_refuses_roles_that_it_does_not_write() -> None:
    for positions, message in (
        ({"rule": "role", "roles": ["user"]}, "nothing would be kept"),
        ({"rule": "stored"}, "is for `kdata reread`"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(GenerateConfig, {"prompts": {"path": "x"}, "positions": positions}, "generate settings")


def test_a_threshold_above_every_entropy_is_refused_before_anything_is_written(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no distribution over 300 ids has an entropy above 5.70"):
        run_capture(tmp_path / "d", corpus, tokenizer_dir, positions={"rule": "entropy", "threshold": 5.8})
    assert not (tmp_path / "d").exists()


def test_a_rule_that_keeps_nothing_and_names_that_no_row_has_are_said_aloud(
    tmp_path: Path, corpus: Path, tokenizer_dir: Path, chatty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = run_capture(
        tmp_path / "d", corpus, tokenizer_dir,
        positions={"rule": "entropy", "threshold": 5.69, "domains": ["verse"]},
    )  # fmt: skip
    said = capsys.readouterr().err.replace("\n", " ")
    assert "kept at 0 of" in said and "WARNING: the rule keeps no distribution" in said
    assert "WARNING: no row has the domain 'verse'" in said
    assert [entry.kept_positions for entry in dataset.manifest] == [0] * len(dataset.manifest)
    assert {entry.codec_error for entry in dataset.manifest} == {None} and verify(dataset, deep=True) == []
    assert dataset.sql("select count(logprob) from tokens where target")[0][0].as_py() > 0
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"id": "a", "domain": "chat", "messages": MESSAGES}])
    run_capture(
        tmp_path / "chats", chats, chatty, teacher=StandInTeacher(context=200),
        reading={"messages_column": "messages"}, positions={"rule": "role", "roles": ["assistant", "tool"]},
    )  # fmt: skip
    said = capsys.readouterr().err.replace("\n", " ")
    assert "WARNING: no chat has a message of role 'tool'" in said and "'assistant'" not in said


def test_a_teacher_that_sees_the_top_k_only_refuses_rules_of_entropy() -> None:
    keep = KeepConfig(kind="topk", k=4, positions={"rule": "entropy", "threshold": 1.0})
    assert keep.needs_full_distribution
    with pytest.raises(ConfigError, match="positions by entropy needs the full distribution"):
        refuse_kept(keep, "vllm-server")
    with pytest.raises(ConfigError, match="kind threshold needs the full distribution"):
        refuse_kept(KeepConfig(kind="threshold"), "vllm-server")
    refuse_kept(KeepConfig(kind="topk", k=4, positions={"rule": "random", "share": 0.5}), "vllm-server")


def test_the_command_takes_the_rule_as_a_setting(corpus: Path) -> None:
    from kdata.pipelines.cli.make import capture_job

    job, _, _ = capture_job(
        "MODEL",
        {"path": str(corpus)},
        {},
        None,
        None,
        ["positions.rule=entropy", "positions.threshold=2", "positions.domains=[a]"],
    )
    assert job.keep.positions is not None
    assert job.keep.positions.model_dump() == {"rule": "entropy", "threshold": 2.0, "domains": ["a"]}
    assert job.keep.positions.describe() == "every target of a; elsewhere targets with an entropy of at least 2 nats"
