"""Does a teacher read text worse because its tokenizer puts no beginning-of-sequence token before it?

Some models (Gemma) are ruined without that token, and some tokenizers, often converted ones, leave it out. Stored
distributions would then be wrong everywhere, and nothing else would show it. So the first texts of a run are read both ways.
Where the token clearly helps, the run stops and asks: `teacher.bos` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdata.errors import ConfigError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.teachers.base import Teacher
from kdata.teachers.windows import each

# Tokens that are read, in all and of one text: seconds for a model of 270M parameters on two cores.
PROBE_TOKENS, ROW_TOKENS = 192, 48
# Tokens at the beginning of a text that are not compared: there the token helps every model a little, because it says that a
# text begins. What counts is whether the model is worse off throughout.
FIRST_TOKENS = 8
# A gain counts if it is at least so large, and so many standard errors. A 10M teacher whose corpus had the token gains 0.03
# nats on its own kind of text and 0.2 on short odd ones; Gemma 3 270M gains 2.4 everywhere.
GAIN_NATS, GAIN_ERRORS = 0.5, 4.0


def check_bos(teacher: Teacher, tokenizer: Any, texts: Sequence[np.ndarray], keep: KeepConfig) -> None:
    """Refuse to read texts without a beginning-of-sequence token where the teacher reads them clearly better with it.

    Nothing is read where `teacher.bos` is set, where the tokenizer has no such token, or where it puts one there.

    Args:
        texts: token ids int32 [T] of each, as they would be read.
        keep: what the run keeps, so that the teacher is read in the same way.
    Raises:
        ConfigError: the token helps; the message names both losses, and the setting.
    """
    bos = tokenizer.bos_token_id
    if teacher.info.bos is not None or bos is None:
        return
    rows = _rows([ids for ids in texts if len(ids) > 1 + FIRST_TOKENS and ids[0] != bos], teacher.context - 1)
    if not rows:
        return
    behind = [np.concatenate([[bos], ids]).astype(np.int32) for ids in rows]
    answers = each(lambda some: teacher.read([(rows + behind)[i] for i in some], keep), 2 * len(rows))
    pairs = [
        (plain.logprob[1 + FIRST_TOKENS :], other.logprob[2 + FIRST_TOKENS :], plain.token_ids[1 + FIRST_TOKENS :])
        for plain, other in zip(answers[: len(rows)], answers[len(rows) :], strict=True)
        if not isinstance(plain, TeacherError)
        and not isinstance(other, TeacherError)  # becomes a reject when it is read
    ]
    if not pairs:
        return
    without, with_it, token_ids = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    gain = with_it.astype(np.float64) - without
    error = gain.std() / np.sqrt(len(np.unique(token_ids)))  # one token again and again is no more evidence than once
    if gain.mean() > max(GAIN_NATS, GAIN_ERRORS * error):
        token = tokenizer.bos_token
        raise ConfigError(
            f"{teacher.info.model} reads text better behind its beginning-of-sequence token {token!r}, which its tokenizer "
            f"does not add: {-with_it.mean():.2f} nats per token with it, {-without.mean():.2f} without ({len(gain)} tokens "
            f"of {len(pairs)} texts). Set teacher.bos=add to put it before every text, or teacher.bos=omit to read without it"
        )


def _rows(texts: Sequence[np.ndarray], longest: int) -> list[np.ndarray]:
    """Beginnings of the first texts, `PROBE_TOKENS` in all."""
    rows: list[np.ndarray] = []
    for ids in texts:
        if sum(len(row) - 1 for row in rows) >= PROBE_TOKENS:
            break
        rows.append(ids[: min(ROW_TOKENS + 1, longest)])
    return rows
