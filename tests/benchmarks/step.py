"""A whole training step by several ways, on the same student and rows: time, memory, share of waiting. JSON last.

    python -m tests.benchmarks.step [--vocab 8192 128256 262144] [--tokens 2048] [--steps 6] [--rounds 2] [--ways WAY ...]

    kdata         our loop with our loss
    trainer       Hugging Face's Trainer with our data and loss (kdata.trainer.parts)
    dense         our loop; logits of all tokens against the teacher's log-probabilities of the whole vocabulary
    trl top-k     our loop; the sparse loss of TRL's server distillation: all logits, K entries of the teacher and a tail
    trl chunked   our loop; the sparse loss of TRL's asynchronous distillation: the same by chunks, computed again backward
    axolotl       our loop; the sparse loss of axolotl's KD plug-in by chunks: top K, both sides scaled to sum to 1, no tail

A way that needs a package which is not installed is left out, with the reason in the last line. Each runs in processes of its
own, taking turns; the best of the rounds counts. Time is the median of the steps after the first two. Memory is the
high-water mark of the resident set (VmHWM) over what is there when the third step begins: weights, optimizer, reader. It
holds the gradients, which are the same in all ways. The loss is cross-entropy 0.1 and forward KL 0.9.

The dense teacher is made in each step from the kept entries, its tail spread evenly, which takes a few percent of that step.
Its probabilities are counted in its memory, as they would be if they came from a disk. Losses are those of the third step:
equal for `kdata`, `trainer` and `trl top-k`, which compute the same number. Aims: `kdata` takes at most a tenth of the dense
memory at V = 128,256 and 262,144, and `trainer` at most 3 % more time than `kdata`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Batch
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets
from kdata.trainer.student import build_student, head_of, hidden_states
from kdata.trainer.train import train
from tests.benchmarks.loader import CONTEXT, build_dataset

WARM_STEPS = 2
OBJECTIVE = ObjectiveConfig(weights={"cross_entropy": 0.1, "forward_kl": 0.9})


# ------------------------------------------------------------------------------------------------------ the memory


def status_mib(field: str) -> float:
    """A size of this process, in MiB: VmRSS is now, VmHWM the largest since the last reset."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field + ":"))
    return int(line.split()[1]) / 1024


class Memory:
    """The most memory that steps take, beyond what is there when the first measured step begins."""

    def __init__(self) -> None:
        self.begun, self.before, self.extra_mib = 0, 0.0, 0.0

    def begins_step(self) -> None:
        """Note what the step before has taken."""
        if self.begun > WARM_STEPS:
            self.extra_mib = max(self.extra_mib, status_mib("VmHWM") - self.before)
        if self.begun == WARM_STEPS:
            ctypes.CDLL(None).malloc_trim(0)  # what the first steps freed is not there
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.before = status_mib("VmRSS")
        self.begun += 1


# -------------------------------------------------------------------------------------------------------- the ways


class Measured(Learner):
    """Our learner, which notes the memory of each step."""

    def __init__(self, *arguments: Any, memory: Memory) -> None:
        super().__init__(*arguments)
        self._memory = memory

    def forward(self, batch: Batch, *rest: Any) -> tuple[Tensor, Tensor]:
        """See `Learner.forward`."""
        self._memory.begins_step()
        return super().forward(batch, *rest)


class Other(Measured):
    """A learner with another loss for the KL, of hidden states [M, D], head [V, D] and targets."""

    kl_sum: Callable[[Tensor, Tensor, Targets], tuple[Tensor, Tensor]]

    def forward(self, batch: Batch, *rest: Any) -> tuple[Tensor, Tensor]:
        """See `Learner.forward`; both values are means over the batch."""
        self._memory.begins_step()
        hidden_BLD = hidden_states(self.student, batch.input_ids, batch.position_ids)
        hidden_MD = hidden_BLD.flatten(0, 1).index_select(0, batch.predictor_M)
        ce, kl = type(self).kl_sum(hidden_MD, head_of(self.student), batch.targets)
        positions, counted = len(batch.targets), rest[-1]
        values_O = torch.stack([ce, kl]).detach() / positions
        return (0.1 * ce + 0.9 * kl) / counted, values_O.expand(positions, 2)


