"""One rank of the tests of several: runs a list of trainings in one process group, because starting ranks takes seconds.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.trainer.rank JOBS.json

A job is {"config", "dataset", "out"} and perhaps "die_at" (leave before that step's gradients), "poison" (a row whose tail
becomes NaN on whichever rank reads it). What a job raised goes to OUT/error-RANK.txt.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import kdata.trainer.train as module
from kdata.errors import KdataError
from kdata.loader.batches import Arrays, Batches


class Left(BaseException):
    """Stands for the end of every rank between two steps."""


def main() -> None:
    """Run the jobs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        dist.barrier()
    dist.destroy_process_group()


def run(job: dict) -> None:
    """Run one job; alone where there is no process group."""
    out, rank = Path(job["out"]), dist.get_rank() if dist.is_initialized() else 0
    real_gradients, real_read = module._gradients, Batches.read

    def gradients(*arguments):
        if arguments[-1] == job.get("die_at"):
            raise Left
        return real_gradients(*arguments)

    def read(self: Batches, *arguments: object, **options: object) -> Iterator[Arrays]:
        for batch in real_read(self, *arguments, **options):
            if "poison" in job:
                spoilt = np.where(batch.rows[batch.document] == job["poison"], np.float32("nan"), batch.log_tail)
                batch = dataclasses.replace(batch, log_tail=spoilt)
            yield batch

    with mock.patch.object(module, "_gradients", gradients), mock.patch.object(Batches, "read", read):
        try:
            module.train(module.TrainConfig(**job["config"]), job["dataset"], job.get("plan"), out)
        except Left:
            pass
        except KdataError as error:
            (out / f"error-{rank}.txt").write_text(str(error))


if __name__ == "__main__":
    main()
