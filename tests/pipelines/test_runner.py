"""A whole run with a tiny model: what becomes of rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import kdata
from kdata.errors import DataError, MismatchError
from kdata.pipelines.cli.main import app
from tests.fakes import rows_of_text, write_jsonl


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """A recipe of which each corpus has a row that cannot be used, and the corpus two."""
    folder = tmp_path_factory.mktemp("recipe")
    empty = {"id": "empty", "domain": "prose", "text": " ", "prompt": ""}
    twice = {"id": "0", "domain": "prose", "text": "again", "prompt": "again"}
    rows = [{**row, "id": str(n), "prompt": "the cat"} for n, row in enumerate(rows_of_text(8))]
    corpus, heldout = (write_jsonl(folder / f"{name}.jsonl", bad) for name, bad in
                       (("corpus", [*rows, empty, twice]), ("heldout", [*rows, empty])))  # fmt: skip
    prompts = write_jsonl(folder / "prompts.jsonl", [*rows[:2], twice])
    values = {
        "name": "tiny",
        "teacher": {"model": str(llama_dir), "backend": "transformers"},
        "keep": {"kind": "topk", "k": 8},
        "generate": {"prompts": {"path": str(prompts)}, "sampling": {"max_tokens": 4}},
        "corpus": {"path": str(corpus)},
        "heldout": {"path": str(heldout)},
        "select": {"method": "random", "share": 0.5},
        "student": {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
        "train": {"steps": 2, "batch_tokens": 512, "warmup_steps": 0, "device": "cpu"},
        "students": {"ce": {"label": "text alone", "objective": {"weights": {"cross_entropy": 1.0}}}},
        "evaluate": {"samples": 0},
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def call(*arguments: object) -> tuple[str, BaseException | None]:
    """What `kdata run` prints last, and the error that it ended with."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["run", *map(str, arguments)])
    return (result.stdout.splitlines() or [""])[-1], result.exception


def test_a_run_puts_rows_aside_and_its_last_line_counts_them(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    places = f"{out}/dataset/rejects, {out}/heldout/rejects"
    last = (f"4 rejected: 2 no text, 2 id twice (written to {places})", None)
    line, error = call(recipe, "--out", out)
    assert (line, error) == last, str(error)
    assert kdata.open(out / "dataset").rejected(["generate"]) == {"id_twice": 1}
    assert call(recipe, "--out", out) == last, "those of the first run"
    assert "strict" not in json.loads((out / "run.json").read_text())["settings"]
    _, error = call(recipe, "--out", out, "--strict")
    assert isinstance(error, DataError) and "row '0' cannot be used (id twice)" in str(error), str(error)


@pytest.mark.parametrize("how", [["--strict"], ["--set", "strict=true"], ["--strict", "--set", "generate=null"]])
def test_a_strict_run_ends_at_the_first_such_row(recipe: Path, tmp_path: Path, how: list[str]) -> None:
    _, error = call(recipe, "--out", tmp_path / "run", *how)
    row, reason = ("empty", "no text") if "generate=null" in how else ("0", "id twice")
    assert isinstance(error, DataError) and f"row '{row}' cannot be used ({reason})" in str(error)
    assert not (tmp_path / "run/students").exists()


def test_a_setting_wins_over_the_option(recipe: Path) -> None:
    shown = CliRunner().invoke(app, ["run", str(recipe), "--strict", "--set", "strict=false", "--dry-run"])
    assert yaml.safe_load(shown.stdout)["strict"] is False
    shown = CliRunner().invoke(app, ["run", str(recipe), "--strict", "--dry-run"])
    assert yaml.safe_load(shown.stdout)["strict"] is True


def test_a_run_leaves_out_what_its_conditions_do_not_pass(recipe: Path, tmp_path: Path) -> None:
    """The corpus repeats a few lines, so most of its rows are duplicates."""
    settings = ["generate=null", "hygiene.checks=[duplicates]", "hygiene.workers=1", "select.share=1",
                "select.where=[duplicates.exact_keep]", "students.ce.plan=true"]  # fmt: skip
    out = tmp_path / "run"
    _, error = call(recipe, "--out", out, *(part for setting in settings for part in ("--set", setting)))
    assert error is None, str(error)
    data = kdata.open(out / "dataset")
    kept = data.sql("select id from scores.duplicates where exact_keep order by id")["id"].to_pylist()
    plan = kdata.Plan.load(out / "dataset/plans/random")
    assert sorted(plan.ids) == kept and 0 < len(kept) <= data.num_rows
    assert plan.info.where is not None and plan.info.where.conditions[0].left_out == data.num_rows - len(kept)


def test_settings_of_stages_to_come_may_change(recipe: Path, tmp_path: Path) -> None:
    """The choice cannot be met, so the run ends there; with another one it goes on, and the teacher does nothing again."""

    def run(*settings: str) -> tuple[str, BaseException | None]:
        parts = (part for one in ("students.ce.plan=true", *settings) for part in ("--set", one))
        done = CliRunner(env={"COLUMNS": "200"}).invoke(
            app, ["run", str(recipe), "--out", str(tmp_path / "run"), *parts]
        )
        return done.output, done.exception

    _, error = run("select.where=[num_tokens > 100000]")
    assert isinstance(error, DataError), error
    digest = kdata.open(tmp_path / "run/dataset").content_digest
    for early in ("keep.k=4", "seed=1", "capture.unit_tokens=100", "heldout.limit=3"):
        _, error = run(early)
        assert isinstance(error, MismatchError) and early.split("=")[0] in str(error), error
    output, error = run("select.share=0.25", "train.steps=3", "evaluate.samples=1")
    assert error is None and "capture: already done" in output and "select.share: 0.5 -> 0.25" in output, output
    assert kdata.open(tmp_path / "run/dataset").content_digest == digest
    assert json.loads((tmp_path / "run/students/ce/train.json").read_text())["config"]["steps"] == 3
    assert json.loads((tmp_path / "run/results.json").read_text())["settings"]["select"]["share"] == 0.25
    _, error = run("select.share=0.25", "train.steps=4", "evaluate.samples=1")
    assert isinstance(error, MismatchError) and "train.steps: 3 -> 4" in str(error), error
