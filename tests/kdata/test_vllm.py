"""The real vLLM: it reads what the plain forward pass reads, and survives SIGKILL to the byte."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.keep import KeepConfig
from kdata.teachers import TeacherConfig
from kdata.verify import verify
from tests.fakes import digests, rows_of_text, write_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]

HYBRID = KeepConfig(kind="hybrid", k=4, draws=6, temperatures=[2.0])


def ask(sequences: list[np.ndarray], path: str) -> dict[str, Any]:
    """All that is asked of one teacher: run in a process of its own, because an engine keeps memory and threads."""
    from kdata.errors import TeacherError
    from kdata.teachers import SamplingConfig
    from kdata.teachers.vllm import VllmTeacher

    teacher = VllmTeacher(TeacherConfig(model=path), max_k=8)
    keep, sampling = KeepConfig(kind="topk", k=8), SamplingConfig(max_tokens=10)
    prompts = [ids[:5] for ids in sequences]
    written = teacher.write(prompts, keep, sampling, list(range(len(prompts))))
    answers: dict[str, Any] = {
        "info": teacher.info,
        "context": teacher.context,
        "read": teacher.read(sequences, keep),
        "again": teacher.read(sequences[::-1], keep)[::-1],
        "written": written,
        "rewritten": teacher.write(prompts, keep, sampling, list(range(len(prompts)))),
        "reread": teacher.read([c.readout.token_ids for c in written], keep),
        "hybrid": teacher.read(sequences, HYBRID),
        "hybrid_again": teacher.read(sequences[::-1], HYBRID)[::-1],
        "hybrid_written": teacher.write(prompts, HYBRID, sampling, list(range(len(prompts)))),
    }
    teacher._agreed = False
    teacher._head = dataclasses.replace(teacher._head, scale=1.1)
    try:
        teacher.read(sequences, HYBRID)
    except TeacherError as error:
        answers["wrong_head"] = str(error)
    teacher.close()
    return answers


def test_vllm_reads_and_writes_what_the_plain_forward_pass_does(llama_dir: Path, tmp_path: Path) -> None:
    from kdata.teachers.transformers import TransformersTeacher

    rng = np.random.default_rng(0)
    sequences = [
        np.concatenate([[0], rng.integers(2, 300, size)]).astype(np.int32) for size in (5, 40, 17, 90, 126 - 1)
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(ask, sequences, str(llama_dir)).result(timeout=300)
    oracle = TransformersTeacher(TeacherConfig(model=str(llama_dir), backend="transformers"))
    plain = oracle.read(sequences, KeepConfig(kind="topk", k=8))
    assert answers["context"] == 127 and answers["info"].backend == "vllm"
    for ours, theirs, again in zip(
        answers["hybrid"], oracle.read(sequences, HYBRID), answers["hybrid_again"], strict=True
    ):
        for name in ("logprob", "log_tail", "entropy", "log_z"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
        np.testing.assert_array_equal(ours.rank, theirs.rank)
        np.testing.assert_array_equal(ours.kept.num_exact, theirs.kept.num_exact)
        np.testing.assert_array_equal(ours.kept.ids, again.kept.ids)
        np.testing.assert_array_equal(ours.kept.logprobs, again.kept.logprobs)
    for top, both in zip(answers["written"], answers["hybrid_written"], strict=True):
        np.testing.assert_array_equal(top.readout.token_ids, both.readout.token_ids)
        np.testing.assert_allclose(top.readout.logprob, both.readout.logprob, atol=1e-4)
    assert "disagree" in answers["wrong_head"]
    for ours, theirs, again in zip(answers["read"], plain, answers["again"], strict=True):
        np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
        np.testing.assert_array_equal(ours.kept.num_kept, theirs.kept.num_kept)
        np.testing.assert_allclose(ours.kept.logprobs, theirs.kept.logprobs, atol=1e-4)
        # Two that are as probable to 1e-4 may change places.
        assert (ours.rank == theirs.rank).mean() > 0.98 and (ours.kept.ids == theirs.kept.ids).mean() > 0.98
        np.testing.assert_allclose(ours.log_tail, theirs.log_tail, atol=1e-4)
        if answers["info"].deterministic:
            np.testing.assert_array_equal(ours.logprob, again.logprob)
            np.testing.assert_array_equal(ours.kept.logprobs, again.kept.logprobs)
    for written, rewritten, read in zip(answers["written"], answers["rewritten"], answers["reread"], strict=True):
        own = written.readout
        assert written.num_prompt_tokens == 5 and 5 < len(own.token_ids) <= 15
        assert written.finish_reason == ("stop" if own.token_ids[-1] == 1 else "length")
        assert (own.kept.num_kept[:5] == 0).all() and np.isnan(own.logprob[:5]).all()
        np.testing.assert_allclose(own.logprob[5:], read.logprob[5:], atol=1e-4)
        np.testing.assert_allclose(own.log_tail[5:], read.log_tail[5:], atol=1e-4)
        np.testing.assert_array_equal(own.token_ids, rewritten.readout.token_ids)


def start_capture(root: Path, llama: Path, corpus: Path) -> subprocess.Popen[bytes]:
    """`kdata capture` with the real vLLM, as a user types it."""
    arguments = ["capture", str(root), "--teacher", str(llama), "--corpus", str(corpus), "--k", "8",
                 "--set", "unit_tokens=300"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", "from pipelines.cli import main; main()", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def test_killed_with_a_real_vllm_and_started_again_the_bytes_are_the_same(llama_dir: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", rows_of_text(300))
    undisturbed, root = tmp_path / "undisturbed", tmp_path / "killed"
    whole = start_capture(undisturbed, llama_dir, corpus)
    assert whole.wait(200) == 0, whole.stderr and whole.stderr.read().decode()
    process = start_capture(root, llama_dir, corpus)
    manifest = root / "manifest.jsonl"
    while process.poll() is None and not (manifest.exists() and manifest.read_bytes().count(b"\n") >= 3):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed: give it more rows"
    committed = kdata.open(root)
    assert 3 <= len(committed.manifest) < len(kdata.open(undisturbed).manifest)
    assert start_capture(root, llama_dir, corpus).wait(200) == 0
    dataset = kdata.open(root)
    assert verify(dataset, deep=True) == []
    if dataset.info.teacher.deterministic:
        assert digests(root) == digests(undisturbed)
    else:
        ids = dataset.index(["id"])["id"].to_pylist()
        assert ids == kdata.open(undisturbed).index(["id"])["id"].to_pylist()
    assert json.loads((root / "dataset.json").read_bytes())["teacher"]["backend"] == "vllm"
