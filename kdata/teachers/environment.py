"""Environment variables that must be set before torch or vLLM is imported. This module imports neither."""

from __future__ import annotations

import os


def set_environment() -> None:
    """Let OpenMP threads sleep while they wait (GOMP_SPINCOUNT=0). A value that the user has set stays.

    By default libgomp's threads spin, which takes the cores from every other process: on two cores shared with other
    work, training ran two to five times as slowly. libgomp reads the variable once, when torch loads it.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
