"""Chats for another tokenizer: targets in messages and at the ends of turns, against a plain loop; the rest refused."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kdata
from kdata.corpus.chat_template import chat_encoder
from kdata.corpus.corpus import CorpusConfig
from kdata.corpus.messages import Chat
from kdata.errors import ConfigError
from kdata.format.coded import logprob_bound
from kdata.jobs.payloads import inputs_of_shard
from kdata.jobs.retokenize import RetokenizeConfig, RetokenizeReport, retokenize
from kdata.store.token_map import token_bytes_of
from kdata.store.tokens import read_tokenizer
from kdata.teachers.config import SamplingConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, StandInTeacher, run_capture, run_generate, save_tokenizer, write_jsonl
from tests.kdata.jobs.test_retokenize import TEXTS
from tests.tokenizers_of_kinds import bpe_tokenizer, byte_tokenizer, saved, sentence_tokenizer

TURN_END, OWN_END = 3, 2  # <|im_end|> of the teacher, </s> of the students
MARKS = {0: 1, 1: 2, TURN_END: OWN_END}  # <s>, </s>: by what they are for
# Another order of things around a message, and no white space at its borders, which the teacher's template leaves.
TRIMMED = (
    "{% for m in messages %}<s>{{ m.role }}<pad>{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant<pad>{% endif %}"
)


def says(*turns: str) -> list[dict[str, Any]]:
    """A user and an assistant in turn."""
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": turn} for n, turn in enumerate(turns)]


CHATS = [
    says("the cat sat", "on the mat", "and the dog?", " barked at the fox. "),
    says("naïve café — Ελλάδα", "Привет, мир! 中文字符 한국어", "🙂🙃 family: 👨‍👩‍👧‍👦", "a lone e\u0301 accent"),
    [{"role": "system", "content": "be brief"}, *says("tabs\tand\n\nnew lines", "three   spaces, x=1+2*3")],
    says("spell it", "<|im_end|> and </s> are marks, ▁ is a sign"),
    says("say the same", "say the same"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    save_tokenizer(folder, chat_template=CHATML)
    return folder


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("students"), {}
    for name, tokenizer in (
        ("bytes", byte_tokenizer()),
        ("phrases", bpe_tokenizer(TEXTS)),
        ("sentence", sentence_tokenizer(TEXTS)),
    ):
        tokenizer.chat_template = TRIMMED
        made[name] = saved(tokenizer, folder / name)
    return made


def captured(root: Path, tokenizer: Path, chats: list[Any], **settings: Any) -> kdata.Dataset:
    rows = [{"id": f"c-{n:02}", "domain": "d", "messages": chat} for n, chat in enumerate(chats)]
    file = write_jsonl(root.with_suffix(".jsonl"), rows)
    believer = StandInTeacher(context=400)
    return run_capture(root, file, tokenizer, reading={"messages_column": "messages"}, teacher=believer, **settings)


def made(source: kdata.Dataset, student: Path, root: Path, **settings: Any) -> tuple[kdata.Dataset, RetokenizeReport]:
    return retokenize(root, source, RetokenizeConfig(tokenizer=str(student), **settings))


def reasons(root: Path) -> dict[str, str]:
    rejects = [r for file in (root / "rejects").glob("*.parquet") for r in pq.read_table(file).to_pylist()]
    return {r["id"]: r["reason"] for r in rejects}


def places(lengths: np.ndarray) -> list[tuple[int, int]]:
    """First byte of each token, and the one behind it."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))


