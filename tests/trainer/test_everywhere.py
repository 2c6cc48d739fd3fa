"""One dataset, one loss, any trainer: the losses of the first 20 steps and the final weights are those of our own loop.

Float sums are in another order where a step is split, so numbers agree to 1e-4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils import parametrize

import kdata
from kdata.selection.plan import make_plan
from kdata.trainer.config import TrainConfig
from kdata.trainer.parts import PackedRows, attach_loss
from kdata.trainer.train import train
from tests.trainer import everywhere
from tests.trainer.datasets import make_dataset

ROOT = Path(__file__).resolve().parents[2]
# Rows of 64 tokens: documents of up to 44 tokens are packed. Of `single`, no two fit into a row.
PACKED, SINGLE = [5 + (i * 7) % 40 for i in range(120)], [33 + (i * 7) % 31 for i in range(90)]
ALONE: dict[str, dict] = {
    "plain": {"trainer": "plain"},
    "plain-flat-accumulated": {"trainer": "plain", "layout": "flat", "accumulate": 2},
    "hf": {"trainer": "hf"},
    "hf-accumulated": {"trainer": "hf", "accumulate": 4},
    "hf-flat": {"trainer": "hf", "layout": "flat"},
    "sft": {"trainer": "sft"},
    "sft-accumulated": {"trainer": "sft", "accumulate": 2},
    "accelerate": {"trainer": "accelerate"},
    "accelerate-accumulated": {"trainer": "accelerate", "accumulate": 2},
}
SINGLE_JOBS: dict[str, dict] = {
    name: {"trainer": name, "layout": "padded", "accumulate": 2} for name in ("plain", "hf", "sft", "accelerate")
}
LORA_JOBS: dict[str, dict] = {name: {"trainer": name, "lora": True} for name in ("plain", "hf", "sft", "accelerate")}
SHORT: dict[str, dict] = {
    name: {"trainer": name.split("-")[0], "epochs": 1, "accumulate": 2 if "accumulated" in name else 1}
    for name in ("plain", "hf", "hf-accumulated", "sft-accumulated", "accelerate-accumulated")
}
RANKS: dict[str, dict] = {
    **{name: {"trainer": name} for name in ("plain", "hf", "sft", "accelerate")},
    "plain-fsdp": {"trainer": "plain", "fsdp": True, "accumulate": 2},
    "accelerate-fsdp": {"trainer": "accelerate", "fsdp": True},
    "hf-fsdp": {"trainer": "hf", "fsdp": True, "accumulate": 2},
    "hf-accumulated": {"trainer": "hf", "accumulate": 2},
    "hf-lora": {"trainer": "hf", "lora": True},
    "hf-short": {"trainer": "hf", "epochs": 1, "accumulate": 2},
    "accelerate-short": {"trainer": "accelerate", "epochs": 1},
    "sft-single": {"trainer": "sft", "layout": "padded"},
    "hf-heavy": {"trainer": "hf", "accumulate": 2, "plan": "heavy"},
}


def result(out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return json.loads((out / "losses.json").read_text()), load_file(out / "model.safetensors")


def agree(got: Path, want: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    losses, weights = result(got)
    assert losses == pytest.approx(want[0], abs=1e-4)
    assert set(weights) == set(want[1])
    for name, weight in weights.items():
        torch.testing.assert_close(weight, want[1][name], rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def ours(dataset: kdata.Dataset, out: Path, plan: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    train(TrainConfig(**everywhere.CONFIG), dataset.path, plan, out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """With the plan `heavy`: about half of the targets, each with a weight."""
    dataset = make_dataset(tmp_path_factory.mktemp("packed") / "set", PACKED, mask_every=5)
    rng = np.random.default_rng(0)
    positions = [np.flatnonzero(row.target_mask)[rng.integers(2) :: 2] for row in dataset]
    weights = [rng.uniform(0.1, 3, len(own)) for own in positions]
    ids = dataset.index(["id"])["id"].to_pylist()
    plan = make_plan(dataset, "heavy", ids, method="mine", parameters={}, positions=positions, weights=weights)
    plan.save(dataset.path / "plans")
    return dataset


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("single") / "set", SINGLE)


@pytest.fixture(scope="module")
def ours_packed(packed: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory):
    return ours(packed, tmp_path_factory.mktemp("ours") / "out")


@pytest.fixture(scope="module")
def ours_heavy(packed: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory):
    return ours(packed, tmp_path_factory.mktemp("ours") / "out", "heavy")


@pytest.fixture(scope="module")
def ours_single(single: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory):
    return ours(single, tmp_path_factory.mktemp("ours") / "out")


def run(job: dict, dataset: kdata.Dataset, out: Path) -> Path:
    everywhere.run({**job, "dataset": str(dataset.path), "out": str(out)})
    return out


@pytest.mark.parametrize("name", ALONE)
def test_packed_rows(name: str, packed: kdata.Dataset, ours_packed, tmp_path: Path) -> None:
    assert len(ours_packed[0]) == everywhere.STEPS and ours_packed[0][-1] < ours_packed[0][0] - 0.1
    agree(run(ALONE[name], packed, tmp_path / "out"), ours_packed)


@pytest.mark.parametrize("name", ["plain", "hf", "hf-accumulated", "accelerate-accumulated"])
def test_weighted_positions(name: str, packed: kdata.Dataset, ours_heavy, ours_packed, tmp_path: Path) -> None:
    assert abs(ours_heavy[0][-1] - ours_packed[0][-1]) > 1e-2
    agree(run({**ALONE[name], "plan": "heavy"}, packed, tmp_path / "out"), ours_heavy)


@pytest.mark.parametrize("name", SINGLE_JOBS)
def test_one_padded_document_per_row(name: str, single: kdata.Dataset, ours_single, tmp_path: Path) -> None:
    agree(run(SINGLE_JOBS[name], single, tmp_path / "out"), ours_single)


class LowRank(torch.nn.Module):
    """W + scale * B A as a parametrization of a whole weight W that does not train."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone()), scale

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.scale * self.b @ self.a


