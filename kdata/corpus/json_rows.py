"""Rows of one JSON file: an object a line, one array of objects, or objects printed over several lines.

A file is never held in memory as a whole: an array is read piece by piece. A line that is no object spoils its own row only.
In an array, and among objects over several lines, nothing says where the next row begins, so there it is an error.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from kdata.errors import DataError
from kdata.format.json_text import MAX_ROW_CHARACTERS, check_depth, parse_row, row_lines
from kdata.format.records import RowError

CHUNK_CHARACTERS = 1 << 20
SPACE = " \t\r\n"
# How far from the end of the text an error may lie that only says that the text goes on: a literal, a \uXXXX escape.
NEAR_END = 16

PLAIN = (".jsonl", ".ndjson", ".json")
# A compressed file that becomes so many times larger, and so large, holds no text.
MOST_TIMES, MOST_BYTES = 250, 256 << 20


class Expanded(io.RawIOBase):
    """The bytes of a file, decompressed as its ending says. Raises DataError where they are a compression bomb."""

    def __init__(self, file: Path) -> None:
        self._name, self._size, self._read = file.name, file.stat().st_size, 0
        self._source = pa.input_stream(str(file), compression="detect")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        piece = self._source.read(len(buffer))
        buffer[: len(piece)] = piece
        self._read += len(piece)
        if self._read > max(MOST_BYTES, MOST_TIMES * self._size):
            raise DataError(
                f"{self._name} becomes more than {MOST_TIMES} times as large when it is decompressed, as no text does; "
                "decompress it yourself if you trust it"
            )
        return len(piece)

    def close(self) -> None:
        """See `io.RawIOBase.close`."""
        if not self.closed:
            self._source.close()
        super().close()


def refuse_bomb(file: Path) -> None:
    """Raise DataError where a compressed file becomes too large."""
    with Expanded(file) as source:
        piece = bytearray(CHUNK_CHARACTERS)
        while source.readinto(piece):
            pass


class JsonFile:
    """See `kdata.corpus.files.OneFile`.

    Args:
        file: plain, or compressed as its ending says.
        named: what the user named, for messages.
    Raises:
        DataError: not one row is a JSON object; outside of lines, one is not.
    """

    def __init__(self, file: Path, named: str) -> None:
        self._file, self._named = file, named
        self._form = self._form_of()
        objects, broken, names, first_broken = 0, 0, dict[str, None](), None
        for row in self._objects():
            if isinstance(row, RowError):
                broken, first_broken = broken + 1, first_broken or row
            else:
                objects += 1
                names.update(dict.fromkeys(row))
        if first_broken is not None and not objects:
            raise DataError(
                f"{named} cannot be read as json: not one line is an object ({first_broken.detail}); write one object a line"
            )
        self.num_rows, self.names = objects + broken, list(names)

    def rows(self, columns: list[str]) -> Iterator[dict[str, Any] | RowError]:
        """Rows in their order; a key that a row lacks is None."""
        for row in self._objects():
            yield row if isinstance(row, RowError) else {name: row.get(name) for name in columns}

    def _text(self) -> TextIO:
        is_plain = self._file.suffix in PLAIN
        packed = pa.OSFile(str(self._file)) if is_plain else io.BufferedReader(Expanded(self._file), CHUNK_CHARACTERS)
        # A byte that is not UTF-8 spoils its own row only: `Corpus` says which one.
        return io.TextIOWrapper(packed, encoding="utf-8-sig", errors="surrogateescape", newline="\n")

    def _form_of(self) -> str:
        """lines: an object a line. array: one array of objects. values: objects, each printed over several lines."""
        with self._text() as text:
            lines = filter(None, map(str.strip, iter(lambda: text.readline(CHUNK_CHARACTERS), "")))
            first, second = next(lines, ""), next(lines, "")
        if first.startswith("["):
            return "array"
        # A printed object begins with a line that holds nothing else, or one key of it.
        opens = first == "{" or (
            first.startswith("{") and first.endswith((",", "[", "{")) and len(first) < CHUNK_CHARACTERS
        )
        # Where the next line is a whole object, the first one is a line that was cut off: an object has no object for a key.
        cut_off = not first.endswith("[") and _is_object(second)
        return "values" if opens and not cut_off else "lines"

    def _objects(self) -> Iterator[dict[str, Any] | RowError]:
        with self._text() as text:
            if self._form != "lines":
                yield from Values(text, self._file.name, self._named).objects(in_array=self._form == "array")
                return
            for number, line in enumerate(row_lines(text), 1):
                if line.strip():
                    yield self._row(line.rstrip("\r\n"), number)

    def _row(self, line: str, number: int) -> dict[str, Any] | RowError:
        place = f"{self._file.name}, line {number}"
        try:
            row = parse_row(line)
        except DataError as error:
            cause = error.__cause__
            if isinstance(cause, json.JSONDecodeError):
                reason = f"{cause.msg.removesuffix(' at')} at character {cause.pos + 1:,}"
                return RowError("not_json", f"{place} is not JSON: {reason}")
            # A number of thousands of digits, objects in objects.
            return RowError("not_json", f"{place} cannot be read as JSON: {error}")
        return row if isinstance(row, dict) else RowError("not_json", f"{place} is not a JSON object")


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse_row(line), dict)
    except DataError:
        return False


class Values:
    """JSON objects one after another in a text that is read piece by piece."""

    def __init__(self, text: TextIO, file: str, named: str) -> None:
        self._source, self._file, self._named = text, file, named
        self._decoder = json.JSONDecoder()
        self._text, self._at, self._line, self._ended = "", 0, 1, False

    def objects(self, *, in_array: bool) -> Iterator[dict[str, Any]]:
        """The objects. Raises DataError, naming file and line, where the text is not an array of objects, or objects."""
        if in_array:
            self._take("[", "")
        number = 0
        while True:
            sign = self._next_sign()
            if sign == "" and not in_array:
                return
            if in_array and sign == "]" and number == 0:
                break
            if number and in_array and self._take(",", "]") == "]":
                self._end_of_array()
                return
            value = self._value()
            if not isinstance(value, dict):
                kind = "the array's entry" if in_array else "entry"
                raise self._error(f"{kind} {number} is not an object; each row must be an object with named columns")
            number += 1
            yield value
        self._at += 1
        self._end_of_array()

    def _end_of_array(self) -> None:
        if self._next_sign():
            raise self._error("something follows the array; a file holds one array of objects, or one object a line")

    def _next_sign(self) -> str:
        """The next character that is not white space, without taking it; '' at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _take(self, *wanted: str) -> str:
        sign = self._next_sign()
        if not sign:
            raise self._error("the array has no end (]); the file is cut off")
        if sign not in wanted:
            raise self._error(f"{sign!r} where {' or '.join(repr(w) for w in wanted if w)} belongs")
        self._at += 1
        return sign

    def _value(self) -> Any:
        if not self._next_sign():
            raise self._error("the array has no end (]); the file is cut off")
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                check_depth(value, self._text, self._at, end)
                self._at = end
                return value
            except DataError as error:
                raise self._error(str(error)) from error
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - NEAR_END
                if not (cut_off and self._more()):
                    self._at = min(error.pos, len(self._text))
                    raise self._error(error.msg, error) from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, objects in objects
                raise self._error(str(error)) from error

    def _more(self) -> bool:
        """Read on: as much again as is held, so that a large object costs no more than twice its length."""
        if self._ended:
            return False
        if len(self._text) - self._at > MAX_ROW_CHARACTERS:
            raise self._error(f"an object has more than {MAX_ROW_CHARACTERS:,} characters")
        more = self._source.read(max(CHUNK_CHARACTERS, len(self._text) - self._at))
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not more
        return bool(more)

    def _error(self, reason: str, error: Exception | None = None) -> DataError:
        line = self._line + self._text.count("\n", 0, self._at)
        return DataError(f"{self._named} cannot be read as json: {self._file}, line {line}: {reason}")
