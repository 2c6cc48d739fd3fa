"""The report: a verdict that follows from the numbers, one page that loads nothing, data shown as text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.audit import Audit
from kdata.errors import CorruptError, FormatError, MissingError
from kdata.format.records import Reject
from kdata.observe.journal import read_journal
from kdata.observe.progress import RunStage, Task
from kdata.pipelines.report.report import best, grid, read_results, stages, verdict, write_report
from kdata.selection.plan import make_plan
from kdata.selection.position_rules import RULES, Surprise, rule_words
from kdata.selection.ranked import All
from kdata.selection.score_file import bring
from kdata.selection.select import select
from tests.fakes import rows_of_text, run_capture, write_jsonl
from tests.kdata.share.test_card import HOSTILE, make_dataset

DOMAINS = {"code": 2.1, "docstrings": 3.2, "prose": 4.3}


def student(label: str, nll: float | None, kl: float | None = 1.0, **more: Any) -> dict[str, Any]:
    """A student of results.json with the same numbers overall and in each domain, shifted by the domain."""
    overall = {"nll": nll, "kl": kl, "top1": 0.4, "teacher_nll": 3.2, "tokens": 900}
    overall = {key: value for key, value in overall.items() if value is not None}
    if nll is not None:
        overall["ppl"] = float(np.exp(nll))
    domains = {
        d: {
            **overall,
            **({"nll": nll + base - 3.2} if nll is not None else {}),
            "teacher_nll": base,
            "tokens": 300,
        }
        for d, base in DOMAINS.items()
    }
    fixed = {
        "params": 1_900_000,
        "steps": 300,
        "tokens": 1_200_000,
        "target_tokens": 1_190_000,
        "train_seconds": 61.5,
    }
    return {"label": label, **fixed, "domains": domains, "overall": overall, **more}


def samples(words: str) -> list[dict[str, str]]:
    """One sample per domain."""
    return [{"domain": d, "prompt": f"def {d}(", "text": f"{words} in {d}"} for d in DOMAINS]


def results_of(students: dict[str, Any]) -> dict[str, Any]:
    """A whole results.json."""
    seconds = {
        "prepare": 0.4,
        "generate": 31.5,
        "capture": 51.2,
        "heldout": 12.0,
        "score": 20.1,
        "select": 0.3,
    }
    seconds |= {"train ce": 60.0, "train plan": 66.0, "train": 126.0, "evaluate": 30.0}
    tokens = {"generate": 43_210, "capture": 912_000, "heldout": 52_560, "score": 955_210, "train": 3_686_400}
    return {
        "format": 1,
        "name": "quickstart",
        "students": students,
        "teacher": {"model": "tiny-teacher"},
        "stages": [
            {
                "name": name,
                "seconds": value,
                "tokens": tokens.get(name, 0),
                "tokens_per_sec": tokens[name] / value if name in tokens else None,
                "device_hours": {"2 CPU cores": value * 2 / 3600},
                "energy_joules": None,
            }
            for name, value in seconds.items()
        ],
        "settings": {"name": "quickstart", "seed": 0, "train": {"steps": 300}},
        "machine": {"cores": 2, "packages": {"torch": "2.13.0"}},
    }


def write_metrics(run: Path, name: str, slope: float) -> None:
    """A falling loss with noise."""
    rng = np.random.default_rng(len(name))
    folder = run / "students" / name
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 310, 10):
        loss = 4 + 5 * np.exp(-slope * step / 100) + rng.normal(0, 0.08)
        lines.append({"step": step, "loss": loss, "cross_entropy": loss, "tokens": step * 4000, "lr": 1e-3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31')


def write_scores(dataset: kdata.Dataset) -> None:
    """A sidecar `ref`: a little worse than the teacher."""
    table = dataset.sql("select id, nll + 0.4 + 0.4 * (hash(id) % 1000) / 1000 as nll from rows order by id")
    file = dataset.path.parent / "ref.parquet"
    pq.write_table(table, file)
    bring(dataset, file, "ref", unit="nll")
    file.unlink()


def write_plan(dataset: kdata.Dataset, threshold: float = 0.6) -> None:
    """The plan of difference sampling at this cut."""
    sql = "select id from rows join scores.ref as s using (id) where s.nll - rows.nll >= $cut order by id"
    ids = dataset.sql(sql, {"cut": threshold})["id"].to_pylist()
    parameters = {"share": 0.5, "score": "ref", "threshold": threshold}
    plan = make_plan(dataset, "difference", ids, method="difference", parameters=parameters, sql=sql)
    plan.save(dataset.path / "plans")


def make_run(run: Path, domains: dict[str, float] | None = None, *, per_domain: int = 12) -> Path:
    """A whole run folder of invented numbers."""
    refused = (Reject("r0", "code", "empty", "the text is empty"),)
    dataset = make_dataset(run / "dataset", domains or DOMAINS, per_domain=per_domain, rejects=refused)
    make_dataset(run / "heldout", domains or DOMAINS, per_domain=4, generate=False)
    write_scores(dataset)
    write_plan(dataset)
    students = {
        "ce": student("Cross-entropy only", 4.894, 1.382, samples=samples("the the the")),
        "everything": student("Distilled on everything", 4.693, 1.158, samples=samples("return self")),
        "plan": student("Distilled on the plan", 4.590, 1.061, samples=samples("raise ValueError")),
    }
    for name, slope in (("ce", 1.0), ("everything", 1.3), ("plan", 1.6)):
        students[name]["metrics"] = f"students/{name}/metrics.jsonl"
        write_metrics(run, name, slope)
    (run / "results.json").write_text(json.dumps(results_of(students)))
    return run


class Page(HTMLParser):
    """What a page would load, its elements, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses that a browser would fetch."""
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not (value or "").startswith("#"):
                self.loads.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on"):
                self.loads.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += data


def test_verdict_better_with_exact_numbers() -> None:
    outcome = verdict(
        {
            "ce": student("CE", 5.0, 1.25),
            "plan": student("Plan", 4.5, 1.0),
            "everything": student("All", 4.8, 1.2),
        }
    )
    assert outcome.kind == "better"
    assert outcome.headline == (
        "Distillation helped: both distilled students predict unseen text better than the student trained on text "
        "alone, and end closer to the teacher."
    )
    assert outcome.details == [
        "“Plan” against “CE”: loss 10.0% lower (28% of the way to the teacher), distance to the teacher 20.0% lower, "
        "lower loss in 3 of 3 domains.",
        "“All” against “CE”: loss 4.0% lower (11% of the way to the teacher), distance to the teacher 4.0% lower, "
        "lower loss in 3 of 3 domains.",
        "Selecting part of the data helped: the loss of “Plan” is 0.300 below that of “All”.",
    ]


def test_verdict_worse_is_said_plainly() -> None:
    outcome = verdict({"ce": student("CE", 4.0, 1.0), "plan": student("Plan", 4.4, 1.5)})
    assert outcome.kind == "worse"
    assert outcome.headline == (
        "Distillation did not help: the distilled student is worse than the student trained on text alone."
    )
    assert outcome.details == [
        "“Plan” against “CE”: loss 10.0% higher, distance to the teacher 50.0% higher, lower loss in 0 of 3 domains."
    ]


def test_verdict_says_when_selection_did_not_help() -> None:
    students = {"ce": student("CE", 5.0), "plan": student("Plan", 4.8), "everything": student("All", 4.75)}
    sentence = "Selecting part of the data did not help: the loss of “Plan” is 0.050 above that of “All”."
    assert verdict(students).details[-1] == sentence
    students["plan"] = student("Plan", 4.75)
    assert "made no difference" in verdict(students).details[-1]


@pytest.mark.parametrize(
    ("others", "kind", "words"),
    [
        ({"plan": (4.5, 0.9), "everything": (5.5, 1.1)}, "mixed", "only “plan” beats"),
        ({"plan": (4.5, 1.1)}, "mixed", "predicts unseen text better than the student trained on text alone, but ends"),
        ({"plan": (5.5, 0.9), "everything": (5.1, 0.8)}, "mixed", "end closer to the teacher than"),
        ({"plan": (5.5, 0.9), "everything": (5.1, 1.1)}, "mixed", "no distilled student beats"),
        ({"plan": (5.0004, 1.0)}, "equal", "No difference"),
        ({"plan": (5.0, 0.9)}, "better", "Distillation helped: the distilled student predicts"),
        ({"plan": (4.5, None)}, "better", "(closeness to the teacher was not measured for all)"),
        ({"plan": (None, 0.5)}, "missing", "no distilled student has been evaluated"),
        ({}, "missing", "no distilled student has been evaluated"),
    ],
)
def test_verdict_of_every_kind(others: dict, kind: str, words: str) -> None:
    students = {"ce": student("ce", 5.0, 1.0)} | {n: student(n, *values) for n, values in others.items()}
    outcome = verdict(students)
    assert (outcome.kind, words in outcome.headline) == (kind, True), outcome


def test_verdict_without_a_baseline() -> None:
    assert verdict({}).kind == "missing"
    outcome = verdict({"plan": student("Plan", 4.0)})
    assert (outcome.kind, "no student trained on text alone" in outcome.headline) == ("missing", True)


def test_verdict_names_an_uneven_comparison() -> None:
    outcome = verdict({"ce": student("CE", 5.0), "plan": student("Plan", 4.0, steps=600)})
    assert (
        outcome.details[-1] == "The students have different numbers of steps (300 and 600): the comparison is not even."
    )


def test_best_marks_ties_and_nothing_alone() -> None:
    students = {"a": student("a", 4.0001), "b": student("b", 4.0), "c": student("c", 4.1)}
    assert best(students, "nll") == {"a", "b"}
    assert best(students, "nll", largest=True) == {"c"}
    assert best(students, "kl") == set(), "nobody is ahead"
    assert best({"a": students["a"]}, "nll") == set()
    rows = grid(students)
    assert [row["domain"] for row in rows] == ["code", "docstrings", "prose", None]
    assert rows[-1]["teacher"] == 3.2
    assert [bold for _, _, bold, _ in rows[-1]["cells"][0]] == [True, True, False]


def test_a_plan_with_positions_says_what_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    dataset = kdata.open(run / "dataset")
    ids = dataset.index(["id"])["id"].to_pylist()[:3]
    plan = make_plan(dataset, "few", ids, method="mine", parameters={"a": 1}, positions=[[1], [1, 2], [3]])
    plan.save(dataset.path / "plans")
    page = Page(write_report(run))
    assert plan.info.positions is not None
    assert f"Of its target positions 4 of {plan.info.positions.targets} count, by the rule mine" in page.text


def test_a_rule_of_kdata_is_said_in_words(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    dataset = kdata.open(run / "dataset")
    plan = kdata.select(dataset, All(name="unlikely", positions=Surprise(share=0.25)))
    plan.save(dataset.path / "plans")
    page = Page(write_report(run))
    chosen = plan.info.positions
    assert chosen is not None
    assert f"{chosen.positions:,} of {chosen.targets:,} count, by the rule surprise; " in page.text
    assert "The rule chooses the tokens that the teacher found least likely" in page.text
    assert all(rule_words(rule) for rule in RULES) and rule_words("mine") is None


def test_a_dataset_that_keeps_some_positions_says_what_is_kept_where(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows_of_text(12))
    rule = {"rule": "entropy", "threshold": 3.3, "domains": ["code", "law"]}
    dataset = run_capture(tmp_path / "run" / "dataset", corpus, tokenizer_dir, positions=rule)
    run_capture(tmp_path / "run" / "heldout", corpus, tokenizer_dir)
    path = write_report(tmp_path / "run")
    page = Page(path)
    counts = {
        domain: [int(sum(n(row) for row in dataset if row.domain == domain)) for n in (num_targets, num_kept)]
        for domain in ("code", "prose")
    }
    kept, targets = (sum(count[place] for count in counts.values()) for place in (1, 0))
    assert 0 < counts["prose"][1] < counts["prose"][0] and counts["code"][1] == counts["code"][0]
    assert (
        f"Distributions are kept at {kept:,} of {targets:,} target positions: every target of code, law; elsewhere "
        "targets with an entropy of at least 3.3 nats." in page.text
    )
    assert "WARNING: no row has the domain 'law'" in page.text
    assert f"{kept / targets:.1%}" in page.text and page.text.count("At the other targets only") == 1  # not of heldout
    rows = re.findall(r'<tr><th scope="row">(code|prose)</th>(.*?)</tr>', path.read_text())
    first = {name: re.findall("<td>(.*?)</td>", line) for name, line in reversed(rows)}
    for domain, (all_targets, with_one) in counts.items():
        assert first[domain][2:5] == [f"{all_targets:,}", f"{with_one:,}", f"{with_one / all_targets:.1%}"]


def num_targets(row: kdata.Row) -> int:
    return int(row.target_mask.sum())


def num_kept(row: kdata.Row) -> int:
    return int((row.target_mask & (row.num_kept > 0)).sum())


def test_whole_run(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    page = Page(path)
    assert path == tmp_path / "run" / "report.html"
    assert page.tags.count("svg") == 6
    assert "Distillation helped: both distilled students predict" in page.text
    assert (
        "Three small language models of 1.9 million parameters each, the students, learned from a dataset" in page.text
    )
    for needed in ("4.590", "1.061", "raise ValueError in prose", "the text is empty", "b" * 64):
        assert needed in page.text
    assert "not run" not in page.text
    assert kdata.open(tmp_path / "run" / "dataset").content_digest in page.text
    assert "<b>4.590</b>" in path.read_text()
    assert "kdata run quickstart --out runs/quickstart-again" in page.text
    assert "difference sampling kept everything from 0.600 on" in page.text


def test_what_the_conditions_of_a_plan_leave_out_is_shown(tmp_path: Path) -> None:
    """A plan without a score has no plot of differences; its conditions are a table with counts and a text each."""
    run = make_run(tmp_path / "run")
    for name in ("plans", "scores"):
        shutil.rmtree(run / "dataset" / name)
    dataset = kdata.open(run / "dataset")
    select(dataset, All(name="clean", where=["domain = 'code'", "nll >= 0"]))
    page = Page(write_report(run))
    out = dataset.sql("select id, text from rows where domain <> 'code'").to_pylist()
    for words in (
        "What the conditions of the plan “clean” leave out",
        f"{dataset.num_rows - len(out)} of {dataset.num_rows} sequences meet all of them",
    ):
        assert words in page.text
    assert "Where the teacher knows more than a small model" not in page.text and "Difference sampling" not in page.text
    table = dict(re.findall(r"<code>(.*?)</code></th><td>(.*?)</td>", (run / "report.html").read_text()))
    assert table == {"domain = &#39;code&#39;": str(len(out)), "nll &gt;= 0": "0"}
    assert any(row["text"][:20] in page.text for row in out)


def test_time_and_energy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = Page(write_report(run)).text
    assert "Time and energy" in text and "The teacher read 964,560 tokens and wrote 43,210 tokens." in text
    rows = rows_of(write_report(run), "Time and energy")
    assert rows["capture"][1:] == ["912,000", "17,812", "51.2 s", "0.0284 (2 CPU cores)", "—"]
    assert rows["prepare"][1:] == ["", "", "0.4 s", "0.0002 (2 CPU cores)", "—"]
    seconds = 0.4 + 31.5 + 51.2 + 12.0 + 20.1 + 0.3 + 126.0 + 30.0  # parts of stages do not count twice
    assert rows["all"][3:] == ["4 min 32 s", f"{seconds * 2 / 3600:.4f} (2 CPU cores)", "not reported by this device"]
    assert "└ train ce" in rows


def test_energy_where_the_device_reports_it(tmp_path: Path) -> None:
    results = results_of({})
    for stage in results["stages"]:
        stage |= {"energy_joules": stage["seconds"] * 700, "device_hours": {"NVIDIA H200": stage["seconds"] / 3600}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = rows_of(write_report(tmp_path), "Time and energy")
    assert rows["capture"][-2:] == ["0.0142 (NVIDIA H200)", "9.96 Wh"]
    assert rows["all"][-1] == f"{271.5 * 700 / 3600:.3g} Wh"
    del results["stages"][0]["energy_joules"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert rows_of(write_report(tmp_path), "Time and energy")["all"][-1] == "not reported by this device"


def test_a_run_of_an_older_version_knows_times_only(tmp_path: Path) -> None:
    results = {**results_of({}), "stages": [{"name": "capture", "seconds": 51.2}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    rows = rows_of(write_report(tmp_path), "Time and energy")
    assert rows["capture"][1:] == ["", "", "51.2 s", "—", "—"] and rows["train"][1:] == ["", "", "—", "", ""]


def test_a_run_adds_its_attempts_up(tmp_path: Path) -> None:
    """The runner's last stage, after a capture that failed at first: both attempts are in results, page and card."""
    from kdata.pipelines.recipe import load_recipe
    from kdata.pipelines.run import Run
    from kdata.pipelines.runner import run_report

    run = Run(load_recipe(Path("quickstart"), []), make_run(tmp_path / "run"), {})
    (run.out / "run.json").write_text("{}")
    with (
        pytest.raises(KeyError),
        RunStage("capture", run.log),
        Task("capture: reading", 9, "documents", source="capture") as task,
    ):
        task.advance(4, tokens=400)
        raise KeyError
    with RunStage("capture", run.log), Task("capture: reading", 9, "documents", source="capture") as task:
        task.skip(4)
        task.advance(5, tokens=300)
    with RunStage("train", run.log), RunStage("train ce"), Task("train CE", 50, "tokens") as task:
        task.advance(50)
    spans = {line.since: line for line in read_journal(run.log) if line.stage == "capture"}.values()
    with RunStage("report", run.log):
        run_report(run)
    recorded = {stage["name"]: stage for stage in json.loads((run.out / "results.json").read_text())["stages"]}
    assert list(recorded) == ["capture", "train", "train ce"]
    assert len(spans) == 2 and recorded["capture"]["seconds"] == pytest.approx(sum(line.seconds for line in spans))
    dataset = kdata.open(run.dataset_path)
    stored = sum(entry.tokens for entry in dataset.manifest if entry.source == "capture")
    assert (
        recorded["capture"]["tokens"] == stored and recorded["train"]["tokens"] == recorded["train ce"]["tokens"] == 50
    )
    assert rows_of(run.out / "report.html", "Time and energy")["capture"][1] == f"{stored:,}"
    card = (run.dataset_path / "README.md").read_text().split("## What it took")[1].split("##")[0]
    assert f"| capture | {stored} |" in card and "| generate |" not in card


