"""The report of a run: one self-contained HTML page. Every number on it is read from the run's files.

It reads RUN/results.json, RUN/students/NAME/metrics.jsonl, RUN/dataset, RUN/heldout and the audits that lie in RUN (see
`kdata.pipelines.report.audits`), and writes RUN/report.html.
Where a part has not run yet, the page says so. Plots are inline SVG; their colors are CSS variables, so the page
follows the reader's light or dark setting. The same files give the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kdata.config import first_problem
from kdata.errors import CorruptError, DataError, FormatError, MissingError
from kdata.format.files import without_hidden, write_atomically
from kdata.format.json_text import read_json
from kdata.observe.journal import Took, total
from kdata.observe.style import COLOURS, STYLE
from kdata.observe.text import duration, energy_text, hours_text, human_bytes, number, one_line, visible
from kdata.pipelines.report.audits import audits_of
from kdata.pipelines.report.plots import (
    BASELINE,
    Students,
    domains_of,
    finite,
    first_of,
    label_of,
    logs_of,
    make_plots,
    measure,
    palette,
    plans_of,
)
from kdata.selection.plan import ConditionInfo, Plan
from kdata.selection.position_rules import rule_words
from kdata.selection.show import left_out_texts
from kdata.share.card import facts, flatten
from kdata.store.dataset import Dataset
from kdata.store.kept_counts import kept_by_domain, kept_lines
from kdata.store.open import open_dataset

TIE = 0.0005  # nats: the three decimals of the tables do not show a smaller difference
Kind = Literal["better", "worse", "mixed", "equal", "missing"]


class _Student(BaseModel):
    """What the page needs to know of a student in results.json; a run may write more, or less."""

    model_config = ConfigDict(extra="allow")
    domains: dict[str, dict[str, Any]] = {}
    overall: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []


class _Results(BaseModel):
    """What the page needs to know of results.json as a whole."""

    model_config = ConfigDict(extra="allow")
    students: dict[str, _Student] = {}
    settings: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Verdict:
    """Whether distillation helped: one sentence, and the numbers behind it."""

    kind: Kind
    headline: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KeptWhere:
    """Where a dataset keeps distributions that does so at some of its targets only.

    lines: how many, by which rule, and what the rule names that no row has. domains: target positions of each domain, and
    those with a distribution.
    """

    lines: list[str]
    domains: dict[str, tuple[int, int]]

    @property
    def positions(self) -> int:
        """Target positions with a distribution, of all domains."""
        return sum(kept for _, kept in self.domains.values())

    @property
    def share(self) -> float:
        """Of all target positions; 0 where there are none."""
        return self.positions / (sum(targets for targets, _ in self.domains.values()) or 1)


def left_out(dataset: Dataset, plan: Plan) -> list[tuple[ConditionInfo, str]]:
    """Each condition of a plan, and the beginning of a text that it left out; empty where the dataset holds none."""
    if plan.info.where is None:
        return []
    texts = {condition: text for condition, _, text in reversed(left_out_texts(dataset, plan))}
    return [(one, texts.get(one.condition, "")) for one in plan.info.where.conditions]


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    Raises:
        MissingError: the folder holds neither a dataset nor results.
        FormatError: results.json is of a newer format.
        CorruptError: results.json, the dataset, a plan or an audit is damaged.
    """
    results = read_results(run / "results.json")
    dataset, heldout = _open(run / "dataset"), _open(run / "heldout")
    if dataset is None and results is None:
        raise MissingError(f"{run} holds neither dataset/ nor results.json; start a run with `kdata run RECIPE`")
    results = results or {}
    students = results.get("students", {})
    ran = stages(run, results, dataset, heldout)
    with matplotlib.rc_context(STYLE):
        plots = make_plots(run, students, dataset)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdata.pipelines.report", ""),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # markup and numbers stay
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=one_line(results.get("name") or run.resolve().name),
        verdict=verdict(students),
        introduction=introduction(students, dataset),
        students=students,
        grid=grid(students),
        plots=plots,
        datasets=[
            (n, d, facts(d), kept_where(d)) for n, d in (("dataset", dataset), ("heldout", heldout)) if d is not None
        ],
        plans=plans_of(dataset),
        left_out={} if dataset is None else {p.info.name: left_out(dataset, p) for p in plans_of(dataset)},
        rounds=rounds_of(results),
        prompts=prompts(students),
        audits=audits_of(run),
        stages=ran,
        whole=whole(ran),
        teacher_tokens=teacher_tokens(ran),
        diversity=varied,
        machine=flatten(results.get("machine", {})),
        settings=yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
        if results.get("settings")
        else None,
        colours=COLOURS,
        best=best,
        rule_words=rule_words,
        palette=palette(students),
        kl_note=_kl_note(students, heldout),
        bounds_note=_bounds_note(students),
        loyalty_note=_loyalty_note(students),
        first_of=first_of,
        label_of=label_of,
        measure=measure,
        exp=math.exp,
        flatten=flatten,
        human_bytes=human_bytes,
        duration=duration,
        hours_text=hours_text,
        energy_text=energy_text,
        number=number,
    )
    path = run / "report.html"
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


