"""The plots of a report: matplotlib figures as inline SVG. The same run gives the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdata.errors import QueryError
from kdata.format.files import without_hidden
from kdata.format.json_text import parse_json
from kdata.observe.style import COLOURS, missing_signs
from kdata.observe.text import number, one_line
from kdata.selection.plan import Plan
from kdata.store.dataset import Dataset

BASELINE = "ce"  # the student that never saw the teacher's distributions
MAX_PANELS = 8  # domains in a plot; tables show all
DOMAIN_COLOURS = (
    "everything",
    "ce",
    "plan",
    "x1",
    "x2",
    "x3",
    "capture",
    "generate",
)  # roles, one for each panel's line
SMOOTHED = 5  # logged steps per point of a loss curve


Students = dict[str, dict[str, Any]]  # by name, as `students` of results.json
WIDTH = 5.4  # inches; 390 units, about a phone's width, so that its text is readable there


@dataclass(frozen=True)
class Plot:
    """A figure with its caption, or the reason why there is none."""

    title: str
    caption: str
    svg: Markup | None = None


def finite(value: object) -> float | None:
    """The value where it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def measure(student: dict[str, Any], key: str, domain: str | None = None) -> float | None:
    """One measured number of a student, overall or of one domain; None where it was not measured."""
    scope = student.get("overall") if domain is None else student.get("domains", {}).get(domain)
    return finite((scope or {}).get(key))


def label_of(name: str, student: dict[str, Any]) -> str:
    """The name of a student in tables and plots."""
    return one_line(student.get("label") or name, 40)


def domains_of(students: Students) -> list[str]:
    """Domains that any student was measured on, in the order in which they first occur."""
    return list(dict.fromkeys(d for s in students.values() for d in s.get("domains") or {}))


def first_of(students: Students, key: str, domain: str | None) -> float | None:
    return next((v for s in students.values() if (v := measure(s, key, domain)) is not None), None)


def plans_of(dataset: Dataset | None) -> list[Plan]:
    return [Plan.load(p) for p in without_hidden(dataset.path, "plans/*.json")] if dataset else []


def make_plots(run: Path, students: Students, dataset: Dataset | None) -> dict[str, Plot]:
    """All figures of the page, by name."""
    mass = "Probability that the stored entries cover, mean of a sequence."
    if dataset is not None and dataset.info.tail == "ghost":
        mass += " The rest is stored as one exact number."
    nll = "How surprised the teacher was by each sequence: low means easy text, or text that the teacher wrote."
    logs = logs_of(run, students)
    mixture, difference = _mixture(logs, students), _difference(dataset)
    return {
        "curves": _curves(logs, students),
        **({} if mixture is None else {"mixture": mixture}),
        "calibration": _calibration(students),
        "domains": _domains(students),
        **({} if difference is None else {"difference": difference}),
        "shares": _shares(dataset),
        "kept_mass": _rows(
            dataset, "kept_mass", "Stored probability", "probability of the stored entries, mean of a sequence", mass
        ),
        "nll": _rows(dataset, "nll", "The teacher's NLL", "teacher's NLL, nats per target token", nll),
    }


def palette(students: Students) -> dict[str, str]:
    """The color role of each student; the three of the demo have fixed ones."""
    others = [n for n in students if n not in (BASELINE, "everything", "plan")]
    return {n: f"x{others.index(n) % 3 + 1}" if n in others else n for n in students}


