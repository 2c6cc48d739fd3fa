"""Data, loss and checks of this trainer for any other trainer. Each part is usable alone; README.md of this folder shows how.

    data = PackedRows("DATASET", context_tokens=2048, epochs=1)          a torch dataset
    DistillTrainer(model=model, args=args, train_dataset=data).train()   Hugging Face Trainer with the sparse loss

A name is imported from its module when it is first used, so transformers, TRL and PEFT are needed by those names alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdata.trainer.parts.collator import Collator, Layout, SparseTargets
    from kdata.trainer.parts.data import Documents, PackedRows, RowStream
    from kdata.trainer.parts.huggingface import DistillMixin, DistillTrainer
    from kdata.trainer.parts.losses import DistillationLoss, LogitsLoss
    from kdata.trainer.parts.student import DistillOutput, attach_loss
    from kdata.trainer.parts.trl import DistillSFTTrainer

__all__ = [
    "Collator",
    "DistillMixin",
    "DistillOutput",
    "DistillSFTTrainer",
    "DistillTrainer",
    "DistillationLoss",
    "Documents",
    "Layout",
    "LogitsLoss",
    "PackedRows",
    "RowStream",
    "SparseTargets",
    "attach_loss",
]

_MODULES = {
    "Collator": "collator",
    "DistillMixin": "huggingface",
    "DistillOutput": "student",
    "DistillSFTTrainer": "trl",
    "DistillTrainer": "huggingface",
    "DistillationLoss": "losses",
    "Documents": "data",
    "Layout": "collator",
    "LogitsLoss": "losses",
    "PackedRows": "data",
    "RowStream": "data",
    "SparseTargets": "collator",
    "attach_loss": "student",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
