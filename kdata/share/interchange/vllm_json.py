"""vLLM's own JSON with `prompt_logprobs`: one object per line, as people dump it from the engine or keep it from the server.

    RequestOutput   {"request_id", "prompt", "prompt_token_ids", "prompt_logprobs"}
    completions     {"id", "choices": [{"prompt_token_ids", "prompt_logprobs"}]}, a row per choice
    chat            {"id", "prompt_token_ids", "prompt_logprobs", "choices"}

List j is about token j: null for the first token, then {"ID": {"logprob", "rank", "decoded_token"}}. vLLM always returns the
actual token, beside the top k. So its log-probability and rank are known, and a list without it belongs to another token and
its row is rejected. The flat form (`flat_logprobs`) is read too. `id`, `domain` and `text` beside it are kept. What the model
wrote (`outputs`) is not read.

A .json file holds one such object, or a list of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdata.errors import DataError, first_line
from kdata.format.json_text import MAX_ROW_CHARACTERS, parse_row, row_lines
from kdata.format.records import RowError
from kdata.share.interchange.rows import PeerRow, unusable
from kdata.share.interchange.source import PeerFile

SUFFIXES = (".jsonl", ".json")
LEAST = -9999.0  # the server writes it for probability 0, since JSON has no infinity
_ID = re.compile(r"[0-9]{1,10}")
Entry = tuple[float, int]  # log-probability and rank, 0 where there is none


def read_rows(files: list[PeerFile]) -> Iterator[PeerRow]:
    """Rows of all files. A row that cannot be used carries its reason. Raises DataError for a file that cannot be read."""
    for peer in files:
        for line in _lines(peer):
            yield from _rows(line)


def _lines(peer: PeerFile) -> Iterator[bytes]:
    try:
        if peer.suffix == ".json":
            with peer.open() as file:
                content = file.read(MAX_ROW_CHARACTERS + 1).strip()
            if content.startswith(b"["):
                yield from (json.dumps(one).encode() for one in parse_row(content))
            else:
                yield content
            return
        with peer.open() as lines:
            yield from (line for line in row_lines(lines) if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{peer.place} cannot be read: {first_line(error)}") from error


def _rows(line: bytes) -> Iterator[PeerRow]:
    """The rows of one object."""
    try:
        answer = parse_row(line)
    except DataError as error:
        yield unusable(RowError("not_json", f"a line is not JSON: {first_line(error)}"))
        return
    if not isinstance(answer, dict):
        yield unusable(RowError("not_json", "a line is not a JSON object"))
        return
    about: dict[str, Any] = {name: str(answer[name]) for name in ("domain", "text") if answer.get(name) is not None}
    prompt = answer.get("prompt", answer.get("prompt_text"))
    if isinstance(prompt, str):
        about.setdefault("text", prompt)
    own_id = answer.get("id", answer.get("request_id"))
    parts = [answer]
    choices = answer.get("choices")
    if answer.get("prompt_logprobs") is None and isinstance(choices, list):
        parts = choices or parts
    for number, part in enumerate(parts):
        if own_id is not None:
            about["id"] = str(own_id) if len(parts) == 1 else f"{own_id}-{number}"
        try:
            yield _row(part, about)
        except RowError as error:
            yield unusable(error, **about)


def _row(part: Any, about: dict[str, Any]) -> PeerRow:
    """One row. Raises RowError where it does not have vLLM's form."""
    part = part if isinstance(part, dict) else {}
    tokens = part.get("prompt_token_ids")
    if tokens is None:
        raise RowError("no_token_ids", "it has no prompt_token_ids; ask the server for them with return_token_ids=true")
    if not isinstance(tokens, list):
        raise RowError("form", "prompt_token_ids is not a list")
    token_ids = [_token_id(value) for value in tokens]
    lists = _lists(part.get("prompt_logprobs"))
    if len(lists) == len(token_ids) - 1:  # the null of the first token was left off
        lists = [{}, *lists]
    if lists and lists[0]:
        raise RowError("misaligned", "the first token has a list of prompt_logprobs, but nothing predicts it")
    for place, (token_id, entries) in enumerate(zip(token_ids, lists, strict=False)):
        if entries and token_id not in entries:
            raise RowError("misaligned", f"list {place} of prompt_logprobs does not hold token {token_id}")
    logprobs = np.array([value for entries in lists for value, _ in entries.values()], np.float64)
    logprobs[logprobs <= LEAST] = -np.inf
    return PeerRow(
        np.array(token_ids, np.int32),
        np.array([len(entries) for entries in lists], np.int32),
        np.array([token_id for entries in lists for token_id in entries], np.int32),
        logprobs.astype(np.float32),
        ranks=np.array([e.get(t, (0.0, 0))[1] for t, e in zip(token_ids, lists, strict=False)], np.int32),
        **about,
    )


