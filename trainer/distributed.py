"""Several processes, one training: ranks that torchrun started, DDP and FSDP2, and the sums that run over them.

    python -m torch.distributed.run --nproc-per-node 8 --no-python kdata train DATASET --out OUT --set parallel=fsdp

Every rank reads its share of each batch (`trainer.loader`), so the order of data does not depend on their number. Losses
are sums over counted tokens of all ranks divided by their count, never means of means; gradients likewise. What is left of
the number of ranks is the order in which floats are added.

Alone, nothing here communicates and the student is not wrapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from kdata.errors import ConfigError
from kdata.observe.progress import console

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Ranks:
    """The processes of this training, seen from one of them.

    rank: in [0, world_size). device: where this rank computes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the rank that writes files and talks."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Element-wise sum over ranks, float64, the same bits on every rank."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.cpu().numpy()

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """What each rank holds, int64 or uint8 [n] with an n of its own, in order of ranks."""
        if self.world_size == 1:
            return [values]
        sizes = self.sum(np.eye(self.world_size)[self.rank] * len(values)).astype(np.int64)
        own = torch.zeros(int(sizes.max(initial=0)), dtype=torch.from_numpy(values).dtype, device=self.device)
        own[: len(values)] = torch.from_numpy(values)
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        return [part[:size].cpu().numpy() for part, size in zip(parts, sizes.tolist(), strict=True)]

    def wait(self) -> None:
        """Until every rank is here."""
        self.sum(np.zeros(1))


@contextmanager
def join(device: Literal["auto", "cpu", "cuda"]) -> Iterator[Ranks]:
    """Take the place among the ranks that torchrun's environment tells of; without one, be alone.

    A process group that the caller has made is used and left open. Ranks but the first are silent.

    Raises ConfigError when cuda is asked for and there is none.
    """
    name = device_name(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(torch.device(name))
        return
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if name == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    quiet, console.quiet = console.quiet, dist.get_rank() > 0
    try:
        yield Ranks(own, dist.get_rank(), dist.get_world_size())
    finally:
        console.quiet = quiet
        if made:
            dist.destroy_process_group()


def device_name(device: Literal["auto", "cpu", "cuda"]) -> str:
    """Resolve `auto`. Raises ConfigError when cuda is asked for and there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def spread(learner: nn.Module, layers: list[nn.Module], parallel: Parallel, ranks: Ranks) -> nn.Module:
    """The module to call instead of `learner`, on this rank's device; its forward pass must use every parameter it trains.

    ddp: every rank holds everything. fsdp: parameters, gradients and optimizer state are cut among ranks; a layer is
    gathered while it computes, and the rest (embeddings, norm, head) for the length of a pass: the sparse loss, being part
    of the learner's forward pass, reads the whole head, and its gradient is summed and cut like every other.

    Args:
        layers: modules that FSDP2 gathers one at a time.
    """
    if ranks.world_size == 1:
        return learner.to(ranks.device)
    if parallel == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        own = learner.to(ranks.device)
        return DistributedDataParallel(own, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*layers, learner):
        # In place: parameters move to the device and are cut, and the module's class becomes one that gathers them.
        fully_shard(module, mesh=mesh)
    return learner


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around the forward and backward pass of a micro-batch: DDP sums over ranks in the last one only.

    FSDP2 sums in each: to wait would keep whole gradients on every rank.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be cut among ranks, in one piece and detached. All ranks must ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, cut and placed as `example` is."""
    if not isinstance(example, DTensor):
        return tensor.to(example.device)
    own = tensor.to(example.device_mesh.device_type)
    return distribute_tensor(own, example.device_mesh, example.placements, src_data_rank=None)
