"""The plain forward pass: the oracle in tests, and the teacher where vLLM cannot be installed.

It sees the full distribution, so entropy and tail are exact. Sequences are sorted by length and padded on the right;
a causal model's real positions do not see the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from kdata.errors import ConfigError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.schema import TeacherInfo
from kdata.store.checkpoint_kind import refuse_kernels_of, use_exact_attention
from kdata.store.pretrained import without_bars
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig, refuse_structure
from kdata.teachers.model import as_folder, model_identity, sizes_of
from kdata.teachers.reduce import draws_of, readout_of, reduce_logits
from kdata.teachers.windows import by_windows, rows_per_step


class TransformersTeacher:
    """A Hugging Face causal language model. See `Teacher`."""

    def __init__(self, config: TeacherConfig) -> None:
        name, commit, weights_hash = model_identity(config)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            with without_bars():
                refuse_kernels_of(as_folder(config).model, commit)
                self._model = AutoModelForCausalLM.from_pretrained(
                    as_folder(config).model,
                    revision=commit,
                    dtype="auto" if config.dtype == "auto" else getattr(torch, config.dtype),
                    trust_remote_code=False,
                )
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise TeacherError(f"transformers cannot load {config.model!r}: {error}") from error
        self._model.to(self._device).eval()  # type: ignore[arg-type]  # transformers wraps Module.to
        self._batch_tokens, self._logits_gib = config.batch_tokens, config.logits_gib
        use_exact_attention(self._model)
        self.vocab_size, self.context = sizes_of(self._model.config, config)
        self._check_causal()
        dtype = str(self._model.dtype).removeprefix("torch.")
        self.info = TeacherInfo(
            model=name,
            revision=commit,
            weights_hash=weights_hash,
            backend="transformers",
            backend_version=transformers.__version__,
            dtype=dtype,
            logprobs="raw log-softmax at temperature 1, from the full distribution",
            deterministic=self._device == "cpu" and dtype == "float32",
            bos=config.bos,
        )

    @torch.inference_mode()
    def _check_causal(self) -> None:
        """Raise TeacherError where a later token changes an earlier prediction, as in BERT and other encoders."""
        ids_BL = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self._device) % self.vocab_size
        first_LV, second_LV = self._model(ids_BL).logits[:, :2].float()
        if not torch.allclose(first_LV, second_LV, rtol=1e-2, atol=1e-2):
            raise TeacherError(
                f"{type(self._model).__name__} lets a token see the ones after it, so it does not predict the next token; "
                "name a decoder-only language model"
            )

    @torch.inference_mode()
    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read sequences; see `Teacher.read`."""
        lengths = [len(ids) for ids in sequences]
        tokens = min(self._batch_tokens, rows_per_step(self.vocab_size, self._logits_gib, copies=2))
        return by_windows(
            lambda group: self._read([sequences[i] for i in group], keep, on_tokens), lengths, tokens, padded=True
        )

    def _read(self, sequences: list[np.ndarray], keep: KeepConfig, on_tokens: OnTokens) -> list[Readout]:
        """One padded batch."""
        logits_BTV = self._model(self._pad(sequences)).logits
        readouts = []
        for row, ids in enumerate(sequences):
            readouts.append(self._read_one(np.asarray(ids, np.int32), logits_BTV[row, : len(ids) - 1], 1, keep))
            on_tokens(len(ids))
        return readouts

    def _read_one(
        self, ids: np.ndarray, logits_MV: torch.Tensor, start: int, keep: KeepConfig, sample: int | None = None
    ) -> Readout:
        """Readout of `ids` whose positions from `start` on the rows of `logits_MV` predict; `sample`: see `draws_of`."""
        actual_M = torch.tensor(ids[start:], dtype=torch.long, device=logits_MV.device)
        return readout_of(ids, start, reduce_logits(logits_MV, actual_M, keep, draws_of(ids, start, keep, sample)))

    @torch.inference_mode()
    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """Continue prompts one at a time: an oracle, not a generator for volume."""
        refuse_structure(sampling, "transformers")
        if sampling.stop:
            raise TeacherError("the transformers teacher does not write with stop strings; use vllm")
        eos = self._model.generation_config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos]) - {None}
        return [self._write_one(p, keep, sampling, s, ends, on_tokens) for p, s in zip(prompts, seeds, strict=True)]

    def _write_one(
        self,
        prompt: np.ndarray,
        keep: KeepConfig,
        sampling: SamplingConfig,
        seed: int,
        ends: set[int],
        on_tokens: OnTokens,
    ) -> Completion:
        generator = torch.Generator(device=self._device).manual_seed(seed)
        ids, rows, cache, step = prompt.tolist(), [], None, prompt.tolist()
        finish = "length"
        for number in range(min(sampling.max_tokens, self.context - len(prompt))):
            output = self._model(torch.tensor([step], device=self._device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits_V = output.logits[0, -1].float()
            rows.append(logits_V)
            step = [_draw(logits_V, sampling, generator, ends if number < sampling.min_tokens else set())]
            ids += step
            on_tokens(1)
            if step[0] in ends:
                finish = "stop"
                break
        whole = np.array(ids, np.int32)
        return Completion(self._read_one(whole, torch.stack(rows), len(prompt), keep, seed), len(prompt), finish)  # type: ignore[arg-type]

    def _pad(self, sequences: list[np.ndarray]) -> torch.Tensor:
        longest = max(len(ids) for ids in sequences)
        batch = np.zeros((len(sequences), longest), np.int64)
        for row, ids in enumerate(sequences):
            batch[row, : len(ids)] = ids
        return torch.from_numpy(batch).to(self._device)

    def close(self) -> None:
        """Drop the model."""
        del self._model


def _draw(logits_V: torch.Tensor, sampling: SamplingConfig, generator: torch.Generator, banned: set[int]) -> int:
    """Sample one id with temperature, min-p, top-k and nucleus, in vLLM's order."""
    logits_V = logits_V.clone()
    logits_V[list(banned)] = -torch.inf
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probs, order = torch.softmax(logits_V / sampling.temperature, -1).sort(descending=True)
    probs = probs.masked_fill(probs < sampling.min_p * probs[0], 0.0)
    if sampling.top_k:
        probs[sampling.top_k :] = 0.0
    probs = probs / probs.sum()
    outside = probs.cumsum(-1) - probs >= sampling.top_p
    probs = probs.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(probs, 1, generator=generator)])
