"""kdata: logit datasets. What a teacher believed at every token, kept on disk to query, share and train from.

`import kdata` loads neither torch nor vLLM; what is heavy is imported by the stage that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Dataset", "Plan", "Sequences", "open"]

if TYPE_CHECKING:
    from kdata.dataset import Dataset, Sequences
    from kdata.dataset import open_dataset as open
    from kdata.plan import Plan

_HOMES = {
    "open": ("kdata.dataset", "open_dataset"),
    "Dataset": ("kdata.dataset", "Dataset"),
    "Sequences": ("kdata.dataset", "Sequences"),
    "Plan": ("kdata.plan", "Plan"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'kdata' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
