"""The real vLLM with what passes through kdata: an adapter, further arguments, and a length that grows."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdata.format.keep import KeepConfig
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.sizing import Work

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
HYBRID, TOP = KeepConfig(kind="hybrid", k=4, num_draws=6), KeepConfig(kind="topk", k=8)
RANK, ALPHA = 4, 16


def save_adapter(model: Path, folder: Path, merged: Path) -> None:
    """A random LoRA adapter of the query projections in `folder`, and the model with it merged in `merged`."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, adapter = load_file(model / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(1)
    for name in [n for n in weights if n.endswith("q_proj.weight")]:
        rows, columns = weights[name].shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) / RANK
        weights[name] = weights[name] + (ALPHA / RANK) * b @ a
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{stem}.lora_A.weight": a.contiguous(), f"{stem}.lora_B.weight": b.contiguous()}
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(model, merged)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


def ask(model: str, adapter: str, sequences: list[np.ndarray]) -> dict[str, Any]:
    """All that is asked of one teacher: run in a process of its own, because an engine keeps memory and threads."""
    from kdata.teachers.vllm import VllmTeacher

    args = {"max_num_seqs": 7, "load_format": "safetensors", "hf_overrides": {"rms_norm_eps": 1e-6}}
    config = TeacherConfig(model=model, lora=adapter, engine_args=args)
    teacher = VllmTeacher(config, max_k=8, work=Work(20, writes=False))
    answers: dict[str, Any] = {"info": teacher.info, "context": teacher.context, "length": teacher._plan.length}
    answers["loaded"] = sorted(name for name in ("_reader", "_writer") if name in vars(teacher))
    answers["hybrid"] = teacher.read(sequences[:1], HYBRID)
    answers["one at a time"] = sorted(name for name in ("_reader", "_writer") if name in vars(teacher))
    answers["longer"] = teacher.read(sequences, HYBRID)
    answers["grown"] = teacher._plan.length
    prompts = [ids[:5] for ids in sequences]
    answers["written"] = teacher.write(prompts, HYBRID, SamplingConfig(max_tokens=6), [1, 2])
    teacher.close()
    return answers


def test_an_adapter_arguments_and_a_length_that_grows(llama_dir: Path, tmp_path: Path) -> None:
    from kdata.teachers.transformers import TransformersTeacher

    model = Path(shutil.copytree(llama_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    save_adapter(model, tmp_path / "adapter", tmp_path / "merged")
    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 300, size).astype(np.int32) for size in (20, 400)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(ask, str(model), str(tmp_path / "adapter"), sequences).result(timeout=400)
    oracle = TransformersTeacher(TeacherConfig(model=str(tmp_path / "merged"), backend="transformers"))
    assert answers["context"] == 1024 and answers["length"] == 256, (
        "the model's limit is recorded, not the engine's length"
    )
    assert answers["loaded"] == ["_writer"] and answers["one at a time"] == ["_reader"]
    assert answers["grown"] == 513
    for ours, theirs in zip(answers["longer"], oracle.read(sequences, HYBRID), strict=True):
        for name in ("logprob", "log_tail", "entropy"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-4, err_msg=name)
    np.testing.assert_allclose(answers["hybrid"][0].logprob, answers["longer"][0].logprob, atol=1e-4)
    whole = [completion.readout.token_ids for completion in answers["written"]]
    for completion, theirs in zip(answers["written"], oracle.read(whole, HYBRID), strict=True):
        np.testing.assert_allclose(completion.readout.logprob[5:], theirs.logprob[5:], atol=2e-4)
    info = answers["info"]
    assert info.engine_args == {"hf_overrides": {"rms_norm_eps": 1e-6}} and info.lora_hash and not info.deterministic
    assert info.speed_args == {"load_format": "safetensors", "max_num_seqs": 7}


def read_with_two(model: str, sequences: list[np.ndarray]) -> dict[str, Any]:
    """Hybrid targets of a model that is spread over two processes, read and written."""
    from kdata.teachers.vllm import VllmTeacher

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    teacher = VllmTeacher(TeacherConfig(model=model, tensor_parallel=2), max_k=8, work=Work(60))
    answers: dict[str, Any] = {"read": teacher.read(sequences, HYBRID)}
    prompts = [ids[:5] for ids in sequences]
    answers["written"] = teacher.write(prompts, HYBRID, SamplingConfig(max_tokens=6), [1, 2])
    teacher.close()
    return answers


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")
def test_a_model_that_is_spread_over_two_processes(llama_dir: Path) -> None:
    """Two processes on two cores stand in for two GPUs."""
    from kdata.teachers.transformers import TransformersTeacher

    rng = np.random.default_rng(0)
    sequences = [rng.integers(2, 300, size).astype(np.int32) for size in (20, 60)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(read_with_two, str(llama_dir), sequences).result(timeout=550)
    oracle = TransformersTeacher(TeacherConfig(model=str(llama_dir), backend="transformers"))
    for ours, theirs in zip(answers["read"], oracle.read(sequences, HYBRID), strict=True):
        for name in ("logprob", "log_tail", "entropy"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=2e-4, err_msg=name)
    whole = [completion.readout.token_ids for completion in answers["written"]]
    for completion, theirs in zip(answers["written"], oracle.read(whole, HYBRID), strict=True):
        np.testing.assert_allclose(completion.readout.logprob[5:], theirs.logprob[5:], atol=2e-4)
        assert (completion.readout.kept.num_exact[5:] == 4).all()
