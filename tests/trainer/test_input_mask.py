"""Masked inputs: which tokens, the same ones however a step is split, and targets that stay those of the clean text."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.errors import ConfigError
from kdata.loader.batches import BatchesConfig
from kdata.trainer.config import InputMask, ScratchStudent, TrainConfig
from kdata.trainer.input_mask import masked
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.train import train
from tests.trainer.datasets import VOCAB
from tests.trainer.stopping import stop_before
from tests.trainer.test_distributed import BASE, run_ranks

MASK = InputMask(token_id=VOCAB - 1)
LENGTHS = [5 + (i * 7) % 40 for i in range(90)]
READ = BatchesConfig(context_tokens=64, batch_rows=4, window_documents=16)


def config(**changes: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "student": ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64), "input_mask": MASK,
        "steps": 6, "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0, "log_every_steps": 1,
        "checkpoint_every_steps": 1, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**{**base, **changes})


def losses(out: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(config(), dataset.path, None, out)
    return out


def places(batch: Batch, clean: Batch) -> set[tuple[int, int]]:
    """(row of the dataset, position) of every cell that differs from the clean batch."""
    changed = (batch.input_ids != clean.input_ids).nonzero().tolist()
    first = np.concatenate([[0], np.cumsum(clean.segment_ids.amax(1).numpy() + 1)])
    return {
        (int(clean.rows[first[b] + clean.segment_ids[b, cell]]), int(clean.position_ids[b, cell]))
        for b, cell in changed
    }


def test_a_share_of_the_inputs_is_masked_and_nothing_else_changes(dataset: kdata.Dataset) -> None:
    tokens = changed = 0
    for step, batch in enumerate(islice(Loader(dataset, None, READ), 60)):
        got = masked(batch, MASK, 3, step)
        for field in dataclasses.fields(Batch):
            if field.name != "input_ids":
                assert getattr(got, field.name) is getattr(batch, field.name)
        differs = got.input_ids != batch.input_ids
        assert (got.input_ids[differs] == MASK.token_id).all() and (batch.segment_ids[differs] >= 0).all()
        free = (batch.segment_ids >= 0) & (batch.input_ids != MASK.token_id)
        tokens, changed = tokens + int(free.sum()), changed + int(differs.sum())
    assert abs(changed - 0.15 * tokens) < 4 * (0.15 * 0.85 * tokens) ** 0.5
    assert tokens > 10_000


def test_the_same_tokens_are_masked_however_a_step_is_split(dataset: kdata.Dataset) -> None:
    whole = list(islice(Loader(dataset, None, READ), 5))
    parts = [islice(Loader(dataset, None, READ, rank=rank, world_size=2), 5) for rank in range(2)]
    for step, (batch, *shares) in enumerate(zip(whole, *parts, strict=True)):
        want = places(masked(batch, MASK, 0, step), batch)
        assert len(want) > 5
        assert set.union(*(places(masked(part, MASK, 0, step), part) for part in shares)) == want


def test_other_steps_and_seeds_mask_other_tokens(dataset: kdata.Dataset) -> None:
    batch = next(iter(Loader(dataset, None, READ)))
    several = [
        places(masked(batch, MASK, seed, step), batch) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0))
    ]
    assert several[0] == several[4]
    assert len({frozenset(one) for one in several}) == 4


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_resumes_bit_equal(dataset: kdata.Dataset, whole: Path, tmp_path: Path, stop: int) -> None:
    out = stop_before(stop, config(), dataset, tmp_path / "run")
    train(config(), dataset.path, None, out)
    assert losses(out) == losses(whole)
    models = [(folder / "model/model.safetensors").read_bytes() for folder in (out, whole)]
    assert models[0] == models[1]


def test_micro_batches_have_the_losses_of_the_step(dataset: kdata.Dataset, whole: Path, tmp_path: Path) -> None:
    train(config(micro_batch_tokens=64), dataset.path, None, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-4)
    train(config(input_mask=None), dataset.path, None, tmp_path / "clean")
    assert abs(losses(tmp_path / "clean")[0][0] - losses(whole)[0][0]) > 1e-4


def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_written(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    settings = config(input_mask=InputMask(token_id=VOCAB))
    with pytest.raises(ConfigError, match=f"token_id is {VOCAB}, but the student has embeddings for ids below {VOCAB}"):
        train(settings, dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_a_mask_the_settings_are_those_of_older_runs() -> None:
    assert "input_mask" not in config(input_mask=None).model_dump()
    assert config().model_dump()["input_mask"] == {"share": 0.15, "token_id": VOCAB - 1}


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(dataset: kdata.Dataset, tmp_path: Path) -> None:
    settings = {**BASE, "input_mask": MASK.model_dump()}
    run_ranks([{"config": settings, "dataset": str(dataset.path), "out": str(tmp_path / "two")}], tmp_path)
    train(TrainConfig(**settings), dataset.path, None, tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)
