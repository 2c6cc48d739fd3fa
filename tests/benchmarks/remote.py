"""A dataset on the Hub over a line of 10 MB/s: does training wait, and what does a look at it cost? Prints lines, JSON last.

    python -m tests.benchmarks.remote [--tokens 1000000] [--mb-per-sec 10] [--cache 60MB]
                                      [--view-tokens 10000000] [--answer-ms 50]

The Hub is the stand-in of the tests on the loopback (`tests.hub_server`), which waits for as long as its bytes would take on
the line; all connections share the line. The client is the real one.

train    The demo's student (pipelines/quickstart.yaml) on rows with 64 entries a token, four times the bytes that the demo
         keeps, in one epoch. Waiting is the trainer's own figure (`wait_share`), with and without its first step.
view     Texts of some 1,500 characters in shards of 32,768 tokens, and a score: bytes, questions and seconds until the first
         page is there, for other pages, a row, a filter, and two orders. An answer takes --answer-ms beside its bytes. Then
         the same in another process, which finds in the cache what the first one fetched.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import kdata
from kdata.selection.score_file import bring
from tests.benchmarks import loader
from tests.hub_server import HubServer

ROOT = Path(__file__).resolve().parents[2]
SHARD_TOKENS = 32_768
VOCAB = 8192

TRAIN = """
import json, sys
from pathlib import Path
from kdata.store.cache import payloads
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.learner import Learner
from kdata.trainer.train import train

place, out, student, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
most = 0

class Watching(Learner):
    def forward(self, *arguments):
        global most
        most = max(most, sum(about.st_size for _, about in payloads()))
        return super().forward(*arguments)

config = TrainConfig(student=ScratchStudent(**student), log_every_steps=1, **settings)
result = train(config, place, None, out, learner_of=Watching)
lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
rest = [line for line in lines if "wait_share" in line][1:]
print(json.dumps({
    "steps": result.steps, "seconds": result.train_seconds, "wait_share": result.wait_share, "cache_bytes": most,
    "wait_share_after_first": sum(line["wait_share"] for line in rest) / len(rest),
}))
"""

VIEW = """
import json, sys
import kdata
from kdata.pipelines.view.values import View

