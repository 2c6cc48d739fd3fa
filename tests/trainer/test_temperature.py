"""Training at a temperature other than 1 on stored data: against the dense float64 distribution at that temperature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kdata
from kdata.errors import ConfigError
from kdata.keep import KeepConfig
from kdata.schema import FORMAT_VERSION, SourceInfo
from kdata.shard import Record, Unit
from kdata.teachers.reduce import draw_seed, readout_of, reduce_logits
from kdata.temper import at_temperature
from kdata.writer import Writer, new_info
from trainer.fused import distillation_loss
from trainer.objectives import ObjectiveConfig, Targets

VOCAB, POSITIONS, HIDDEN = 97, 400, 12


def stored(tmp_path: Path, keep: KeepConfig) -> tuple[kdata.Dataset, torch.Tensor]:
    """One long sequence of random beliefs, written and opened; and its dense log-probabilities float64 [M, V]."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(POSITIONS, VOCAB, generator=generator) * 2.0
    ids = torch.randint(0, VOCAB, (POSITIONS + 1,), generator=generator).numpy().astype(np.int32)
    out = readout_of(ids, 1, reduce_logits(logits, torch.from_numpy(ids[1:]).long(), keep, draw_seed(ids, keep)))
    teacher = {
        "model": "random", "revision": None, "weights_hash": None, "backend": "stand-in", "backend_version": "-",
        "dtype": "float32", "logprobs": "raw", "deterministic": True,
    }  # fmt: skip
    info = new_info(
        format_version=FORMAT_VERSION, vocab_size=VOCAB, teacher=teacher, codec=keep.codec(VOCAB), tail=keep.tail,
        tokenizer={"hash": "-", "chat_template_hash": None, "bos_id": None, "eos_id": None},
    )  # fmt: skip
    record = Record(
        "a", "d", ids, out.rank > 0, out.logprob, out.rank, out.log_tail, out.kept, "", out.entropy, out.log_z
    )
    with Writer(tmp_path / "d", info, "capture", SourceInfo(kind="capture", settings={}, num_units=None)) as writer:
        writer.commit(Unit(0, [record]))
    return kdata.open(tmp_path / "d"), torch.log_softmax(logits.double(), -1)


def loss_and_gradient(
    sequences: kdata.Sequences, tail: str, hidden: torch.Tensor, head: torch.Tensor, temperature: float
):
    """Forward KL of the fused loss at a temperature: the student's logits are divided by it too."""
    ids, logprobs = (torch.from_numpy(x[1:]) for x in sequences.padded())
    targets = Targets(
        torch.from_numpy(sequences.token_ids[1:]).long(), ids.long(), logprobs.double(),
        torch.from_numpy(sequences.log_tail[1:]).double(),
    )  # fmt: skip
    own = hidden.clone().requires_grad_()
    loss = distillation_loss(own / temperature, head, targets, ObjectiveConfig(weights={"forward_kl": 1.0}), tail)  # type: ignore[arg-type]
    loss.total.backward()
    return float(loss.total.detach()), own.grad


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_tail_and_every_entry_are_those_of_the_dense_distribution(temperature: float, tmp_path: Path) -> None:
    dataset, dense = stored(tmp_path, KeepConfig(kind="topk", k=9, temperatures=[0.7, 2.0]))
    warm = at_temperature(dataset[0], temperature, dataset.info.codec)
    expected = torch.log_softmax(dense / temperature, -1)
    ids, logprobs = (x[1:] for x in warm.padded())
    own = np.take_along_axis(expected.numpy(), ids, 1)
    # What is left is the grid of 1/16 nat, divided by the temperature.
    assert np.abs(logprobs - own).max() < 0.05 / temperature
    assert (np.exp(logprobs.astype(np.float64)).sum(1) <= 1 + 1e-6).all()
    rest = 1 - np.exp(own).sum(1)
    np.testing.assert_allclose(np.exp(warm.log_tail[1:]), rest, atol=0.03)


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_the_loss_equals_the_dense_one(temperature: float, tmp_path: Path) -> None:
    """Everything kept: the fused loss on stored data is the dense KL at T, to the error of storing."""
    dataset, dense = stored(tmp_path, KeepConfig(kind="topk", k=VOCAB - 1, temperatures=[2.0, 0.7]))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64) * 0.5
    warm = at_temperature(dataset[0], temperature, dataset.info.codec)
    loss, gradient = loss_and_gradient(warm, "ghost", hidden, head, temperature)
    own = hidden.clone().requires_grad_()
    log_q = torch.log_softmax(own @ head.T / temperature, -1)
    p = torch.softmax(dense / temperature, -1)
    exact = (p * (p.log() - log_q)).sum(-1).mean()
    exact.backward()
    assert loss == pytest.approx(float(exact.detach()), rel=1e-3)
    assert own.grad is not None
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), own.grad.flatten(), 0)
    assert cosine > 0.9995


def test_draws_are_unbiased_at_the_other_temperature(tmp_path: Path) -> None:
    """A random test function's mean under the tempered weights, over all positions: within four standard errors."""
    dataset, dense = stored(tmp_path, KeepConfig(kind="hybrid", k=3, draws=60, temperatures=[2.0]))
    warm = at_temperature(dataset[0], 2.0, dataset.info.codec)
    values = np.random.default_rng(0).normal(size=VOCAB)
    ids, logprobs = (x[1:] for x in warm.padded())
    found = np.where(ids >= 0, np.exp(logprobs.astype(np.float64)) * values[ids], 0).sum(1)
    gap = found - torch.softmax(dense / 2.0, -1).numpy() @ values
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap))


def test_a_temperature_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    dataset, _ = stored(tmp_path, KeepConfig(kind="topk", k=9, temperatures=[2.0]))
    assert at_temperature(dataset[0], 1.0, dataset.info.codec).log_tail is not None
    with pytest.raises(ConfigError, match=r"capture with --set temperatures=\[3.0\]"):
        at_temperature(dataset[0], 3.0, dataset.info.codec)
