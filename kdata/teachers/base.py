"""Teachers: one small protocol, and one file for each implementation.

    vllm.py          the offline engine in this process
    server.py        one or several vLLM servers, over HTTP
    transformers.py  the plain forward pass: the oracle of the tests, and the fallback where vLLM cannot be installed

A teacher reads token ids and returns a `Readout`: its distribution at every position. It may also write. Nothing here imports
torch or vLLM until a teacher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from kdata.format.keep import KeepConfig, keep_top
from kdata.format.kept import Kept, log_tail
from kdata.format.measures import Measures, beside, only
from kdata.format.schema import TeacherInfo
from kdata.store.hidden import Slot, Width
from kdata.teachers.config import SamplingConfig

OnTokens = Callable[[int], None]
"""Called with the number of tokens that were read or written since the last call, from any thread."""


def ignore_tokens(tokens: int) -> None:
    """An `OnTokens` that does nothing."""


@dataclass(frozen=True, kw_only=True)
class Readout(Measures):
    """A teacher's distributions along one sequence of T tokens; entry t is the prediction of token t, entry 0 has none.

    token_ids: int32 [T]. kept: entries at recorded positions. A teacher that does not see the full distribution gives no
    entropy (NaN).
    """

    token_ids: np.ndarray
    kept: Kept

    def only(self, chosen_T: np.ndarray) -> Readout:
        """This readout with nothing recorded outside `chosen_T`, bool [T]: other positions keep no entry."""
        if np.array_equal(chosen_T, self.rank > 0):
            return self
        return Readout(token_ids=self.token_ids, kept=self.kept.only(chosen_T), **self.measures(only(chosen_T)))


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

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read token ids int32 [T] each and return what `keep` asks for at every position but the first.

        Args:
            on_tokens: called while the work goes on, so that progress can be shown.
        """
        ...

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """Continue prompts (token ids), and record what `keep` asks for; `on_tokens` counts written tokens."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...


class StateReading(Teacher, Protocol):
    """A teacher that also gives its hidden states."""

    head_digest: str | None
    """SHA-256 of its head; None where the head is of no known kind."""

    def stored(
        self, sequences: Sequence[np.ndarray], layers: list[Slot], dtype: Width
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """Each sequence's number, the bits of its states int16 or uint8 [T, L, D], and their scales float32 [T, L, 1].

        Args:
            layers, dtype: as in `kdata.store.hidden`.
        """
        ...


def readout_from_top(
    token_ids: np.ndarray,
    start: int,
    logprob_L: np.ndarray,
    rank_L: np.ndarray,
    ids_LK: np.ndarray,
    logprobs_LK: np.ndarray,
    keep: KeepConfig,
) -> Readout:
    """A Readout from the top k of the last L of T positions, those from `start` on.

    Args:
        token_ids: [T], the whole sequence.
        logprob_L, rank_L: of the actual tokens.
        ids_LK, logprobs_LK: the top k, by falling probability.
    """
    recorded_T = np.arange(len(token_ids)) >= start
    whole = beside(start)
    kept = keep_top(keep, whole(ids_LK), whole(logprobs_LK), recorded_T)
    return Readout(
        token_ids=token_ids.astype(np.int32, copy=False),
        logprob=whole(logprob_L).astype(np.float32),
        rank=whole(rank_L).astype(np.int32),
        kept=kept,
        log_tail=np.where(recorded_T, log_tail(kept.mass()), np.float32(np.nan)),
        entropy=np.full(len(token_ids), np.nan, np.float32),
    )
