"""What is printed on a terminal: names, ids and messages are shown as they are, and nothing in them is obeyed.

Text from data may hold what rich takes for markup (`[v2]`), for an emoji (`:key:`), or what a terminal obeys (escape codes).
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from kdata.observe.text import visible, visible_name


class PlainConsole(Console):
    """A console that shows text as it is: no markup, no emoji codes, no highlighting, control characters as escapes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **options: Any) -> Text:
        """See `Console.render_str`."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """See `Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def name_text(value: object, style: str | Style = "", **options: Any) -> Text:
    """A name from data (an id, a domain, a path) as one line of rich text."""
    return Text(visible_name(str(value)), style, **options)


def prepare_streams() -> None:
    """Have standard streams that exist and take any text, whatever the process was started with.

    A closed stream becomes the null device; else the next file that is opened would get its number, and a library's words
    with it. What the encoding of the output lacks (of a C or a Latin-1 locale) is written as escapes, as JSON has them.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
        pass
    os.close(handle)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # open to the end
    codecs.register_error("kdata.escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kdata.escape")


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What an encoding lacks, as JSON's escapes: \\u00fc, and a pair of them beyond 16 bits."""
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end