def logs_of(run: Path, students: Students) -> dict[str, Path]:
    """The metrics.jsonl of each student, in results.json or not. Paths outside the run are ignored."""
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
    """Lines of a metrics file, up to the first one that a kill left incomplete."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            values = parse_json(line)
        except ValueError:
            return
        if isinstance(values, dict):
            yield values


def _curves(logs: dict[str, Path], students: Students) -> Plot:
    title = "Loss while training"
    steps = {name: lines for name, path in logs.items() if (lines := list(_steps(path)))}
    if not steps:
        return Plot(title, "Training has not run: there is no metrics.jsonl.")
    shared = set.intersection(*(set(lines[-1]) for lines in steps.values()))
    key = next((k for k in ("cross_entropy", "forward_kl") if k in shared), "loss")
    across = "tokens" if "tokens" in shared else "step"
    smooth = min(map(len, steps.values())) >= 4 * SMOOTHED
    figure, [axes] = _figure(3.1)
    for name, role in palette({n: {} for n in steps}).items():
        points = [(s[across], s[key]) for s in steps[name] if None not in (finite(s.get(across)), finite(s.get(key)))]
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
    caption = f"Thick line: mean of the last {SMOOTHED} logged steps. " if smooth else ""
    caption += "Measured on each student's own training text"
    same = (
        ", the same objective for all."
        if key != "loss"
        else "; each minimizes its own objective, so the heights cannot be compared."
    )
    return Plot(title, caption + same, _svg(figure, "curves"))


def _mixture(logs: dict[str, Path], students: Students) -> Plot | None:
    """Domain weights over training, one panel per student; None where no student had a mixture."""
    by_student: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for name, path in logs.items():
        lines = [(finite(s.get("step")), _weights(s.get("mixture"))) for s in _steps(path)]
        periods = [(step - 1, weights) for step, weights in lines if step is not None and weights]
        if periods:
            ends = max(step for step, _ in lines if step is not None)
            by_student[name] = [*periods, (ends, periods[-1][1])]
    if not by_student:
        return None
    shown = list(by_student)[:MAX_PANELS]
    domains = list(dict.fromkeys(d for name in shown for _, weights in by_student[name] for d in weights))
    figure, panels = _figure(0.75 + 1.5 * len(shown), len(shown))
    for axes, name in zip(panels, shown, strict=True):
        steps = [step for step, _ in by_student[name]]
        for domain, role in zip(domains[:MAX_PANELS], DOMAIN_COLOURS, strict=False):
            shares = [100 * weights.get(domain, 0.0) for _, weights in by_student[name]]
            label = one_line(domain, 20)
            axes.step(steps, shares, where="post", color=COLOURS[role], linewidth=1.6, label=label)
        axes.set_title(label_of(name, students.get(name, {})), loc="left", pad=3)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
    panels[-1].set_xlabel("step")
    figure.supylabel("share of tokens, %", fontsize=9.5, color=COLOURS["muted"])
    caption = "What share of its training tokens each domain had, from update to update."
    return Plot("Domain weights while training", caption + _left_out(len(domains)), _svg(figure, "mixture"))


def _weights(mixture: object) -> dict[str, float]:
    """The finite weights in a metrics line's `mixture`; empty where there are none."""
    weights = mixture.get("weights") if isinstance(mixture, dict) else None
    values = {str(d): finite(w) for d, w in weights.items()} if isinstance(weights, dict) else {}
    return {d: w for d, w in values.items() if w is not None}


def _domains(students: Students) -> Plot:
    title = "Loss on unseen text, by domain"
    measured = {n: s for n, s in students.items() if measure(s, "nll") is not None or domains_of({n: s})}
    if not measured:
        return Plot(title, "Evaluation has not run: no student was measured.")
    domains = [*domains_of(measured)[:MAX_PANELS], None]
    roles = palette(students)
    series = [(label_of(n, s), roles[n], [measure(s, "nll", d) for d in domains]) for n, s in measured.items()]
    floor = [first_of(measured, "teacher_nll", d) for d in domains]
    names = ["all domains" if d is None else one_line(d, 20) for d in domains]
    svg = _bars("domains", names, series, "loss on unseen text, nats per token (lower is better)", ".3f", floor)
    caption = "The black line is the teacher's own loss on the same text: a perfect copy of the teacher would reach it."
    return Plot(title, caption + _left_out(len(domains_of(measured))), svg)