class _Round(BaseModel):
    round: int
    value: float
    plan: str | None = None
    rows: int | None = None
    accuracy: float | None = None


class _Rounds(BaseModel):
    student: str
    measure: str
    best: int
    count: int
    ended_early: bool = False
    rounds: list[_Round]

    @property
    def asks(self) -> bool:
        """Whether a round asked the teacher for texts like the student's mistakes."""
        return any(one.accuracy is not None for one in self.rounds)


def rounds_of(results: dict[str, Any]) -> _Rounds | None:
    """What results.json says of rounds; None where the recipe has none. Raises CorruptError where it is malformed."""
    try:
        return None if results.get("rounds") is None else _Rounds.model_validate(results["rounds"])
    except ValidationError as error:
        raise CorruptError(f"results.json: rounds: {first_problem(error)}; run `kdata run` again") from error


def read_results(path: Path) -> dict[str, Any] | None:
    """Read results.json and check its shape; None where the run has none.

    Raises:
        FormatError: it is of a newer format.
        CorruptError: it is not JSON, or not of the expected shape.
    """
    if not path.exists():
        return None
    try:
        results = read_json(path)
    except DataError as error:
        raise CorruptError(f"{path} is not JSON ({error}); run `kdata run` again to write it again") from error
    if results.get("format") != 1:
        raise FormatError(
            f"{path} has format {results.get('format')!r}, but this kdata reads format 1; upgrade kdata, or run again"
        )
    try:
        return _Results.model_validate(results).model_dump()
    except ValidationError as error:
        raise CorruptError(f"{path}: {first_problem(error)}; run `kdata run` again to write it again") from error


def _open(path: Path) -> Dataset | None:
    return open_dataset(path) if (path / "dataset.json").exists() else None


def kept_where(dataset: Dataset) -> KeptWhere | None:
    """Where this dataset keeps distributions; None where it does at every target. Counts are read from the payload."""
    if not dataset.info.codec.keeps_some_positions:
        return None
    domains = {domain["name"]: (domain["targets"], domain["kept"]) for domain in kept_by_domain(dataset)}
    return KeptWhere(list(kept_lines(dataset)), domains)


def verdict(students: Students) -> Verdict:
    """Compare each distilled student with the one that learned from text alone, on held-out NLL and KL to the teacher."""
    base = students.get(BASELINE, {})
    measured = {n: s for n, s in students.items() if n != BASELINE and measure(s, "nll") is not None}
    if measure(base, "nll") is None or not measured:
        lacking = "student trained on text alone" if measured else "distilled student" if base else "student"
        return Verdict("missing", f"No verdict: no {lacking} has been evaluated on held-out text.")
    details = [_comparison(name, student, base) for name, student in measured.items()]
    details += _selection(measured)
    for key, what in (("steps", "numbers of steps"), ("params", "sizes")):
        values = {s[key] for s in (base, *measured.values()) if finite(s.get(key)) is not None}
        if len(values) > 1:
            listing = " and ".join(f"{value:,}" for value in sorted(values))
            details.append(f"The students have different {what} ({listing}): the comparison is not even.")
    outcomes = {name: _outcome(base, student) for name, student in measured.items()}
    kind = next(iter(outcomes.values())) if len(set(outcomes.values())) == 1 else "mixed"
    signs = {tuple(_signs(base, student).values()) for student in measured.values()}
    winners = [label_of(n, students[n]) for n, outcome in outcomes.items() if outcome == "better"]
    has_kl = all(measure(s, "kl") is not None for s in (base, *measured.values()))
    return Verdict(kind, _headline(kind, len(measured), signs, winners, has_kl), details)


