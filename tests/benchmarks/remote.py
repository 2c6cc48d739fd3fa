"""A dataset on the Hub over a line of 10 MB/s: does training wait, and what does a look at it cost? Prints lines, JSON last.

    python -m tests.benchmarks.remote [--steps 24] [--mb-per-sec 10] [--cache 2MB]
                                      [--view-tokens 10000000] [--answer-ms 50]

The Hub is the stand-in of the tests on the loopback (`tests.hub_server`), which waits for as long as its bytes would take on
the line; all connections share the line. The client is the real one.

train    The demo's student (pipelines/quickstart.yaml) on rows with 64 entries a token, four times the bytes that the demo
         keeps. The same steps from a folder, from the Hub over the line, and over a line of half the bytes that the folder's
         run took in a second: so slow a line must show as waiting, or the program fails, as it then measured nothing. No row
         is read twice. A shard is 2,048 tokens, a step, and is taken at a time; the cache holds some eight of 27, so that
         what a loader has before the first step is a small part of the run. `waited` is the share of its time that the
         trainer waited for data after the first step; `late` how often a payload was not there yet when a reader wanted it.
         The order, and so the losses, are the same each time. What is not computed needs no data, so busy cores make the
         line look better, but not the slow one: it follows from the folder's run. (--view-tokens 0)
view     Texts of some 1,500 characters in shards of 32,768 tokens, and a score: bytes, questions and seconds until the first
         page is there, for other pages, a row, a filter, and two orders. An answer takes --answer-ms beside its bytes. Then
         the same in another process, which finds in the cache what the first one fetched.

--steps 0 or --view-tokens 0 leaves a part out.
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
TRAIN_SHARD_TOKENS, VIEW_SHARD_TOKENS = 2048, 32_768
STALLS, FLOWS = (
    0.2,
    0.05,
)  # share of its time: what a run waits at least that its line holds up, and at most one that it does not
VOCAB = 8192

TRAIN = """
import json, sys
from pathlib import Path
from kdata.store.cache import Ahead, payloads
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.learner import Learner
from kdata.trainer.train import train

place, out, student, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
most, late, readers, start = 0, [], [], Ahead.__init__

def begin(self, *arguments):
    readers.append(self)
    start(self, *arguments)

class Watching(Learner):
    def forward(self, *arguments):
        global most
        most = max(most, sum(about.st_size for _, about in payloads()))
        late.append(sum(reader.waits for reader in readers))
        return super().forward(*arguments)

Ahead.__init__ = begin
config = TrainConfig(student=ScratchStudent(**student), log_every_steps=1, **settings)
result = train(config, place, None, out, learner_of=Watching)
lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
lines = [line for line in lines if "wait_share" in line]
seconds = [after["seconds"] - before["seconds"] for before, after in zip([{"seconds": 0.0}, *lines], lines)]
waited = [line["wait_share"] * took for line, took in zip(lines, seconds)]
print(json.dumps({
    "steps": result.steps, "tokens": result.tokens, "seconds": sum(seconds[1:]), "first_step_seconds": seconds[0],
    "waited": sum(waited[1:]) / sum(seconds[1:]), "late": late[-1] - late[0], "cache_bytes": most,
    "losses": [line["loss"] for line in lines],
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


def measure_training(root: Path, steps: int, bytes_per_sec: float, limit: str) -> dict[str, Any]:
    """The same steps from a folder, over the line, and over one that is too slow."""
    recipe = yaml.safe_load((ROOT / "pipelines/quickstart.yaml").read_text())
    loader.UNIT_TOKENS = TRAIN_SHARD_TOKENS
    tokens = steps * recipe["train"]["batch_tokens"] + 3 * TRAIN_SHARD_TOKENS  # more than the steps read
    dataset = loader.build_dataset(root / "d", tokens, VOCAB)
    per_token = sum(path.stat().st_size for path in (root / "d/data").iterdir()) / dataset.num_tokens
    student, settings = recipe["student"]["scratch"], recipe["train"]
    settings |= {
        "context_tokens": loader.CONTEXT,
        "steps": steps,
        "warmup_steps": 1,
        "shuffle_group_tokens": TRAIN_SHARD_TOKENS,
        "objective": recipe["students"]["everything"]["objective"],
    }

    def trained(name: str, place: str) -> dict[str, Any]:
        arguments = [place, str(root / name), json.dumps(student), json.dumps(settings)]
        process = asked(hub, root / f"cache-{name}", TRAIN, *arguments, limit=limit)
        result: dict[str, Any] = json.loads(next(line for line in process.stdout or () if line.startswith("{")))
        process.wait()
        print(name, {key: value for key, value in result.items() if key != "losses"}, flush=True)
        return result

    hub = served(root / "d", bytes_per_sec)
    runs = {"folder": trained("folder", str(root / "d")), "hub": trained("hub", "hf://me/logits")}
    tokens_per_sec = runs["folder"]["tokens"] * (1 - 1 / steps) / runs["folder"]["seconds"]
    hub.bytes_per_sec = tokens_per_sec * per_token / 2
    runs["too slow"] = trained("slow", "hf://me/logits")
    hub.close()
    if len({tuple(run.pop("losses")) for run in runs.values()}) > 1:
        raise SystemExit("the runs have other losses, so they did not read the same rows in the same order")
    if runs["too slow"]["waited"] < STALLS:
        raise SystemExit("a line of half the bytes did not hold training up: the program measured nothing")
    if bytes_per_sec > tokens_per_sec * per_token and runs["hub"]["waited"] > runs["folder"]["waited"] + FLOWS:
        raise SystemExit("training waited for a line that carries more than it needs")
    return {
        "bytes_a_token": per_token,
        "tokens_per_sec": tokens_per_sec,
        "needs_bytes_per_sec": tokens_per_sec * per_token,
        "line_bytes_per_sec": bytes_per_sec,
        **runs,
    }


def with_texts(root: Path, tokens: int) -> kdata.Dataset:
    """Rows with texts, of a handful of entries."""
    rng, plain = np.random.default_rng(1), loader._record
    words = np.array([f"word{n}" for n in range(5000)])

    def record(*arguments: Any) -> Any:
        made = plain(*arguments)
        text = " ".join(words[rng.integers(0, len(words), len(made.token_ids) // 2)])
        return replace(made, text=text, domain="ab"[int(rng.integers(2))])

    loader.UNIT_TOKENS, loader._record = VIEW_SHARD_TOKENS, record
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
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--mb-per-sec", type=float, default=10.0)
    parser.add_argument("--cache", default="2MB")
    parser.add_argument("--answer-ms", type=float, default=50.0)
    parser.add_argument("--view-tokens", type=int, default=10_000_000)
    options = parser.parse_args()
    line = options.mb_per_sec * 1e6
    results: dict[str, Any] = {"cores": os.cpu_count(), "machine": platform.machine(), "mb_per_sec": options.mb_per_sec}
    with tempfile.TemporaryDirectory() as folder:
        if options.steps:
            results["train"] = measure_training(Path(folder), options.steps, line, options.cache)
            print(results["train"], flush=True)
        if options.view_tokens:
            results["view"] = measure_view(Path(folder), options.view_tokens, line, options.answer_ms / 1e3)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
