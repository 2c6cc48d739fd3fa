"""Commands that write, on a disk that fails: full, broken, read-only; short writes, too many open files, a file size limit.

The command must end with one clear error that names the cause, exit status 1 and no traceback, or do its work whole. Then,
with the disk in order, the same command leaves the bytes of a run that nobody disturbed, and no other files.

Faults are injected below Python, Arrow, DuckDB and Rust (`tests/faults.py`), a stand-in for a disk that fails. Two kinds
are real: the limit of file size is the system's (RLIMIT_FSIZE), and so is the full disk, a small file system in memory,
where this process may mount one.

    python -m tests.campaigns.disk --seed 0 --count 1500
"""

from __future__ import annotations

import errno
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.campaigns.campaign import Outcome, main
from tests.campaigns.commands import COMMANDS, difference, in_folder, state
from tests.campaigns.kills import HANG_SEC, Kills
from tests.faults import BROKEN, FULL, READ_ONLY, TOO_MANY_FILES, Fault
from tests.faults import Outcome as Ended

# By kind of fault: the fault at a call, and words of which the error must have one.
FAULTS: dict[str, tuple[Fault, tuple[str, ...]]] = {
    "full": (Fault("from", errno.ENOSPC, calls=FULL), ("full", "No space")),
    "full once": (Fault("once", errno.ENOSPC, calls=FULL), ("full", "No space")),
    "short write": (Fault("short", errno.ENOSPC, calls=FULL), ("full", "No space")),
    "broken": (Fault("from", errno.EIO, calls=BROKEN), ("nput/output", "I/O")),
    "broken once": (Fault("once", errno.EIO, calls=BROKEN), ("nput/output", "I/O")),
    "read-only": (Fault("from", errno.EROFS, calls=READ_ONLY), ("ead-only",)),
    "quota": (Fault("from", errno.EDQUOT, calls=FULL), ("quota",)),
    "open files": (Fault("from", errno.EMFILE, calls=TOO_MANY_FILES), ("open files",)),
}
REAL = {"file size": ("too large", "full", "file size"), "full file system": ("full", "No space")}


def in_small_folder(folder: str, arguments: list[str], limit: int) -> int:
    """`kdata ARGUMENTS`, where no file may be longer than the limit; Python asks for the error, not the signal."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return in_folder(folder, arguments)


class Disk(Kills):
    """Run every command that writes on a disk that fails, then again on one that does not."""

    name = "disk"

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        super().prepare(folder, seed)
        place = folder / "mount"
        place.mkdir()
        self.can_mount = _mount(place, 1 << 20)
        if self.can_mount:
            subprocess.run(["umount", str(place)], check=True)

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        name, at = self.place(number)
        kinds = [*FAULTS, "file size", "file size", *(["full file system"] * 2 if self.can_mount else [])]
        how = rng.choice(kinds)
        if how != "full file system":
            return self._case(name, how, at, rng, folder / "d", folder / "d")
        disk = folder / "disk"
        disk.mkdir()
        assert _mount(disk, rng.randint(4096, max(3 * sum(self.bench.whole(name).sizes), 64 << 10)))
        try:
            return self._case(name, how, at, rng, disk, folder / "after")
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)

    def _case(self, name: str, how: str, at: int, rng: random.Random, place: Path, after: Path) -> Outcome:
        """One command with one fault in `place`; then it goes on in `after`."""
        command, whole = COMMANDS[name], self.bench.whole(name)
        kind, patient = f"{how}, {name}", HANG_SEC + 3 * whole.seconds
        place.mkdir(exist_ok=True)
        try:
            self.bench.begin(command, place)
        except OSError:
            return Outcome(f"{how}, too small for what the command reads")
        before, rows = self.inputs(command, place), set[str]()
        if how in FAULTS:
            fault, causes = FAULTS[how]
            what = f"call {at}"
            ended = self.bench.run(command, place, Fault(fault.how, fault.number, at, fault.calls), patient)
        elif how == "file size":
            limit, causes = rng.randrange(max(whole.sizes) + 1), REAL[how]
            what = f"a limit of {limit} bytes"
            target = "tests.campaigns.disk:in_small_folder"
            arguments = [str(place), self.bench.arguments(command.arguments), limit]
            ended = self.bench.server.run(target, arguments, [place], timeout=patient)
        else:
            what, causes = "a small disk", REAL[how]
            ended = self.bench.run(command, place, None, patient)
        problem = _complaint(ended, causes)
        if problem is None and ended.result != 0:
            problem = self.between(command, place, before, rows)
        if problem is not None:
            return Outcome(kind, f"{what}: {problem}")
        if ended.result == 0:
            wrong = difference(_without_leftovers(whole.state), _without_leftovers(state(place)))
            return Outcome(kind, wrong and f"{what}: it ended well, but: {wrong}")
        if after != place:
            shutil.copytree(place, after, symlinks=True)
        again = self.bench.run(command, after, None, patient)
        if again.result and " exists" in again.output and difference(whole.state, state(after)) is None:
            return Outcome(kind)  # it failed after the last rename: the target is whole, and is said to be there
        if again.state != "done" or again.result != 0:
            ended_again = f"{again.state}: {again.output[-900:]} {again.text[-500:]}"
            return Outcome(kind, f"{what}: afterwards the command ends {ended_again}")
        wrong = difference(whole.state, state(after))
        return Outcome(kind, wrong and f"{what}, then finished: {wrong}; the error was: {_errors(ended.output)}")


def _without_leftovers(files: Mapping[str, str]) -> dict[str, str]:
    """A state without locks and temporary folders, which the disk may have refused to remove; a later run does."""
    left = re.compile(r"(^|/)(\.|tmp/kdata-)[^/]+\.(lock|tmp)(/|$)")
    return {name: value for name, value in files.items() if name != "tmp" and not left.search(name)}


def _errors(output: str) -> list[str]:
    return [line for line in output.replace("\r", "\n").split("\n") if line.startswith("error:")]


def _complaint(ended: Ended, causes: tuple[str, ...]) -> str | None:
    """What is wrong with how a command on a failing disk ended."""
    if ended.state != "done":
        return f"it ended {ended.state}: {ended.text[-1200:]} {ended.output[-600:]}"
    if "Traceback" in ended.output:
        return f"a traceback: {ended.output[-1800:]}"
    if ended.result == 0:
        return None
    if ended.result != 1:
        return f"exit status {ended.result}: {ended.output[-500:]}"
    errors = _errors(ended.output)
    if len(errors) != 1:
        return f"{len(errors)} errors: {ended.output[-900:]}"
    text = ended.output[ended.output.rindex("error:") :]
    if not any(cause in text for cause in causes):
        return f"the error does not name the cause ({causes[0]}): {text[:600]}"
    return None


def _mount(place: Path, size: int) -> bool:
    """Mount a file system in memory; False where this process may not."""
    if shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(Disk))