def rows_of(path: Path, title: str) -> dict[str, list[str]]:
    """Cells of the table under a heading, by the row's first."""
    body = path.read_text("utf-8").split(f">{title}</h3>")[1].split("<tbody>")[1].split("</tbody>")[0]
    cells_of = {}
    for row in body.split("<tr")[1:]:
        first, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        cells_of[first] = cells
    return cells_of


def test_page_loads_nothing_and_is_unique(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "run"))
    page, text = Page(path), path.read_text()
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "image", "object", "embed", "form"} & set(page.tags)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids))
    targets = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(page.ids)
    assert "http" not in re.sub(r"<svg|xmlns[^ ]*", "", text)


def test_same_run_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {HOSTILE: 2.0, "$\\frac{$": 3.0, 'id="#22262b': 4.0})
    results = json.loads((run / "results.json").read_text())
    for one in results["students"].values():
        one["label"] += HOSTILE
        one["domains"] = {HOSTILE: one["overall"]}
        one["samples"] = [{"domain": HOSTILE, "prompt": HOSTILE, "text": HOSTILE}]
    results |= {"name": HOSTILE, "machine": {HOSTILE: HOSTILE}, "settings": {HOSTILE: HOSTILE}}
    results["stages"].append({"name": HOSTILE, "seconds": HOSTILE})
    results["students"][HOSTILE] = {
        "label": HOSTILE,
        "metrics": "../../outside.jsonl",
        "overall": {"nll": "x"},
    }
    (run / "results.json").write_text(json.dumps(results))
    (tmp_path / "outside.jsonl").write_text('{"step": 1, "loss": 1}')
    path = write_report(run)
    page = Page(path)
    assert not {"script", "x", "a"} & set(page.tags)
    assert page.loads == []
    assert HOSTILE.split("\n")[0] in page.text
    assert 'id="#22262b' in page.text
    assert "$\\frac{$" in page.text


