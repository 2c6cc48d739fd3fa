"""Rounds of a recipe: what repeats, what is refused before time is spent, and equal bytes after a stop at any stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, DataError, MismatchError
from kdata.format.files import file_info
from kdata.pipelines import runner
from kdata.pipelines.cli.main import app
from kdata.pipelines.recipe import load_recipe
from kdata.pipelines.rounds import RoundsConfig, SelectStage, best_of, has_ended
from kdata.selection.plan import open_plan
from tests.fakes import write_jsonl

WORDS = ["cat", "dog", "mat", "log", "def", "add", "for", "item", "print", "sat", "café", "items"]


def texts(begin: int, number: int) -> list[dict[str, Any]]:
    """Rows of different texts: no two of `begin` 0, 1 and 2 are equal."""
    rows = []
    for n in range(number):
        words = [WORDS[(begin * 5 + n * 7 + k * (n + 3)) % len(WORDS)] for k in range(12)]
        rows.append({"id": f"{n:03}", "domain": ("code", "prose")[n % 2], "text": f"{begin} {n} " + " ".join(words),
                     "prompt": f"{begin} {n} " + " ".join(words[:3])})  # fmt: skip
    return rows


ROUNDS: dict[str, Any] = {
    "count": 2,
    "patience": None,
    "stages": [
        {"stage": "score", "margins": True},
        {"stage": "select", "method": "confidence", "score": "student_{round}", "share": {"by_round": [0.4, 0.8]}},
    ],
}


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> dict[str, Any]:
    """A recipe with rounds of KD^3."""
    folder = tmp_path_factory.mktemp("rounds")
    corpus, valid, heldout = (
        write_jsonl(folder / f"{name}.jsonl", texts(n, number))
        for n, (name, number) in enumerate({"corpus": 24, "valid": 6, "heldout": 5}.items())
    )
    return {
        "name": "tiny",
        "teacher": {"model": str(llama_dir), "backend": "transformers"},
        "keep": {"kind": "topk", "k": 8},
        "generate": None,
        "corpus": {"path": str(corpus)},
        "heldout": {"path": str(heldout)},
        "capture": {"unit_tokens": 256},
        "select": {"method": "random", "share": 0.5},
        "student": {"scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}},
        "train": {"steps": 4, "batch_tokens": 512, "warmup_steps": 0, "device": "cpu", "learning_rate": 0.01},
        "students": {"kd": {"label": "distilled", "objective": {"weights": {"forward_kl": 1.0}}}},
        "evaluate": {"samples": 0},
        "rounds": {**ROUNDS, "validation": {"path": str(valid)}},
    }


def write(values: dict[str, Any], folder: Path, **rounds: Any) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**values, "rounds": {**values["rounds"], **rounds}}))
    return file


def call(*arguments: object) -> tuple[str, BaseException | None]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])
    return result.output, result.exception


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    output, error = call("run", write(values, folder), "--out", folder / "run")
    assert error is None, output
    return folder / "run"


# What depends on the clock, or names the folder of the run.
OF_THE_CLOCK = ("progress.jsonl", "metrics.jsonl", "run.json", "results.json", "report.html", "train.json", "README.md")


def contents(run: Path) -> dict[str, Any]:
    """Digests of the files that must not depend on where a run was stopped; of checkpoints only what is kept."""
    names = [
        p for p in sorted(run.rglob("*")) if p.is_file() and p.name not in OF_THE_CLOCK and "checkpoints" not in p.parts
    ]
    return {p.relative_to(run).as_posix(): file_info(p) for p in names}


def test_each_round_uses_what_the_last_one_made(finished: Path) -> None:
    data = kdata.open(finished / "dataset")
    state = json.loads((finished / "run.json").read_text())
    assert state["stages"][6:14] == [
        "select", "train", "round 0: measure", "round 1: score", "round 1: select", "round 1: train", "round 1: measure",
        "round 2: score",
    ]  # fmt: skip
    assert set(state["stages"]) == set(state["seconds"])
    shares = [open_plan(data, f"round_{n}").info.num_rows / data.num_rows for n in (1, 2)]
    assert shares == pytest.approx([0.4, 0.8], abs=0.05)
    table = data.sql("select avg(a.nll) a, avg(b.nll) b, min(b.margin) m, max(b.margin) n from scores.student_1 a "
                     "join scores.student_2 b using (id)").to_pylist()[0]  # fmt: skip
    assert table["a"] != table["b"] and 0 <= table["m"] <= table["n"] <= 1
    trained = json.loads((finished / "rounds/2/student/train.json").read_text())
    assert trained["config"]["student"]["model"].endswith("rounds/1/student/model") and trained["plan"] == "round_2"
    results = json.loads((finished / "results.json").read_text())
    values = [line["value"] for line in results["rounds"]["rounds"]]
    assert len(values) == 3 and results["rounds"]["best"] == values.index(min(values))
    assert results["students"]["kd-rounds"]["label"] == f"distilled, round {results['rounds']['best']}"
    page = (finished / "report.html").read_text()
    assert "Rounds" in page and f"{min(values):.4f}" in page


def test_status_lists_rounds(finished: Path) -> None:
    output, error = call("status", finished)
    assert error is None and "round 2: measure" in output, output


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_stopped_at_any_stage_goes_on_to_the_same_bytes(
    values: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the work of each stage of a round and before it is recorded as done, the worst moment, the process ends."""
    recipe = load_recipe(write(values, tmp_path), [])
    out, real, stops = tmp_path / "run", runner._write_state, 0
    written: set[str] = set()

    def write_state(run: Any) -> None:
        """Writes one new stage of a round; at the second the process ends."""
        new = {name for name in run.seconds if name.startswith("round")} - written
        if new and attempt["wrote"]:
            raise _Stop
        attempt["wrote"] = bool(new)
        written.update(new)
        real(run)

    monkeypatch.setattr(runner, "_write_state", write_state)
    for _ in range(20):
        attempt = {"wrote": False}
        try:
            runner.execute(recipe, out)
            break
        except _Stop:
            stops += 1
    assert stops == len(written) - 1 == 8
    assert contents(out) == contents(finished)


