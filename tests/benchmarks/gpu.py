"""All that only a GPU shows, in one run of at most eight minutes: OUT/gpu.json and OUT/gpu.md.

    python -m tests.benchmarks.gpu [--out build/gpu] [--only PART ...] [--seconds 480] [--tiny]

    exact     loss and gradients in bf16 and float32 against a dense float64 softmax, beside the naive version in bf16
    loss-WAY  forward and backward of the loss at 4,096 and 32,768 tokens, V = 128,256, D = 4,096, bf16
    step-WAY  a whole optimizer step of a 3.2B student of random weights on 8,192 tokens in one packed row
    capture   tokens per second of vLLM's prefill alone, of its hidden states alone, and of readouts that are kept
    generate  tokens per second of vLLM's engine alone, and of written text with its targets

It needs the package and torch for CUDA, nothing else. A part whose package is not installed is skipped, with the reason in
both files. Each part is a process of its own with a limit of its own, so that one that runs out of memory or time ends alone.
`--tiny` uses small sizes, which also run on a CPU; its figures say nothing about speed. Memory of `loss` and `step` is the
most that torch allocated over what was there before (weights and inputs are not in that of `loss`, all is in that of `step`);
`device_gib` is the most that the whole GPU had in use while the part ran.

Published on an H200 (arXiv 2608.03796): 85.2 GiB for a dense loss at 32K tokens and 5.45 GiB for a chunked one; a step of a
3.2B student at 8K tokens of context 18.4 s at 61.8 GB and 20.2 s at 58.3 GB, with an 8B teacher that computes its logits in
the step, and a batch that is not named. Ours has no teacher in the step and one row of 8K tokens, so memory can be compared
and seconds cannot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from kdata.loader.packing import Place
from kdata.trainer.acceleration import check_acceleration, compile_layers
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.fused import distillation_loss
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets
from kdata.trainer.optimizers import make_optimizer
from kdata.trainer.student import attend_by_documents
from tests.benchmarks.step import dense_teacher, machine, status_mib

MIX = ObjectiveConfig(weights={"cross_entropy": 0.1, "forward_kl": 0.9})
KL = ObjectiveConfig(weights={"forward_kl": 1.0})
KEPT, GIB = 64, 2**30
PUBLISHED = {
    "source": "arXiv 2608.03796, one H200",
    "loss_32k_dense_gib": 85.2,
    "loss_32k_chunked_gib": 5.45,
    "step_8k": [{"seconds": 18.4, "gb": 61.8}, {"seconds": 20.2, "gb": 58.3}],
}


@dataclass(frozen=True)
class Part:
    """One part: what it measures from the sizes, the packages that it needs, and its limit of seconds."""

    measure: Callable[[bool], dict[str, Any]]
    packages: tuple[str, ...] = ()
    seconds: int = 60
    needs_gpu: bool = False


# ---------------------------------------------------------------------------------------------------- time and memory


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cost(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds (the best), and the most memory over what is there before, in GiB. The first call is not counted."""
    work()
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / GIB
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = status_mib("VmRSS") / 1024
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else status_mib("VmHWM") / 1024
    return {"seconds": min(seconds), "extra_gib": peak - before, "peak_gib": peak}


def targets_of(positions: int, vocab: int, place: torch.device) -> Targets:
    """A teacher of `KEPT` distinct entries that hold 0.9 of the probability."""
    first_M1 = torch.randint(0, vocab, (positions, 1), device=place)
    ids_MK = (first_M1 + 7 * torch.arange(KEPT, device=place)) % vocab
    logprobs_MK = torch.log_softmax(torch.randn(positions, KEPT, device=place), -1) + math.log(0.9)
    tail_M = torch.full((positions,), math.log(0.1), device=place)
    return Targets(torch.randint(0, vocab, (positions,), device=place), ids_MK, logprobs_MK, tail_M)


# ------------------------------------------------------------------------------------------------------------- losses

Loss = Callable[
    [Tensor, Tensor, Targets, Any], Tensor
]  # of hidden [M, D], head [V, D], targets and the way's own input


def kdata_loss(hidden_MD: Tensor, head_VD: Tensor, targets: Targets, _: Any) -> Tensor:
    """Ours: KL of the kept entries and a bucket."""
    return distillation_loss(hidden_MD, head_VD, targets, KL, "ghost").total


