"""Advice from a small made-up results file, and from the one that is shipped."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdata
from kdata.errors import CorruptError
from kdata.format.keep import KeepConfig
from kdata.pipelines.cli.main import app
from kdata.pipelines.evidence import advice
from kdata.pipelines.evidence.advice import advise, read_results, sizes_of
from kdata.selection.plan import make_plan
from kdata.store.dataset import Dataset
from tests.fakes import VOCAB, run_capture


def setting(
    gap: tuple[float, float | None], size: float | None, keep: KeepConfig | None = None, *, tail: str = "auto",
    objective: str = "forward_kl", count: int = 3,
) -> dict[str, Any]:  # fmt: skip
    """An entry of results.json, as the report writes it."""
    kept = None if keep is None else {"kind": keep.kind, **keep.settings()}
    entry: dict[str, Any] = {"content": {"keep": kept, "tail": tail, "objective": objective}}
    if size is not None:
        entry["bytes_per_token"] = {"mean": size, "half_width": 0.0, "count": count}
    return {**entry, "nll_against_online": {"mean": gap[0], "half_width": gap[1], "count": count}}


TOPK, HYBRID = KeepConfig(kind="topk", k=8), KeepConfig(kind="hybrid", k=8, num_draws=28)
SETTINGS = {
    "online": setting((0.0, 0.0), None),
    "text": setting((0.03, 0.001), None, objective="cross_entropy"),
    "many": setting((0.0010, 0.0002), 90, KeepConfig(kind="sampled", num_draws=80)),
    "near": setting((0.0014, 0.0003), 40, HYBRID),
    "alone": setting((0.0015, None), 44, KeepConfig(kind="threshold", threshold=0.5), count=1),
    "far": setting((0.0020, 0.0001), 10, KeepConfig(kind="sampled", num_draws=12)),
    "top": setting((0.0200, 0.0010), 20, TOPK),
    "top, renormalised": setting((0.0001, 0.0001), 20, TOPK, tail="renormalise"),
    "top, jsd": setting((0.0150, 0.0010), 20, TOPK, objective="jsd"),
    "near, jsd": setting((0.0500, 0.0010), 40, HYBRID, objective="jsd"),
}


def write(folder: Path, settings: dict[str, Any], **set_up: Any) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps({"set_up": {"teacher": "small", "vocab_size": VOCAB, **set_up}, "settings": settings}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write(tmp_path, SETTINGS)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Dataset:
    return run_capture(tmp_path_factory.mktemp("advice") / "d", corpus_file, tokenizer_dir, num_draws=28)


@pytest.fixture(scope="module")
def topk(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Dataset:
    return run_capture(tmp_path_factory.mktemp("advice") / "d", corpus_file, tokenizer_dir, kind="topk", k=5)


def test_the_fewest_bytes_that_cannot_be_told_from_the_closest(hybrid: Dataset, results: Path) -> None:
    """`far` is smaller, but its interval is apart; `alone` overlaps and is larger; what is renormalised is not plain use."""
    advised = advise(hybrid, results=results)
    assert (advised["keep"]["name"], advised["closest"]["name"]) == ("near", "many")
    assert advised["keep"]["nll_against_online"] == {"mean": 0.0014, "half_width": 0.0003, "count": 3}
    assert advised["text_alone"]["name"] == "text" and advised["evidence"]["runs"] == 28
    settings = {**SETTINGS, "near": setting((0.0014, 0.0001), 40, HYBRID)}
    apart = advise(hybrid, results=write(results.parent, settings))
    assert apart["keep"]["name"] == "many"  # `alone` has no interval, and lies outside of that of `many`


def test_the_datasets_own_setting_is_found_or_said_to_lack(hybrid: Dataset, topk: Dataset, results: Path) -> None:
    assert advise(hybrid, results=results)["own"]["name"] == "near"
    other = advise(topk, results=results)
    assert other["own"] is None and [m["name"] for m in other["alike"]] == ["top"]
    assert any("the runs of kind topk are top" in what for what in other["no_evidence"])
    without = {name: value for name, value in SETTINGS.items() if not name.startswith("top")}
    none = advise(topk, results=write(results.parent, without))
    assert any("no run was of kind topk" in what for what in none["no_evidence"])


def test_objectives_are_compared_on_equal_data(hybrid: Dataset, topk: Dataset, results: Path) -> None:
    for dataset, kind, best in ((hybrid, "hybrid", "forward_kl"), (topk, "topk", "jsd")):
        first, second = advise(dataset, results=results)["objective"]
        assert first["of_this_kind"] and not second["of_this_kind"]
        assert (first["on"]["kind"], first["best"]["objective"]) == (kind, best) and len(first["others"]) == 1


def test_what_no_run_was_made_for_is_said(hybrid: Dataset, results: Path) -> None:
    small = advise(hybrid, results=write(results.parent, SETTINGS, vocab_size=77))["no_evidence"]
    assert f"a vocabulary of {VOCAB} ids: all runs had 77" in small
    same = advise(hybrid, results=write(results.parent, SETTINGS))["no_evidence"]
    assert not any("vocabulary" in what for what in same) and "other teachers" in same[-1]
    nothing = advise(hybrid, results=write(results.parent, {}))
    assert nothing["keep"] is None and nothing["objective"] == [] and nothing["text_alone"] is None


def test_a_plan_is_counted_as_it_takes_rows(hybrid: Dataset, results: Path) -> None:
    ids = hybrid.index(["id"])["id"].to_pylist()[:3]
    plan = make_plan(hybrid, "three", ids, method="static", parameters={}, repeats=np.array([2, 1, 1], np.int32))
    advised = advise(hybrid, plan, results=results)
    lengths = [len(hybrid[row]) for row in range(3)]
    assert advised["data"]["rows"] == 4 and advised["data"]["tokens"] == 2 * lengths[0] + lengths[1] + lengths[2]
    assert not any("some positions" in what for what in advised["no_evidence"])


def test_the_command(hybrid: Dataset, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advice, "RESULTS", results)
    shown = CliRunner().invoke(app, ["advise", str(hybrid.path)])
    assert shown.exit_code == 0, shown.exception
    for line in (
        f"evidence: 28 runs of 10 settings; teacher small (— parameters, {VOCAB} ids)",
        "what to keep: near, +0.14% ± 0.03% (3 runs), 40.0 bytes a token",
        "--set kind=hybrid --set k=8 --set num_draws=28",
        "this dataset: near, +0.14% ± 0.03% (3 runs)",
        "the text alone: text, +3.00% ± 0.10% (3 runs)",
        "objective: forward_kl is the best of 2 on kind=hybrid",
        "no evidence for:",
    ):
        assert line in shown.output, line
    asked = CliRunner().invoke(app, ["advise", str(hybrid.path), "--format", "json"])
    assert json.loads(asked.output) == advise(hybrid, results=results)
    write(results.parent, {})
    assert "what to keep: not measured" in CliRunner().invoke(app, ["advise", str(hybrid.path)]).output


@pytest.mark.parametrize("text", ["{", "[]", '{"set_up": {}}', '{"set_up": {}, "settings": {"a": {}}}'])
def test_damaged_results_are_one_error(hybrid: Dataset, tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CorruptError, match="is no result of the evidence"):
        advise(hybrid, results=tmp_path / "results.json")


@pytest.mark.parametrize(
    "change",
    [
        ("nll_against_online", "mean", None), ("nll_against_online", "mean", "0.1"), ("nll_against_online", "mean", math.nan),
        ("nll_against_online", "half_width", "x"), ("nll_against_online", "count", "x"), ("bytes_per_token", "mean", "1"),
        ("content", "keep", {"k": 8}), ("content", "tail", None),
    ],
)  # fmt: skip
def test_a_damaged_figure_is_one_error(hybrid: Dataset, results: Path, change: tuple[str, str, Any]) -> None:
    part, key, value = change
    near = {**SETTINGS["near"], part: {**SETTINGS["near"][part], key: value}}
    with pytest.raises(CorruptError, match="is no result of the evidence"):
        advise(hybrid, results=write(results.parent, {**SETTINGS, "near": near}))
    with pytest.raises(CorruptError, match="is no result of the evidence"):
        advise(hybrid, results=write(results.parent, SETTINGS, vocab_size="8192"))
    with pytest.raises(CorruptError, match="is no result of the evidence"):
        advise(hybrid, results=results.parent / "missing.json")


def test_the_shipped_results_serve(hybrid: Dataset) -> None:
    set_up, measured = read_results()
    assert set_up["vocab_size"] > 0 and set_up["teacher"] and len({m.name for m in measured}) == len(measured) > 10
    advised = advise(kdata.open(hybrid.path))
    plain = [m for m in measured if m.is_plain]
    assert advised["closest"]["nll_against_online"]["mean"] == min(m.gap.mean for m in plain)
    assert any(f"all runs had {set_up['vocab_size']:,}" in what for what in advised["no_evidence"])
    assert [size["params"] for size in advised["sizes"]] == sorted({size["params"] for size in sizes_of()})


def sized(
    size: str, source: str, params: float, nll: tuple[float, float | None], against: tuple[float, ...] = ()
) -> dict[str, Any]:
    """An entry of capacity.json, as the report writes it: against the text alone, and against the teacher."""
    gaps = [*({"mean": mean, "half_width": None, "count": 1} for mean in against), None, None][:2]
    return {
        "content": {"size": size, "source": source}, "params": {"mean": params},
        **({} if source == "text alone" else {"teacher_params": {"mean": 9e6 if source == "teacher" else 1e6}}),
        "nll": {"mean": nll[0], "half_width": nll[1], "count": 3},
        "nll_against_text_alone": gaps[0], "nll_against_teacher": gaps[1],
    }  # fmt: skip


def test_sizes_are_compared_with_nothing_else_changed(
    hybrid: Dataset, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size that learned from the teacher with the least NLL, whether its interval is apart, and the smaller teacher's."""
    capacity = results.with_name("capacity.json")

    def shown(wide: float, width: float) -> str:
        settings = {
            "a": sized("wide", "teacher", 2e6, (wide, width), (-0.05, 0.0)), "b": sized("wide", "text alone", 2e6, (5, 0.1)),
            "c": sized("narrow", "teacher", 4e5, (5.5, 0.1), (-0.01,)),
            "d": sized("narrow", "reference", 4e5, (5.6, 0.1), (0.0, 0.02)),
        }  # fmt: skip
        capacity.write_text(json.dumps({"set_up": {}, "settings": settings}))
        return CliRunner().invoke(app, ["advise", str(hybrid.path)]).output

    monkeypatch.setattr(advice, "RESULTS", results)
    monkeypatch.setattr(advice, "CAPACITY", capacity)
    apart = shown(4.75, 0.2)
    assert (
        "student size: of 400,000, 2,000,000 parameters 2,000,000 had the lowest NLL, and its interval is apart"
        in apart
    )
    assert (
        "  400,000: NLL 5.500 (3 runs), -1.00% against the text alone, +2.00% with a teacher of 1,000,000 in" in apart
    )
    assert "  2,000,000: NLL 4.750 (3 runs), -5.00% against the text alone\n" in apart
    assert "2,000,000 had the lowest NLL, and its interval overlaps with the others'" in shown(5.3, 0.2)
    assert "400,000 had the lowest NLL" in shown(5.7, 0.1)
    capacity.write_text(json.dumps({"set_up": {}, "settings": {}}))
    assert "student size: not measured" in CliRunner().invoke(app, ["advise", str(hybrid.path)]).output
    capacity.write_text(
        json.dumps({"set_up": {}, "settings": {"a": {**sized("wide", "teacher", 1, (5, 0)), "nll": 5}}})
    )
    with pytest.raises(CorruptError, match=r"capacity\.json is no result of the evidence"):
        sizes_of(capacity)


def test_no_torch_is_loaded() -> None:
    code = "import sys, kdata.pipelines.evidence.advice; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
