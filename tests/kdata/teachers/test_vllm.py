"""The real vLLM: it reads what the plain forward pass reads, and survives SIGKILL to the byte."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdata
from kdata.check.verify import verify
from kdata.format.keep import KeepConfig
from kdata.teachers.base import Completion
from kdata.teachers.config import TeacherConfig
from tests.fakes import CHATML, TURN_END, digests, rows_of_text, save_llama, save_tokenizer, write_jsonl

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
ROOT = Path(__file__).resolve().parents[3]

# The engine's own log-probabilities hold no entropy, so this rule needs its hidden states.
UNSURE = KeepConfig(kind="topk", k=4, positions={"rule": "entropy", "threshold": 2.0})
HYBRID = KeepConfig(kind="hybrid", k=4, num_draws=6, temperatures=[2.0])
THRESHOLD = KeepConfig(kind="threshold", threshold=0.02, temperatures=[2.0])
DRAWS = {
    "hybrid": HYBRID,
    "threshold": THRESHOLD,
    "by_context": THRESHOLD.model_copy(update={"draws_by": "context"}),
}


def ask(sequences: list[np.ndarray], path: str) -> dict[str, Any]:
    """All that is asked of one teacher: run in a process of its own, because an engine keeps memory and threads."""
    from kdata.errors import TeacherError
    from kdata.teachers.config import SamplingConfig
    from kdata.teachers.vllm import VllmTeacher
    from kdata.teachers.windows import each

    # So little memory for logits that a step of the engine holds 256 tokens: a few of these sequences.
    teacher = VllmTeacher(TeacherConfig(model=path, logits_gib=1e-6), max_k=8)
    keep, sampling = KeepConfig(kind="topk", k=8), SamplingConfig(max_tokens=10)
    prompts = [ids[:5] for ids in sequences]
    written = teacher.write(prompts, keep, sampling, list(range(len(prompts))))
    answers: dict[str, Any] = {
        "info": teacher.info,
        "context": teacher.context,
        "read": teacher.read(sequences, keep),
        "again": teacher.read(sequences[::-1], keep)[::-1],
        "logprobs": teacher._read_logprobs(sequences, keep),
        "written": written,
        "rewritten": teacher.write(prompts, keep, sampling, list(range(len(prompts)))),
        "reread": teacher.read([c.readout.token_ids for c in written], keep),
        "unsure": teacher.read(sequences, UNSURE),
        "unsure_written": teacher.write(prompts, UNSURE, sampling, list(range(len(prompts)))),
    }
    for kind, own in DRAWS.items():
        answers |= {
            kind: teacher.read(sequences, own),
            f"{kind}_again": teacher.read(sequences[::-1], own)[::-1],
            f"{kind}_written": (taped := teacher.write(sequences[:-1], own, sampling, list(range(4)))),
            f"{kind}_rewritten": teacher.write(sequences[3::-1], own, sampling, [3, 2, 1, 0])[::-1],
            f"{kind}_reread": teacher.read([c.readout.token_ids for c in taped], own),
        }
    # As with a vocabulary whose rows are beyond the cache: 127 rows and more of several sequences share chunks.
    reducers, teacher.__dict__["_shares_chunks"] = teacher.__dict__.pop("_reducers"), True
    answers["shared"] = teacher.read([*sequences, sequences[0][:1]], HYBRID)
    teacher._reducers.shutdown()
    teacher.__dict__.update(_reducers=reducers, _shares_chunks=False)
    counts: dict[str, list[int]] = {"read": [], "written": []}
    teacher.read(sequences, HYBRID, counts["read"].append)
    again = teacher.write(prompts, HYBRID, sampling, list(range(len(prompts))), counts["written"].append)
    answers["counts"] = counts, sum(len(c.readout.token_ids) - c.num_prompt_tokens for c in again)
    many = [np.roll(sequences[3], n) for n in range(12)]  # 1,080 tokens of seeded prompts: four steps and more
    answers["many"] = teacher.write(many, HYBRID, sampling, list(range(12)))
    answers["loaded"] = [name for name in ("_writer", "_reader") if name in teacher.__dict__]
    mixed = [sequences[0], np.zeros(500, np.int32), sequences[1]]
    answers["too_long"] = each(lambda some: teacher.read([mixed[i] for i in some], HYBRID), 3)
    teacher._agreed = False
    teacher._head = dataclasses.replace(teacher._head, scale=1.1)
    try:
        teacher.read(sequences, HYBRID)
    except TeacherError as error:
        answers["wrong_head"] = str(error)
    teacher.close()
    return answers


def test_vllm_agrees_with_the_plain_forward_pass(llama_dir: Path, tmp_path: Path) -> None:
    from kdata.teachers.transformers import TransformersTeacher

    rng = np.random.default_rng(0)
    sequences = [np.concatenate([[0], rng.integers(2, 300, size)]).astype(np.int32) for size in (5, 40, 17, 90, 127)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(ask, sequences, str(llama_dir)).result(timeout=300)
    oracle = TransformersTeacher(TeacherConfig(model=str(llama_dir), backend="transformers"))
    plain = oracle.read(sequences, KeepConfig(kind="topk", k=8))
    assert answers["context"] == 128 and answers["info"].backend == "vllm"
    counts, written = answers["counts"]
    assert sorted(counts["read"]) == sorted(map(len, sequences)), "tokens of each sequence once it is reduced"
    assert sum(counts["written"]) == written and 5 <= len(counts["written"]) <= 12, "tokens of each step of the engine"
    for ours, theirs in zip(answers["unsure"], oracle.read(sequences, UNSURE), strict=True):
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=1e-4)
        assert np.isfinite(ours.entropy[1:]).all()
    for completion in answers["unsure_written"]:
        assert np.isfinite(completion.readout.entropy[completion.num_prompt_tokens :]).all()
    by_kind = [
        zip(answers[kind], oracle.read(sequences, own), answers[f"{kind}_again"], strict=True)
        for kind, own in DRAWS.items()
    ]
    for ours, theirs, again in chain(*by_kind):
        for name in ("logprob", "log_tail", "entropy", "log_z"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-4)
        np.testing.assert_array_equal(ours.rank, theirs.rank)
        np.testing.assert_array_equal(ours.kept.num_exact, theirs.kept.num_exact)
        np.testing.assert_array_equal(ours.kept.ids, again.kept.ids)
        np.testing.assert_array_equal(ours.kept.logprobs, again.kept.logprobs)
    for alone, shared in zip(answers["hybrid"], answers["shared"][:-1], strict=True):
        for name in ("token_ids", "logprob", "rank", "log_tail", "entropy", "log_z"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(shared, name), err_msg=name)
        for name in ("num_exact", "num_drawn", "ids", "logprobs"):
            np.testing.assert_array_equal(getattr(alone.kept, name), getattr(shared.kept, name), err_msg=name)
    assert len(answers["shared"][-1].rank) == 1 and not len(answers["shared"][-1].kept.ids), (
        "one token predicts nothing"
    )
    assert len({count for ours in answers["threshold"] for count in ours.kept.num_drawn[1:]}) > 3
    ways = ("written", "rewritten", "reread")
    taped_of = [zip(*(answers[f"{kind}_{way}"] for way in ways), strict=True) for kind in DRAWS]
    for taped, again, read in chain(*taped_of):
        one, two, start = taped.readout, again.readout, taped.num_prompt_tokens
        for name in ("token_ids", "logprob", "rank", "log_tail", "entropy", "log_z"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
        np.testing.assert_array_equal(one.kept.ids, two.kept.ids)
        np.testing.assert_array_equal(one.kept.logprobs, two.kept.logprobs)
        assert (one.kept.num_kept[:start] == 0).all() and (one.kept.num_exact[start:] > 0).all()
        np.testing.assert_array_equal(one.kept.num_exact[start:], read.kept.num_exact[start:])
        for name in ("logprob", "log_tail", "entropy", "log_z"):
            np.testing.assert_allclose(getattr(one, name)[start:], getattr(read, name)[start:], atol=1e-4, err_msg=name)
        exact, others = one.kept.logprobs[~one.kept.is_draw], read.only(np.arange(len(read.rank)) >= start).kept
        np.testing.assert_allclose(exact, others.logprobs[~others.is_draw], atol=1e-4)
        mass = np.exp(one.kept.logprobs[one.kept.is_draw].astype(np.float64)).sum()
        np.testing.assert_allclose(mass, np.exp(one.log_tail[start:].astype(np.float64)).sum(), rtol=1e-4)
    for taped, read in zip(answers["by_context_written"], answers["by_context_reread"], strict=True):
        own, start = taped.readout.kept, taped.num_prompt_tokens
        again = read.only(np.arange(len(read.rank)) >= start).kept
        np.testing.assert_array_equal(own.num_exact, again.num_exact)
        # Written or read, equal contexts have equal draws; one within rounding of a border may be of its neighbor.
        assert len(set(own.ids.tolist()) ^ set(again.ids.tolist())) <= max(2, len(own.ids) // 50)
    assert [c.num_prompt_tokens for c in answers["many"]] == [91] * 12
    assert answers["loaded"] == ["_writer"], "one copy of the weights, though hidden states were read before"
    first, failed, last = answers["too_long"]
    assert "vLLM refused a request" in str(failed)
    np.testing.assert_array_equal(first.logprob, answers["hybrid"][0].logprob)
    np.testing.assert_array_equal(last.kept.ids, answers["hybrid"][1].kept.ids)
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
    assert max(map(len, sequences)) == answers["context"] == oracle.context, "the whole context is read, both ways"
    for ours, theirs in zip(answers["logprobs"], plain, strict=True):
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_allclose(ours.logprob, theirs.logprob, atol=1e-4)
        np.testing.assert_allclose(ours.kept.logprobs, theirs.kept.logprobs, atol=1e-4)
        assert (ours.rank == theirs.rank).mean() > 0.98 and (ours.kept.ids == theirs.kept.ids).mean() > 0.98
    for written, rewritten, read in zip(answers["written"], answers["rewritten"], answers["reread"], strict=True):
        own = written.readout
        assert written.num_prompt_tokens == 5 and 5 < len(own.token_ids) <= 15
        assert written.finish_reason == ("stop" if own.token_ids[-1] == 1 else "length")
        assert (own.kept.num_kept[:5] == 0).all() and np.isnan(own.logprob[:5]).all()
        np.testing.assert_allclose(own.logprob[5:], read.logprob[5:], atol=1e-4)
        np.testing.assert_allclose(own.log_tail[5:], read.log_tail[5:], atol=1e-4)
        np.testing.assert_array_equal(own.token_ids, rewritten.readout.token_ids)


BAD_ID = 50  # its embedding is NaN


def ask_with_nan(folder: Path) -> dict[str, Any]:
    """What becomes of sequences with and without the bad id, in a process of its own; errors as text."""
    ways = (("logprobs", KeepConfig(kind="topk", k=8)), ("auto", HYBRID))
    return {name: value for path, keep in ways for name, value in _ask_with_nan(folder, path, keep).items()}


def _ask_with_nan(folder: Path, path: Any, keep: KeepConfig) -> dict[str, Any]:
    from kdata.teachers.base import Readout
    from kdata.teachers.config import SamplingConfig
    from kdata.teachers.vllm import VllmTeacher
    from kdata.teachers.windows import each

    def plain(answer: Any) -> Any:
        return f"{type(answer).__name__}: {answer}" if isinstance(answer, Exception) else answer.logprob

    def write(numbers: list[int]) -> list[Readout]:
        completions = teacher.write([mixed[i] for i in numbers], keep, SamplingConfig(max_tokens=6), numbers)
        return [completion.readout for completion in completions]

    mixed = [np.array(ids, np.int32) for ids in ([0, 5, BAD_ID, 6], [0, 5, 6, 7], [0, 9, BAD_ID], [0, 9, 8, 7, 6])]
    teacher = VllmTeacher(TeacherConfig(model=str(folder), path=path), max_k=8)
    writer, answers = teacher._writer, dict[str, Any]()
    answers[f"write {path}"] = [plain(answer) for answer in each(write, 4)]
    answers[f"write {path} good"] = [plain(answer) for answer in write([1, 3])]
    answers[f"same engine {path}"] = teacher._writer is writer
    answers[f"read {path}"] = [plain(a) for a in each(lambda some: teacher.read([mixed[i] for i in some], keep), 4)]
    answers[f"read {path} good"] = [plain(readout) for readout in teacher.read([mixed[1], mixed[3]], keep)]
    teacher.close()
    return answers


@pytest.mark.slow
def test_numbers_that_are_not_finite_spoil_their_own_row_only(tmp_path: Path) -> None:
    """NaN stays in blocks of vLLM's key-value cache, which the next sequences get."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = save_llama(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD_ID] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(ask_with_nan, folder).result(timeout=400)
    assert answers["same engine logprobs"] and answers["same engine auto"]
    for way in ("write logprobs", "read logprobs", "write auto", "read auto"):
        bad, first, last, second = answers[way]
        assert bad.startswith("DistributionError: "), way
        # Of a text that is read, nothing is predicted by the last token; vLLM's kernel for CPUs spoils the others too.
        assert isinstance(last, str) or way.startswith("read"), way
        for ours, alone in zip((first, second), answers[f"{way} good"], strict=True):
            np.testing.assert_array_equal(ours, alone, err_msg=way)
            assert np.isfinite(ours).sum() >= 3


