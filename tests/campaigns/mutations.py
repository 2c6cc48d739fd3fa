"""Damage by rule and by chance: bytes, JSON, YAML, tables. Each function depends on its arguments and the generator alone."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

DEEP = 100_000
NUMBERS = (0, 1, 2, 3, 4, 7, 8, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
# What stands for a value, as JSON text. One that only a raw text can hold is among them: NaN, 6,000 digits, 100,000 deep.
HOSTILE = (
    "null",
    "true",
    "false",
    "0",
    "-1",
    "1",
    "2",
    "1e308",
    "-1e308",
    "1e400",
    "1e12",
    "NaN",
    "Infinity",
    "-Infinity",
    str(2**31),
    str(2**53),
    str(2**63),
    str(2**64),
    str(10**30),
    "9" * 6000,
    "-" + "9" * 400,
    "0.1",
    "1e-320",
    '""',
    '"x"',
    '"\\u001b[31mred\\u001b[0m\\u202e"',
    '"../../../outside"',
    '"/outside/data"',
    '"."',
    '".."',
    '"a\\u0000b"',
    '"\\ud800"',
    '"' + "x" * 100_000 + '"',
    '"2026-02-31"',
    '"9999999999"',
    '"NaN"',
    '"1e999"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    '{"a": null}',
    "[" * 100 + "]" * 100,
    "[" * DEEP + "]" * DEEP,
    '{"a":' * 500 + "1" + "}" * 500,
    "[" + "1," * 5000 + "1]",
)
MARK = "\ue000here\ue000"  # where a raw text will stand


def bytes_of(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, zero, or overwrite with a length; one to five times."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:  # lengths and counts are at the ends of most formats
            place = min(len(data), rng.choice((rng.randrange(64), max(0, len(data) - rng.randrange(1, 2048)))))
        kind = rng.randrange(8)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + rng.randrange(1, 64)]
        elif kind == 4:
            data[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 5:
            data[place:place] = data[place : place + rng.randrange(1, 256)] * rng.randrange(1, 8)
        elif kind == 6:
            size = rng.randrange(1, 256)
            data[place : place + size] = bytes([rng.choice((0, 255))]) * len(data[place : place + size])
        else:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) % (1 << 8 * size)
            data[place : place + size] = number.to_bytes(size, rng.choice(("little", "little", "big")))
    return bytes(data)


def no_file(path: Path, rng: random.Random) -> None:
    """Put what is no file in the place of a file: a pipe, which would wait for ever, or a device, which has no end."""
    path.unlink()
    os.mkfifo(path) if rng.random() < 0.5 else path.symlink_to("/dev/zero")


def json_of(value: Any, rng: random.Random) -> tuple[Any, str | None]:
    """A value with one place changed; where the change is a raw text, MARK stands there and the text comes beside it."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(outer: Any) -> None:
        for key in list(outer) if isinstance(outer, dict) else range(len(outer)):
            places.append((outer, key))
            if isinstance(outer[key], dict | list):
                walk(outer[key])

    if isinstance(value, dict | list):
        walk(value)
    if not places:
        return MARK, rng.choice(HOSTILE)
    outer, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0:
        del outer[key]
        return value, None
    if kind == 1 and isinstance(outer, dict):
        outer[rng.choice(("", "x", "digest", "__class__", "\x1b[2J", "a.b", "../x"))] = outer[key]
        return value, None
    if kind == 2:
        other, name = rng.choice(places)
        try:
            outer[key], other[name] = json.loads(json.dumps(other[name])), json.loads(json.dumps(outer[key]))
        except (KeyError, IndexError, ValueError):
            outer[key] = None
        return value, None
    outer[key] = MARK
    return value, rng.choice(HOSTILE)


def json_text(value: Any, raw: str | None, **options: Any) -> bytes:
    """JSON of what `json_of` returns."""
    text = json.dumps(value, ensure_ascii=False, **options)
    return (text if raw is None else text.replace(json.dumps(MARK, ensure_ascii=False), raw)).encode(errors="replace")


YAML_TEXTS = (
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)),
    "[" * DEEP,
    "{" * 5000,
    "a: " + "9" * 6000,
    "a: &x [*x]",
    "a: &x {b: *x}",
    "a: 1\na: 2",
    "? [a]\n: b",
    "!!python/name:os.system",
    "a: !!binary zz",
    "a: 2026-02-31",
    "a: !!timestamp 2026-99-99",
    "a: .inf",
    "a: .nan",
    "1: 2",
    "a: \x00",
    "\xff\xfe",
    "- " * 3000,
    "a: *nothing",
    "%YAML 9.9\n---\na: 1",
    "---\na: 1\n---\nb: 2",
    "",
    "null",
    "just text",
    "<<: *a",
    "a: {<<: [1, 2]}",
    "a: 1e12",
    "a: 0x" + "f" * 300,
    "a: !!set {b}",
    "a: |\n" + "  x\n" * 3000,
    "a: 190:20:30:99999999999999999999",
    "\t- a",
    "a: 'b",
    "&a a: *a",
    "a: -.inf",
    "a: 1_000_000_000_000",
)


