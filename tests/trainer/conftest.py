"""One thread: these models are smaller than the cost of waking a second one, and threads change last bits."""

from __future__ import annotations

import pytest
import torch

import kdata

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """A dataset of rows of the module's `LENGTHS`."""
    from tests.trainer.datasets import make_dataset

    return make_dataset(tmp_path_factory.mktemp("data") / "set", request.module.LENGTHS)
