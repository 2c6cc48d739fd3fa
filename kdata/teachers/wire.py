"""Messages to and from a vLLM server: requests, typed answers, and arrays made from answers.

Both paths of the server (see `server.py`) have the same names of parameters and the same form of prompt log-probabilities.
Ids are always integers; decoded tokens are never used, because several ids decode to the same text.

Shapes: T positions, K kept entries, N entries in all as they came.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar

import msgspec
import numpy as np

from kdata.errors import TeacherError
from kdata.teachers.endpoints import LostError

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
# Sent with every request: for what is left out a server takes the model's generation_config.json.
NEUTRAL = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "skip_special_tokens": False,
}  # fmt: skip
MINUS_INFINITY = -9999.0  # how the server writes it
MASS_SLACK = 1e-3  # float32 sums


def request(name: str, generates: bool, ids: list[int], params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request. Parameters that are None are left out."""
    asked = {**NEUTRAL, **{key: value for key, value in params.items() if value is not None}}
    if "structured_outputs" in asked:
        asked["structured_outputs"] = {k.removesuffix("_schema"): v for k, v in asked["structured_outputs"].items()}
    if not generates:
        return COMPLETIONS, {"model": name, "prompt": ids, "return_token_ids": True, **asked}
    asked["detokenize"] = bool(params.get("stop"))  # a stop string is found in text
    return GENERATE, {"model": name, "token_ids": ids, "return_token_ids": True, "sampling_params": asked}


class Entry(msgspec.Struct, gc=False):
    """One of the log-probabilities of a prompt's position."""

    logprob: float
    rank: int


class Candidate(msgspec.Struct, gc=False):
    """One of the log-probabilities of a written position."""

    token_id: int
    logprob: float


class Written(Candidate, gc=False):
    """A written token, and the candidates at its position: itself, then the others by rank."""

    rank: int | None = None
    top_logprobs: list[Candidate] = []


class Logprobs(msgspec.Struct):
    """Of what was written: `content` from /inference/v1/generate, `token_logprobs` from /v1/completions."""

    content: list[Written] | None = None
    token_logprobs: list[float] | None = None


PromptLogprobs = list[dict[int, Entry] | None]


