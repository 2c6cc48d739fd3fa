"""Combined payloads, from two captures to what a reader gets, against the dense float64 average of two teachers."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import kdata
from kdata.check.remeasure import against_teacher
from kdata.check.repair import repair
from kdata.check.verify import verify
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.format.files import file_info
from kdata.format.keep import KeepConfig
from kdata.format.kept import draw_mask
from kdata.format.manifest import new_info, write_json
from kdata.format.records import UnitResult
from kdata.format.schema import CodecInfo, SourceInfo
from kdata.format.temper import at_temperature
from kdata.jobs import combine as module
from kdata.jobs.combine import CombineConfig, CombineReport, combine
from kdata.jobs.job import LocalEngine
from kdata.jobs.payloads import inputs_of_shard
from kdata.jobs.reading import CaptureConfig, capture
from kdata.jobs.reread import keep_like, reread_with
from kdata.pipelines.cli.main import app
from kdata.share.card import write_card
from kdata.store.writer import Writer
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import StandInTeacher, digests, rows_of_text, run_capture, run_generate, save_llama
from tests.rounding import TAIL, assert_logprobs
from tests.schemas.tables import FOLDER

Make = Callable[..., list[kdata.Dataset]]


def again(root: Path, dataset: kdata.Dataset, teacher: StandInTeacher, **settings: Any) -> kdata.Dataset:
    """Have another stand-in teacher read the rows of a dataset."""
    assert dataset.tokenizer_dir is not None
    return reread_with(root, LocalEngine(teacher, load_tokenizer(dataset.tokenizer_dir)), dataset, settings)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Make:
    """Payloads "one" and "two" of captured and generated rows; the same settings give the same folders."""
    root, payloads_of = tmp_path_factory.mktemp("payloads"), dict[str, list[kdata.Dataset]]()

    def make(**settings: Any) -> list[kdata.Dataset]:
        key = json.dumps(settings, sort_keys=True)
        if key not in payloads_of:
            place = root / str(len(payloads_of))
            run_capture(place / "one", corpus_file, tokenizer_dir, teacher=StandInTeacher("one"), **settings)
            one = run_generate(place / "one", corpus_file, tokenizer_dir, teacher=StandInTeacher("one"), **settings)
            payloads_of[key] = [one, again(place / "two", one, StandInTeacher("two"))]
        return payloads_of[key]

    return make


def average(sequence: kdata.Sequences, shares: list[float]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Dense float64 [T, V]: the average of the two teachers, and each of them."""
    dense = [np.exp(StandInTeacher(name).dense(sequence.token_ids)) for name in ("one", "two")]
    return shares[0] * dense[0] + shares[1] * dense[1], dense


@pytest.mark.parametrize("kind", ["topk", "adaptive"])
def test_kept_entries_are_averaged_on_the_union_and_tails_too(tmp_path: Path, make: Make, kind: str) -> None:
    """Ids, probabilities, the tail and the actual token, at every recorded position; nothing sums to more than 1."""
    payloads = make(kind=kind)
    combined, report = combine(tmp_path / "out", payloads, CombineConfig(weights=[1, 3]))
    unknown = 0.0
    for sequence, one, two in zip(combined, *payloads, strict=True):
        p_TV, dense = average(sequence, [0.25, 0.75])
        ids_TK, logprobs_TK = sequence.padded()
        for t in np.flatnonzero(sequence.target_mask):
            kept = [set(d.entry_ids[d.entry_offsets[t] : d.entry_offsets[t + 1]].tolist()) for d in (one, two)]
            ids, probs = ids_TK[t, : sequence.num_kept[t]], np.exp(logprobs_TK[t, : sequence.num_kept[t]])
            assert set(ids.tolist()) == kept[0] | kept[1] and sequence.num_exact[t] == len(ids)
            known = sum(
                share * np.where([i in own for i in ids], p[t, ids], 0.0)
                for share, own, p in zip((0.25, 0.75), kept, dense, strict=True)
            )
            np.testing.assert_allclose(np.log(probs), np.log(known), atol=0.1)  # two grids of 1/16 nat
            assert probs.astype(np.float64).sum() <= 1 - np.exp(np.float64(sequence.log_tail[t])) + 1e-6 <= 1 + 1e-6
            assert np.exp(sequence.log_tail[t]) == pytest.approx(1 - known.sum(), abs=2 * TAIL)  # rounded twice
            assert_logprobs(sequence.logprob[t], np.log(p_TV[t, sequence.token_ids[t]]), times=2)
            assert sequence.rank[t] == 0 and np.isnan(sequence.entropy[t])
            unknown += p_TV[t, ids].sum() - known.sum()
    assert combined.info.codec.kind == "combined" and combined.info.tail == "ghost"
    positions = sum(e.target_tokens for e in combined.manifest)
    assert report.positions == positions
    assert 0.001 < unknown / positions < report.unknown_mean < report.unknown_max < 1
    assert "lower bounds: a mass of at most" in report.lines()[0]