def dense_loss(hidden_MD: Tensor, head_VD: Tensor, targets: Targets, log_p_MV: Any) -> Tensor:
    """All logits, in float32 from the softmax on, against dense log-probabilities of the teacher."""
    log_q_MV = functional.log_softmax((hidden_MD @ head_VD.T).float(), -1)
    return functional.kl_div(log_q_MV, log_p_MV, reduction="batchmean", log_target=True)


def liger_kl(hidden_MD: Tensor, head_VD: Tensor, targets: Targets, log_p_MV: Any) -> Tensor:
    """Liger's fused linear KL, which needs dense probabilities of the teacher."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    loss: Tensor = LigerFusedLinearKLDivLoss()(hidden_MD, head_VD, log_p_MV)
    return loss


def liger_jsd(hidden_MD: Tensor, head_VD: Tensor, targets: Targets, teacher: Any) -> Tensor:
    """Liger's fused linear JSD at beta 0, which is forward KL, from the teacher's hidden states and head."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss: Tensor = LigerFusedLinearJSD(jsd_beta=0.0)(hidden_MD, head_VD, *teacher, None)
    return loss


def cross_entropy(hidden_MD: Tensor, head_VD: Tensor, targets: Targets, _: Any) -> Tensor:
    """cut-cross-entropy: cross-entropy of the actual tokens alone, the floor of what a loss of a head costs."""
    from cut_cross_entropy import linear_cross_entropy

    loss: Tensor = linear_cross_entropy(hidden_MD, head_VD, targets.token_ids_C)
    return loss