FORMS: dict[str, dict[str, Any]] = {
    "regex": {"regex": "[ab]{3,6}"},
    "choice": {"choice": ["the cat", "the dog"]},
    "schema": {"json_schema": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
               "additionalProperties": False}},
}  # fmt: skip
CHATS = [{"id": f"q{n}", "messages": [{"role": "user", "content": f"the cat {n} 🙂"}]} for n in range(6)]


def write_in_form(folder: Path, prompts: list[np.ndarray], root: Path) -> dict[str, Any]:
    """What only the generating engine shows, in one process: structured output, sampling, stop strings, chats."""
    from kdata.corpus.corpus import Corpus, CorpusConfig
    from kdata.errors import ConfigError
    from kdata.jobs.writing import GenerateConfig, generate_with
    from kdata.teachers.config import SamplingConfig, StructuredOutput
    from kdata.teachers.vllm import VllmTeacher

    who = TeacherConfig(model=str(folder), path="logprobs")
    teacher, keep = VllmTeacher(who, max_k=8), KeepConfig(kind="topk", k=8)
    answers: dict[str, Any] = {}
    for name, form in FORMS.items():
        sampling = SamplingConfig(max_tokens=100, structured_output=StructuredOutput(**form))
        answers[name] = teacher.write(prompts, keep, sampling, list(range(len(prompts))))
        answers[f"{name} again"] = teacher.write(prompts[::-1], keep, sampling, list(range(len(prompts)))[::-1])[::-1]
    for name, form in (("bad schema", {"json_schema": {"type": "nonsense"}}), ("bad regex", {"regex": "((("})):
        try:
            teacher.write(prompts, keep, SamplingConfig(structured_output=StructuredOutput(**form)), [0] * len(prompts))
        except ConfigError as error:
            answers[name] = str(error)
    for name, sampling in (
        ("greedy", SamplingConfig(temperature=0, max_tokens=8)),
        ("top_k", SamplingConfig(top_k=1, max_tokens=8)),
        ("min_p", SamplingConfig(min_p=1.0, max_tokens=8)),
        ("stop", SamplingConfig(max_tokens=100, stop=[TURN_END, "a"])),
    ):
        answers[name] = teacher.write(prompts, keep, sampling, list(range(len(prompts))))
    corpus = CorpusConfig(
        path=str(write_jsonl(root / "chats.jsonl", CHATS)), messages_column="messages", domain_column=None
    )
    config = GenerateConfig(
        prompts=corpus, kind="topk", k=8, num_samples=2, unit_prompts=2, sampling=SamplingConfig(max_tokens=12)
    )
    generate_with(root / "whole", teacher, who, Corpus(corpus), config)
    answers["counts"] = [[], []]
    teacher.read(prompts, keep, answers["counts"][0].append)
    teacher.write(prompts, keep, SamplingConfig(max_tokens=8), [0] * len(prompts), answers["counts"][1].append)
    real, calls = teacher.write, iter(range(9))

    def stopped(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    teacher.write = stopped  # type: ignore[method-assign]
    try:
        generate_with(root / "resumed", teacher, who, Corpus(corpus), config)
    except KeyboardInterrupt:
        answers["committed"] = len(kdata.open(root / "resumed").manifest)
    generate_with(root / "resumed", teacher, who, Corpus(corpus), config)
    teacher.close()
    return answers


@pytest.mark.slow
def test_structured_output_records_the_raw_distribution(tmp_path: Path) -> None:
    """Structured output, sampling, stop strings and chats; what is recorded is what a reading of the same text gives."""
    from kdata.teachers.model import load_tokenizer
    from kdata.teachers.transformers import TransformersTeacher

    folder = save_llama(tmp_path / "llama")
    save_tokenizer(folder, chat_template=CHATML)
    tokenizer = load_tokenizer(folder)
    prompts = [np.array(tokenizer(text)["input_ids"], np.int32) for text in ("the cat", "def add", "日本", "on")]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = pool.submit(write_in_form, folder, prompts, tmp_path).result(timeout=400)
    oracle = TransformersTeacher(TeacherConfig(model=str(folder), backend="transformers"))

    def said(completion: Completion) -> str:
        written = completion.readout.token_ids[completion.num_prompt_tokens :]
        return tokenizer.decode(written, skip_special_tokens=True)

    for name in FORMS:
        texts = [said(completion) for completion in answers[name] if completion.finish_reason == "stop"]
        assert texts, f"no completion of {name} came to its end"
        if name == "regex":
            assert all(re.fullmatch("[ab]{3,6}", text) for text in texts)
        elif name == "choice":
            assert set(texts) <= {"the cat", "the dog"}
        else:
            assert all(json.loads(text)["a"] in ("x", "y") for text in texts)
        whole = [completion.readout.token_ids for completion in answers[name]]
        for completion, again, read in zip(
            answers[name], answers[f"{name} again"], oracle.read(whole, KeepConfig(kind="topk", k=8)), strict=True
        ):
            own, start = completion.readout, completion.num_prompt_tokens
            np.testing.assert_array_equal(own.token_ids, again.readout.token_ids)
            np.testing.assert_allclose(own.logprob[start:], read.logprob[start:], atol=1e-4)
            np.testing.assert_allclose(own.log_tail[start:], read.log_tail[start:], atol=1e-4)
            assert (own.kept.num_kept[:start] == 0).all() and (own.kept.num_kept[start:] == 8).all()
            # Most of the mass is where the form forbids to write: a masked distribution would have it on few tokens.
            assert np.exp(own.logprob[start:]).mean() < 0.1
    assert sum(answers["counts"][0]) == sum(map(len, prompts)) and len(answers["counts"][1]) > 1
    assert "does not take this structured_output: " in answers["bad schema"]
    assert "does not take this structured_output: " in answers["bad regex"]
    for greedy, top_k, min_p in zip(answers["greedy"], answers["top_k"], answers["min_p"], strict=True):
        np.testing.assert_array_equal(greedy.readout.token_ids, top_k.readout.token_ids)
        np.testing.assert_array_equal(greedy.readout.token_ids, min_p.readout.token_ids)
    for completion in answers["stop"]:
        written = completion.readout.token_ids[completion.num_prompt_tokens :]
        text = tokenizer.decode(written, skip_special_tokens=False)
        assert completion.finish_reason == ("stop" if len(written) < 100 else "length")
        assert completion.finish_reason == "length" or TURN_END in text or "a" in text or written[-1] == 1
    whole, resumed = kdata.open(tmp_path / "whole"), kdata.open(tmp_path / "resumed")
    assert answers["committed"] in (1, 2) and len(whole.manifest) == 3 and whole.num_rows == 12
    if whole.info.teacher.deterministic:
        assert digests(whole.path) == digests(resumed.path)
    for row in whole.index().to_pylist():
        *asked, reply = json.loads(row["messages"])
        assert asked == next(chat["messages"] for chat in CHATS if chat["id"] == row["id"].split("~")[0])
        assert reply["role"] == "assistant" and row["prompt"].endswith("<|im_start|>assistant\n")


def start_capture(root: Path, llama: Path, corpus: Path) -> subprocess.Popen[bytes]:
    """`kdata capture` with the real vLLM, as a user types it."""
    arguments = ["capture", str(root), "--teacher", str(llama), "--corpus", str(corpus), "--kind", "hybrid", "--k", "8",
                 "--set", "unit_tokens=300"]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", "from kdata.pipelines.cli.main import main; main()", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_capture_with_a_real_vllm_resumes_to_the_same_bytes(llama_dir: Path, tmp_path: Path) -> None:
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
