"""JSON that somebody else may have written: one reader for documents and one for rows, both with limits.

A document (dataset.json, a manifest line, a plan, settings of a model) has unique keys, finite numbers and integers of at
most `MAX_DIGITS` digits. A row of a corpus may have what other tools write: NaN, and the last of equal keys counts. Both are
limited in size and in depth, so that nothing that walks over the values later can exhaust the stack.

Speed: a document takes 1.4 times as long as `json.loads`; a row as long, unless it has more than `MAX_DEPTH` brackets, then
1.3 times.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr

from kdata.errors import DataError
from kdata.format.plain import open_plain

MAX_DEPTH = 64  # lists and objects inside of each other; what people write has ten
MAX_DIGITS = 25  # of an integer; 64 bits have 20
MAX_DOCUMENT_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 512 << 20  # tokenizer.json of a vocabulary of 262,144 tokens has 33 MB
MAX_ROW_CHARACTERS = 256 << 20
MAX_LINE_CHARACTERS = 1 << 30  # what is passed over of a line that is no row
MAX_PIECE_CHARACTERS = 1 << 20


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name}, which is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is repeated")
    return values


_DOCUMENT = json.JSONDecoder(parse_int=_integer, parse_constant=_no_constant, object_pairs_hook=_unique)
_MODEL_FILE = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_unique)


def parse_json(content: bytes | str, limit: int = MAX_DOCUMENT_BYTES, *, finite: bool = True) -> Any:
    """The value of a JSON document in UTF-8.

    Args:
        finite: refuse NaN and Infinity. (A model's config.json may have them: Mamba 2's time_step_limit.)
    Raises:
        DataError: it is not JSON (it is a ValueError too), or beyond a limit of this module. The message says what is wrong,
            without the place.
    """
    if len(content) > limit:
        raise DataError(f"it has more than {limit:,} bytes")
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = (_DOCUMENT if finite else _MODEL_FILE).decode(text)
        if "\\ud" in text or "\\uD" in text:  # half of a character, which no file and no terminal can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise DataError(f"lists and objects lie more than {MAX_DEPTH} deep inside of each other") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    check_depth(value, text)
    return value


def parse_row(content: bytes | str) -> Any:
    """The value of a JSON text in UTF-8 that is a row of data. Raises DataError as `parse_json`."""
    if len(content) > MAX_ROW_CHARACTERS:
        raise DataError(f"it has more than {MAX_ROW_CHARACTERS:,} characters")
    try:
        if isinstance(content, bytes):
            content = content.decode("utf-8-sig", "surrogatepass")  # in UTF-16 a line's end is half of a character
        value = json.loads(content)
    except RecursionError as error:
        raise DataError(f"lists and objects lie more than {MAX_DEPTH} deep inside of each other") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    check_depth(value, content)
    return value


def row_lines(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Lines of rows, one at a time; of one that is longer than a row may be its beginning, which `parse_row` refuses.

    Raises DataError for a line that goes on for `MAX_LINE_CHARACTERS`, as the hole of a sparse file does.
    """
    while line := file.readline(MAX_ROW_CHARACTERS + 1):
        yield line
        passed = len(line)
        while len(line) > MAX_PIECE_CHARACTERS and line[-1:] not in ("\n", b"\n"):
            line = file.readline(MAX_PIECE_CHARACTERS + 1)
            passed += len(line)
            if passed > MAX_LINE_CHARACTERS:
                raise DataError(f"a line has more than {MAX_LINE_CHARACTERS:,} characters; is the file whole?")


def parse_object(content: bytes | str, limit: int = MAX_DOCUMENT_BYTES, *, finite: bool = True) -> dict[str, Any]:
    """`parse_json` of what must be an object. Raises DataError."""
    value = parse_json(content, limit, finite=finite)
    if not isinstance(value, dict):
        raise DataError("it does not hold an object, with keys and values")
    return value


def read_json(path: Path, limit: int = MAX_DOCUMENT_BYTES, *, finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file; no more than `limit` bytes are read. Raises DataError as `parse_json`, and OSError."""
    with open_plain(path) as file:
        return parse_object(file.read(limit + 1), limit, finite=finite)


def check_depth(value: Any, text: str, begin: int = 0, end: int | None = None) -> None:
    """Raise DataError where lists and objects lie too deep; `text[begin:end]` is where the value stands."""
    end = len(text) if end is None else end
    if text.count("[", begin, end) + text.count("{", begin, end) <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer if type(outer) is list else ())
            if type(inner) is list or type(inner) is dict
        ]
        if not level:
            return
    raise DataError(f"lists and objects lie more than {MAX_DEPTH} deep inside of each other")
