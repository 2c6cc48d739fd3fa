"""How long a process took by its own doing, on a machine that does other work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import psutil

GAP_SEC = 0.5
STRETCH = 30


class Clock:
    """Seconds that a process and its children would have taken alone on the machine: they ran or slept.

    Time in which a thread of them waited for a processor does not count (`/proc/PID/task/TID/schedstat`), nor does time in
    which one of them was stopped, or nobody could look. Their processor time is counted besides, at half, as two
    threads may run at once; and so is all that passed, at a thirtieth, so that nothing lasts for ever.

    Args:
        pid: the process, which should just have begun. Its children are found by the system's list.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._begun = pid, time.monotonic()
        self._last, self._own = self._begun, 0.0
        self._waited: dict[str, float] = {}
        self._used, _ = self._sum()
        self._sum()

    def seconds(self) -> float:
        """Seconds until now. Must be called several times a second, because a longer gap counts as half a second."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, GAP_SEC), now
        used, waited = self._sum()
        self._own += max(0.0, passed - waited)
        return max(self._own, (used - self._used) / 2, (now - self._begun) / STRETCH)

    def _sum(self) -> tuple[float, float]:
        """Processor time of all threads so far, and how much longer than at the last call they have waited for one."""
        used = waited = 0.0
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._pid)
            for one in (process, *process.children(recursive=True)):
                if one.status() == psutil.STATUS_STOPPED:
                    waited += GAP_SEC
                for task in Path(f"/proc/{one.pid}/task").glob("*/schedstat"):
                    with contextlib.suppress(OSError):  # the thread ended
                        ran, queued = (int(word) / 1e9 for word in task.read_text().split()[:2])
                        used += ran
                        waited += queued - self._waited.get(str(task), queued)
                        self._waited[str(task)] = queued
        return used, waited


def in_time(waited: Callable[[float], bool], pid: int, seconds: float) -> bool:
    """Whether a process is ready before it took so many seconds by its `Clock`.

    Args:
        waited: waits for so many seconds, and says whether it is ready.
    """
    if waited(min(0.5, seconds)):
        return True
    clock = Clock(pid)
    while clock.seconds() < seconds:
        if waited(0.2):
            return True
    return waited(0)
