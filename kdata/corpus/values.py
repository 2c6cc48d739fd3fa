"""Values of any type as text: ids, domains, sources and licenses may be numbers, dates, bytes or lists in a corpus."""

from __future__ import annotations

import datetime
import json
import math
from typing import Any

from kdata.format.records import RowError


def as_text(value: Any) -> str | None:
    """A value as text, the same in every run and of every file format; None for null and for NaN.

    Text stays as it is. Numbers, truth values, dates and UUIDs are written as Python prints them. Bytes are UTF-8 text, or
    else hexadecimal digits behind 0x. Lists and objects are JSON with sorted keys.
    """
    return _json(value) if isinstance(value, list | tuple | dict) else _scalar(value)


def text_of_column(value: Any, column: str) -> str | None:
    """A value that must be text: text, or bytes that hold UTF-8; None for null. Raises RowError for others."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RowError("not_text", f"column {column!r} holds bytes that are not UTF-8; store it as text") from error
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str):
        raise RowError("not_text", f"column {column!r} must hold text, not {type(value).__name__}")
    return checked_text(value, column)


def checked_text(text: str, column: str) -> str:
    """The text itself. Raises RowError where no file could hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = ascii(text[error.start])
        what = "half of a surrogate pair or a byte that is not UTF-8"
        raise RowError("not_text", f"column {column!r}, character {error.start}: {broken} is {what}") from error
    return text


def printable(text: str) -> str:
    """A text with a backslash escape for what cannot be encoded."""
    return text.encode("utf-8", "backslashreplace").decode()


def _scalar(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"0x{raw.hex()}"
    return str(value)


def _json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, sort_keys=True)


def plain(value: Any) -> Any:
    """What JSON can hold: dates, decimals and bytes inside a list or an object become text; NaN becomes null."""
    if isinstance(value, dict):
        return {str(_scalar(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _scalar(value)


def time_with_nanoseconds(value: datetime.datetime | datetime.time | datetime.timedelta, nanoseconds: int) -> Any:
    """A time of microseconds and the nanoseconds below them: the value itself where there are none, else its text."""
    if not nanoseconds:
        return value
    if isinstance(value, datetime.timedelta):
        whole, _, fraction = str(value).partition(".")
        return f"{whole}.{fraction or '000000'}{nanoseconds:03d}"
    text = (
        value.isoformat(sep=" ", timespec="microseconds")
        if isinstance(value, datetime.datetime)
        else value.isoformat(timespec="microseconds")
    )
    cut = text.index(".") + 7
    return f"{text[:cut]}{nanoseconds:03d}{text[cut:]}"
