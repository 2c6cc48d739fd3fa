"""What all campaigns share: cases by number, children with limits of time and memory, and the report as one line of JSON.

A campaign is a module with a class below `Campaign` and this last line:

    if __name__ == "__main__":
        sys.exit(main(Kills))

Then `python -m tests.campaigns.kills --seed 0 --count 100` runs cases 0 to 99 of seed 0. A case depends on the seed and its
number alone, so `--only 17` repeats case 17, and keeps its folder. Progress goes to stderr. The last line of stdout is JSON:
`campaign`, `seed`, `cases`, `failures`, `by_kind` (cases and failures of each kind) and `seconds`. The exit status is 1
where a case failed.

Most cases of `damage` and `fuzz` share a child with others (`Campaign.child`), because starting one takes longer than the
case. What is found there counts only if the case, made anew, fails alone in a child of its own; so does a case that leaves
something behind (files, open files, threads, processes, settings), and that child is replaced. Every fiftieth case runs in
both ways. Everything is in memory (/dev/shm) where the system has that: flushing to a disk would only take time.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from kdata.observe.text import visible
from tests.clock import in_time

# A server that imported everything once; each child is a fork of it, and begins after milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
# What multiprocessing says where its server loses the status of a child, as it does with some where several threads start
# them. So a child also writes its status down, when nothing but its end is left.
LOST = 255
CONTEXT.set_forkserver_preload(["tests.campaigns.preload"])

SECONDS = 10.0
MEMORY = 4 << 30
# Cases of a shared child, after which it is replaced; which cases run alone in any case; and bytes that it may grow by.
SHARED_CASES = 100
ALONE_EVERY = 50
GROWTH = 1 << 30
# Threads that a process keeps for its life once it has needed them.
KEPT_THREADS = ("kdata-rows", "tqdm_monitor")


@dataclass(frozen=True)
class Outcome:
    """What became of a case: its kind, for counting, and what is wrong (None: nothing)."""

    kind: str
    problem: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    status: its exit status; the negative number of a signal that ended it. hung: it was ended because its time was over.
    left: what it left behind, in words.
    """

    status: int
    stdout: str
    stderr: str
    hung: bool = False
    left: str = ""

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it, and not because its time was over."""
        return self.status == -signal.SIGKILL and not self.hung

    def complaint(self) -> str | None:
        """What is wrong with how it ended, whatever it was asked to do: it hung, crashed, or showed a traceback."""
        if self.hung:
            return f"no end after {SECONDS:.0f} s; stderr: {self.stderr[-500:]}"
        if self.status < 0:
            return f"ended by signal {-self.status}; stderr: {self.stderr[-500:]}"
        if "Traceback" in self.stderr:
            return f"a traceback: {self.stderr[-1500:]}"
        if self.status != 0 and "error:" not in self.stderr and "stopped;" not in self.stderr:
            return f"exit status {self.status} without an error message; stderr: {self.stderr[-500:]}"
        return f"it left behind: {self.left}" if self.left else None


class Campaign:
    """One kind of fault, in many places.

    name: the module's name. total: number of different cases, where there is an end of them.
    """

    name = ""
    total: int | None = None
    shares = False  # whether cases share children, by `child`
    first: Callable[[], object] | None = None  # called once in each child that cases share

    def __init__(self) -> None:
        self._local = threading.local()

    def prepare(self, folder: Path, seed: int) -> None:
        """Make what all cases share, in an empty folder; runs once, before the first case."""

    def close(self) -> None:
        """End what `prepare` started; runs once, after the last case."""

    @contextlib.contextmanager
    def sharing(self, shared: SharedChild) -> Iterator[None]:
        """Within this context, `child` of this thread runs in a child that cases share."""
        self._local.shared = shared
        try:
            yield
        finally:
            self._local.shared = None

    def child(self, function: Callable[..., int | None], *arguments: Any) -> Ended:
        """Run a function in a child, alone or in the one that cases share."""
        shared: SharedChild | None = getattr(self._local, "shared", None)
        return child(function, *arguments) if shared is None else shared.run(function, *arguments)

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """Run one case in an empty folder of its own. Must depend on its arguments and `prepare` alone.

        An exception is a failure of the case. Work that can hang, crash or take memory belongs in a `child`.
        """
        raise NotImplementedError


class Child:
    """A function in a process of its own, with limits. Its output goes to files.

    Args:
        function: a function of a module; called with `arguments`. What it returns, an int or None, is its exit status.
        memory: bytes of address space beyond what it has at its start.
    """

    def __init__(self, function: Callable[..., int | None], *arguments: Any, memory: int = MEMORY) -> None:
        self.output = Path(tempfile.mkdtemp(prefix="kdata-child-"))
        self.process: BaseProcess = CONTEXT.Process(
            target=_inside, args=(str(self.output), memory, function, arguments), daemon=False
        )
        self.process.start()

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send it a signal, if it still runs."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, signal_number)

    def wait(self, seconds: float = SECONDS) -> Ended:
        """Wait for its end; a child that takes longer is killed, and `hung`. A busy machine has more time (`Clock`)."""
        hung = not in_time(lambda limit: bool(wait([self.process.sentinel], limit)), self.process.pid or 0, seconds)
        if hung:
            self.process.kill()
        self.process.join()
        out, err, told = ((self.output / name).read_bytes().decode(errors="replace") if (self.output / name).exists() else ""
                          for name in ("stdout", "stderr", "status"))  # fmt: skip
        left = sorted(path.name for path in (self.output / "tmp").iterdir()) if told and not hung else []
        shutil.rmtree(self.output, ignore_errors=True)
        status = self.process.exitcode
        assert status is not None
        return Ended(int(told) if status == LOST and told else status, out, err, hung, ", ".join(left))


class SharedChild:
    """A child that runs many functions, one after the other, with the same limits for each; replaced as need be.

    Args:
        first: called once in each child, before the first function.
    """

    def __init__(self, first: Callable[[], object] | None = None) -> None:
        self._first = first
        self._process: BaseProcess | None = None

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._asking.close()
            self._process.kill()
            self._process.join()
            shutil.rmtree(self._output, ignore_errors=True)
            self._process = None

    def start(self) -> None:
        """Start the child, if none is ready. Raises RuntimeError where what it calls first fails."""
        if self._process is not None:
            return
        self._output = Path(tempfile.mkdtemp(prefix="kdata-child-"))
        self._asking, answering = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(str(self._output), self._first, answering))
        self._process.start()
        answering.close()
        self._cases = 0
        try:
            self._asking.recv()
        except EOFError as error:
            text = (self._output / "stderr").read_text(errors="replace")
            self.close()
            raise RuntimeError(f"a child that cases share did not start: {text}") from error

    def run(self, function: Callable[..., int | None], *arguments: Any) -> Ended:
        """Run a function in it. It is replaced where that fails, leaves something behind, or was the last of many."""
        self.start()
        assert self._process is not None
        self._asking.send((function, arguments))
        hung = not in_time(self._asking.poll, self._process.pid or 0, SECONDS)
        try:
            status, left = (-signal.SIGKILL, "") if hung else self._asking.recv()
        except EOFError:
            self._process.join()
            status, left = self._process.exitcode or 0, "its process"
        out, err = ((self._output / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
        self._cases += 1
        ended = Ended(status, out, err, hung, left)
        if ended.complaint() is not None or self._cases == SHARED_CASES:
            self.close()
        return ended


def child(
    function: Callable[..., int | None], *arguments: Any, seconds: float = SECONDS, memory: int = MEMORY
) -> Ended:
    """Run a function in a process of its own and wait for it. See `Child`."""
    return Child(function, *arguments, memory=memory).wait(seconds)


def kdata_command(arguments: Sequence[str], folder: str | None = None) -> int:
    """`kdata ARGUMENTS` in this process, which ends with it; for `child`. The folder becomes the working directory."""
    from kdata.pipelines.cli.main import call, report_defect

    if folder is not None:
        os.chdir(folder)
    try:
        return call(list(arguments))
    except BaseException as error:
        report_defect(type(error), error, error.__traceback__)
        return 1


def command(arguments: Sequence[object], folder: Path | None = None, **limits: Any) -> Ended:
    """Run `kdata ARGUMENTS` in a child."""
    return child(kdata_command, [str(a) for a in arguments], None if folder is None else str(folder), **limits)


def _inside(output: str, memory: int, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    """The child's own side: redirect its output, limit its memory, call the function, end without cleaning up for others."""
    _redirect(output)
    told = os.open(os.path.join(output, "status"), os.O_WRONLY | os.O_CREAT, 0o600)
    temporary = _own_temporary_folder(output)
    status = _call(memory, function, arguments)
    if any(temporary.iterdir()):
        atexit._run_exitfuncs()  # multiprocessing leaves them out, and some remove temporary folders
    with contextlib.suppress(OSError):  # the case took the room on the disk
        os.write(told, str(status).encode())
    sys.exit(status)


