"""The report of a run: one self-contained HTML page whose every number is read from the run's files.

RUN/results.json, RUN/students/NAME/metrics.jsonl, RUN/dataset and RUN/heldout go in, RUN/report.html comes
out. What a partial run lacks is named as not run. Plots are inline SVG with text as text; their colours are
CSS variables, so that the page follows the reader's light or dark setting. Same files, same bytes.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, ValidationError

from kdata.card import facts, flatten, human_bytes, number, one_line
from kdata.dataset import Dataset, open_dataset
from kdata.errors import CorruptError, FormatError, MissingError, QueryError
from kdata.manifest import first_problem, write_atomically
from kdata.plan import Plan

BASELINE = "ce"  # the student that never saw the teacher's distributions
TIE = 0.0005  # nats: differences that the three decimals of the tables do not show
MAX_PANELS = 8  # domains that a plot shows; tables show all
SMOOTHED = 5  # logged steps behind one point of a loss curve

Kind = Literal["better", "worse", "mixed", "equal", "missing"]
Students = dict[str, dict[str, Any]]  # by name, as `students` of results.json

# Hues that stay apart for the colour-blind, 3:1 on white; `report.html.j2` has their dark counterparts.
COLOURS = {
    "ink": "#22262b", "muted": "#686f78", "grid": "#dde1e6", "page": "#fffffe",
    "ce": "#c4501b", "everything": "#1f6fb5", "plan": "#0f8a6a",
    "x1": "#8d5aa9", "x2": "#a97b00", "x3": "#4f7f8f",
    "capture": "#5b7fb0", "generate": "#c97f1f", "rest": "#b6bcc4",
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "text.parse_math": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"], "axes.titlesize": 9.5, "axes.titlecolor": COLOURS["ink"],
    "axes.axisbelow": True, "grid.color": COLOURS["grid"], "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"], "legend.handlelength": 1.2, "figure.constrained_layout.h_pad": 0.03,
}  # fmt: skip
WIDTH = 5.4  # inches; 390 units, about a phone's width, so that its text is readable there


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


@dataclass(frozen=True)
class Plot:
    """A figure with its caption, or the reason why there is none."""

    title: str
    caption: str
    svg: Markup | None = None


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
    with matplotlib.rc_context(STYLE):
        plots = make_plots(run, students, dataset)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdata", ""),
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
        plans=_plans(dataset),
        prompts=prompts(students),
        stages=stages(run, results, dataset, heldout),
        machine=flatten(results.get("machine", {})),
        settings=yaml.safe_dump(results["settings"], sort_keys=False, allow_unicode=True)
        if results.get("settings")
        else None,
        colours=COLOURS,
        best=best,
        palette=palette(students),
        kl_note=_kl_note(students, heldout),
        label_of=label_of,
        measure=measure,
        exp=math.exp,
        flatten=flatten,
        human_bytes=human_bytes,
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


def _plans(dataset: Dataset | None) -> list[Plan]:
    return [Plan.load(p) for p in sorted(dataset.path.glob("plans/*.json"))] if dataset else []


def _finite(value: object) -> float | None:
    """The value where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def measure(student: dict[str, Any], key: str, domain: str | None = None) -> float | None:
    """One measured number of a student, overall or of one domain; None where it was not measured."""
    scope = student.get("overall") if domain is None else student.get("domains", {}).get(domain)
    return _finite((scope or {}).get(key))


def label_of(name: str, student: dict[str, Any]) -> str:
    """How tables and plots call a student."""
    return one_line(student.get("label") or name, 40)


def domains_of(students: Students) -> list[str]:
    """Domains that any student was measured on, in the order of the first."""
    return list(dict.fromkeys(d for s in students.values() for d in s.get("domains") or {}))