def test_dataset_alone_names_what_has_not_run(tmp_path: Path) -> None:
    make_dataset(tmp_path / "dataset", DOMAINS, generate=False, finish=False)
    page = Page(write_report(tmp_path))
    for words in (
        "No verdict: no student has been evaluated",
        "Training has not run",
        "Evaluation has not run",
        "Scoring has not run",
        "Selection has not run",
        "not finished",
    ):
        assert words in page.text
    assert page.tags.count("svg") == 2
    wrote = {s["name"]: s["wrote"] for s in stages(tmp_path, {}, kdata.open(tmp_path / "dataset"), None)}
    assert wrote["capture"] == "36 rows, not finished"
    assert [n for n, w in wrote.items() if w is None] == [
        "generate",
        "heldout",
        "score",
        "select",
        "train",
        "evaluate",
    ]


def test_results_alone(tmp_path: Path) -> None:
    students = {"ce": student("CE", 5.0), "plan": {"label": "Plan"}}
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "students": students}))
    page = Page(write_report(tmp_path))
    assert "no distilled student has been evaluated" in page.text
    assert "Neither generation nor capture has run" in page.text
    assert "did not record its machine" in page.text


def test_training_in_progress_shows_curves(tmp_path: Path) -> None:
    write_metrics(tmp_path, "ce", 1.0)
    make_dataset(tmp_path / "dataset", {"code": 2.0})
    page = Page(write_report(tmp_path))
    assert page.tags.count("svg") == 3
    assert "cross entropy, nats per token" in page.text


