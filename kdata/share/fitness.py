"""May this be shared? What `push` looks at before it publishes, what stops it, and what is recorded beside the copy.

    leakage    do the entries reveal a closed teacher's weights (`kdata audit`, on a sample), and are its draws by context
    personal   flags of personal data, in a sample of the texts (`kdata.hygiene.personal`)
    licenses   what the licenses of the texts and of the teacher say about sharing, by the table in terms.yaml
    secrets    keys and tokens, in all texts (`kdata.check.secret_texts`)

Each can be skipped by its name, and audit.json and the card say so. Cost does not grow with the dataset but for secrets (200
MB of text a second) and the licenses (a query over two columns): leakage reads AUDIT_TOKENS at most, personal PERSONAL_ROWS.
What a sample does not show may still be there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal, get_args

import yaml

from kdata.check.audit import audit, sample_of
from kdata.check.secret_texts import refuse_secrets
from kdata.errors import ConfigError, DataError, DependencyError, KdataError, nearest
from kdata.hygiene.personal import personal_of
from kdata.store.dataset import Dataset

Check = Literal["leakage", "personal", "licenses", "secrets"]
CHECKS: tuple[Check, ...] = get_args(Check)
Level = Literal["stop", "ask", "keep", "free", "skipped", "unknown"]
AUDIT_TOKENS = 500_000
PERSONAL_ROWS, PERSONAL_CHARACTERS = 1_000, 10_000
_LANGUAGE = re.compile(r"[a-z]{2,3}")


@dataclass(frozen=True)
class About:
    """What only the one who shares knows.

    Attributes:
        closed_teacher: the teacher's weights are not public, and shall not become so.
        teacher_license: its license, an id of the Hub such as apache-2.0 or llama3.1; None: not stated.
        languages: ISO 639 codes of the texts.
        skip: checks that are left out, of CHECKS.
        url: where the dataset will be; None: not known.
    """

    closed_teacher: bool = False
    teacher_license: str | None = None
    languages: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    url: str | None = None

    def __post_init__(self) -> None:
        for name in self.skip:
            if name not in CHECKS:
                raise ConfigError(
                    f"skip: there is no check {name!r}{nearest(name, list(CHECKS))}; there are {', '.join(CHECKS)}"
                )
        for code in self.languages:
            if not _LANGUAGE.fullmatch(code):
                raise ConfigError(
                    f"language {code!r} is no ISO 639 code; write two or three small letters, such as en or gsw"
                )
        if self.teacher_license is not None and not self.teacher_license.strip():
            raise ConfigError("the teacher's license is empty; name it, or leave it out")


@dataclass(frozen=True)
class Finding:
    """One result. level: stop refuses, ask and keep are for a person to heed, unknown could not be looked at."""

    check: Check
    level: Level
    what: str
    source: str | None = None


@dataclass(frozen=True)
class Fitness:
    """All results, with what the one who shares said."""

    about: About
    findings: list[Finding] = field(default_factory=list)

    @property
    def stops(self) -> list[Finding]:
        """What is against sharing."""
        return [finding for finding in self.findings if finding.level == "stop"]

    def as_dict(self) -> dict[str, Any]:
        """JSON values, as audit.json has them."""
        return {"about": asdict(self.about), "findings": [asdict(finding) for finding in self.findings]}


def fitness(dataset: Dataset, about: About) -> Fitness:
    """Look at everything that is not skipped.

    Raises:
        DataError: a text holds what looks like a secret.
    """
    looks = {"leakage": _leakage, "personal": _personal, "licenses": _licenses, "secrets": _secrets}
    findings: list[Finding] = []
    for check in CHECKS:
        if check in about.skip:
            findings.append(Finding(check, "skipped", "not looked at: whoever shared this skipped it"))
        else:
            findings += looks[check](dataset, about)
    return Fitness(about, findings)


def refuse_unfit(result: Fitness, place: str) -> None:
    """Raise DataError where something is against sharing; it names the check, the reason and how to go on."""
    if result.stops:
        listing = "\n".join(
            f"  {one.check}: {one.what}{f' ({one.source})' if one.source else ''}" for one in result.stops
        )
        names = " ".join(f"--skip {name}" for name in dict.fromkeys(one.check for one in result.stops))
        raise DataError(
            f"{place} was not shared:\n{listing}\nMend it, or go on with {names}, which is recorded in what is shared"
        )


# ------------------------------------------------------------------------------------------------------ leakage


def _leakage(dataset: Dataset, about: About) -> Iterator[Finding]:
    closed = about.closed_teacher or any(term.get("closed") for term in _terms_of_teacher(dataset, about))
    if not closed:
        yield Finding("leakage", "skipped", "not looked for: nobody said that the teacher's weights are closed")
        return
    parameters = dataset.info.codec.parameters
    if dataset.info.tail == "draws" and parameters.get("draws_by") != "context":
        yield Finding(
            "leakage",
            "stop",
            "draws depend on the whole text, so texts with a common beginning release more and more ids of one distribution; "
            "capture or reread with draws_by=context, or keep the kind topk",
        )
    if not dataset.num_rows:
        return
    sample = sample_of(dataset, AUDIT_TOKENS)
    part = f"{sample.num_rows:,} of {dataset.num_rows:,} rows" if sample.num_rows < dataset.num_rows else "all rows"
    try:
        result = audit([sample])
    except KdataError as error:
        yield Finding("leakage", "unknown", f"could not be looked for: {error}")
        return
    reasons = f" ({'; '.join(result.reasons)})" if result.reasons else ""
    level: Level = "stop" if result.verdict == "FAIL" else "ask" if result.verdict == "WARN" else "free"
    yield Finding("leakage", level, f"the teacher's output projection, {part}: {result.verdict}{reasons}")


# ----------------------------------------------------------------------------------------------------- personal


def _personal(dataset: Dataset, about: About) -> Iterator[Finding]:
    try:
        personal_of("1")
    except DependencyError as error:
        yield Finding("personal", "unknown", f"not looked at: {error}")
        return
    schema = dataset.sql("select * from rows limit 0").schema
    columns = [name for name in ("text", "messages", "prompt") if name in schema.names]
    cut = ", ".join(f"left({column}, {PERSONAL_CHARACTERS}) as {column}" for column in columns)
    query = f"select id, {cut} from rows order by hash(id), id limit {PERSONAL_ROWS}"
    rows, kinds, marked = dataset.sql(query).to_pylist(), Counter[str](), 0
    for row in rows:
        own = {span.kind for column in columns if row[column] for span in personal_of(row[column])}
        kinds.update(own)
        marked += bool(own)
    part = f"{len(rows):,} of {dataset.num_rows:,} rows, the first {PERSONAL_CHARACTERS:,} characters of each text"
    if not marked:
        yield Finding("personal", "free", f"none found in {part}")
        return
    listing = ", ".join(f"{kind} in {count:,}" for kind, count in kinds.most_common())
    yield Finding("personal", "ask", f"{marked:,} rows hold some ({listing}), of {part}; `kdata hygiene` finds all")


# ----------------------------------------------------------------------------------------------------- licenses


@cache
def terms() -> dict[str, list[dict[str, Any]]]:
    """terms.yaml: `text` and `teacher`, each a list of ids, names, verdict, why, source and seen."""
    table: dict[str, list[dict[str, Any]]] = yaml.safe_load(
        resources.files("kdata.share").joinpath("terms.yaml").read_text("utf-8")
    )
    return table


def license_id(stated: str) -> str:
    """A license as the Hub writes it: small letters, hyphens."""
    return re.sub(r"[\s_]+", "-", stated.strip().lower())


def _term(kind: Literal["text", "teacher"], stated: str) -> dict[str, Any] | None:
    return next((term for term in terms()[kind] if license_id(stated) in term["ids"]), None)


def _teachers(dataset: Dataset) -> list[str]:
    """Names of the teacher, or of those that were combined."""
    members = dataset.info.teacher.members
    return [dataset.info.teacher.model] if members is None else [member.teacher.model for member in members]


def _terms_of_teacher(dataset: Dataset, about: About) -> list[dict[str, Any]]:
    """What applies to the teachers: by the stated license, or by their names."""
    if about.teacher_license is not None:
        stated = _term("teacher", about.teacher_license)
        return [] if stated is None else [stated]
    named = [term for term in terms()["teacher"] if "names" in term]
    return [t for t in named if any(re.search(t["names"], name, re.IGNORECASE) for name in _teachers(dataset))]


def _licenses(dataset: Dataset, about: About) -> Iterator[Finding]:
    query = "select license, count(*) as n from rows group by 1 order by n desc, license nulls last"
    for row in dataset.sql(query).to_pylist():
        yield _of_text(row["license"], row["n"])
    found = _terms_of_teacher(dataset, about)
    names = ", ".join(_teachers(dataset))
    for term in found:
        how = f"license {about.teacher_license}" if about.teacher_license else "by its name"
        yield Finding("licenses", term["verdict"], f"teacher {names} ({how}): {term['why']}", term["source"])
    if not found:
        stated = (
            f"{about.teacher_license} is not in the table" if about.teacher_license else "its license is not stated"
        )
        yield Finding("licenses", "ask", f"teacher {names}: {stated}; read what it says about outputs, or ask a lawyer")


def _of_text(stated: str | None, rows: int) -> Finding:
    if stated is None:
        return Finding(
            "licenses", "ask", f"{rows:,} rows: no license is stated for the text; find out, or ask a lawyer"
        )
    term = _term("text", stated)
    if term is None:
        return Finding("licenses", "ask", f"{rows:,} rows: {stated!r} is not in the table; read it, or ask a lawyer")
    return Finding(
        "licenses", term["verdict"], f"{rows:,} rows under {license_id(stated)}: {term['why']}", term["source"]
    )


def _secrets(dataset: Dataset, about: About) -> Iterator[Finding]:
    refuse_secrets(dataset)
    yield Finding("secrets", "free", "no key or token of a known form in any text")