def verdict(students: Students) -> Verdict:
    """Compare each distilled student with the cross-entropy one, on held-out NLL and KL to the teacher."""
    base = students.get(BASELINE, {})
    measured = {n: s for n, s in students.items() if n != BASELINE and measure(s, "nll") is not None}
    if measure(base, "nll") is None or not measured:
        lacking = "cross-entropy student" if measured else "distilled student" if base else "student"
        return Verdict("missing", f"No verdict: no {lacking} has been evaluated on held-out text.")
    details = [_comparison(name, student, base) for name, student in measured.items()]
    for key, what in (("steps", "numbers of steps"), ("params", "sizes")):
        values = {s[key] for s in (base, *measured.values()) if _finite(s.get(key)) is not None}
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
                "teacher": _first(students, "teacher_nll", domain),
                "cells": cells,
                "tokens": _first(students, "tokens", domain),
            }
        )
    return rows


def _first(students: Students, key: str, domain: str | None) -> float | None:
    return next((v for s in students.values() if (v := measure(s, key, domain)) is not None), None)


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


def stages(
    run: Path, results: dict[str, Any], dataset: Dataset | None, heldout: Dataset | None
) -> list[dict[str, Any]]:
    """What ran, judged by what is there (`found` is None where nothing is); seconds as in results.json."""
    recorded = {str(s.get("name")): _finite(s.get("seconds")) for s in results.get("stages", [])}
    students = results.get("students", {})
    measured = [n for n, s in students.items() if measure(s, "nll") is not None]
    logs = [n for n, path in _logs(run, students).items() if path.exists()]
    scores = sorted(p.stem for p in dataset.path.glob("scores/*.json")) if dataset else []
    evidence = {
        "generate": _written(dataset, "generate"),
        "capture": _written(dataset, "capture"),
        "heldout": _written(heldout, "capture"),
        "score": ", ".join(scores),
        "select": ", ".join(f"{p.info.name} ({p.info.num_rows:,} rows)" for p in _plans(dataset)),
        "train": ", ".join(logs),
        "evaluate": ", ".join(measured),
    }
    parts = {n: seconds for n, seconds in recorded.items() if n not in evidence}
    rows = []
    for name, found in evidence.items():
        rows.append({"name": name, "found": found or None, "seconds": recorded.get(name), "part": False})
        inner = [n for n in parts if n.startswith(f"{name} ")]
        rows += [{"name": n, "found": "", "seconds": parts.pop(n), "part": True} for n in inner]
    others = [{"name": n, "found": "", "seconds": seconds, "part": False} for n, seconds in parts.items()]
    return others + rows


def _written(dataset: Dataset | None, kind: str) -> str:
    """Rows that sources of this kind wrote, and whether they are all there; empty where there is none."""
    sources = {n: s for n, s in dataset.info.sources.items() if s.kind == kind} if dataset else {}
    if dataset is None or not sources:
        return ""
    rows = sum(e.rows for e in dataset.manifest if e.source in sources)
    return f"{rows:,} rows" + ("" if all(s.num_units is not None for s in sources.values()) else ", not finished")


def make_plots(run: Path, students: Students, dataset: Dataset | None) -> dict[str, Plot]:
    """All figures of the page, by name."""
    mass = "Mean probability that the kept entries hold."
    if dataset is not None and dataset.info.tail == "ghost":
        mass += " What they do not hold is stored as one exact tail."
    nll = "How surprised the teacher was, per sequence: low is easy text, or text of the teacher's own."
    return {
        "curves": _curves(_logs(run, students), students),
        "domains": _domains(students),
        "difference": _difference(dataset),
        "shares": _shares(dataset),
        "kept_mass": _rows(dataset, "kept_mass", "Kept mass", "kept probability mass, mean of a sequence", mass),
        "nll": _rows(dataset, "nll", "The teacher's NLL", "teacher's NLL, nats per target token", nll),
    }


def palette(students: Students) -> dict[str, str]:
    """A colour role for each student: the usual three have their own."""
    others = [n for n in students if n not in (BASELINE, "everything", "plan")]
    return {n: f"x{others.index(n) % 3 + 1}" if n in others else n for n in students}