def _redirect(output: str) -> None:
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # stays open as long as the child lives
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _own_temporary_folder(output: str) -> Path:
    temporary = Path(output, "tmp")
    temporary.mkdir()
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    return temporary


def _call(memory: int, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> int:
    """Call a function with so much more memory than the process has; returns its exit status."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory, hard))
    try:
        status = function(*arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve(output: str, first: Callable[[], object] | None, asked: Connection) -> None:
    """A shared child's own side: run what is asked for, and say what each function left behind."""
    _redirect(output)
    temporary = _own_temporary_folder(output)
    if first is not None:
        first()
    gc.collect()
    gc.freeze()  # what all cases share is not looked at again
    begun = psutil.Process().memory_info().rss
    before = _belongings(temporary)
    asked.send(None)
    while True:
        try:
            function, arguments = asked.recv()
        except EOFError:
            os._exit(0)
        for handle in (1, 2):
            os.ftruncate(handle, 0)
        status = _call(MEMORY, function, arguments)
        left = _further(before, temporary)
        if left:
            gc.collect()
            left = _further(before, temporary)
        if psutil.Process().memory_info().rss > begun + GROWTH:
            left = "memory"
        asked.send((status, left))


def _belongings(temporary: Path) -> set[tuple[str, str]]:
    """What a case might leave in its process, or in its temporary folder."""
    found = {("file", path.name) for path in temporary.iterdir()}
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found.add(("open file", f"{handle} {os.readlink(f'/proc/self/fd/{handle}')}"))
    found |= {("thread", t.name) for t in threading.enumerate() if not t.name.startswith(KEPT_THREADS)}
    with contextlib.suppress(ChildProcessError):  # there is none, which takes less to ask than which they are
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        found |= {("process", str(number)) for number, _ in enumerate(psutil.Process().children())}
    found |= {("variable", f"{name}={value}") for name, value in os.environ.items()}
    found |= {
        ("signal", f"{number} {signal.getsignal(number)}") for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }
    found |= {
        ("limit", f"{kind} {resource.getrlimit(kind)}") for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE)
    }
    return found | {("folder", os.getcwd()), ("output", f"{id(sys.stdout)} {id(sys.stderr)}")}


