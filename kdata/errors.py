"""Every error that kdata raises for its user: one tree, each with a cause and a remedy in its message.

Each class also inherits the standard library's cousin, so `except ValueError` works for a caller who knows nothing
of kdata, and each is picklable (Ray carries it between processes).
"""

from __future__ import annotations

import difflib


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' where something close is known, else ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class KdataError(Exception):
    """Anything that kdata refuses. The command line prints it without a traceback and exits with status 1."""


class ConfigError(KdataError, ValueError):
    """A setting, flag or recipe key is wrong."""


class DataError(KdataError, ValueError):
    """Input rows cannot be used as they are: empty corpus, missing column, duplicate id."""


class TooLongError(DataError):
    """A text does not fit the teacher's context, and the stated rule is to refuse."""


class ShapeError(KdataError, ValueError):
    """Arrays disagree in shape, dtype or range."""


class OutOfRangeError(KdataError, IndexError):
    """A row, or a position in a row, that does not exist was asked for."""


class FormatError(KdataError, ValueError):
    """A dataset was written by a version, or in a way, that this kdata does not read."""


class CorruptError(KdataError, OSError):
    """Bytes on disk are not those that were committed."""


class MismatchError(KdataError, ValueError):
    """Two things that must agree do not: settings on resume, tokenizers, vocabularies, fingerprints."""


class StorageError(KdataError, OSError):
    """The disk refused: full, read-only, no permission."""


class MissingError(KdataError, FileNotFoundError):
    """A file, dataset, plan or sidecar that was named does not exist."""


class DependencyError(KdataError, ImportError):
    """A stage needs a package that is not installed; the message names the extra."""


class TeacherError(KdataError, RuntimeError):
    """A teacher could not be loaded, or returned something that cannot be a distribution."""


class UnreachableError(KdataError, ConnectionError):
    """A served teacher does not answer, and was waited for. No row is at fault; the run can go on later."""


class QueryError(KdataError, ValueError):
    """DuckDB refused a query."""


class TrainingError(KdataError, ArithmeticError):
    """Training met a non-finite loss; the message names the step and the rows."""


def settings_difference(before: dict, after: dict) -> str:
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
