"""Shared fixtures: a trained tokenizer, a tiny Llama, a small corpus and a dataset that nobody changes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.web import Files

ROOT = Path(__file__).resolve().parent.parent
# The packages first: tests/kdata would otherwise be found where the tests' folder is on the path.
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors on shared cores: threads only wait for each other
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # threads that spin while they wait take the cores of the other worker

settings.register_profile(
    "kdata", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kdata")


# Modules that start engines or clusters. They begin first, one after the other on one worker: two vLLM engines at once only
# take each other's cores, and two Ray clusters share files.
ENGINES = ("test_ray.py", "test_vllm.py", "test_real_server.py", "test_tape.py")


class ByModule(LoadScopeScheduling):
    """Gives all tests of a module to one worker, since they share its fixtures, and all engines to one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "engines" if path.rpartition("/")[2] in ENGINES else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByModule:
    """Called by pytest-xdist where there are several workers."""
    return ByModule(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first, as they take longest. Stable: the rest stays in its order."""
    items.sort(key=lambda item: item.path.name not in ENGINES)


@pytest.fixture(scope="session", autouse=True)
def _no_power_is_cut_here() -> Iterator[None]:
    """Flushing takes a third of the time, and only a power cut could tell; test_resume injects faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 300 ids that puts <s> before every text."""
    from tests.fakes import save_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a ChatML template."""
    from tests.fakes import CHATML, save_tokenizer

    folder = tmp_path_factory.mktemp("chatty")
    save_tokenizer(folder, chat_template=CHATML)
    return folder


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with that tokenizer."""
    from tests.fakes import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of text in two domains, one of them empty and one longer than the stand-in's context."""
    from tests.fakes import rows_of_text, write_jsonl

    rows = rows_of_text(24)
    rows[5]["text"] = "  "
    rows[9]["text"] = "the dog sat on the log 🙂 " * 12
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="session")
def captured_once(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> Path:
    """A captured dataset, made once for all modules."""
    from tests.fakes import run_capture

    return run_capture(tmp_path_factory.mktemp("captured") / "dataset", corpus_file, tokenizer_dir).path


@pytest.fixture(scope="module")
def captured(captured_once: Path) -> Iterator[Path]:
    """A captured dataset. Read only: a test that changes it takes `copied`."""
    from tests.fakes import digests

    before = digests(captured_once)
    yield captured_once
    assert digests(captured_once) == before, "a test of this module changed the dataset that all modules share"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], Files]]:
    """Puts folders at URLs until the test ends; the cache is empty."""
    from tests.web import Files

    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    with ExitStack() as servers:

        def at_url(folder: Path) -> Files:
            files = Files(folder)
            servers.callback(files.close)
            return files

        yield at_url


@pytest.fixture
def copied(captured: Path, tmp_path: Path) -> Path:
    """A copy of the captured dataset that a test may damage."""
    return Path(shutil.copytree(captured, tmp_path / "dataset"))


@pytest.fixture
def older(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> Path:
    """A dataset with version 1 of its codec, that a test may damage."""
    from tests.fakes import codec_version, run_capture

    with codec_version(1):
        return run_capture(tmp_path / "older", corpus_file, tokenizer_dir).path


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as a JSONL file and return its path."""
    from tests.fakes import write_jsonl

    return lambda rows, name="rows.jsonl": write_jsonl(tmp_path / name, rows)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own answer to SIGINT: a process that was started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
