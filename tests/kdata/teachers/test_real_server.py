"""A real vLLM server on the loopback: it is read as the engine in this process is, and killed in the middle of a capture."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.check.verify import verify
from kdata.corpus.corpus import CorpusConfig
from kdata.errors import ConfigError
from kdata.format.keep import KeepConfig
from kdata.jobs.reading import CaptureConfig, capture
from kdata.teachers.base import Completion, Readout
from kdata.teachers.config import SamplingConfig, ServerConfig, StructuredOutput, TeacherConfig
from kdata.teachers.server import ServedTeacher
from tests.fakes import digests, rows_of_text, write_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ATOL = 1e-4  # nats, float32: the two engines differ by the order of summation only
TOP = KeepConfig(kind="topk", k=8)
SAMPLED, GREEDY = SamplingConfig(max_tokens=10), SamplingConfig(max_tokens=6, min_tokens=2, temperature=0, stop=["the"])
FORMED = SamplingConfig(max_tokens=12, structured_output=StructuredOutput(regex="[0-9]{3}"))
TOKEN = "sesame-4711"
WELL = ("--max-logprobs", "9", "--enable-scale-out", "--served-model-name", "tiny", "--api-key", TOKEN)
# Without chunks of a prompt a row does not depend on the rows that are read with it: bytes are the same again.
SAME = ("--no-enable-chunked-prefill", "--no-enable-prefix-caching")


class RealServer:
    """`vllm serve`, as it is started where the command itself is missing."""

    def __init__(self, model: Path) -> None:
        self._model = model
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it and return once it is up."""
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self._model), "--port"]
        command += [str(self.port), "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", *options]
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2400):
            assert self._process.poll() is None, "the server ended while it started"
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def stop(self, how: signal.Signals) -> None:
        """Send the signal, and wait for the end: of the whole process group where it is SIGKILL."""
        if self._process is not None:
            if how == signal.SIGKILL:
                os.killpg(self._process.pid, how)
            else:
                self._process.send_signal(how)
            self._process.wait(60)


@pytest.fixture(scope="module")
def server(llama_dir: Path) -> Iterator[RealServer]:
    """Up, and down at the end."""
    served = RealServer(llama_dir)
    try:
        served.start(*WELL, *SAME)
        yield served
    finally:
        served.stop(signal.SIGKILL)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDATA_TEST_TOKEN", TOKEN)


def config(model: Path, server: RealServer) -> TeacherConfig:
    where = ServerConfig(endpoints=[server.url], auth_env="KDATA_TEST_TOKEN")
    return TeacherConfig(model=str(model), backend="vllm-server", server=where)


def ask(teacher: Any, sequences: list[np.ndarray]) -> dict[str, list[Any]]:
    """All that both are asked."""
    prompts, seeds = [ids[:5] for ids in sequences], list(range(len(sequences)))
    return {
        "read": teacher.read(sequences, TOP),
        "sampled": teacher.write(prompts, TOP, SAMPLED, seeds),
        "greedy": teacher.write(prompts, TOP, GREEDY, seeds),
        "formed": teacher.write(prompts, TOP, FORMED, seeds),
    }


def ask_engine(model: str, sequences: list[np.ndarray]) -> tuple[int, str, dict[str, list[Any]]]:
    """In a process of its own, because an engine keeps memory and threads."""
    from kdata.teachers.vllm import VllmTeacher

    teacher = VllmTeacher(TeacherConfig(model=model), max_k=TOP.k)
    answers = ask(teacher, sequences)
    teacher.close()
    return teacher.context, teacher.info.backend_version, answers


def assert_same(ours: Readout | Completion, theirs: Readout | Completion) -> None:
    if isinstance(ours, Completion) and isinstance(theirs, Completion):
        assert (ours.num_prompt_tokens, ours.finish_reason) == (theirs.num_prompt_tokens, theirs.finish_reason)
        return assert_same(ours.readout, theirs.readout)
    assert isinstance(ours, Readout) and isinstance(theirs, Readout)
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    np.testing.assert_array_equal(ours.kept.num_kept, theirs.kept.num_kept)
    np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=ATOL)
    np.testing.assert_allclose(ours.log_tail, theirs.log_tail, atol=ATOL)
    np.testing.assert_allclose(ours.kept.logprobs, theirs.kept.logprobs, atol=ATOL)
    # Two that are as probable to 1e-4 may change places.
    assert (ours.rank == theirs.rank).mean() > 0.98 and (ours.kept.ids == theirs.kept.ids).mean() > 0.98


