"""Progressive self-distillation (PS-KD): the student reads, and the next phase mixes what it believed with the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import kdata
from kdata.loader.batches import BatchesConfig
from kdata.teachers.config import TeacherConfig
from kdata.teachers.transformers import TransformersTeacher
from kdata.trainer.config import CheckpointStudent, ScratchStudent, TrainConfig
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.objective_config import ObjectiveConfig, resolve_tail
from kdata.trainer.train import train
from tests.fakes import VOCAB, run_capture

SIZES = {"batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0, "device": "cpu"}


def mixed(share: float) -> ObjectiveConfig:
    return ObjectiveConfig(weights={"cross_entropy": 1 - share, "forward_kl": share})


@pytest.fixture(scope="module")
def epochs(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path
) -> tuple[Path, kdata.Dataset]:
    """The student after its first epoch, on the text alone, and what it believes of the same text (nearly all entries)."""
    root = tmp_path_factory.mktemp("epochs")
    text = run_capture(root / "text", corpus_file, tokenizer_dir)
    student = ScratchStudent(hidden_size=16, num_layers=1, num_heads=2, max_positions=64, init_std=0.3)
    alone = ObjectiveConfig(weights={"cross_entropy": 1.0})
    train(
        TrainConfig(student=student, objective=alone, steps=8, learning_rate=0.02, **SIZES), text.path, None, root / "1"
    )
    model = root / "1" / "model"
    itself = TransformersTeacher(TeacherConfig(model=str(model), backend="transformers"))
    return model, run_capture(root / "beliefs", corpus_file, tokenizer_dir, teacher=itself, kind="topk", k=290)


def dense(model: Path, dataset: kdata.Dataset, batch: Batch) -> torch.Tensor:
    """The student's whole distributions at the counted positions, float64 [M, V], document by document."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    parts = []
    for row in batch.rows:
        ids_1T = torch.from_numpy(dataset[int(row)].token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            parts.append(torch.softmax(student(ids_1T).logits[0, :-1, :VOCAB], -1))
    return torch.cat(parts).clone()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_the_mix_has_the_gradient_of_a_soft_target_of_text_and_former_self(
    epochs: tuple[Path, kdata.Dataset], share: float
) -> None:
    """Cross-entropy to (1 - a) one-hot + a p over the whole vocabulary, in float64; the value lacks a times p's entropy."""
    model, dataset = epochs
    [batch] = Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=64)).epoch()
    p_MV, token_M = dense(model, dataset, batch), batch.targets.token_ids_C
    rng = torch.Generator().manual_seed(0)
    hidden_MD = torch.randn(len(p_MV), 12, generator=rng, dtype=torch.float64).requires_grad_()
    head_VD = torch.randn(VOCAB, 12, generator=rng, dtype=torch.float64)
    target_MV = (1 - share) * torch.nn.functional.one_hot(token_M, VOCAB) + share * p_MV
    want = -(target_MV * torch.log_softmax(hidden_MD @ head_VD.T, -1)).sum(-1).mean()
    got = distillation_loss(hidden_MD, head_VD, batch.targets, mixed(share), resolve_tail(mixed(share), "ghost"))
    entropy = torch.special.entr(p_MV).sum(-1).mean()
    assert got.total.item() == pytest.approx((want - share * entropy).item(), rel=2e-3)
    text = torch.nn.functional.cross_entropy(hidden_MD @ head_VD.T, token_M)
    got_MD, want_MD, text_MD = (torch.autograd.grad(loss, hidden_MD)[0] for loss in (got.total, want, text))
    assert float((got_MD - want_MD).norm() / want_MD.norm()) < 0.02
    assert share == 0 or float((text_MD - want_MD).norm() / want_MD.norm()) > 0.1


def test_the_next_epoch_goes_on_from_the_student_and_its_own_beliefs(
    epochs: tuple[Path, kdata.Dataset], tmp_path: Path
) -> None:
    """With the whole weight on its former self the student has nothing to learn at the start; the text moves it."""
    model, dataset = epochs
    for share, at_start in ((1.0, 0.0), (0.5, None)):
        config = TrainConfig(
            student=CheckpointStudent(model=str(model)), objective=mixed(share), steps=1, log_every_steps=1, **SIZES
        )
        loss = train(config, dataset.path, None, tmp_path / str(share)).losses["loss"]
        assert loss == pytest.approx(at_start, abs=2e-3) if at_start is not None else loss > 0.5
