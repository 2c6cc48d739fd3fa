"""Reduce rows of logits while vLLM samples from them, so that written text gets any kind of targets in the same pass.

A logits processor of vLLM (`TapeProcessor` in vllm.py) sees each row before a token is drawn from it. `Tape` collects the
rows of one call. The request and its number of tokens so far tell which token a row predicts. A row may come twice (of a
prompt that is read in pieces, or a preempted request): the last one counts. At the end every row is checked against the
log-probability that the engine reports for the drawn token. A row that is not finite spoils its own request only.

This works in one process only: a model spread over several GPUs computes its logits in others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kdata.errors import DistributionError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.format.measures import joined
from kdata.teachers.reduce import Reduced, Rows, assemble, draw_seed, draws_of, picked, reduce_each, uniforms_of

KEY = "kdata_tape"  # of SamplingParams.extra_args: (tape, number of the request on it)
TAPES: dict[int, Tape] = {}
NOT_FINITE = -2  # in place of a row's place
_NUMBERS = itertools.count()


class Tape:
    """The rows of one call of the engine, as a context manager; open tapes are in `TAPES` by their number.

    Args:
        prompts: token ids of each request.
        seeds: of their samples.
        keep: what is kept of each row.
        max_tokens: longest completion.
    """

    def __init__(self, prompts: Sequence[np.ndarray], seeds: Sequence[int], keep: KeepConfig, max_tokens: int) -> None:
        self._keep, self._number, self._max_tokens = keep, next(_NUMBERS), max_tokens
        self._prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        self._by_context = keep.draws_by == "context"
        self._uniforms = (
            []
            if self._by_context
            else [
                uniforms_of([(max_tokens, draw_seed(prompt, keep, seed))], keep)
                for prompt, seed in zip(self._prompts, seeds, strict=True)
            ]
        )
        self._seeds: list[dict[int, int]] = [{} for _ in prompts]
        self._chunks: list[Rows] = []
        self._num_rows = 0
        self._places: list[dict[int, int]] = [{} for _ in prompts]

    def __enter__(self) -> Tape:
        TAPES[self._number] = self
        return self

    def __exit__(self, *_: object) -> None:
        del TAPES[self._number]

    def mark(self, request: int) -> dict[str, Any]:
        """The `extra_args` of a request."""
        return {KEY: (self._number, request)}

    def take(self, logits_BV: torch.Tensor, requests: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Reduce rows; `requests` has the request of each row and the tokens that it has written so far."""
        is_finite = (logits_BV < torch.inf).all(1).tolist()  # -inf is the logit of an id that is impossible
        live = []
        for n, (request, written) in enumerate(requests):
            if not is_finite[n]:
                self._places[request][len(written)] = NOT_FINITE
            elif len(written) < self._max_tokens:  # else the request has ended: no token is drawn from the row
                live.append(n)
        if not live:
            return
        uniforms_BN = np.stack([self._uniforms_of(*requests[n]) for n in live])
        rows_BV = logits_BV if len(live) == len(logits_BV) else logits_BV[live]
        nothing_B = torch.zeros(len(live), dtype=torch.long, device=logits_BV.device)  # the tokens are not drawn yet
        self._chunks += reduce_each(
            lambda a, b: rows_BV[a:b].contiguous(), rows_BV.shape[1], nothing_B, self._keep, uniforms_BN
        )
        for place, n in enumerate(live):
            request, written = requests[n]
            self._places[request][len(written)] = self._num_rows + place
        self._num_rows += len(live)

    def _uniforms_of(self, request: int, written: Sequence[int]) -> Any:
        """Uniforms [N] of the next token of a request."""
        place = len(written)
        if not self._by_context:
            return self._uniforms[request][place]
        ids = np.concatenate([self._prompts[request], np.asarray(written, np.int32), np.zeros(1, np.int32)])
        seeds = draws_of(ids, len(ids) - 1, self._keep)
        assert isinstance(seeds, np.ndarray)
        self._seeds[request][place] = int(seeds[0])
        return uniforms_of([(1, seeds)], self._keep)[0]

    def reduced(
        self, request: int, token_ids: np.ndarray, logprob_L: np.ndarray, rank_L: np.ndarray, tolerance: float
    ) -> Reduced:
        """What is kept along one completion.

        Args:
            token_ids: int32 [L], the tokens that the engine drew.
            logprob_L, rank_L: float32 and int32 [L], what the engine reports for these tokens.
            tolerance: largest difference in nats between a row and the report.
        Raises:
            DistributionError: a row holds NaN or infinity.
            TeacherError: rows are missing, or are not those that the tokens were drawn from.
        """
        if len(self._chunks) > 1:
            self._chunks = [Rows(**joined(self._chunks))]
        places = [self._places[request].get(t, -1) for t in range(len(token_ids))]
        if NOT_FINITE in places:
            raise DistributionError("the teacher's logits hold NaN or infinity")
        if -1 in places:
            raise TeacherError("vLLM drew tokens from rows that it did not show; set path=hidden")
        if self._by_context:
            ids = np.concatenate([self._prompts[request], token_ids])
            seeds = draws_of(ids, len(self._prompts[request]), self._keep)
            if [self._seeds[request][place] for place in range(len(token_ids))] != np.asarray(seeds).tolist():
                raise TeacherError("vLLM showed rows before the tokens that they follow were known; set path=hidden")
        rows = picked(self._chunks[0], np.array(places))
        hit_LK = rows.ids == token_ids[:, None]
        is_kept = hit_LK.any(1)
        off = np.abs(rows.logprobs[hit_LK] - logprob_L[is_kept])
        surely_kept = rank_L <= rows.ids.shape[1]
        # Equal logits may swap places at the border of what is kept: that is not an error.
        lost = surely_kept & ~is_kept
        if rows.ids.shape[1]:
            lost &= logprob_L > np.maximum(rows.logprobs[:, -1], self._keep.log_threshold) + tolerance
        if not (off <= tolerance).all() or lost.any():
            worst = f"{off.max():.2g} nats" if len(off) else "a token that should be kept is not"
            raise TeacherError(f"rows of logits and drawn tokens do not belong together ({worst}); set path=hidden")
        whole = assemble([rows], self._keep)
        return replace(whole, logprob=logprob_L, rank=rank_L)
