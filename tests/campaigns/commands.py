"""Every command that writes, ready to run on small inputs: what `kills`, `disk` and `together` disturb.

The models are two random Llamas of 64 dimensions, read by the real `transformers` backend. A command runs as `kdata ...` in a
fork, with the case's folder as its working directory and `tmp/` in it as its temporary folder.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

import kdata
from tests.campaigns.campaign import kdata_command
from tests.fakes import rows_of_text, save_llama, write_jsonl
from tests.faults import Fault, Outcome, Server
from tests.tokenizers_of_kinds import byte_tokenizer


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        arguments: of `kdata`; SHARED/ begins a path of what all cases read.
        inputs: copies that the case works on: name in its folder -> name in the shared one.
        changes: names of inputs that the command may change.
        seconds: roughly what it takes; slow ones get fewer cases.
        dataset: the folder that it writes, where that is a dataset.
    """

    arguments: tuple[str, ...]
    inputs: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    seconds: float = 0.5
    dataset: str | None = None


# What the server of faults imports for these commands.
PRELOAD = ("tests.campaigns.preload", "tests.campaigns.commands")

TEACHER = ("--teacher", "SHARED/teacher", "--backend", "transformers")
TOPK = ("--kind", "topk", "--k", "6")
SMALL = ("--set", "unit_tokens=60")
STUDENT = (
    "--steps",
    "6",
    "--set",
    "batch_tokens=128",
    "--set",
    "context_tokens=64",
    "--set",
    "checkpoint_every_steps=2",
    "--set",
    "log_every_steps=2",
    "--set",
    "warmup_steps=1",
    "--set",
    "student.kind=scratch",
    "--set",
    "student.hidden_size=32",
    "--set",
    "student.num_layers=1",
    "--set",
    "student.num_heads=2",
    "--set",
    "student.max_positions=64",
)
RECIPE = """
name: small
teacher: {{model: {shared}/teacher, backend: transformers}}
reference: {{model: {shared}/other, backend: transformers}}
corpus: {{path: {shared}/corpus.jsonl}}
heldout: {{path: {shared}/heldout.jsonl}}
generate: null
keep: {{kind: topk, k: 6}}
student: {{scratch: {{kind: scratch, hidden_size: 32, num_layers: 1, num_heads: 2, max_positions: 64}}}}
train: {{steps: 4, batch_tokens: 128, context_tokens: 64, warmup_steps: 1, checkpoint_every_steps: 2}}
students:
  plan: {{label: plan, plan: true, objective: {{weights: {{forward_kl: 1.0}}}}}}
evaluate: {{samples: 0}}
"""

