"""vLLM in this process: two ways to read, one to write.

    logprobs  the engine's log-probabilities, flat and without detokenization: the top k, and the exact mass of the rest
    hidden    hidden states of the pooling runner and our own head, reduced chunk by chunk: any k, draws, exact tails,
              entropy, further temperatures

The generating engine writes text. Its own log-probabilities give the top k in the same pass; what needs the full distribution
comes from the rows of logits that it samples from (`tape.py`). Where those rows are not the raw ones, the text is read again.

Recorded is the raw log-softmax at temperature 1 (`logprobs_mode="raw_logprobs"`). Requests are independent and prefix caching
is off: on a CPU in float32 a work unit that is submitted again returns the same bits (measured in two processes). Before
hidden states are used, a few real rows are read both ways, and the run is refused if they disagree.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

# Before vLLM is imported: the engine core must live in this process, so that a killed run leaves no orphan behind.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.config import PoolerConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from kdata.errors import ConfigError, DistributionError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.measures import joined
from kdata.format.schema import TeacherInfo
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens, readout_from_top
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.engine_args import lora_hash, lora_rank, of_identity, of_speed
from kdata.teachers.head import Head, is_known, load_head
from kdata.teachers.model import as_folder, model_identity, weights_folder
from kdata.teachers.reduce import (
    CHUNK_ROWS,
    Rows,
    assemble,
    draws_of,
    picked,
    readout_of,
    reads_the_head,
    reduce_each,
    uniforms_of,
)
from kdata.teachers.sizing import ANY_WORK, STEP_TOKENS, MemoryPlan, Work, model_size, plan_memory
from kdata.teachers.tape import KEY, TAPES, Tape
from kdata.teachers.windows import ENTRY_BYTES, GIB, by_windows, rows_per_step, windows

T = TypeVar("T")
# Largest difference in nats between the two ways of reading, by dtype of the forward pass: float32 differs by the order of
# summation (measured 4e-5), 16-bit types by their rounding.
PARITY_NATS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.25}
PARITY_ROWS, PARITY_TOKENS = 4, 128
MIN_STEP_TOKENS = 256  # of one step of the engine, whatever the vocabulary
NAN = "the teacher's log-probabilities hold NaN"
WINDOW_TOKENS = 8192  # two steps of the engine: short enough that reducing the last window is no long wait
WINDOW_GIB = 0.5  # of what a window of sequences leaves in memory before it is reduced: log-probabilities, or states


class VllmTeacher:
    """The offline engine. See `Teacher`."""

    def __init__(self, config: TeacherConfig, *, max_k: int, work: Work = ANY_WORK) -> None:
        self._config, self._max_k, self._work = as_folder(config), max_k, work
        self._name, self._commit, weights_hash = model_identity(config)
        self._on_cpu = not torch.cuda.is_available()
        self._agreed = False
        self._both = False  # two engines at a time
        logging.getLogger("vllm").setLevel(logging.ERROR)
        if self._on_cpu and "enable_chunked_prefill" in config.engine_args:
            raise ConfigError("engine_args.enable_chunked_prefill: on a CPU prompts are read whole; leave it away")
        self._lora = None
        if config.lora is not None:
            self._lora = LoRARequest("teacher.lora", 1, str(Path(config.lora).resolve()))
        model_config = self._model_config()
        self.vocab_size: int = model_config.get_vocab_size()
        self.context: int = model_config.max_model_len
        dtype = str(model_config.dtype).removeprefix("torch.")
        self.info = TeacherInfo(
            model=self._name,
            revision=self._commit,
            weights_hash=weights_hash,
            backend="vllm",
            backend_version=vllm.__version__,
            dtype=dtype,
            logprobs="raw log-softmax at temperature 1",
            deterministic=self._on_cpu and dtype == "float32" and not config.engine_args,
            engine_args=of_identity(config.engine_args),
            speed_args=of_speed(config.engine_args),
            lora_hash=None if config.lora is None else lora_hash(Path(config.lora)),
            bos=config.bos,
        )
        self._size = model_size(self._folder, config)
        self._plan = self._planned()
        _ = self._writer  # loaded now, so that a model that cannot be loaded is not taken for rows that cannot be read

    def _model_config(self) -> Any:
        """What vLLM makes of the model's configuration; no weights are read."""
        with self._loading_errors():
            length: dict[str, Any] = {"max_model_len": self._config.context}  # None: the model's own
            return EngineArgs(**length, **self._arguments).create_model_config()

    def _planned(self) -> MemoryPlan:
        """Memory for the work at hand. Of a model whose files do not say what it takes: as much as settings allow."""
        if self._size is None:
            kv_cache = int((self._config.kv_cache_gib or 1) * GIB) if self._on_cpu else None
            return MemoryPlan(self.context, kv_cache, {}, 0, 0, two_fit=False)
        return plan_memory(self._config, self._size, self._work, limit=self.context)

    def _make_room(self, longest: int) -> None:
        """Load the engine anew where a sequence is longer than what it was loaded for, and the model can take more."""
        if longest < self._plan.length or self._plan.length >= self.context:
            return
        self._drop_engines()
        self._work = Work(min(max(longest, 2 * self._plan.length), self.context), self._work.writes)
        self._plan = self._planned()

    @cached_property
    def _writer(self) -> LLM:
        """The generating engine: writes, and reads the top k.

        For log-probabilities of a prompt it builds float32 [rows, V] outside of its own memory planning, as many rows as it
        takes tokens in a step: that number is bounded here.
        """
        longest = self._plan.length - 1
        rows = rows_per_step(self.vocab_size, self._config.logits_gib)
        step = min(max(rows, MIN_STEP_TOKENS), STEP_TOKENS["cpu" if self._on_cpu else "cuda"])
        reads = self._config.path == "logprobs" or not self._head_is_known
        if self._on_cpu and reads and longest > max(rows, MIN_STEP_TOKENS):
            raise ConfigError(
                f"log-probabilities of {longest:,} tokens at {self.vocab_size:,} ids need more than logits_gib="
                f"{self._config.logits_gib:g}; set max_tokens or teacher.context to {max(rows, MIN_STEP_TOKENS):,}, or raise "
                "teacher.logits_gib"
            )
        return self._engine(
            max_logprobs=self._max_k, logprobs_mode="raw_logprobs", max_num_batched_tokens=step,
            max_num_seqs=min(step, MIN_STEP_TOKENS), logits_processors=[TapeProcessor],
        )  # fmt: skip

    @cached_property
    def _reader(self) -> LLM:
        """The pooling engine: hidden states of every token."""
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        step = STEP_TOKENS["cpu" if self._on_cpu else "cuda"]
        return self._engine(runner="pooling", pooler_config=pooler, max_num_batched_tokens=step)

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        """Arguments that every engine gets."""
        config, arguments = self._config, dict[str, Any]()
        if config.lora is not None:
            arguments = {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora_rank(Path(config.lora))}
        return {
            "model": config.model,
            "revision": self._commit,
            "tokenizer_revision": self._commit,
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel,
            "enable_prefix_caching": False,
            "enforce_eager": self._on_cpu,
            "trust_remote_code": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
            **arguments,
            **config.engine_args,
        }

    def _engine(self, **options: Any) -> LLM:
        """Load an engine. The other one is freed first, unless both are wanted: one copy of the weights at a time."""
        if not self._both:
            self._drop_engines()
        if self._on_cpu:
            # Prompts whole, never in pieces: a row then does not depend on its neighbours, and vLLM 0.32 fails at seeded
            # prompts in pieces ("CPU Generator does not use offset"). A step must hold the longest one.
            options["enable_chunked_prefill"] = False
            options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], self._plan.length)
        with self._loading_errors():
            return LLM(
                max_model_len=self._plan.length,
                gpu_memory_utilization=self._config.memory_fraction / (2 if self._both else 1),
                kv_cache_memory_bytes=self._plan.kv_cache,
                **{**options, **self._arguments},
            )

    @contextmanager
    def _loading_errors(self) -> Iterator[None]:
        """What vLLM says of a model that it cannot load, on one line."""
        try:
            yield
        except Exception as error:
            # It asserts what a setting may violate, and raises a bare Exception where a process of its own failed.
            known = (ValueError, RuntimeError, OSError, AssertionError)
            if not isinstance(error, known) and type(error) is not Exception:
                raise
            text = " ".join(str(error).split())
            raise TeacherError(f"vLLM cannot load {self._config.model!r}: {text}") from error

    @cached_property
    def _head_is_known(self) -> bool:
        return is_known(self._folder)

    @cached_property
    def _folder(self) -> Path:
        """The checkpoint's files."""
        return weights_folder(self._config.model, self._commit)

    @cached_property
    def _head(self) -> Head:
        dtype = getattr(torch, self.info.dtype)
        return load_head(self._folder, self.vocab_size, dtype, "cpu" if self._on_cpu else "cuda")

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read sequences, a window of them at a time; see `Teacher.read`."""
        self._make_room(max((len(ids) for ids in sequences), default=0))

        def ask() -> list[Readout]:
            readouts = self._read(sequences, keep, on_tokens)
            if any(_holds_nan(readout, 1) for readout in readouts):
                raise DistributionError(NAN)
            return readouts

        return self._with_clean_caches(ask, alone=len(sequences) == 1)

    def _read(self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens) -> list[Readout]:
        if self._path(keep) == "logprobs":
            tokens = int(WINDOW_GIB * GIB / ENTRY_BYTES) // (keep.k + 1)
            return by_windows(
                lambda group: self._read_logprobs([sequences[i] for i in group], keep, on_tokens),
                [len(s) for s in sequences],
                tokens,
            )
        if not self._agreed:
            self._check_parity(sequences)
        return self._read_hidden(sequences, keep, on_tokens)

    def _path(self, keep: KeepConfig, *, writing: bool = False) -> str:
        path = self._config.path
        if path == "logprobs" and keep.needs_full_distribution:
            raise ConfigError(
                f"path=logprobs holds the top k only; {keep.why_full_distribution} needs the full distribution: leave "
                "path=auto"
            )
        if path != "auto":
            return path
        # What is written has its top k in the same pass. Reading is faster by hidden states, where the head is known.
        return "hidden" if keep.needs_full_distribution or (not writing and self._head_is_known) else "logprobs"

    def _read_logprobs(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """The engine's log-probabilities. One more token is sampled and thrown away: the engine needs a step.

        That step needs a place. Where a sequence leaves none, its own last token is the one that is sampled.
        """
        full = [len(ids) >= self.context for ids in sequences]
        prompts = [ids[:-1] if is_full else ids for ids, is_full in zip(sequences, full, strict=True)]
        params = [
            SamplingParams(
                max_tokens=1, temperature=0, prompt_logprobs=keep.k, detokenize=False, flat_logprobs=True,
                logprobs=keep.k if is_full else None, allowed_token_ids=[int(ids[-1])] if is_full else None,
            )
            for ids, is_full in zip(sequences, full, strict=True)
        ]  # fmt: skip
        outputs = self._generate(prompts, params, on_tokens, written=False)
        readouts = []
        for ids, is_full, output in zip(sequences, full, outputs, strict=True):
            parts = [_rectangle(output.prompt_logprobs, first=1, k=keep.k)]
            if is_full:
                parts.append(_rectangle(output.outputs[0].logprobs, first=0, k=keep.k))
            actual, logprob, rank, top_ids, top_logprobs = (
                np.concatenate(columns) for columns in zip(*parts, strict=True)
            )
            if not np.array_equal(actual, ids[1:]):
                raise TeacherError("vLLM returned log-probabilities for other tokens than those of the prompt")
            readouts.append(readout_from_top(ids, 1, logprob, rank, top_ids, top_logprobs, keep))
        return readouts

    def _read_hidden(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Hidden states, then our own head.

        One window is reduced while the engine works on the next; no more than two are in memory.
        """
        tokens = min(int(WINDOW_GIB * GIB / (4 * self._head.weight_VD.shape[1])), WINDOW_TOKENS)
        jobs: list[tuple[list[int], Future[list[Readout]]]] = []
        for group in windows([len(ids) for ids in sequences], tokens):
            prompts = [TokensPrompt(prompt_token_ids=sequences[i].tolist()) for i in group]
            with self._engine_errors():
                outputs = self._reader.encode(
                    prompts, pooling_task="token_embed", use_tqdm=False, lora_request=self._lora
                )
            wait([job for _, job in jobs])
            states = {i: output.outputs.data for i, output in zip(group, outputs, strict=True)}
            for some in self._reduced_together(group, sequences):
                inputs = [(sequences[i], states[i]) for i in some]
                jobs.append((some, self._reducers.submit(self._reduce, inputs, keep, on_tokens)))
        readouts = {i: readout for some, job in jobs for i, readout in zip(some, job.result(), strict=True)}
        return [readouts[number] for number in range(len(sequences))]

    def _reduced_together(self, group: list[int], sequences: Sequence[np.ndarray]) -> list[list[int]]:
        """The sequences of a window by those whose rows share chunks: alone, or enough of them for one chunk.

        They share where reading the head is what a chunk costs. On a CPU in float32 a row has the same bits in
        every chunk.
        """
        if not self._shares_chunks:
            return [[number] for number in group]
        together: list[list[int]] = []
        num_rows = CHUNK_ROWS
        for number in group:
            if num_rows >= CHUNK_ROWS:
                together.append([])
                num_rows = 0
            together[-1].append(number)
            num_rows += len(sequences[number])
        return together

    @cached_property
    def _shares_chunks(self) -> bool:
        return not self._on_cpu or reads_the_head(self.vocab_size, "cpu")

    @torch.inference_mode()
    def _reduce(
        self, inputs: Sequence[tuple[np.ndarray, torch.Tensor]], keep: KeepConfig, on_tokens: OnTokens
    ) -> list[Readout]:
        """Reduce the states of some sequences: pairs of token ids int32 [T] and hidden states [T, D]."""
        for ids, hidden_TD in inputs:
            if len(hidden_TD) != len(ids):
                raise TeacherError(f"vLLM returned {len(hidden_TD)} hidden states for {len(ids)} tokens")
        hidden_MD = torch.cat([hidden_TD[:-1] for _, hidden_TD in inputs]).to(self._head.weight_VD.device)
        actual_M = torch.tensor(
            np.concatenate([ids[1:] for ids, _ in inputs]), dtype=torch.long, device=hidden_MD.device
        )
        uniforms_MN = uniforms_of([(len(ids) - 1, draws_of(ids, 1, keep)) for ids, _ in inputs], keep)
        logits = lambda begin, end: self._head.logits(hidden_MD[begin:end])  # noqa: E731
        rows = Rows(**joined(reduce_each(logits, self.vocab_size, actual_M, keep, uniforms_MN)))
        readouts, begin = [], 0
        for ids, _ in inputs:
            end = begin + len(ids) - 1
            readouts.append(readout_of(ids, 1, assemble([picked(rows, slice(begin, end))], keep)))
            begin = end
            on_tokens(len(ids))
        return readouts

    @cached_property
    def _reducers(self) -> ThreadPoolExecutor:
        """Threads that reduce: on a CPU as many as torch has, each computing alone; one where sequences share chunks.

        That one computes with all cores: two products at a time read the head twice (3.3 ms
        a row at 262,144 x 640, where one takes 2.9).
        """
        if self._shares_chunks:
            return ThreadPoolExecutor(1, thread_name_prefix="kdata-reduce")
        cores = torch.get_num_threads()
        pool = ThreadPoolExecutor(
            cores, thread_name_prefix="kdata-reduce", initializer=torch.set_num_threads, initargs=(1,)
        )
        # OpenMP's number of threads is a thread's own; torch's call also changes what new threads start with: put it back.
        wait([pool.submit(time.sleep, 0.01) for _ in range(cores)])
        torch.set_num_threads(cores)
        return pool

    def _check_parity(self, sequences: Sequence[np.ndarray]) -> None:
        """Read a few rows both ways: with the engine of log-probabilities, and then with that of hidden states.

        Raises TeacherError where they disagree by more than the arithmetic explains; DistributionError where all hold NaN.
        """
        rows = [ids[:PARITY_TOKENS] for ids in sequences if len(ids) > 1][:PARITY_ROWS]
        keep = KeepConfig(kind="topk", k=min(8, self._max_k))
        by_logprobs = self._read_logprobs(rows, keep)
        usable = [n for n, readout in enumerate(by_logprobs) if not _holds_nan(readout, 1)]
        if len(usable) < len(rows):
            self._clear_caches()
        if rows and not usable:
            raise DistributionError(NAN)
        by_hidden = self._read_hidden([rows[n] for n in usable], keep)
        pairs = zip([by_logprobs[n] for n in usable], by_hidden, strict=True)
        worst = max((float(np.nanmax(np.abs(a.logprob - b.logprob))) for a, b in pairs), default=0.0)
        limit = PARITY_NATS[self.info.dtype]
        if not worst <= limit:
            raise TeacherError(
                f"hidden states and log-probabilities of {self._name} disagree by {worst:.2g} nats (limit {limit:g} in "
                f"{self.info.dtype}): its head is not what kdata takes it for. Use path=logprobs or backend transformers"
            )
        self._agreed = True

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """Continue prompts; see `Teacher.write`.

        Draws and the like come from the rows that the engine samples from (`kdata/teachers/tape.py`): 1.5 times as fast as to
        read what was written once more (`tests/benchmarks/generate.py`).
        """
        self._make_room(min(max((len(p) for p in prompts), default=0) + sampling.max_tokens, self.context))
        path = self._writing_path(keep, sampling)
        if path == "read":
            self._keep_both()
        room = [min(sampling.max_tokens, self.context - len(prompt)) for prompt in prompts]
        # Log-probabilities are large while they are Python's; whatever else is kept is small.
        entries = int(WINDOW_GIB * GIB / ENTRY_BYTES)
        groups = windows(room, entries // (keep.k + 1)) if path == "logprobs" else [list(range(len(prompts)))]

        def ask() -> list[Completion]:
            completions: dict[int, Completion] = {}
            for group in groups:
                some, own_seeds = [np.asarray(prompts[i], np.int32) for i in group], [seeds[i] for i in group]
                completions |= zip(group, self._write(some, keep, sampling, own_seeds, path, on_tokens), strict=True)
            if any(_holds_nan(c.readout, c.num_prompt_tokens) for c in completions.values()):
                raise DistributionError(NAN)
            return [completions[number] for number in range(len(prompts))]

        return self._with_clean_caches(ask, alone=len(prompts) == 1)

    def _keep_both(self) -> None:
        """Reading and writing take turns: from now on both engines stay loaded, where there is room for two."""
        if self._plan.two_fit and not self._both:
            if not self._on_cpu:
                self._drop_engines()  # each gets half of the GPU's memory
            self._both = True

    def _writing_path(self, keep: KeepConfig, sampling: SamplingConfig) -> str:
        """logprobs: in the same pass, the engine's top k. tape: in the same pass, everything. read: read again."""
        path = self._path(keep, writing=True)
        # The engine forbids tokens before it takes its raw log-probabilities, and before it shows a row (vLLM 0.32).
        if sampling.structured_output is not None:
            return "read"
        if path == "logprobs":
            return path
        elsewhere = self._config.tensor_parallel > 1
        return "read" if elsewhere or sampling.min_tokens or self._config.path == "hidden" else "tape"

    def _write(
        self,
        prompts: list[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: list[int],
        path: str,
        on_tokens: OnTokens,
    ) -> list[Completion]:
        tape = Tape(prompts, seeds, keep, sampling.max_tokens) if path == "tape" else None
        params = [
            SamplingParams(
                max_tokens=min(sampling.max_tokens, self.context - len(prompt)),
                min_tokens=sampling.min_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                stop=sampling.stop or None,
                seed=seed,
                logprobs={"logprobs": keep.k, "tape": 0}.get(path),
                flat_logprobs=True,
                # A stop string is found in text, special tokens in it: the engine must then detokenise, and all of it.
                detokenize=bool(sampling.stop),
                skip_special_tokens=False,
                structured_outputs=_structure(sampling),
                extra_args=tape.mark(number) if tape is not None else None,
            )
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        with tape or nullcontext():
            outputs = self._complete(prompts, params, sampling, on_tokens)
        whole = [
            np.concatenate([prompt, np.asarray(output.token_ids, np.int32)]).astype(np.int32)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        if tape is not None:
            readouts = [self._taped(tape, n, whole[n], len(p), outputs[n].logprobs) for n, p in enumerate(prompts)]
        elif path == "logprobs":
            readouts = [
                _written(ids, len(p), o.logprobs, keep) for ids, p, o in zip(whole, prompts, outputs, strict=True)
            ]
        else:
            readouts = [
                readout.only(np.arange(len(readout.rank)) >= len(prompt))
                for readout, prompt in zip(self.read(whole, keep), prompts, strict=True)
            ]
        return [
            Completion(readout, len(prompt), output.finish_reason)
            for readout, prompt, output in zip(readouts, prompts, outputs, strict=True)
        ]

    def _taped(self, tape: Tape, request: int, ids: np.ndarray, start: int, flat: Any) -> Readout:
        """What the tape holds of one completion; the actual tokens' own numbers are the engine's."""
        actual, logprob, rank, _, _ = _rectangle(flat, first=0, k=0)
        if not np.array_equal(actual, ids[start:]):
            raise TeacherError("vLLM returned log-probabilities for other tokens than it wrote")
        limit = PARITY_NATS[self.info.dtype]
        return readout_of(ids, start, tape.reduced(request, ids[start:], logprob, rank, limit))

    def _complete(
        self,
        prompts: list[np.ndarray],
        params: list[SamplingParams],
        sampling: SamplingConfig,
        on_tokens: OnTokens,
    ) -> list[Any]:
        """Completions of the engine. Raises TeacherError where one ended neither by a stop nor by its length."""
        try:
            outputs = [output.outputs[0] for output in self._generate(prompts, params, on_tokens, written=True)]
        except TeacherError as error:
            if sampling.structured_output is None or not isinstance(error.__cause__, VLLMClientError):
                raise
            reason = " ".join(str(error.__cause__).split())
            raise ConfigError(f"vLLM does not take this structured_output: {reason}") from error
        for output in outputs:
            if output.finish_reason not in ("stop", "length"):
                raise TeacherError(f"vLLM ended a request with finish_reason={output.finish_reason!r}")
        return outputs

    def _generate(
        self, sequences: Sequence[np.ndarray], params: list[SamplingParams], on_tokens: OnTokens, *, written: bool
    ) -> list[Any]:
        """What `LLM.generate` does, with a count of tokens on the way: those written, or those of prompts that were read."""
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        with self._engine_errors():
            self._writer.enqueue(prompts, params, use_tqdm=False, lora_request=self._lora)
            engine, counted, ended = self._writer.llm_engine, 0, 0
            outputs: list[Any] = []
            while engine.has_unfinished_requests():
                finished: list[Any] = [output for output in engine.step() if output.finished]
                outputs += finished
                ended += sum(len(o.outputs[0].token_ids if written else o.prompt_token_ids) for o in finished)
                tokens = ended + (_written_so_far(engine) if written else 0)
                if tokens > counted:
                    on_tokens(tokens - counted)
                    counted = tokens
            return sorted(outputs, key=lambda output: int(output.request_id))

    def _with_clean_caches(self, ask: Callable[[], list[T]], *, alone: bool) -> list[T]:
        """Clear the engines' caches where an answer is not finite.

        NaN in a block of the key-value cache reaches the next sequence that gets the block (vLLM 0.32 multiplies it by 0).
        So the sequence that fails may not be the one at fault. One that is `alone` is asked for again, with a clean cache;
        of several the caller then asks for each alone (`each` in windows.py).
        """
        try:
            return ask()
        except DistributionError:
            self._clear_caches()
            if not alone:
                raise
        try:
            return ask()
        except DistributionError:
            self._clear_caches()
            raise

    def _clear_caches(self) -> None:
        for name in ("_writer", "_reader"):
            if name in self.__dict__:
                with self._engine_errors():
                    self.__dict__[name].collective_rpc(clear_cache)

    def _drop_engines(self) -> None:
        """Shut the engines down and free their memory."""
        for name in ("_writer", "_reader"):
            if name in self.__dict__:
                self.__dict__.pop(name).llm_engine.engine_core.shutdown()
                gc.collect()
                if not self._on_cpu:
                    torch.cuda.empty_cache()

    @contextmanager
    def _engine_errors(self) -> Iterator[None]:
        """What the engine says of a request, as a TeacherError. One that broke is dropped, and loaded anew when needed."""
        try:
            yield
        except (ValueError, VLLMClientError) as error:
            raise TeacherError(f"vLLM refused a request: {error}") from error
        except (RuntimeError, EngineDeadError) as error:
            self._drop_engines()
            raise TeacherError(f"vLLM failed: {type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Shut the engines down and drop the models, so that the next stage has the memory."""
        self._drop_engines()
        if "_reducers" in self.__dict__:
            self.__dict__.pop("_reducers").shutdown()
        self.__dict__.pop("_head", None)
        gc.collect()


def clear_cache(worker: Any) -> None:
    """Set the key-value cache of one of vLLM's workers to 0, as it was after loading."""
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, list | tuple) else (cache,):
            tensor.zero_()


def _holds_nan(readout: Readout, start: int) -> bool:
    """Whether a token from position `start` on has NaN as its log-probability."""
    return bool(np.isnan(readout.logprob[start:]).any())


def _written_so_far(engine: Any) -> int:
    """Tokens that the engine has written for requests that are not finished."""
    states = engine.output_processor.request_states.values()
    return sum(state.detokenizer.num_output_tokens() for state in states)


class TapeProcessor(LogitsProcessor):
    """Shows each row of logits to the tape of its request, and changes none."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._requests: dict[int, tuple[int, int, list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it is called before the temperature, and for greedy rows too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the places of the batch."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._requests.pop(place, None)
        for place, params, _, output in batch_update.added:
            self._requests.pop(place, None)
            if params.extra_args and KEY in params.extra_args:
                self._requests[place] = (*params.extra_args[KEY], output)
        for a, b, direction in batch_update.moved:
            first, second = self._requests.pop(a, None), self._requests.pop(b, None)
            if first is not None:
                self._requests[b] = first
            if second is not None and direction is MoveDirectionality.SWAP:
                self._requests[a] = second

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Reduce the rows; the logits are returned as they are."""
        by_tape: dict[int, list[tuple[int, int, list[int]]]] = {}
        for place, (tape, request, output) in sorted(self._requests.items()):
            by_tape.setdefault(tape, []).append((place, request, output))
        for number, entries in by_tape.items():
            if number in TAPES:
                places = [place for place, _, _ in entries]
                mine = logits if places == list(range(len(logits))) else logits[places]
                TAPES[number].take(mine, [(request, output) for _, request, output in entries])
        return logits


def _structure(sampling: SamplingConfig) -> StructuredOutputsParams | None:
    """A structured output as vLLM takes it; an object for each request, as the engine writes into it."""
    form = sampling.structured_output
    if form is None:
        return None
    return StructuredOutputsParams(json=form.json_schema, regex=form.regex, choice=form.choice)


def _quiet_llvmlite() -> None:
    """Keep vLLM's start on a CPU from failing on llvmlite, which numba loads.

    vLLM 0.32 looks at the `__dict__` of every object in every loaded module; llvmlite's library handle answers any
    attribute, `__dict__` too, with a function wrapper, and vLLM calls `.get` on it. Here it refuses names with two
    underscores.
    """
    module = sys.modules.get("llvmlite.binding.ffi")
    handle = getattr(module, "_lib_wrapper", None)
    if handle is None or hasattr(handle, "_kdata_dunder_free"):
        return
    original = handle.__getattr__

    def plain_names_only(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return original(self, name)

    handle.__getattr__ = plain_names_only
    handle._kdata_dunder_free = True


_quiet_llvmlite()  # in each process that imports this module: the workers of several GPUs do, for `TapeProcessor`


def _rectangle(flat: Any, *, first: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flat log-probabilities as arrays: actual ids [T], logprobs [T], ranks [T], top ids [T, k], top logprobs [T, k].

    The engine puts the actual token in column 0 and the top k by rank behind it; `first` empty positions lead.
    """
    positions = len(flat.start_indices) - first
    width = k + 1
    if len(flat.token_ids) != positions * width:
        raise TeacherError(f"vLLM returned {len(flat.token_ids)} log-probabilities for {positions} x {width}")
    ids = np.array(flat.token_ids, np.int32).reshape(positions, width)
    logprobs = np.array(flat.logprobs, np.float32).reshape(positions, width)
    ranks = np.array(flat.ranks[::width], np.int32)
    return ids[:, 0], logprobs[:, 0], ranks, ids[:, 1:], logprobs[:, 1:]


def _written(ids: np.ndarray, start: int, flat: Any, keep: KeepConfig) -> Readout:
    actual, logprob, rank, top_ids, top_logprobs = _rectangle(flat, first=0, k=keep.k)
    if not np.array_equal(actual, ids[start:]):
        raise TeacherError("vLLM returned log-probabilities for other tokens than it wrote")
    return readout_from_top(ids, start, logprob, rank, top_ids, top_logprobs, keep)
