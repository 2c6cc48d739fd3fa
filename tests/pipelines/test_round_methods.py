"""TAPIR and PGKD in rounds of a recipe, with models that the tests make: a judge, and a small classification set."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

import kdata
from kdata.errors import DataError
from kdata.pipelines import runner
from kdata.pipelines.judging import marks_of
from kdata.pipelines.recipe import Recipe, load_recipe
from kdata.pipelines.requesting import Prediction, classify, report_of, requests_of
from kdata.pipelines.rounds import JudgeStage, RequestStage
from kdata.selection.plan import open_plan
from tests.fakes import save_llama, write_jsonl
from tests.pipelines.test_rounds import contents, texts

MARKER = "\nclass: "
TOPICS = {
    "sport": ["match", "goal", "team", "ball", "coach"],
    "food": ["soup", "bread", "oven", "salt", "cook"],
    "music": ["song", "drum", "choir", "tune", "band"],
}


def sentences(number: int, seed: int) -> list[dict[str, str]]:
    """A classification set: two words of the class and one of another, which the student confuses."""
    rng, rows, seen = random.Random(seed), [], set()
    while len(rows) < number:
        label = sorted(TOPICS)[len(rows) % 3]
        other = rng.choice([name for name in TOPICS if name != label])
        words = [*rng.sample(TOPICS[label], 2), rng.choice(TOPICS[other])]
        rng.shuffle(words)
        text = f"{' '.join(words)} {rng.randrange(1000)}"
        if text not in seen:
            seen.add(text)
            rows.append({"id": f"{seed}-{len(rows):03}", "domain": label, "text": text + MARKER + label})
    return rows


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("classes") / "teacher")


def make_teacher(folder: Path) -> Path:
    """A Llama that learned the set, request by request: it writes sentences of a class."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_llama(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = sentences(240, seed=9)
    lines = []
    for row in rows:
        text, _, label = row["text"].rpartition(MARKER)
        lines += [row["text"], f"{label}: {text}"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for step in range(400):
        some = [lines[(step * 24 + n) % len(lines)] for n in range(24)]
        ids = [[*tokenizer(line)["input_ids"], 1] for line in some]
        longest = max(map(len, ids))
        batch = torch.tensor([one + [1] * (longest - len(one)) for one in ids])
        labels = torch.tensor([one + [-100] * (longest - len(one)) for one in ids])
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def recipe_of(folder: Path, teacher: Path, stages: list[dict[str, Any]], **more: Any) -> Recipe:
    sets = {name: write_jsonl(folder / f"{name}.jsonl", sentences(number, seed))
            for seed, (name, number) in enumerate({"train": 18, "valid": 15, "test": 15}.items())}  # fmt: skip
    values = {
        "name": "classes",
        "teacher": {"model": str(teacher), "backend": "transformers"},
        "keep": {"kind": "topk", "k": 8},
        "generate": None,
        "corpus": {"path": str(sets["train"])},
        "heldout": {"path": str(sets["test"])},
        "select": {"method": "random"},
        "student": {"scratch": {"hidden_size": 64, "num_layers": 2, "num_heads": 2}},
        "train": {"steps": 20, "batch_tokens": 512, "warmup_steps": 0, "device": "cpu", "learning_rate": 0.01},
        "students": {"kd": {"label": "distilled", "objective": {"weights": {"forward_kl": 1.0}}}},
        "evaluate": {"samples": 0},
        "rounds": {"count": 2, "validation": {"path": str(sets["valid"])}, "stages": stages},
        **more,
    }
    file = folder / "classes.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_recipe(file, [])


REQUEST = {
    "stage": "request", "prompt": "{{ label }}:", "num_requests": 12, "sampling": {"max_tokens": 40},
}  # fmt: skip


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    runner.execute(recipe_of(folder, teacher, [REQUEST]), folder / "run")
    return folder / "run"


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_mistakes_become_requests_and_new_rows(asked: Path) -> None:
    """Classes with more mistakes are asked for more often; the new rows are the teacher's, read by it, and nowhere else."""
    data = kdata.open(asked / "dataset")
    state = json.loads((asked / "run.json").read_text())["stages"]
    rounds = sum(name.endswith("request") for name in state)
    others = {row["text"].rpartition(MARKER)[0] for name in ("validation", "heldout")
              for row in kdata.open(asked / name).sql("select text from rows").to_pylist()}  # fmt: skip
    for number in range(1, rounds + 1):
        folder = asked / f"rounds/{number}"
        predictions, requests = lines_of(folder / "predictions.jsonl"), lines_of(folder / "requests.jsonl")
        assert len(predictions) == 15 and len(requests) == 12
        wrong = {label: sum(p["label"] == label != p["predicted"] for p in predictions) for label in TOPICS}
        asked_for = {label: sum(r["domain"] == label for r in requests) for label in TOPICS}
        total = sum(wrong.values()) + 3
        assert all(abs(asked_for[label] - 12 * (wrong[label] + 1) / total) < 1 for label in TOPICS)
        facts = json.loads((folder / "request.json").read_text())
        assert facts["mistakes"] == sum(wrong.values()) and facts["accuracy"] == pytest.approx(
            1 - sum(wrong.values()) / 15
        )
        new = lines_of(folder / "examples.jsonl")
        assert len(new) == facts["new_rows"] > 0
        stored = data.sql(f"select id, text, domain from rows where id like 'round-{number}/%' order by id").to_pylist()
        assert [row["text"] for row in stored] == [row["text"] for row in new]
        assert all(row["text"].endswith(MARKER + row["domain"]) for row in stored)
        assert others.isdisjoint(row["text"].rpartition(MARKER)[0] for row in stored)
    texts_of = data.sql("select text from rows")["text"].to_pylist()
    assert len(set(texts_of)) == len(texts_of) > 18


def test_the_best_round_is_kept_and_better_on_the_third_split(asked: Path) -> None:
    results = json.loads((asked / "results.json").read_text())
    rounds, students = results["rounds"], results["students"]
    values = [line["value"] for line in rounds["rounds"]]
    assert values[rounds["best"]] == min(values) < values[0]
    assert students["kd-rounds"]["overall"]["nll"] < students["kd"]["overall"]["nll"]
    assert students["kd-rounds"]["label"] == f"distilled, round {rounds['best']}"
    examples = [(row["id"], *row["text"].rpartition(MARKER)[::2]) for row in sentences(15, 2)]
    predictions = classify(str(asked / f"rounds/{rounds['best']}/student/model"), examples, MARKER)
    assert [p.label for p in predictions] == [label for *_, label in examples]
    assert all(1 / 3 <= p.confidence <= 1 for p in predictions)
    assert "classified right, before" in (asked / "report.html").read_text()


class _Stop(Exception):
    pass


@pytest.mark.slow
def test_a_request_that_is_stopped_anywhere_gives_the_same_rows(
    asked: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before or after each file and job of the stage."""
    from kdata.pipelines import requesting

    recipe, out, stops = recipe_of(tmp_path, teacher, [REQUEST]), tmp_path / "run", 0
    for name in ("_write_lines", "run_job", "write_json"):
        for moment in ("before", "after"):
            real = getattr(requesting, name)

            def ends(*arguments: Any, real: Any = real, moment: str = moment, **more: Any) -> Any:
                if moment == "after":
                    real(*arguments, **more)
                raise _Stop

            with monkeypatch.context() as patch, pytest.raises(_Stop):
                patch.setattr(requesting, name, ends)
                runner.execute(recipe, out)
            stops += 1
    runner.execute(recipe, out)
    assert stops == 6
    ours, theirs = contents(out), contents(asked)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == set()


def test_a_validation_text_without_classes_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class behind"):
        runner.execute(recipe_of(tmp_path, teacher, [{**REQUEST, "marker": "\nlabel: "}]), tmp_path / "run")
    assert not (tmp_path / "run/rounds/1/written").exists()


def test_nothing_that_can_be_used_is_an_error_that_counts(
    asked: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies that are empty, or that the dataset has."""
    from kdata.pipelines import requesting

    known = sentences(18, 0)[0]["text"].rpartition(MARKER)[0]
    monkeypatch.setattr(
        requesting, "replies_of", lambda _: [(f"1-000-{n:05}~0", ("  ", known)[n % 2]) for n in range(12)]
    )
    with pytest.raises(DataError, match=r"of 12 texts .* none can be used \(6 empty, 6 known already\)"):
        runner.execute(recipe_of(tmp_path, teacher, [REQUEST]), tmp_path / "run")


def test_requests_show_right_wrong_and_hard_texts_of_the_class() -> None:
    predictions = [
        Prediction("a", "ta", "x", "x", 0.9), Prediction("b", "tb", "x", "y", 0.95), Prediction("c", "tc", "x", "y", 0.5),
        Prediction("d", "td", "y", "y", 0.6),
    ]  # fmt: skip
    assert report_of(predictions).splitlines() == [
        "accuracy 0.500 of 4 texts", "x: precision 1.000, recall 0.333, F1 0.500, 3 texts",
        "y: precision 0.333, recall 1.000, F1 0.500, 1 texts",
    ]  # fmt: skip
    form = "{{ label }}|{{ correct | map(attribute='id') | join }}|{{ wrong | map(attribute='id') | join }}|" \
           "{{ hard | map(attribute='id') | join }}"  # fmt: skip
    rows = requests_of(predictions, RequestStage(prompt=form, num_requests=4), 0, 1)
    assert [row["prompt"] for row in rows] == ["x|a|c|b"] * 3 + ["y|d||"]
    assert rows == requests_of(predictions, RequestStage(prompt=form, num_requests=4), 0, 1)
    twin = requests_of(
        predictions, RequestStage(prompt=form + "|{{ report }}", num_requests=4, ask="random", examples=9), 0, 1
    )
    assert sorted("".join(sorted(row["prompt"])) for row in twin) == sorted(
        "".join(sorted(text)) for text in ["x|abc|||(not shown)"] * 2 + ["y|d|||(not shown)"] * 2
    )
    assert [row["id"] for row in twin] == ["1-000-00000", "1-000-00001", "1-001-00000", "1-001-00001"]
    assert "Write one new text of the class x" in requests_of(predictions, RequestStage(), 0, 1)[0]["prompt"]


# ------------------------------------------------------------------------------------------------------------ tapir


def test_a_mark_is_the_first_number_in_range() -> None:
    stage = JudgeStage()
    replies = ["7", " 8 of 9", "mark: 3.5", "10", "none", ""]
    assert marks_of(replies, stage) == [7, 8, 3.5, None, None, None]
    tagged = JudgeStage(pattern=r"<score>\s*(\d)\s*</score>")
    assert marks_of(["2 or <score> 6 </score>", "2 or 6"], tagged) == [6, None]


def test_a_pattern_that_would_look_for_ever_is_quick() -> None:
    assert marks_of(["a" * 100_000 + "!"], JudgeStage(pattern=r"(a+)+\$")) == [None]


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"pattern": r"\d"}, "the mark in parentheses"),
        ({"pattern": r"(\d"}, "missing \\)"),
        ({"pattern": r"(?=x)(\d)"}, "a pattern of RE2"),
        ({"prompt": "{{ question }} {{ reply }}"}, "'reply' is undefined; it gets question, answer"),
        (
            {"prompt": "{% for n in range(99999) %}{% for n in range(99999) %}{% endfor %}{% endfor %}"},
            "processor time",
        ),
        ({"prompt": "{{ 'a' * 3000000000 }}"}, "memory"),
        ({"prompt": "{% if %}"}, "the template of the prompt cannot be filled"),
        ({"prompt": "{{ question.__class__.__mro__ }}"}, "unsafe"),
    ],
)
def test_a_template_or_pattern_of_a_stranger_is_refused_before_anything_runs(
    stage: dict[str, str], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        JudgeStage(**stage)
    if "prompt" in stage and "question" not in stage["prompt"]:
        with pytest.raises(ValueError, match=reason):
            RequestStage(**stage)


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that replies with a digit: it learned that a text is followed by one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_llama(tmp_path_factory.mktemp("judge") / "model", seed=3)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz 0123456789"
    for _ in range(80):
        lines = []
        for _ in range(16):
            text = "".join(rng.choice(letters) for _ in range(20))
            lines.append(f"{text} mark:{sum(map(ord, text)) % 10}")
        ids = [tokenizer(line)["input_ids"] for line in lines]
        longest = max(map(len, ids))
        batch = torch.tensor([one + [1] * (longest - len(one)) for one in ids])
        labels = torch.tensor([[-100] * (len(one) - 1) + one[-1:] + [-100] * (longest - len(one)) for one in ids])
        model(input_ids=batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def judged(judge_model: Path, llama_dir: Path, folder: Path) -> Recipe:
    """TAPIR's rounds."""
    prompts = write_jsonl(folder / "prompts.jsonl", texts(5, 30))
    stages = [
        {"stage": "judge", "judge": {"model": str(judge_model), "backend": "transformers"},
         "prompt": "{{ answer[:8] | replace('\\n', ' ') }} mark:", "sampling": {"max_tokens": 1, "temperature": 0}},
        {"stage": "select", "method": "curriculum", "score": "marks_{round}", "hard_above": 0,
         "hard_share": {"by_round": [0.2, 0.6]}, "size": 10, "max_repeats": 10, "ratios": {"code": 3, "prose": 2}},
    ]  # fmt: skip
    more = {"generate": {"prompts": {"path": str(prompts)}, "sampling": {"max_tokens": 6}, "unit_prompts": 8}}
    recipe = recipe_of(folder, llama_dir, stages, corpus={"path": str(write_jsonl(folder / "more.jsonl", texts(6, 6)))},
                       **more)  # fmt: skip
    return recipe.model_copy(update={"rounds": recipe.rounds_of().model_copy(update={"patience": None})})


@pytest.fixture(scope="module")
def marked(judge_model: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marked")
    runner.execute(judged(judge_model, llama_dir, folder), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_a_judge_that_is_stopped_anywhere_gives_the_same_plans(
    marked: Path, judge_model: Path, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before or after each file and job of the stage: questions, answers, replies, marks, score."""
    from kdata.pipelines import judging

    recipe, out = judged(judge_model, llama_dir, tmp_path), tmp_path / "run"
    stops = [(name, nth, moment) for name, calls in (("run_job", 2), ("write_atomically", 1), ("settle", 1), ("bring", 1))
             for nth in range(calls) for moment in ("before", "after")]  # fmt: skip
    for name, nth, moment in stops:
        real, seen = getattr(judging, name), 0

        def ends(*arguments: Any, real: Any = real, nth: int = nth, moment: str = moment, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen <= nth:
                return real(*arguments, **more)
            if moment == "after":
                real(*arguments, **more)
            raise _Stop

        with monkeypatch.context() as patch, pytest.raises(_Stop):
            patch.setattr(judging, name, ends)
            runner.execute(recipe, out)
    runner.execute(recipe, out)
    ours, theirs = contents(out), contents(marked)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == set()


def test_marks_are_kept_and_the_share_of_hard_rows_grows(marked: Path, judge_model: Path, llama_dir: Path) -> None:
    data = kdata.open(marked / "dataset")
    for number, hard_share in ((1, 0.2), (2, 0.6)):
        folder = marked / f"rounds/{number}"
        raw = kdata.open(folder / "marks").sql("select id, prompt, text from rows order by id").to_pylist()
        assert len(raw) == 60, "both answers to each of 30 prompts, as the judge read and marked them"
        marks = pq.read_table(folder / "marks.parquet").to_pylist()
        for row in marks:
            for side in ("teacher", "student"):
                reply = next(r for r in raw if r["id"] == f"{row['id']}#{side}~0")
                mark = reply["text"][len(reply["prompt"]) :].strip()
                assert row[side] == (float(mark) if mark.isdigit() else None)
            assert row["gap"] == (None if None in (row["teacher"], row["student"]) else row["teacher"] - row["student"])
        stored = data.sql(f"select id, gap from scores.marks_{number} where gap is not null").to_pylist()
        assert len(stored) > 20
        plan = open_plan(data, f"round_{number}")
        gaps = {row["id"]: row["gap"] for row in stored}
        hard = sum(times for row, times in zip(plan.ids, plan.repeats, strict=True) if gaps[row] >= 0)
        assert sum(plan.repeats) == 10 and hard == 10 * hard_share
        assert plan.info.domains["code"].sequences == 6
    before = contents(marked)
    runner.execute(judged(judge_model, llama_dir, marked.parent), marked)
    assert contents(marked) == before
