"""vLLM in this process. Two ways to read, one to write.

    logprobs  the engine's log-probabilities, flat and without detokenisation: the top k, and with it the exact tail
    hidden    the pooling runner's hidden states and our own head, reduced chunk by chunk: any k, draws, exact tails, entropy,
              further temperatures

Text is written by the generating engine; its own log-probabilities give the top k in the same pass, and what needs the full
distribution is read in a second, prefill-only pass over what was written.

What is recorded is the raw log-softmax at temperature 1 (`logprobs_mode="raw_logprobs"`). Requests are independent, prefix
caching is off: on a CPU in float32 a work unit that is submitted again returns the same bits (measured, two processes).
Before hidden states are trusted, a few real rows are read both ways; the run is refused where they disagree.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# Before vLLM is imported: the engine core must live in this process, so that a killed run leaves no orphan behind.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.config import PoolerConfig
from vllm.inputs import TokensPrompt

from kdata.errors import ConfigError, TeacherError
from kdata.keep import KeepConfig
from kdata.schema import TeacherInfo
from kdata.teachers import (
    Completion,
    Readout,
    SamplingConfig,
    TeacherConfig,
    model_identity,
    readout_from_top,
)
from kdata.teachers.head import Head, load_head
from kdata.teachers.reduce import draw_seed, readout_of, reduce_chunks

# Largest difference in nats between the two ways of reading, by arithmetic of the forward pass: float32 differs by order of
# summation (measured 4e-5), the 16-bit ones by their own rounding.
PARITY_NATS = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.25}
PARITY_ROWS, PARITY_TOKENS = 4, 128


class VllmTeacher:
    """The offline engine. See `Teacher`."""

    def __init__(self, config: TeacherConfig, *, max_k: int) -> None:
        self._config, self._max_k = config, max_k
        self._name, self._commit, weights_hash = model_identity(config)
        self._on_cpu = not torch.cuda.is_available()
        self._agreed = False
        if self._on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        logging.getLogger("vllm").setLevel(logging.ERROR)
        model_config = (self._reader if config.path == "hidden" else self._writer).llm_engine.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        # Reading needs one step of the engine, and that step a place: one token less than the model's own limit.
        self.context: int = model_config.max_model_len - 1
        dtype = str(model_config.dtype).removeprefix("torch.")
        self.info = TeacherInfo(
            model=self._name,
            revision=self._commit,
            weights_hash=weights_hash,
            backend="vllm",
            backend_version=vllm.__version__,
            dtype=dtype,
            logprobs="raw log-softmax at temperature 1",
            deterministic=self._on_cpu and dtype == "float32",
        )

    @cached_property
    def _writer(self) -> LLM:
        """The generating engine: writes, and reads the top k."""
        return self._engine(max_logprobs=self._max_k, logprobs_mode="raw_logprobs")

    @cached_property
    def _reader(self) -> LLM:
        """The pooling engine: hidden states of every token."""
        pooler = PoolerConfig(task="token_embed", use_activation=False)
        return self._engine(runner="pooling", pooler_config=pooler)

    def _engine(self, **options: Any) -> LLM:
        _quiet_llvmlite()
        config = self._config
        try:
            return LLM(
                model=config.model,
                revision=self._commit,
                tokenizer_revision=self._commit,
                dtype=config.dtype,
                max_model_len=config.context,
                tensor_parallel_size=config.tensor_parallel,
                gpu_memory_utilization=config.memory_fraction,
                enable_prefix_caching=False,
                enforce_eager=self._on_cpu,
                trust_remote_code=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
                **options,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise TeacherError(f"vLLM cannot load {config.model!r}: {error}") from error

    @cached_property
    def _head(self) -> Head:
        folder = Path(self._config.model)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    self._config.model, revision=self._commit, allow_patterns=["config.json", "*.safetensors"]
                )
            )
        dtype = getattr(torch, self.info.dtype)
        return load_head(folder, self.vocab_size, dtype, "cpu" if self._on_cpu else "cuda")

    def read(self, sequences: Sequence[np.ndarray], keep: KeepConfig) -> list[Readout]:
        """Read sequences; see `Teacher.read`."""
        if self._path(keep) == "logprobs":
            return self._read_logprobs(sequences, keep)
        if not self._agreed:
            self._check_parity(sequences)
        return self._read_hidden(sequences, keep)

    def _path(self, keep: KeepConfig) -> str:
        path = self._config.path
        if path == "logprobs" and keep.needs_full_distribution:
            raise ConfigError(
                f"path=logprobs holds the top k only; kind {keep.kind} and further temperatures need the full distribution: "
                "leave path=auto"
            )
        return path if path != "auto" else ("hidden" if keep.needs_full_distribution else "logprobs")

    def _read_logprobs(self, sequences: Sequence[np.ndarray], keep: KeepConfig) -> list[Readout]:
        """The engine's log-probabilities. One more token is sampled and thrown away: the engine needs a step."""
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=keep.k, detokenize=False, flat_logprobs=True
        )
        outputs = self._generate(sequences, [params] * len(sequences))
        readouts = []
        for ids, output in zip(sequences, outputs, strict=True):
            top = _rectangle(output.prompt_logprobs, first=1, k=keep.k)
            if len(top[0]) != len(ids) - 1 or not np.array_equal(top[0], ids[1:]):
                raise TeacherError("vLLM returned log-probabilities for other tokens than it was given")
            readouts.append(_readout(ids, 1, top, keep))
        return readouts

    @torch.inference_mode()
    def _read_hidden(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, starts: Sequence[int] | None = None
    ) -> list[Readout]:
        """Hidden states, then our own head; positions from `starts` on (1 where not given) are recorded."""
        starts = starts or [1] * len(sequences)
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        try:
            outputs = self._reader.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        except ValueError as error:
            raise TeacherError(f"vLLM refused a request: {error}") from error
        readouts = []
        for ids, start, output in zip(sequences, starts, outputs, strict=True):
            hidden_TD = output.outputs.data
            if len(hidden_TD) != len(ids):
                raise TeacherError(f"vLLM returned {len(hidden_TD)} hidden states for {len(ids)} tokens")
            hidden_MD = hidden_TD[start - 1 : -1].to(self._head.weight_VD.device)
            actual_M = torch.tensor(ids[start:], dtype=torch.long, device=hidden_MD.device)
            reduced = reduce_chunks(
                lambda a, b, h=hidden_MD: self._head.logits(h[a:b]),  # type: ignore[misc]
                self.vocab_size,
                actual_M,
                keep,
                [(len(actual_M), draw_seed(ids, keep))],
            )
            readouts.append(readout_of(ids, start, reduced))
        return readouts

    def _check_parity(self, sequences: Sequence[np.ndarray]) -> None:
        """Read a few rows both ways. Raises TeacherError where they disagree by more than the arithmetic explains."""
        rows = [ids[:PARITY_TOKENS] for ids in sequences if len(ids) > 1][:PARITY_ROWS]
        keep = KeepConfig(kind="topk", k=min(8, self._max_k))
        pairs = zip(self._read_logprobs(rows, keep), self._read_hidden(rows, keep), strict=True)
        worst = max((float(np.nanmax(np.abs(a.logprob - b.logprob))) for a, b in pairs), default=0.0)
        limit = PARITY_NATS[self.info.dtype]
        if not worst <= limit:
            raise TeacherError(
                f"hidden states and log-probabilities of {self._name} disagree by {worst:.2g} nats (limit {limit:g} in "
                f"{self.info.dtype}): its head is not what kdata takes it for. Use path=logprobs or backend transformers"
            )
        self._agreed = True

    def write(
        self, prompts: Sequence[np.ndarray], keep: KeepConfig, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        """Continue prompts; see `Teacher.write`."""
        path = self._path(keep)
        params = [
            SamplingParams(
                max_tokens=min(sampling.max_tokens, self.context - len(prompt)),
                min_tokens=sampling.min_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=sampling.stop or None,
                seed=seed,
                logprobs=keep.k if path == "logprobs" else None,
                flat_logprobs=True,
                # A stop string is found in text, so the engine must then detokenise.
                detokenize=bool(sampling.stop),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        outputs = [output.outputs[0] for output in self._generate(prompts, params)]
        for output in outputs:
            if output.finish_reason not in ("stop", "length"):
                raise TeacherError(f"vLLM ended a request with finish_reason={output.finish_reason!r}")
        whole = [
            np.concatenate([prompt, np.asarray(output.token_ids, np.int32)]).astype(np.int32)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        if path == "logprobs":
            readouts = [
                _written(ids, len(p), o.logprobs, keep) for ids, p, o in zip(whole, prompts, outputs, strict=True)
            ]
        else:
            if not self._agreed:
                self._check_parity(whole)
            readouts = self._read_hidden(whole, keep, [len(prompt) for prompt in prompts])
        return [
            Completion(readout, len(prompt), output.finish_reason)
            for readout, prompt, output in zip(readouts, prompts, outputs, strict=True)
        ]

    def _generate(self, sequences: Sequence[np.ndarray], params: list[SamplingParams]) -> list[Any]:
        prompts = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in sequences]
        try:
            return self._writer.generate(prompts, params, use_tqdm=False)
        except ValueError as error:
            raise TeacherError(f"vLLM refused a request: {error}") from error

    def close(self) -> None:
        """Shut the engines down and drop the models, so that the next stage has the memory."""
        for name in ("_writer", "_reader"):
            if name in self.__dict__:
                self.__dict__.pop(name).llm_engine.engine_core.shutdown()
        self.__dict__.pop("_head", None)
        gc.collect()


def _quiet_llvmlite() -> None:
    """Keep vLLM's CPU start from tripping over llvmlite (numba, which the codec uses).

    vLLM 0.32 looks at the `__dict__` of every object in every loaded module; llvmlite's library handle answers any
    attribute, `__dict__` too, with a function wrapper, and vLLM calls `.get` on it. Dunder names are none of its.
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
    top = _rectangle(flat, first=0, k=keep.k)
    if not np.array_equal(top[0], ids[start:]):
        raise TeacherError("vLLM returned log-probabilities for other tokens than it wrote")
    return _readout(ids, start, top, keep)


def _readout(ids: np.ndarray, start: int, top: tuple[np.ndarray, ...], keep: KeepConfig) -> Readout:
    """Place arrays of the positions from `start` on beside the whole sequence."""
    _, logprob, rank, top_ids, top_logprobs = top
    recorded = np.arange(len(ids)) >= start

    def beside(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full((start, *values.shape[1:]), fill, values.dtype), values])

    return readout_from_top(
        ids,
        beside(logprob, np.nan),
        beside(rank, 0),
        beside(top_ids, 0),
        beside(top_logprobs, 0),
        recorded,
        keep,
    )
