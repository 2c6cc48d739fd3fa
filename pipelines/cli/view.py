"""The command view: a dataset in a browser, or its page as a folder."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from typing import Annotated

import typer

import kdata
from kdata.errors import ConfigError
from kdata.pipelines.cli.common import DatasetArgument, local_folder, say
from kdata.pipelines.view.export import MOST_EXPORTED, export
from kdata.pipelines.view.server import ViewServer
from kdata.pipelines.view.values import MOST_ROWS, View


def view(
    dataset: DatasetArgument,
    beside: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="The same rows, read by another teacher or a student, to show beside."),
    ] = None,
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="Port on this machine; 0: a free one.")] = 0,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    folder: Annotated[
        str | None, typer.Option("--export", metavar="FOLDER", help="Write the page as a folder for any web server.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST_EXPORTED,
            help=f"Rows in the folder, at most (--export). [default: {MOST_ROWS}]",
        ),
    ] = None,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="Condition on the rows in the folder (--export).")
    ] = None,
    plan: Annotated[str | None, typer.Option(metavar="PLAN", help="Rows of this plan alone (--export).")] = None,
) -> None:
    """Look at a dataset in a browser.

    Rows, histograms, and for each token what the teacher believed. The page is
    served on this machine until Ctrl-C. --export writes it as a folder.

    \b
    Examples:
      kdata view my-dataset --open
      kdata view my-dataset --export page --rows 100 --where "domain = 'news'"
    """
    if folder is None and not (rows is None and where is None and plan is None):
        raise ConfigError("--rows, --where and --plan say what --export FOLDER writes; in the page, choose there")
    if folder is not None and (port or open_browser):
        raise ConfigError("--port and --open are of the page that is served; --export writes a folder")
    place = None if folder is None else local_folder(folder)
    shown = View(kdata.open(dataset), None if beside is None else kdata.open(beside))
    shown.check_beside()
    if place is not None:
        count = export(shown, place, rows=rows or MOST_ROWS, where=where or "", plan=plan or "")
        say(f"{count:,} rows: open {place}/index.html, or put the folder on any web server")
        return
    with ViewServer(shown, port) as server:
        say(f"{server.url}  (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