def _further(before: set[tuple[str, str]], temporary: Path) -> str:
    return ", ".join(" ".join(one) for one in sorted(_belongings(temporary) - before))


def run(
    campaign: Campaign,
    *,
    seed: int,
    count: int,
    only: int | None = None,
    workers: int = 1,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Run cases of a campaign. Returns the fields of the last line, and `problems`: number, kind and text of each failure.

    Args:
        count: cases 0 to count - 1, at most `campaign.total`.
        only: this case alone.
        workers: cases at the same time.
        folder: where cases work; folders of failed ones stay there. By default a temporary one that is removed.
    """
    begun = time.monotonic()
    temporary = tempfile.TemporaryDirectory(prefix=f"kdata-{campaign.name}-") if folder is None else None
    place = Path(temporary.name) if temporary is not None else Path(folder or "")
    children: list[SharedChild] = []
    try:
        shared = place / "shared"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
        log(f"{campaign.name}: preparing")
        campaign.prepare(shared, seed)
        numbers = [only] if only is not None else list(range(min(count, campaign.total or count)))
        by_kind: dict[str, dict[str, int]] = {}
        problems: list[dict[str, Any]] = []
        threads = threading.local()

        def alone(number: int) -> Outcome:
            own = place / f"case-{number}"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            try:
                outcome = campaign.run(number, random.Random(f"{campaign.name} {seed} {number}"), own)
            except Exception:  # a campaign goes on after a case that failed in an unforeseen way, and counts it
                outcome = Outcome("unforeseen", traceback.format_exc())
            if outcome.problem is None and only is None:
                shutil.rmtree(own, ignore_errors=True)
            return outcome

        def one(number: int) -> tuple[int, Outcome]:
            if only is not None:
                return number, alone(number)
            if not hasattr(threads, "shared"):
                threads.shared = SharedChild(campaign.first)
                children.append(threads.shared)
            if campaign.shares:
                threads.shared.start()
            with campaign.sharing(threads.shared):
                outcome = alone(number)
            if campaign.shares and (outcome.problem is not None or number % ALONE_EVERY == ALONE_EVERY - 1):
                first, outcome = outcome, alone(number)
                if first.problem is not None and outcome.problem is None:
                    log(f"case {number} ({outcome.kind}) fails only after others: {visible(first.problem)}")
            return number, outcome

        with ThreadPoolExecutor(workers) as pool:
            for done, (number, outcome) in enumerate(pool.map(one, numbers), 1):
                counts = by_kind.setdefault(outcome.kind, {"cases": 0, "failures": 0})
                counts["cases"] += 1
                if outcome.problem is not None:
                    counts["failures"] += 1
                    problems.append({"case": number, "kind": outcome.kind, "problem": outcome.problem})
                    log(f"FAILED case {number} ({outcome.kind}): {visible(outcome.problem)}")
                    log(f"  repeat it alone: python -m tests.campaigns.{campaign.name} --seed {seed} --only {number}")
                if done % 100 == 0:
                    log(f"{campaign.name}: {done:,} of {len(numbers):,} cases, {len(problems)} failed")
    finally:
        for shared_child in children:
            shared_child.close()
        campaign.close()
        if temporary is not None:
            temporary.cleanup()
    return {
        "campaign": campaign.name,
        "seed": seed,
        "cases": len(numbers),
        "failures": len(problems),
        "by_kind": dict(sorted(by_kind.items())),
        "seconds": round(time.monotonic() - begun, 1),
        "problems": problems,
    }


def main(kind: Callable[[], Campaign], arguments: Sequence[str] | None = None) -> int:
    """The command line of a campaign; returns its exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.campaigns.{kind().name}", description=kind.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="another seed is another choice of cases")
    parser.add_argument("--count", type=int, default=100, help="number of cases")
    parser.add_argument("--only", type=int, default=None, metavar="CASE", help="this case alone; its folder stays")
    parser.add_argument("--workers", type=int, default=1, help="cases at the same time")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; folders of failed cases stay")
    options = parser.parse_args(arguments)
    folder = options.folder
    if folder is None and options.only is not None:
        folder = Path(tempfile.mkdtemp(prefix=f"kdata-{kind().name}-"))
    if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK):
        tempfile.tempdir = os.environ["TMPDIR"] = "/dev/shm"
    if folder is not None:
        print(f"working in {folder}", file=sys.stderr)
    report = run(
        kind(),
        seed=options.seed,
        count=options.count,
        only=options.only,
        workers=options.workers,
        folder=folder,
        log=lambda line: print(line, file=sys.stderr, flush=True),
    )
    report.pop("problems")
    print(json.dumps(report))
    return 1 if report["failures"] else 0
