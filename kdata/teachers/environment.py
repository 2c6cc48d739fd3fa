"""Environment variables that must be set before torch or vLLM is imported. This module imports neither."""

from __future__ import annotations

import os


def set_environment() -> None:
    """Set what makes torch faster on a CPU. A value that the user has set stays. torch reads each once, when it is loaded.

    GOMP_SPINCOUNT=0: OpenMP threads sleep while they wait. By default libgomp's threads spin, which takes the cores from
    every other process: on two cores shared with other work, training ran two to five times as slowly.

    THP_MEM_ALLOC_ENABLE=1: large tensors get pages of 2 MB from the kernel, where it gives them. 134 MB of logits
    (128 rows of 262,144) took 0.8 ms a row for their pages alone, and take 0.2.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