@pytest.fixture(scope="module")
def low_rank(packed: kdata.Dataset):
    """The student with whole weights, of which only the two factors of each adapter train; no PEFT in the loop."""
    data = PackedRows(packed, context_tokens=everywhere.CONTEXT, items=everywhere.STEPS * everywhere.ROWS)
    torch.manual_seed(0)
    adapted = get_peft_model(everywhere.student_of(packed), LoraConfig(**everywhere.LORA))
    factors = {
        n.removeprefix("base_model.model."): p.detach() for n, p in adapted.named_parameters() if p.requires_grad
    }
    model = everywhere.student_of(packed).train().requires_grad_(False)
    scale = everywhere.LORA["lora_alpha"] / everywhere.LORA["r"]
    for name in [n.split(".lora_A")[0] for n in factors if ".lora_A." in n]:
        a, b = (factors[f"{name}.lora_{side}.default.weight"] for side in "AB")
        parametrize.register_parametrization(model.get_submodule(name), "weight", LowRank(a, b, scale))
    attach_loss(model, data)
    losses = everywhere.plain(data, model, {"trainer": "plain"}, everywhere.ROWS, 1, 0)
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("name", LORA_JOBS)
def test_lora_is_whole_weights_with_only_those_parameters_trained(
    name: str, packed: kdata.Dataset, low_rank, tmp_path: Path
) -> None:
    losses, weights = low_rank
    want = losses, {n: p.detach() for n, p in weights.items()}
    before, adapted = everywhere.student_of(packed).state_dict(), "model.layers.0.self_attn.q_proj.weight"
    assert float((want[1][adapted] - before[adapted]).abs().max()) > 1e-3
    assert torch.equal(want[1]["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    agree(run(LORA_JOBS[name], packed, tmp_path / "out"), want)


@pytest.mark.parametrize("name", SHORT)
def test_the_last_step_of_the_data_may_be_short(name: str, packed: kdata.Dataset, ours_packed, tmp_path: Path) -> None:
    """Its loss is divided by the tokens that it has, so that splitting it changes nothing."""
    data = PackedRows(packed, context_tokens=everywhere.CONTEXT, epochs=1)
    steps, short = divmod(len(data), everywhere.ROWS)
    assert short and steps < everywhere.STEPS
    job = {**SHORT[name], "dataset": str(packed.path)}
    everywhere.run({**job, "out": str(tmp_path / "out")})
    everywhere.run({"trainer": "plain", "epochs": 1, "dataset": str(packed.path), "out": str(tmp_path / "whole")})
    want = result(tmp_path / "whole")
    assert len(want[0]) == steps + 1 and want[0][:-1] == pytest.approx(ours_packed[0][:steps], abs=1e-4)
    agree(tmp_path / "out", want)


def on_two_ranks(jobs: list[dict], folder: Path, **variables: str) -> None:
    """Run jobs on two ranks, with variables of the environment."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), **variables,
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.trainer.everywhere", str(folder / "jobs.json")],
        cwd=ROOT, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def two_ranks(packed: kdata.Dataset, single: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    jobs = [
        {**job, "dataset": str((single if job.get("layout") == "padded" else packed).path), "out": str(folder / name)}
        for name, job in RANKS.items()
    ]
    on_two_ranks(jobs, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", RANKS)
def test_two_ranks(
    name: str, two_ranks: Path, packed: kdata.Dataset, ours_packed, ours_heavy, ours_single, low_rank, tmp_path
) -> None:
    if "short" in name:
        everywhere.run({"trainer": "plain", "epochs": 1, "dataset": str(packed.path), "out": str(tmp_path / "whole")})
        agree(two_ranks / name, result(tmp_path / "whole"))
    elif "lora" in name:
        agree(two_ranks / name, (low_rank[0], {n: p.detach() for n, p in low_rank[1].items()}))
    elif "heavy" in name:
        agree(two_ranks / name, ours_heavy)
    else:
        agree(two_ranks / name, ours_single if "single" in name else ours_packed)


@pytest.mark.slow
def test_zero_3_on_two_ranks(packed: kdata.Dataset, ours_packed, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    job = {"trainer": "hf", "zero3": True, "accumulate": 2, "dataset": str(packed.path), "out": str(tmp_path / "zero3")}
    on_two_ranks([job], tmp_path, ACCELERATE_USE_CPU="false", DS_ACCELERATOR="cpu")
    agree(tmp_path / "zero3", ours_packed)