view = View(kdata.open(sys.argv[1]))
steps = {
    "about": lambda: view.about(),
    "first page": lambda: view.rows(),
    "overview": lambda: view.overview(),
    "next page": lambda: view.rows(offset=50),
    "page in the middle": lambda: view.rows(offset=view.dataset.num_rows // 2),
    "a row": lambda: view.row(view.dataset.num_rows // 2),
    "a row of the same shard": lambda: view.row(view.dataset.num_rows // 2 + 1),
    "filter": lambda: view.rows(where="nll > 2.5 and domain = 'b'"),
    "sorted by a score": lambda: view.rows(order="ref.nll", descending=True),
    "sorted by the difference": lambda: view.rows(order="ref.nll - nll"),
}
print("opened", flush=True)
for name, ask in steps.items():
    input()
    ask()
    print(name, flush=True)
"""


def asked(hub: HubServer, cache: Path, code: str, *arguments: str, limit: str = "50GB") -> subprocess.Popen[str]:
    """A process of its own on the other side of the line."""
    environment = hub.environment(cache) | {"KDATA_CACHE_LIMIT": limit, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def served(dataset: Path, bytes_per_sec: float) -> HubServer:
    """The dataset as me/logits."""
    hub = HubServer()
    hub.push(dataset, "a" * 40, "main")
    hub.bytes_per_sec = bytes_per_sec
    return hub


def measure_training(root: Path, tokens: int, bytes_per_sec: float, limit: str) -> dict[str, Any]:
    """One epoch from the Hub, and the same from the folder."""
    loader.UNIT_TOKENS = SHARD_TOKENS
    dataset = loader.build_dataset(root / "d", tokens, VOCAB)
    size = sum(path.stat().st_size for path in (root / "d/data").iterdir())
    recipe = yaml.safe_load((ROOT / "pipelines/quickstart.yaml").read_text())
    student, settings = recipe["student"]["scratch"], recipe["train"]
    settings |= {
        "context_tokens": loader.CONTEXT,
        "steps": tokens // settings["batch_tokens"],
        "objective": recipe["students"]["everything"]["objective"],
    }
    hub, results = served(root / "d", bytes_per_sec), {}
    for name, place in (("hub", "hf://me/logits"), ("folder", str(root / "d"))):
        arguments = [place, str(root / name), json.dumps(student), json.dumps(settings)]
        output, _ = asked(hub, root / "cache", TRAIN, *arguments, limit=limit).communicate()
        results[name] = json.loads(output.splitlines()[-1])
    hub.close()
    per_token = size / dataset.num_tokens
    needs = dataset.num_tokens / results["folder"]["seconds"] * per_token
    return {
        "tokens": dataset.num_tokens,
        "bytes": size,
        "bytes_a_token": per_token,
        "needs_bytes_per_sec": needs,
        **results,
    }


def with_texts(root: Path, tokens: int) -> kdata.Dataset:
    """Rows with texts, of a handful of entries."""
    rng, plain = np.random.default_rng(1), loader._record
    words = np.array([f"word{n}" for n in range(5000)])

    def record(*arguments: Any) -> Any:
        made = plain(*arguments)
        text = " ".join(words[rng.integers(0, len(words), len(made.token_ids) // 2)])
        return replace(made, text=text, domain="ab"[int(rng.integers(2))])

    loader.UNIT_TOKENS, loader._record = SHARD_TOKENS, record
    try:
        return loader.build_dataset(root, tokens, VOCAB, k=2)
    finally:
        loader._record = plain


def measure_view(root: Path, tokens: int, bytes_per_sec: float, answer_sec: float) -> dict[str, Any]:
    """What each thing that a person does fetches."""
    dataset = with_texts(root / "v", tokens)
    ids, rng = dataset.index(["id"])["id"], np.random.default_rng(2)
    pq.write_table(pa.table({"id": ids, "nll": rng.gamma(2.0, size=len(ids))}), root / "ref.parquet")
    bring(dataset, root / "ref.parquet", "ref")
    hub = served(root / "v", bytes_per_sec)
    hub.answer_sec = answer_sec
    index = sum(path.stat().st_size for path in (root / "v/index").iterdir())
    first, second = (view_steps(hub, root / "view-cache") for _ in range(2))
    hub.close()
    return {
        "rows": len(dataset),
        "tokens": dataset.num_tokens,
        "shards": len(dataset.manifest),
        "index_bytes": index,
        "first": first,
        "second": second,
    }


def view_steps(hub: HubServer, cache: Path) -> dict[str, Any]:
    """The steps of a person, in a process of their own."""
    steps: dict[str, Any] = {}
    process = asked(hub, cache, VIEW, "hf://me/logits")
    assert process.stdin is not None and process.stdout is not None
    while True:
        before, questions, started = hub.bytes_sent(), len(hub.asked), time.perf_counter()
        name = process.stdout.readline().strip()
        if not name:
            break
        step = {"bytes": hub.bytes_sent() - before, "questions": len(hub.asked) - questions}
        steps[name] = {**step, "seconds": time.perf_counter() - started}
        print(name, steps[name], flush=True)
        with suppress(BrokenPipeError):  # after the last one
            process.stdin.write("go on\n")
            process.stdin.flush()
    process.wait()
    return steps


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--mb-per-sec", type=float, default=10.0)
    parser.add_argument("--cache", default="60MB")
    parser.add_argument("--answer-ms", type=float, default=50.0)
    parser.add_argument("--view-tokens", type=int, default=10_000_000)
    options = parser.parse_args()
    line = options.mb_per_sec * 1e6
    results: dict[str, Any] = {"cores": os.cpu_count(), "machine": platform.machine(), "mb_per_sec": options.mb_per_sec}
    with tempfile.TemporaryDirectory() as folder:
        if options.tokens:
            results["train"] = measure_training(Path(folder), options.tokens, line, options.cache)
            print(results["train"], flush=True)
        if options.view_tokens:
            results["view"] = measure_view(Path(folder), options.view_tokens, line, options.answer_ms / 1e3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
