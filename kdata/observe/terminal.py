"""What is printed on a terminal: names, ids and messages are shown as they are, and nothing in them is obeyed.

Text from data may hold what rich takes for markup (`[v2]`), for an emoji (`:key:`), or what a terminal obeys (escape codes).
"""

from __future__ import annotations

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