def own_input(way: str, hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> Any:
    """What a way needs of the teacher beside the kept entries."""
    if way in ("dense", "liger-kl"):
        log_p_MV = dense_teacher(targets, head_VD.shape[0])
        return log_p_MV if way == "dense" else log_p_MV.exp_().to(hidden_MD.dtype)
    if way == "liger-jsd":
        return torch.randn_like(hidden_MD), torch.randn_like(head_VD) * 0.02
    return None


LOSSES: dict[str, Loss] = {
    "kdata": kdata_loss,
    "dense": dense_loss,
    "liger-kl": liger_kl,
    "liger-jsd": liger_jsd,
    "cut-cross-entropy": cross_entropy,
}


def measure_loss(way: str) -> Callable[[bool], dict[str, Any]]:
    """A part that measures one loss at two numbers of tokens."""

    def measure(tiny: bool) -> dict[str, Any]:
        vocab, width = (2048, 64) if tiny else (128_256, 4096)
        figures: dict[str, Any] = {}
        for tokens in (64, 256) if tiny else (4096, 32_768):
            torch.manual_seed(0)
            dtype, place = torch.bfloat16, device()
            hidden_MD = torch.randn(tokens, width, dtype=dtype, device=place).requires_grad_()
            head_VD = (torch.randn(vocab, width, dtype=dtype, device=place) * 0.02).requires_grad_()
            targets = targets_of(tokens, vocab, place)
            try:
                figures[str(tokens)] = _loss_cost(way, hidden_MD, head_VD, targets)
            except torch.OutOfMemoryError:
                figures[str(tokens)] = {"out_of_memory": True}
        return figures

    return measure


def _loss_cost(way: str, hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> dict[str, float]:
    """The teacher's own input counts in `teacher_gib`; what the loss takes beyond it in `extra_gib`."""
    extra = own_input(way, hidden_MD, head_VD, targets)
    tensors = extra if isinstance(extra, tuple) else () if extra is None else (extra,)
    values: list[float] = []

    def once() -> None:
        hidden_MD.grad = head_VD.grad = None
        loss = LOSSES[way](hidden_MD, head_VD, targets, extra)
        loss.backward()
        values.append(float(loss.detach()))

    figures = cost(once, repeats=3)
    hidden_MD.grad = head_VD.grad = None
    return {**figures, "teacher_gib": sum(t.numel() * t.element_size() for t in tensors) / GIB, "loss": values[-1]}


def measure_exactness(tiny: bool) -> dict[str, Any]:
    """Relative errors of the gradients, and the absolute one of the loss, against float64."""
    positions, vocab, width = (64, 2048, 64) if tiny else (512, 32_768, 2048)
    torch.manual_seed(0)
    place = device()
    hidden_MD, head_VD = torch.randn(positions, width, device=place), torch.randn(vocab, width, device=place) * 0.05
    # Every version has the same inputs, which bf16 holds exactly.
    hidden_MD, head_VD = (t.bfloat16().double() for t in (hidden_MD, head_VD))
    targets = targets_of(positions, vocab, place)
    expected = _gradients(_oracle, hidden_MD, head_VD, targets)
    figures: dict[str, Any] = {}
    ours: Callable[..., Tensor] = lambda h, w, t: distillation_loss(h, w, t, MIX, "ghost").total  # noqa: E731
    for name, loss, dtype in (
        ("kdata bf16", ours, torch.bfloat16),
        ("naive bf16", _oracle, torch.bfloat16),
        ("kdata float32", ours, torch.float32),
    ):
        got = _gradients(loss, hidden_MD.to(dtype), head_VD.to(dtype), targets)
        figures[name] = {
            "loss_error": float((got[0].double() - expected[0]).abs()),
            **{
                f"{part}_error": float((a.double() - b).norm() / b.norm())
                for part, a, b in zip(("hidden", "head"), got[1:], expected[1:], strict=True)
            },
        }
    return figures


def _oracle(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> Tensor:
    """The mix by a dense softmax; bf16 logits are widened to float32, as models do."""
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    log_q_MV = torch.log_softmax((hidden_MD @ head_VD.T).to(wide), -1)
    log_q_MK, log_p_MK = log_q_MV.gather(1, targets.ids_CK), targets.logprobs_CK.to(wide)
    rest_M = torch.log(log_q_MV.exp().scatter(1, targets.ids_CK, 0.0).sum(-1))
    tail_M = targets.log_tail_C.to(wide)
    kl_M = (log_p_MK.exp() * (log_p_MK - log_q_MK)).sum(-1) + tail_M.exp() * (tail_M - rest_M)
    ce_M = -log_q_MV.gather(1, targets.token_ids_C[:, None])[:, 0]
    return (0.1 * ce_M + 0.9 * kl_M).mean()


def _gradients(loss: Callable[..., Tensor], hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (hidden_MD, head_VD)]
    value = loss(*leaves, targets)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


# -------------------------------------------------------------------------------------------------------- a whole step

STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "varlen": {"attention": "varlen"},
    "compiled": {"attention": "varlen", "compile": True},
    "8-bit": {"attention": "varlen", "optimizer": "adamw_8bit"},
}


def measure_step(way: str) -> Callable[[bool], dict[str, Any]]:
    """A part that measures whole steps with some settings of `TrainConfig`."""

    def measure(tiny: bool) -> dict[str, Any]:
        settings = dict(STEPS[way])
        if device().type == "cpu":
            settings.pop("attention", None)  # refused there
        config = TrainConfig(
            student=ScratchStudent(), precision="bf16", gradient_checkpointing=True, learning_rate=1e-5, **settings
        )
        check_acceleration(config.attention, config.compile, device(), "bf16")
        student = _student(tiny)
        student.train()
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if config.attention == "varlen":
            attend_by_documents(student)
        learner = Learner(student, "bf16")
        if config.compile:
            compile_layers(learner.layers)
        optimizer = make_optimizer(student, config, Ranks(device()))
        batch = _batch(256 if tiny else 8192, student.config.vocab_size)
        losses: list[float] = []

        def step() -> None:
            total, _ = learner(batch, MIX, "ghost", len(batch.targets))
            total.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total.detach()))

        figures = cost(step, repeats=2 if tiny else 4)
        tokens = batch.num_tokens / figures["seconds"]
        params = sum(p.numel() for p in student.parameters())
        return {**figures, "tokens_per_sec": tokens, "params": params, "losses": losses}

    return measure


def _student(tiny: bool) -> LlamaForCausalLM:
    """Random weights in the sizes of Llama 3.2 3B: 3.2B parameters, embeddings and head in one matrix."""
    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
    config = LlamaConfig(
        **(sizes | {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192}),
        tie_word_embeddings=True,
    )
    if tiny:
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=2048, max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
    torch.manual_seed(0)
    with device():
        return LlamaForCausalLM(config).float()


