"""Generation: only what was written counts, and the same settings write the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.format.keep import KeepConfig
from kdata.jobs.writing import GenerateConfig, _before_stop, sample_seed
from kdata.teachers.base import Completion
from kdata.teachers.config import SamplingConfig, StructuredOutput, TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, EOS, TURN_END, StandInTeacher, digests, run_generate, save_tokenizer
from tests.rounding import assert_logprobs

PROMPTS = [
    {"id": f"p{n}", "domain": "d", "text": text} for n, text in enumerate(["the cat", "def add", "🙂", "naïve", "日本"])
]


@pytest.fixture
def prompts(jsonl: Callable[..., Path]) -> Path:
    return jsonl(PROMPTS)


def test_the_prompt_is_stored_but_only_the_completion_counts(
    tmp_path: Path, prompts: Path, tokenizer_dir: Path
) -> None:
    dataset, teacher = run_generate(tmp_path / "d", prompts, tokenizer_dir), StandInTeacher()
    tokenizer = load_tokenizer(tokenizer_dir)
    assert dataset.index(["id"])["id"].to_pylist() == [f"p{n}~0" for n in range(5)]
    for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True):
        begin = len(tokenizer(row["prompt"])["input_ids"])
        assert sequence.token_ids[:begin].tolist() == tokenizer(row["prompt"])["input_ids"]
        assert not sequence.target_mask[:begin].any() and sequence.target_mask[begin:].all()
        assert (sequence.num_kept[:begin] == 0).all() and np.isnan(sequence.logprob[:begin]).all()
        assert row["text"].startswith(row["prompt"])
        dense = teacher.dense(sequence.token_ids)
        own = dense[np.arange(len(dense)), sequence.token_ids][begin:]
        assert_logprobs(sequence.logprob[begin:], own)
        assert row["nll"] == pytest.approx(-own.mean(), rel=1e-5)
        ended = bool(sequence.token_ids[-1] == EOS)
        assert row["finish_reason"] == ("stop" if ended else "length")
        assert ended or row["num_target_tokens"] == 12


def test_samples_are_reproducible_and_differ_from_each_other(
    tmp_path: Path, prompts: Path, tokenizer_dir: Path
) -> None:
    first = run_generate(tmp_path / "a", prompts, tokenizer_dir, num_samples=3)
    run_generate(tmp_path / "b", prompts, tokenizer_dir, num_samples=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert first.index(["id"])["id"].to_pylist()[:4] == ["p0~0", "p0~1", "p0~2", "p1~0"]
    texts = first.index(["text"])["text"].to_pylist()
    assert len(set(texts[:3])) == 3
    other = run_generate(tmp_path / "c", prompts, tokenizer_dir, num_samples=3, seed=1)
    assert other.index(["text"])["text"].to_pylist() != texts


def test_a_sample_does_not_depend_on_its_neighbours(
    tmp_path: Path, prompts: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    every = run_generate(tmp_path / "a", prompts, tokenizer_dir)
    alone = run_generate(tmp_path / "b", jsonl(PROMPTS[3:4], "one.jsonl"), tokenizer_dir)
    row = int(every.rows_of(["p3~0"])[0])
    np.testing.assert_array_equal(every[row].token_ids, alone[0].token_ids)
    assert len({sample_seed(0, "p", 0), sample_seed(0, "p", 1), sample_seed(1, "p", 0), sample_seed(0, "q", 0)}) == 4


def test_a_prompt_without_room_or_tokens_is_rejected(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    from tests.fakes import save_tokenizer

    save_tokenizer(tmp_path / "bare", bos=False)
    rows = [
        {"id": "long", "domain": "d", "text": "the cat " * 60},
        {"id": "none", "domain": "d", "text": ""},
        PROMPTS[0],
    ]
    dataset = run_generate(tmp_path / "d", jsonl(rows), tmp_path / "bare")
    assert dataset.index(["id"])["id"].to_pylist() == ["p0~0"]
    reasons = {row["id"]: row for row in dataset.sql("select * from rejects").to_pylist()}
    assert reasons["long"]["reason"] == "too_long" and "leave room to write" in reasons["long"]["detail"]
    assert reasons["none"]["reason"] == "empty"
    room = run_generate(
        tmp_path / "e",
        jsonl([{"id": "x", "domain": "d", "text": "the cat " * 20}]),
        tokenizer_dir,
        sampling=SamplingConfig(max_tokens=30, min_tokens=30),
    )
    assert room.num_rows == 0


def test_greedy_is_the_most_probable_token_every_time(tmp_path: Path, prompts: Path, tokenizer_dir: Path) -> None:
    dataset = run_generate(tmp_path / "d", prompts, tokenizer_dir, sampling=SamplingConfig(temperature=0, max_tokens=4))
    for sequence in dataset:
        assert (sequence.rank[sequence.target_mask] == 1).all()


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_tokens 9 exceeds max_tokens 8"):
        parse_config(
            GenerateConfig,
            {"prompts": {"path": "x"}, "sampling": {"max_tokens": 8, "min_tokens": 9}},
            "generate settings",
        )


def test_capture_and_generation_share_a_dataset(
    tmp_path: Path, prompts: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    from tests.fakes import run_capture

    run_generate(tmp_path / "d", prompts, tokenizer_dir)
    run_capture(tmp_path / "d", corpus_file, tokenizer_dir)
    counts = kdata.open(tmp_path / "d").sql("select source, count(*) as n from rows group by all order by all")
    assert counts.to_pylist() == [{"source": "capture", "n": 25}, {"source": "generate", "n": 5}]


# ------------------------------------------------------------------------------------------------------------ chats

ASKED = [
    {"id": "q0", "messages": [{"role": "user", "content": "the cat 🙂"}]},
    {"id": "q1", "messages": json.dumps([{"role": "system", "content": "sit"}, {"role": "user", "content": "dog?"}])},
    {"id": "q2", "messages": []},
    {"id": "q3", "messages": [{"role": "user", "content": "the mat " * 90}]},
]
CHATS = {"messages_column": "messages", "domain_column": None}


def generate_chats(root: Path, prompts: Path, tokenizer: Path, **settings: object) -> kdata.Dataset:
    teacher = settings.pop("teacher", None) or StandInTeacher(context=150)
    return run_generate(root, prompts, tokenizer, teacher=teacher, reading=CHATS, **settings)


class Scripted(StandInTeacher):
    """A stand-in that always writes the same reply, with the distributions of a stand-in: a random one seldom writes text."""

    def __init__(self, folder: Path, reply: str, finish: str = "stop") -> None:
        super().__init__(context=150)
        self._reply = load_tokenizer(folder)(reply, add_special_tokens=False)["input_ids"]
        self._finish = finish

    def _continue(self, prompt: np.ndarray, keep: KeepConfig, sampling: SamplingConfig, seed: int) -> Completion:
        ids = np.concatenate([prompt, self._reply]).astype(np.int32)
        return Completion(self.readout(ids, keep, len(prompt)), len(prompt), self._finish)  # type: ignore[arg-type]


def test_a_chat_is_continued_with_the_assistant_s_turn(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:

    teacher = Scripted(chatty, f" sat on 🙂\n{TURN_END}")
    dataset = generate_chats(tmp_path / "d", jsonl(ASKED), chatty, num_samples=2, teacher=teacher)
    tokenizer = load_tokenizer(chatty)
    assert dataset.index(["id"])["id"].to_pylist() == ["q0~0", "q0~1", "q1~0", "q1~1"]
    for number, (row, sequence) in enumerate(zip(dataset.index().to_pylist(), dataset, strict=True)):
        *asked, reply = json.loads(row["messages"])
        messages = next(r["messages"] for r in ASKED if r["id"] == row["id"].split("~")[0])
        assert asked == (json.loads(messages) if isinstance(messages, str) else messages)
        assert reply == {"role": "assistant", "content": " sat on 🙂\n"}
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        begin, ids = len(prompt), sequence.token_ids
        assert ids[:begin].tolist() == prompt
        assert not sequence.target_mask[:begin].any() and sequence.target_mask[begin:].all()
        assert row["prompt"] == tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        assert row["text"] == row["prompt"] + f" sat on 🙂\n{TURN_END}"
        token_bytes = dataset.token_bytes(number)
        assert token_bytes is not None and token_bytes.sum() == len(row["text"].encode())
    reasons = {row["id"]: row["reason"] for row in dataset.sql("select id, reason from rejects").to_pylist()}
    assert reasons == {"q2": "empty", "q3": "too_long"}


def test_a_written_chat_can_be_read_again_to_the_same_numbers(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    """The index's messages are a corpus; read, they have one token more, the line end that the template closes with."""
    from tests.fakes import run_capture

    teacher = Scripted(chatty, f"sat on the mat{TURN_END}")
    dataset = generate_chats(tmp_path / "d", jsonl(ASKED), chatty, teacher=teacher)
    rows = dataset.index().to_pylist()
    corpus = jsonl([{"id": row["id"], "messages": row["messages"]} for row in rows], "again.jsonl")
    read = run_capture(tmp_path / "again", corpus, chatty, teacher=StandInTeacher(context=150), reading=CHATS)
    assert read.num_rows == dataset.num_rows == 2
    for before, row, written, sequence in zip(rows, read.index().to_pylist(), dataset, read, strict=True):
        assert row["text"] == before["text"] + "\n"
        np.testing.assert_array_equal(sequence.token_ids[:-1], written.token_ids)
        np.testing.assert_array_equal(sequence.target_mask[:-1], written.target_mask)
        np.testing.assert_array_equal(sequence.logprob[:-1], written.logprob)
        assert not sequence.target_mask[-1]