def yaml_text(values: Any, rng: random.Random) -> bytes:
    """YAML: a text of the list above, or a mapping with one place changed (JSON is YAML)."""
    if rng.random() < 0.3:
        return rng.choice(YAML_TEXTS).encode()
    return json_text(*json_of(values, rng))


TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 3000000000 }}",
    "{% set n = namespace(x='a' * 1000) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ strftime_now('%Y') }}",
    "{{ 9 ** 9999999 }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{" * 100000,
    "{% if x %}" * 20000,
    "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "{{ lipsum(100000) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{{ messages[99].x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ messages.append(1) }}",
    "{{ cycler(1).next }}",
    "{% generation %}",
    "{{ 'x'|center(9999999999) }}",
    "{{ range(10**9)|list }}",
    "{{ messages|tojson(indent=99999999) }}",
    "{% set x = 1 %}{{ x.y.z() }}",
    "{{ self }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "\ud800".encode(errors="replace").decode(),
)
BITS = (
    "{{ m.content }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m %}",
    "{% endif %}",
    "{{",
    "}}",
    "{%",
    "%}",
    "|tojson",
    "<|im_end|>",
    "\n",
)


def template_text(rng: random.Random) -> str:
    """A chat template: one of the list above, or pieces of templates in a row."""
    if rng.random() < 0.5:
        return rng.choice(TEMPLATES)
    return "".join(rng.choice(BITS) for _ in range(rng.randrange(1, 20)))


def table_of(table: pa.Table, rng: random.Random) -> pa.Table:
    """A table with one column dropped, doubled, of another type, of other values, or in another order; or other rows."""
    names = table.column_names
    name = rng.choice(names)
    place, column = names.index(name), table.column(name)
    rows = table.num_rows
    kind = rng.randrange(9)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        return table.append_column(name, column)
    if kind == 2:
        return table.set_column(place, name, pa.nulls(rows, column.type))
    if kind == 3:
        other = rng.choice(
            (
                pa.array([None] * rows),
                pa.array([1.5] * rows),
                pa.array([2**62] * rows),
                pa.array(["x"] * rows),
                pa.array([b"\xff\xfe"] * rows),
                pa.array([[1, None]] * rows),
                pa.array([{"a": 1}] * rows),
                pa.array([-1] * rows),
                pa.array([float("nan")] * rows),
                pa.array([True] * rows),
                pa.array([[[[1]]]] * rows),
                pa.array([[]] * rows),
            )
        )
        return table.set_column(place, name, other)
    if kind == 4:
        return table.select(rng.sample(names, len(names)))
    if kind == 5:
        return table.slice(rng.randrange(rows + 1), rng.randrange(rows + 1))
    if kind == 6:
        return pa.concat_tables([table, table])
    if kind == 7:
        return table.rename_columns([rng.choice(("", "id", "\x1b[31m", "x" * 1000)) if n == name else n for n in names])
    return _other_values(table, name, rng)


def _other_values(table: pa.Table, name: str, rng: random.Random) -> pa.Table:
    """One value of a column changed within its type."""
    column = table.column(name)
    values = column.to_pylist()
    if not values:
        return table
    row = rng.randrange(len(values))
    values[row] = _other_value(values[row], column.type, rng)
    try:
        return table.set_column(table.column_names.index(name), table.schema.field(name), pa.array(values, column.type))
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        return table.drop_columns([name])


def _other_value(value: Any, kind: pa.DataType, rng: random.Random) -> Any:
    if pa.types.is_list(kind):
        inner = list(value or [])
        how = rng.randrange(4)
        if how == 0 and inner:
            inner[rng.randrange(len(inner))] = _other_value(None, kind.value_type, rng)
        elif how == 1:
            inner = inner[: rng.randrange(len(inner) + 1)]
        elif how == 2:
            inner = inner * rng.randrange(2, 5)
        else:
            inner = [_other_value(None, kind.value_type, rng)] * rng.randrange(1, 50)
        return inner
    if pa.types.is_integer(kind):
        half = 2 ** (kind.bit_width - 1)
        low, high = (0, 2 * half - 1) if "uint" in str(kind) else (-half, half - 1)
        return rng.choice((low, high, 0, 1, rng.randint(low, high)))
    if pa.types.is_floating(kind):
        return rng.choice((float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 0.0, -0.0, 700.0, -1e-300))
    if pa.types.is_boolean(kind):
        return rng.random() < 0.5
    return rng.choice(("", "\x1b[31m", "x" * 10_000, "[" * 5000, '{"a": 1}', "[1]", '[{"role": 1}]', "../..", None))


def lines_of(path: Path, rng: random.Random) -> bytes:
    """JSONL in which one line is changed, repeated, or cut."""
    lines = path.read_bytes().splitlines()
    number = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines.insert(number, lines[number])
    elif kind == 1:
        lines[number] = lines[number][: rng.randrange(len(lines[number]) + 1)]
    elif kind == 2:
        lines[number] = rng.choice(HOSTILE).encode()
    else:
        lines[number] = json_text(*json_of(json.loads(lines[number]), rng))
    return b"\n".join(lines) + rng.choice((b"\n", b""))