def _headline(kind: str, count: int, signs: set[tuple[int, ...]], winners: list[str], has_kl: bool) -> str:
    """The verdict in one sentence, about `count` distilled students."""
    who = {1: "the distilled student", 2: "both distilled students"}.get(count, "all distilled students")
    verb, predict, end = ("is", "predicts", "ends") if count == 1 else ("are", "predict", "end")
    other = "the student trained on text alone"
    closer = ", and {} closer to the teacher" if has_kl else " (closeness to the teacher was not measured for all)"
    if kind == "better":
        return f"Distillation helped: {who} {predict} unseen text better than {other}{closer.format(end)}."
    if kind == "worse":
        return f"Distillation did not help: {who} {verb} worse than {other}."
    if kind == "equal":
        return f"No difference: {who} and {other} measure the same."
    if signs == {(-1, 1)}:
        return f"Mixed: {who} {end} closer to the teacher than {other}, but {predict} unseen text worse."
    if signs == {(1, -1)}:
        return f"Mixed: {who} {predict} unseen text better than {other}, but {end} further from the teacher."
    if winners:
        return f"Mixed: only “{'”, “'.join(winners)}” beats {other} on every count."
    return f"Mixed: no distilled student beats {other} on every count."


def _signs(base: dict[str, Any], student: dict[str, Any]) -> dict[str, int]:
    """For NLL and KL, where both are measured: 1 where the student is lower, -1 where higher, 0 in a tie."""
    pairs = {key: (measure(base, key), measure(student, key)) for key in ("nll", "kl")}
    known = {key: before - after for key, (before, after) in pairs.items() if before is not None and after is not None}
    return {key: 0 if abs(gap) < TIE else 1 if gap > 0 else -1 for key, gap in known.items()}


def _outcome(base: dict[str, Any], student: dict[str, Any]) -> Kind:
    """better: lower in one of NLL and KL and in none higher; worse: the reverse; equal; mixed."""
    signs = set(_signs(base, student).values())
    if {1, -1} <= signs:
        return "mixed"
    return "better" if 1 in signs else "worse" if -1 in signs else "equal"


def _comparison(name: str, student: dict[str, Any], base: dict[str, Any]) -> str:
    """One student against the one trained on text alone, in words; the table beside it has the numbers."""
    parts = []
    for key, what in (("nll", "loss"), ("kl", "distance to the teacher")):
        before, after = measure(base, key), measure(student, key)
        if before is None or after is None:
            continue
        gap, floor = before - after, measure(student, "teacher_nll")
        share = f"{abs(gap) / before:.1%} " if before > 0 else ""
        part = f"{what} the same" if abs(gap) < TIE else f"{what} {share}{'lower' if gap > 0 else 'higher'}"
        if key == "nll" and floor is not None and gap >= TIE and before > floor:
            part += f" ({gap / (before - floor):.0%} of the way to the teacher)"
        parts.append(part)
    shared = [d for d in domains_of({"a": base}) if measure(student, "nll", d) is not None]
    gains = [(measure(base, "nll", d) or 0.0) - (measure(student, "nll", d) or 0.0) for d in shared]
    if gains:
        parts.append(f"lower loss in {sum(g >= TIE for g in gains)} of {len(gains)} domains")
    return f"“{label_of(name, student)}” against “{label_of(BASELINE, base)}”: {', '.join(parts)}."


