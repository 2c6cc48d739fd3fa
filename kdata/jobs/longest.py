"""The longest sequence of a job, looked up before its teacher is loaded: the engine gets a length that just holds it.

The longest texts of a corpus are encoded, and no others. A shorter text may still have more tokens. The engine is then loaded
again with more room, so a wrong answer costs time and nothing else.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from kdata.corpus.corpus import Corpus, Document
from kdata.teachers.config import TeacherConfig
from kdata.teachers.sizing import ANY_WORK, Work

LARGEST = 32  # texts that are encoded
LOOK_SEC = 20.0  # longest look at a corpus; what comes later is not looked at
HUGE = 4 << 20  # characters of a text that is longer than the context of any model
UNLIMITED = 1 << 30
SLACK = 16  # tokens: a special token more is no reason to load the engine again


def work_of(
    corpus: Corpus, teacher: TeacherConfig, tokens_of: Callable[[Document], int], *, writes: bool, more: int = 0
) -> Work:
    """What a teacher is loaded for.

    Args:
        tokens_of: tokens of the longest sequence that a document becomes.
        writes: the teacher writes, rather than reads.
        more: tokens that it may write.
    """
    if not is_sized(teacher):
        return ANY_WORK
    longest = max((_tokens(document, tokens_of) for document in _largest(corpus)), default=0)
    return Work(longest + more + SLACK, writes)


def is_sized(teacher: TeacherConfig) -> bool:
    """True where the length matters: the engine runs in this process, and can run."""
    return teacher.backend == "vllm" and find_spec("vllm") is not None


def _size(document: Document) -> int:
    return len(document.chat.content if document.chat else document.text)


def _tokens(document: Document, tokens_of: Callable[[Document], int]) -> int:
    return UNLIMITED if _size(document) > HUGE else tokens_of(document)


def _largest(corpus: Corpus) -> list[Document]:
    """The documents with the most characters."""
    end = time.monotonic() + LOOK_SEC

    def seen() -> Iterator[Document]:
        for document in corpus.documents():
            yield document
            if time.monotonic() > end:
                return

    return heapq.nlargest(LARGEST, seen(), key=_size)