def _logs(run: Path, students: Students) -> dict[str, Path]:
    """metrics.jsonl of each student, in results.json or not. Paths that leave the run are ignored."""
    names = [
        *students,
        *sorted(p.parent.name for p in run.glob("students/*/metrics.jsonl") if p.parent.name not in students),
    ]
    paths = {n: [run / "students" / n / "metrics.jsonl"] for n in names}
    for name, student in students.items():
        if isinstance(student.get("metrics"), str):
            paths[name].insert(0, run / student["metrics"])
    inside = {n: [p for p in some if p.resolve().is_relative_to(run.resolve())] for n, some in paths.items()}
    return {n: next((p for p in some if p.is_file()), some[0]) for n, some in inside.items() if some}


def _steps(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a metrics file, up to the first that a kill has torn."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:
            return
        if isinstance(values, dict):
            yield values


def _curves(logs: dict[str, Path], students: Students) -> Plot:
    title = "Loss while training"
    steps = {name: found for name, path in logs.items() if (found := list(_steps(path)))}
    if not steps:
        return Plot(title, "Training has not run: there is no metrics.jsonl.")
    shared = set.intersection(*(set(found[-1]) for found in steps.values()))
    key = next((k for k in ("cross_entropy", "forward_kl") if k in shared), "loss")
    across = "tokens" if "tokens" in shared else "step"
    smooth = min(map(len, steps.values())) >= 4 * SMOOTHED
    figure, [axes] = _figure(3.1)
    for name, role in palette({n: {} for n in steps}).items():
        points = [(s[across], s[key]) for s in steps[name] if None not in (_finite(s.get(across)), _finite(s.get(key)))]
        if not points:
            continue
        x, y = np.array(points, float).T
        if smooth:
            axes.plot(x, y, color=COLOURS[role], linewidth=0.8, alpha=0.3)
            y = np.array([y[max(0, i + 1 - SMOOTHED) : i + 1].mean() for i in range(len(y))])
        axes.plot(x, y, color=COLOURS[role], linewidth=2, label=label_of(name, students.get(name, {})))
    axes.set(
        xlabel=f"{across} seen" if across == "tokens" else across,
        ylabel=f"{key.replace('_', ' ')}, nats per token",
    )
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"
    )
    axes.grid(axis="y")
    caption = f"Thick: mean of the last {SMOOTHED} logged steps. " if smooth else ""
    caption += "On each student's own training text"
    same = (
        ", the same objective for all."
        if key != "loss"
        else "; each minimises its own objective, so heights cannot be compared."
    )
    return Plot(title, caption + same, _svg(figure, "curves"))


def _domains(students: Students) -> Plot:
    title = "Held-out NLL by domain"
    measured = {n: s for n, s in students.items() if measure(s, "nll") is not None or domains_of({n: s})}
    if not measured:
        return Plot(title, "Evaluation has not run: there are no held-out numbers.")
    domains = [*domains_of(measured)[:MAX_PANELS], None]
    roles = palette(students)
    series = [(label_of(n, s), roles[n], [measure(s, "nll", d) for d in domains]) for n, s in measured.items()]
    floor = [_first(measured, "teacher_nll", d) for d in domains]
    names = ["all domains" if d is None else one_line(d, 20) for d in domains]
    svg = _bars("domains", names, series, "NLL on held-out text, nats per token (lower is better)", ".3f", floor)
    caption = "The line is the teacher's own NLL on the same text: what a perfect copy of it would reach."
    return Plot(title, caption + _left_out(len(domains_of(measured))), svg)


def _shares(dataset: Dataset | None) -> Plot:
    title = "Share of tokens by domain"
    plans = _plans(dataset)[:3]
    if dataset is None or not plans:
        return Plot(title, "Selection has not run: the dataset has no plan.")
    domains = sorted(
        {d for p in plans for d in p.info.shares},
        key=lambda d: -plans[0].info.shares.get(d, {}).get("dataset", 0),
    )
    names = [one_line(d, 20) for d in domains[:MAX_PANELS]]
    series: list[tuple[str, str, list[float | None]]] = []
    for plan, role in zip(plans, ("plan", "x1", "x2"), strict=False):
        for key, label, colour in (
            ("dataset", "dataset", "rest"),
            ("plan", f"plan “{one_line(plan.info.name, 20)}”", role),
        ):
            if key == "plan" or not series:
                series.append(
                    (
                        label,
                        colour,
                        [100 * plan.info.shares.get(d, {}).get(key, 0.0) for d in domains[:MAX_PANELS]],
                    )
                )
    stale = [p.info.name for p in plans if p.dataset_fingerprint != dataset.fingerprint]
    caption = "What selection did to the mixture: no weights were set, sequences were chosen one by one."
    caption += f" Made for an earlier state of the dataset: {', '.join(stale)}." if stale else ""
    return Plot(title, caption + _left_out(len(domains)), _bars("shares", names, series, "share of tokens, %", ".1f"))