@pytest.mark.parametrize(("settings", "draws"), [
    ({"kind": "hybrid", "num_draws": 12}, 24), ({"kind": "threshold", "threshold": 0.05}, 40)
])  # fmt: skip
def test_draws_are_averaged_id_by_id(tmp_path: Path, make: Make, settings: dict[str, Any], draws: int) -> None:
    """Exact where both know, else the sum of both sides' weights; what stands in the payloads is not rounded again."""
    payloads = make(**settings)
    combined, report = combine(tmp_path / "out", payloads, CombineConfig(weights=[0.5, 0.5]))
    for sequence, *members in zip(combined, *payloads, strict=True):
        for t in np.flatnonzero(sequence.target_mask):
            weights: list[dict[int, float]] = []
            exact: list[set[int]] = []
            for m in (*members, sequence):
                a, b = m.entry_offsets[t : t + 2]
                weights.append(
                    dict(zip(m.entry_ids[a:b].tolist(), np.exp(m.entry_logprobs[a:b]).tolist(), strict=True))
                )
                exact.append(set(m.entry_ids[a : a + m.num_exact[t]].tolist()))
            assert exact[2] == exact[0] & exact[1]
            assert weights[2].keys() == weights[0].keys() | weights[1].keys()
            outside = 1 - sum(weights[2][token] for token in exact[2])
            for token, weight in weights[2].items():
                want = 0.5 * weights[0].get(token, 0.0) + 0.5 * weights[1].get(token, 0.0)
                kind = token in exact[2]
                rounding = (1 / 32 if kind else 0.004) + TAIL / (1 - outside if kind else outside)
                assert np.log(weight) == pytest.approx(np.log(want), abs=rounding)
            assert np.exp(sequence.log_tail[t]) == pytest.approx(outside, abs=1e-5)
            assert sum(weights[2].values()) == pytest.approx(1.0, abs=0.002)
    assert combined.info.tail == "draws" and "unbiased" in report.lines()[0]
    assert combined.info.codec.parameters == {"id_bytes": 2, "num_draws": draws}


@pytest.mark.parametrize("settings", [{"kind": "sampled", "num_draws": 40}, {"kind": "threshold", "threshold": 0.05}])
def test_the_average_of_draws_is_unbiased(tmp_path: Path, make: Make, settings: dict[str, Any]) -> None:
    """The errors of a function of the ids (+1 where the first teacher believes more, -1 elsewhere), summed over all
    positions, are within 4 of their standard deviations of 0.

    Shares that are a little different, or do not sum to 1, are found by the same measure.
    """
    combined, _ = combine(tmp_path / "out", make(**settings), CombineConfig(weights=[0.4, 0.6]))

    def deviation(shares: list[float]) -> float:
        errors = []
        for sequence in combined:
            p_TV, dense = average(sequence, shares)
            for t in np.flatnonzero(sequence.target_mask):
                function_V = np.sign(dense[0][t] - dense[1][t])
                a, b = sequence.entry_offsets[t : t + 2]
                drawn = np.exp(sequence.entry_logprobs[a:b].astype(np.float64)) @ function_V[sequence.entry_ids[a:b]]
                errors.append(drawn - p_TV[t] @ function_V)
        return float(np.sum(errors) / np.sqrt(np.sum(np.square(errors))))

    assert abs(deviation([0.4, 0.6])) < 4
    assert abs(deviation([0.42, 0.58])) > 4 and abs(deviation([0.4, 0.55])) > 4