class Dense(Other):
    """All logits, and the teacher's log-probabilities of the whole vocabulary."""

    @staticmethod
    def kl_sum(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and forward KL."""
        log_p_MV = dense_teacher(targets, head_VD.shape[0])
        logits_MV = hidden_MD @ head_VD.T
        log_q_MV = functional.log_softmax(logits_MV, -1)
        ce = functional.nll_loss(log_q_MV, targets.token_ids_C, reduction="sum")
        return ce, functional.kl_div(log_q_MV, log_p_MV, reduction="sum", log_target=True)


def dense_teacher(targets: Targets, vocab: int) -> Tensor:
    """Log-probabilities [M, V]: the kept entries, and the rest of the probability spread evenly over the other ids."""
    even_M = targets.log_tail_C - torch.log(torch.tensor(float(vocab - targets.ids_CK.shape[1])))
    log_p_MV = even_M[:, None].expand(-1, vocab).clone()
    return log_p_MV.scatter_(1, targets.ids_CK, targets.logprobs_CK)


class TrlTopK(Other):
    """TRL's server distillation, beta 0: `_compute_server_forward_kl_loss` without its trainer."""

    @staticmethod
    def kl_sum(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and forward KL of the top K and a bucket."""
        from trl.experimental.server_distillation import server_distillation_trainer as trl

        log_q_MV = functional.log_softmax(hidden_MD @ head_VD.T, -1)
        ce = functional.nll_loss(log_q_MV, targets.token_ids_C, reduction="sum")
        valid_MK = targets.ids_CK >= 0
        log_q_MJ, mask_MJ = trl._add_tail_bucket(log_q_MV.gather(-1, targets.ids_CK), valid_MK)
        log_p_MJ, _ = trl._add_tail_bucket(targets.logprobs_CK, valid_MK)
        return ce, trl._jsd_divergence(log_q_MJ, log_p_MJ, beta=0.0, support_mask=mask_MJ).sum()


class TrlChunked(Other):
    """TRL's asynchronous distillation, beta 0, in its chunks of 256 positions. It has no cross-entropy."""

    @staticmethod
    def kl_sum(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """0, and the sum of forward KL of the top K and a bucket."""
        from trl.experimental.async_distillation import async_distillation_trainer as trl

        kl, *_ = trl._chunked_jsd_loss(
            hidden_MD, head_VD, None, 1.0, None, targets.ids_CK, targets.logprobs_CK, targets.ids_CK >= 0, 0.0, 1.0, True,
            None, 0, trl._CHUNKED_LM_HEAD_CHUNK_SIZE,
        )  # fmt: skip
        return kl.new_zeros(()), kl


class Axolotl(Other):
    """axolotl's Liger-style loss, beta 0, not compiled, in its chunks of 1,024 positions. Its cross-entropy is in its sum."""

    @staticmethod
    def kl_sum(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """0, and the sum of both terms, so that 0.9 times it is what the other ways minimize."""
        from axolotl.integrations.kd.kernels.liger import LigerFusedLinearKLTopKLogprobFunction as Function

        # It shifts labels by one position itself, and leaves out the last.
        labels_M = torch.cat([targets.token_ids_C.new_full((1,), -100), targets.token_ids_C])[:-1]
        total = Function.apply(
            hidden_MD[None], head_VD, targets.ids_CK.clamp_min(0)[None], targets.logprobs_CK[None],
            (targets.ids_CK >= 0)[None], labels_M[None], None, 0.1 / 0.9, 1.0,
        )  # fmt: skip
        return total.new_zeros(()), total


WAYS: dict[str, tuple[type[Measured] | None, str | None]] = {  # the learner of our loop, and the package that it needs
    "kdata": (Measured, None),
    "trainer": (None, "accelerate"),
    "dense": (Dense, None),
    "trl top-k": (TrlTopK, "trl"),
    "trl chunked": (TrlChunked, "trl"),
    "axolotl": (Axolotl, "axolotl"),
}


def config_of(options: argparse.Namespace) -> TrainConfig:
    """The run that every way trains."""
    student = ScratchStudent(hidden_size=options.hidden, num_layers=options.layers, max_positions=CONTEXT)
    return TrainConfig(
        student=student, objective=OBJECTIVE, steps=WARM_STEPS + options.steps + 1, batch_tokens=options.tokens,
        context_tokens=CONTEXT, warmup_steps=0, final_learning_rate_share=1.0,
        log_every_steps=1, checkpoint_every_steps=0, device="cpu",
    )  # fmt: skip


def run_trainer(options: argparse.Namespace) -> dict[str, float]:
    """Train by Hugging Face's Trainer in this process, with the settings of `config_of`."""
    from transformers import TrainerCallback, TrainingArguments

    from kdata.trainer.parts import DistillTrainer, PackedRows

    config, memory = config_of(options), Memory()
    began: list[float] = []
    waits: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            memory.begins_step()
            began.append(time.perf_counter())

    class Waiting(DistillTrainer):
        def get_batch_samples(self, *arguments: Any) -> Any:
            started = time.perf_counter()
            samples = super().get_batch_samples(*arguments)
            waits.append(time.perf_counter() - started)
            return samples

    rows = config.batch_tokens // CONTEXT
    data = PackedRows(options.dataset, objective=OBJECTIVE, context_tokens=CONTEXT, items=config.steps * rows)
    assert isinstance(config.student, ScratchStudent)
    student = build_student(config.student, data.dataset, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=config.steps, per_device_train_batch_size=rows, use_cpu=True,
            learning_rate=config.learning_rate, lr_scheduler_type="constant", weight_decay=config.weight_decay,
            adam_beta1=config.betas[0], adam_beta2=config.betas[1], max_grad_norm=config.clip_norm,
            optim="adamw_torch_fused", save_strategy="no", logging_steps=1, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = Waiting(model=student, args=arguments, train_dataset=data, callbacks=[Watch()])
        trainer.train()
    seconds = torch.tensor(began, dtype=torch.float64).diff()[WARM_STEPS:]
    waited = torch.tensor(waits[WARM_STEPS + 1 : WARM_STEPS + 1 + len(seconds)], dtype=torch.float64)
    return {
        "seconds": float(seconds.median()),
        "extra_mib": memory.extra_mib,
        "wait_share": float(waited.sum() / seconds.sum()),
        "loss": trainer.state.log_history[WARM_STEPS]["loss"],
    }


def run(options: argparse.Namespace) -> dict[str, float]:
    """Train by one way in this process."""
    memory = Memory()
    learner, _ = WAYS[options.run]
    if learner is None:
        return run_trainer(options)

    def learner_of(*arguments: Any) -> Learner:
        return learner(*arguments, memory=memory)

    with tempfile.TemporaryDirectory() as folder:
        train(config_of(options), options.dataset, None, Path(folder) / "run", learner_of=learner_of)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = [line["seconds"] for line in lines]
    seconds = torch.tensor(ends).diff()[WARM_STEPS - 1 : -1]
    waits = torch.tensor([line["wait_share"] for line in lines[WARM_STEPS:-1]])
    return {
        "seconds": float(seconds.median()),
        "extra_mib": memory.extra_mib,
        "wait_share": float((waits * seconds).sum() / seconds.sum()),
        "loss": lines[WARM_STEPS]["loss"],
    }


# -------------------------------------------------------------------------------------------------------- in turns


def measure(options: argparse.Namespace, vocab: int, root: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Figures of each way at one size of the vocabulary, and why the others were left out."""
    dataset = build_dataset(root / str(vocab), options.tokens * 8, vocab, k=options.kept, median=250)
    best: dict[str, dict[str, Any]] = {}
    left_out = {
        way: f"{package} is not installed"
        for way, (_, package) in WAYS.items()
        if way in options.ways and package is not None and importlib.util.find_spec(package) is None
    }
    for _ in range(options.rounds):
        for way in [way for way in options.ways if way not in left_out]:
            command = [sys.executable, "-m", "tests.benchmarks.step", "--run", way, "--dataset", str(dataset.path)]
            command += [f"--{name}={getattr(options, name)}" for name in ("tokens", "steps", "hidden", "layers")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1]
                left_out[way] = reason
                best.pop(way, None)
                continue
            figures = json.loads(done.stdout.splitlines()[-1])
            if way not in best or figures["seconds"] < best[way]["seconds"]:
                best[way] = figures
    return {way: best[way] for way in WAYS if way in best}, left_out


def ratio(figures: dict[str, float], of: dict[str, float] | None, name: str) -> float | None:
    """A figure of one way over that of another; null where the other was not measured."""
    return None if of is None else round(figures[name] / of[name], 4)


def shown(number: float | None) -> str:
    """A ratio in the table."""
    return "—" if number is None else f"{number:.3f}"


def main() -> None:
    """Measure each size of the vocabulary and print a table, then one JSON line."""
    options = arguments()
    if options.run:
        print(json.dumps(run(options)))
        return
    table = Table("vocabulary", "way", "s/step", "of kdata", "extra MiB", "of dense", "waiting")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for vocab in options.vocab:
            figures, left_out = measure(options, vocab, Path(folder))
            for way, own in figures.items():
                own["time_ratio"] = ratio(own, figures.get("kdata"), "seconds")
                own["memory_ratio"] = ratio(own, figures.get("dense"), "extra_mib")
                table.add_row(
                    f"{vocab:,}", way, f"{own['seconds']:.3f}", shown(own["time_ratio"]), f"{own['extra_mib']:,.0f}",
                    shown(own["memory_ratio"]), f"{own['wait_share']:.1%}",
                )  # fmt: skip
            results[str(vocab)] = {**figures, "left_out": left_out}
    Console(width=110).print(table)
    sizes = {name: getattr(options, name) for name in ("tokens", "steps", "rounds", "hidden", "layers", "kept")}
    print(json.dumps({"vocab": results, **sizes, "threads": torch.get_num_threads(), "machine": machine()}))


def machine() -> str:
    """The processor: its name where the system says it, its architecture and cores."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{(names or ['unknown processor'])[0]}, {platform.machine()}, {os.cpu_count()} cores"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[8192, 128_256, 262_144], help="sizes of the vocabulary"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="token positions of a step, a multiple of 1,024")
    parser.add_argument("--steps", type=int, default=6, help="steps that are measured")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of which the best counts")
    parser.add_argument("--hidden", type=int, default=256, help="width of the student")
    parser.add_argument("--layers", type=int, default=2, help="layers of the student")
    parser.add_argument("--kept", type=int, default=64, help="entries of each position")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="those to compare")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dataset", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
