"""Every error that kdata raises for its user. Each message names a cause and a remedy, and no password and no token.

Each class also inherits from the matching class of the standard library, so `except ValueError` works too. Each can be
pickled, because Ray sends it between processes.

Every message passes through `redacted`. What a run records (settings, dataset.json, plans, reports) is not changed behind the
user's back: a setting that holds a secret is refused where it enters, in a message that does not repeat it (`has_secret`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

HIDDEN = "***"
# Names of environment variables that hold secrets: HF_TOKEN, OPENAI_API_KEY, AWS_SECRET_ACCESS_KEY, DB_PASSWORD.
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|KEY|PAT)(_|$)")
_NO_SECRET = re.compile(r"(PATH|FILE|DIR|NAME|URL|HOST|PORT)$")
_LEAST = 8  # characters of a value: a shorter one occurs in ordinary text
_LEAST_IN_SETTINGS = 16  # a setting that holds a shorter value is not refused for it: API_KEY=disabled
# Tokens with a form of their own: Hugging Face, OpenAI and the like, GitHub, GitLab, Slack, AWS, Google, JSON web tokens.
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|A[KS]IA[0-9A-Z]{16}"
    r"|AIza[0-9A-Za-z_-]{30,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)
# One slash too: a URL that became a path has lost the other.
_USER = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s'\"?#@]+@")
_PASSWORD = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/\s'\"?#@:]*:[^/\s'\"?#@]+@")
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:token|key|secret|password|passwd|pwd|signature|credential)[\w.-]*|sig|auth)=)[^&;\s'\"#)]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b(Bearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_of_process: set[str] = set()


def never_show(secret: str) -> None:
    """Hide this text in every message of this process from now on."""
    if secret:
        _of_process.add(secret)


def _known() -> Iterator[str]:
    """The secrets of this process: those that were named to `never_show`, and those in the environment."""
    yield from _of_process
    for name, value in os.environ.items():
        if len(value) >= _LEAST and _is_secret(name):
            yield value


def _is_secret(name: str) -> bool:
    return bool(_SECRET_NAME.search(name.upper()) and not _NO_SECRET.search(name.upper()))


def public_environment() -> dict[str, str]:
    """The environment's variables without those that hold secrets, for a process that does not need them."""
    return {name: value for name, value in os.environ.items() if not _is_secret(name)}


def redacted(text: str) -> str:
    """Text for a person or a log, in which every password and token is ***."""
    for secret in sorted(_known(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _USER.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY.sub(rf"\1{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, _HEADER.sub(rf"\1{HIDDEN}", text))


def has_secret(text: str) -> bool:
    """Whether a setting holds a secret: a known token's form, a URL with a password or with a token in its query.

    Values of the environment's variables count too.
    """
    return bool(
        _PASSWORD.search(text)
        or ("://" in text and _QUERY.search(text))
        or _TOKEN.search(text)
        or any(secret in text for secret in _known() if len(secret) >= _LEAST_IN_SETTINGS)
    )


def secret_path(value: Any, path: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The keys to the first text of a setting that holds a secret; None where there is none."""
    if isinstance(value, str):
        return path if has_secret(value) else None
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    else:
        return None
    for key, item in items:
        where = path if isinstance(key, str) and has_secret(key) else (*path, str(key))
        if len(where) == len(path) or (inner := secret_path(item, where)) is not None:
            return where if len(where) == len(path) else inner
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' where something close is known, else ''."""
    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class KdataError(Exception):
    """Base of every error below. The command line prints it on one line, without a traceback.

    A password or token in its message is replaced by ***.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(arg) if isinstance(arg, str) else arg for arg in args))


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


def causes(error: BaseException, but: BaseException | None = None) -> Iterator[BaseException]:
    """The error and those that led to it, but for one and what led to that."""
    seen = {id(but)}
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__, getattr(one, "os_error", None)]
