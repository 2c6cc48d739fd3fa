"""Push to the Hub with its real client, against a stand-in for the Hub over HTTP (`tests.hub_server`), and to URLs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import huggingface_hub.file_download as download
import huggingface_hub.utils._http as http
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, KdataError, MissingError, StorageError
from kdata.selection.ranked import All
from kdata.selection.score_file import bring
from kdata.selection.select import select
from kdata.share import hub_push
from kdata.share.arrange import head
from kdata.share.fitness import About
from kdata.share.follow import push_while_written
from kdata.share.publication import publication
from kdata.share.push import dataset_files, push
from kdata.share.url_push import push_to_url
from kdata.store.url import Store
from tests.fakes import digests, rows_of_text, write_jsonl
from tests.hub_server import HubServer

ADDRESS = "hf://me/logits"
PAGES = {"README.md", "audit.json", "croissant.json"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty server that this process asks."""
    server = HubServer()
    server.in_process(monkeypatch, tmp_path / "cache")
    yield server
    server.close()


def newest(hub: HubServer) -> Path:
    """The files of the newest commit."""
    return hub.commits[hub.refs["main"]]


def test_a_repository_is_the_dataset_with_its_pages(hub: HubServer, copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    before = digests(copied)
    address = push(kdata.open(copied), ADDRESS)
    assert address.endswith("/datasets/me/logits")
    assert digests(copied) == before, "the dataset itself is only read"
    pushed = digests(newest(hub))
    assert set(pushed) == {*dataset_files(kdata.open(copied)), *PAGES, ".gitattributes"}
    assert all(pushed[name] == before[name] for name in set(pushed) & set(before))
    about = About(url="https://huggingface.co/datasets/me/logits")
    assert (newest(hub) / "README.md").read_bytes() == publication(kdata.open(copied), about)["README.md"]
    assert json.loads((newest(hub) / "croissant.json").read_bytes())["url"] == about.url
    assert kdata.open(newest(hub)).content_digest == kdata.open(copied).content_digest


def test_only_what_is_new_is_sent(hub: HubServer, copied: Path) -> None:
    hub.page = 4  # the list of what is there comes in several answers
    push(kdata.open(copied), ADDRESS)
    commit, first = hub.refs["main"], sum(count for _, count in hub.received)
    hub.received.clear()
    push(kdata.open(copied), ADDRESS)
    assert hub.refs["main"] == commit and not hub.received, "nothing changed: no commit"
    select(kdata.open(copied), All())
    push(kdata.open(copied), ADDRESS)
    assert hub.refs["main"] != commit
    assert 0 < sum(count for _, count in hub.received) < first / 3
    assert {path for path in digests(newest(hub)) if path.startswith("plans/")} == {
        "plans/all.json",
        "plans/all.parquet",
    }


def test_a_smaller_dataset_takes_the_place_of_the_former_one(hub: HubServer, copied: Path, tmp_path: Path) -> None:
    push(kdata.open(copied), ADDRESS)
    for name in ("LICENSE", "pictures/index/cat.png"):
        (newest(hub) / name).parent.mkdir(parents=True, exist_ok=True)
        (newest(hub) / name).write_text("mine")
    small = head(kdata.open(copied), tmp_path / "small", 3)
    push(small, ADDRESS)
    own = {"LICENSE", "pictures/index/cat.png", ".gitattributes"}
    assert set(digests(newest(hub))) == {*dataset_files(small), *PAGES, *own}
    clone = kdata.open(newest(hub))
    assert clone.content_digest == small.content_digest and clone.num_rows == 3
    assert len(kdata.open(hub.commits[f"{2:040x}"])) == 25, "the commit before stays as it was"


def test_nothing_is_deleted_in_a_repository_that_holds_something_else(
    hub: HubServer, captured: Path, tmp_path: Path
) -> None:
    own = {"data/train-0.parquet", "index/page.html"}
    for name in own:
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("x")
    hub.push(tmp_path / "other", "a" * 40, "main")
    push(kdata.open(captured), ADDRESS)
    assert own <= set(digests(newest(hub)))


def test_a_tag_is_a_version_that_stays(hub: HubServer, copied: Path, tmp_path: Path) -> None:
    push(kdata.open(copied), ADDRESS, tag="v1")
    assert hub.refs["v1"] == hub.refs["main"]
    push(kdata.open(copied), ADDRESS, tag="v1")
    push(kdata.open(copied), ADDRESS, tag="same")
    assert hub.refs["v1"] == hub.refs["same"] == hub.refs["main"]
    hub.received.clear()
    small = head(kdata.open(copied), tmp_path / "small", 3)
    with pytest.raises(ConfigError, match=r"the tag v1 of me/logits stands for commit 0{8}, which is another state"):
        push(small, ADDRESS, tag="v1")
    assert not hub.received and hub.refs["v1"] == hub.refs["main"]
    push(small, ADDRESS, tag="v2")
    assert hub.refs["v2"] == hub.refs["main"] != hub.refs["v1"]
    with pytest.raises(ConfigError, match=r"the tag v1 of me/logits stands for commit"):
        push(small, ADDRESS, tag="v1")
    huggingface_hub.HfApi().delete_tag("me/logits", tag="v2", repo_type="dataset")
    with pytest.raises(MissingError, match="the Hub has no such revision"):
        kdata.open(f"{ADDRESS}@v2")
    push(small, ADDRESS, tag="v2")
    assert hub.refs["v2"] == hub.refs["main"], "a name that was given back"
    for wrong in ("", "-x", "a..b", "v1.lock", "a b", "../x", "x" * 65):
        with pytest.raises(ConfigError, match="a tag has up to 64 letters"):
            push(small, ADDRESS, tag=wrong)
    with pytest.raises(ConfigError, match="--tag names a version on the Hub"):
        push(small, str(tmp_path / "copy"), tag="v1")


def test_a_broken_connection_publishes_nothing_and_the_same_command_sends_the_rest(
    hub: HubServer, captured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
    monkeypatch.setattr(hub_push, "GROUP_FILES", 3)
    hub.breaks_after = 4
    with pytest.raises(StorageError, match=r"the Hub refused me/logits: .*what was sent is not sent again"):
        push(kdata.open(captured), ADDRESS)
    assert set(digests(newest(hub))) == {".gitattributes"} and len(hub.received) == 4, "a group, and one of the next"
    tried = [path for method, path in hub.asked if method == "PUT"]
    assert len(tried) == 4 + 2 * 6, "six times each of the other two of that group, and none of a later one"
    hub.breaks_after = None
    push(kdata.open(captured), ADDRESS)
    digests_sent = [name for name, _ in hub.received if len(name) == 64]
    assert len(digests_sent) == len(set(digests_sent)) and kdata.open(newest(hub)).num_rows == 25
    assert len(hub.commits) == 2, "the empty one and that of the dataset"


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the client try again at once; for how long it would have waited each time."""
    waits: list[float] = []
    monkeypatch.setattr(http, "time", SimpleNamespace(**vars(time) | {"sleep": waits.append}))
    return waits


def test_a_large_file_goes_up_in_parts(hub: HubServer, captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the way `multipart` of LFS, which the client takes where the Hub says so; a break in the middle of a file."""
    hub.chunk_bytes, hub.breaks_after = 2000, 5
    without_waiting(monkeypatch)
    with pytest.raises(StorageError, match=r"the Hub refused me/logits: .*what was sent is not sent again") as raised:
        push(kdata.open(captured), ADDRESS)
    assert "\n" not in str(raised.value) and set(digests(newest(hub))) == {".gitattributes"}
    assert hub.transfers[0] == ["basic", "multipart"]
    hub.breaks_after = None
    push(kdata.open(captured), ADDRESS)
    parts = [size for path, size in hub.received if path.startswith("/parts/")]
    assert len(parts) > 10 and max(parts) == 2000
    assert (
        not verify(kdata.open(newest(hub)))
        and kdata.open(newest(hub)).content_digest == kdata.open(captured).content_digest
    )


@pytest.mark.parametrize(
    "part", ["/create", "/api/datasets/me/logits", "/tree/", "/preupload", "/batch", "/objects/", "/commit"]
)
def test_a_push_waits_as_long_as_the_hub_says(
    hub: HubServer, captured: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Too many questions (429): the client waits where it tries again at all. Otherwise the same command goes on."""
    waits, hub.limited = without_waiting(monkeypatch), {part: 2}
    for _ in range(3):
        try:
            push(kdata.open(captured), ADDRESS)
            break
        except StorageError as error:
            assert "\n" not in str(error) and "the Hub refused me/logits: TooMany" in str(error)
            assert "wait some minutes, then run the same command" in str(error)
    assert hub.limited[part] == 0 and kdata.open(newest(hub)).content_digest == kdata.open(captured).content_digest
    assert set(waits) <= {31.0}, "Retry-After, and a second"
    assert len(hub.commits) == 2


def test_a_limit_that_stays_is_one_line(hub: HubServer, captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, hub.limited = without_waiting(monkeypatch), {"/objects/": 1000}
    with pytest.raises(StorageError, match=r"the Hub refused me/logits: .*wait") as raised:
        push(kdata.open(captured), ADDRESS)
    assert "\n" not in str(raised.value) and waits and set(waits) == {31.0}
    assert set(digests(newest(hub))) == {".gitattributes"}


def test_reading_waits_as_long_as_the_hub_says(
    hub: HubServer, captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(kdata.open(captured), ADDRESS)
    waits, home = without_waiting(monkeypatch), kdata.open(captured)
    monkeypatch.setattr(download, "time", http.time, raising=False)
    query = "select domain, count(*) as n from rows group by 1 order by 1"
    for part in ("/api/datasets/me/logits", "/tree/", "/dataset.json", "/index/", "/data/"):
        monkeypatch.setenv("KDATA_CACHE", str(tmp_path / part.strip("/").replace("/", "-")))
        huggingface_hub.HfFileSystem.clear_instance_cache()
        for limit in (2, 1000):
            hub.limited = {part: limit}
            for _ in range(3):
                try:
                    opened = kdata.open(ADDRESS)
                    assert opened.sql(query).equals(home.sql(query)) and opened[3].id == home[3].id
                    break
                except KdataError as error:
                    assert "\n" not in str(error).strip(), part
                    assert "wait some minutes, then run the same command" in str(error)
                    if limit == 1000:
                        hub.limited = {}
            else:
                raise AssertionError(f"{part}: it does not go on")
    assert 31.0 in waits


def test_a_commit_of_somebody_else_is_not_overwritten(hub: HubServer, captured: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/theirs.txt").write_text("theirs")
    hub.meanwhile = lambda: hub.push(tmp_path / "theirs", "b" * 40, "main")
    with pytest.raises(StorageError, match="somebody else pushed to me/logits meanwhile"):
        push(kdata.open(captured), ADDRESS)
    assert digests(newest(hub)).keys() == {"theirs.txt"}
    hub.meanwhile = lambda: None
    push(kdata.open(captured), ADDRESS)
    assert kdata.open(newest(hub)).num_rows == 25 and (newest(hub) / "theirs.txt").exists()


@pytest.mark.parametrize(
    ("token", "address", "message"),
    [
        ("hf_" + "r" * 34, ADDRESS, r"does not let this token write to me/logits \(401\)"),
        (None, "hf://you/logits", r"does not let this token write to you/logits \(403\)"),
        ("", ADDRESS, "the Hub needs a token: set HF_TOKEN"),
        (None, "hf://me/a--b", "the Hub takes no such name: .*a--b"),
        (None, "hf://me/logits.git", "the Hub takes no such name: .*logits.git"),
    ],
)
def test_who_may_not_write_is_told_so(
    hub: HubServer, captured: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, address: str, message: str
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises((StorageError, ConfigError), match=message):
        push(kdata.open(captured), address)
    assert not hub.commits


@pytest.mark.parametrize(("token", "address"), [("", ADDRESS), (None, "hf://me/a--b")])
def test_what_needs_no_answer_is_refused_before_the_dataset_is_read(
    hub: HubServer, copied: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, address: str
) -> None:
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    dataset = kdata.open(copied)
    (copied / "index/capture-00001.parquet").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"needs a token|takes no such name"):
        push(dataset, address)


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        ("/create", "Bad", "the Hub refused me/logits: Bad; check HF_TOKEN"),
        ("/create", "Failed", "the Hub refused me/logits: Failed; check HF_TOKEN"),
        ("/preupload", "RepoNotFound", "the Hub refused me/logits: RepoNotFound; check HF_TOKEN"),
        ("/batch", "Forbidden", r"the Hub does not let this token write to me/logits \(403\)"),
        ("/commit", "Bad", "the Hub refused me/logits: Bad; check HF_TOKEN"),
        ("", "", "the Hub refused me/logits: LFS batch API returned errors: .*no storage left see the page of prices"),
    ],
)
def test_a_refusal_at_any_step_is_one_line_and_publishes_nothing(
    hub: HubServer, captured: Path, part: str, error: str, message: str
) -> None:
    hub.refuses, hub.is_full = ({part: error}, False) if part else ({}, True)
    with pytest.raises(StorageError, match=message) as raised:
        push(kdata.open(captured), ADDRESS, tag="v1")
    assert "\n" not in str(raised.value)
    assert not hub.commits or set(digests(newest(hub))) == {".gitattributes"}
    assert "v1" not in hub.refs


# A capture that waits after each shard.
CAPTURE = """
import sys, time
from pathlib import Path
from kdata.store.writer import Writer
from tests.fakes import run_capture
accept = Writer.accept
def slow(self, shard):
    result = accept(self, shard)
    time.sleep(float(sys.argv[4]))
    return result
Writer.accept = slow
run_capture(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), kind="topk", k=4, unit_tokens=200)
"""


def capture_slowly(out: Path, tokenizer_dir: Path, *, pause_sec: float = 0.7) -> subprocess.Popen[bytes]:
    """A capture in a process of its own, which has begun."""
    corpus = write_jsonl(out.with_suffix(".jsonl"), rows_of_text(40, words=20))
    process = subprocess.Popen(
        [sys.executable, "-c", CAPTURE, str(out), str(corpus), str(tokenizer_dir), str(pause_sec)]
    )
    while not (out / "dataset.json").exists() and process.poll() is None:
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("place", [ADDRESS, "memory://kdata-while/d"])
def test_each_state_that_is_pushed_while_a_capture_runs_is_whole(
    hub: HubServer, tmp_path: Path, tokenizer_dir: Path, place: str
) -> None:
    process = capture_slowly(tmp_path / "d", tokenizer_dir)
    rows: list[int] = []

    def sent(state: kdata.Dataset) -> None:
        rows.append(len(kdata.open(newest(hub) if place == ADDRESS else place)))
        assert rows[-1] == len(state)

    push_while_written(tmp_path / "d", place, every_sec=0.1, sent=sent)
    assert process.wait() == 0
    whole = kdata.open(tmp_path / "d")
    assert len(rows) > 1 and rows == sorted(set(rows)) and rows[0] < len(whole), rows
    assert kdata.open(newest(hub) if place == ADDRESS else place).content_digest == whole.content_digest
    for commit in [folder for folder in hub.commits.values() if (folder / "dataset.json").exists()]:
        assert [problem for problem in verify(kdata.open(commit), deep=True) if not problem.stray] == []


# `kdata push` as it is called.
PUSH = "from kdata.pipelines.cli.main import main; main()"


def push_while(hub: HubServer, dataset: Path, *options: str) -> subprocess.Popen[bytes]:
    """`kdata push --while` in a process of its own."""
    command = [sys.executable, "-c", PUSH, "push", str(dataset), ADDRESS, "--while", "--every", "0.1", *options]
    environment = {**hub.environment(dataset.parent / "cache"), "HF_TOKEN": hub.token}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_push_that_was_killed_goes_on_by_the_same_command(
    hub: HubServer, tmp_path: Path, tokenizer_dir: Path, kill_at: int
) -> None:
    """It is killed when all files of a commit went up, and never hears of the commit that it asked for."""
    capture = capture_slowly(tmp_path / "d", tokenizer_dir, pause_sec=3)  # a busy machine begins `kdata` in ten seconds
    commits, pushes = list[str](), [push_while(hub, tmp_path / "d")]

    def kill() -> None:
        commits.append(hub.refs["main"])
        if len(commits) == kill_at:
            pushes[0].kill()

    hub.meanwhile = kill
    pushes[0].wait(120)
    assert len(commits) == kill_at, pushes[0].communicate()
    between = kdata.open(newest(hub))
    assert verify(between, deep=True) == [] and 0 < len(between) < 40
    pushes.append(push_while(hub, tmp_path / "d", "--tag", "v1"))
    output, _ = pushes[1].communicate(timeout=120)
    assert (capture.wait(), pushes[1].returncode) == (0, 0), output
    assert kdata.open(newest(hub)).content_digest == kdata.open(tmp_path / "d").content_digest
    assert hub.refs["v1"] == hub.refs["main"]
    sent = [name for name, _ in hub.received if len(name) == 64]
    assert len(sent) == len(set(sent)), "no large file went up twice"


@pytest.mark.slow
def test_a_tag_of_another_version_is_refused_before_a_capture_that_runs_is_sent(
    hub: HubServer, captured: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    push(kdata.open(captured), ADDRESS, tag="v1")
    commit = hub.refs["main"]
    hub.received.clear()
    capture = capture_slowly(tmp_path / "d", tokenizer_dir)
    with pytest.raises(ConfigError, match="the tag v1 of me/logits stands for commit"):
        push_while_written(tmp_path / "d", ADDRESS, every_sec=0.1, tag="v1")
    assert capture.poll() is None, "it was refused while the capture ran"
    assert not hub.received and hub.refs["main"] == commit
    capture.kill()
    capture.wait()


def test_a_reader_of_a_url_sees_a_whole_dataset_at_every_moment(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, dataset = "memory://kdata-push/d", kdata.open(copied)
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kdata.share.push.push_to_url", partial(push_to_url, lines=2))
    sent, rows = list[str](), list[int]()
    replace = Store.replace

    def watched(self: Store, source: Path, relative: str) -> None:
        replace(self, source, relative)
        sent.append(relative)
        if Store(url).read("dataset.json") is not None:
            opened = kdata.open(url)
            opened.fetch()
            rows.append(len(opened))
            assert verify(opened, deep=True) == []

    monkeypatch.setattr(Store, "replace", watched)
    assert push(dataset, url) == url
    assert len(set(rows)) > 2 and rows == sorted(rows) and rows[0] == 0 and rows[-1] == 25
    assert sent.count("manifest.jsonl") == -(-len(dataset.manifest) // 2) and sent[-1] == "dataset.json"
    assert digests_at(url).keys() == {*dataset_files(dataset), *PAGES}
    assert {name: digests_at(url)[name] for name in digests(copied)} == digests(copied)
    sent.clear()
    push(kdata.open(copied), url)
    assert sent == []
    select(kdata.open(copied), All())
    push(kdata.open(copied), url)
    assert "plans/all.json" in sent and not [path for path in sent if path.startswith(("data/", "index/", "manifest"))]
    (copied / "plans/all.json").unlink()
    (copied / "plans/all.parquet").unlink()
    push(kdata.open(copied), url)
    assert digests_at(url).keys() == {*dataset_files(dataset), *PAGES}
    before = digests_at(url)
    with pytest.raises(ConfigError, match=r"holds other rows \(shard capture-\d+\), which cannot be replaced"):
        push(head(kdata.open(copied), tmp_path / "part", 3), url)
    assert digests_at(url) == before


def test_scores_at_a_url_are_compared_by_the_digests_beside_them(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, dataset = "memory://kdata-compared/d", kdata.open(copied)
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    numbers = pa.table({"id": dataset.index(["id"])["id"], "mark": np.arange(len(dataset), dtype=np.float64)})
    pq.write_table(numbers, tmp_path / "marks.parquet")
    bring(dataset, tmp_path / "marks.parquet", "mine")
    push(dataset, url)
    parts = {path for path in dataset_files(dataset) if path.startswith("scores/mine/")}
    read, sent = list[str](), list[str]()
    store_read, replace = Store.read, Store.replace
    monkeypatch.setattr(Store, "read", lambda self, path: read.append(path) or store_read(self, path))
    monkeypatch.setattr(Store, "replace", lambda self, source, path: sent.append(path) or replace(self, source, path))
    push(kdata.open(copied), url)
    assert parts and not parts & set(read) and sent == [] and "scores/mine.json" in read

    # Other values of the same size: the JSON goes first, so that it never names another file than the one that is there.
    shutil.rmtree(copied / "scores")
    pq.write_table(numbers.set_column(1, "mark", pc.negate(numbers["mark"])), tmp_path / "marks.parquet")
    bring(kdata.open(copied), tmp_path / "marks.parquet", "mine")

    def broken(self: Store, source: Path, relative: str) -> None:
        if relative == "scores/mine.json":
            raise StorageError("broken")
        replace(self, source, relative)

    monkeypatch.setattr(Store, "replace", broken)
    with pytest.raises(StorageError, match="broken"):
        push(kdata.open(copied), url)
    assert "scores/mine.json" not in digests_at(url)
    monkeypatch.setattr(Store, "replace", replace)
    push(kdata.open(copied), url)
    assert {path: digest for path, digest in digests_at(url).items() if path not in PAGES} == digests(copied)


def digests_at(url: str) -> dict[str, str]:
    """SHA-256 of each file at a URL."""
    store = Store(url)
    return {name: hashlib.sha256(store.read(name) or b"").hexdigest() for name in store.files()}


def test_a_push_to_a_url_that_broke_off_goes_on(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, dataset = "memory://kdata-broken/d", kdata.open(copied)
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kdata.share.push.push_to_url", partial(push_to_url, lines=1))
    replace, sent = Store.replace, list[str]()

    def broken(self: Store, source: Path, relative: str) -> None:
        sent.append(relative)
        if len(sent) == 10:
            raise StorageError("broken")
        replace(self, source, relative)

    monkeypatch.setattr(Store, "replace", broken)
    with pytest.raises(StorageError, match="broken"):
        push(dataset, url)
    assert 0 < len(kdata.open(url)) < 25
    push(dataset, url)
    shards = [path for path in sent if path.startswith("data/")]
    assert len(shards) <= len(set(shards)) + 1 and digests_at(url).keys() == {*dataset_files(dataset), *PAGES}
    assert kdata.open(url).content_digest == dataset.content_digest


def test_a_url_that_holds_something_else_is_left_alone(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("cat")
    with pytest.raises(ConfigError, match=r"is not a dataset and holds other things \('cat.png'\)"):
        push(kdata.open(captured), f"file://{tmp_path}/photos")
    assert digests(tmp_path / "photos").keys() == {"cat.png"}
    with pytest.raises(ConfigError, match="a web server is only read"):
        push(kdata.open(captured), "https://127.0.0.1:9/d")