def test_draws_of_one_teacher_read_twice_have_half_the_variance(tmp_path: Path, make: Make) -> None:
    """Because a second reading draws with a seed of its own; with the same seed nothing would be gained."""
    one = make(kind="sampled", num_draws=40)[0]

    def variance(dataset: kdata.Dataset) -> float:
        total = 0.0
        for row in range(12):
            sequence = dataset[row]
            p_TV = np.exp(StandInTeacher("one").dense(sequence.token_ids))
            position_N = np.repeat(np.arange(len(p_TV)), sequence.num_kept)
            q_TV = np.zeros_like(p_TV)
            np.add.at(q_TV, (position_N, sequence.entry_ids), np.exp(sequence.entry_logprobs))
            total += float(np.square(q_TV - p_TV)[sequence.target_mask].sum())
        return total

    own, same = (
        combine(
            tmp_path / f"out-{n}",
            [one, again(tmp_path / f"again-{n}", one, StandInTeacher("one"), **s)],
            CombineConfig(),
        )
        for n, s in enumerate(({}, {"draw_seed": 0}))
    )
    assert variance(own[0]) / variance(one) == pytest.approx(0.5, abs=0.05)
    assert variance(same[0]) / variance(one) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "settings",
    [{"kind": "hybrid", "temperatures": [2.0]}, {"kind": "topk"}, {"kind": "threshold", "temperatures": [2.0]}],
)
def test_a_teacher_for_each_domain_loses_nothing(tmp_path: Path, make: Make, settings: dict[str, Any]) -> None:
    """Every number of a row is that of its domain's teacher, at further temperatures too."""
    payloads = make(**settings)
    config = CombineConfig(by_domain={"prose": [0, 1]}, weights=[1, 0])
    combined, report = combine(tmp_path / "out", payloads, config)
    for row, about in enumerate(combined.index().to_pylist()):
        chosen = payloads[about["domain"] == "prose"]
        assert about == chosen.index().slice(row, 1).to_pylist()[0]
        for name, values in vars(chosen[row].sequence).items():
            here = getattr(combined[row].sequence, name)
            assert (values is None and here is None) or np.array_equal(values, here, equal_nan=True), name
        if "temperatures" in settings:
            warm = [at_temperature(d[row].sequence, 2.0, d.info.codec) for d in (combined, chosen)]
            assert np.array_equal(warm[0].entry_logprobs, warm[1].entry_logprobs)
    assert combined.info.codec.kind == settings["kind"] and "draw_seed" not in combined.info.codec.parameters
    assert report.lines() == ["every row is that of one teacher, number for number"]
    assert verify(combined, deep=True) == []
    for entry, *theirs in zip(combined.manifest, *(d.manifest for d in payloads), strict=True):
        parts = combined.sql(
            "select domain = 'prose' as m, sum(num_target_tokens)::bigint as n from rows where shard = $1 group by 1",
            [entry.name],
        ).to_pylist()
        errors = [(part["n"], theirs[part["m"]].codec_error) for part in parts]
        assert entry.codec_error is not None and all(error is not None for _, error in errors)
        mean = sum(n * e.mean_nats for n, e in errors if e) / sum(n for n, _ in errors)
        assert entry.codec_error.mean_nats == pytest.approx(mean)
        assert entry.codec_error.max_nats == max(e.max_nats for _, e in errors if e)
        metadata = pa.ipc.open_file(combined.path / f"data/{entry.name}.arrow").schema.metadata
        assert json.loads(metadata[b"kdata.codec"]) == combined.info.codec.model_dump()
    assert combined.info.teacher.members is not None
    assert [(m.weight, m.by_domain) for m in combined.info.teacher.members] == [(1, {"prose": 0}), (0, {"prose": 1})]


def test_teachers_by_domain_may_have_different_codecs(tmp_path: Path, make: Make) -> None:
    """Then the codec is that of combinations, and ranks and entropies are still those of the one teacher."""
    one = make(kind="topk")[0]
    two = again(tmp_path / "two", one, StandInTeacher("two"), k=3)
    config = CombineConfig(by_domain={"prose": [0, 1], "code": [1, 0]})
    combined, _ = combine(tmp_path / "out", [one, two], config)
    assert combined.info.codec.kind == "combined"
    for row, domain in enumerate(combined.index(["domain"])["domain"].to_pylist()):
        here, chosen = combined[row], (two if domain == "prose" else one)[row]
        for name in ("rank", "entropy", "num_exact", "num_kept", "logprob", "log_tail", "entry_logprobs"):
            assert np.array_equal(getattr(here, name), getattr(chosen, name), equal_nan=True), name
        for a, b in itertools.pairwise(here.entry_offsets):  # of equal probabilities the lower id is first
            assert set(here.entry_ids[a:b]) == set(chosen.entry_ids[a:b])
    assert combined.info.teacher.members is not None and combined.info.teacher.members[0].weight is None


