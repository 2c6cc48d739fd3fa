"""kdata: logit datasets. What a teacher believed at every token, kept on disk to query, share and train from.

`import kdata` loads neither torch nor vLLM; what is heavy is imported by the stage that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Dataset", "Plan", "Sequences", "open"]

if TYPE_CHECKING:
    from kdata.format.sequences import Sequences
    from kdata.selection.plan import Plan
    from kdata.store.dataset import Dataset
    from kdata.store.open import open_dataset as open

_HOMES = {
    "open": ("kdata.store.open", "open_dataset"),
    "Dataset": ("kdata.store.dataset", "Dataset"),
    "Sequences": ("kdata.format.sequences", "Sequences"),
    "Plan": ("kdata.selection.plan", "Plan"),
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'kdata' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