def _lists(value: Any) -> list[dict[int, Entry]]:
    """Entries by id, a dictionary per token. Raises RowError."""
    if value is None:
        raise RowError("no_logprobs", "it has no prompt_logprobs; ask vLLM for them with prompt_logprobs=K")
    if isinstance(value, dict):
        return _flat(value)
    if not isinstance(value, list):
        raise RowError("form", "prompt_logprobs is not a list")
    lists: list[dict[int, Entry]] = []
    for entries in value:
        if entries is not None and not isinstance(entries, dict):
            raise RowError("form", "a list of prompt_logprobs is neither null nor an object with an entry for each id")
        lists.append(_by_id((entries or {}).items()))
    return lists


def _flat(value: dict[str, Any]) -> list[dict[int, Entry]]:
    """vLLM's flat form: one list of all ids, one of all log-probabilities, and where each token's part begins and ends."""
    names = ("start_indices", "end_indices", "token_ids", "logprobs")
    parts = [value.get(name) for name in names]
    if not all(isinstance(part, list) for part in parts):
        raise RowError("form", f"flat prompt_logprobs lack one of the lists {', '.join(names)}")
    starts, ends, ids, logprobs = (list(part or ()) for part in parts)
    ranks = value.get("ranks")
    if not (isinstance(ranks, list) and len(ranks) == len(ids)):
        ranks = [None] * len(ids)
    edges = [0, *ends]
    if len(ids) != len(logprobs) or starts != edges[:-1] or edges != sorted(edges) or edges[-1] != len(ids):
        raise RowError("form", "the lists of flat prompt_logprobs do not fit each other")
    pairs = [(token_id, {"logprob": p, "rank": r}) for token_id, p, r in zip(ids, logprobs, ranks, strict=True)]
    return [_by_id(pairs[a:b]) for a, b in zip(starts, ends, strict=True)]


def _by_id(pairs: Any) -> dict[int, Entry]:
    entries: dict[int, Entry] = {}
    for key, entry in pairs:
        token_id = _token_id(int(key) if isinstance(key, str) and _ID.fullmatch(key) else key)
        logprob = entry.get("logprob") if isinstance(entry, dict) else entry
        if isinstance(logprob, bool) or not isinstance(logprob, int | float):
            raise RowError("form", f"the log-probability of token {token_id} is not a number")
        if token_id in entries:
            raise RowError("twice", f"id {token_id} is repeated in a list")
        rank = entry.get("rank") if isinstance(entry, dict) else None
        entries[token_id] = _finite(logprob), _rank(rank)
    return entries


def _rank(value: Any) -> int:
    is_rank = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    return int(value) if is_rank else 0


def _finite(logprob: float) -> float:
    try:
        return float(logprob)
    except OverflowError as error:
        raise RowError("not_finite", "a log-probability is not a number") from error


def _token_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise RowError("vocabulary", f"{str(value)[:40]!r} is not a token id")
    return value
