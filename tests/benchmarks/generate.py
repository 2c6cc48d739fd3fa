"""How fast text is written with its distributions kept: tokens per second, by every way, in one run. JSON last.

    python tests/benchmarks/generate.py [--model DIR] [--corpus FILE] [--prompts N] [--tokens N]

Ways: the engine alone; the top 64 from its own log-probabilities in the same pass; hybrid targets from the rows that are
sampled from, in the same pass (kdata's default); hybrid targets by a second, prefill-only pass over what was written.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from kdata.format.keep import KeepConfig
from kdata.teachers.base import ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.model import load_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
TOP, HYBRID = KeepConfig(kind="topk", k=64), KeepConfig(kind="hybrid", k=16, num_draws=16)
ROUNDS = 3


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
    speeds = _ways(arguments.model, prompts, arguments.tokens)
    table = Table(
        "way", "tokens/s written", "of the engine", title=f"{len(prompts)} prompts, {arguments.tokens} tokens each"
    )
    for name, speed in speeds.items():
        table.add_row(name, f"{speed:,.0f}", f"{speed / speeds['engine alone']:.2f}")
    Console(width=100).print(table)
    same, second = (speeds[f"hybrid, {way} pass"] / speeds["engine alone"] for way in ("same", "second"))
    print(json.dumps({"ratio_same_pass": same, "ratio_second_pass": second}))


def _ways(model: Path, prompts: list[np.ndarray], tokens: int) -> dict[str, float]:
    from vllm import SamplingParams

    from kdata.teachers.vllm import VllmTeacher

    teacher = VllmTeacher(TeacherConfig(model=str(model)), max_k=64)
    sampling, seeds = SamplingConfig(max_tokens=tokens), list(range(len(prompts)))

    def alone() -> int:
        params = [SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, detokenize=False) for seed in seeds]
        return sum(len(o.outputs[0].token_ids) for o in teacher._generate(prompts, params, ignore_tokens, written=True))

    def kept(keep: KeepConfig, path: Literal["auto", "hidden"] = "auto") -> int:
        teacher._config = teacher._config.model_copy(update={"path": path})
        done = teacher.write(prompts, keep, sampling, seeds)
        return sum(len(c.readout.token_ids) - c.num_prompt_tokens for c in done)

    kept(HYBRID, "hidden")  # loads the second engine, compares the two, compiles
    ways: dict[str, Callable[[], int]] = {
        "engine alone": alone,
        "top 64, same pass": partial(kept, TOP),
        "hybrid, same pass": partial(kept, HYBRID),
        "hybrid, second pass": partial(kept, HYBRID, "hidden"),
    }
    # In turns, so that what else the machine does meets all of them; the best of each.
    speeds = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            started = time.perf_counter()
            speeds[name] = max(speeds[name], way() / (time.perf_counter() - started))
    teacher.close()
    return speeds


if __name__ == "__main__":
    main()