def test_the_weights_of_a_mixture_are_drawn(tmp_path: Path) -> None:
    write_metrics(tmp_path, "ce", 1.0)
    assert "Domain weights while training" not in Page(write_report(tmp_path_with_dataset(tmp_path))).text
    folder = tmp_path / "students" / "ddk"
    folder.mkdir(parents=True)
    shares = [{"code": 0.25, "prose": 0.75}, {"code": 0.5, "prose": 0.5}]
    lines = [{"step": 1 + 10 * n, "loss": 3.0, "mixture": {"weights": w}} for n, w in enumerate(shares)]
    lines += [
        {"step": 20, "loss": 2.0},
        {"step": 20, "mixture": {"weights": {"code": "x"}}},
        {"step": 20, "mixture": 3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(tmp_path)
    assert "Domain weights while training" in Page(page).text
    figure = page.read_text("utf-8").split("Domain weights while training")[1].split("</figure>")[0]
    assert "code" in figure and "prose" in figure and "share of tokens, %" in figure


def tmp_path_with_dataset(run: Path) -> Path:
    """The run with a small dataset, so that there is a page."""
    make_dataset(run / "dataset", {"code": 2.0})
    return run


def test_calibration_is_drawn_and_the_table_has_every_measure(tmp_path: Path) -> None:
    bins = [{"tokens": 10, "confidence": 0.2, "accuracy": 0.1}, {"tokens": 5, "confidence": 0.9, "accuracy": 0.8}]
    one = student("One", 4.0, bounds_are="lower bounds", calibration={"student": bins, "teacher": bins[:1]})
    one["overall"] |= {"reverse_kl": 1.234, "tv": 0.345, "top5": 0.678, "ece": 0.0123, "teacher_ece": 0.0456}
    odd = student("Odd", 4.1, calibration={"student": [{"confidence": None}, 3], "teacher": None})
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "students": {"one": one, "odd": odd}}))
    text = Page(write_report(tmp_path)).text
    for words in ("1.234", "0.345", "67.8%", "1.23%", "4.56%", "Calibration error (ECE): One 1.23 %, teacher 4.56 %"):
        assert words in text
    assert "Reverse KL and total variation are lower bounds." in text


