"""A disk that fails, for tests: ENOSPC, EIO, short writes, kills, at any call that changes the disk below some folders.

    with Server() as server:
        whole = server.run("tests.fakes:run_capture", [root, corpus, tokenizer], [root])
        for at in range(1, whole.calls + 1):
            outcome = server.run("tests.fakes:run_capture", [...], [root], Fault("from", errno.ENOSPC, at))

The faults come from a library that is loaded below everything (`faults.c`, LD_PRELOAD), so they reach Arrow, DuckDB and Rust
as well as Python. It needs a C compiler; without one, `library` skips the test. Each case runs in a fork of a server that has
imported what it needs, and takes milliseconds. Calls are counted from 1, in the order in which they happen.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import pytest

from tests.clock import in_time

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".c")
CALLS = {
    "create": 1, "write": 2, "sync": 4, "rename": 8, "folder": 16, "remove": 32, "link": 64, "truncate": 128, "read": 256,
}  # fmt: skip
CHANGES = tuple(name for name in CALLS if name != "read")
HOW = {"once": 0, "from": 1, "short": 2, "kill": 3, "kill inside": 4}


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where.

    Attributes:
        how: once: call `at` fails. from: it and every later one fail. short: that write stores half, and later calls fail.
            kill: SIGKILL before the call. kill inside: SIGKILL when half is written, or right after another call.
        number: the errno of a call that fails.
        at: number of the call, from 1.
        calls: kinds of calls that are counted and may fail; READ_ONLY, FULL, BROKEN and TOO_MANY_FILES are usual sets.
    """

    how: Literal["once", "from", "short", "kill", "kill inside"]
    number: int = 0
    at: int = 1
    calls: tuple[str, ...] = CHANGES


FULL = ("create", "write", "sync", "folder", "link", "truncate")  # ENOSPC: a full disk still removes and renames
READ_ONLY = CHANGES  # EROFS
BROKEN = CHANGES  # EIO
TOO_MANY_FILES = ("create", "read")  # EMFILE


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        state: done, failed (an exception left the function), killed (by a signal), hung (longer than the time allowed).
        result: what the function returned, where it is JSON; else its text.
        error: names of the exception's classes, its own first; () without an exception.
        text: the exception's text, with the traceback where it is not one of kdata's errors.
        calls: calls that were counted; 0 where the process was killed.
        output: what it printed, stdout and stderr together.
        seconds: wall time.
    """

    state: Literal["done", "failed", "killed", "hung"]
    result: Any
    error: tuple[str, ...]
    text: str
    calls: int
    output: str
    seconds: float

    @property
    def is_explained(self) -> bool:
        """Whether nothing went wrong, or what went wrong is an error of kdata's."""
        return self.state == "done" or (self.state == "failed" and "KdataError" in self.error)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own; skips where this user may not mount one."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def library() -> Path:
    """The compiled library, built once for each version of its source; skips the test where there is no C compiler."""
    name = f"kdata-faults-{os.getuid()}-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / name
    if path.exists() and path.stat().st_uid == os.getuid():
        return path
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("a disk that fails needs a C compiler (cc)")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / name
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(built), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, path)
    return path