class Choice(msgspec.Struct):
    """What was written. /v1/completions has the prompt's fields here, /inference/v1/generate in the answer."""

    token_ids: list[int]
    finish_reason: str
    logprobs: Logprobs | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Answer(msgspec.Struct):
    """The answer to a request for one completion."""

    choices: list[Choice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class Top:
    """The k most probable at each of T positions.

    logprob float32 [T] and rank int32 [T] of the token that is there; ids int32 [T, K], logprobs float32 [T, K], falling.
    """

    logprob: np.ndarray
    rank: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


Struct = TypeVar("Struct", bound=msgspec.Struct)


def decode(kind: type[Struct], content: bytes) -> Struct:
    """JSON as a typed struct. Raises TeacherError where it is not that."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TeacherError(
            f"a server's answer is not what vLLM sends ({error}); is it a vLLM, and its URL right?"
        ) from error


def answer_about(content: bytes, ids: np.ndarray) -> Answer:
    """The answer to a request about `ids`. Raises LostError where the server ended it, TeacherError where it is of others."""
    answer = decode(Answer, content)
    if len(answer.choices) != 1:
        raise TeacherError(f"a server returned {len(answer.choices)} completions for one request")
    choice = answer.choices[0]
    if choice.finish_reason == "abort":
        raise LostError("the server aborted the request")
    if (answer.prompt_token_ids or choice.prompt_token_ids) != ids.tolist():
        raise TeacherError("a server answered about other tokens than those it was sent")
    return answer


def new_tokens(answer: Answer) -> tuple[np.ndarray, Any]:
    """What was written, int32 [T], and why it ended: stop or length. Raises TeacherError where it ended otherwise."""
    choice = answer.choices[0]
    if choice.finish_reason not in ("stop", "length"):
        raise TeacherError(f"a server ended a request with finish_reason={choice.finish_reason!r}")
    return np.array(choice.token_ids, np.int32), choice.finish_reason


def top_of_prompt(answer: Answer, ids: np.ndarray, k: int, vocab_size: int, *, check: bool = True) -> Top:
    """The top k at every position of a prompt but the first; arguments and errors as in `rectangle`."""
    logprobs = answer.prompt_logprobs or answer.choices[0].prompt_logprobs
    rows: list[dict[int, Entry]] = [row or {} for row in logprobs or []][1:]
    if len(rows) != len(ids) - 1 or not all(rows):
        raise TeacherError(f"a server returned log-probabilities of {len(rows)} positions for {len(ids) - 1}")
    counts_T = np.fromiter(map(len, rows), np.int64, len(rows))
    total = int(counts_T.sum())
    entries = map(attrgetter("logprob"), chain.from_iterable(map(dict.values, rows)))
    return rectangle(
        np.fromiter(chain.from_iterable(rows), np.int64, total),
        np.fromiter(entries, np.float32, total),
        counts_T,
        np.fromiter((next(iter(row.values())).rank for row in rows), np.int64, len(rows)),
        ids[1:],
        k,
        vocab_size,
        check=check,
    )


def top_of_written(answer: Answer, new: np.ndarray, k: int, vocab_size: int) -> Top:
    """The top k at every written position, of k + 1 that were asked for; arguments and errors as in `rectangle`."""
    logprobs = answer.choices[0].logprobs
    rows = (logprobs.content if logprobs else None) or []
    if len(rows) != len(new) or any(len(row.top_logprobs) != k + 1 for row in rows):
        raise TeacherError(
            f"a server did not return {k + 1} log-probabilities for each of the {len(new)} tokens it wrote"
        )
    entries = list(chain.from_iterable(row.top_logprobs for row in rows))
    rank_T = np.array([row.rank or 0 for row in rows], np.int64)
    return rectangle(
        np.array([e.token_id for e in entries], np.int64),
        np.array([e.logprob for e in entries], np.float32),
        np.full(len(rows), k + 1),
        rank_T,
        new,
        k,
        vocab_size,
    )


def joined(first: Top, second: Top) -> Top:
    """Positions of two tops, one after the other."""
    return Top(*(np.concatenate([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Top)))


def rectangle(
    ids_N: np.ndarray,
    logprobs_N: np.ndarray,
    counts_T: np.ndarray,
    rank_T: np.ndarray,
    own_T: np.ndarray,
    k: int,
    vocab_size: int,
    *,
    check: bool = True,
) -> Top:
    """Lists of a server as arrays.

    Args:
        ids_N, logprobs_N, counts_T: what came for each position: the token that is there, then the others, the most
            probable first. At least k of them without it, or with it where it is one of the k.
        rank_T: its rank, from 1.
        own_T: the tokens that are there.
        check: whether the entries must be a distribution's.
    Raises:
        TeacherError: another token, too few entries, ids outside of the vocabulary, an order that is not falling, or
            more mass than 1.
    """
    starts_T = np.cumsum(counts_T) - counts_T
    place_T = np.minimum(rank_T - 1, k)  # of the own token among the top k; k: it is none of them
    if (counts_T < k + (place_T == k)).any() or (rank_T < 1).any():
        raise TeacherError(f"a server returned fewer than the {k} most probable tokens of a position")
    if len(ids_N) and not 0 <= ids_N.min() <= ids_N.max() < vocab_size:
        raise TeacherError(f"a server returned a token id outside of the vocabulary of {vocab_size}")
    if not np.array_equal(ids_N[starts_T], own_T):
        raise TeacherError("a server returned log-probabilities of other tokens than those that are there")
    column_K = np.arange(k)
    # Behind the own token come the others: those above it have moved one to the right.
    source_TK = np.where(column_K < place_T[:, None], column_K + 1, column_K)
    source_TK[column_K == place_T[:, None]] = 0
    source_TK += starts_T[:, None]
    logprobs_N = np.where(logprobs_N <= MINUS_INFINITY, np.float32(-np.inf), logprobs_N)
    top = Top(
        logprob=logprobs_N[starts_T],
        rank=rank_T.astype(np.int32),
        ids=ids_N[source_TK].astype(np.int32),
        logprobs=logprobs_N[source_TK],
    )
    if (top.logprobs[:, 1:] > top.logprobs[:, :-1]).any():
        raise TeacherError("a server returned log-probabilities that do not fall with the rank")
    if check and (np.exp(top.logprobs.astype(np.float64)).sum(1) > 1 + MASS_SLACK).any():
        raise TeacherError(
            "a server returned probabilities that sum to more than 1; is it in --logprobs-mode raw_logprobs?"
        )
    return top


def is_distribution(logprobs_TK: np.ndarray, vocab_size: int) -> bool:
    """Whether top-k log-probabilities can be those of a distribution: the rest of the mass must fit into the other entries.

    This tells log-probabilities from logits, unless the log-sum-exp of the logits happens to be near 0 at every position.
    """
    p_TK = np.exp(logprobs_TK.astype(np.float64))
    mass_T, room_T = p_TK.sum(1), (vocab_size - p_TK.shape[1]) * p_TK[:, -1]
    return bool(((mass_T <= 1 + MASS_SLACK) & (mass_T + room_T >= 1 - MASS_SLACK)).all())
