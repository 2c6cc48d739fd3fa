"""Functions that numba compiles. Their machine code is kept on disk for the next process, where there is a place for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function, which then runs without the interpreter's lock.

    numba keeps the machine code beside the function's file, or else in the user's cache. Where neither can be written (a
    container whose user is not the one that installed kdata, without a home), each process compiles what it calls.

    Args:
        options: of `numba.njit`, beside `cache` and `nogil`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # "no locator available"
            return numba.njit(nogil=True, **options)(function)

    return decorate