def test_a_reply_that_a_stop_string_ended_is_kept_in_tokens_and_left_out_of_the_message(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    sampling = SamplingConfig(stop=["the log"])
    teacher = Scripted(chatty, "the dog sat on the log")
    dataset = generate_chats(tmp_path / "d", jsonl(ASKED[:1]), chatty, teacher=teacher, sampling=sampling)
    [row] = dataset.index().to_pylist()
    assert json.loads(row["messages"])[-1]["content"] == "the dog sat on "
    assert row["text"].endswith("the dog sat on the log")


def test_a_stopped_generation_from_chats_resumes_to_the_same_bytes(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    def stop(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    prompts = jsonl([{**row, "id": f"{row['id']}-{n}"} for n in range(4) for row in ASKED])
    generate_chats(tmp_path / "whole", prompts, chatty, num_samples=2)
    with pytest.raises(KeyboardInterrupt):
        generate_chats(
            tmp_path / "d", prompts, chatty, num_samples=2, teacher=StandInTeacher(context=150, before_call=stop)
        )
    assert 0 < len(kdata.open(tmp_path / "d").manifest) < 4
    generate_chats(tmp_path / "d", prompts, chatty, num_samples=2)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


def test_prompts_that_the_template_refuses_are_rejects_unless_it_refuses_all(
    tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}" + CHATML
    save_tokenizer(tmp_path / "t", chat_template=strict)
    dataset = generate_chats(tmp_path / "d", jsonl(ASKED), tmp_path / "t")
    assert {"id": "q1", "reason": "template"} in dataset.sql("select id, reason from rejects").to_pylist()
    with pytest.raises(ConfigError, match=r"not one chat could be used. q1: .*the user begins"):
        generate_chats(tmp_path / "e", jsonl(ASKED[1:2]), tmp_path / "t")


@given(text=st.text("ab.", max_size=8), stops=st.lists(st.text("ab.", min_size=1, max_size=2), max_size=2))
def test_a_reply_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    reply = _before_stop(text, stops)
    assert text.startswith(reply) and not any(stop in reply for stop in stops)
    assert reply == text or any(text[len(reply) :].startswith(stop) for stop in stops)


# ------------------------------------------------------------------------------------------------ structured output


@pytest.mark.parametrize("backend", ["stand-in", "transformers"])
def test_structured_output_is_refused_by_a_backend_without_it(
    tmp_path: Path, prompts: Path, llama_dir: Path, backend: str
) -> None:
    from kdata.teachers.transformers import TransformersTeacher

    config = TeacherConfig(model=str(llama_dir), backend="transformers")
    teacher = StandInTeacher() if backend == "stand-in" else TransformersTeacher(config)
    sampling = SamplingConfig(structured_output=StructuredOutput(regex="[0-9]+"))
    with pytest.raises(ConfigError, match=f"the {backend} teacher does not write structured output; use backend vllm"):
        run_generate(tmp_path / "d", prompts, llama_dir, teacher=teacher, sampling=sampling)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"structured_output": {}}, "takes one of json_schema, regex and choice, not 0 of them"),
        ({"structured_output": {"regex": "a", "choice": ["a"]}}, "not 2 of them"),
        ({"structured_output": {"choice": []}}, "at least 1 item"),
        ({"structured_output": {"regex": "a"}, "min_tokens": 1}, "min_tokens could forbid the end"),
        ({"structured_output": {"jsonschema": {}}}, "did you mean 'json_schema'"),
    ],
)
def test_an_invalid_structure_is_refused(sampling: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(GenerateConfig, {"prompts": {"path": "x"}, "sampling": sampling}, "generate settings")


def test_a_nucleus_top_k_and_min_p_leave_out_what_they_should(llama_dir: Path) -> None:
    """The plain forward pass against the rules, computed densely in float64."""
    import torch

    from kdata.teachers.transformers import _draw

    logits_V = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0])
    p_V = torch.softmax(logits_V.double(), -1).numpy()
    for sampling, allowed in (
        (SamplingConfig(top_k=2), {0, 1}),
        (SamplingConfig(min_p=float(p_V[3] / p_V[0]) - 1e-6), {0, 1, 2, 3}),
        (SamplingConfig(top_k=3, top_p=float(p_V[:2].sum() / p_V[:3].sum()) - 1e-3), {0, 1}),
        (SamplingConfig(), set(range(6))),
    ):
        generator = torch.Generator().manual_seed(0)
        drawn = [_draw(logits_V, sampling, generator, set()) for _ in range(2000)]
        assert set(drawn) == allowed
        share = np.bincount(drawn, minlength=6)[sorted(allowed)] / len(drawn)
        np.testing.assert_allclose(share, p_V[sorted(allowed)] / p_V[sorted(allowed)].sum(), atol=0.05)
