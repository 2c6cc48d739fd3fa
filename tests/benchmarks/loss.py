"""The fused sparse loss against the naive one: peak extra memory and time of forward + backward on a CPU.

    python -m tests.benchmarks.loss [--tokens 4096] [--hidden 1024] [--vocab 128256] [--kept 64] [--temperature 1]
    python -m tests.benchmarks.loss --traffic --tokens 1024 --vocab 8192 --dtype bfloat16

Each version runs in a process of its own, so that a peak belongs to it alone. Peak extra memory is the
high-water mark of the resident set (VmHWM) over what inputs occupy. The naive version is what people write:
full logits, log_softmax, gather, with the ghost bucket. Time is the best of `--repeats`. The last line is
JSON; aim: mem_ratio <= 0.1, time_ratio <= 1.0 (fused / naive).

`--traffic` counts what a GPU would move: bytes of every operation that reads or writes a tensor as large as the logits, per
logit, outside of the matrix products and in them. It says what a kernel that joins all these operations could save.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdata.trainer.fused import distillation_loss
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import Targets


def main() -> None:
    """Run both versions and print a table, then one JSON line."""
    arguments = _arguments()
    if arguments.run:
        print(json.dumps(_run(arguments)))
        return
    if arguments.traffic:
        print(json.dumps(_traffic(arguments)))
        return
    results = {}
    for version in ("naive", "fused"):
        command = [sys.executable, "-m", "tests.benchmarks.loss", "--run", version, *sys.argv[1:]]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[version] = json.loads(output.splitlines()[-1])
    print(f"{'version':8} {'peak extra MiB':>15} {'seconds':>9} {'loss':>10}")
    for version, r in results.items():
        print(f"{version:8} {r['extra_mib']:15,.0f} {r['seconds']:9.2f} {r['loss']:10.5f}")
    naive, fused = results["naive"], results["fused"]
    summary = {
        "mem_ratio": round(fused["extra_mib"] / naive["extra_mib"], 4),
        "time_ratio": round(fused["seconds"] / naive["seconds"], 4),
        "loss_difference": abs(fused["loss"] - naive["loss"]),
        "gradient_difference": abs(fused["gradient_norm"] / naive["gradient_norm"] - 1),
        **{k: vars(arguments)[k] for k in ("tokens", "hidden", "vocab", "kept", "temperature", "dtype")},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(summary))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--kept", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--traffic", action="store_true", help="count bytes instead of measuring")
    parser.add_argument("--run", choices=("naive", "fused"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> dict[str, float]:
    hidden_MD, head_VD, targets = _inputs(arguments)
    warm = {"naive": _naive, "fused": _fused}[arguments.run]
    warm(hidden_MD[:8], head_VD[:512], _few(targets, 8, 512)).backward()  # thread pools, kernels
    hidden_MD.grad = head_VD.grad = None
    before = _status_mib("VmRSS")
    seconds = []
    for _ in range(arguments.repeats):
        hidden_MD.grad = head_VD.grad = None
        started = time.perf_counter()
        loss = warm(hidden_MD, head_VD, targets)
        loss.backward()
        seconds.append(time.perf_counter() - started)
    return {
        "extra_mib": _status_mib("VmHWM") - before,
        "seconds": min(seconds),
        "loss": float(loss.detach()),
        "gradient_norm": math.hypot(float(hidden_MD.grad.norm()), float(head_VD.grad.norm())),
    }


class _Traffic(TorchDispatchMode):
    """Bytes of operations on tensors of at least `smallest` elements: what they read, and what they write."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest
        self.bytes = {"products": 0, "others": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation. A view moves nothing; an allocation and a gather of a few do not move the whole tensor."""
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        moves = not (
            func.is_view or name.startswith(("empty", "new_empty", "gather", "scatter", "_unsafe_view", "detach"))
        )
        read = [leaf for leaf in tree_leaves((args, kwargs)) if self._is_large(leaf)]
        if moves and (read or self._is_large(result)):
            written = [leaf for leaf in tree_leaves(result) if self._is_large(leaf)]
            moved = sum(leaf.numel() * leaf.element_size() for leaf in (*read, *written))
            self.bytes["products" if name in ("mm", "addmm_", "addmm") else "others"] += moved
        return result

    def _is_large(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.numel() >= self.smallest


def _traffic(arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes per logit that each version moves."""
    hidden_MD, head_VD, targets = _inputs(arguments)
    logits = arguments.tokens * arguments.vocab
    found: dict[str, float] = {"tokens": arguments.tokens, "vocab": arguments.vocab}
    for name, loss in (("naive", _naive), ("fused", _whole)):
        traffic = _Traffic(logits)
        with traffic:
            loss(hidden_MD, head_VD, targets).backward()
        found |= {f"{name} {kind}": round(count / logits, 1) for kind, count in traffic.bytes.items()}
    return found


def _whole(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> Tensor:
    """The fused loss in one chunk, so that the logits of all positions are one tensor."""
    config = ObjectiveConfig(temperature=targets.temperature)
    return distillation_loss(hidden_MD, head_VD, targets, config, "ghost", chunk_positions=hidden_MD.shape[0]).total


def _inputs(arguments: argparse.Namespace) -> tuple[Tensor, Tensor, Targets]:
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    tokens, kept, vocab = arguments.tokens, arguments.kept, arguments.vocab
    hidden_MD = torch.randn(tokens, arguments.hidden, dtype=dtype).requires_grad_()
    head_VD = (torch.randn(vocab, arguments.hidden, dtype=dtype) * 0.02).requires_grad_()
    first_C = torch.randint(0, vocab, (tokens, 1))
    ids_CK = (first_C + 7 * torch.arange(kept)) % vocab  # distinct within a position
    logprobs_CK = torch.log_softmax(torch.randn(tokens, kept), -1) + math.log(0.9)
    tail_C = torch.full((tokens,), math.log(0.1))
    targets = Targets(torch.randint(0, vocab, (tokens,)), ids_CK, logprobs_CK, tail_C, arguments.temperature)
    return hidden_MD, head_VD, targets


def _few(targets: Targets, positions: int, vocab: int) -> Targets:
    few = targets.rows(slice(0, positions))
    ids_CK = torch.arange(few.ids_CK.shape[1]).expand_as(few.ids_CK) % vocab
    return replace(few, token_ids_C=few.token_ids_C % vocab, ids_CK=ids_CK)


def _naive(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> Tensor:
    logits_MV = (hidden_MD @ head_VD.T).float()
    log_q_MV = torch.log_softmax(logits_MV / targets.temperature if targets.temperature != 1 else logits_MV, -1)
    log_q_MK = log_q_MV.gather(1, targets.ids_CK)
    p_MK = targets.logprobs_CK.exp()
    log_rest_M = torch.log1p(-log_q_MK.exp().sum(-1))
    ghost_M = targets.log_tail_C.exp() * (targets.log_tail_C - log_rest_M)
    kl_M = (p_MK * (targets.logprobs_CK - log_q_MK)).sum(-1) + ghost_M
    plain_MV = log_q_MV if targets.temperature == 1 else torch.log_softmax(logits_MV, -1)
    ce_M = -plain_MV.gather(1, targets.token_ids_C[:, None])[:, 0]
    return (0.1 * ce_M + 0.9 * targets.temperature**2 * kl_M).mean()


def _fused(hidden_MD: Tensor, head_VD: Tensor, targets: Targets) -> Tensor:
    config = ObjectiveConfig(temperature=targets.temperature)
    return distillation_loss(hidden_MD, head_VD, targets, config, "ghost").total


def _status_mib(field: str) -> float:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field + ":"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