def _difference(dataset: Dataset | None) -> Plot:
    title = "Where the teacher knows more than a small model"
    plan = next((p for p in _plans(dataset) if _finite(p.info.parameters.get("threshold")) is not None), None)
    score = str(plan.info.parameters.get("score", "ref")) if plan else "ref"
    if dataset is None or not (dataset.path / "scores" / score).is_dir():
        return Plot(title, f"Scoring has not run: the dataset has no score “{one_line(score)}”.")
    try:
        quoted = score.replace('"', '""')
        table = dataset.sql(
            f'select domain, s.nll - r.nll as gap from rows as r join scores."{quoted}" as s using (id) '
            "where gap is not null order by id"
        )
    except QueryError as error:
        return Plot(title, f"Not shown: {one_line(error)}")
    values = table["gap"].to_numpy()
    cut = float(plan.info.parameters["threshold"]) if plan else None
    kinds = [("sequences", "capture", np.full(len(values), True))]
    if plan and cut is not None:
        kinds = [
            ("left out", "rest", values < cut),
            (f"kept by “{one_line(plan.info.name, 20)}”", "plan", values >= cut),
        ]
    label = f"NLL of {score} − NLL of the teacher, nats per target token"
    caption = f"{len(values):,} of {dataset.num_rows:,} sequences are scored. To the right: text that a small "
    caption += "model has yet to learn"
    caption += f"; difference sampling keeps what lies at or above {cut:.3f}." if cut is not None else "."
    return _histograms("difference", title, caption, table["domain"].to_pylist(), values, kinds, label, cut)


def _rows(dataset: Dataset | None, column: str, title: str, label: str, caption: str) -> Plot:
    """Distribution of one index column, by domain and by the kind of source."""
    if dataset is None:
        return Plot(title, "Neither capture nor generation has run: there is no dataset.")
    table = dataset.sql(
        f"select domain, source, {column} as value from rows where value is not null order by shard, row"
    )
    source = np.array(
        [dataset.info.sources[s].kind if s in dataset.info.sources else "" for s in table["source"].to_pylist()]
    )
    words = (("text the teacher read", "capture"), ("text the teacher wrote", "generate"))
    kinds = [(words_, kind, source == kind) for words_, kind in words if (source == kind).any()]
    return _histograms(column, title, caption, table["domain"].to_pylist(), table["value"].to_numpy(), kinds, label)


def _left_out(num_domains: int) -> str:
    return f" Shown: the first {MAX_PANELS} of {num_domains} domains." if num_domains > MAX_PANELS else ""