def test_a_setting_of_a_round_that_failed_is_mended_in_its_folder(
    values: dict[str, Any], finished: Path, tmp_path: Path
) -> None:
    """Round 1 has scored when its choice fails. What has been done stays, and the end is as if nothing had been wrong."""
    scored, chosen = ROUNDS["stages"]
    wrong = {"stage": "select", "method": "sql", "sql": "select id from rows where nll > 1e9"}
    out = tmp_path / "run"
    _, error = call("run", write(values, tmp_path, stages=[scored, wrong]), "--out", out)
    assert isinstance(error, DataError), error
    before = json.loads((out / "run.json").read_text())
    assert list(before["seconds"])[-1] == "round 1: score"
    for finished_ones in ({"stages": [{**scored, "margins": False}, chosen]}, {"begin": "best"}, {"measure": "kl"}):
        _, error = call("run", write(values, tmp_path, **finished_ones), "--out", out)
        assert isinstance(error, MismatchError) and "may change" in str(error), error
    output, error = call("run", write(values, tmp_path), "--out", out)
    assert error is None and "settings of stages to come have changed" in output, output
    assert "round 1: score: already done" in output and contents(out) == contents(finished)
    assert json.loads((out / "run.json").read_text())["settings"] != before["settings"]
    _, error = call("run", write(values, tmp_path, count=3), "--out", out)
    assert isinstance(error, MismatchError), "measured already"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 4), st.floats(0, 1))
def test_the_best_round_and_the_end_by_patience(values: list[float], patience: int, gain: float) -> None:
    best = best_of(values, gain)
    assert all(value >= values[best] - gain for value in values[best:])
    assert gain > 0 or (values[best] == min(values) and best == values.index(min(values)))
    ends = [has_ended(values[: n + 1], patience, gain) for n in range(len(values))]
    assert ends == [n - best_of(values[: n + 1], gain) >= patience for n in range(len(values))]
    assert not has_ended(values, None, gain)


