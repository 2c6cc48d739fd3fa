"""Optimizers by name: the update of each against its formula, exact resumption, and what is refused.

Also `compile` and `attention`: the numbers of the plain way, or a refusal before the first step.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

import kdata
import kdata.trainer.acceleration as acceleration
from kdata.errors import ConfigError, CorruptError, DependencyError, MismatchError
from kdata.format.files import file_info
from kdata.format.manifest import digest_of, json_bytes
from kdata.trainer import forward
from kdata.trainer.acceleration import bounds_of, check_acceleration, use_varlen
from kdata.trainer.config import OptimizerName, ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.loader import BatchesConfig, Loader
from kdata.trainer.optimizers import make_optimizer
from kdata.trainer.student import attend_by_documents, build_student, hidden_states
from kdata.trainer.train import train
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(60)]
CPU = Ranks(torch.device("cpu"))
# 64 x 64: a matrix of 4,096 values, which the 8-bit optimizer packs; 61 x 64 is a smaller one, which it does not.
SIZES = ScratchStudent(hidden_size=64, num_layers=1, num_heads=2, max_positions=64, intermediate_size=65)


def config(**changes: object) -> TrainConfig:
    values: dict[str, Any] = {
        "student": SIZES, "steps": 6, "batch_tokens": 128, "context_tokens": 64, "warmup_steps": 0, "learning_rate": 3e-3,
        "log_every_steps": 1, "checkpoint_every_steps": 2,
    }  # fmt: skip
    return TrainConfig(**{**values, **changes})


def losses(out: Path) -> list[tuple[float, float]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in read]


def one_step(
    dataset: kdata.Dataset, **changes: object
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before a step, their gradients, and parameters after it."""
    student = build_student(SIZES, dataset, 0)
    optimizer = make_optimizer(student, config(**changes), CPU)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    hidden_states(student, torch.arange(20)[None], torch.arange(20)[None]).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    optimizer.set_rate(1e-2)
    optimizer.step()
    return before, gradients, {name: p.detach() for name, p in student.named_parameters()}


def adamw_step(before: Tensor, gradient: Tensor, decay: float, rate: float = 1e-2) -> Tensor:
    """The first step of AdamW: bias-corrected averages of one gradient are the gradient and its square."""
    return before * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)


def test_the_first_step_of_adamw_in_8_bits_is_that_of_adamw(dataset: kdata.Dataset) -> None:
    before, gradients, after = one_step(dataset, optimizer="adamw_8bit")
    for name, gradient in gradients.items():
        expected = adamw_step(before[name].double(), gradient.double(), 0.1 if gradient.ndim == 2 else 0.0)
        clear = gradient.abs() > 1e-5  # the small constant in the denominator
        assert clear.any()
        torch.testing.assert_close(after[name].double()[clear], expected[clear], rtol=1e-3, atol=1e-6)


def orthogonal(gradient: Tensor) -> Tensor:
    """Five Newton-Schulz iterations of Muon in float64, of the gradient with norm 1."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_takes_orthogonal_steps_inside_of_the_layers_alone(dataset: kdata.Dataset) -> None:
    """At AdamW's size: 0.2 sqrt(larger side) times the rate. Torch iterates in bf16, hence the tolerance."""
    before, gradients, after = one_step(dataset, optimizer="muon")
    matrices = [name for name, gradient in gradients.items() if gradient.ndim == 2 and ".layers." in name]
    assert len(matrices) == 7
    for name, gradient in gradients.items():
        if name in matrices:
            step = (before[name].double() * (1 - 1e-2 * 0.1) - after[name]) / (1e-2 * 0.2 * max(gradient.shape) ** 0.5)
            expected = orthogonal(gradient)
            assert float((step * expected).sum() / step.norm() / expected.norm()) > 0.95
            assert float(step.norm() / expected.norm()) == pytest.approx(1, abs=0.1)
        else:
            expected = adamw_step(before[name], gradient, 0.1 if gradient.ndim == 2 else 0.0)
            clear = gradient.abs() > 1e-5
            torch.testing.assert_close(after[name][clear], expected[clear], rtol=1e-3, atol=1e-6)


