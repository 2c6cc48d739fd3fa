"""Work in threads that neither Ctrl-C nor the end of the process waits for.

`concurrent.futures` joins its threads when the interpreter ends, so a process whose server does not answer would not end.
Such work must not mind being left behind: it writes under temporary names, or nothing.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, ParamSpec, Protocol, TypeVar

import duckdb

from kdata.errors import KdataError, causes

T = TypeVar("T")
P = ParamSpec("P")
Job = tuple[Future[Any], Callable[[], Any]]

PATIENCE_SEC = 3.0  # after Ctrl-C, until a query is left behind that does not end


class Interrupts(Protocol):
    """A connection of DuckDB."""

    def interrupt(self) -> None:
        """End its query soon."""
        ...


class Background:
    """Some daemon threads, begun when there is work. They end when this object is closed or collected.

    Args:
        most: threads at a time.
        name: of the threads.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._guard = threading.Lock()

    def submit(self, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Do it in one of the threads."""
        future: Future[T] = Future()
        self._jobs.put((future, lambda: work(*arguments, **options)))
        with self._guard:
            if len(self._threads) < self._most:
                # The thread knows the queue alone: it would keep this object from being collected.
                thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
                thread.start()
                self._threads.append(thread)
        return future

    def close(self) -> None:
        """Cancel what was not begun; what is under way ends by itself."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)

    def __del__(self) -> None:
        self.close()


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        future, work = job
        if future.set_running_or_notify_cancel():
            _settle(future, work)
        del job, future, work  # its arguments may own the threads


def _settle(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised where the result is asked for
        future.set_exception(error)


def interruptible(connection: Interrupts, work: Callable[[], T]) -> T:
    """What `work` returns, and Ctrl-C ends it: DuckDB looks for no signal while it binds a query or makes Arrow's tables.

    DuckDB does not end a long function of one value either, nor a file system that waits for a server, so it is left behind
    after PATIENCE_SEC or at a second Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C reaches the main thread alone
        return work()
    future: Future[T] = Future()
    try:
        threading.Thread(target=_settle, args=(future, work), name="query", daemon=True).start()
        return future.result()
    except KeyboardInterrupt:
        atexit.register(_leave, future)  # first: a second Ctrl-C ends the waiting
        until = time.monotonic() + PATIENCE_SEC
        while not future.done() and time.monotonic() < until:  # it may not have begun
            connection.interrupt()
            time.sleep(0.01)
        raise


@contextmanager
def ctrl_c_first() -> Iterator[None]:
    """Ctrl-C ends as KeyboardInterrupt, whatever was made of it meanwhile.

    DuckDB refuses to close where a query was left behind, and a short statement makes a RuntimeError of the signal.
    """
    handled = sys.exc_info()[1]
    try:
        yield
    except (duckdb.Error, KdataError, RuntimeError) as error:
        for cause in causes(error, but=handled):
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
        raise


def _leave(future: Future[Any]) -> None:
    """End the process with 130 where a query was left behind: DuckDB's threads would call an interpreter that is gone.

    What others registered for the end is done before.
    """
    if not future.done():
        atexit.unregister(_leave)
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(130)
