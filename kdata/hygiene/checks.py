"""The checks, and their columns for the texts of one unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from kdata.config import Strict
from kdata.errors import DependencyError
from kdata.hygiene import duplicates, overlap, quality
from kdata.hygiene.duplicates import Sketch, signatures, sketch
from kdata.hygiene.language import language_of
from kdata.hygiene.overlap import EvaluationSet, open_set, overlap_of, set_digest
from kdata.hygiene.personal import KINDS, MOST_SPANS, personal_of
from kdata.hygiene.quality import quality_of
from kdata.hygiene.words import hashed, normal_form, words_of
from kdata.store.queryable import NAME

Check = Literal["duplicates", "overlap", "language", "quality", "personal"]
CHECKS: tuple[Check, ...] = ("duplicates", "overlap", "language", "quality", "personal")
# Of the numbers of a check: raised where a text would get others.
VERSIONS: dict[Check, int] = {"duplicates": 4, "overlap": 4, "language": 2, "quality": 4, "personal": 3}

SPAN = pa.struct([("kind", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
LANGUAGE = {
    "code": (
        "string",
        "Language, ISO 639-1, of the first 500 characters (zxx: no language); null with fewer than ten letters.",
    ),
    "confidence": ("float32", "The model's probability of it, in [0, 1]."),
}
PERSONAL = {
    "spans": ("spans", "Where: kind, start and end in characters of the text; at most 1,000."),
    "total": ("int32", "Spans of every kind."),
    **{kind: ("int32", f"Spans of kind {kind}.") for kind in KINDS},
}
# What a check takes beside the core: packages that make its numbers, by the names of their distributions.
PACKAGES: dict[str, tuple[str, ...]] = {
    "duplicates": ("rensa",),
    "overlap": (),
    "language": ("py3langid",),
    "quality": (),
    "personal": ("google-re2", "phonenumbers"),
}
TOGETHER = "hygiene"  # the extra that brings them


class HygieneConfig(Strict):
    """Which checks, and their settings."""

    checks: list[Check] = Field(
        [],
        description="Checks to do: duplicates, overlap, language, quality, personal; empty: all of them, overlap where a set "
        "is named.",
    )
    overlap: dict[str, str] = Field(
        {}, description="Evaluation sets: name -> file (JSON, Parquet, CSV) whose rows are its items."
    )
    ngram: int | None = Field(
        None,
        ge=1,
        le=50,
        description="Words of a run that overlap looks for; null: 8 to 13, by the lengths of a set's items.",
    )
    jaccard: float = Field(
        0.8, ge=0.5, le=1, description="Least Jaccard similarity of near duplicates, of their runs of 5 words."
    )
    phone_region: str | None = Field(
        None,
        pattern=r"^[A-Z]{2}$",
        description="Country (DE, US, ...) whose phone numbers count without a country code, too; null: only those with one.",
    )
    prefix: str = Field(
        "", pattern=r"^([A-Za-z][A-Za-z0-9_]*)?$", description="Goes before the names of the scores of a dataset."
    )
    workers: int = Field(
        0,
        ge=0,
        description="Processes; 0: one for each core. For more than 1 a program of your own needs "
        '`if __name__ == "__main__":`.',
    )

    @field_validator("overlap")
    @classmethod
    def _names(cls, sets: dict[str, str]) -> dict[str, str]:
        for name in sets:
            if NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} is no name of an evaluation set; use letters, digits and _, a letter first")
        if len({name.lower() for name in sets}) < len(sets):
            raise ValueError("two evaluation sets differ in case alone, and SQL ignores case; rename one")
        return sets

    @field_validator("phone_region")
    @classmethod
    def _region(cls, region: str | None) -> str | None:
        if region is not None and find_spec("phonenumbers") is not None:
            from phonenumbers import SUPPORTED_REGIONS

            if region not in SUPPORTED_REGIONS:
                raise ValueError(f"{region!r} is no country with phone numbers; write for instance DE, GB or US")
        return region

    @model_validator(mode="after")
    def _sets(self) -> HygieneConfig:
        if "overlap" in self.checks and not self.overlap:
            raise ValueError("the check overlap needs a set: --set overlap.NAME=FILE")
        if self.checks and self.overlap and "overlap" not in self.checks:
            raise ValueError("checks leaves overlap out, so no set of it is searched for; add --checks overlap")
        if len(set(self.checks)) < len(self.checks):
            raise ValueError("checks names one twice")
        return self

    @property
    def chosen(self) -> list[Check]:
        """The checks to do, in the order of CHECKS."""
        wanted = self.checks or [check for check in CHECKS if check != "overlap" or self.overlap]
        return [check for check in CHECKS if check in wanted]

    def settings(self, check: Check) -> dict[str, Any]:
        """What determines the numbers of a check: settings, digests of sets, versions of packages.

        Raises:
            DependencyError: a package is not installed.
            MissingError, ConfigError, DataError: a set cannot be read.
        """
        own: dict[str, Any] = {"check": check, "version": VERSIONS[check]}
        if check == "duplicates":
            own |= {"jaccard": self.jaccard}
        elif check == "overlap":
            sets = {name: set_digest(Path(path)) for name, path in sorted(self.overlap.items())}
            own |= {"sets": sets, "ngram": self.ngram}
        elif check == "personal":
            own |= {"phone_region": self.phone_region}
        return {**own, "packages": {package: _installed(package, check) for package in PACKAGES[check]}}

    def columns(self, check: Check) -> dict[str, tuple[str, str]]:
        """Columns of a check: name, type and description."""
        if check == "overlap":
            columns = overlap.COLUMNS.items()
            return {f"{name}_{column}": about for name in sorted(self.overlap) for column, about in columns}
        every = {
            "duplicates": duplicates.COLUMNS,
            "quality": quality.COLUMNS,
            "language": LANGUAGE,
            "personal": PERSONAL,
        }
        return every[check]

    def arrow_schema(self, check: Check) -> pa.Schema:
        """Arrow's types of these columns."""
        kinds = {"spans": pa.list_(SPAN)}
        return pa.schema([(n, kinds.get(k) or pa.type_for_alias(k)) for n, (k, _) in self.columns(check).items()])


