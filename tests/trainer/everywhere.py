"""The same training by four trainers, for `test_everywhere.py`; alone, or as one of two ranks.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.everywhere JOBS.json

A job is {"trainer", "dataset", "out"} and perhaps "plan", "layout", "accumulate", "lora", "fsdp", "zero3", "epochs" (to the
end of the data instead of STEPS). It writes losses.json and model.safetensors into OUT. Data, seed, student, optimizer and
schedule are those of CONFIG.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainingArguments

import kdata
from kdata.trainer.config import TrainConfig
from kdata.trainer.distributed import whole
from kdata.trainer.parts import Collator, DistillTrainer, Documents, PackedRows, attach_loss
from kdata.trainer.schedule import learning_rate
from kdata.trainer.student import build_student

STEPS, ROWS, CONTEXT = 20, 4, 64
CONFIG: dict[str, Any] = {
    "student": {"kind": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_positions": CONTEXT},
    "steps": STEPS, "batch_tokens": ROWS * CONTEXT, "context_tokens": CONTEXT, "warmup_steps": 3, "learning_rate": 5e-3,
    "log_every_steps": 1, "checkpoint_every_steps": 0, "device": "cpu",
}  # fmt: skip
ZERO3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
}  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}


def student_of(dataset: kdata.Dataset) -> Any:
    return build_student(TrainConfig(**CONFIG).student, dataset, TrainConfig().seed)


def optimizer_of(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW as our loop sets it up."""
    c = TrainConfig(**CONFIG)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": c.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=c.learning_rate, betas=c.betas)


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    phase = TrainConfig(**CONFIG).resolved_phases()[0]
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate(phase, min(step, STEPS)) / phase.learning_rate
    )


def in_steps(loader: DataLoader, count: int) -> Iterator[list[dict[str, Any]]]:
    batches = iter(loader)
    while step := list(islice(batches, count)):
        yield step


def plain(data: PackedRows, model: Any, job: dict, rows: int, world: int, rank: int) -> list[float]:
    """A loop of torch alone: every rank takes its rows of a step."""
    wrapped = model
    if job.get("fsdp"):
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    elif world > 1:
        wrapped = DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    schedule, losses = schedule_of(optimizer), []
    mine = range(rank, len(data), world)
    loader = DataLoader(data, rows, sampler=mine, collate_fn=Collator(job.get("layout", "rows")))
    for batches in in_steps(loader, job.get("accumulate", 1)):
        counted = torch.tensor(float(sum(batch["targets"].total_weight for batch in batches)))
        if world > 1:
            dist.all_reduce(counted)
        total = torch.zeros(())
        for batch in batches:
            loss = wrapped(**batch, counted_tokens=counted).loss * world  # DDP averages over ranks
            loss.backward()
            total += loss.detach() / world
        if world > 1:
            dist.all_reduce(total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses


def accelerated(data: PackedRows, model: Any, job: dict, rows: int) -> list[float]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = None
    if job.get("fsdp"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    if plugin is not None:
        shard_on_cpu(plugin)
    accumulate = job.get("accumulate", 1)
    optimizer = optimizer_of(model)
    schedule, losses = schedule_of(optimizer), []
    loader = DataLoader(data, rows, sampler=SequentialSampler(data), collate_fn=Collator(job.get("layout", "rows")))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batches in in_steps(loader, accumulate):
        counted = accelerator.reduce(torch.tensor(float(sum(batch["targets"].total_weight for batch in batches))))
        total = torch.zeros(())
        for batch in batches:
            loss = model(**batch, counted_tokens=counted).loss * accelerator.num_processes
            accelerator.backward(loss)
            total += loss.detach() / accelerator.num_processes
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(total)))
    return losses