def test_loyalty_and_variety_stand_in_a_table_where_they_were_measured(tmp_path: Path) -> None:
    one, odd = student("One", 4.0, acceptance_is="an upper bound"), student("Odd", 4.1, diversity={"distinct1": None})
    one["overall"] |= {"loyalty": 0.5432, "acceptance": 0.4321, "accepted_length": 1.765}
    one["diversity"] = {"distinct1": 0.1234, "distinct2": 0.6543, "tokens": 1234}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"format": 1, "students": {"one": one, "odd": odd}}))
    rows = {
        name.split(">")[-1]: cells for name, cells in rows_of(write_report(tmp_path), "Loyalty and variety").items()
    }
    assert rows["One"] == ["40.0%", "54.3%", "43.2%", "1.76", "12.3%", "65.4%", "1,234"]
    assert rows["Odd"] == ["40.0%", *["—"] * 6]
    assert "Probability loyalty and accepted drafts are an upper bound." in Page(tmp_path / "report.html").text
    path.write_text(json.dumps({"format": 1, "students": {"odd": odd}}))
    assert "Loyalty and variety" not in Page(write_report(tmp_path)).text


def test_audits_that_lie_in_the_run_are_on_its_page(tmp_path: Path) -> None:
    """What the commands write as JSON, read by name; a file that is none of theirs is refused."""
    tmp_path_with_dataset(tmp_path)
    assert "Audits" not in Page(write_report(tmp_path)).text
    leak = Audit("FAIL", ["an <attack> finds it"], 1234, 8, 9, 1, 16, 40.0, 9.0, 8, 1.5, None, None)
    (tmp_path / "audit.json").write_text(json.dumps(leak.as_dict()))
    known = {"by_chance": 1.44, "models": [{"model": "teacher", "mean": 9.5, "canaries": []}]}
    (tmp_path / "exposure.json").write_text(json.dumps(known))
    course = {
        "label": "kd", "models": [{"step": 5}], "best_step": 5, "golden_rise": 0.2, "proxy_fall": 0.1,
        "proxy_monotone": True, "hacking": True, "golden_is": "NLL", "fit": None,
    }  # fmt: skip
    (tmp_path / "hacking.json").write_text(json.dumps(course))
    text = Page(write_report(tmp_path)).text
    for words in (
        "FAIL, from 1,234 positions", "an <attack> finds it", "teacher: 9.50 bits on average",
        "a model that knows nothing: 1.44", "kd: teacher hacking: golden is least at step 5 and rises by 0.2000",
    ):  # fmt: skip
        assert words in text
    for name, content in (("hacking", "{}"), ("exposure", '{"models": 3}'), ("audit", "no JSON")):
        path = tmp_path / f"{name}.json"
        kept = path.read_text()
        path.write_text(content)
        with pytest.raises(CorruptError, match=rf"{name}\.json is not what `kdata {name}` writes.*or remove it"):
            write_report(tmp_path)
        path.write_text(kept)


