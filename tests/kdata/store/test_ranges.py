"""Parts of files at a URL are kept between processes: what is fetched again, what is believed, how much there may be."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.errors import ConfigError, CorruptError, KdataError, QueryError, StorageError
from kdata.format.schema import FileInfo
from kdata.pipelines.cli.main import call
from kdata.store import ranges, url_dataset
from kdata.store.ranges import SHARE, SWEEPS, Ranges, key_of, place_of
from kdata.store.shard import write_parquet
from kdata.store.sql_errors import is_of_bytes
from kdata.store.url import Store
from kdata.store.url_dataset import Footers
from tests.kdata.selection.plans import Row, dataset_of
from tests.web import Files

QUERY = "select domain, sum(num_tokens)::bigint as n, max(nll) as nll from rows group by 1 order by 1"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    """3,000 rows in three shards, the text of each row longer than all its numbers."""
    text = Random(0)
    rows = [
        Row(
            f"row-{n * 7919 % 3000:05}", "abc"[n % 3], 2 + n % 5, 1.0 + n * 31 % 17 + n / 1e4, text.randbytes(100).hex()
        )
        for n in range(3000)
    ]
    return dataset_of(tmp_path_factory.mktemp("home") / "d", rows, shard_rows=1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def served(home: kdata.Dataset, serve: Callable[[Path], Files]) -> Files:
    """The dataset at a URL."""
    return serve(home.path.parent)


def parts(cache: Path) -> list[Path]:
    return sorted((cache / "ranges").glob("*/*"))


def test_another_process_fetches_only_what_none_has_fetched(home: kdata.Dataset, served: Files) -> None:
    assert kdata.open(f"{served.url}/d").sql(QUERY).equals(home.sql(QUERY))
    served.sent.clear()
    code = "import kdata, sys; print(kdata.open(sys.argv[1]).sql(sys.argv[2], values='json').to_pylist())"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{served.url}/d", QUERY], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(home.sql(QUERY, values="json").to_pylist())
    assert {path for path, _, _ in served.sent} == {"d/dataset.json", "d/manifest.jsonl"}
    served.sent.clear()
    other = "select max(text) as t from rows"
    assert kdata.open(f"{served.url}/d").sql(other).equals(home.sql(other))
    sizes = {f"d/index/{path.name}": path.stat().st_size for path in (home.path / "index").iterdir()}
    fetched = [(path, first + count) for path, first, count in served.sent if path in sizes]
    assert len(fetched) == 3 and all(end < sizes[path] for path, end in fetched)  # no footer


def test_what_was_damaged_on_the_disk_is_fetched_again(home: kdata.Dataset, served: Files, cache: Path) -> None:
    expected = home.sql(QUERY)
    assert kdata.open(f"{served.url}/d").sql(QUERY).equals(expected)
    rng, whole = np.random.default_rng(3), {path: path.read_bytes() for path in parts(cache)}
    assert len(whole) > 3
    for path, content in whole.items():
        other = next(one for one in whole if one.parent != path.parent)
        harms = [bytearray(content) for _ in range(3)]
        for flipped in harms:
            flipped[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        for harm in [*harms, content[:-1], content[:20], b"", content + b"x", whole[other]]:
            path.write_bytes(harm)
            served.sent.clear()
            assert kdata.open(f"{served.url}/d").sql(QUERY).equals(expected)
            assert [one for one in served.sent if "/index/" in one[0]], "it was believed"
            assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("by", ["group", "link", "owner"])
def test_what_others_could_have_written_is_not_believed(by: str, cache: Path, tmp_path: Path) -> None:
    """The checksum keeps nobody out who can write: he would make another one."""
    kept, digest = Ranges(), "a" * 64
    kept.keep(digest, 10, b"content")
    [path] = parts(cache)
    assert kept.read(digest, 11, 14) == b"ont"
    if by == "group":
        path.chmod(0o620)
    elif by == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    assert kept.read(digest, 11, 14) is None
    kept.keep(digest, 10, b"content")
    assert kept.read(digest, 11, 14) == b"ont"


def test_a_part_belongs_to_its_file_and_place(cache: Path) -> None:
    kept, rng = Ranges(), np.random.default_rng(0)
    files = {letter * 64: rng.bytes(5000) for letter in "abc"}
    for _ in range(400):
        digest = "abc"[int(rng.integers(3))] * 64
        begin, end = sorted(rng.integers(0, 5001, 2).tolist())
        known = kept.read(digest, begin, end)
        assert known is None or known == files[digest][begin:end]
        kept.keep(digest, begin, files[digest][begin:end])
        if end > begin:
            assert kept.read(digest, begin, end) == files[digest][begin:end]
    first, second = (next(path for path in parts(cache) if path.parent.name == letter * 64) for letter in "ab")
    for source, name in ((first, "10000-10009"), (second, "20000-20009")):  # of another place, of another file
        os.replace(source, first.with_name(name))
        assert kept.read("a" * 64, int(name[:5]), int(name[:5]) + 1) is None
    kept.forget("b" * 64)
    assert kept.read("b" * 64, 0, 1) is None


def test_parts_stay_within_their_bound_and_those_used_last_stay(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "1MB")
    most, kept = 10**6 // SHARE, Ranges()
    content, used = os.urandom(most // SWEEPS - 100), "f" * 64
    kept.keep(used, 0, content)
    for number in range(60):
        kept.keep(f"{number:064x}", 0, content)
        time.sleep(0.002)  # of another time in the file system's clock
        assert kept.read(used, 0, 9) == content[:9]
        assert sum(path.stat().st_size for path in parts(cache)) <= most
    assert kept.read(f"{59:064x}", 0, 9) is not None and kept.read(f"{0:064x}", 0, 9) is None
    assert all(any(folder.iterdir()) for folder in (cache / "ranges").iterdir())
    kept.keep("e" * 64, 0, os.urandom(most // 2))
    assert kept.read("e" * 64, 0, 9) is None  # a single part is no reason to forget most others
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "0")
    Ranges().keep("d" * 64, 0, b"one")
    assert not [path for path in parts(cache) if path.parent.name == "d" * 64]


WRITER = """
import sys
import numpy as np
from kdata.store.ranges import Ranges
kept, rng = Ranges(), np.random.default_rng(int(sys.argv[1]))
files = {letter * 64: np.random.default_rng(ord(letter)).bytes(20_000) for letter in "abcd"}
print("ready", flush=True)
while True:
    digest = "abcd"[int(rng.integers(4))] * 64
    begin, end = sorted(rng.integers(0, 20_001, 2).tolist())
    known = kept.read(digest, begin, end)
    assert known is None or known == files[digest][begin:end]
    kept.keep(digest, begin, files[digest][begin:end])
    if rng.random() < 0.01:
        kept.forget(digest)
