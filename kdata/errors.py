"""Every error that kdata raises for its user. Each message names a cause and a remedy.

Each class also inherits from the matching class of the standard library, so `except ValueError` works too. Each can be
pickled, because Ray sends it between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' where something close is known, else ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class KdataError(Exception):
    """Base of every error below. The command line prints it on one line, without a traceback."""


class ConfigError(KdataError, ValueError):
    """A setting, flag or recipe key is wrong."""


class DataError(KdataError, ValueError):
    """Input rows cannot be used as they are: empty corpus, missing column, duplicate id."""


class TooLongError(DataError):
    """A text does not fit the teacher's context, and the settings say to refuse such texts."""


class ShapeError(KdataError, ValueError):
    """Arrays disagree in shape, dtype or range."""


class OutOfRangeError(KdataError, IndexError):
    """There is no such row, or no such position in a row."""


class FormatError(KdataError, ValueError):
    """This kdata cannot read the dataset: its format is newer, or its codec is unknown."""


class CorruptError(KdataError, OSError):
    """A file is damaged or missing: it is not what was committed."""


class MismatchError(KdataError, ValueError):
    """Two things that must agree do not: settings on resume, tokenizers, vocabularies, digests."""


class StorageError(KdataError, OSError):
    """The disk refused: full, read-only, no permission."""


class MissingError(KdataError, FileNotFoundError):
    """A file, dataset, plan or sidecar does not exist."""


class DependencyError(KdataError, ImportError):
    """A package is not installed; the message names the extra that brings it."""


class TeacherError(KdataError, RuntimeError):
    """A teacher could not be loaded, or its output is not a distribution."""


class DistributionError(TeacherError):
    """A teacher's numbers for one sequence are no distribution: NaN, infinite, or probability 0 for a token of it."""


class UnreachableError(KdataError, ConnectionError):
    """A served teacher did not answer in time. No row is at fault; the run can continue later."""


class QueryError(KdataError, ValueError):
    """DuckDB refused a query."""


class TrainingError(KdataError, ArithmeticError):
    """The loss is not finite; the message names the step and the rows."""


def settings_difference(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """Return one line per setting that differs, 'key: before -> after', nested keys dotted; '' when equal."""
    lines: list[str] = []

    def walk(a: object, b: object, path: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                walk(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
        elif a != b:
            lines.append(f"  {path}: {a!r} -> {b!r}")

    walk(before, after, "")
    return "\n".join(lines)