def _installed(package: str, check: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise DependencyError(f"the check {check!r} needs {package}: pip install 'kdata[{TOGETHER}]'") from error


@dataclass(frozen=True)
class Checked:
    """What the checks made of some texts.

    Attributes:
        columns: for each check but duplicates a struct array with its columns, null where there is no text.
        chars: [N], characters; None where there is no text.
        sketches: for duplicates; empty where they are not looked for. signatures: theirs, uint32 [N, NUM_HASHES].
    """

    columns: dict[Check, pa.StructArray]
    chars: list[int | None]
    sketches: list[Sketch]
    signatures: np.ndarray


def check_texts(texts: Sequence[str | None], config: HygieneConfig) -> Checked:
    """Do the checks on some texts. A row without a text has null in every column, and is no duplicate of another."""
    chosen = config.chosen
    values: dict[Check, list[dict[str, Any] | None]] = {check: [] for check in chosen if check != "duplicates"}
    sketches: list[Sketch] = []
    sets = _sets(tuple(sorted(config.overlap.items())), config.ngram) if "overlap" in chosen else ()
    for text in texts:
        own = _values(text or "", chosen, sets, config, sketches)
        for check, column in values.items():
            column.append(None if text is None else own[check])
    columns: dict[Check, pa.StructArray] = {
        check: pa.array(column, pa.struct(list(config.arrow_schema(check)))) for check, column in values.items()
    }
    chars = [None if text is None else len(text) for text in texts]
    return Checked(columns, chars, sketches, signatures([one.shingles for one in sketches]))


def _values(
    text: str, chosen: list[Check], sets: tuple[EvaluationSet, ...], config: HygieneConfig, sketches: list[Sketch]
) -> dict[str, dict[str, Any]]:
    """The values of each check but duplicates, whose sketch is added to `sketches`."""
    normal = normal_form(text)
    words = words_of(normal)
    words_W, chars_W = hashed(words)
    own: dict[str, dict[str, Any]] = {}
    for check in chosen:
        if check == "duplicates":
            sketches.append(sketch(normal, words_W))
        elif check == "overlap":
            own[check] = {key: value for one in sets for key, value in overlap_of(words, words_W, one).items()}
        elif check == "language":
            own[check] = dict(zip(LANGUAGE, language_of(text), strict=True))
        elif check == "quality":
            own[check] = quality_of(text, words_W, chars_W)
        else:
            spans = personal_of(text, config.phone_region)
            counts = Counter(span.kind for span in spans)
            listed = [span._asdict() for span in spans[:MOST_SPANS]]
            own[check] = {"spans": listed, "total": len(spans), **{kind: counts[kind] for kind in KINDS}}
    return own


@cache
def _sets(sets: tuple[tuple[str, str], ...], n: int | None) -> tuple[EvaluationSet, ...]:
    return tuple(open_set(name, Path(path), n) for name, path in sets)


def sets_of(config: HygieneConfig) -> tuple[EvaluationSet, ...]:
    """The evaluation sets, in the order of their names."""
    return _sets(tuple(sorted(config.overlap.items())), config.ngram)
