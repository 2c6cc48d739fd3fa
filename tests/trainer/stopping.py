"""Training that is stopped in the middle, for tests of resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import kdata
import kdata.trainer.train as module
from kdata.trainer.config import TrainConfig


def stop_before(step: int, settings: TrainConfig, dataset: kdata.Dataset, out: Path, plan: str | None = None) -> Path:
    """Train until a step begins, then interrupt as Ctrl-C does. Returns `out`."""
    real = module._gradients

    def stopping(*arguments: Any) -> object:
        if arguments[-1] == step:
            raise KeyboardInterrupt
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_gradients", stopping)
        module.train(settings, dataset.path, plan, out)
    return out
