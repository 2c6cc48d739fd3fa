"""Two ranks: the same order of data, losses and gradients as one, by DDP and by FSDP2, through resumes and failures.

Float sums are in another order on two ranks, so numbers agree to a tolerance: 1e-5 of the largest gradient of a tensor, and
losses to 1e-4 over twenty steps (3e-2 for gradients in bfloat16). Counts of tokens are equal exactly.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kdata
from kdata.errors import ConfigError
from kdata.trainer.config import ScratchStudent, TrainConfig, TrainResult
from kdata.trainer.student import build_student
from kdata.trainer.train import train
from tests.trainer import rank
from tests.trainer.datasets import save_tokenizer
from tests.trainer.runs import lines

pytestmark = pytest.mark.slow

LENGTHS = [5 + (i * 7) % 40 for i in range(120)]
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"kind": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": 64}
BASE: dict = {
    "student": SMALL, "steps": 20, "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 3, "learning_rate": 5e-3,
    "log_every_steps": 1, "checkpoint_every_steps": 5, "device": "cpu",
}  # fmt: skip
UNTIED = {**SMALL, "tied_embeddings": False}
DDK = {"kind": "ddk", "every_steps": 6, "heldout_share": 0.1}
# One step without clipping: AdamW's first moment is then a tenth of the gradient, for every parameter.
ONE = {"steps": 1, "warmup_steps": 0, "clip_norm": 0.0}
GRADIENTS: dict[str, dict] = {
    "tied": {},
    "untied": {"student": UNTIED},
    "accumulated": {"micro_batch_tokens": 64},
    "recomputed": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "mix": {"objective": {"weights": {"cross_entropy": 0.5, "jsd": 0.5}}},
}


def launch(arguments: list[str], ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Start torchrun on one machine, on a port that is free."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def run_ranks(jobs: list[dict], folder: Path, ranks: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"jobs-{len(list(folder.glob('jobs-*')))}.json"
    file.write_text(json.dumps(jobs))
    done = launch(["-m", "tests.trainer.rank", str(file)], ranks)
    assert done.returncode == 0, done.stderr[-4000:]


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(next(out.glob("checkpoints/step-*/tensors.safetensors")))


@pytest.fixture(scope="module")
def folder(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file: NAME-one alone, NAME-ddp and NAME-fsdp on two ranks."""
    folder = tmp_path_factory.mktemp("runs")

    def job(name: str, kind: str, **changes: object) -> dict:
        config = {**BASE, "parallel": "fsdp" if kind == "fsdp" else "ddp", **changes}
        return {"config": config, "dataset": str(dataset.path), "out": str(folder / f"{name}-{kind}")}

    jobs = {kind: [job(name, kind, **ONE, **own) for name, own in GRADIENTS.items()] for kind in ("one", "ddp", "fsdp")}
    for kind in jobs:
        jobs[kind] += [job("long", kind), job("mixed", kind, mixture=DDK)]
        jobs[kind] += [{**job("poisoned", kind), "poison": 17}]
    # One rank to step 7, two to step 13, one again: `moved` by way of ddp, and of fsdp.
    for name in ("ddp", "fsdp"):
        moved = {**job("moved", "one"), "out": str(folder / f"moved-{name}")}
        rank.run({**moved, "die_at": 8})
        jobs[name].append({**moved, "config": {**moved["config"], "parallel": name}, "die_at": 14})
    for one in jobs["one"]:
        rank.run(one)
    run_ranks(jobs["ddp"] + jobs["fsdp"], folder)
    for name in ("ddp", "fsdp"):
        train(TrainConfig(**BASE), dataset.path, None, folder / f"moved-{name}")
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_gradients_of_two_ranks_are_those_of_one(folder: Path, name: str, kind: str) -> None:
    """The head included: the fused loss reads it whole, and its gradient is summed over ranks once."""
    want, got = tensors(folder / f"{name}-one"), tensors(folder / f"{name}-{kind}")
    assert {n for n in want if not n.startswith("rng")} == {n for n in got if not n.startswith("rng")}
    moments = [n for n in want if n.startswith("exp_avg.")]
    heads = [n for n in moments if "lm_head" in n or "embed_tokens" in n]
    assert len(heads) == (2 if name == "untied" else 1)
    for moment in moments:
        largest = float(want[moment].abs().max())
        assert largest > 0
        tolerance = 3e-2 if name == "bf16" else 1e-5
        torch.testing.assert_close(got[moment], want[moment], rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_losses_of_two_ranks_are_those_of_one(folder: Path, kind: str) -> None:
    got, want = lines(folder / f"long-{kind}"), lines(folder / "long-one")
    assert [line["step"] for line in got] == list(range(1, 21))  # written once, by one rank
    for a, b in zip(got, want, strict=True):
        assert all(a[k] == b[k] for k in ("tokens", "target_tokens", "fill"))
        for key in ("loss", "cross_entropy", "forward_kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)
    result = TrainResult.model_validate_json((folder / f"long-{kind}" / "train.json").read_bytes())
    assert result.tokens == want[-1]["tokens"]
    alone = TrainResult.model_validate_json((folder / "long-one" / "train.json").read_bytes())
    assert result.params == alone.params  # of the whole student, however it is cut


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_student_is_written_whole(folder: Path, kind: str) -> None:
    got, want = (load_file(folder / f"long-{k}" / "model/model.safetensors") for k in (kind, "one"))
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in want.items()}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_moves_from_one_rank_to_two_and_back(folder: Path, kind: str) -> None:
    """Steps 1 to 5 (the checkpoint) alone, to 10 on two ranks, to 20 alone: the order of data and the losses stay."""
    got, want = lines(folder / f"moved-{kind}"), lines(folder / "long-one")
    assert [(line["step"], line["tokens"]) for line in got] == [(line["step"], line["tokens"]) for line in want]
    assert [line["loss"] for line in got[:5]] == [line["loss"] for line in want[:5]]
    assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in want], rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_mixture_gets_the_same_losses_from_two_ranks(folder: Path, kind: str) -> None:
    """The held-out batches are dealt out among ranks; what follows from the losses agrees to their rounding."""
    got, want = lines(folder / f"mixed-{kind}"), lines(folder / "mixed-one")
    assert [line["tokens"] for line in got[:6]] == [line["tokens"] for line in want[:6]]
    periods = [[line["mixture"] for line in part if "mixture" in line] for part in (got, want)]
    assert len(periods[0]) == 4
    assert periods[0][0]["losses"] == pytest.approx(periods[1][0]["losses"], rel=1e-6)
    for a, b in zip(*periods, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_rank_stops_if_one_has_a_loss_that_is_not_finite(folder: Path, kind: str) -> None:
    out, alone = folder / f"poisoned-{kind}", folder / "poisoned-one"
    errors = [(out / f"error-{number}.txt").read_text() for number in (0, 1)]
    assert errors[0] == errors[1] == (alone / "error-0.txt").read_text()
    assert "is nan; rows doc-17. " in errors[0] and not (out / "model").exists()
    assert len(lines(out)) == len(lines(alone))


def test_the_command_trains_under_torchrun(dataset: kdata.Dataset, folder: Path, tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in BASE.items() if key != "steps"]
    command = [sys.executable, "-c", "from kdata.pipelines.cli.main import main; main()", "train", str(dataset.path)]
    done = launch(
        ["--no-python", *command, "--out", str(tmp_path), "--steps", "4", *(a for s in settings for a in ("--set", s))]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("train student:") == 1  # one rank talks
    assert [line["tokens"] for line in lines(tmp_path)] == [line["tokens"] for line in lines(folder / "long-one")[:4]]


def test_a_batch_that_ranks_cannot_share_is_refused(
    dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdata.trainer.phases import micro_rows

    with pytest.raises(ConfigError, match=r"micro_batch_tokens=128 times 3 ranks.*each must be a multiple of the next"):
        micro_rows(TrainConfig(**{**BASE, "micro_batch_tokens": 128}), 3)
    assert micro_rows(TrainConfig(**BASE), 2) == 2 and micro_rows(TrainConfig(**BASE), 1) == 4


OTHERS: dict[str, dict] = {
    "adapter-ddp": {"lora": True},
    "adapter-fsdp": {"lora": True, "parallel": "fsdp"},
    "muon-ddp": {"optimizer": "muon"},
    "adamw_8bit-ddp": {"optimizer": "adamw_8bit"},
    "compiled-ddp": {"compile": True},
    "compiled-fsdp": {"compile": True, "parallel": "fsdp"},
}


def test_adapters_optimizers_and_compiled_students_on_two_ranks(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """The losses of one rank, and the same adapter, whole; a run moves to one rank and back."""
    base = tmp_path / "base"
    build_student(ScratchStudent(**SMALL), dataset, 0).save_pretrained(base)
    save_tokenizer(base)
    lora = {"kind": "checkpoint", "model": str(base), "lora": {"rank": 4, "merge": True}}

    def job(name: str, out: Path, *, lone: bool) -> dict:
        own = dict(OTHERS[name])
        student = {"student": lora} if own.pop("lora", False) else {}
        parallel = "ddp" if lone else own.pop("parallel", "ddp")
        config = {**BASE, "steps": 8, "checkpoint_every_steps": 3, **student, **own, "parallel": parallel}
        return {"config": config, "dataset": str(dataset.path), "out": str(out / name)}

    moved = [job(name, tmp_path / "moved", lone=False) for name in OTHERS]
    for name in OTHERS:
        rank.run(job(name, tmp_path / "one", lone=True))
        rank.run({**job(name, tmp_path / "moved", lone=True), "die_at": 5})
    run_ranks([job(name, tmp_path / "two", lone=False) for name in OTHERS] + moved, tmp_path)
    for name in OTHERS:
        want = [line["loss"] for line in lines(tmp_path / "one" / name)]
        for runs in ("two", "moved"):
            losses = [line["loss"] for line in lines(tmp_path / runs / name)]
            assert losses == pytest.approx(want, rel=2e-3 if name == "adamw_8bit-ddp" else 1e-4), (runs, name)
        if "adapter" in name:
            for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
                got, expected = (load_file(tmp_path / runs / name / file) for runs in ("two", "one"))
                assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in expected.items()}
                for tensor, value in got.items():
                    torch.testing.assert_close(value, expected[tensor], rtol=1e-2, atol=1e-3)


def test_students_of_other_kinds_on_two_ranks(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """A state-space student, an encoder-decoder, and a quantized one: the losses of one rank, and two ranks write them whole.

    The quantized one rounds weights alone: a rounded input turns the last bit of a sum into a step.
    """
    build_student(ScratchStudent(**SMALL), dataset, 0).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    students: dict[str, dict] = {
        "mamba": {"kind": "scratch", "architecture": "mamba", "hidden_size": 32, "num_layers": 2},
        "t5gemma": {**SMALL, "architecture": "t5gemma"},
    }
    if importlib.util.find_spec("torchao"):
        rounding = {"weights": "int4", "group_size": 16, "inputs": None}
        students["rounded"] = {"kind": "checkpoint", "model": str(tmp_path / "base"), "quantize": rounding}
    for name, student in students.items():
        train(TrainConfig(**{**BASE, "student": student, "steps": 6}), dataset.path, None, tmp_path / f"{name}-one")
    own = {n: {"config": {**BASE, "student": s, "steps": 6}, "dataset": str(dataset.path)} for n, s in students.items()}
    run_ranks([{**job, "out": str(tmp_path / f"{name}-ddp")} for name, job in own.items()], tmp_path)
    for name in students:
        got, want = lines(tmp_path / f"{name}-ddp"), lines(tmp_path / f"{name}-one")
        assert [line["target_tokens"] for line in got] == [line["target_tokens"] for line in want]
        assert [line["loss"] for line in got] == pytest.approx([line["loss"] for line in want], rel=1e-3)
        assert (tmp_path / f"{name}-ddp" / "model" / "model.safetensors").exists()