def _batch(tokens: int, vocab: int) -> Batch:
    """One row of four packed documents of equal length."""
    length = tokens // 4
    positions_BL = torch.arange(length).repeat(4)[None]
    segments_BL = torch.arange(4).repeat_interleave(length)[None]
    predictor_M = (positions_BL[0] < length - 1).nonzero()[:, 0]
    document_M = segments_BL[0][predictor_M].numpy()
    count = len(predictor_M)
    return Batch(
        input_ids=torch.randint(0, vocab, (1, tokens)), position_ids=positions_BL, segment_ids=segments_BL,
        predictor_M=predictor_M, targets=targets_of(count, vocab, torch.device("cpu")),
        logprob_M=np.zeros(count, np.float32), rank_M=np.ones(count, np.int32), entropy_M=np.zeros(count, np.float32),
        document_M=document_M, rows=np.arange(4), first_target_S=np.ones(4, np.int64), num_tokens=tokens,
        place=Place(0, 0, 0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- the teacher


def _teacher_folder(folder: Path, tiny: bool) -> Path:
    """A Llama of random weights with a small tokenizer beside it; its ids need no text here."""
    from tests.fakes import save_llama, save_tokenizer

    if tiny:
        return save_llama(folder)
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    with device():
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def _sequences(tiny: bool, vocab: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    count, length = (8, 64) if tiny else (256, 1024)
    return [rng.integers(2, vocab, length).astype(np.int32) for _ in range(count)]


def measure_capture(tiny: bool) -> dict[str, Any]:
    """Tokens per second; the best of two rounds in turns."""
    from kdata.format.keep import KeepConfig
    from kdata.teachers.config import TeacherConfig
    from kdata.teachers.sizing import Work
    from kdata.teachers.vllm import VllmTeacher
    from tests.benchmarks.capture import bare, hidden

    with tempfile.TemporaryDirectory() as name:
        model = _teacher_folder(Path(name) / "model", tiny)
        sequences = _sequences(tiny, 300 if tiny else 128_256)
        teacher = VllmTeacher(
            TeacherConfig(model=str(model)), max_k=KEPT, work=Work(max(map(len, sequences)), writes=True)
        )
        tokens = sum(map(len, sequences))

        def kept(keep: KeepConfig) -> float:
            started = time.perf_counter()
            teacher.read(sequences, keep)
            return tokens / (time.perf_counter() - started)

        ways: dict[str, Callable[[], float]] = {
            "bare prefill": lambda: bare(teacher, sequences),
            "hidden states alone": lambda: hidden(teacher, sequences),
            "hybrid 8 + 28 kept": lambda: kept(KeepConfig(kind="hybrid", k=8, num_draws=28)),
            "top 64 kept": lambda: kept(KeepConfig(kind="topk", k=KEPT)),
        }
        teacher.read(sequences[:1], KeepConfig(kind="hybrid", k=8, num_draws=28))  # the parity check, compilation
        speeds = dict.fromkeys(ways, 0.0)
        for _ in range(2):
            for way, run in ways.items():
                speeds[way] = max(speeds[way], run())
        teacher.close()
    return {"tokens_per_sec": speeds, "of_bare": {way: speed / speeds["bare prefill"] for way, speed in speeds.items()}}


def measure_generate(tiny: bool) -> dict[str, Any]:
    """Tokens per second by the ways of tests/benchmarks/generate.py."""
    from tests.benchmarks.generate import _ways

    with tempfile.TemporaryDirectory() as name:
        model = _teacher_folder(Path(name) / "model", tiny)
        prompts = [ids[:32] for ids in _sequences(tiny, 300 if tiny else 128_256)]
        speeds = _ways(model, prompts, 16 if tiny else 128)
    return {
        "tokens_per_sec": speeds,
        "of_engine": {way: speed / speeds["engine alone"] for way, speed in speeds.items()},
    }


PARTS: dict[str, Part] = {  # their limits are eight minutes together
    "exact": Part(measure_exactness, seconds=20),
    "loss-kdata": Part(measure_loss("kdata"), seconds=25),
    "loss-dense": Part(measure_loss("dense"), seconds=25),
    "loss-liger-kl": Part(measure_loss("liger-kl"), ("liger_kernel",), 25, needs_gpu=True),
    "loss-liger-jsd": Part(measure_loss("liger-jsd"), ("liger_kernel",), 25, needs_gpu=True),
    "loss-cut-cross-entropy": Part(measure_loss("cut-cross-entropy"), ("cut_cross_entropy",), 25, needs_gpu=True),
    "step-default": Part(measure_step("default"), seconds=35),
    "step-varlen": Part(measure_step("varlen"), seconds=35),
    "step-compiled": Part(measure_step("compiled"), seconds=60),
    "step-8-bit": Part(measure_step("8-bit"), ("bitsandbytes",), 35),
    "capture": Part(measure_capture, ("vllm",), 90),
    "generate": Part(measure_generate, ("vllm",), 80),
}
TINY_FACTOR = 6  # of these limits: the processor may have other work


# ------------------------------------------------------------------------------------------------------------ in children


class DeviceMemory:
    """The most memory in use on the first GPU while a block runs, in GiB; None without one. As a context manager."""

    def __enter__(self) -> DeviceMemory:
        self.gib: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError:
            return
        while not self._over.wait(0.1):
            self.gib = max(self.gib or 0.0, pynvml.nvmlDeviceGetMemoryInfo(handle).used / GIB)


def reason_to_skip(part: Part) -> str | None:
    """Why a part cannot run here; None where it can."""
    for package in part.packages:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if part.needs_gpu and not torch.cuda.is_available():
        return "its kernels need a GPU"
    return None


def run_part(name: str, tiny: bool, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own and return {"status": done, skipped or failed, ...}."""
    reason = reason_to_skip(PARTS[name])
    if reason is None and seconds < (1 if tiny else 15):
        reason = "no time was left"
    if reason is not None:
        return {"status": "skipped", "reason": reason}
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--part", name, *(["--tiny"] if tiny else [])]
    started = time.perf_counter()
    with DeviceMemory() as memory, tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(child.pid, signal.SIGKILL)  # it may have started an engine
            child.wait()
        output.seek(0), errors.seek(0)
        lines, complaints = output.read().splitlines(), errors.read().strip().splitlines()
    took = round(time.perf_counter() - started, 1)
    if status is None:
        return {"status": "failed", "reason": f"it took longer than {seconds:.0f} s", "took_sec": took}
    if status != 0:
        reason = complaints[-1] if complaints else f"it ended with status {status}"
        return {"status": "failed", "reason": reason[:500], "took_sec": took}
    figures = json.loads(lines[-1])
    return {"status": "done", "took_sec": took, "device_gib": memory.gib, "figures": figures}


def about() -> dict[str, Any]:
    """The machine and the packages."""
    packages = ("torch", "transformers", "triton", "vllm", "liger_kernel", "cut_cross_entropy", "bitsandbytes")
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package.replace("_", "-"))
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cuda": torch.version.cuda, "processor": machine(), "packages": versions}


def markdown(result: dict[str, Any]) -> str:
    """The result as a table, one line for each part and size."""
    lines = [
        f"# On {result['about']['gpu'] or 'a CPU, tiny sizes: no measure of speed'}",
        "",
        f"{result['about']['processor']}; torch {result['about']['packages']['torch']}; {result['took_sec']:.0f} s in all.",
        "",
        "| part | figures | GPU in use, GiB |",
        "|---|---|---|",
    ]
    for name, part in result["parts"].items():
        if part["status"] != "done":
            lines.append(f"| {name} | {part['status']}: {part['reason'].replace('|', '/')} | |")
            continue
        used = "" if part["device_gib"] is None else f"{part['device_gib']:.1f}"
        for label, text in _rows(part["figures"]):
            lines.append(f"| {name}{label} | {text} | {used} |")
    published = result["published"]
    steps = " or ".join(f"{step['seconds']} s at {step['gb']} GB" for step in published["step_8k"])
    lines += [
        "",
        f"Published ({published['source']}): dense loss at 32K {published['loss_32k_dense_gib']} GiB, chunked "
        f"{published['loss_32k_chunked_gib']} GiB; a step at 8K {steps}.",
    ]
    return "\n".join(lines) + "\n"


def _rows(figures: dict[str, Any], label: str = "") -> list[tuple[str, str]]:
    """Label and text of each line: nested figures become lines of their own."""
    nested = {key: value for key, value in figures.items() if isinstance(value, dict)}
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict | list)}
    text = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )
    rows = [(label, text)] if plain else []
    for key, value in nested.items():
        rows += _rows(value, f"{label}, {key}")
    return rows


def main() -> None:
    """Run the parts one after the other and write both files; or one part, for its parent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--seconds", type=float, default=480, help="seconds of all parts together")
    parser.add_argument("--tiny", action="store_true", help="small sizes, also on a CPU, to test this script")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part].measure(options.tiny)))
        return
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("torch finds no CUDA GPU; use --tiny to test this script without one")
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result: dict[str, Any] = {"about": about(), "tiny": options.tiny, "published": PUBLISHED, "parts": {}}
    for name in options.only:
        left = options.seconds - (time.perf_counter() - started)
        limit = PARTS[name].seconds * (TINY_FACTOR if options.tiny else 1)
        result["parts"][name] = run_part(name, options.tiny, min(left, limit))
        result["took_sec"] = time.perf_counter() - started
        # After each part, so that a run that is cut off leaves what it has.
        (options.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "gpu.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
