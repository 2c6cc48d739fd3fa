"""Rejects as a person reads them, and as errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from kdata.errors import DataError
from kdata.format.records import Reject, UnitResult

# Reasons of rejects, as a person reads them.
REASONS = {
    "empty": "no text",
    "no_id": "no id",
    "no_domain": "no domain",
    "not_text": "not text",
    "chat": "broken chat",
    "id_twice": "id twice",
    "too_long": "too long",
    "no_targets": "nothing to predict",
    "template": "refused by the chat template",
    "special_tokens": "special tokens spelled out",
    "token_bytes": "token of too many bytes",
    "teacher_failed": "teacher failed",
    "not_finite": "no finite log-probability",
    "vocabulary": "id outside the vocabulary",
    "form": "not of the format",
    "not_json": "not JSON",
    "no_token_ids": "no token ids",
    "no_logprobs": "no log-probabilities",
    "misaligned": "lists that do not fit the tokens",
    "twice": "entry twice in a list",
    "normalized": "changed by the tokenizer",
    "not_spelled": "text that its tokens do not spell",
}


def reason_text(reason: str) -> str:
    """The reason of a reject for a person."""
    return REASONS.get(reason, reason.replace("_", " "))


def rejected_text(counts: Mapping[str, int]) -> str:
    """Rejects by reason for a person: 3 rejected: 2 no text, 1 id twice."""
    most_first = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    listing = ", ".join(f"{count:,} {reason_text(reason)}" for reason, count in most_first)
    return f"{sum(counts.values()):,} rejected{': ' if listing else ''}{listing}"


def rejected_line(counts: Mapping[Path | str, Mapping[str, int]]) -> str:
    """Rejects of datasets by reason, and where they are: 3 rejected: 2 no text, 1 id twice (written to DATASET/rejects).

    Args:
        counts: of each dataset, by its address; see `Dataset.rejected`.
    """
    total = sum(map(Counter, counts.values()), Counter[str]())
    places = ", ".join(f"{str(place).rstrip('/')}/rejects" for place, own in counts.items() if own)
    return f"{rejected_text(total)}{f' (written to {places})' if places else ''}"


def checked(result: UnitResult, strict: bool) -> UnitResult:
    """A unit's result. Raises DataError where `strict` is set and it has a reject."""
    if strict and result.rejects:
        raise refused(result.rejects[0])
    return result


def refused(reject: Reject) -> DataError:
    """The error for a reject where `strict` is set."""
    return DataError(
        f"row {reject.id!r} cannot be used ({reason_text(reject.reason)}): {reject.detail}. It ends the work because strict "
        "is set; without it such rows are put aside in the dataset's rejects"
    )