def test_the_default_is_the_adamw_of_torch_bit_for_bit(dataset: kdata.Dataset) -> None:
    ours, plain = build_student(SIZES, dataset, 0), build_student(SIZES, dataset, 0)
    optimizer = make_optimizer(ours, config(), CPU)
    matrices, others = ([p for p in plain.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), fused=True)
    for number in range(3):
        for model in (ours, plain):
            ids = torch.arange(20)[None] + number
            hidden_states(model, ids, torch.arange(20)[None]).square().sum().backward()
        optimizer.step(), optimizer.zero_grad(), reference.step(), reference.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_each_optimizer_learns_and_resumes_exactly(dataset: kdata.Dataset, tmp_path: Path, name: OptimizerName) -> None:
    settings = config(optimizer=name, steps=30, checkpoint_every_steps=10)
    train(settings, dataset.path, None, tmp_path / "whole")
    stop_before(14, settings, dataset, tmp_path / "run")
    train(settings, dataset.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = ((tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("run", "whole"))
    assert ours == theirs
    numbers = [loss for loss, _ in losses(tmp_path / "run")]
    assert np.mean(numbers[-3:]) < 0.8 * np.mean(numbers[:3])


def test_adamw_in_8_bits_stays_close_to_adamw_in_a_quarter_of_the_memory(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    for name in ("adamw", "adamw_8bit"):
        train(config(optimizer=name, steps=30), dataset.path, None, tmp_path / name)
    first, second = (np.array([loss for loss, _ in losses(tmp_path / name)]) for name in ("adamw", "adamw_8bit"))
    np.testing.assert_allclose(first, second, rtol=0.05)
    (checkpoint,) = (tmp_path / "adamw_8bit" / "checkpoints").iterdir()
    stored, name = load_file(checkpoint / "tensors.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    state = {kind: stored[f"{kind}.{name}"] for kind in ("state1", "state2", "absmax1", "absmax2", "step")}
    assert sum(t.numel() * t.element_size() for t in state.values()) < 0.27 * 2 * 4 * 64 * 64
    assert float(state["step"]) == 30


CHANGES = {
    "muon": (
        "momentum_buffer.model.layers.0.self_attn.q_proj.weight",
        lambda t: t[:1].clone(),
        "the student asks for F32",
    ),
    "adamw_8bit": (
        "absmax1.model.layers.0.self_attn.q_proj.weight",
        lambda t: t[:1].clone(),
        r"F32 \[1\], .* F32 \[16\]",
    ),
}


@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_a_state_that_does_not_fit_is_refused(dataset: kdata.Dataset, tmp_path: Path, name: OptimizerName) -> None:
    settings = config(optimizer=name)
    stop_before(4, settings, dataset, tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    tensors, (key, change, message) = load_file(checkpoint / "tensors.safetensors"), CHANGES[name]
    save_file({**tensors, key: change(tensors[key])}, checkpoint / "tensors.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    state["tensors"] = file_info(checkpoint / "tensors.safetensors").model_dump()
    (checkpoint / "state.json").write_bytes(json_bytes({**state, "digest": digest_of(state)}))
    with pytest.raises(CorruptError, match=message):
        train(settings, dataset.path, None, tmp_path)


def test_another_optimizer_does_not_resume_and_older_checkpoints_do(dataset: kdata.Dataset, tmp_path: Path) -> None:
    stop_before(4, config(), dataset, tmp_path)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    settings = json.loads((checkpoint / "state.json").read_text())["settings"]
    assert not {"optimizer", "compile", "attention"} & set(settings), "as an older kdata wrote it"
    with pytest.raises(MismatchError, match="optimizer: None -> 'muon'"):
        train(config(optimizer="muon"), dataset.path, None, tmp_path)
    train(config(), dataset.path, None, tmp_path)


def test_optimizers_that_cannot_run_are_refused(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, two = build_student(SIZES, dataset, 0), Ranks(torch.device("cpu"), world_size=2)
    for name in ("muon", "adamw_8bit"):
        with pytest.raises(ConfigError, match=f"optimizer={name} does not go with parallel=fsdp on 2 ranks"):
            make_optimizer(student, config(optimizer=name, parallel="fsdp"), two)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match=r"pip install 'kdata\[bitsandbytes\]'"):
        train(config(optimizer="adamw_8bit"), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------- compile and attention


def test_a_compiled_student_has_the_numbers_of_the_plain_one_and_resumes_exactly(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    train(config(), dataset.path, None, tmp_path / "plain")
    train(config(compile=True), dataset.path, None, tmp_path / "compiled")
    plain, compiled = (np.array(losses(tmp_path / name)) for name in ("plain", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=1e-4)
    assert not np.array_equal(compiled, plain), (
        "the compiler adds in another order, so equal bits mean that it did not run"
    )
    stop_before(4, config(compile=True), dataset, tmp_path / "run")
    train(config(compile=True), dataset.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "compiled")
    names = set(load_file(tmp_path / "run" / "model" / "model.safetensors"))
    assert names == set(load_file(tmp_path / "plain" / "model" / "model.safetensors"))


def test_compilation_is_refused_without_a_compiler(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler"):
        train(config(compile=True), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_varlen_is_refused_where_it_cannot_run(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"attention=varlen is FlashAttention, which needs a CUDA GPU, not cpu; use"):
        train(config(attention="varlen", device="cpu"), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"compute capability 8\.0"):
        check_acceleration("varlen", False, cuda, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match="precision is fp32; set precision=bf16"):
        check_acceleration("varlen", False, cuda, "fp32")
    check_acceleration("varlen", False, cuda, "bf16")
    gemma = Gemma2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ConfigError, match="does not compute attn_logit_softcapping"):
        use_varlen(Gemma2ForCausalLM(gemma))


def reference_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *_: Any, **options: Any) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` computes on a GPU, document by document."""
    assert options["window_size"] == (-1, 0), "causal"
    parts = []
    for start, end in zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True):
        one = [t[start:end].transpose(0, 1)[None] for t in (q, k, v)]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *one, is_causal=True, scale=options["scale"], enable_gqa=options["enable_gqa"]
            )[0].transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_varlen_has_the_hidden_states_of_the_mask(
    dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch, kv_heads: int | None
) -> None:
    """In batches of several packed rows, with FlashAttention replaced by its definition."""
    monkeypatch.setattr(acceleration, "varlen_attn", reference_varlen)
    sizes = SIZES.model_copy(update={"num_kv_heads": kv_heads})
    masked, varlen = (build_student(sizes, dataset, 0) for _ in range(2))
    attend_by_documents(varlen)
    for batch in Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=4)).epoch():
        before, after = (hidden_states(m, batch.input_ids, batch.position_ids) for m in (masked, varlen))
        there = batch.segment_ids >= 0
        torch.testing.assert_close(after[there], before[there], rtol=1e-4, atol=1e-5)


def test_varlen_that_lets_documents_see_each_other_is_refused(
    dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any, **options: Any) -> Tensor:
        return reference_varlen(q, k, v, bounds[[0, -1]], *rest, **options)

    monkeypatch.setattr(acceleration, "varlen_attn", leaking)
    student = build_student(SIZES, dataset, 0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(4.0)  # attention of random weights is nearly uniform
    with pytest.raises(ConfigError, match="attention=varlen changes the hidden states of LlamaForCausalLM"):
        attend_by_documents(student)


def test_bounds_of_documents() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    bounds = bounds_of(positions)
    assert bounds["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 10] and bounds["max_length_q"] == 4
    assert bounds["cu_seq_lens_q"].dtype == torch.int32
    assert forward.bounds_of is bounds_of  # the one that hidden states are computed with