def test_rounds_end_without_improvement_and_the_best_is_kept(values: dict[str, Any], tmp_path: Path) -> None:
    """No improvement is as large as 100 nats, so round 0 stays the best and patience 1 ends rounds after the first."""
    output, error = call(
        "run", write(values, tmp_path, count=5, patience=1, least_gain=100.0), "--out", tmp_path / "run"
    )
    assert error is None, output
    assert "no improvement in 1 round" in output
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert not any(name.startswith("round 2") for name in state["stages"]) and set(state["stages"]) == set(
        state["seconds"]
    )
    results = json.loads((tmp_path / "run/results.json").read_text())["rounds"]
    assert results["best"] == 0 and results["ended_early"] and len(results["rounds"]) == 2
    output, error = call(
        "run", write(values, tmp_path, count=5, patience=1, least_gain=100.0), "--out", tmp_path / "run"
    )
    assert error is None and "round 2" not in output
    assert "done" in call("status", tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        ({"stages": [{"stage": "scor"}]}, "stage: 'scor' is none of score, judge, request, select"),
        ({"stages": [{"stage": "score", "modle": "x"}]}, "unknown key 'modle'"),
        ({"stages": [{"stage": "score", "name": "student"}]}, r"'student' is written already.*\{round\}"),
        ({"stages": [{"stage": "score", "model": "{lst}"}]}, r"\{lst\} is no reference"),
        ({"stages": [{"stage": "select", "method": "confidence"}]}, "no score 'student' is written by then"),
        ({"stages": [{"stage": "select", "method": "random", "share": {"by_round": []}}]}, "by_round stands alone"),
        ({"stages": [{"stage": "select", "method": "random", "share": {"by_round": [0.5, 2]}}]}, r"round 2\), .*: share"),
        ({"stages": [{"stage": "select", "method": "random", "parent": "round_7"}]}, "no plan 'round_7'"),
        ({"stages": [{"stage": "select", "method": "random", "name": "same"}]}, "the plan 'same' is written already"),
        ({"stages": [{"stage": "select", "method": "random", "where": ["x.y > 1"]}]}, "no score 'x'"),
        ({"stages": [{"stage": "judge"}]}, "`generate`, which is null"),
        ({"stages": [{"stage": "judge", "pattern": "x"}]}, "the mark in parentheses"),
        ({"stages": [{"stage": "judge", "prompt": "{{ x "}]}, "cannot be filled"),
        ({"stages": [{"stage": "score"}, {"stage": "request"},
                     {"stage": "select", "method": "confidence", "score": "student_{round}"}]}, "score again behind"),
        ({"student": "kdd"}, "'kdd' .*is none of"),
        ({"count": 0}, "rounds.count"),
        ({"patience": 0}, "rounds.patience"),
    ],
)  # fmt: skip
def test_rounds_that_could_not_end_well_are_refused_first(
    values: dict[str, Any], tmp_path: Path, rounds: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(values, tmp_path, **rounds), [])


def test_references_are_replaced_outside_of_templates_only() -> None:
    rounds = RoundsConfig.model_validate({
        "count": 2, "validation": {"path": "x"}, "stages": [
            {"stage": "select", "method": "sql", "sql": "select id from scores.s_{round} order by nll limit 2"},
            {"stage": "judge", "prompt": "{{ question }} {{ answer }} in round {round}"},
        ],
    })  # fmt: skip
    chosen, judged = rounds.stages_of(2, {"last": "/m", "best": "/b"})
    assert isinstance(chosen, SelectStage) and chosen.step.model_dump()["sql"].startswith("select id from scores.s_2 ")
    assert (
        not isinstance(judged, SelectStage)
        and judged.model_dump()["prompt"] == "{{ question }} {{ answer }} in round 2"
    )
    assert judged.model_dump()["student"] == "/m" and judged.model_dump()["name"] == "marks_2"


def test_margins_of_the_student_choose_rows_and_those_of_the_teacher_weigh_tokens(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """WAD, as the README writes it."""
    page = (Path(__file__).parents[2] / "pipelines/README.md").read_text("utf-8")
    block = next(part for part in page.split("```yaml\n") if "max(logprob, 2)" in part.partition("```")[0])
    stages = yaml.safe_load(block.partition("```")[0])["rounds"]["stages"]
    output, error = call("run", write(values, tmp_path, count=1, stages=stages), "--out", tmp_path / "run")
    assert error is None, output
    data = kdata.open(tmp_path / "run/dataset")
    margins = dict(
        data.sql("select id, margin from scores.student_1").select(["id", "margin"]).to_pandas().values.tolist()
    )
    plan = open_plan(data, "round_1")
    domain = {row["id"]: row["domain"] for row in data.sql("select id, domain from rows").to_pylist()}
    for name in ("code", "prose"):
        own = sorted((i for i in margins if domain[i] == name), key=lambda i: (-margins[i], i))
        chosen = [i for i in plan.ids if domain[i] == name]
        assert chosen and set(chosen) == set(own[: len(chosen)])
    rows, positions = plan.choice(data)
    assert positions is not None and plan.info.positions is not None and plan.info.positions.weighted
    assert positions.weights is not None and (positions.weights > 0).all() and (positions.weights <= 1).all()
    assert len(rows) == len(plan.ids)


def test_validation_text_that_is_held_out_too_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    file = write(values, tmp_path, validation=values["heldout"])
    _, error = call("run", file, "--out", tmp_path / "run")
    assert isinstance(error, DataError) and "5 validation texts are held-out texts, too" in str(error)
    shutil.rmtree(tmp_path / "run")