def _calibration(students: Students) -> Plot:
    """Accuracy against confidence of the most probable token, for the students and, where known, the teacher."""
    title = "Calibration: how often the first choice is right"
    measured = {n: c for n, s in students.items() if isinstance(c := s.get("calibration"), dict)}
    lines = [(label_of(n, students[n]), palette(students)[n], _bins(c.get("student"))) for n, c in measured.items()]
    teacher = next((bins for c in measured.values() if (bins := _bins(c.get("teacher")))), [])
    if not any(bins for _, _, bins in lines):
        return Plot(title, "No calibration was recorded." if students else "Evaluation has not run.")
    figure, [axes] = _figure(3.4)
    axes.plot([0, 1], [0, 1], color=COLOURS["rest"], linewidth=1.2, label="calibrated")
    for label, role, bins in [*lines, ("teacher", "ink", teacher)]:
        if bins:
            x, y = np.array(bins).T
            axes.plot(x, y, color=COLOURS[role], linewidth=1.6, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="probability of the first choice", ylabel="share of positions where it is right")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(axis="y")
    errors = [
        f"{label_of(n, students[n])} {100 * e:.2f} %"
        for n in measured
        if (e := measure(students[n], "ece")) is not None
    ]
    floor = first_of(students, "teacher_ece", None)
    errors += [] if floor is None else [f"teacher {100 * floor:.2f} %"]
    return Plot(
        title, f"Below the line: too sure. Calibration error (ECE): {', '.join(errors)}.", _svg(figure, "calibration")
    )


def _bins(recorded: object) -> list[tuple[float, float]]:
    """(confidence, accuracy) of the bins in results.json, malformed ones left out."""
    bins = [b for b in recorded if isinstance(b, dict)] if isinstance(recorded, list) else []
    pairs = [(finite(b.get("confidence")), finite(b.get("accuracy"))) for b in bins]
    return [(c, a) for c, a in pairs if c is not None and a is not None]


def _shares(dataset: Dataset | None) -> Plot:
    title = "Share of tokens by domain"
    plans = plans_of(dataset)[:3]
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
    stale = [p.info.name for p in plans if p.dataset_digest != dataset.content_digest]
    set_by = {p.info.name: p.info.parameters.get("weights") is not None for p in plans}
    caption = "How selection changed the mixture of domains."
    if not any(set_by.values()):
        caption += " No weights were set: sequences were selected one by one."
    elif weighed := [one_line(name, 20) for name, by_weight in set_by.items() if by_weight]:
        caption += f" Weights were set for: {', '.join(weighed)}."
    caption += f" Computed for an earlier state of the dataset: {', '.join(stale)}." if stale else ""
    return Plot(title, caption + _left_out(len(domains)), _bars("shares", names, series, "share of tokens, %", ".1f"))


def _difference(dataset: Dataset | None) -> Plot | None:
    """None where rows were chosen in another way, which needs no score."""
    title = "Where the teacher knows more than a small model"
    plans = plans_of(dataset)
    plan = next((p for p in plans if finite(p.info.parameters.get("threshold")) is not None), None)
    score = str(plan.info.parameters.get("score", "ref")) if plan else "ref"
    if dataset is not None and plans and plan is None and not (dataset.path / "scores" / score).is_dir():
        return None
    if dataset is None or not (dataset.path / "scores" / score).is_dir():
        return Plot(title, f"Scoring has not run: the dataset has no score “{one_line(score)}”.")
    try:
        quoted = score.replace('"', '""')
        own = plan.info.name.replace('"', '""') if plan else ""
        chosen = f'left join plans."{own}" as p using (id)' if plan else ""
        table = dataset.sql(
            f"select domain, s.nll - r.nll as gap, {'p.id is not null' if plan else 'false'} as kept "
            f'from rows as r join scores."{quoted}" as s using (id) {chosen} where gap is not null order by id'
        )
    except QueryError as error:
        return Plot(title, f"Not shown: {one_line(error)}")
    values, kept = table["gap"].to_numpy(), np.array(table["kept"].to_pylist(), bool)
    cut = float(plan.info.parameters["threshold"]) if plan else None
    kinds = [("sequences", "capture", np.full(len(values), True))]
    if plan and cut is not None:
        kinds = [
            ("left out", "rest", ~kept),
            (f"kept by “{one_line(plan.info.name, 20)}”", "plan", kept),
        ]
    label = f"NLL of {score} − NLL of the teacher, nats per target token"
    caption = f"{len(values):,} of {dataset.num_rows:,} sequences are scored. To the right: text that a small "
    caption += "model has not learned yet"
    caption += f"; difference sampling kept everything from {cut:.3f} on." if cut is not None else "."
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
    """Horizontal bars from zero, one group per domain, values at their ends; a mark crosses its whole group."""
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
    """A figure of the page's width: `rows` axes below each other with a shared x axis."""
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
    with matplotlib.rc_context({"svg.hashsalt": name}), missing_signs():  # the browser has them
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
