"""Rounds of a recipe: stages that are repeated with what the last round made.

A round does its `stages` in order, trains the student, and measures it on the validation text. Any value in a stage may be
`{by_round: [a, b]}`: a in round 1, b in round 2 and later. `{round}` in a string is the round's number, `{last}` the model
that the round before trained (before round 1: the ordinary training of that student), `{best}` the best so far.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import duckdb
from pydantic import Field, field_validator

from kdata.config import Strict, parse_config
from kdata.corpus.corpus import CorpusConfig
from kdata.corpus.template_process import RENDERER, TemplateRefusal
from kdata.errors import ConfigError, DataError, nearest
from kdata.selection.prune import Prune
from kdata.selection.query import Sql
from kdata.selection.select import parse_step
from kdata.selection.step import Step
from kdata.store.conditions import check_condition
from kdata.store.queryable import NAME
from kdata.teachers.config import SamplingConfig, TeacherConfig

# Not in doubled braces, which are Jinja's.
REFERENCE = re.compile(r"(?<!\{)\{([a-z_]+)\}(?!\})")
REFERENCES = ["round", "last", "best"]

JUDGE_PROMPT = """Rate the answer to the question from 0 (useless) to 9 (perfect): is it correct, complete and helpful?
Write the number alone.

Question:
{{ question }}

Answer:
{{ answer }}