"""


def test_several_processes_and_kills_leave_whole_parts(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "10MB")
    files = {letter * 64: np.random.default_rng(ord(letter)).bytes(20_000) for letter in "abcd"}
    for turn in range(3):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, str(3 * turn + n)], stdout=subprocess.PIPE, text=True)
            for n in range(3)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        time.sleep(0.3 + 0.1 * turn)
        assert all(writer.poll() is None for writer in writers), "what it read was wrong"
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
    whole = [path for path in parts(cache) if path.suffix != ".tmp"]
    assert len(whole) > 20
    for path in whole:
        begin, end = (int(number) for number in path.name.split("-"))
        assert Ranges().read(path.parent.name, begin, end) == files[path.parent.name][begin:end]
        assert path.stat().st_size == 32 + end - begin
    left = cache / "ranges" / ("a" * 64) / ".0123456789abcdef.tmp"
    left.write_bytes(b"half")
    monkeypatch.setattr("kdata.store.url.ABANDONED_SEC", -1)
    Ranges().keep("a" * 64, 0, b"x")
    assert not left.exists()


def test_threads_read_and_keep_at_once(cache: Path) -> None:
    kept, content, wrong = Ranges(), os.urandom(4000), []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            begin, end = sorted(rng.integers(0, 4001, 2).tolist())
            if kept.read("a" * 64, begin, end) not in (None, content[begin:end]):
                wrong.append((begin, end))
            kept.keep("a" * 64, begin, content[begin:end])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and kept.read("a" * 64, 0, 1) in (None, content[:1])


def with_another_value(path: Path, size: int) -> bytes:
    """An index file of the same size, in which a row has an NLL of 99."""
    table = pq.read_table(path)
    place = table.column_names.index("nll")
    for row in range(table.num_rows):
        values = table["nll"].to_numpy().copy()
        values[row] = 99.0
        file = io.BytesIO()
        write_parquet(table.set_column(place, table.schema.field(place), pa.array(values)), file)
        if len(file.getvalue()) == size:
            return file.getvalue()
    raise AssertionError("none has this size")


def test_what_came_damaged_is_forgotten_once_it_is_noticed(home: kdata.Dataset, served: Files, cache: Path) -> None:
    """A column that was read with other values than the index file has, and a footer that cannot be read."""
    path = next(iter(sorted((home.path / "index").iterdir())))
    right = path.read_bytes()
    wrong, footer = with_another_value(path, len(right)), len(right) - 8 - int.from_bytes(right[-8:-4], "little")
    try:
        path.write_bytes(wrong)
        opened = kdata.open(f"{served.url}/d")
        assert 99.0 in opened.index(["nll"])["nll"].to_pylist()
        path.write_bytes(right)
        assert 99.0 in kdata.open(f"{served.url}/d").index(["nll"])["nll"].to_pylist(), "kept"
        with pytest.raises(CorruptError, match="was read with other values"):
            _ = opened[3]
        again = kdata.open(f"{served.url}/d")
        assert again.index(["nll"]).equals(home.index(["nll"])) and again[3].id == home[3].id
        for ask in (
            lambda: kdata.open(f"{served.url}/d").sql(QUERY),
            lambda: kdata.open(f"{served.url}/d").index(["id"]),
        ):
            for one in parts(cache):
                one.unlink()
            for copy in cache.glob("datasets/*/*/index/*"):
                copy.unlink()
            path.write_bytes(right[:footer] + bytes(300) + right[footer + 300 :])
            with pytest.raises(KdataError):
                ask()
            path.write_bytes(right)
            ask()
    finally:
        path.write_bytes(right)


@pytest.mark.parametrize(
    "query",
    [
        "select cast(domain as int) from rows",
        "select error('x' || domain) from rows",
        "select (num_tokens * 0 + 100)::tinyint + 100::tinyint from rows",
        "select nope from rows",
    ],
)
def test_an_error_of_the_query_is_no_reason_to_forget(
    home: kdata.Dataset, served: Files, cache: Path, query: str
) -> None:
    opened = kdata.open(f"{served.url}/d")
    opened.sql(QUERY)
    kept = set(parts(cache))
    with pytest.raises(QueryError):
        opened.sql(query)
    assert kept <= set(parts(cache)) and kept


def test_ctrl_c_is_no_reason_to_forget(home: kdata.Dataset, served: Files, cache: Path, interruptible: None) -> None:
    opened = kdata.open(f"{served.url}/d")
    opened.sql(QUERY)
    kept = set(parts(cache))
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        opened.sql("select sum(nll) from rows, range(1000000000000) t(a) where a % 7 = 3")
    assert kept <= set(parts(cache)) and kept


def test_the_file_that_an_error_names_is_forgotten_alone(home: kdata.Dataset, served: Files, cache: Path) -> None:
    entry = home.manifest[1]
    [path] = [home.path / name for name in entry.files if name.startswith("index/")]
    right = path.read_bytes()
    key = key_of(place_of(Store(f"{served.url}/d")), entry.files[path.relative_to(home.path).as_posix()].sha256)
    kdata.open(f"{served.url}/d").sql(QUERY)
    assert key in {one.parent.name for one in parts(cache)}
    shutil.rmtree(cache)
    try:
        path.write_bytes(b"x" * len(right))
        with pytest.raises(QueryError, match="No magic bytes"):
            kdata.open(f"{served.url}/d").sql(QUERY)
    finally:
        path.write_bytes(right)
    assert key not in {one.parent.name for one in parts(cache)} and len(parts(cache)) > 1
    assert kdata.open(f"{served.url}/d").sql(QUERY).equals(home.sql(QUERY))


@pytest.mark.parametrize(
    ("text", "of_bytes"),
    [
        ("TProtocolException: Invalid data", True),
        ('Invalid Input Error: Failed to read file "a": ZSTD Decompression failure', True),
        ('Invalid Input Error: Invalid string encoding found in Parquet file "a"', True),
        ('IO Error: Could not read enough bytes from file "a"', True),
        ("Parquet file is likely corrupted, dictionary offset out of range", True),
        ("Invalid Input Error: xa\n\nLINE 1: from read_parquet(['a'])", False),
        ("Out of Range Error: Overflow in addition of INT8", False),
        ("INTERRUPT Error: Interrupted!", False),
        ('Traceback (most recent call last):\n  File "a.py"\nKeyboardInterrupt: ', False),
    ],
)
def test_which_errors_are_of_the_bytes_of_a_file(text: str, of_bytes: bool) -> None:
    assert is_of_bytes(duckdb.Error(text)) == of_bytes


AGAIN = ", then run the same command again. What was committed is intact."
FAULTS: dict[str, tuple[int | str, str, str]] = {
    "too much": (429, "429", "too much was asked of it in a short time: wait some minutes"),
    "server": (500, "500", "the server failed: wait a moment"),
    "gateway": (503, "503", "the server failed: wait a moment"),
    "forbidden": (403, "403", "access is refused: check the credentials"),
    "no token": (401, "401", "access is refused: check the credentials"),
    "gone": (404, "404|FileNotFoundError", "it is not there, or not any more"),
    "reset": (
        "reset",
        "ServerDisconnectedError|ClientOSError|ConnectionResetError",
        "the connection broke: check the network",
    ),
    "refused": ("http://127.0.0.1:1/x", "Connect", "no server listens there"),
    "DNS": ("http://no-such-server.invalid/x", "Connect", "no such server is known: check the URL and the network"),
    "TLS": ("https://127.0.0.1:{port}/x", "SSL", "no secure connection: check the URL, this machine's clock"),
}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines of the error output that are not progress."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "done in" not in line and "failed in" not in line and " rows read" not in line]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", [["sql", QUERY], ["select", "--method", "cap", "--set", "size=4000"]])
def test_what_a_server_does_wrong_in_a_query_is_one_line_with_its_remedy(
    home: kdata.Dataset, served: Files, cache: Path, command: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, reason, remedy = FAULTS[fault]
    served.faults["index/"] = answer.format(port=served.url.rpartition(":")[2]) if isinstance(answer, str) else answer
    assert call([command[0], f"{served.url}/d", *command[1:]]) == 1
    [line] = said(capsys)
    assert line.startswith(f"error: cannot read {served.url}/d/index/capture-") and line.endswith(AGAIN)
    assert re.search(reason, line) and remedy in line and "Traceback" not in line
    served.faults.clear()
    assert call([command[0], f"{served.url}/d", *command[1:]]) == 0


def test_a_server_that_does_not_answer_in_time_is_one_line(
    home: kdata.Dataset, served: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aiohttp waits for five minutes."""
    opened = kdata.open(f"{served.url}/d")
    monkeypatch.setattr(opened._store.fs, "client_kwargs", {"timeout": aiohttp.ClientTimeout(total=0.5)})
    opened._store.fs._session = None
    served.faults["index/"] = "hang"
    with pytest.raises(StorageError, match=r"cannot read .*TimeoutError.*; the server did not answer in time") as error:
        opened.sql(QUERY)
    assert "\n" not in str(error.value)


