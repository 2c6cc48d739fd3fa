"""The report of a run: one self-contained HTML page whose every number is read from the run's files.

RUN/results.json, RUN/students/NAME/metrics.jsonl, RUN/dataset and RUN/heldout go in, RUN/report.html comes
out. What a partial run lacks is named as not run. Plots are inline SVG with text as text; their colours are
CSS variables, so that the page follows the reader's light or dark setting. Same files, same bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kdata.config import first_problem
from kdata.errors import CorruptError, FormatError, MissingError
from kdata.format.files import write_atomically
from kdata.observe.journal import Took, total
from kdata.observe.style import COLOURS, STYLE
from kdata.observe.text import duration, energy_text, hours_text, human_bytes, number, one_line
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
from kdata.share.card import facts, flatten
from kdata.store.dataset import Dataset
from kdata.store.open import open_dataset

TIE = 0.0005  # nats: differences that the three decimals of the tables do not show
Kind = Literal["better", "worse", "mixed", "equal", "missing"]


class _Student(BaseModel):
    """The shape of a student in results.json that the page relies on; a run may write more, or less."""

    model_config = ConfigDict(extra="allow")
    domains: dict[str, dict[str, Any]] = {}
    overall: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []


class _Results(BaseModel):
    """The same for the whole of results.json."""

    model_config = ConfigDict(extra="allow")
    students: dict[str, _Student] = {}
    settings: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    stages: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Verdict:
    """Whether distillation helped: one sentence, and the numbers that it rests on."""

    kind: Kind
    headline: str
    details: list[str] = field(default_factory=list)


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path.

    Raises:
        MissingError: the folder holds neither a dataset nor results.
        FormatError: results.json is of a newer format.
        CorruptError: results.json, the dataset or a plan is damaged.
    """
    results = read_results(run / "results.json")
    dataset, heldout = _open(run / "dataset"), _open(run / "heldout")
    if dataset is None and results is None:
        raise MissingError(f"{run} holds neither dataset/ nor results.json; make a run with `kdata run RECIPE`")
    results = results or {}
    students = results.get("students", {})
    ran = stages(run, results, dataset, heldout)
    with matplotlib.rc_context(STYLE):
        plots = make_plots(run, students, dataset)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdata.pipelines.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=one_line(results.get("name") or run.resolve().name),
        verdict=verdict(students),
        students=students,
        grid=grid(students),
        plots=plots,
        datasets=[(n, d, facts(d)) for n, d in (("dataset", dataset), ("heldout", heldout)) if d is not None],
        plans=plans_of(dataset),
        prompts=prompts(students),
        stages=ran,
        whole=whole(ran),
        teacher_tokens=teacher_tokens(ran),
        machine=flatten(results.get("machine", {})),
        settings=yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
        if results.get("settings")
        else None,
        colours=COLOURS,
        best=best,
        palette=palette(students),
        kl_note=_kl_note(students, heldout),
        bounds_note=_bounds_note(students),
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


def read_results(path: Path) -> dict[str, Any] | None:
    """Read results.json; None where the run has none. Checks what the page takes for granted of its shape."""
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CorruptError(f"{path} is not JSON ({error}); run `kdata run` again to make it anew") from error
    if not isinstance(results, dict) or results.get("format") != 1:
        stated = results.get("format") if isinstance(results, dict) else None
        raise FormatError(f"{path} has format {stated!r}, this kdata reads 1; upgrade kdata, or run again")
    try:
        return _Results.model_validate(results).model_dump()
    except ValidationError as error:
        raise CorruptError(f"{path}: {first_problem(error)}; run `kdata run` again to make it anew") from error


def _open(path: Path) -> Dataset | None:
    return open_dataset(path) if (path / "dataset.json").exists() else None


def verdict(students: Students) -> Verdict:
    """Compare each distilled student with the cross-entropy one, on held-out NLL and KL to the teacher."""
    base = students.get(BASELINE, {})
    measured = {n: s for n, s in students.items() if n != BASELINE and measure(s, "nll") is not None}
    if measure(base, "nll") is None or not measured:
        lacking = "cross-entropy student" if measured else "distilled student" if base else "student"
        return Verdict("missing", f"No verdict: no {lacking} has been evaluated on held-out text.")
    details = [_comparison(name, student, base) for name, student in measured.items()]
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
    verb, beat = ("is", "beats") if count == 1 else ("are", "beat")
    what = "NLL and KL to the teacher" if has_kl else "NLL (KL was not measured for all)"
    if kind == "better":
        return f"Yes: {who} {beat} the cross-entropy student on held-out {what}."
    if kind == "worse":
        return f"No: {who} {verb} worse than the cross-entropy student on held-out {what}."
    if kind == "equal":
        return f"No difference: {who} and the cross-entropy student agree on held-out {what}."
    if signs == {(-1, 1)}:
        return f"Mixed: {who} {verb} closer to the teacher (KL) than the cross-entropy one, but worse in NLL."
    if signs == {(1, -1)}:
        return f"Mixed: {who} {verb} better in NLL than the cross-entropy one, but further from the teacher."
    if winners:
        return f"Mixed: on held-out {what}, only “{'”, “'.join(winners)}” wins on every count."
    return f"Mixed: no distilled student beats the cross-entropy one on all of held-out {what}."


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
    """One student against the baseline, in words and numbers."""
    parts = []
    for key, what in (("nll", "NLL"), ("kl", "KL")):
        before, after = measure(base, key), measure(student, key)
        if before is None or after is None:
            continue
        gap = before - after
        side = "lower" if gap > 0 else "higher"
        share = f", {abs(gap) / before:.1%}" if before > 0 else ""
        change = "the same" if abs(gap) < TIE else f"{abs(gap):.3f} {side}{share}"
        parts.append(f"{what} {after:.3f} against {before:.3f} ({change})")
    shared = [d for d in domains_of({"a": base}) if measure(student, "nll", d) is not None]
    gains = [(measure(base, "nll", d) or 0.0) - (measure(student, "nll", d) or 0.0) for d in shared]
    if gains:
        parts.append(f"lower NLL in {sum(g >= TIE for g in gains)} of {len(gains)} domains")
    return f"{label_of(name, student)}: {'; '.join(parts)}."