Number from 0 to 9: """

REQUEST_PROMPT = """A small model sorts texts into the classes {{ labels | join(", ") }}. On validation text it does so:
{{ report }}
{% for example in correct %}
Right, a text of {{ example.label }}: {{ example.text }}
{% endfor %}
{% for example in wrong + hard %}
Wrong, a text of {{ example.label }} that it took for {{ example.predicted }} with probability \
{{ "%.2f" | format(example.confidence) }}: {{ example.text }}
{% endfor %}
Write one new text of the class {{ label }} from which it would learn what it does not know. Write the text alone.
Text: """


def filled(template: str, values: dict[str, Any]) -> str:
    """The text of a Jinja template of a recipe, rendered with the limits that a stranger's template has.

    Raises:
        DataError: the template is not valid, asks for what it does not get, or takes too much time or memory.
    """
    try:
        return RENDERER.fill(template, values)
    except TemplateRefusal as error:
        names = ", ".join(values)
        raise DataError(f"the template of the prompt cannot be filled: {error}; it gets {names}") from error


def _checked(template: str, example: dict[str, Any]) -> str:
    """The template, filled once with an example of what it will get. Raises ValueError where that fails."""
    try:
        filled(template, example)
    except DataError as error:
        raise ValueError(str(error)) from error
    return template


def first_groups(texts: Sequence[str], pattern: str) -> list[str]:
    """What the first group of a pattern of RE2 holds in its first match in each text; "" where it does not match.

    RE2 takes time in proportion to the text, whatever the pattern, which comes from a recipe.

    Raises:
        ValueError: the pattern does not compile, or has no group.
    """
    query = "select regexp_extract(text, $pattern, ['mark']).mark from unnest($texts) as t(text)"
    try:
        return [found for (found,) in duckdb.execute(query, {"texts": list(texts), "pattern": pattern}).fetchall()]
    except duckdb.Error as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{reason}; write a pattern of RE2 with the mark in parentheses") from error


class ScoreStage(Strict):
    """A model reads every row of the dataset: `kdata score`."""

    stage: Literal["score"] = "score"
    model: str = Field("{last}", description="Folder of the model; {last}: the student of the last round.")
    name: str = Field("student_{round}", pattern=NAME.pattern, description="Name of the score.")
    backend: Literal["vllm", "transformers"] = Field("transformers", description="What runs the model.")
    tokens: bool = Field(False, description="Store the NLL of each token, too.")
    margins: bool = Field(False, description="Store the model's own mean margin of each row, too.")


class JudgeConfig(TeacherConfig):
    """The model that gives marks."""

    model: str = Field("teacher", description="Model folder, GGUF file or Hub name; teacher: the recipe's teacher.")


class JudgeStage(Strict):
    """The student answers the prompts of `generate`; a judge gives its answers and the teacher's marks (TAPIR, 2405.13448).

    The score has the columns teacher, student and gap (teacher less student), null where a reply has no mark. Replies are
    kept as they are in RUN/rounds/N/marks. The paper's prompt is not public: prompt and scale are our default.
    """

    stage: Literal["judge"] = "judge"
    name: str = Field("marks_{round}", pattern=NAME.pattern, description="Name of the score.")
    student: str = Field("{last}", description="Folder of the model that answers.")
    backend: Literal["vllm", "transformers"] = Field("transformers", description="What runs the student.")
    judge: JudgeConfig = JudgeConfig()
    prompt: str = Field(JUDGE_PROMPT, description="Jinja template of `question` and `answer`: what the judge reads.")
    chat: bool = Field(False, description="Send the prompt as a user's message, by the judge's chat template.")
    sampling: SamplingConfig = Field(SamplingConfig(temperature=0, max_tokens=8), description="How the judge writes.")
    pattern: str = Field(
        r"(\d+(?:\.\d+)?)",
        description="Regular expression (RE2) whose first group is the mark, in the first match of a reply.",
    )
    lowest: float = Field(0.0, description="Marks below are none.")
    highest: float = Field(9.0, description="Marks above are none.")

    @field_validator("prompt")
    @classmethod
    def _can_be_filled(cls, template: str) -> str:
        return _checked(template, {"question": "1 + 1?", "answer": "2"})

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str) -> str:
        first_groups([""], pattern)
        return pattern


class RequestStage(Strict):
    """The student's mistakes become the next request to the teacher, and what it writes new rows (PGKD, 2411.05045).

    A row of the validation text is a text, `marker`, and its class. The class that the student predicts is that with the
    least NLL behind the text. Requests are shared out over classes by the number of mistakes plus one. The teacher's text,
    the marker and the class that was asked for become a row, which the teacher then reads. We know the paper at second hand:
    prompt, numbers and the cut-off of confidence are our default.
    """

    stage: Literal["request"] = "request"
    student: str = Field("{last}", description="Folder of the model that classifies.")
    marker: str = Field("\nclass: ", min_length=1, description="What stands between a text and its class.")
    prompt: str = Field(
        REQUEST_PROMPT,
        description="Jinja template of the request: `label` (the class that is asked for), `labels`, `report`, and lists "
        "`correct`, `wrong`, `hard` of validation texts of that class: text, label, predicted, confidence.",
    )
    chat: bool = Field(False, description="Send the prompt as a user's message, by the teacher's chat template.")
    ask: Literal["mistakes", "random"] = Field(
        "mistakes",
        exclude_if=lambda ask: ask == "mistakes",
        description="What is asked for. mistakes: more of the classes that the student gets wrong, and its answers are "
        "shown. random: as much of every class, with validation texts of it whatever the student makes of them: the twin of "
        "equal cost.",
    )
    num_requests: int = Field(64, ge=1, description="Texts to ask for.")
    examples: int = Field(2, ge=0, description="Texts of each of the three lists in a request, drawn for each.")
    hard_above: float = Field(
        0.8,
        ge=0,
        le=1,
        description="A mistake of at least this probability is a hard one, in `hard` and not in `wrong`.",
    )
    sampling: SamplingConfig = Field(SamplingConfig(max_tokens=96), description="How the teacher writes.")

    @field_validator("prompt")
    @classmethod
    def _can_be_filled(cls, template: str) -> str:
        example = {"id": "1", "text": "A text.", "label": "a", "predicted": "b", "confidence": 0.9}
        lists = {name: [example] for name in ("correct", "wrong", "hard")}
        return _checked(template, {"label": "a", "labels": ["a", "b"], "report": "accuracy 0.500", **lists})


@dataclass(frozen=True)
class SelectStage:
    """A step of `kdata select`; the last of a round says what is trained on. Without one: every row."""

    step: Step
    stage: str = "select"


RoundStage = ScoreStage | JudgeStage | RequestStage | SelectStage
KINDS: dict[str, type[ScoreStage] | type[JudgeStage] | type[RequestStage]] = {
    "score": ScoreStage,
    "judge": JudgeStage,
    "request": RequestStage,
}


class RoundsConfig(Strict):
    """Stages that are repeated, each time with the newest student."""

    count: int = Field(ge=1, le=1000, description="Rounds, at most.")
    student: str | None = Field(
        None, description="Name of the student that is carried on, with its objective; null: the only one."
    )
    begin: Literal["last", "best", "start"] = Field(
        "last", description="Weights that a round trains: the last round's, the best so far, or those of the beginning."
    )
    validation: CorpusConfig = Field(
        description="Text that rounds are measured on, and that requests show; none of the training or held-out text."
    )
    measure: Literal["nll", "kl"] = Field("nll", description="Figure on that text; the least is the best.")
    patience: int | None = Field(
        1, ge=1, description="Rounds without improvement after which rounds end; null: none ends them early."
    )
    least_gain: float = Field(0.0, ge=0, description="A smaller improvement, in nats per token, is none.")
    stages: list[dict[str, Any]] = Field(
        description="What a round does before it trains, in order: each has `stage` (score, judge, request or select) and "
        "its settings.",
    )

    def student_of(self, students: list[str]) -> str:
        """The name of the student. Raises ConfigError where it is unknown or not said."""
        if self.student is None and len(students) > 1:
            raise ConfigError(f"rounds.student: name the student that rounds carry on, one of {list(students)}")
        name = self.student or students[0]
        if name not in students:
            raise ConfigError(f"rounds.student: {name!r}{nearest(name, students)} is none of {list(students)}")
        return name

    def stages_of(self, number: int, models: Mapping[str, str]) -> list[RoundStage]:
        """The stages of a round, references resolved.

        Args:
            number: of the round, from 1. models: folders of `last` and `best`.
        Raises:
            ConfigError: an unknown stage, key or reference, or a bad value.
        """
        stages: list[RoundStage] = []
        for place, raw in enumerate(self.stages):
            where = f"rounds.stages.{place} (round {number})"
            kind = raw.get("stage")
            if kind not in (*KINDS, "select"):
                known = [*KINDS, "select"]
                raise ConfigError(f"{where}: stage: {kind!r} is none of {', '.join(known)}{nearest(str(kind), known)}")
            kinds = KINDS.get(kind)
            defaults = {} if kinds is None else {
                key: field.default for key, field in kinds.model_fields.items() if isinstance(field.default, str)
            }  # fmt: skip
            values = _resolved({**defaults, **raw}, number, {"round": str(number), **models}, where)
            if kinds is not None:
                stages.append(parse_config(kinds, values, where))
                continue
            values.pop("stage")
            same = sum(isinstance(stage, SelectStage) for stage in stages)
            own = f"round_{number}" + (f"_{same + 1}" if same else "")
            stages.append(SelectStage(parse_step({"name": own, **values}, where)))
        return stages

    def names_of(self, number: int) -> list[str]:
        """What the log, `kdata status` and the report call the stages of a round; round 0 is measured alone."""
        names: list[str] = []
        for raw in self.stages if number else []:
            name = f"round {number}: {raw.get('stage')}"
            again = sum(other.partition(" #")[0] == name for other in names)
            names.append(f"{name} #{again + 1}" if again else name)
        return [*names, *([f"round {number}: train"] if number else []), f"round {number}: measure"]

    def check(self, *, scores: list[str], plans: list[str], generates: bool) -> list[SelectStage | None]:
        """Refuse rounds that could not end well, before anything is done.

        Args:
            scores, plans: of the dataset, from the stages before rounds. generates: the teacher has written rows.
        Returns:
            Of each round, the selection whose plan is trained on.
        Raises:
            ConfigError: see `stages_of`; a name is written twice, or what is read has not been written, or is of the rows
                before a request.
        """
        known, known_plans, ever = set(scores), set(plans), set(scores)
        every_plan, last = set(plans), []
        for number in range(1, self.count + 1):
            chosen: SelectStage | None = None
            for place, stage in enumerate(self.stages_of(number, {"last": "student", "best": "student"})):
                where = f"rounds.stages.{place} (round {number})"
                if isinstance(stage, ScoreStage | JudgeStage):
                    _refuse_again("score", stage.name, ever, where)
                    known.add(stage.name)
                    ever.add(stage.name)
                if isinstance(stage, JudgeStage) and not generates:
                    raise ConfigError(
                        f"{where}: judge compares answers to the prompts of `generate`, which is null; set it"
                    )
                own = sorted(stage.judge.model_fields_set - {"model"}) if isinstance(stage, JudgeStage) else []
                if isinstance(stage, JudgeStage) and stage.judge.model == "teacher" and own:
                    raise ConfigError(
                        f"{where}: judge.{own[0]} would be ignored: the judge is the recipe's teacher; name judge.model"
                    )
                if isinstance(stage, RequestStage):
                    known.clear()
                    known_plans.clear()
                    chosen = None
                if isinstance(stage, SelectStage):
                    _refuse_unread(stage.step, known, ever, where)
                    parent = stage.step.parent
                    if parent is not None and parent not in known_plans:
                        raise ConfigError(
                            f"{where}: parent: no plan {parent!r}{nearest(parent, sorted(known_plans))} has been made by "
                            "then of the rows as they are"
                        )
                    name = str(stage.step.name)
                    _refuse_again("plan", name, every_plan, where)
                    known_plans.add(name)
                    every_plan.add(name)
                    chosen = stage
            last.append(chosen)
        return last


def _refuse_again(what: str, name: str, ever: set[str], where: str) -> None:
    if name.lower() in (one.lower() for one in ever):
        raise ConfigError(
            f"{where}: name: the {what} {name!r} is written already, by an earlier stage or round; write {{round}} into it"
        )


def _refuse_unread(step: Step, known: set[str], ever: set[str], where: str) -> None:
    """Raise ConfigError where a step reads a score that does not exist by then. What a query reads, it says when it runs."""
    read = [name for condition in step.where for name in check_condition(condition) if name != "rows"]
    if not isinstance(step, Sql) and not (isinstance(step, Prune) and step.keep == "random"):
        read += [name for name in [getattr(step, "score", None)] if name is not None]
    read += [] if step.positions is None else step.positions.named_scores()
    for name in read:
        if name.lower() in (one.lower() for one in known):
            continue
        if name.lower() in (one.lower() for one in ever):
            raise ConfigError(
                f"{where}: the score {name!r} is of the rows before a request added some; score again behind the request"
            )
        raise ConfigError(
            f"{where}: no score {name!r}{nearest(name, sorted(known))} is written by then, of {sorted(known) or 'none'}"
        )


def _resolved(value: Any, number: int, references: Mapping[str, str], where: str) -> Any:
    """A value with `by_round` and references replaced. Raises ConfigError."""
    if isinstance(value, dict) and "by_round" in value:
        choices = value["by_round"]
        if len(value) > 1 or not isinstance(choices, list) or not choices:
            raise ConfigError(f"{where}: by_round stands alone and has a list of values: {{by_round: [0.3, 0.5]}}")
        return _resolved(choices[min(number, len(choices)) - 1], number, references, where)
    if isinstance(value, dict):
        return {key: _resolved(one, number, references, where) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, number, references, where) for one in value]
    if not isinstance(value, str):
        return value
    for name in REFERENCE.findall(value):
        if name not in references:
            raise ConfigError(
                f"{where}: {{{name}}} is no reference{nearest(name, REFERENCES)}; known: {{round}}, {{last}}, {{best}}"
            )
    return REFERENCE.sub(lambda match: references[match[1]], value)


def best_of(values: Sequence[float], least_gain: float) -> int:
    """The round of the best value: one counts as better where it is lower by more than `least_gain`."""
    best = 0
    for number, value in enumerate(values):
        if value < values[best] - least_gain:
            best = number
    return best


def has_ended(values: Sequence[float], patience: int | None, least_gain: float) -> bool:
    """Whether `patience` rounds have passed since the best; values of round 0 and those after it."""
    return patience is not None and bool(values) and len(values) - 1 - best_of(values, least_gain) >= patience


def may_change(before: Any, now: Any, done: Container[str]) -> bool:
    """Whether rounds can go on with other settings: no stage that is done would have been another one with them.

    Args:
        before, now: `rounds` of a recipe as JSON values. done: names of finished stages.
    """
    if before is None or now is None:
        return False
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    former, latter = (parse_config(RoundsConfig, rounds, "rounds") for rounds in (before, now))
    models = dict.fromkeys(("last", "best"), "MODEL")

    def begun(number: int) -> list[str]:
        return [name for name in former.names_of(number) if name in done]

    rounds_begun = list(itertools.takewhile(begun, itertools.count(1)))
    for number in rounds_begun:
        names = begun(number)
        stages = [rounds.stages_of(number, models)[: len(names)] for rounds in (former, latter)]
        if latter.names_of(number)[: len(names)] != names or stages[0] != stages[1]:
            return False
    free = {"stages", "count", "patience"} if rounds_begun else {"stages", "count", "patience", "least_gain", "begin"}
    return changed <= free