def test_a_server_agrees_with_the_engine_in_this_process(llama_dir: Path, server: RealServer) -> None:
    rng = np.random.default_rng(0)
    sequences = [np.append(0, rng.integers(2, 300, size)).astype(np.int32) for size in (5, 40, 17, 90, 2, 126, 127)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        context, version, engine = pool.submit(ask_engine, str(llama_dir), sequences).result(timeout=300)
    teacher = ServedTeacher(config(llama_dir, server), max_k=TOP.k)
    try:
        assert (teacher.context, teacher.info.backend_version, teacher._served.model) == (context, version, "tiny")
        assert teacher._served.generates
        one_pass = ask(teacher, sequences)
        # The other way into the same server.
        teacher._first = dataclasses.replace(teacher._served, generates=False)
        two_passes = ask(teacher, sequences[:-1])  # it has no place for the whole context
    finally:
        teacher.close()
    for name, theirs in engine.items():
        for ours, other in zip(one_pass[name], theirs, strict=True):
            assert_same(ours, other)
        for again, other in zip(two_passes[name], theirs, strict=False):
            assert_same(again, other)
    assert {c.finish_reason for name in ("sampled", "greedy", "formed") for c in engine[name]} == {"stop", "length"}


def run(root: Path, llama_dir: Path, server: RealServer, corpus: Path) -> None:
    settings = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="topk", k=8, unit_tokens=300)
    capture(root, settings, config(llama_dir, server))


class Capture(threading.Thread):
    """A capture under way; `error` is what ended it."""

    def __init__(self, root: Path, *arguments: Any) -> None:
        super().__init__()
        self._root, self._arguments, self.error = root, arguments, None
        self.start()

    def run(self) -> None:
        try:
            run(self._root, *self._arguments)
        except kdata.errors.KdataError as error:
            self.error = error

    def wait_for_shards(self, number: int) -> None:
        """Return when so many are committed."""
        manifest = self._root / "manifest.jsonl"
        while not (manifest.exists() and manifest.read_bytes().count(b"\n") >= number):
            assert self.is_alive(), self.error
            time.sleep(0.002)


@pytest.mark.slow
def test_a_server_that_is_killed_and_restarted_loses_and_repeats_nothing(
    llama_dir: Path, server: RealServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(400))
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, llama_dir, server, corpus)
    work = Capture(root, llama_dir, server, corpus)
    work.wait_for_shards(3)
    server.stop(signal.SIGKILL)
    assert work.is_alive(), "it was done before the server could be killed: give it more rows"
    server.start(*WELL, *SAME)
    work.join(300)
    assert work.error is None and "ready again" in caplog.text
    assert verify(kdata.open(root), deep=True) == []
    assert digests(root) == digests(undisturbed)
    ids = kdata.open(root).index(["id"])["id"].to_pylist()
    assert sorted(ids) == sorted(f"doc-{n:03}" for n in range(400))


@pytest.mark.slow
def test_a_server_that_comes_back_with_another_model_is_refused_and_commits_stay(
    llama_dir: Path, server: RealServer, tmp_path: Path
) -> None:
    """SIGTERM: vLLM closes its port and never answers what is under way. What comes back has processed log-probabilities."""
    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(400))
    root = tmp_path / "stopped"
    work = Capture(root, llama_dir, server, corpus)
    work.wait_for_shards(3)
    server.stop(signal.SIGTERM)
    server.start(*WELL, *SAME, "--logprobs-mode", "processed_logprobs")
    work.join(300)
    assert isinstance(work.error, ConfigError) and "--logprobs-mode raw_logprobs" in str(work.error)
    dataset = kdata.open(root)
    assert len(dataset.manifest) >= 3 and verify(dataset, deep=True) == []
    with pytest.raises(ConfigError, match=r"max allowed: 9 .*; start the server with --max-logprobs 64"):
        ServedTeacher(config(llama_dir, server), max_k=64)