def test_an_error_of_a_query_shows_no_secret(
    home: kdata.Dataset, served: Files, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store sends clients to addresses that are signed for a time."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "w" * 34)
    query = "X-Amz-Signature=5ec2e7&X-Amz-Credential=5ec2e7&Expires=1&token=hf_" + "w" * 34
    served.faults |= {"signed": 403, "index/": f"{served.url}/signed/5ecret-not?{query}"}
    assert call(["sql", f"{served.url}/d", QUERY]) == 1
    [line] = said(capsys)
    assert "5ec2e7" not in line and "w" * 34 not in line and "403" in line and "signed/5ecret-not" in line


def test_half_an_answer_is_not_kept(home: kdata.Dataset, served: Files, cache: Path) -> None:
    served.cut = re.compile("index/")
    with pytest.raises(KdataError):
        kdata.open(f"{served.url}/d").sql(QUERY)
    served.cut = re.compile("(?!)")
    assert kdata.open(f"{served.url}/d").sql(QUERY).equals(home.sql(QUERY))


def test_footers_are_fetched_at_once(
    home: kdata.Dataset, served: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question waits until all three were asked; one after the other they would wait for ever."""
    together, opened = threading.Barrier(3), kdata.open(f"{served.url}/d")
    open_ranges = Store.open_ranges

    def waiting(self: Store, *arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name.startswith("footer"):
            together.wait(30)
        return open_ranges(self, *arguments, **options)

    monkeypatch.setattr(Store, "open_ranges", waiting)
    assert opened.sql(QUERY).equals(home.sql(QUERY)) and not together.broken
    sizes = {f"d/index/{path.name}": path.stat().st_size for path in (home.path / "index").iterdir()}
    ends = [path for path, first, count in served.sent if first + count == sizes.get(path)]
    assert sorted(ends) == sorted(sizes), "each once"


def test_a_footer_that_cannot_be_fetched_is_one_error_and_the_others_do_not_wait(
    home: kdata.Dataset, served: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def refused(self: Store, relative: str, **options: Any) -> Any:
        tried.append(threading.current_thread().name.partition("_")[0])
        raise StorageError("cannot read it")

    monkeypatch.setattr(url_dataset, "CONNECTIONS", 1)
    monkeypatch.setattr(Store, "open_ranges", refused)
    opened = kdata.open(f"{served.url}/d")
    with pytest.raises(KdataError, match="cannot read it"):
        opened.sql(QUERY)
    assert tried.count("footer") == 1, "the others are DuckDB's own"


def test_parts_of_one_place_are_not_taken_for_those_of_another(
    home: kdata.Dataset, served: Files, cache: Path, tmp_path: Path
) -> None:
    """A server may have any bytes under a manifest that it copied."""
    expected = home.sql(QUERY)
    shutil.copytree(home.path, tmp_path / "copied" / "d")
    for path in sorted((tmp_path / "copied" / "d" / "index").iterdir()):
        path.write_bytes(with_another_value(path, path.stat().st_size))
    copied = Files(tmp_path / "copied")
    try:
        assert kdata.open(f"{copied.url}/d").sql(QUERY)["nll"].to_pylist() != expected["nll"].to_pylist()
        assert kdata.open(f"{served.url}/d").sql(QUERY).equals(expected)
        assert kdata.open(f"{copied.url}/d").manifest == kdata.open(f"{served.url}/d").manifest
    finally:
        copied.close()


def test_a_place_is_host_folder_and_commit_without_the_user() -> None:
    places = ["http://a/d", "http://b/d", "http://a/e", "http://a/d?of=1", "file:///d"]
    assert len({place_of(Store(place)) for place in places}) == len(places)
    assert place_of(Store("http://someone-special@a/d/")) == place_of(Store("http://a/d"))
    at_commits = [Store("http://a/d") for _ in range(2)]
    at_commits[0].commit, at_commits[1].commit = "1" * 40, "2" * 40
    assert place_of(at_commits[0]) != place_of(at_commits[1])
    assert len({key_of("p", "1"), key_of("p", "2"), key_of("q", "1")}) == 3


def test_parts_of_a_file_go_when_all_of_it_is_fetched(home: kdata.Dataset, served: Files, cache: Path) -> None:
    path = next(iter(sorted((home.path / "index").iterdir())))
    right, expected = path.read_bytes(), home.sql(QUERY)
    try:
        path.write_bytes(with_another_value(path, len(right)))
        assert 99.0 in kdata.open(f"{served.url}/d").sql("select nll from rows")["nll"].to_pylist()
    finally:
        path.write_bytes(right)
    assert kdata.open(f"{served.url}/d", check="whole").sql(QUERY).equals(expected)
    assert not parts(cache)
    for copy in cache.glob("datasets/*/*/index/*"):
        copy.unlink()
    assert kdata.open(f"{served.url}/d").sql(QUERY).equals(expected)


def infos(number: int) -> dict[str, FileInfo]:
    return {f"{n}": FileInfo(bytes=1, sha256=f"{n:064x}") for n in range(number)}


@pytest.mark.parametrize("ends", ["well", "Ctrl-C", "error"])
def test_a_query_that_ends_leaves_no_footer_waiting(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(url_dataset, "CONNECTIONS", 2)
    fetched: list[str] = []
    begun, go = threading.Semaphore(0), threading.Event()

    def fetch(relative: str, info: FileInfo) -> bool:
        fetched.append(relative)
        begun.release()
        return go.wait(30)

    footers, wanted = Footers(fetch), infos(40)
    failure = {"well": None, "Ctrl-C": KeyboardInterrupt, "error": StorageError}[ends]
    with nullcontext() if failure is None else pytest.raises(failure), footers.query():
        for relative, info in wanted.items():
            footers.want(relative, info)
        for _ in range(2):
            assert begun.acquire(timeout=30)
        if failure is not None:
            raise failure
    go.set()
    footers.wait("3")  # was cancelled
    footers.want("39", wanted["39"])
    footers.wait("39")
    assert fetched == ["0", "1", "39"], "two were under way; the next query begins anew"


def test_footers_come_a_few_ahead_of_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody says that the query has ended, few are fetched in vain."""
    monkeypatch.setattr(url_dataset, "CONNECTIONS", 2)
    fetched: list[str] = []
    footers, wanted = Footers(lambda relative, info: fetched.append(relative) is None), infos(40)
    for relative, info in wanted.items():
        footers.want(relative, info)
    for number, relative in enumerate(wanted):
        footers.wait(relative)
        assert fetched[: number + 1] == list(wanted)[: number + 1] and len(fetched) <= number + 5
    footers.want("3", wanted["3"])
    footers.wait("3")
    assert len(fetched) == 40, "each once"


def test_a_forked_process_does_not_wait_for_footers_of_its_parent(
    home: kdata.Dataset, served: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, go, begun = kdata.open(f"{served.url}/d"), threading.Event(), threading.Event()
    files, entry = opened.sql_filesystem, opened.manifest[0]

    def fetch(relative: str, info: FileInfo) -> bool:
        begun.set()
        return go.wait(30)

    monkeypatch.setattr(files, "_fetch_footer", fetch)
    name = opened.sql_file(entry, "index")
    assert begun.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        monkeypatch.setattr(Store, "open_ranges", lambda *arguments, **options: "opened")  # its loop has no thread here
        os._exit(0 if files._open(name) == "opened" else 1)
    assert os.waitpid(child, 0)[1] == 0
    go.set()


def test_a_wrong_limit_is_refused_before_anything_is_asked(
    home: kdata.Dataset, served: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="KDATA_CACHE_LIMIT='much'"):
        kdata.open(f"{served.url}/d")
    assert not served.sent


def test_one_thread_makes_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, sweeps, together = Ranges(), [], threading.Barrier(8)

    def slowly(most: int) -> None:
        sweeps.append(most)
        time.sleep(0.1)

    def work(number: int) -> None:
        together.wait(30)
        kept.keep(f"{number:064x}", 0, b"content")

    monkeypatch.setattr(ranges, "_make_room", slowly)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sweeps) == 1 and len(parts(cache)) == 8


def test_small_parts_are_bounded_in_number_and_by_their_blocks(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "MOST_PARTS", 64)
    kept = Ranges()
    for number in range(200):
        kept.keep(f"{number:064x}", 0, b"x")
        assert len(parts(cache)) <= 64
    assert kept.read(f"{199:064x}", 0, 1) == b"x"
    monkeypatch.setattr(ranges, "MOST_PARTS", 10**6)
    monkeypatch.setenv("KDATA_CACHE_LIMIT", "1MB")
    kept = Ranges()
    for number in range(100):
        kept.keep(f"{number:064x}", 0, b"x")
        assert sum(path.stat().st_blocks * 512 for path in parts(cache)) <= 10**6 // SHARE


def test_folders_may_vanish_while_room_is_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, scandir = Ranges(), os.scandir
    for number in range(5):
        kept.keep(f"{number:064x}", 0, b"content")

    def late(path: Any) -> Any:
        if not isinstance(path, int) and Path(path).parent.name == "ranges":  # another process was faster
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", late)
    Ranges().keep("a" * 64, 0, b"content")
    monkeypatch.setattr(os, "scandir", scandir)
    assert [path.parent.name for path in parts(cache)] == ["a" * 64]


def test_what_is_no_file_is_passed_over_and_leaves_no_handle(cache: Path) -> None:
    kept, key = Ranges(), "a" * 64
    kept.keep(key, 10, b"content")
    os.mkfifo(cache / "ranges" / key / "0-100")
    (cache / "ranges" / key / "0-200").mkdir()
    handles = len(os.listdir("/proc/self/fd"))
    signal.alarm(60)  # a pipe would wait for ever
    try:
        for _ in range(5):
            assert kept.read(key, 10, 17) == b"content" and kept.read(key, 0, 50) is None
    finally:
        signal.alarm(0)
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_disk_that_is_read_only_is_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    kept = Ranges()
    kept.keep("a" * 64, 0, b"content")
    monkeypatch.setattr(ranges.os, "utime", refused)
    assert kept.read("a" * 64, 0, 7) == b"content"
