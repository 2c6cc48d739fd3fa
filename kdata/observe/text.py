"""Numbers and names as a person reads them: bytes, durations, energy, text that a terminal can show."""

from __future__ import annotations

import re

_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")  # line breaks, controls, text direction

# What a terminal would obey instead of showing: control characters, marks of text direction, halves of characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def visible(text: str) -> str:
    """Text in which control characters are escapes that can be read (\\x1b); tabs and line breaks stay."""
    return _CONTROL.sub(lambda match: _escape(match[0]), text)


def visible_name(text: str) -> str:
    """`visible` for a name, which has one line: tabs and line breaks become \\t and \\n."""
    return re.sub(r"[\t\n]", lambda match: _NAMED[match[0]], visible(text))


def _escape(character: str) -> str:
    code = ord(character)
    return _NAMED.get(character) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def visible_json(text: str) -> str:
    """JSON with the same values, in which every control character is an escape of JSON."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def human_bytes(value: float) -> str:
    """A size for a person: 1.4 MB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


def one_line(value: object, limit: int = 160) -> str:
    """Text from data on one line: no line break, control or direction mark, cut at `limit` characters."""
    text = _SPACE.sub(" ", str(value)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def number(value: object, form: str = ".3f") -> str:
    """A number in this format; a dash where there is none (None, NaN, infinite, or no number at all)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        return "—"
    return format(value, form)


def duration(seconds: float) -> str:
    """A time for a person: 3.2 s, 2 min 05 s, 1 h 02 min, 3 d 4 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def hours_text(hours: dict[str, float]) -> str:
    """Device hours for a person: 0.0833 (2 CPU cores)."""
    return " + ".join(f"{value:,.{4 if value < 1 else 2}f} ({name})" for name, value in hours.items())


def energy_text(joules: float | None) -> str:
    """Energy for a person, in watt hours; says so where the device does not tell."""
    if joules is None:
        return "not reported by this device"
    hours = joules / 3600
    return f"{hours:,.3g} Wh" if hours < 1000 else f"{hours / 1000:,.4g} kWh"
