"""The entry point. Ctrl-C ends the program in one line, also while libraries are loaded, which takes a second."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from kdata.pipelines.cli import STOPPED


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{STOPPED}\n".encode())  # nothing has been begun that would have to be undone
    os._exit(130)


def main() -> None:
    """Load the command line and run it."""
    # A closed stream becomes the null device; else the first file that a library opens would get its number.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest free number
        pass
    os.close(handle)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: `nohup`, a shell's `&`
        signal.signal(signal.SIGINT, _end)
    from kdata.pipelines.cli.main import main as run

    run()