def _selection(measured: Students) -> list[str]:
    """Whether choosing part of the data helped, where a student on the plan and one on everything were measured."""
    everything, plan = measured.get("everything"), measured.get("plan")
    if everything is None or plan is None:
        return []
    gap = (measure(everything, "nll") or 0.0) - (measure(plan, "nll") or 0.0)
    names = f"“{label_of('plan', plan)}”", f"“{label_of('everything', everything)}”"
    if abs(gap) < TIE:
        return [f"Selecting part of the data made no difference: {names[0]} and {names[1]} have the same loss."]
    outcome, side = ("helped", "below") if gap > 0 else ("did not help", "above")
    return [
        f"Selecting part of the data {outcome}: the loss of {names[0]} is {abs(gap):.3f} {side} that of {names[1]}."
    ]


def introduction(students: Students, dataset: Dataset | None) -> str:
    """What was compared, in plain words; empty where nothing was evaluated."""
    if not students:
        return ""
    sizes = {s["params"] for s in students.values() if finite(s.get("params")) is not None}
    size = f" of {next(iter(sizes)) / 1e6:.1f} million parameters each" if len(sizes) == 1 else ""
    many = {1: "One small language model", 2: "Two small language models", 3: "Three small language models"}.get(
        len(students), f"{len(students)} small language models"
    )
    tokens = f" of {dataset.num_tokens:,} tokens" if dataset is not None and dataset.num_tokens else ""
    beside = "every token it stores what another model, the teacher, held likely there"
    if dataset is not None and dataset.info.codec.keeps_some_positions:
        beside = (
            "some of the tokens it stores what another model, the teacher, held likely there, and beside the others how "
            "likely it found that token"
        )
    parts = [f"{many}{size}, the students, learned from a dataset{tokens}. Beside {beside}."]
    if BASELINE in students and len(students) > 1:
        label = label_of(BASELINE, students[BASELINE])
        parts.append(f"The student “{label}” saw only the text, the others also what the teacher held likely.")
    parts.append("They trained from the dataset alone, without the teacher.")
    parts.append("The numbers are for text that no student has read.")
    return " ".join(parts)


def best(students: Students, key: str, domain: str | None = None, *, largest: bool = False) -> set[str]:
    """Names of the students with the best value, rounded to three decimals; empty where all are equal."""
    values = {n: round(v, 3) for n, s in students.items() if (v := measure(s, key, domain)) is not None}
    if len(set(values.values())) < 2:
        return set()
    top = max(values.values()) if largest else min(values.values())
    return {name for name, value in values.items() if value == top}


def grid(students: Students) -> list[dict[str, Any]]:
    """Rows of the table by domain, overall (None) last: every measure of every student, teacher's NLL."""
    rows = []
    for domain in [*domains_of(students), None] if students else []:
        cells = [
            [
                (measure(s, key, domain), form, name in best(students, key, domain, largest=largest), name)
                for name, s in students.items()
            ]
            for key, form, largest in (("nll", ".3f", False), ("kl", ".3f", False), ("top1", ".1%", True))
        ]
        rows.append(
            {
                "domain": domain,
                "teacher": first_of(students, "teacher_nll", domain),
                "cells": cells,
                "tokens": first_of(students, "tokens", domain),
            }
        )
    return rows


def prompts(students: Students) -> list[tuple[str, str, dict[str, str]]]:
    """Samples side by side: domain, prompt, and each student's text by its name."""
    by_prompt: dict[tuple[str, str], dict[str, str]] = {}
    for name, student in students.items():
        for sample in student.get("samples") or []:
            key = (str(sample.get("domain", "")), str(sample.get("prompt", "")))
            by_prompt.setdefault(key, {})[name] = str(sample.get("text", ""))
    return [(domain, prompt, texts) for (domain, prompt), texts in by_prompt.items()]


def varied(student: dict[str, Any]) -> dict[str, float]:
    """How varied the student's samples are: shares of different tokens and pairs, and their number of tokens; or nothing."""
    found = student.get("diversity")
    names = ("distinct1", "distinct2", "tokens")
    return {n: v for n in names if (v := finite(found.get(n))) is not None} if isinstance(found, dict) else {}


def _kl_note(students: Students, heldout: Dataset | None) -> str:
    """How the KL was estimated: as evaluation recorded it, or as the held-out dataset's tail implies."""
    stated = sorted({one_line(s["kl_is"]) for s in students.values() if isinstance(s.get("kl_is"), str)})
    if stated:
        return "; ".join(stated)
    ghost = heldout is not None and heldout.info.tail == "ghost"
    return "a lower bound: kept entries and one bucket for the rest" if ghost else "not recorded how it was estimated"