def best(students: Students, key: str, domain: str | None = None, *, largest: bool = False) -> set[str]:
    """Names of the students with the best value, to three decimals; none where nobody is ahead."""
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
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name, student in students.items():
        for sample in student.get("samples") or []:
            key = (str(sample.get("domain", "")), str(sample.get("prompt", "")))
            found.setdefault(key, {})[name] = str(sample.get("text", ""))
    return [(domain, prompt, texts) for (domain, prompt), texts in found.items()]


def _kl_note(students: Students, heldout: Dataset | None) -> str:
    """How the KL was estimated, as evaluation says or as the held-out set's tail implies."""
    stated = sorted({one_line(s["kl_is"]) for s in students.values() if isinstance(s.get("kl_is"), str)})
    if stated:
        return "; ".join(stated)
    ghost = heldout is not None and heldout.info.tail == "ghost"
    return "a lower bound: kept entries and one bucket for the rest" if ghost else "not recorded how it was estimated"


def _bounds_note(students: Students) -> str:
    """What reverse KL and total variation are, as evaluation says; empty where it does not."""
    stated = sorted({one_line(s["bounds_are"]) for s in students.values() if isinstance(s.get("bounds_are"), str)})
    return f"Reverse KL and total variation are {'; '.join(stated)}." if stated else ""


def stages(
    run: Path, results: dict[str, Any], dataset: Dataset | None, heldout: Dataset | None
) -> list[dict[str, Any]]:
    """What ran, judged by what is there (`found` is None where nothing is); what it took as in results.json."""
    recorded = {str(s.get("name")): _took(s) for s in results.get("stages", [])}
    students = results.get("students", {})
    measured = [n for n, s in students.items() if measure(s, "nll") is not None]
    logs = [n for n, path in logs_of(run, students).items() if path.exists()]
    scores = sorted(p.stem for p in dataset.path.glob("scores/*.json")) if dataset else []
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
    for name, found in evidence.items():
        rows.append({"name": name, "found": found or None, "took": recorded.get(name), "part": False})
        inner = [n for n in parts if n.startswith(f"{name} ")]
        rows += [{"name": n, "found": "", "took": parts.pop(n), "part": True} for n in inner]
    others = [{"name": n, "found": "", "took": one, "part": False} for n, one in parts.items()]
    return others + rows


def _took(stage: dict[str, Any]) -> Took:
    """What results.json says that a stage took; nothing where it says nonsense."""
    try:
        return Took.model_validate(stage)
    except ValidationError:
        return Took(name=str(stage.get("name")))


def whole(rows: list[dict[str, Any]]) -> Took | None:
    """What all stages took together; None where no time was recorded."""
    parts = [row["took"] for row in rows if not row["part"] and row["took"] is not None]
    return total([p for p in parts if p.seconds is not None]) if any(p.seconds for p in parts) else None


def teacher_tokens(rows: list[dict[str, Any]]) -> str:
    """How many tokens the teacher read and wrote, in words; empty where none were counted."""
    counted = {row["name"]: row["took"].tokens for row in rows if row["took"] is not None}
    read, written = counted.get("capture", 0) + counted.get("heldout", 0), counted.get("generate", 0)
    words = [f"{what} {count:,} tokens" for what, count in (("read", read), ("wrote", written)) if count]
    return f"The teacher {' and '.join(words)}." if words else ""


def _written(dataset: Dataset | None, kind: str) -> str:
    """Rows that sources of this kind wrote, and whether they are all there; empty where there is none."""
    sources = {n: s for n, s in dataset.info.sources.items() if s.kind == kind} if dataset else {}
    if dataset is None or not sources:
        return ""
    rows = sum(e.rows for e in dataset.manifest if e.source in sources)
    return f"{rows:,} rows" + ("" if all(s.num_units is not None for s in sources.values()) else ", not finished")
