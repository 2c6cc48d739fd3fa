"""The disk that fails does what it says, for Python, Arrow and DuckDB."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from tests.faults import CHANGES, FULL, Fault, Server, explain


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(["pyarrow.parquet", "duckdb", "safetensors.numpy", "tests.test_faults"]) as server:
        yield server


def write_with_python(folder: str) -> str:
    (Path(folder) / "a").mkdir()
    (Path(folder) / "a" / "text").write_text("0123456789")
    (Path(folder) / "a" / "text").rename(Path(folder) / "b")
    return "written"


def write_with_arrow(folder: str) -> None:
    pq.write_table(pa.table({"x": [1, 2, 3]}), f"{folder}/x.parquet")


def write_with_duckdb(folder: str) -> None:
    duckdb.connect().execute(f"copy (select 1 as x) to '{folder}/x.parquet' (format parquet)")


def write_with_rust(folder: str) -> None:
    save_file({"x": np.zeros(4)}, f"{folder}/x.safetensors")


def test_calls_are_counted_and_each_may_fail(server: Server, tmp_path: Path) -> None:
    whole = server.run("tests.test_faults:write_with_python", [tmp_path / "0"], [tmp_path])
    assert (whole.state, whole.error[0]) == ("failed", "FileNotFoundError")  # the folder is missing
    for at in range(5):
        (tmp_path / f"{at}x").mkdir()
        fault = Fault("once", errno.EIO, at)
        outcome = server.run("tests.test_faults:write_with_python", [tmp_path / f"{at}x"], [tmp_path], fault)
        if at:  # mkdir, open, write, rename
            assert outcome.state == "failed" and outcome.calls >= at and "Input/output error" in outcome.text
            assert not outcome.is_explained and not (tmp_path / f"{at}x" / "b").exists()
        else:
            assert (outcome.state, outcome.result, outcome.calls) == ("done", "written", 4)
            assert (tmp_path / "0x" / "b").read_text() == "0123456789"


def test_other_folders_and_other_calls_do_not_fail(server: Server, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    fault = Fault("from", errno.ENOSPC, 1)
    assert server.run("tests.test_faults:write_with_python", [tmp_path / "x"], [tmp_path / "y"], fault).state == "done"
    (tmp_path / "z").mkdir()
    fault = Fault("from", errno.EIO, 1, ("sync",))
    assert server.run("tests.test_faults:write_with_python", [tmp_path / "z"], [tmp_path], fault).state == "done"


@pytest.mark.parametrize("library", ["arrow", "duckdb", "rust"])
def test_libraries_see_a_full_disk(server: Server, tmp_path: Path, library: str) -> None:
    outcome = server.run(
        f"tests.test_faults:write_with_{library}", [tmp_path], [tmp_path], Fault("from", errno.ENOSPC, 1, FULL)
    )
    assert outcome.state == "failed" and "space" in outcome.text
    assert server.run(f"tests.test_faults:write_with_{library}", [tmp_path], [tmp_path]).calls >= 2


def test_half_a_write_then_a_kill(server: Server, tmp_path: Path) -> None:
    target = "tests.test_faults:write_with_python"
    for name in "abc":
        (tmp_path / name).mkdir()
    killed = server.run(target, [tmp_path / "a"], [tmp_path], Fault("kill inside", at=3))
    assert killed.state == "killed" and (tmp_path / "a" / "a" / "text").read_text() == "01234"
    killed = server.run(target, [tmp_path / "b"], [tmp_path], Fault("kill", at=2))
    assert killed.state == "killed" and not (tmp_path / "b" / "a" / "text").exists()
    short = server.run(target, [tmp_path / "c"], [tmp_path], Fault("short", errno.ENOSPC, 3))
    assert short.state == "failed" and "No space left" in short.text
    assert (tmp_path / "c" / "a" / "text").read_text() == "01234"


def sleep_long() -> None:
    import time

    time.sleep(60)


def test_a_case_that_hangs_is_ended(server: Server, tmp_path: Path) -> None:
    assert server.run("tests.test_faults:sleep_long", [], [tmp_path], timeout=0.2).state == "hung"
    assert set(FULL) < set(CHANGES) and explain(errno.ENOSPC) == "ENOSPC"


def print_beyond_the_limit_of_a_file() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    print("x" * 100_000, flush=True)


def test_a_limit_of_file_size_does_not_cut_off_what_is_printed(server: Server, tmp_path: Path) -> None:
    outcome = server.run("tests.test_faults:print_beyond_the_limit_of_a_file", [], [tmp_path])
    assert outcome.state == "done" and outcome.output == "x" * 100_000 + "\n"