def _bounds_note(students: Students) -> str:
    """What reverse KL and total variation are, where evaluation recorded it; else empty."""
    stated = sorted({one_line(s["bounds_are"]) for s in students.values() if isinstance(s.get("bounds_are"), str)})
    return f"Reverse KL and total variation are {'; '.join(stated)}." if stated else ""


def _loyalty_note(students: Students) -> str | None:
    """What probability loyalty and acceptance are; None where no student has them or samples that were counted."""
    if not any(measure(s, "loyalty") is not None or varied(s) for s in students.values()):
        return None
    stated = sorted(
        {one_line(s["acceptance_is"]) for s in students.values() if isinstance(s.get("acceptance_is"), str)}
    )
    return f"Probability loyalty and accepted drafts are {'; '.join(stated)}." if stated else ""


def stages(
    run: Path, results: dict[str, Any], dataset: Dataset | None, heldout: Dataset | None
) -> list[dict[str, Any]]:
    """One row per stage: what it wrote (`wrote` is None where it has not run), and its cost from results.json."""
    recorded = {str(s.get("name")): _took(s) for s in results.get("stages", [])}
    students = results.get("students", {})
    measured = [n for n, s in students.items() if measure(s, "nll") is not None]
    logs = [n for n, path in logs_of(run, students).items() if path.exists()]
    scores = [p.stem for p in without_hidden(dataset.path, "scores/*.json")] if dataset else []
    evidence = {
        "generate": _written(dataset, "generate"),
        "capture": _written(dataset, "capture"),
        "heldout": _written(heldout, "capture"),
        "score": ", ".join(scores),
        "select": ", ".join(f"{p.info.name} ({p.info.num_rows:,} rows)" for p in plans_of(dataset)),
        "train": ", ".join(logs),
        "evaluate": ", ".join(measured),
    }
    parts = {n: one for n, one in recorded.items() if n not in evidence}
    rows = []
    for name, wrote in evidence.items():
        rows.append({"name": name, "wrote": wrote or None, "took": recorded.get(name), "part": False})
        inner = [n for n in parts if n.startswith(f"{name} ")]
        inner += [n for n in parts if name == "train" and n.startswith("round ")]
        rows += [{"name": n, "wrote": "", "took": parts.pop(n), "part": True} for n in inner]
    others = [{"name": n, "wrote": "", "took": one, "part": False} for n, one in parts.items()]
    return others + rows


def _took(stage: dict[str, Any]) -> Took:
    """Time and cost of a stage in results.json; nothing but the name where the entry is malformed."""
    try:
        return Took.model_validate(stage)
    except ValidationError:
        return Took(name=str(stage.get("name")))


def whole(rows: list[dict[str, Any]]) -> Took | None:
    """Time and cost of all stages together; None where no time was recorded."""
    parts = [row["took"] for row in rows if not row["part"] and row["took"] is not None]
    return total([p for p in parts if p.seconds is not None]) if any(p.seconds for p in parts) else None


def teacher_tokens(rows: list[dict[str, Any]]) -> str:
    """How many tokens the teacher read and wrote, as a sentence; empty where none were counted."""
    counted = {row["name"]: row["took"].tokens for row in rows if row["took"] is not None}
    read, written = counted.get("capture", 0) + counted.get("heldout", 0), counted.get("generate", 0)
    words = [f"{what} {count:,} tokens" for what, count in (("read", read), ("wrote", written)) if count]
    return f"The teacher {' and '.join(words)}." if words else ""


def _written(dataset: Dataset | None, kind: str) -> str:
    """How many rows the sources of this kind wrote, and whether they are finished; empty where there are none."""
    sources = {n: s for n, s in dataset.info.sources.items() if s.kind == kind} if dataset else {}
    if dataset is None or not sources:
        return ""
    rows = sum(e.rows for e in dataset.manifest if e.source in sources)
    return f"{rows:,} rows" + ("" if all(s.num_units is not None for s in sources.values()) else ", not finished")
