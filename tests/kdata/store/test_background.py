"""What Ctrl-C and the end of a process do not wait for: servers that do not answer, and work in threads behind it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from kdata.selection.session import open_session
from kdata.store.background import Background, ctrl_c_first
from tests.kdata.selection.plans import Row, dataset_of
from tests.web import Files

ENDLESS = "select count(*) from range(1000000000000) t(a) where a % 7 = 3"
# Both kinds of work that is under way when a process ends: footers, and payloads that are copied ahead.
AT_EXIT = """
import threading, time
from kdata.store.cache import Ahead
from kdata.store.url_dataset import Footers
begun = threading.Semaphore(0)
def slow(*arguments):
    begun.release()
    time.sleep(3600)
footers, ahead = Footers(slow), Ahead(slow, slow)
footers.want("a", "info")
ahead.want(["b"])
begun.acquire()
begun.acquire()
print("both")
"""
# Ctrl-C once the server was asked. A process that was born in the background ignores it until told otherwise.
ASKS = """
import atexit, signal, sys
atexit.register(print, "its own end")
signal.signal(signal.SIGINT, signal.default_int_handler)
import kdata
opened = kdata.open(sys.argv[1])
{ask}
"""
QUERIES = {
    "binding": "opened.sql('select sum(nll) from rows')",
    "short columns": "opened.index(['id'])",
    "a plan": "from kdata.selection.mixtures import Uniform; kdata.select(opened, Uniform(size=10))",
    "a row": "opened[0]",
}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Files]:
    """Two shards at a URL."""
    dataset_of(tmp_path / "d", [Row(f"r{n}", "a", 4, 1.0) for n in range(20)], shard_rows=10)
    files = Files(tmp_path)
    yield files
    files.close()


def test_a_process_ends_while_threads_wait() -> None:
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["both"], "")


@pytest.mark.parametrize("ask", QUERIES)
def test_ctrl_c_ends_what_waits_for_a_server(ask: str, served: Files, tmp_path: Path) -> None:
    served.faults = {"data/": "hang"} if ask == "a row" else {"index/": "hang"}
    arguments = [sys.executable, "-c", ASKS.format(ask=QUERIES[ask]), f"{served.url}/d"]
    environment = {**os.environ, "KDATA_CACHE": str(tmp_path / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(arguments, env=environment, text=True, **pipes)
    while not served.hanging:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told, said = process.communicate(timeout=60)
    assert told == "its own end\n"
    assert said.rstrip().endswith("KeyboardInterrupt") and process.returncode in (130, -signal.SIGINT)


def test_ctrl_c_ends_a_statement_of_a_session(tmp_path: Path, interruptible: None) -> None:
    dataset = dataset_of(tmp_path / "d", [Row("a", "a", 4, 1.0)])
    with open_session(dataset, None, "test", frozenset()) as session:
        for run in (session.execute, session.fetch):
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                run(f"create or replace temp table t as {ENDLESS}" if run == session.execute else ENDLESS)
            timer.join()
        assert session.fetch("select 1") == [(1,)]


def test_ctrl_c_ends_the_binding_of_a_query(tmp_path: Path, interruptible: None) -> None:
    """A pivot asks for its columns when it is bound."""
    dataset = dataset_of(tmp_path / "d", [Row("a", "a", 4, 1.0)])
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        dataset.sql("pivot (select a % 3 as a from range(1000000000000) t(a)) on a using count(*)")
    timer.join()


def test_what_was_made_of_ctrl_c_is_ctrl_c_again() -> None:
    def refuse(first: BaseException) -> None:
        try:
            raise first
        finally:
            raise duckdb.Error("Query interrupted")

    with pytest.raises(KeyboardInterrupt), ctrl_c_first():
        refuse(KeyboardInterrupt())
    with pytest.raises(duckdb.Error), ctrl_c_first():
        refuse(ValueError())
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:  # one that the caller has dealt with
        with pytest.raises(duckdb.Error), ctrl_c_first():
            refuse(ValueError())


def test_background_does_all_and_gives_results_and_errors() -> None:
    background = Background(3, "test")
    futures = [background.submit(pow, n, -1) for n in range(20)]
    assert [future.result() for future in futures[1:]] == [1 / n for n in range(1, 20)]
    with pytest.raises(ZeroDivisionError):
        futures[0].result()


def test_what_was_not_begun_is_cancelled_and_threads_end_with_their_owner() -> None:
    background, go = Background(1, "test-background"), threading.Event()
    running, waiting = background.submit(go.wait), background.submit(print, "never")
    while not running.running():
        time.sleep(0.001)
    alive, threads = weakref.ref(background), background._threads
    del background
    gc.collect()
    assert alive() is None and waiting.cancelled()
    go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