def shard_on_cpu(plugin: Any) -> None:
    """Have Accelerate take FSDP seriously: where there is no GPU it uses DDP instead, without a word."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def ranks_for_deepspeed() -> None:
    """Tell Accelerate of the ranks: with DeepSpeed on a CPU it has no backend of its own, and sees one rank only."""
    from accelerate.state import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]


class Sharded(DistillTrainer):
    """FSDP or ZeRO-3 by the settings of Trainer, which then makes the optimizer itself: of the parts of the parameters."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            from accelerate import FullyShardedDataParallelPlugin

            shard_on_cpu(FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        self.optimizer = optimizer_of(self.model)
        return self.optimizer

    def create_scheduler(self, *_: Any, **__: Any) -> Any:
        self.lr_scheduler = schedule_of(self.optimizer)
        return self.lr_scheduler


def by_trainer(data: PackedRows, model: Any, job: dict, rows: int, out: Path) -> list[float]:
    settings = {
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": job.get("accumulate", 1), "logging_steps": 1,
        "max_grad_norm": 1.0, "report_to": [], "use_cpu": not job.get("zero3"), "save_strategy": "no", "disable_tqdm": True,
        **({"num_train_epochs": 1} if job.get("epochs") else {"max_steps": STEPS}),
    }  # fmt: skip
    common: dict[str, Any] = {"model": model, "train_dataset": data, "layout": job.get("layout", "auto")}
    if not (job.get("fsdp") or job.get("zero3")):
        optimizer = optimizer_of(model)
        common["optimizers"] = (optimizer, schedule_of(optimizer))
    if job.get("fsdp") or job.get("zero3"):
        shared: dict[str, Any] = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}
        if job.get("zero3"):
            ranks_for_deepspeed()
            shared = {"deepspeed": ZERO3, "accelerator_config": {"use_configured_state": True}}
        trainer = Sharded(args=TrainingArguments(str(out), **settings, **shared), **common)
    elif job["trainer"] == "hf":
        trainer = DistillTrainer(args=TrainingArguments(str(out), **settings), **common)
    else:
        from trl import SFTConfig

        from kdata.trainer.parts import DistillSFTTrainer

        tokenizer = PreTrainedTokenizerFast.from_pretrained(data.dataset.tokenizer_dir)
        args = SFTConfig(str(out), bf16=False, gradient_checkpointing=False, **settings)
        trainer = DistillSFTTrainer(args=args, processing_class=tokenizer, **common)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    weights = data.objective.numbers()
    return [sum(weight * line[name] for name, weight in weights.items()) for line in lines]


def run(job: dict) -> None:
    """Train as a job says. A job of our own loop is `kdata.trainer.train`, in the test itself."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    out, accumulate = Path(job["out"]), job.get("accumulate", 1)
    rows = ROWS // (world * accumulate)
    kind = Documents if job.get("layout") == "padded" else PackedRows
    ends = {"epochs": job["epochs"]} if job.get("epochs") else {"items": STEPS * ROWS}
    data = kind(job["dataset"], job.get("plan"), context_tokens=CONTEXT, **ends)
    model = student_of(data.dataset)
    if job.get("lora"):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(**LORA))
    model.train()
    if job["trainer"] in ("hf", "sft"):
        losses = by_trainer(data, model, job, rows, out)
    else:
        attach_loss(model, data, layout=job.get("layout", "rows"))
        data = data.filled_to(rows * world)
        loop = accelerated if job["trainer"] == "accelerate" else partial(plain, world=world, rank=rank)
        losses = loop(data, model, job, rows)
    if job.get("fsdp"):
        assert all(isinstance(p, DTensor) for p in model.parameters()), "the weights are not divided among the ranks"
    merged = model.merge_and_unload() if job.get("lora") else model
    if job.get("zero3"):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(merged.parameters())):
            weights = {name: p.detach().contiguous().clone() for name, p in merged.named_parameters()}
    else:
        weights = {name: whole(p).contiguous().clone() for name, p in merged.named_parameters()}
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "losses.json").write_text(json.dumps(losses))
        save_file(weights, out / "model.safetensors")


def main() -> None:
    """Run the jobs on the ranks that torchrun started."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = os.environ.get("ACCELERATE_USE_CPU", "true")
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