def test_the_result_is_a_dataset_that_says_what_it_is(tmp_path: Path, make: Make) -> None:
    payloads = make(kind="hybrid", temperatures=[2.0])
    combined, report = combine(tmp_path / "out", payloads, CombineConfig(weights=[2, 6]))
    assert verify(combined, deep=True) == []
    about = combined.info.teacher
    assert about.members is not None and [m.teacher for m in about.members] == [d.info.teacher for d in payloads]
    assert [m.weight for m in about.members] == [0.25, 0.75]
    assert (about.backend, about.deterministic, about.model) == ("combine", True, "stand-in + stand-in")
    source = combined.info.sources["generate"]
    assert source.kind == "combine" and source.num_units == sum(e.source == "generate" for e in combined.manifest)
    assert [one["fingerprint"] for one in source.settings["of"]] == [d.content_digest for d in payloads]
    same = ["id", "content_hash", "text", "prompt", "domain", "finish_reason", "num_target_tokens", "shard", "row"]
    assert combined.index(same).equals(payloads[0].index(same))
    assert report.lines()[1].startswith("without the further temperatures [2.0]")
    schema = json.loads((FOLDER / "v1/dataset.schema.json").read_text())
    jsonschema.validate(json.loads((combined.path / "dataset.json").read_bytes()), schema)
    card = write_card(combined).read_text()
    assert "the average of several teachers on the same rows" in card and "share 0.75" in card
    with pytest.raises(ConfigError, match=r"holds no log-sum-exp at temperature 2\.0"):
        at_temperature(combined[0].sequence, 2.0, combined.info.codec)
    with pytest.raises(MismatchError, match="stand-in is not the teacher of"):
        against_teacher(combined, StandInTeacher("one"), 1)
    assert keep_like(combined, None) == KeepConfig()


def test_shards_of_another_size_are_read_row_by_row(
    tmp_path: Path, make: Make, corpus_file: Path, tokenizer_dir: Path
) -> None:
    """A second capture of the same corpus is a payload of the same rows too; memory is bounded by the first's shards."""
    one, two = (
        run_capture(
            tmp_path / name, corpus_file, tokenizer_dir, teacher=StandInTeacher(name), unit_tokens=size, kind="topk"
        )
        for name, size in (("one", 100), ("two", 333))
    )
    combined, _ = combine(tmp_path / "out", [one, two], CombineConfig())
    reread = again(tmp_path / "again", one, StandInTeacher("two"))
    other, _ = combine(tmp_path / "other", [one, reread], CombineConfig())
    assert [e.rows for e in combined.manifest] == [e.rows for e in one.manifest] != [e.rows for e in two.manifest]
    for a, b in zip(combined, other, strict=True):
        assert np.array_equal(a.entry_logprobs, b.entry_logprobs) and np.array_equal(a.entry_ids, b.entry_ids)


def test_a_stopped_run_resumes_to_the_same_bytes_and_counts_everything(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    payloads = make(kind="topk")
    whole, counted = combine(tmp_path / "whole", payloads, CombineConfig())
    commit = Writer.commit

    def fail(writer: Writer, unit: UnitResult) -> Any:
        if unit.number == 2:
            raise KeyboardInterrupt
        return commit(writer, unit)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "commit", fail)
        with pytest.raises(KeyboardInterrupt):
            combine(tmp_path / "cut", payloads, CombineConfig())
    assert len(kdata.open(tmp_path / "cut").manifest) == 2
    again_counted = combine(tmp_path / "cut", payloads, CombineConfig(), resume="must")[1]
    assert digests(tmp_path / "cut") == digests(whole.path)
    assert (
        dataclasses.asdict(again_counted)
        == dataclasses.asdict(counted)
        != dataclasses.asdict(CombineReport(False, ghost=True))
    )
    with pytest.raises(MismatchError, match=r"teacher.members.*'weight': 0.5"):
        combine(tmp_path / "cut", payloads, CombineConfig(weights=[1, 3]))