def _histograms(
    name: str,
    title: str,
    caption: str,
    domains: list[str],
    values: np.ndarray,
    kinds: list[tuple[str, str, np.ndarray]],
    xlabel: str,
    cut: float | None = None,
) -> Plot:
    """One panel per domain, the kinds (label, colour role, mask over values) stacked; bins meet at `cut`."""
    if not len(values):
        return Plot(title, "No sequence has this number.")
    share = 0.5 if len(values) >= 1000 else 0.0  # percent at each end that a few odd sequences may stretch
    low, high = np.percentile(values, [share, 100 - share]) + np.array([-1e-6, 1e-6])
    width = max((high - low) / 40, 1e-3)
    start = low if cut is None else cut - np.ceil((cut - low) / width) * width
    edges = start + width * np.arange(int(np.ceil((high - start) / width)) + 1)
    domain = np.array(domains, object)
    counts = {d: int((domain == d).sum()) for d in dict.fromkeys(sorted(domains))}
    shown = sorted(counts, key=lambda d: (-counts[d], d))[:MAX_PANELS]
    figure, panels = _figure(0.75 + 0.82 * len(shown), len(shown))
    for axes, one in zip(panels, shown, strict=True):
        masks = [(domain == one) & mask for _, _, mask in kinds]
        axes.hist(
            [values[m] for m in masks],
            edges,
            stacked=True,
            color=[COLOURS[k] for _, k, _ in kinds],
            label=[n for n, _, _ in kinds],
        )
        middle = np.median(values[domain == one])
        axes.set_title(f"{one_line(one, 24)}: {counts[one]:,} sequences, median {middle:.3f}", loc="left", pad=3)
        axes.locator_params(axis="y", nbins=3, integer=True)
        axes.grid(axis="y")
        if cut is not None:
            axes.axvline(cut, color=COLOURS["ink"], linewidth=1.2, linestyle=(0, (3, 2)))
    panels[-1].set_xlabel(xlabel)
    figure.supylabel("sequences", fontsize=9.5, color=COLOURS["muted"])
    outside = int(((values < edges[0]) | (values > edges[-1])).sum())
    caption += f" Beyond the axis: {outside:,} sequences." if outside else ""
    return Plot(title, caption + _left_out(len(counts)), _svg(figure, name))


def _bars(
    name: str,
    groups: list[str],
    series: list[tuple[str, str, list[float | None]]],
    xlabel: str,
    form: str,
    marks: list[float | None] | None = None,
) -> Markup:
    """Horizontal bars from zero, a group per domain, values at their ends; `marks` cross a whole group."""
    figure, [axes] = _figure(0.85 + len(groups) * (0.14 + 0.19 * len(series)))
    height = 0.84 / len(series)
    for i, (label, role, values) in enumerate(series):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * height
        bars = axes.barh(places, [v or 0.0 for v in values], height * 0.86, color=COLOURS[role], label=label)
        axes.bar_label(bars, [number(v, form) for v in values], padding=3, color=COLOURS["ink"], fontsize=8.5)
    lines = [(place, mark) for place, mark in enumerate(marks or []) if mark is not None]
    for place, mark in lines:
        ends = (place - 0.46, place + 0.46)
        axes.vlines(mark, *ends, color=COLOURS["page"], linewidth=4)
        label = "teacher" if place == lines[0][0] else "_"
        axes.vlines(mark, *ends, color=COLOURS["ink"], linewidth=1.8, label=label)
    axes.set_yticks(range(len(groups)), groups)
    axes.set(xlabel=xlabel, ylim=(len(groups) - 0.5, -0.5))
    axes.margins(x=0.12)
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return _svg(figure, name)


def _figure(height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with `rows` axes below each other that share their x axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def _svg(figure: Figure, name: str) -> Markup:
    """The figure as inline SVG: scalable, with a legend, colours as CSS variables, ids unique on the page."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if len(labels) > 1:
        columns = max(1, min(len(labels), 70 // (max(map(len, labels)) + 6)))
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, handleheight=0.9)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    drawing = buffer.getvalue()
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
    return Markup(re.sub(r"<[^>]*>", _page_tag(name), drawing))


def _page_tag(name: str) -> Callable[[re.Match[str]], str]:
    """Rewrite one SVG tag for the page; text between tags, which may come from data, is never touched."""

    def rewrite(match: re.Match[str]) -> str:
        tag = match[0]
        if tag.startswith("<svg"):
            box = re.search(r'viewBox="[^"]*"', tag)
            return f'<svg {box[0] if box else ""} role="img">'
        tag = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", tag).replace("xlink:href", "href")
        for role, colour in COLOURS.items():
            tag = tag.replace(colour, f"var(--{role}, {colour})")
        return re.sub(r"(\d+(?:\.\d+)?px) [^;\"]*sans-serif", r"\1 sans-serif", tag)

    return rewrite
