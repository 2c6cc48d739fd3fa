"""Training on several processes: ranks that torchrun started, DDP and FSDP2, and sums over ranks.

    python -m torch.distributed.run --nproc-per-node 8 --no-python kdata train DATASET --out OUT --set parallel=fsdp

Every rank reads its share of each batch (`kdata.trainer.loader`), so the order of the data does not depend on the number of
ranks. Losses are sums over the counted tokens of all ranks divided by their count, never means of means; gradients likewise.
Only the order in which floats are added depends on the number of ranks.

With one process, nothing communicates and the student is not wrapped.
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
from kdata.trainer.config import Device, Parallel


@dataclass(frozen=True)
class Ranks:
    """The processes of this training, seen from one of them.

    rank: in [0, world_size). local_rank: number of this rank on its machine. device: where this rank computes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Element-wise sum over ranks, float64, the same bits on every rank."""
        total = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.cpu().numpy()

    def gather(self, values: np.ndarray) -> list[np.ndarray]:
        """The arrays of all ranks, int64 or uint8 [n], in order of ranks; n may differ between ranks."""
        if self.world_size == 1:
            return [values]
        sizes = self.sum(np.eye(self.world_size)[self.rank] * len(values)).astype(np.int64)
        own = torch.zeros(int(sizes.max(initial=0)), dtype=torch.from_numpy(values).dtype, device=self.device)
        own[: len(values)] = torch.from_numpy(values)
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        return [part[:size].cpu().numpy() for part, size in zip(parts, sizes.tolist(), strict=True)]

    def wait(self) -> None:
        """Block until every rank has called it."""
        self.sum(np.zeros(1))

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """Run a block on one rank of each machine, then on the others, so that files are copied to a machine once.

        The others also run it if it fails on the first, and then fail themselves.
        """
        if self.world_size > 1 and self.local_rank > 0:
            self.wait()
        try:
            yield
        finally:
            if self.world_size > 1 and self.local_rank == 0:
                self.wait()


@contextmanager
def join(device: Device) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, as its environment variables say; without them, one rank alone.

    A process group that exists already is used and stays open. All ranks except the first are silent.

    Raises:
        ConfigError: device is cuda and there is no CUDA device.
    """
    name = device_name(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(torch.device(name))
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    own = torch.device("cuda", local_rank) if name == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    opened_here = not dist.is_initialized()
    if opened_here:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    quiet, console.quiet = console.quiet, dist.get_rank() > 0
    try:
        yield Ranks(own, dist.get_rank(), dist.get_world_size(), local_rank)
    finally:
        console.quiet = quiet
        if opened_here:
            dist.destroy_process_group()


def device_name(device: Device) -> Literal["cpu", "cuda"]:
    """Resolve `auto`. Raises ConfigError if device is cuda and there is no CUDA device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device; set it to auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def spread(learner: nn.Module, layers: list[nn.Module], parallel: Parallel, ranks: Ranks) -> nn.Module:
    """Wrap `learner` for several ranks, on this rank's device. Its forward pass must use every parameter that it trains.

    ddp: every rank holds everything. fsdp: parameters, gradients and optimizer state are divided among the ranks. A layer is
    gathered while it computes; the rest (embeddings, norm, head) is gathered for a whole pass. The sparse loss is part of the
    learner's forward pass, so it reads the whole head, and the head's gradient is summed and divided like every other.

    Args:
        layers: modules that FSDP2 gathers one at a time.
    Returns:
        The module to call instead of `learner`.
    """
    if ranks.world_size == 1:
        return learner.to(ranks.device)
    if parallel == "ddp":
        devices = [ranks.device] if ranks.device.type == "cuda" else None
        own = learner.to(ranks.device)
        return DistributedDataParallel(own, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for module in (*layers, learner):
        # In place: parameters move to the device and are divided, and the module's class becomes one that gathers them.
        fully_shard(module, mesh=mesh)
    return learner


def accumulating(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Context of the forward and backward pass of a micro-batch: DDP sums gradients over ranks only in the last one.

    FSDP2 sums in each, because waiting would keep whole gradients on every rank.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece and detached, also if ranks share it. Every rank must call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def cut_like(tensor: Tensor, example: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds whole, divided and placed as `example` is."""
    if not isinstance(example, DTensor):
        return tensor.to(example.device)
    own = tensor.to(example.device_mesh.device_type)
    return distribute_tensor(own, example.device_mesh, example.placements, src_data_rank=None)
