"""What a round does: scores, marks, requests, plans, training with the last round's student, and its measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kdata.errors import CorruptError, DataError
from kdata.jobs.scoring import ScoreConfig, score
from kdata.jobs.selecting import select
from kdata.observe.progress import console
from kdata.pipelines.judging import judge
from kdata.pipelines.requesting import request
from kdata.pipelines.rounds import (
    JudgeStage,
    RequestStage,
    RoundsConfig,
    RoundStage,
    ScoreStage,
    SelectStage,
    best_of,
    has_ended,
)
from kdata.pipelines.run import Run, read_state, write_json
from kdata.store.open import open_dataset
from kdata.teachers.config import TeacherConfig
from kdata.trainer.config import CheckpointStudent, TrainConfig
from kdata.trainer.evaluate import EvaluateConfig, evaluate
from kdata.trainer.train import train


def round_stages(run: Run) -> Iterator[tuple[str, Callable[[Run], None]]]:
    """The stages of all rounds, one after another, until the last or until there is no improvement."""
    rounds = run.recipe.rounds_of()
    yield rounds.names_of(0)[0], partial(_measure, number=0)
    for number in range(1, rounds.count + 1):
        if has_ended(values := measured(run), rounds.patience, rounds.least_gain):
            console.print(
                f"round {number - 1}: no improvement in {rounds.patience} round{'s' * (rounds.patience != 1)}, so "
                f"rounds end; the best is round {best_of(values, rounds.least_gain)}"
            )
            return
        *names, training, measuring = rounds.names_of(number)
        for place, name in enumerate(names):
            yield name, partial(_perform, number=number, place=place)
        yield training, partial(_train, number=number)
        yield measuring, partial(_measure, number=number)


def rounds_left(run: Run) -> list[int]:
    """Numbers of the rounds that have been done or may be, from 0."""
    rounds, values = run.recipe.rounds_of(), measured(run)
    ended = has_ended(values, rounds.patience, rounds.least_gain)
    return list(range(len(values) if ended else rounds.count + 1))


def measured(run: Run) -> list[float]:
    """The figure of each round so far, from round 0. Raises CorruptError where a file is damaged."""
    values: list[float] = []
    while (path := run.round_folder(len(values)) / "measure.json").exists():
        state = read_state(path)
        try:
            values.append(float(state["value"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{path} is damaged ({error!r}); name another folder with --out") from error
    return values


def rounds_table(run: Run) -> dict[str, Any]:
    """What the report shows: the figure of each round, and which is the best."""
    rounds = run.recipe.rounds_of()
    values, lines = measured(run), []
    for number, value in enumerate(values):
        line = {"round": number, "value": value, "rows": None, "plan": None, "accuracy": None}
        line |= {key: read_state(run.round_folder(number) / "measure.json").get(key) for key in ("rows", "plan")}
        asked = run.round_folder(number) / "request.json"
        if asked.exists():
            line["accuracy"] = read_state(asked).get("accuracy")
        lines.append(line)
    return {
        "student": rounds.student_of(list(run.recipe.students)),
        "measure": rounds.measure,
        "best": best_of(values, rounds.least_gain),
        "count": rounds.count,
        "ended_early": len(values) <= rounds.count,
        "rounds": lines,
    }


def _stages(run: Run, number: int) -> list[RoundStage]:
    return run.recipe.rounds_of().stages_of(number, _models(run, number))


def _models(run: Run, number: int) -> dict[str, str]:
    """Folders of the student of the round before, and of the best so far."""
    rounds: RoundsConfig = run.recipe.rounds_of()
    best = best_of(measured(run)[:number], rounds.least_gain)
    return {"last": str(run.round_student(number - 1) / "model"), "best": str(run.round_student(best) / "model")}


def _perform(run: Run, *, number: int, place: int) -> None:
    stage = _stages(run, number)[place]
    if isinstance(stage, ScoreStage):
        model = TeacherConfig(model=stage.model, backend=stage.backend)
        config = ScoreConfig(model=model, name=stage.name, tokens=stage.tokens, margins=stage.margins)
        score(open_dataset(run.dataset_path), config, log=run.log)
    elif isinstance(stage, SelectStage):
        select(open_dataset(run.dataset_path), stage.step)
    elif isinstance(stage, JudgeStage):
        judge(run, number, stage)
    elif isinstance(stage, RequestStage):
        request(run, number, stage)


def _plan(run: Run, number: int) -> str | None:
    """The plan that a round trains on: that of its last selection behind its last request."""
    if number == 0:
        name = run.recipe.rounds_of().student_of(list(run.recipe.students))
        return run.plan_name if run.recipe.students[name].plan else None
    plan = None
    for stage in _stages(run, number):
        if isinstance(stage, RequestStage):
            plan = None
        elif isinstance(stage, SelectStage):
            plan = stage.step.name
    return plan


def _train(run: Run, *, number: int) -> None:
    plan = _plan(run, number)
    path = None if plan is None else run.dataset_path / "plans" / plan
    train(_train_config(run, number), run.dataset_path, path, run.round_student(number))


def _train_config(run: Run, number: int) -> TrainConfig:
    rounds = run.recipe.rounds_of()
    config = run.train_config(run.recipe.students[rounds.student_of(list(run.recipe.students))])
    label = f"{config.label}, round {number}"
    if rounds.begin == "start":
        return config.model_copy(update={"label": label})
    student = CheckpointStudent(model=_models(run, number)[rounds.begin])
    # With the seed of the round before, its rows would come in the same order again.
    return config.model_copy(update={"label": label, "student": student, "seed": config.seed + number})


def _measure(run: Run, *, number: int) -> None:
    rounds = run.recipe.rounds_of()
    if number == 0:
        _refuse_shared(run)
    figures = evaluate(
        run.round_student(number) / "model", run.validation_path, config=EvaluateConfig(sample_tokens=1)
    )["overall"]
    before, value = measured(run)[:number], figures[rounds.measure]
    plan = _plan(run, number)
    rows = open_dataset(run.dataset_path).num_rows
    facts = {"round": number, "value": value, "measure": rounds.measure, "plan": plan, "rows": rows, "figures": figures}
    run.round_folder(number).mkdir(parents=True, exist_ok=True)
    write_json(run.round_folder(number) / "measure.json", facts)
    best = best_of([*before, value], rounds.least_gain)
    said = "the best so far" if best == number else f"the best is round {best}: {before[best]:.4f}"
    console.print(f"round {number}: {rounds.measure} {value:.4f} on the validation text ({said})", soft_wrap=True)


def _refuse_shared(run: Run) -> None:
    """Raise DataError where held-out text is validation text, too: rounds are chosen by validation."""
    hashes = [
        dict(zip(table["content_hash"].to_pylist(), table["id"].to_pylist(), strict=True))
        for table in (
            open_dataset(path).index(["id", "content_hash"]) for path in (run.validation_path, run.heldout_path)
        )
    ]
    if shared := sorted(hashes[0].keys() & hashes[1].keys()):
        raise DataError(
            f"{len(shared)} validation texts are held-out texts, too, for instance {hashes[0][shared[0]]!r}; rounds are "
            "chosen by validation, so held-out text must be other text; change one of them"
        )
