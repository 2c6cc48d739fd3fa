"""vLLM in this process: log-probabilities straight from the engine, flat and without detokenisation.

The engine's raw log-softmax at temperature 1 is what is recorded (`logprobs_mode="raw_logprobs"`), so the tail mass
1 - sum is exact to float32; entropy is not known on this path. Requests are independent, prefix caching is off: on a
CPU in float32 a work unit that is submitted again returns the same bits (measured, two processes).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

# Before vLLM is imported: the engine core must live in this process, so that a killed run leaves no orphan behind.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm
from vllm import LLM, SamplingParams

from kdata.errors import ConfigError, TeacherError
from kdata.keep import KeepConfig
from kdata.schema import TeacherInfo
from kdata.teachers import Completion, Readout, SamplingConfig, TeacherConfig, model_identity, readout_from_top


class VllmTeacher:
    """The offline engine. See `Teacher`."""

    def __init__(self, config: TeacherConfig, *, max_k: int) -> None:
        name, commit, weights_hash = model_identity(config)
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        logging.getLogger("vllm").setLevel(logging.ERROR)
        _quiet_llvmlite()
        try:
            self._llm = LLM(
                model=config.model,
                revision=commit,
                tokenizer_revision=commit,
                dtype=config.dtype,
                max_model_len=config.context,
                tensor_parallel_size=config.tensor_parallel,
                gpu_memory_utilization=config.memory_fraction,
                max_logprobs=max_k,
                logprobs_mode="raw_logprobs",
                enable_prefix_caching=False,
                enforce_eager=on_cpu,
                trust_remote_code=False,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                seed=0,
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise TeacherError(f"vLLM cannot load {config.model!r}: {error}") from error
        model_config = self._llm.llm_engine.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        # Reading needs one step of the engine, and that step a place: one token less than the model's own limit.
        self.context: int = model_config.max_model_len - 1
        dtype = str(model_config.dtype).removeprefix("torch.")
        self.info = TeacherInfo(
            model=name,
            revision=commit,
            weights_hash=weights_hash,
            backend="vllm",
            backend_version=vllm.__version__,
            dtype=dtype,
            logprobs="raw log-softmax at temperature 1, from the engine",
            deterministic=on_cpu and dtype == "float32",
        )

    def read(self, sequences: Sequence[np.ndarray], keep: KeepConfig) -> list[Readout]:
        """Read sequences; see `Teacher.read`. One more token is sampled and thrown away: the engine needs a step."""
        k = _engine_k(keep)
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=k, detokenize=False, flat_logprobs=True
        )
        outputs = self._generate(sequences, [params] * len(sequences))
        readouts = []
        for ids, output in zip(sequences, outputs, strict=True):
            top = _rectangle(output.prompt_logprobs, first=1, k=k)
            if len(top[0]) != len(ids) - 1 or not np.array_equal(top[0], ids[1:]):
                raise TeacherError("vLLM returned log-probabilities for other tokens than it was given")
            readouts.append(_readout(ids, 1, top, keep))
        return readouts

    def write(
        self, prompts: Sequence[np.ndarray], keep: KeepConfig, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        """Continue prompts; see `Teacher.write`."""
        k = _engine_k(keep)
        params = [
            SamplingParams(
                max_tokens=min(sampling.max_tokens, self.context - len(prompt)),
                min_tokens=sampling.min_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                stop=sampling.stop or None,
                seed=seed,
                logprobs=k,
                flat_logprobs=True,
                # A stop string is found in text, so the engine must then detokenise.
                detokenize=bool(sampling.stop),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        completions = []
        for prompt, output in zip(prompts, self._generate(prompts, params), strict=True):
            written = output.outputs[0]
            if written.finish_reason not in ("stop", "length"):
                raise TeacherError(f"vLLM ended a request with finish_reason={written.finish_reason!r}")
            ids = np.concatenate([prompt, np.asarray(written.token_ids, np.int32)]).astype(np.int32)
            top = _rectangle(written.logprobs, first=0, k=k)
            if not np.array_equal(top[0], ids[len(prompt) :]):
                raise TeacherError("vLLM returned log-probabilities for other tokens than it wrote")
            completions.append(Completion(_readout(ids, len(prompt), top, keep), len(prompt), written.finish_reason))
        return completions

    def _generate(self, sequences: Sequence[np.ndarray], params: list[SamplingParams]) -> list[Any]:
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in sequences]
        try:
            return self._llm.generate(prompts, params, use_tqdm=False)
        except ValueError as error:
            raise TeacherError(f"vLLM refused a request: {error}") from error

    def close(self) -> None:
        """Shut the engine down and drop the model, so that the next stage has the memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm


def _engine_k(keep: KeepConfig) -> int:
    """How many entries to ask the engine for. Raises ConfigError for what its log-probabilities cannot give."""
    if keep.needs_full_distribution:
        raise ConfigError(
            f"the engine's log-probabilities hold the top k only; kind {keep.kind} and further temperatures need the full "
            "distribution: use backend transformers"
        )
    return keep.k


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


def _readout(ids: np.ndarray, start: int, top: tuple[np.ndarray, ...], keep: KeepConfig) -> Readout:
    """Place arrays of the positions from `start` on beside the whole sequence."""
    _, logprob, rank, top_ids, top_logprobs = top
    total = len(ids)
    recorded = np.arange(total) >= start

    def beside(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full((start, *values.shape[1:]), fill, values.dtype), values])

    return readout_from_top(
        ids, beside(logprob, np.nan), beside(rank, 0), beside(top_ids, 0), beside(top_logprobs, 0), recorded, keep
    )
