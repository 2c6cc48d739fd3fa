"""What all campaigns share: cases by number, children with limits of time and memory, and the report as one line of JSON.

A campaign is a module with a class below `Campaign` and this last line:

    if __name__ == "__main__":
        sys.exit(main(Kills))

Then `python -m tests.campaigns.kills --seed 0 --count 100` runs cases 0 to 99 of seed 0. A case depends on the seed and its
number alone, so `--only 17` repeats case 17, and keeps its folder. Progress goes to stderr. The last line of stdout is JSON:
`campaign`, `seed`, `cases`, `failures`, `by_kind` (cases and failures of each kind) and `seconds`. The exit status is 1
where a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kdata.observe.text import visible

# A server that imported everything once; each child is a fork of it, and begins after milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
# What multiprocessing says where its server loses the status of a child, as it does with some where several threads start
# them. So a child also writes its status down, when nothing but its end is left.
LOST = 255
CONTEXT.set_forkserver_preload(["tests.campaigns.preload"])

SECONDS = 10.0
MEMORY = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a case: its kind, for counting, and what is wrong (None: nothing)."""

    kind: str
    problem: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    status: its exit status; the negative number of a signal that ended it. hung: it was ended because its time was over.
    """

    status: int
    stdout: str
    stderr: str
    hung: bool = False

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
        return None


class Campaign:
    """One kind of fault, in many places.

    name: the module's name. total: number of different cases, where there is an end of them.
    """

    name = ""
    total: int | None = None

    def prepare(self, folder: Path, seed: int) -> None:
        """Make what all cases share, in an empty folder; runs once, before the first case."""

    def close(self) -> None:
        """End what `prepare` started; runs once, after the last case."""

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
        """Wait for its end; a child that takes longer is killed, and `hung`. A busy machine has more time."""
        share = os.getloadavg()[0] / (os.cpu_count() or 1)
        self.process.join(seconds * max(1.0, share))
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        out, err, told = ((self.output / name).read_bytes().decode(errors="replace") if (self.output / name).exists() else ""
                          for name in ("stdout", "stderr", "status"))  # fmt: skip
        shutil.rmtree(self.output, ignore_errors=True)
        status = self.process.exitcode
        assert status is not None
        return Ended(int(told) if status == LOST and told else status, out, err, hung)


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
    for name, number in (("stdout", 1), ("stderr", 2)):
        handle = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    told = os.open(os.path.join(output, "status"), os.O_WRONLY | os.O_CREAT, 0o600)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # stays open as long as the child lives
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        status = function(*arguments) or 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError):  # the case took the room on the disk
        os.write(told, str(status).encode())
    sys.exit(status)


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
    try:
        shared = place / "shared"
        shutil.rmtree(shared, ignore_errors=True)
        shared.mkdir(parents=True)
        log(f"{campaign.name}: preparing")
        campaign.prepare(shared, seed)
        numbers = [only] if only is not None else list(range(min(count, campaign.total or count)))
        by_kind: dict[str, dict[str, int]] = {}
        problems: list[dict[str, Any]] = []

        def one(number: int) -> tuple[int, Outcome]:
            own = place / f"case-{number}"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            try:
                outcome = campaign.run(number, random.Random(f"{campaign.name} {seed} {number}"), own)
            except Exception:  # a campaign goes on after a case that failed in an unforeseen way, and counts it
                outcome = Outcome("unforeseen", traceback.format_exc())
            if outcome.problem is None and only is None:
                shutil.rmtree(own, ignore_errors=True)
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
