"""The longest sequence of a job, looked up before its teacher is loaded: the engine gets a length that just holds it.

The longest texts of a corpus are encoded, and no others. A shorter text may still have more tokens. The engine is then loaded
again with more room, so a wrong answer costs time and nothing else.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from kdata.corpus.corpus import Corpus, Document
from kdata.store.gguf import model_folder
from kdata.teachers.config import TeacherConfig
from kdata.teachers.sizing import ANY_WORK, Work, model_size

LARGEST = 32  # texts that are encoded
ANY_ID = 1 << 31  # ids are not looked at here
LOOK_SEC = 20.0  # longest look at a corpus; what comes later is not looked at
HUGE = 4 << 20  # characters of a text that is not encoded here; it is longer than the context of nearly any model
UNLIMITED = 1 << 30
SLACK = 16  # tokens: a special token more is no reason to load the engine again


def work_of(
    corpus: Corpus,
    teacher: TeacherConfig,
    encoder: Callable[[], Callable[[Document], list[int]]],
    *,
    writes: bool,
    of_huge: int,
    more: int = 0,
) -> Work:
    """What a teacher is loaded for.

    Args:
        encoder: loads the tokenizer; returns a function that counts the tokens of each sequence that a document becomes.
        writes: the teacher writes, rather than reads.
        of_huge: tokens of the longest sequence that a text of more than HUGE characters becomes; 0 where it is rejected.
        more: tokens that the teacher may write.
    """
    if teacher.backend != "vllm" or find_spec("vllm") is None:
        return ANY_WORK
    documents, lengths_of = _largest(corpus), encoder()
    longest = 0
    for document in documents:
        longest = max(longest, of_huge if characters(document) > HUGE else max(lengths_of(document), default=0))
    return Work(longest + more + SLACK, writes)


def model_limit(teacher: TeacherConfig) -> int:
    """The longest sequence that a teacher reads, as the settings or else config.json say; UNLIMITED where neither does."""
    limit = teacher.context
    folder = Path(model_folder(teacher.model))
    if limit is None and (folder / "config.json").is_file():
        size = model_size(folder, teacher)
        limit = None if size is None else size.longest
    return limit or UNLIMITED


def characters(document: Document) -> int:
    """Characters of a text, or of all of a chat."""
    return len(document.chat.content if document.chat else document.text)


def _largest(corpus: Corpus) -> list[Document]:
    """The documents with the most characters."""
    end = time.monotonic() + LOOK_SEC

    def seen() -> Iterator[Document]:
        for document in corpus.documents():
            if isinstance(document, Document):
                yield document
            if time.monotonic() > end:
                return

    return heapq.nlargest(LARGEST, seen(), key=characters)
