"""A teacher is loaded for the longest sequence of its job, and for none that the job cuts or rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.jobs import longest
from kdata.jobs.longest import SLACK
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.jobs.writing import GenerateConfig, GenerateJob
from kdata.teachers.config import SamplingConfig, ServerConfig, TeacherConfig
from kdata.teachers.model import load_tokenizer
from kdata.teachers.sizing import ANY_WORK, Work
from tests.fakes import CHATML, save_llama, save_tokenizer, write_jsonl

CONTEXT, SHORT, LONG = 128, "the cat", "the cat sat on the mat " * 60


def reading(corpus: CorpusConfig, **settings: Any) -> CaptureJob:
    return CaptureJob(CaptureConfig(corpus=corpus, kind="hybrid", k=8, **settings), Corpus(corpus))


def writing(prompts: CorpusConfig) -> GenerateJob:
    config = GenerateConfig(prompts=prompts, kind="hybrid", k=8, sampling=SamplingConfig(max_tokens=20, min_tokens=5))
    return GenerateJob(config, Corpus(prompts))


def texts(folder: Path, *some: str) -> CorpusConfig:
    rows = [{"id": str(n), "text": text} for n, text in enumerate(some)]
    return CorpusConfig(path=str(write_jsonl(folder / "c.jsonl", rows)), domain_column=None)


def len_short(model: Path) -> int:
    return len(load_tokenizer(model)(SHORT)["input_ids"])


@pytest.fixture(params=[False, True], ids=["encoded", "not encoded"])
def is_huge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether LONG has more characters than are encoded."""
    if request.param:
        monkeypatch.setattr(longest, "HUGE", len(LONG) - 1)
    return bool(request.param)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, CONTEXT),  # pieces of the model's context
        ({"max_tokens": 40}, 40),
        ({"long_text": "reject"}, None),  # those of the short text
        ({"long_text": "reject", "max_tokens": 40}, None),
    ],
)
def test_a_long_text_counts_as_the_pieces_that_it_becomes(
    tmp_path: Path, llama_dir: Path, is_huge: bool, settings: dict[str, Any], tokens: int | None
) -> None:
    work = reading(texts(tmp_path, SHORT, LONG), **settings).work(TeacherConfig(model=str(llama_dir)))
    assert work == Work((tokens or len_short(llama_dir)) + SLACK, writes=False)


def test_a_prompt_that_leaves_no_room_does_not_count(tmp_path: Path, llama_dir: Path, is_huge: bool) -> None:
    teacher = TeacherConfig(model=str(llama_dir))
    assert writing(texts(tmp_path, SHORT, LONG)).work(teacher) == Work(len_short(llama_dir) + 20 + SLACK)


def test_a_chat_that_is_too_long_does_not_count(tmp_path: Path, is_huge: bool) -> None:
    save_llama(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama", chat_template=CHATML)
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "sat"}]}
        for n, text in enumerate((SHORT, LONG))
    ]
    corpus = CorpusConfig(
        path=str(write_jsonl(tmp_path / "c.jsonl", rows)), domain_column=None, messages_column="messages"
    )
    work = reading(corpus).work(TeacherConfig(model=str(tmp_path / "llama")))
    assert work.longest is not None and SLACK < work.longest < CONTEXT


def test_a_served_teacher_is_loaded_elsewhere(tmp_path: Path, llama_dir: Path) -> None:
    served = TeacherConfig(model=str(llama_dir), backend="vllm-server", server=ServerConfig(endpoints=["http://a:1"]))
    assert reading(texts(tmp_path, SHORT)).work(served) == ANY_WORK