def of_assistant(template: str, chat: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Where the bytes of the assistant's messages are, without white space around them, by what the templates write."""
    text, spans = b"", []
    for message in chat:
        content = message["content"]
        said, before = (content, f"<|im_start|>{message['role']}\n") if template == CHATML else (content.strip(), "")
        before = before or f"<s>{message['role']}<pad>"
        begin = len(text + before.encode()) + len(said.encode()) - len(said.lstrip().encode())
        if message["role"] == "assistant":
            spans.append((begin, begin + len(said.strip().encode())))
        text += (before + said + ("<|im_end|>\n" if template == CHATML else "</s>\n")).encode()
    return spans


def lengths(dataset: kdata.Dataset, row: int) -> np.ndarray:
    """Bytes of the text for each token of a row."""
    rows = [one for n in range(len(dataset.manifest)) for one in inputs_of_shard(dataset, n, dataset.shard(n))]
    assert rows[row].token_bytes is not None
    return rows[row].token_bytes.astype(np.int64)


def check_row(source: kdata.Dataset, result: kdata.Dataset, before: int, row: int, *, exact: bool) -> int:
    """Compare one row with a loop over bytes; return how many of its positions have entries."""
    stored, got = source.take(np.array([before])), result.take(np.array([row]))
    index, own_index = source.index(["messages"]), result.index(["messages", "text"])
    chat = json.loads(index["messages"][before].as_py())
    assert own_index["messages"][row].as_py() == index["messages"][before].as_py()
    theirs = token_bytes_of(read_tokenizer(source.tokenizer_dir / "tokenizer.json"), names=True)  # type: ignore[operator]
    own = token_bytes_of(read_tokenizer(result.tokenizer_dir / "tokenizer.json"), names=True)  # type: ignore[operator]
    at_T, at_S = places(lengths(source, before)), places(lengths(result, row))
    text = own_index["text"][row].as_py().encode()
    assert at_S[-1][1] == len(text)
    expected_S = np.zeros(len(at_S), bool)
    num_kept = 0
    for (a, b), (c, d) in zip(of_assistant(CHATML, chat), of_assistant(TRIMMED, chat), strict=True):
        said = text[c:d]
        tokens_T = [(x - a, y - a, n) for n, (x, y) in enumerate(at_T) if x < b and y > a]
        tokens_S = [(x - c, y - c, n) for n, (x, y) in enumerate(at_S) if (x < d and y > c) or (x == y and c <= x < d)]
        ends = sorted(({min(y, b - a) for _, y, _ in tokens_T} & {y for _, y, _ in tokens_S if y > 0}) | {0})
        for start, stop in itertools.pairwise(ends):
            chunk_T = [(x, y, n) for x, y, n in tokens_T if start < y and x < stop]
            chunk_S = [n for x, y, n in tokens_S if (start <= x < y <= stop) or (x == y and start <= x < stop)]
            whole = all(start <= x and y <= stop for x, y, _ in chunk_T)
            expected_S[chunk_S] = whole
            if whole:
                nats = sum(float(stored.logprob[n]) for _, _, n in chunk_T)
                bound = sum(float(logprob_bound(stored.logprob[n : n + 1])[0]) + 0.01 for _, _, n in chunk_T)
                assert float(got.logprob[chunk_S].sum()) == pytest.approx(nats, abs=bound), (start, stop)
        # The mark that ends the turn: all of the teacher's belief there, by id.
        end_T = next(n for n, (x, _) in enumerate(at_T) if x >= b)
        end_S = next(n for n, (x, _) in enumerate(at_S) if x >= d and n > 0)
        ends_alike = at_T[end_T][0] == b and stored.token_ids[end_T] == TURN_END
        if ends_alike:
            expected_S[end_S] = True
            assert got.token_ids[end_S] == OWN_END
            assert got.logprob[end_S] == pytest.approx(float(stored.logprob[end_T]), abs=0.2)
        for n in np.flatnonzero(expected_S):
            if not (c <= at_S[n][0] < d or n == end_S):
                continue
            span = slice(int(got.entry_offsets[n]), int(got.entry_offsets[n + 1]))
            entries = dict(zip(got.entry_ids[span].tolist(), np.exp(got.entry_logprobs[span]).tolist(), strict=True))
            x, y = at_S[n][0] - c, at_S[n][1] - c
            same = [t for s, e, t in tokens_T if s == x and e >= y and y > x]
            [t] = [end_T] if n == end_S else same or [-1]
            if t < 0:
                continue
            old = slice(int(stored.entry_offsets[t]), int(stored.entry_offsets[t + 1]))
            wanted: dict[int, float] = defaultdict(float)
            for entry, logprob in zip(stored.entry_ids[old].tolist(), stored.entry_logprobs[old].tolist(), strict=True):
                if entry == stored.token_ids[t]:
                    wanted[int(got.token_ids[n])] += float(np.exp(logprob))
                elif entry in MARKS:
                    wanted[MARKS[entry]] += float(np.exp(logprob))
                elif theirs[entry] in own and entry not in (0, 1, 2, TURN_END):
                    wanted[own.index(theirs[entry])] += float(np.exp(logprob))
            if exact:
                assert set(entries) == set(wanted), (n, said[x:y])
                for number, mass in wanted.items():
                    assert entries[number] == pytest.approx(mass, rel=0.08)
            num_kept += len(entries) > 0
    np.testing.assert_array_equal(got.target_mask, expected_S)
    assert not got.num_kept[~expected_S].any()
    return num_kept


@pytest.mark.parametrize("student", ["bytes", "phrases", "sentence"])
def test_messages_and_ends_of_turns_are_targets_and_nothing_else(
    student: str, teacher: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    source = captured(tmp_path / "source", teacher, CHATS, kind="topk", k=40)
    assert source.num_rows == len(CHATS)
    result, report = made(source, students[student], tmp_path / "out", map="exact", inside=False)
    assert set(reasons(tmp_path / "out")) <= ({"c-03"} if student == "sentence" else set()), "the sign for spaces"
    ids, kept = source.index(["id"])["id"].to_pylist(), 0
    for row, row_id in enumerate(result.index(["id"])["id"].to_pylist()):
        kept += check_row(source, result, ids.index(row_id), row, exact=True)
    assert kept > 20 and report.kept >= kept
    encoder = chat_encoder(load_tokenizer(students[student]), CorpusConfig(path="-", messages_column="messages"))
    count = 0
    for row, row_id in enumerate(result.index(["id"])["id"].to_pylist()):
        own = encoder.whole(Chat(CHATS[ids.index(row_id)]), "assistant")
        got = result.take(np.array([row]))
        np.testing.assert_array_equal(got.token_ids, own.token_ids)
        assert not (got.target_mask & ~own.target_mask).any(), "what the template writes is no target"
        count += int(own.target_mask.sum())
    assert report.of_turns == count and report.without_target == count - report.targets
    assert f"of {count:,} tokens of the assistant's turns are no targets" in " ".join(report.lines())


contents = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=25)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(contents, min_size=2, max_size=4))
@pytest.mark.parametrize("student", ["bytes", "phrases", "sentence"])
def test_any_chat_is_aligned_byte_by_byte_or_refused(
    student: str, teacher: Path, students: dict[str, Path], turns: list[str]
) -> None:
    chats = [says(*turns[: len(turns) // 2 * 2]), says("the cat", "sat on the mat")]
    with tempfile.TemporaryDirectory() as folder:
        source = captured(Path(folder) / "source", teacher, chats, kind="topk", k=12)
        result, _ = made(source, students[student], Path(folder) / "out", map="exact", inside=False)
        ids = source.index(["id"])["id"].to_pylist()
        for row, row_id in enumerate(result.index(["id"])["id"].to_pylist()):
            check_row(source, result, ids.index(row_id), row, exact=False)


def test_only_the_last_turn_where_it_alone_counted(teacher: Path, students: dict[str, Path], tmp_path: Path) -> None:
    source = captured(tmp_path / "source", teacher, CHATS[1:3], kind="topk", k=12, targets="last_assistant")
    result, _ = made(source, students["bytes"], tmp_path / "out")
    for row, chat in enumerate(CHATS[1:3]):
        got = result.take(np.array([row]))
        text = result.index(["text"])["text"][row].as_py().encode()
        spoken = b"".join(
            text[a:b] for (a, b), t in zip(places(lengths(result, row)), got.target_mask, strict=True) if t
        )
        assert spoken == chat[-1]["content"].encode() + b"</s>"


@pytest.mark.parametrize("map", ["ranks", "matched"])
def test_sorted_maps_have_the_chunks_of_messages(
    map: str, teacher: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    source = captured(tmp_path / "source", teacher, CHATS[:2], kind="topk", k=12)
    plain, _ = made(source, students["phrases"], tmp_path / "plain")
    result, _ = made(source, students["phrases"], tmp_path / "out", map=map)
    for row in range(2):
        one, other = plain.take(np.array([row])), result.take(np.array([row]))
        np.testing.assert_array_equal(one.target_mask, other.target_mask)
        assert (other.num_kept > 0).any() and not other.num_kept[~other.target_mask].any()


def test_what_cannot_be_aligned_is_refused_row_by_row(teacher: Path, students: dict[str, Path], tmp_path: Path) -> None:
    everything = captured(tmp_path / "all", teacher, CHATS[:1], kind="topk", k=12, targets="all")
    with pytest.raises(
        kdata.errors.DataError, match=r"none of 1 rows could be aligned .*Row .c-00.: .*; all reasons are in"
    ):
        made(everything, students["bytes"], tmp_path / "all-out")
    assert reasons(tmp_path / "all-out") == {"c-00": "targets"}
    chats = [*CHATS[:1], [{"role": "system", "content": "be brief"}, *says("hello", "the cat")]]
    source = captured(tmp_path / "source", teacher, chats, kind="topk", k=12)
    no_system = TRIMMED.replace("<s>", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<s>", 1)
    drops = TRIMMED.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    cuts = TRIMMED.replace("{{ m.content | trim }}", "{{ (m.content | trim)[:6] }}")
    for number, (template, refused) in enumerate(((no_system, "template"), (drops, "template"), (cuts, "template"))):
        root = tmp_path / f"out{number}"
        if template == cuts:
            with pytest.raises(kdata.errors.DataError, match="none of 2 rows"):
                made(source, students["bytes"], root, chat_template=template)
        else:
            result, report = made(source, students["bytes"], root, chat_template=template)
            assert result.num_rows == 1 and report.refused == 1
        assert reasons(root)["c-01"] == refused
    with pytest.raises(ConfigError, match="has no chat template"):
        made(source, saved(byte_tokenizer(), tmp_path / "bare"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_message_that_stands_twice_in_its_turn_is_refused_and_once_is_found(
    teacher: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    source = captured(tmp_path / "source", teacher, [says("hello", "the cat")], kind="topk", k=12)
    opened = TRIMMED.replace(
        "{{ m.content | trim }}", "{% if m.role == 'assistant' %}!{% endif %}{{ m.content | trim }}"
    )
    _, report = made(source, students["bytes"], tmp_path / "once", chat_template=opened.replace("!", "(thinks) "))
    assert report.refused == 0 and report.without_target == len("(thinks) ")
    twice = opened.replace("!", "(not the cat) ")
    with pytest.raises(kdata.errors.DataError, match="none of 1 rows"):
        made(source, students["bytes"], tmp_path / "twice", chat_template=twice)


def test_chats_that_the_teacher_wrote_end_where_they_ended(
    teacher: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    prompts = [{"id": f"p{n}", "domain": "d", "messages": says("the cat sat", "yes", "go on")} for n in range(24)]
    file = write_jsonl(tmp_path / "prompts.jsonl", prompts)
    reading = {"messages_column": "messages"}
    source = run_generate(
        tmp_path / "source",
        file,
        teacher,
        reading=reading,
        kind="topk",
        k=12,
        teacher=StandInTeacher(context=400),
        sampling=SamplingConfig(max_tokens=2),
    )
    result, report = made(source, students["bytes"], tmp_path / "out")
    assert result.num_rows + report.refused == 24 and result.num_rows > 5
    assert set(reasons(tmp_path / "out").values()) <= {"not_spelled", "no_targets", "special_tokens"}, (
        "cut characters, marks"
    )
    for row in range(result.num_rows):
        about = result.index(["prompt", "text", "messages"]).slice(row, 1).to_pylist()[0]
        assert about["text"].startswith(about["prompt"]) and about["prompt"].endswith("<s>assistant<pad>")
        got = result.take(np.array([row]))
        first = int(np.flatnonzero(got.target_mask)[0])
        assert places(lengths(result, row))[first][0] >= len(about["prompt"].encode())


def test_texts_and_chats_in_one_dataset(teacher: Path, students: dict[str, Path], tmp_path: Path) -> None:
    captured(tmp_path / "source", teacher, CHATS[:1], kind="topk", k=12, name="chats")
    rows = [{"id": "t", "domain": "d", "text": "the cat sat on the mat"}]
    source = run_capture(
        tmp_path / "source", write_jsonl(tmp_path / "t.jsonl", rows), teacher, kind="topk", k=12, name="texts"
    )
    result, report = made(source, students["bytes"], tmp_path / "out")
    assert result.num_rows == 2 and report.refused == 0
