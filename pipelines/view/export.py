"""The page of a dataset as a folder: some rows of it, for any web server, or to open as a file. Nothing is asked of anybody.

Data is in scripts, data/NAME.js, because a page that was opened as a file may load scripts beside it and nothing else. Each
holds one call with JSON, in which `<` is written as an escape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, DataError
from kdata.format.files import committed_folder, remove_left_beside, storage_errors
from kdata.observe.progress import Task
from kdata.pipelines.view.server import PAGE, page_file
from kdata.pipelines.view.values import MOST_ROWS, MOST_TOKENS, View

MOST_EXPORTED = 5_000  # rows


def export(view: View, folder: Path, *, rows: int = MOST_ROWS, where: str = "", plan: str = "") -> int:
    """Write the page of the first rows that a condition and a plan leave; return their number.

    Args:
        folder: new, or empty.
        rows: at most so many.
        where, plan: see `View.rows`.
    Raises:
        ConfigError: the folder holds something, or `rows` is out of range.
        DataError: no row is left.
        QueryError, MissingError: see `View.rows`.
    """
    if folder.exists() and any(folder.iterdir()):
        remove_left_beside(folder)
        raise ConfigError(f"{folder} exists and is not empty; name a new folder")
    if not 1 <= rows <= MOST_EXPORTED:
        raise ConfigError(f"{rows} rows cannot be exported; take 1 to {MOST_EXPORTED:,}")
    about = view.about()
    chosen: list[dict[str, Any]] = []
    while len(chosen) < rows:
        limit = min(MOST_ROWS, rows - len(chosen))
        answer = view.rows(where=where, plan=plan, offset=len(chosen), limit=limit)
        chosen += answer["rows"]
        if len(answer["rows"]) < limit:
            break
    if not chosen:
        raise DataError("no row is left to export; loosen the condition, or name another plan")
    with storage_errors(folder), committed_folder(folder) as place, Task("export", len(chosen), "rows") as task:
        (place / "data").mkdir()
        for name in PAGE.values():
            content = page_file(name)
            if name == "index.html":
                content = content.replace(b'data-mode="server"', b'data-mode="folder"')
            (place / name).write_bytes(content)
        shown = {**about, "plans": [], "exported": len(chosen)}
        _write(place, "about", shown)
        _write(place, "overview", view.overview(where=where, plan=plan))
        _write(place, "rows", {"total": len(chosen), "rows": chosen})
        for row in chosen:
            _write_row(place, view, row["number"])
            task.advance(1)
    return len(chosen)


def _write_row(place: Path, view: View, number: int) -> None:
    """A row in pieces of MOST_TOKENS tokens."""
    begin = 0
    while True:
        piece = view.row(number, begin=begin)
        _write(place, f"row-{number}-{begin}", piece)
        begin += MOST_TOKENS
        if begin >= piece["num_tokens"]:
            return


def _write(place: Path, name: str, content: Any) -> None:
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    (place / "data" / f"{name}.js").write_text(f'kdataLoaded("{name}", {text});\n', encoding="ascii")
