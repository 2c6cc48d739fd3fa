"""The real vLLM: it reads what the plain forward pass reads, and survives SIGKILL to the byte."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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

# One engine for all that can be asked of it, in a process of its own: it keeps memory and threads.
ASK = """
import pickle, sys
import numpy as np
from kdata.keep import KeepConfig
from kdata.teachers import SamplingConfig, TeacherConfig
from kdata.teachers.vllm import VllmTeacher

sequences, path = pickle.load(open(sys.argv[1], "rb"))
teacher = VllmTeacher(TeacherConfig(model=path), max_k=8)
keep, sampling = KeepConfig(k=8), SamplingConfig(max_tokens=10)
prompts = [ids[:5] for ids in sequences]
written = teacher.write(prompts, keep, sampling, list(range(len(prompts))))
answers = {
    "info": teacher.info,
    "context": teacher.context,
    "read": teacher.read(sequences, keep),
    "again": teacher.read(sequences[::-1], keep)[::-1],
    "written": written,
    "rewritten": teacher.write(prompts, keep, sampling, list(range(len(prompts)))),
    "reread": teacher.read([c.readout.token_ids for c in written], keep),
}
pickle.dump(answers, open(sys.argv[2], "wb"))
teacher.close()
"""


def test_vllm_reads_and_writes_what_the_plain_forward_pass_does(llama_dir: Path, tmp_path: Path) -> None:
    import pickle

    from kdata.teachers.transformers import TransformersTeacher

    rng = np.random.default_rng(0)
    sequences = [
        np.concatenate([[0], rng.integers(2, 300, size)]).astype(np.int32) for size in (5, 40, 17, 90, 126 - 1)
    ]
    (tmp_path / "in").write_bytes(pickle.dumps((sequences, str(llama_dir))))
    subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path / "in"), str(tmp_path / "out")],
        cwd=ROOT,
        check=True,
        timeout=200,
    )
    answers = pickle.loads((tmp_path / "out").read_bytes())
    plain = TransformersTeacher(TeacherConfig(model=str(llama_dir), backend="transformers")).read(
        sequences, KeepConfig(k=8)
    )
    assert answers["context"] == 127 and answers["info"].backend == "vllm"
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