COMMANDS: dict[str, Command] = {
    "capture": Command(
        ("capture", "out", *TEACHER, "--corpus", "SHARED/corpus.jsonl", *TOPK, *SMALL), seconds=0.8, dataset="out"
    ),
    "capture hybrid": Command(
        ("capture", "out", *TEACHER, "--corpus", "SHARED/corpus.jsonl", *SMALL), seconds=0.8, dataset="out"
    ),
    "capture again, corpus changed": Command(
        ("capture", "d", *TEACHER, "--corpus", "SHARED/changed.jsonl", *TOPK, *SMALL),
        {"d": "first"},
        ("d",),
        0.8,
        "d",
    ),
    "capture a second source": Command(
        ("capture", "d", *TEACHER, "--corpus", "SHARED/second.jsonl", *TOPK, *SMALL, "--set", "name=more"),
        {"d": "first"},
        ("d",),
        0.8,
        "d",
    ),
    "capture what was lost": Command(
        ("capture", "d", *TEACHER, "--corpus", "SHARED/corpus.jsonl", *TOPK, *SMALL),
        {"d": "repaired"},
        ("d",),
        0.8,
        "d",
    ),
    "generate": Command(
        (
            "generate",
            "out",
            *TEACHER,
            "--prompts",
            "SHARED/prompts.jsonl",
            "--text-column",
            "text",
            *TOPK,
            "--max-tokens",
            "6",
            "--set",
            "unit_prompts=2",
        ),
        seconds=1.5,
        dataset="out",
    ),
    "reread": Command(
        ("reread", "SHARED/first", "out", "--teacher", "SHARED/other", "--backend", "transformers"),
        seconds=0.8,
        dataset="out",
    ),
    "soften": Command(  # any file of 16 bytes is a key; without one a run with patterns is not resumed
        ("soften", "SHARED/first", "out", "--pattern", "the", "--set", "key_file=SHARED/first/dataset.json"),
        dataset="out",
    ),
    "combine": Command(("combine", "SHARED/first", "SHARED/reread", "out", "--weights", "0.7,0.3"), dataset="out"),
    "import": Command(
        (
            "import",
            "SHARED/plain.parquet",
            "out",
            "--format",
            "plain",
            "--tokenizer",
            "SHARED/teacher",
            "--set",
            "unit_tokens=60",
        ),
        dataset="out",
    ),
    "retokenize": Command(("retokenize", "SHARED/first", "out", "--tokenizer", "SHARED/bytes"), dataset="out"),
    "hidden": Command(
        ("hidden", "d", "--teacher", "SHARED/teacher", "--layers", "1,head"), {"d": "first"}, ("d",), 0.8, "d"
    ),
    "pull of rows": Command(("pull", "SHARED/first", "out", "--plan", "half"), dataset="out"),
    "view": Command(("view", "SHARED/first", "--export", "out")),
    "export": Command(("export", "SHARED/first", "out.parquet")),
    "export for Megatron": Command(("export", "SHARED/first", "out", "--format", "megatron", "--seq-length", "16")),
    "merge": Command(("merge", "SHARED/first", "SHARED/second", "out"), dataset="out"),
    "merge with links": Command(("merge", "d", "e", "out", "--link"), {"d": "first", "e": "second"}, dataset="out"),
    "split": Command(("split", "SHARED/first", "out")),
    "split by plan": Command(("split", "SHARED/first", "out", "--by", "plan", "--plan", "half")),
    "head": Command(("head", "SHARED/first", "out", "-n", "5"), dataset="out"),
    "push": Command(("push", "SHARED/first", "out"), dataset="out"),
    "score": Command(
        ("score", "d", "--model", "SHARED/other", "--backend", "transformers", "--name", "new"),
        {"d": "first"},
        ("d",),
        0.8,
        "d",
    ),
    "score from a file": Command(
        ("score", "d", "--from", "SHARED/marks.parquet", "--name", "marks"), {"d": "first"}, ("d",), dataset="d"
    ),
    "hygiene": Command(("hygiene", "d", "--set", "workers=1"), {"d": "first"}, ("d",), 0.8, "d"),
    "hygiene of a corpus": Command(("hygiene", "SHARED/corpus.jsonl", "--out", "out.parquet", "--set", "workers=1")),
    "select difference": Command(("select", "d", "--method", "difference"), {"d": "first"}, ("d",), dataset="d"),
    "select sql": Command(
        ("select", "d", "--name", "easy", "--sql", "select id from rows where num_tokens > 5"),
        {"d": "first"},
        ("d",),
        dataset="d",
    ),
    "select temperature": Command(
        ("select", "d", "--method", "temperature", "--temperature", "2", "--parent", "half", "--max-repeats", "4"),
        {"d": "first"},
        ("d",),
        dataset="d",
    ),
    "plan show": Command(("plan", "show", "SHARED/first", "half", "--picture", "out.png"), seconds=1.5),
    "repair": Command(("repair", "d"), {"d": "damaged"}, ("d",), dataset="d"),
    "train": Command(("train", "SHARED/first", "--out", "out", *STUDENT), seconds=1.5),
    "train on a plan": Command(("train", "SHARED/first", "--plan", "half", "--out", "out", *STUDENT), seconds=1.5),
    "evaluate": Command(("evaluate", "SHARED/student/model", "SHARED/first", "--save", "out.json"), seconds=1.0),
    "run": Command(("run", "SHARED/recipe.yaml", "--out", "out"), seconds=8.0),
    "report": Command(("report", "run"), {"run": "run"}, ("run",), 3.0),
}

# Files whose bytes tell the time, or are a log of a run. Their names count, their bytes do not.
VOLATILE = (
    "*.lock",
    "*progress.jsonl",
    "*.log",
    "*/metrics.jsonl",
    "*/results.json",
    "*/report.html",
    "*/run.json",
)
# What tells the time in files whose other content counts: keys of JSON (their digest too), and lines of a card.
TIMES = re.compile(rb'^ *"(seconds|waited|train_seconds|wait_share|digest)": .*$|^\|.*CPU cores.*$', re.MULTILINE)