def test_a_damaged_combination_is_repaired_and_combined_again(tmp_path: Path, make: Make) -> None:
    payloads = make(kind="topk")
    combined, _ = combine(tmp_path / "out", payloads, CombineConfig())
    before = digests(combined.path)
    path = combined.path / "data/generate-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    done = repair(combined.path)
    assert done.units == {"generate": [1]} and done.remaining == []
    assert done.commands == [f"kdata combine ...: repeat the command that wrote 'generate', into {combined.path}"]
    again, _ = combine(combined.path, payloads, CombineConfig(), resume="must")
    assert digests(again.path) == before


def rewritten(root: Path, dataset: kdata.Dataset, **changes: Any) -> kdata.Dataset:
    """The same rows with another target mask, or as another kind of dataset."""
    codec = changes.pop("codec", dataset.info.codec)
    fields = {**dataset.info.identity(), "codec": codec, **changes.pop("info", {})}
    source = SourceInfo(kind="capture", settings={}, num_units=None)
    with Writer(root, new_info(**fields), "capture", source, tokenizer_dir=dataset.tokenizer_dir) as writer:
        stored = dataset.shard(0)
        records = [row.record_from(stored, n) for n, row in enumerate(inputs_of_shard(dataset, 0, stored))]
        for place in changes.get("not_targets", []):
            records = [
                dataclasses.replace(r, target_mask=r.target_mask & (np.arange(len(r.token_ids)) != place))
                for r in records
            ]
        writer.commit(UnitResult(0, records))
        if not changes.get("begun"):
            writer.finish(1)
    return kdata.open(root)


def test_other_rows_are_refused(
    tmp_path: Path, captured: Path, tokenizer_dir: Path, jsonl: Callable[..., Path]
) -> None:
    one = kdata.open(captured)

    def refused(other: kdata.Dataset, message: str, first: kdata.Dataset = one) -> None:
        with pytest.raises(MismatchError, match=message + r".*kdata reread FIRST OUT --teacher MODEL"):
            combine(tmp_path / "out", [first, other], CombineConfig())

    rows = rows_of_text(12)
    short = run_capture(tmp_path / "a", jsonl(rows), tokenizer_dir)
    refused(short, r"has 25 rows, .* 12: not the same rows")
    swapped = run_capture(tmp_path / "b", jsonl([*rows[:3], rows[4], rows[3], *rows[5:]]), tokenizer_dir)
    refused(swapped, r"row 3 of .* is 'doc-003', .*: id is 'doc-003' and 'doc-004'", short)
    rows[7]["text"] = "another text"
    changed = run_capture(tmp_path / "c", jsonl(rows), tokenizer_dir)
    refused(changed, r"row 7 of .* is 'doc-007', .*: content_hash is", short)
    masks = [rewritten(tmp_path / f"m{n}", one, not_targets=[n]) for n in (1, 2)]
    refused(masks[1], r"'doc-000' has another target_mask in .*m2 than in .*m1", masks[0])
    fewer = rewritten(tmp_path / "m3", one, not_targets=[1, 2])
    refused(fewer, r"num_target_tokens is", masks[0])


@pytest.mark.parametrize("size", [340, 2**16 + 64])
def test_heads_of_different_sizes_are_averaged_over_the_larger(tmp_path: Path, captured: Path, size: int) -> None:
    """A row that one head lacks has probability 0 there: half of what the other says."""
    one = kdata.open(captured)
    larger = again(tmp_path / "larger", one, StandInTeacher("two", vocab_size=size))
    for inputs in ([one, larger], [larger, one]):
        result, _ = combine(tmp_path / f"out-{inputs[0].info.vocab_size}", inputs, CombineConfig())
        assert result.info.vocab_size == size and verify(result, deep=True) == []
        sequences, theirs, ours = (d.take(np.arange(3)) for d in (result, larger, one))
        position, logs = np.repeat(np.arange(len(sequences.num_kept)), sequences.num_kept), sequences.entry_logprobs
        weights = np.exp(logs.astype(float))
        is_draw = draw_mask(sequences.num_exact, sequences.num_kept - sequences.num_exact)
        # The logarithm of a draw's weight is stored as float16: off by at most 2^-11 of itself.
        rounding = np.bincount(position, weights * np.abs(logs) * 2.0**-11 * is_draw)
        assert (np.bincount(position, weights) <= 1 + 1.01 * rounding + 1e-6).all()
        far = theirs.entry_ids >= 300
        assert far.any() and not (ours.entry_ids >= 300).any()
        want = 0.5 * np.exp(theirs.entry_logprobs[far].astype(float))
        got = np.exp(sequences.entry_logprobs[sequences.entry_ids >= 300].astype(float))
        np.testing.assert_allclose(np.sort(got), np.sort(want), rtol=0.04)


