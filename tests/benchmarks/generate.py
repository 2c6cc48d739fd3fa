"""How fast text is written with its distributions kept: tokens per second, by every way, in one run. JSON last.

    python tests/benchmarks/generate.py [--model DIR] [--corpus FILE] [--prompts N] [--tokens N]

Ways: the engine alone; the top 64 from its own log-probabilities in the same pass; hybrid targets by a second, prefill-only
pass over what was written (kdata's way); hybrid targets by a logits processor that sees each row as it is sampled from. The
last is a prototype of this file: it reduces the rows and throws the result away, so it is a bound of what such a way could do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from kdata.keep import KeepConfig
from kdata.teachers import SamplingConfig, TeacherConfig, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
TOP, HYBRID = KeepConfig(kind="topk", k=64), KeepConfig(kind="hybrid", k=16, draws=16)
ROUNDS = 3


def tap_class() -> type:
    """A logits processor that reduces every row that is sampled from."""
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor

    from kdata.teachers.reduce import reduce_logits

    class Tap(LogitsProcessor):
        """See the module."""

        active = False

        def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
            self.steps = 0

        def is_argmax_invariant(self) -> bool:
            return False  # so that it is called for greedy rows too, and before the temperature

        def update_state(self, batch_update: Any) -> None:
            self.steps += 1

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            if Tap.active:
                reduce_logits(logits, torch.zeros(len(logits), dtype=torch.long), HYBRID, self.steps)
            return logits

    return Tap


def best(work: Callable[[], int]) -> float:
    """Tokens per second of the best round."""
    found = 0.0
    for _ in range(ROUNDS):
        started = time.perf_counter()
        found = max(found, work() / (time.perf_counter() - started))
    return found


def main() -> None:
    """Run it all, print the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "teacher-10m")
    parser.add_argument("--corpus", type=Path, default=SHARED / "data" / "corpus.parquet")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    if not arguments.model.exists():
        parser.error(f"{arguments.model} does not exist; name a model folder with --model")
    import polars as pl

    tokenizer = load_tokenizer(arguments.model)
    texts = pl.read_parquet(arguments.corpus).sample(arguments.prompts, seed=1)["text"]
    prompts = [np.array(tokenizer(text)["input_ids"][:32], np.int32) for text in texts]
    found = _ways(arguments.model, prompts, arguments.tokens)
    table = Table(
        "way", "tokens/s written", "of the engine", title=f"{len(prompts)} prompts, {arguments.tokens} tokens each"
    )
    for name, speed in found.items():
        table.add_row(name, f"{speed:,.0f}", f"{speed / found['engine alone']:.2f}")
    Console(width=100).print(table)
    second, tap = found["hybrid, second pass"], found["hybrid, logits processor"]
    print(json.dumps({"ratio_second_pass": second / found["engine alone"], "ratio_tap": tap / found["engine alone"]}))


def _ways(model: Path, prompts: list[np.ndarray], tokens: int) -> dict[str, float]:
    from vllm import SamplingParams

    from kdata.teachers.vllm import VllmTeacher

    tap = tap_class()

    class Tapped(VllmTeacher):
        """The teacher, with the prototype in its writing engine."""

        def _engine(self, **options: Any) -> Any:
            return super()._engine(**options, **({} if "runner" in options else {"logits_processors": [tap]}))

    teacher = Tapped(TeacherConfig(model=str(model)), max_k=64)
    sampling = SamplingConfig(max_tokens=tokens, min_tokens=0)
    seeds = list(range(len(prompts)))

    def alone(logprobs: int | None = None) -> int:
        params = [
            SamplingParams(
                max_tokens=tokens, temperature=1.0, seed=s, detokenize=False, logprobs=logprobs, flat_logprobs=True
            )
            for s in seeds
        ]
        return sum(len(o.outputs[0].token_ids) for o in teacher._generate(prompts, params))

    def kept(keep: KeepConfig) -> int:
        done = teacher.write(prompts, keep, sampling, seeds)
        return sum(len(c.readout.token_ids) - c.num_prompt_tokens for c in done)

    def tapped() -> int:
        tap.active = True
        try:
            return alone(logprobs=1)  # the sampled token's log-probability and rank are the engine's
        finally:
            tap.active = False

    kept(HYBRID)  # loads the second engine, compares the two, compiles
    found = {
        "engine alone": best(alone),
        "top 64, same pass": best(lambda: kept(TOP)),
        "hybrid, second pass": best(lambda: kept(HYBRID)),
        "hybrid, logits processor": best(tapped),
    }
    teacher.close()
    return found


if __name__ == "__main__":
    main()