@dataclass(frozen=True)
class Whole:
    """What a command leaves that nobody disturbs, how many calls change the disk, and what it takes."""

    state: Mapping[str, str]
    sizes: tuple[int, ...]
    calls: int
    seconds: float


class Bench:
    """Runs commands in forks, and makes what they read (SHARED/...) when it is first needed, by the commands themselves.

    Args:
        folder: for what all cases read. Threads may share a bench: each has a server of its own.
    """

    target = "tests.campaigns.commands:in_folder"  # what a fork calls

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._local = threading.local()
        self._servers: list[Server] = []
        self._whole: dict[str, Whole] = {}

    def close(self) -> None:
        """End the servers; one that a busy machine does not let end is killed."""
        for server in self._servers:
            try:
                server.__exit__(None, None, None)
            except subprocess.TimeoutExpired:
                server._process.kill()

    @property
    def server(self) -> Server:
        """The server of this thread."""
        if not hasattr(self._local, "server"):
            self._local.server = Server(PRELOAD, {"HF_HUB_OFFLINE": "1"}).__enter__()
            self._servers.append(self._local.server)
        return cast(Server, self._local.server)

    def arguments(self, arguments: Sequence[str]) -> list[str]:
        """Arguments with the paths of what all cases read, which is made if it does not exist yet."""
        for argument in arguments:
            if argument.startswith("SHARED/"):
                self._need(argument.split("/")[1])
        return [argument.replace("SHARED", str(self.folder)) for argument in arguments]

    def copy(self, name: str, target: Path) -> None:
        """A copy of a shared folder that a case may change."""
        self._need(name)
        shutil.copytree(self.folder / name, target)

    def begin(self, command: Command, folder: Path) -> None:
        """Copy a command's inputs into the case's folder."""
        for name, source in command.inputs.items():
            self.copy(source, folder / name)
        (folder / "tmp").mkdir()

    def run(
        self,
        command: Command,
        folder: Path,
        fault: Fault | None = None,
        seconds: float = 60.0,
        *,
        exactly: bool = False,
    ) -> Outcome:
        """Run it with a fault, and kill it after some seconds. `result` is its exit status.

        exactly: seconds by the clock on the wall, which a busy machine does not stretch.
        """
        arguments = [str(folder), self.arguments(command.arguments)]
        return self.server.run(self.target, arguments, [folder], fault, timeout=seconds, exactly=exactly)

    def whole(self, name: str) -> Whole:
        """The run of a command that nobody disturbs; made once. Raises AssertionError where it fails."""
        with self._lock:
            if name not in self._whole:
                folder = self.folder / f"whole {name}"
                folder.mkdir()
                self.begin(COMMANDS[name], folder)
                outcome = self.run(COMMANDS[name], folder)
                assert outcome.result == 0, f"{name}: {outcome.output} {outcome.text}"
                sizes = tuple(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                self._whole[name] = Whole(state(folder), sizes, outcome.calls, outcome.seconds)
            return self._whole[name]

    def _need(self, name: str) -> None:
        with self._lock:
            if not (self.folder / name).exists():
                MAKERS[name](self)

    def kdata(self, *arguments: str) -> None:
        """A command in the shared folder. Raises AssertionError where it fails."""
        outcome = self.run(Command(arguments), self.folder)
        assert outcome.state == "done" and outcome.result == 0, f"kdata {' '.join(arguments)}: {outcome}"


def _corpora(bench: Bench) -> None:
    rows = rows_of_text(16)
    rows[3]["text"] = ""
    write_jsonl(bench.folder / "corpus.jsonl", rows[:10])
    write_jsonl(bench.folder / "changed.jsonl", [{**rows[0], "text": "another text of the log"}, *rows[2:12]])
    write_jsonl(bench.folder / "second.jsonl", rows[10:])
    write_jsonl(bench.folder / "heldout.jsonl", rows[12:])
    write_jsonl(bench.folder / "prompts.jsonl", rows[10:14])


def _recipe(bench: Bench) -> None:
    bench.arguments(["SHARED/teacher", "SHARED/other", "SHARED/corpus.jsonl"])
    (bench.folder / "recipe.yaml").write_text(RECIPE.format(shared=bench.folder))


def _first(bench: Bench) -> None:
    bench.kdata("capture", "begun", *TEACHER, "--corpus", "SHARED/corpus.jsonl", *TOPK, *SMALL)
    bench.kdata("score", "begun", "--model", "SHARED/other", "--backend", "transformers")
    bench.kdata("select", "begun", "--method", "difference", "--name", "half")
    os.rename(bench.folder / "begun", bench.folder / "first")


def _marks(bench: Bench) -> None:
    bench.arguments(["SHARED/first"])
    ids = kdata.open(bench.folder / "first").index(["id"])["id"]
    table = pa.table({"id": ids, "mark": pa.array([float(n) for n in range(len(ids))])})
    pq.write_table(table, bench.folder / "marks.parquet")


def _damaged(bench: Bench) -> None:
    bench.copy("first", bench.folder / "damaged")
    path = sorted((bench.folder / "damaged/data").iterdir())[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _repaired(bench: Bench) -> None:
    bench.copy("damaged", bench.folder / "repaired")
    bench.kdata("repair", "repaired")


# What all cases read, by name: how it is made.
MAKERS: dict[str, Callable[[Bench], Any]] = {
    **dict.fromkeys(("corpus.jsonl", "changed.jsonl", "second.jsonl", "heldout.jsonl", "prompts.jsonl"), _corpora),
    "teacher": lambda bench: save_llama(bench.folder / "teacher", seed=0),
    "other": lambda bench: save_llama(bench.folder / "other", seed=1),
    "recipe.yaml": _recipe,
    "first": _first,
    "second": lambda bench: bench.kdata(
        "capture", "second", *TEACHER, "--corpus", "SHARED/second.jsonl", *TOPK, *SMALL
    ),
    "reread": lambda bench: bench.kdata(
        "reread", "SHARED/first", "reread", "--teacher", "SHARED/other", "--backend", "transformers"
    ),
    "plain.parquet": lambda bench: bench.kdata("export", "SHARED/first", "plain.parquet"),
    "bytes": lambda bench: byte_tokenizer().save_pretrained(bench.folder / "bytes"),
    "student": lambda bench: bench.kdata("train", "SHARED/first", "--out", "student", *STUDENT),
    "marks.parquet": _marks,
    "damaged": _damaged,
    "repaired": _repaired,
    "run": lambda bench: bench.kdata("run", "SHARED/recipe.yaml", "--out", "run"),
}


def in_folder(folder: str, arguments: list[str]) -> int:
    """`kdata ARGUMENTS` in a folder, with its `tmp` for temporary files."""
    os.makedirs(f"{folder}/tmp", exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = f"{folder}/tmp", None
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return kdata_command(arguments, folder)


def state(folder: Path) -> dict[str, str]:
    """Every file and empty folder below a folder, by relative path: SHA-256, or "" where the bytes do not count."""
    result = {}
    for path in sorted(folder.rglob("*")):
        # A repair that goes on sets aside into a second folder; both together count, and the first state of a file.
        name = re.sub(r"(\.aside/)\d+(?=/)", r"\1N", path.relative_to(folder).as_posix())
        if name in result or _is_probe(path):
            continue
        if path.is_symlink():
            result[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            volatile = any(fnmatch.fnmatch(name, pattern) for pattern in VOLATILE)
            result[name] = "" if volatile else hashlib.sha256(_without_times(path)).hexdigest()
        elif all(map(_is_probe, path.iterdir())):
            result[name] = "empty folder"
    return result


def _is_probe(path: Path) -> bool:
    """Whether it is what Python's tempfile writes to see whether a folder can be written, and removes at once."""
    return (
        path.parent.name == "tmp"
        and bool(re.fullmatch("[a-z0-9_]{8}", path.name))
        and path.is_file()
        and b"blat".startswith(path.read_bytes())  # a kill may have cut it
    )


def _without_times(path: Path) -> bytes:
    content = path.read_bytes()
    return TIMES.sub(b"", content) if path.name in ("state.json", "train.json", "README.md") else content


def difference(expected: Mapping[str, str], seen: Mapping[str, str]) -> str | None:
    """What differs between two states, in words; None where nothing does."""
    missing = sorted(set(expected) - set(seen))
    further = sorted(set(seen) - set(expected))
    changed = sorted(name for name in set(expected) & set(seen) if expected[name] != seen[name])
    parts = [
        f"{what}: {', '.join(names[:6])}"
        for what, names in (("missing", missing), ("left over", further), ("other bytes", changed))
        if names
    ]
    return "; ".join(parts) or None