def test_another_vocabulary_is_refused(tmp_path: Path, captured: Path, tokenizer_dir: Path) -> None:
    one = rewritten(tmp_path / "one", kdata.open(captured))
    other = {**one.info.tokenizer.model_dump(), "hash": "f" * 64}
    renamed = rewritten(tmp_path / "renamed", one, info={"tokenizer": other})
    assert combine(tmp_path / "same", [one, renamed], CombineConfig())[0].num_rows, "the files hold the same ids"
    shutil.rmtree(renamed.path / "tokenizer")
    with pytest.raises(MismatchError, match=r"\(ffffffffffff\) differ, and .*renamed carries no tokenizer\.json"):
        combine(tmp_path / "out", [one, kdata.open(renamed.path)], CombineConfig())
    swapped = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (renamed.path / "tokenizer").mkdir()
    (renamed.path / "tokenizer/tokenizer.json").write_text(json.dumps(swapped))
    about = json.loads((renamed.path / "dataset.json").read_bytes())
    about["tokenizer_files"] = {"tokenizer.json": file_info(renamed.path / "tokenizer/tokenizer.json").model_dump()}
    write_json(renamed.path / "dataset.json", about)
    with pytest.raises(MismatchError, match=r"id \d+ is '[ab]' in one and '[ab]' in the other.*choose another teacher"):
        combine(tmp_path / "out", [one, kdata.open(renamed.path)], CombineConfig())
    unknown = rewritten(tmp_path / "unknown", one, info={"tokenizer": {**other, "hash": "unknown"}})
    with pytest.raises(MismatchError, match=r"tokenizer of .*unknown is not known.*--tokenizer"):
        combine(tmp_path / "out", [unknown, unknown], CombineConfig())


