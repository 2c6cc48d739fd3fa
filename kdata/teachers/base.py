"""Teachers: one small protocol, one file per real implementation.

    vllm.py          the offline engine in this process
    server.py        a vLLM that is served elsewhere, over HTTP; several servers at once
    transformers.py  the plain forward pass; the oracle, and the fallback where vLLM cannot be installed

A teacher reads token ids and returns a `Readout`: what it believed at every position. It may also write. Nothing here
imports torch or vLLM until a teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdata.format.keep import KeepConfig, keep_top
from kdata.format.kept import Kept, log_tail
from kdata.format.schema import TeacherInfo
from kdata.teachers.config import SamplingConfig


@dataclass(frozen=True)
class Readout:
    """What a teacher believed along one sequence of T tokens; entry t is the prediction of token t, entry 0 has none.

    token_ids int32 [T]; logprob float32 [T] of the token that is there (nats, NaN where not recorded); rank int32 [T]
    (1 = first choice, 0 = not recorded); kept: entries at recorded positions; log_tail float32 [T] (nats, NaN where
    not recorded); entropy float32 [T] (nats) or None where the path does not see the full distribution.
    """

    token_ids: np.ndarray
    logprob: np.ndarray
    rank: np.ndarray
    kept: Kept
    log_tail: np.ndarray
    entropy: np.ndarray | None
    log_z: np.ndarray | None = None

    def only(self, chosen_T: np.ndarray) -> Readout:
        """The same with nothing recorded outside `chosen_T`, bool [T]: such positions keep no entry."""
        if np.array_equal(chosen_T, self.rank > 0):
            return self

        def blank(values: np.ndarray) -> np.ndarray:
            return np.where(chosen_T.reshape(-1, *[1] * (values.ndim - 1)), values, np.float32(np.nan))

        return Readout(
            token_ids=self.token_ids,
            logprob=blank(self.logprob),
            rank=np.where(chosen_T, self.rank, 0).astype(np.int32),
            kept=self.kept.only(chosen_T),
            log_tail=blank(self.log_tail),
            entropy=None if self.entropy is None else blank(self.entropy),
            log_z=None if self.log_z is None else blank(self.log_z),
        )


@dataclass(frozen=True)
class Completion:
    """A written continuation: the readout of prompt + completion, with nothing recorded over the prompt."""

    readout: Readout
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"]


class Teacher(Protocol):
    """What capture and generation need of a teacher."""

    info: TeacherInfo
    vocab_size: int
    context: int

    def read(self, sequences: Sequence[np.ndarray], keep: KeepConfig) -> list[Readout]:
        """Read token ids int32 [T] each and return what `keep` asks for at every position but the first."""
        ...

    def write(
        self, prompts: Sequence[np.ndarray], keep: KeepConfig, sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        """Continue prompts (token ids), recording what `keep` asks for in the same pass."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...


def readout_from_top(
    token_ids: np.ndarray,
    logprob: np.ndarray,
    rank: np.ndarray,
    ids_TK: np.ndarray,
    logprobs_TK: np.ndarray,
    recorded: np.ndarray,
    keep: KeepConfig,
) -> Readout:
    """Build a Readout from rectangular top-k arrays aligned with `token_ids`; rows outside `recorded` are ignored."""
    kept = keep_top(keep, ids_TK, logprobs_TK, recorded)
    return Readout(
        token_ids=token_ids.astype(np.int32, copy=False),
        logprob=np.where(recorded, logprob, np.nan).astype(np.float32),
        rank=np.where(recorded, rank, 0).astype(np.int32),
        kept=kept,
        log_tail=np.where(recorded, log_tail(kept.mass()), np.float32(np.nan)),
        entropy=None,
    )
