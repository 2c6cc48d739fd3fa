"""tests/benchmarks/gpu.py in tiny sizes: every part runs here, is skipped with its reason, or ends alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import gpu

ROOT = Path(__file__).resolve().parents[2]


def run(out: Path, *parts: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--tiny", "--out", str(out), "--only", *parts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "gpu.json").read_text())
    assert set(result["parts"]) == set(parts)
    table = (out / "gpu.md").read_text()
    assert all(f"| {part}" in table for part in parts)
    return result["parts"]


def test_limits_of_the_parts_are_eight_minutes_together() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 480


def test_exactness_a_loss_and_a_step(tmp_path: Path) -> None:
    parts = run(tmp_path, "exact", "loss-kdata", "loss-liger-kl", "step-default")
    for name in ("exact", "loss-kdata", "step-default"):
        assert parts[name]["status"] == "done", parts[name]
    exact = parts["exact"]["figures"]
    for error in ("hidden_error", "head_error"):
        assert exact["kdata float32"][error] < 1e-5
        assert 1e-4 < exact["kdata bf16"][error] < 1.2 * exact["naive bf16"][error]
    losses = parts["step-default"]["figures"]["losses"]
    assert len(losses) == 3 and losses[-1] < losses[0]
    if not torch.cuda.is_available():
        liger = parts["loss-liger-kl"]
        assert liger["status"] == "skipped" and liger["reason"] in (
            "its kernels need a GPU",
            "liger_kernel is not installed",
        )


def test_a_part_that_takes_too_long_or_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    late = gpu.run_part("exact", True, 1.5)
    assert late["status"] == "failed" and late["reason"] == "it took longer than 2 s"
    assert gpu.run_part("exact", False, 10) == {"status": "skipped", "reason": "no time was left"}
    monkeypatch.setattr(sys, "executable", "false")
    assert gpu.run_part("exact", True, 30)["reason"] == "it ended with status 1"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu.run_part("capture", True, 30) == {"status": "skipped", "reason": "vllm is not installed"}


def test_without_a_gpu_the_full_sizes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch finds no CUDA GPU; use --tiny" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_dense_loss_and_the_other_steps(tmp_path: Path) -> None:
    (tmp_path / "losses").mkdir()
    losses = run(tmp_path / "losses", "loss-kdata", "loss-dense")
    ours, dense = (losses[f"loss-{way}"]["figures"]["256"] for way in ("kdata", "dense"))
    assert abs(ours["loss"] - dense["loss"]) < 0.02 and ours["loss"] <= dense["loss"], "a bucket merges outcomes"
    assert ours["teacher_gib"] == 0 < dense["teacher_gib"]
    parts = run(tmp_path, "step-varlen", "step-compiled", "step-8-bit")
    assert all(part["status"] == "done" for part in parts.values()), parts


@pytest.mark.slow
@pytest.mark.vllm
def test_capture_and_generation(tmp_path: Path) -> None:
    parts = run(tmp_path, "capture", "generate")
    assert all(part["status"] == "done" for part in parts.values()), parts
    assert parts["capture"]["figures"]["of_bare"]["bare prefill"] == 1.0
    assert all(speed > 0 for speed in parts["generate"]["figures"]["tokens_per_sec"].values())