def test_odd_datasets_still_make_a_page(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    make_dataset(empty / "dataset", {})
    assert "No sequence has this number." in Page(write_report(empty)).text
    many = tmp_path / "many"
    dataset = make_dataset(many / "dataset", {f"d{i}": 2.0 for i in range(12)}, per_domain=1)
    (dataset.path / "scores" / "ref").mkdir(parents=True)
    pq.write_table(pa.table({"id": ["x"], "mark": [1]}), dataset.path / "scores" / "ref" / "part-00000.parquet")
    text = Page(write_report(many)).text
    assert "Shown: the first 8 of 12 domains." in text
    assert "Not shown:" in text


def test_a_blank_sample_does_not_stretch_the_page(tmp_path: Path) -> None:
    blank = [{"domain": "code", "prompt": "p", "text": "\n" * 64}]
    students = {"ce": student("CE", 5.0, samples=blank, kl_is="an estimate from draws, biased upwards")}
    (tmp_path / "results.json").write_text(json.dumps({"format": 1, "students": students}))
    page = Page(write_report(tmp_path))
    assert "White space only, 64 characters." in page.text
    assert "Here it is an estimate from draws, biased upwards." in page.text
    assert "log-sum" not in page.text


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="holds neither dataset"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", CorruptError, "not JSON"),
        ("[]", CorruptError, "does not hold an object"),
        ("{}", FormatError, "format None"),
        ('{"format": 2}', FormatError, "format 2"),
        ('{"format": 1, "students": {}}', None, ""),
        ('{"format": 1, "students": []}', CorruptError, "students: Input"),
        ('{"format": 1, "students": [1]}', CorruptError, "students: Input"),
        ('{"format": 1, "students": {"ce": 3}}', CorruptError, "students.ce: Input"),
        (
            '{"format": 1, "students": {"ce": {"domains": {"code": 1}}}}',
            CorruptError,
            "students.ce.domains.code: Input",
        ),
        ('{"format": 1, "students": {"ce": {"domains": [1]}}}', CorruptError, "students.ce.domains: Input"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, content: str, error: type[Exception] | None, words: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    if error is None:
        assert read_results(path) is not None
    else:
        with pytest.raises(error, match=words):
            read_results(path)