class Server:
    """A process with the library loaded; each `run` is a fork of it. A context manager.

    Args:
        preload: modules that it imports at its start. None may start a thread.
        environment: further variables of its environment.
    """

    def __init__(self, preload: Sequence[str] = ("tests.preload",), environment: dict[str, str] | None = None) -> None:
        self._preload, self._environment = list(preload), environment or {}

    def __enter__(self) -> Server:
        own = {"LD_PRELOAD": str(library()), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", *self._preload],
            cwd=ROOT, env={**os.environ, **self._environment, **own}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # it has nothing to finish, and the modules that it loaded take long to end
        self._process.wait()

    def run(
        self,
        target: str,
        arguments: Sequence[Any],
        folders: Sequence[Path],
        fault: Fault | None = None,
        *,
        timeout: float = 60.0,
        exactly: bool = False,
    ) -> Outcome:
        """Call MODULE:FUNCTION with JSON arguments in a fork; paths become text. Without a fault, calls are only counted.

        Args:
            folders: only calls below these are counted and fail.
            timeout: seconds after which the fork is killed, by its `Clock`: a busy machine gives it more.
            exactly: seconds by the clock on the wall.
        """
        fault = fault or Fault("once", at=0)
        request = {
            "target": target, "arguments": list(arguments), "folders": [str(f.resolve()) for f in folders],
            "how": HOW[fault.how], "number": fault.number, "at": fault.at,
            "calls": sum(CALLS[call] for call in set(fault.calls)), "timeout": timeout,
            "exactly": exactly,
        }  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise AssertionError(f"the server of faults ended with status {self._process.wait()}")
        values = json.loads(answer)
        return Outcome(**{**values, "error": tuple(values["error"])})


def _serve() -> None:
    """Answer requests, a line of JSON each."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(_case(json.loads(line))) + "\n")
        answers.flush()


def _case(request: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fork and say how it ended."""
    reader, writer = os.pipe()
    output, printed = os.pipe()  # not a file: a limit of file size would cut off the error that it causes
    begun = time.monotonic()
    child = os.fork()
    if not child:
        os.close(reader)
        os.close(output)
        os.setsid()
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.close(printed)
        _child(request, writer)
    os.close(writer)
    os.close(printed)
    content, text, state = _read(reader, output, child, request["timeout"], exactly=request["exactly"])
    os.close(reader)
    os.close(output)
    values = json.loads(content) if content else {"result": None, "error": [], "text": "", "calls": 0}
    if state == "ended":
        state = values.pop("state", "killed")
    values.pop("state", None)
    return {**values, "state": state, "output": text, "seconds": time.monotonic() - begun}


def _read(reader: int, output: int, child: int, timeout: float, *, exactly: bool) -> tuple[bytes, str, str]:
    """What the child answers before its time is over, what it printed, and whether it ended or hung."""
    blocks: dict[int, list[bytes]] = {reader: [], output: []}
    is_open = {reader, output}

    def ended(limit: float) -> bool:
        deadline = time.monotonic() + limit
        while reader in is_open:
            ready = select.select(list(is_open), [], [], max(deadline - time.monotonic(), 0))[0]
            if not ready:
                return False
            for handle in ready:
                blocks[handle].append(os.read(handle, 1 << 16))
                if not blocks[handle][-1]:
                    is_open.remove(handle)
        return True

    is_ended = ended(timeout) if exactly else in_time(ended, child, timeout)
    if not is_ended:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # its time was over before the child had a group of its own
            os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while output in is_open and select.select([output], [], [], 0)[0]:  # a process of its own may still hold it
        blocks[output].append(os.read(output, 1 << 16))
        if not blocks[output][-1]:
            break
    content, text = (b"".join(blocks[handle]) for handle in (reader, output))
    return content if is_ended else b"", text.decode(errors="replace"), "ended" if is_ended else "hung"


def _child(request: dict[str, Any], writer: int) -> None:
    """Run the target with the fault armed, write what happened to the pipe, and end."""
    faults = ctypes.CDLL(None)
    faults.faults_count.restype = ctypes.c_long
    module, _, name = request["target"].partition(":")
    function = getattr(importlib.import_module(module), name)
    folders = b"".join(os.fsencode(folder) + b"\0" for folder in request["folders"]) + b"\0"
    values: dict[str, Any] = {"state": "done", "result": None, "error": [], "text": ""}
    faults.faults_arm(folders, request["how"], request["number"], ctypes.c_long(request["at"]), request["calls"])
    try:
        values["result"] = function(*request["arguments"])
    except BaseException as error:  # whatever it is, the test decides
        faults.faults_disarm()
        names = [kind.__name__ for kind in type(error).__mro__]
        text = str(error) if "KdataError" in names else "".join(traceback.format_exception(error))
        values |= {"state": "failed", "error": names, "text": text}
    faults.faults_disarm()
    values["calls"] = faults.faults_count()
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(writer, "wb") as file:
        file.write(json.dumps(values, default=str).encode())
    os._exit(0)


def explain(number: int) -> str:
    """The name of an errno, such as ENOSPC."""
    return errno.errorcode.get(number, str(number))


if __name__ == "__main__":
    _serve()