def test_payloads_that_cannot_be_averaged_are_refused_with_a_remedy(tmp_path: Path, make: Make, captured: Path) -> None:
    one, two = make(kind="topk")
    drawn = again(tmp_path / "drawn", one, StandInTeacher("two"), kind="hybrid")
    with pytest.raises(MismatchError, match=r"keeps topk \(tail ghost\), .* hybrid \(tail draws\).*reread --kind topk"):
        combine(tmp_path / "out", [one, drawn], CombineConfig())
    combined, _ = combine(tmp_path / "combined", [one, two], CombineConfig())
    with pytest.raises(DataError, match="is a combination itself"):
        combine(tmp_path / "out", [combined, one], CombineConfig())
    source = kdata.open(captured)
    absent = rewritten(
        tmp_path / "absent", source, codec=CodecInfo(id="verbatim", version=1, kind="topk", parameters={}),
        info={"tail": "absent"},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"does not hold the mass outside.*kdata reread"):
        combine(tmp_path / "out", [absent, one], CombineConfig())
    begun = rewritten(tmp_path / "begun", source, begun=True)
    with pytest.raises(DataError, match=r"source 'capture' of .* is not complete"):
        combine(tmp_path / "out", [begun, begun], CombineConfig())
    with pytest.raises(ConfigError, match="two payloads or more"):
        combine(tmp_path / "out", [one], CombineConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": [1]}, r"weights \[1.0\] are 1 numbers for 2 payloads"),
        ({"weights": [1, -1]}, "must be finite, not negative, and not all 0"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"by_domain": {"prosa": [1, 0]}, "weights": [1, 1]}, r"no domain 'prosa' in .*; it has code, prose"),
        ({"by_domain": {"prose": [1, 0]}}, "domain 'code' has no weights; add it to by_domain"),
    ],
)
def test_weights_that_are_not_shares_are_refused(
    tmp_path: Path, make: Make, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        combine(tmp_path / "out", make(kind="topk"), CombineConfig(**config))
    assert not (tmp_path / "out").exists()


def test_a_damaged_payload_is_refused(tmp_path: Path, make: Make) -> None:
    one, two = make(kind="topk")
    copy = kdata.open(shutil.copytree(two.path, tmp_path / "copy"))
    path = copy.path / "data/capture-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"copy/data/capture-00001.arrow is damaged"):
        combine(tmp_path / "out", [one, copy], CombineConfig())
    shutil.copyfile(two.path / path.relative_to(copy.path), path)  # mended: the same command goes on
    done, _ = combine(tmp_path / "out", [one, kdata.open(copy.path)], CombineConfig())
    other, _ = combine(tmp_path / "other", [one, two], CombineConfig())
    assert digests(done.path) == digests(other.path)


def test_memory_holds_one_shard_at_a_time(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of the arithmetic sees the rows of one shard of the first payload."""
    payloads, seen, mix = make(kind="topk"), list[int](), module.mix

    def watched(members: list[kdata.Sequences], *rest: Any, **options: Any) -> Any:
        seen.extend(len(m) for m in members)
        return mix(members, *rest, **options)

    monkeypatch.setattr(module, "mix", watched)
    combine(tmp_path / "out", payloads, CombineConfig())
    assert seen == [entry.rows for entry in payloads[0].manifest for _ in payloads]


def test_two_real_models_by_the_commands(tmp_path: Path, llama_dir: Path, corpus_file: Path) -> None:
    """Capture, reread, combine; each stored number against a dense float64 forward pass of both models."""
    other = save_llama(tmp_path / "other", seed=1)
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus_file)), kind="topk", k=8, unit_tokens=150)
    one = capture(tmp_path / "one", config, TeacherConfig(model=str(llama_dir), backend="transformers")).path
    two, out = tmp_path / "two", tmp_path / "out"
    said = call("reread", one, two, "--teacher", other, "--backend", "transformers")
    assert f"{kdata.open(one).num_rows:,} rows" in said
    said = call("combine", one, two, out, "--weights", "1,3", "--by-domain", "code=two")
    assert "lower bounds: a mass of at most" in said and f"out: {kdata.open(one).num_rows:,} rows" in said
    combined, payloads = kdata.open(out), [kdata.open(one), kdata.open(two)]
    models = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64) for name in (llama_dir, other)]
    for row, domain in enumerate(combined.index(["domain"])["domain"].to_pylist()):
        sequence, shares = combined[row], [0.0, 1.0] if domain == "code" else [0.25, 0.75]
        ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            dense = [torch.softmax(model(ids).logits[0], -1).numpy() for model in models]
        p_TV = shares[0] * dense[0] + shares[1] * dense[1]
        for t in range(1, len(sequence.token_ids)):
            span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
            kept = [set(np.argsort(-p[t - 1])[:8]) if share else set() for p, share in zip(dense, shares, strict=True)]
            tokens = sequence.entry_ids[span]
            assert set(tokens) == kept[0] | kept[1]
            known = sum(
                share * np.where(np.isin(tokens, list(own)), p[t - 1, tokens], 0.0)
                for share, own, p in zip(shares, kept, dense, strict=True)
            )
            np.testing.assert_allclose(sequence.entry_logprobs[span], np.log(known), atol=0.1)
            assert np.exp(sequence.log_tail[t]) == pytest.approx(1 - known.sum(), abs=2 * TAIL)
            assert_logprobs(sequence.logprob[t], np.log(p_TV[t - 1, sequence.token_ids[t]]), times=2)
        if domain == "code":
            assert np.array_equal(sequence.rank, payloads[1][row].rank)
    assert combined.info.teacher.model == f"{llama_dir.name} + other"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a,b"], r"'a,b' is neither weights \(0.7,0.3\) nor one of the datasets"),
        (["--weights", "three"], "'three' is neither weights"),
        (["--by-domain", "code"], "write it as DOMAIN=0.7,0.3 or DOMAIN=DATASET"),
        (["--set", "weight=[1,1]"], "did you mean 'weights'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path: Path, make: Make, arguments: list[str], message: str) -> None:
    paths = [str(d.path) for d in make(kind="topk")]
    result = CliRunner().invoke(app, ["combine", *paths, str(tmp_path / "out"), *arguments])
    assert result.exit_code == 1 and isinstance(result.exception, ConfigError)
    assert re.search(message, str(result.exception))
    assert not (tmp_path / "out").exists()


def call(*arguments: object) -> str:
    """Run a command that succeeds and return what it prints."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output
