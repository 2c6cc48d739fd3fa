"""Capture, proved against the dense oracle: every stored number is the one of the token it stands beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdata
from kdata.config import parse_config
from kdata.corpus.chat_template import ChatEncoder
from kdata.corpus.encode import TextEncoder
from kdata.corpus.messages import Chat
from kdata.errors import ConfigError, MismatchError, TooLongError
from kdata.format.keep import KeepConfig
from kdata.format.schema import TeacherInfo
from kdata.jobs.reading import CaptureConfig
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, EOS, TURN_END, VOCAB, StandInTeacher, digests, rows_of_text, run_capture, save_tokenizer
from tests.rounding import assert_logprobs, assert_tails

LONG = "the cat sat on the mat 🙂🙃 naïve café 日本語 " * 8


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> dict[str, kdata.Dataset]:
    """One dataset of each kind."""
    settings = {
        "topk": {},
        "adaptive": {"mass": 0.8, "min_k": 2, "k": 20},
        "sampled": {"num_draws": 50},
        "hybrid": {"num_draws": 12, "temperatures": [2.0]},
        "threshold": {"threshold": 0.05, "temperatures": [2.0]},
    }
    root = tmp_path_factory.mktemp("kinds")
    short = {"limit": 8}
    return {
        kind: run_capture(root / kind, corpus_file, tokenizer_dir, kind=kind, reading=short, **fields)
        for kind, fields in settings.items()
    }


@pytest.mark.parametrize("kind", ["topk", "adaptive", "sampled", "hybrid", "threshold"])
def test_entry_t_is_the_prediction_of_token_t_given_the_tokens_before_it(
    kinds: dict[str, kdata.Dataset], kind: str
) -> None:
    """From text to `take`: the position convention, the ranks, the exact tail and the kept entries."""
    dataset, teacher = kinds[kind], StandInTeacher()
    for sequence in dataset:
        dense_TV = teacher.dense(sequence.token_ids)
        assert not sequence.target_mask[0] and sequence.target_mask[1:].all()
        assert np.isnan(sequence.logprob[0]) and np.isnan(sequence.log_tail[0])
        assert sequence.rank[0] == 0 and sequence.num_kept[0] == 0
        for t in range(1, len(sequence.token_ids)):
            p_V, token = np.exp(dense_TV[t]), sequence.token_ids[t]
            assert_logprobs(sequence.logprob[t], dense_TV[t, token])
            assert sequence.rank[t] == 1 + (dense_TV[t] > dense_TV[t, token]).sum()
            assert_logprobs(sequence.entropy[t], -(p_V * dense_TV[t]).sum(), times=0.5)
            span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
            ids, weights = sequence.entry_ids[span], np.exp(sequence.entry_logprobs[span].astype(np.float64))
            exact = sequence.num_exact[t]
            assert ids[:exact].tolist() == np.argsort(-p_V, kind="stable")[:exact].tolist()
            np.testing.assert_allclose(np.log(weights[:exact]), dense_TV[t, ids[:exact]], atol=0.07)
            # The tail is exact: what was not kept, not 1 minus a rounded sum.
            tail = 1 - p_V[ids[:exact]].sum()
            assert_tails(np.exp(sequence.log_tail[t]), tail)
            assert weights.sum() <= 1.0
            if dataset.info.tail == "draws":
                assert not set(ids[:exact]) & set(ids[exact:])
                assert_tails(weights[exact:].sum(), tail)


def test_each_kind_keeps_what_it_says(kinds: dict[str, kdata.Dataset]) -> None:
    def counted(kind: str) -> tuple[np.ndarray, np.ndarray]:
        every = kinds[kind].take(np.arange(len(kinds[kind])))
        return every.num_exact[every.target_mask], (every.num_kept - every.num_exact)[every.target_mask]

    exact, drawn = counted("topk")
    assert (exact == 8).all() and (drawn == 0).all()
    exact, drawn = counted("adaptive")
    assert exact.min() >= 2 and exact.max() <= 20 and len(set(exact)) > 3 and (drawn == 0).all()
    exact, drawn = counted("sampled")
    assert (exact == 0).all() and (drawn >= 1).all() and (drawn <= 50).all()
    exact, drawn = counted("hybrid")
    assert (exact == 8).all() and (drawn >= 1).all() and (drawn <= 12).all()
    exact, drawn = counted("threshold")
    assert exact.min() >= 1 and len(set(exact)) > 3 and len(set(drawn)) > 3 and (exact + drawn).max() <= 22
    tails = {kind: dataset.info.tail for kind, dataset in kinds.items()}
    assert tails == {"topk": "ghost", "adaptive": "ghost", "sampled": "draws", "hybrid": "draws", "threshold": "draws"}


def test_the_codec_of_draws_by_need_names_the_threshold_and_no_number(kinds: dict[str, kdata.Dataset]) -> None:
    codec = kinds["threshold"].info.codec
    assert codec.parameters == {
        "threshold": 0.05, "draw_seed": 0, "draw_method": "systematic", "temperatures": [2.0], "id_bytes": 2,
    }  # fmt: skip
    assert KeepConfig.of(codec) == KeepConfig(kind="threshold", threshold=0.05, temperatures=[2.0])


def test_draws_by_need_are_the_same_in_any_unit_and_after_a_stop(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path
) -> None:
    def stop(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"kind": "threshold", "threshold": 0.05, "temperatures": [2.0]}
    whole = run_capture(tmp_path / "whole", corpus_file, tokenizer_dir, **settings)
    with pytest.raises(KeyboardInterrupt):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, teacher=StandInTeacher(before_call=stop), **settings)
    assert 0 < len(kdata.open(tmp_path / "d").manifest) < len(whole.manifest)
    run_capture(tmp_path / "d", corpus_file, tokenizer_dir, **settings)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")
    other = run_capture(tmp_path / "other", corpus_file, tokenizer_dir, unit_tokens=300, **settings)
    assert len(other.manifest) < len(whole.manifest)
    rows = {row.id: row.sequence for row in other}
    for row in whole:
        for name in ("num_exact", "num_kept", "entry_ids", "entry_logprobs", "draw_logprobs"):
            np.testing.assert_array_equal(getattr(row.sequence, name), getattr(rows[row.id], name), err_msg=name)


def test_the_commands_keep_draws_by_need_of_a_real_model(tmp_path: Path, corpus_file: Path, llama_dir: Path) -> None:
    """Read, written in one pass, and read again by the same weights: the exact entries agree, and all data is whole."""
    from kdata.check.verify import verify
    from kdata.pipelines.cli.main import call

    who = ["--teacher", str(llama_dir), "--backend", "transformers", "--kind", "threshold", "--threshold", "0.01"]
    corpus, read, written = str(corpus_file), str(tmp_path / "read"), str(tmp_path / "written")
    assert call(["capture", read, "--corpus", corpus, *who, "--set", "corpus.limit=6"]) == 0
    prompts = ["--prompts", corpus, "--text-column", "text", "--max-tokens", "6", "--set", "prompts.limit=6"]
    assert call(["generate", written, *prompts, *who]) == 0
    for place in (read, written):
        assert call(["reread", place, f"{place}-again", *who[:4], "--set", "draw_seed=0"]) == 0
        first, second = kdata.open(place), kdata.open(f"{place}-again")
        assert first.info.codec == second.info.codec and first.info.codec.parameters["threshold"] == 0.01
        assert verify(first, deep=True) == verify(second, deep=True) == []
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.num_exact, two.num_exact)
            drawn = (one.num_kept - one.num_exact)[one.target_mask]
            assert drawn.min() >= 1 and one.num_kept.max() <= 102 and len(set(drawn)) > 1
            if place == read:
                np.testing.assert_array_equal(one.entry_ids, two.entry_ids)


def test_draws_are_unbiased() -> None:
    """Averaged over many seeds, the weights are the dense distribution."""
    teacher, ids, rounds = StandInTeacher(), np.array([0, 40, 50], np.int32), 200
    mean_V = np.zeros(VOCAB)
    for seed in range(rounds):
        kept = teacher.readout(ids, KeepConfig(kind="hybrid", k=4, num_draws=64, draw_seed=seed), start=2).kept
        np.add.at(mean_V, kept.ids, np.exp(kept.logprobs.astype(np.float64)) / rounds)
    dense_V = np.exp(teacher.dense(ids)[2])
    assert (np.abs(mean_V - dense_V) < 5 * np.sqrt(dense_V / (64 * rounds)) + 1e-4).all()


def test_the_index_agrees_with_the_payload(captured: Path) -> None:
    dataset = kdata.open(captured)
    for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True):
        target = sequence.target_mask
        assert row["num_tokens"] == len(sequence.token_ids) and row["num_target_tokens"] == target.sum()
        assert_logprobs(row["nll"], -sequence.logprob[target].mean())
        assert_logprobs(row["mean_entropy"], sequence.entropy[target].mean(), times=0.5)
        assert row["kept_mass"] == pytest.approx(1 - np.exp(sequence.log_tail[target]).mean(), abs=0.01)
        assert row["num_bytes"] == len(row["text"].encode())
        assert (row["source"], row["license"]) == ("capture", "CC0-1.0") and row["origin"].startswith("book")


def test_the_dataset_carries_its_tokenizer(captured: Path, tokenizer_dir: Path) -> None:
    dataset = kdata.open(captured)
    own = load_tokenizer(dataset.tokenizer_dir)
    text = "the cat 🙂"
    assert own(text)["input_ids"] == load_tokenizer(tokenizer_dir)(text)["input_ids"]
    row = dataset.index().to_pylist()[0]
    assert own(row["text"])["input_ids"] == dataset[0].token_ids.tolist()


def test_empty_texts_go_to_rejects_with_the_reason(captured: Path) -> None:
    dataset = kdata.open(captured)
    assert dataset.sql("select id, reason from rejects").to_pylist() == [{"id": "doc-005", "reason": "empty"}]
    assert "doc-005" not in dataset.index(["id"])["id"].to_pylist()
    assert sum(entry.rejected for entry in dataset.manifest) == 1


@pytest.mark.parametrize("append_eos", [False, True])
def test_a_long_text_is_split_and_its_pieces_join_to_the_whole(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path, append_eos: bool
) -> None:
    corpus = jsonl([{"id": "long", "domain": "d", "text": LONG}, {"id": "short", "domain": "d", "text": "the cat"}])
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, max_tokens=24, append_eos=append_eos)
    rows = {row["id"]: (row, sequence) for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True)}
    pieces = [name for name in rows if name.startswith("long#")]
    assert len(pieces) > 4 and pieces == [f"long#{n}" for n in range(len(pieces))] and "short" in rows
    assert "".join(rows[name][0]["text"] for name in pieces) == LONG
    whole = load_tokenizer(tokenizer_dir)(LONG, add_special_tokens=False)["input_ids"]
    ids = [token for name in pieces for token in rows[name][1].token_ids.tolist()[1:]]
    assert ids == whole + [EOS] * append_eos
    for row, sequence in rows.values():
        assert len(sequence.token_ids) <= 24
        assert (sequence.token_ids[-1] == EOS) == (append_eos and row["id"] in (pieces[-1], "short"))


def test_a_long_text_can_be_rejected_or_refused(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    corpus = jsonl([{"id": "long", "domain": "d", "text": LONG}, {"id": "short", "domain": "d", "text": "the cat"}])
    dataset = run_capture(tmp_path / "a", corpus, tokenizer_dir, long_text="reject")
    assert dataset.index(["id"])["id"].to_pylist() == ["short"]
    [reject] = dataset.sql("select * from rejects").to_pylist()
    assert (reject["id"], reject["reason"]) == ("long", "too_long") and "the limit is 64" in reject["detail"]
    with pytest.raises(TooLongError, match=r"long: the text has .* the limit is 64; set long_text"):
        run_capture(tmp_path / "b", corpus, tokenizer_dir, long_text="refuse")


def test_one_token_without_a_prefix_has_nothing_to_predict(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    from tests.fakes import save_tokenizer

    save_tokenizer(tmp_path / "bare", bos=False)
    corpus = jsonl([{"id": "x", "domain": "d", "text": "t"}])
    dataset = run_capture(tmp_path / "d", corpus, tmp_path / "bare")
    assert dataset.num_rows == 0
    assert dataset.sql("select id, reason from rejects").to_pylist() == [{"id": "x", "reason": "no_targets"}]


def test_invalid_settings_are_refused(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError, match="k=300 must be below the vocabulary size 300"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, k=300)
    with pytest.raises(ConfigError, match="max_tokens=2 leaves no room"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, max_tokens=2)
    with pytest.raises(
        ConfigError, match=r"not one row could be used.*head of 200 rows; name a model folder with its own"
    ):
        run_capture(tmp_path / "e", corpus_file, tokenizer_dir, teacher=StandInTeacher(vocab_size=200))


def test_transformers_teacher_is_the_plain_forward_pass(
    tmp_path: Path, llama_dir: Path, jsonl: Callable[..., Path]
) -> None:
    """The real Llama against logits that are computed here, dense and in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from kdata.corpus.corpus import CorpusConfig
    from kdata.jobs.reading import capture

    corpus = jsonl(rows_of_text(5))
    who = TeacherConfig(model=str(llama_dir), backend="transformers", batch_tokens=64)
    dataset = capture(tmp_path / "d", CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="topk", k=8), who)
    assert isinstance(dataset.info.teacher, TeacherInfo) and dataset.info.teacher.weights_hash
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float64)
    for sequence in dataset:
        with torch.inference_mode():
            logits = model(torch.tensor([sequence.token_ids.tolist()])).logits[0]
        dense_TV = torch.log_softmax(logits, -1).numpy()
        for t in range(1, len(sequence.token_ids)):
            assert_logprobs(sequence.logprob[t], dense_TV[t - 1, sequence.token_ids[t]])
            span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
            np.testing.assert_allclose(
                sequence.entry_logprobs[span], dense_TV[t - 1, sequence.entry_ids[span]], atol=0.07
            )
            kept = np.exp(dense_TV[t - 1, sequence.entry_ids[span]]).sum()
            assert_tails(np.exp(sequence.log_tail[t]), 1 - kept)


# ------------------------------------------------------------------------------------------------------------ chats

CALL = {"type": "function", "function": {"name": "w", "arguments": {"at": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "w"}}]
CHATS = {
    "two": [("user", "the cat"), ("assistant", "sat on 🙂"), ("user", "and?"), ("assistant", "the mat")],
    "call": [("user", "?"), ("assistant", "so", [CALL]), ("tool", "sun"), ("assistant", "sun")],
    "mute": [("user", "the dog")],
    "none": [],
    "long": [("user", "the cat sat on the mat " * 60), ("assistant", "so")],
}


def chat_rows(*names: str) -> list[dict[str, object]]:
    return [
        {
            "id": name,
            "domain": "chat",
            "messages": [
                {"role": role, "content": content, **({"tool_calls": calls[0]} if calls else {})}
                for role, content, *calls in CHATS[name]
            ],
            "tools": TOOLS if name == "call" else None,
        }
        for name in names or CHATS
    ]


CHAT_COLUMNS = {"messages_column": "messages", "tools_column": "tools"}


def capture_chats(root: Path, corpus: Path, tokenizer: Path, **settings: object) -> kdata.Dataset:
    teacher = settings.pop("teacher", None) or StandInTeacher(context=200)
    columns = {**CHAT_COLUMNS, **settings.pop("reading", {})}  # type: ignore[dict-item]
    return run_capture(root, corpus, tokenizer, teacher=teacher, reading=columns, **settings)


@pytest.mark.parametrize("kind", ["hybrid", "topk", "threshold"])
def test_only_the_assistant_s_tokens_of_a_chat_are_recorded(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path, kind: str
) -> None:
    temperatures = [2.0] if kind == "hybrid" else []
    dataset = capture_chats(tmp_path / "d", jsonl(chat_rows()), chatty, kind=kind, temperatures=temperatures)
    teacher, tokenizer = StandInTeacher(), load_tokenizer(chatty)
    rows = {row["id"]: (row, sequence) for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True)}
    assert list(rows) == ["two", "call"]
    expected = {"two": f"sat on 🙂{TURN_END}the mat{TURN_END}", "call": None}
    for name, (row, sequence) in rows.items():
        target, ids = sequence.target_mask, sequence.token_ids
        assert ids.tolist() == tokenizer.apply_chat_template(
            json.loads(row["messages"]), tools=json.loads(row["tools"] or "null")
        )["input_ids"]  # fmt: skip
        if expected[name]:
            assert tokenizer.decode(ids[target]) == expected[name]
        assert 0 < target.sum() < len(ids) - 1
        np.testing.assert_array_equal(sequence.num_kept > 0, target)
        np.testing.assert_array_equal(sequence.rank > 0, target)
        for values in (sequence.logprob, sequence.log_tail, sequence.entropy):
            np.testing.assert_array_equal(np.isfinite(values), target)
        whole = teacher.readout(ids, KeepConfig(kind=kind, k=8, temperatures=temperatures))
        dense_TV = teacher.dense(ids)
        assert_logprobs(sequence.logprob[target], dense_TV[np.arange(len(ids)), ids][target])
        # Entry for entry those of a reading of all positions: what is cut changes nothing of what stays.
        wanted = np.repeat(target, whole.kept.num_kept)
        np.testing.assert_array_equal(sequence.entry_ids, whole.kept.ids[wanted])
        if temperatures:
            assert sequence.log_z is not None and whole.log_z is not None
            np.testing.assert_array_equal(sequence.log_z[target], whole.log_z[target])
        assert row["num_target_tokens"] == target.sum() and row["nll"] == pytest.approx(
            -dense_TV[np.arange(len(ids)), ids][target].mean(), rel=1e-5
        )


def test_the_index_of_a_chat_holds_its_messages_and_the_rendered_text(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    dataset = capture_chats(tmp_path / "d", jsonl(chat_rows("two", "call")), chatty)
    for row, asked, sequence in zip(dataset.index().to_pylist(), chat_rows("two", "call"), dataset, strict=True):
        assert json.loads(row["messages"]) == asked["messages"]
        assert json.loads(row["tools"] or "null") == asked["tools"]
        assert row["text"].count("<|im_start|>") == 4 + bool(asked["tools"])
        assert load_tokenizer(chatty)(row["text"], add_special_tokens=False)["input_ids"] == sequence.token_ids.tolist()
    settings = dataset.info.sources["capture"].settings
    assert (settings["targets"], settings["long_text"]) == ("assistant", "reject")
    assert settings["corpus"]["messages_column"] == "messages"
    assert dataset.info.tokenizer.chat_template_hash is not None
    query = "select json_extract_string(messages, '$[0].role') as first from rows"
    assert dataset.sql(query)["first"].to_pylist() == ["user", "user"]


def test_bytes_of_a_chat_s_tokens_are_those_of_its_text(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    dataset = capture_chats(tmp_path / "d", jsonl(chat_rows("two")), chatty)
    [row] = dataset.index(["text"]).to_pylist()
    token_bytes = dataset.token_bytes(0)
    assert token_bytes is not None and token_bytes.sum() == len(row["text"].encode())


@pytest.mark.parametrize(("targets", "calls"), [("all", True), ("last_assistant", True), ("assistant", False)])
def test_targets_are_those_of_the_encoder(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path, targets: str, calls: bool
) -> None:
    dataset = capture_chats(
        tmp_path / "d", jsonl(chat_rows("two", "call")), chatty, targets=targets, tool_call_targets=calls
    )
    tokenizer = load_tokenizer(chatty)
    encoder = ChatEncoder(tokenizer, TextEncoder(tokenizer))
    for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True):
        chat = Chat(json.loads(row["messages"]), json.loads(row["tools"] or "null"))
        wanted = encoder.whole(chat, targets, tool_calls=calls)  # type: ignore[arg-type]
        np.testing.assert_array_equal(sequence.target_mask, wanted.target_mask)
    with pytest.raises(MismatchError, match="targets" if calls else "tool_call_targets"):
        capture_chats(tmp_path / "d", jsonl(chat_rows("two", "call")), chatty)


def test_chats_that_are_not_read_are_in_rejects_with_the_reason(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    unclear = {"id": "first", "domain": "chat", "messages": [{"role": "assistant", "content": "x"}], "tools": None}
    dataset = capture_chats(tmp_path / "d", jsonl([*chat_rows(), unclear]), chatty)
    reasons = {row["id"]: (row["reason"], row["detail"]) for row in dataset.sql("select * from rejects").to_pylist()}
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "mute": "no_targets", "none": "empty", "long": "too_long", "first": "template",
    }  # fmt: skip
    assert "the chat has" in reasons["long"][1] and "speaks first" in reasons["first"][1]
    with pytest.raises(TooLongError, match=r"long: the chat has .* set long_text to reject, or raise"):
        capture_chats(tmp_path / "e", jsonl(chat_rows()), chatty, long_text="refuse")
    with pytest.raises(ConfigError, match=r"not one chat could be used. first: the assistant speaks first"):
        capture_chats(tmp_path / "f", jsonl([unclear]), chatty)


def test_a_unit_with_rejects_only_is_a_shard_too(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    """Further temperatures ask for a number with each draw; here there are no draws."""
    texts = ("the cat", "the dog " * 90)
    corpus = jsonl([{"id": str(n), "domain": "d", "text": text} for n, text in enumerate(texts)])
    dataset = run_capture(tmp_path / "d", corpus, tokenizer_dir, temperatures=[2.0], unit_tokens=2, long_text="reject")
    assert [(entry.rows, entry.rejected) for entry in dataset.manifest] == [(1, 0), (0, 1)]


def test_a_tokenizer_without_a_template_is_refused(
    tmp_path: Path, jsonl: Callable[..., Path], tokenizer_dir: Path
) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        capture_chats(tmp_path / "d", jsonl(chat_rows()), tokenizer_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": {"path": "x", "messages_column": "m"}, "long_text": "split"}, "pieces of a chat are no chats"),
        ({"corpus": {"path": "x", "messages_column": "m"}, "append_eos": True}, "ends the turns of a chat itself"),
        ({"corpus": {"path": "x"}, "targets": "assistant"}, "name a messages_column"),
        ({"corpus": {"path": "x"}, "tool_call_targets": False}, "name a messages_column"),
        ({"corpus": {"path": "x", "messages_column": "m"}, "targets": "user"}, "targets: Input should be"),
    ],
)
def test_settings_of_chats_and_texts_do_not_mix(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(CaptureConfig, settings, "capture settings")


def test_a_stopped_capture_of_chats_resumes_to_the_same_bytes(
    tmp_path: Path, jsonl: Callable[..., Path], chatty: Path
) -> None:
    def stop(call: int) -> None:
        if call == 2:
            raise KeyboardInterrupt

    rows = [{**row, "id": f"{row['id']}-{n}"} for n in range(4) for row in chat_rows("two", "call")]
    whole = capture_chats(tmp_path / "whole", jsonl(rows), chatty, unit_tokens=60)
    with pytest.raises(KeyboardInterrupt):
        capture_chats(
            tmp_path / "d", jsonl(rows), chatty, unit_tokens=60, teacher=StandInTeacher(context=200, before_call=stop)
        )
    assert 0 < len(kdata.open(tmp_path / "d").manifest) < len(whole.manifest)
    capture_chats(tmp_path / "d", jsonl(rows), chatty, unit_tokens=60)
    assert digests(tmp_path / "d") == digests(tmp_path / "whole")


@given(data=st.data(), kind=st.sampled_from(["topk", "adaptive", "sampled", "hybrid", "threshold"]))
def test_a_readout_of_chosen_positions_is_empty_elsewhere(data: st.DataObject, kind: str) -> None:
    keep = KeepConfig(kind=kind, k=5, min_k=1, num_draws=4, temperatures=[0.5, 2.0] if kind == "hybrid" else [])
    whole = StandInTeacher().readout(np.arange(9, dtype=np.int32), keep)
    chosen = np.array([False, *data.draw(st.lists(st.booleans(), min_size=8, max_size=8))])
    cut = whole.only(chosen)
    assert cut.kept.num_kept[~chosen].sum() == 0 and (cut.rank[~chosen] == 0).all()
    for name in ("logprob", "log_tail", "entropy", "log_z"):
        ours, theirs = getattr(cut, name), getattr(whole, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype and np.isnan(ours[~chosen]).all()
            np.testing.assert_array_equal(ours[chosen], theirs[chosen])
    begins = np.cumsum(whole.kept.num_kept) - whole.kept.num_kept
    entries = [np.arange(begins[t], begins[t] + whole.kept.num_kept[t]) for t in np.flatnonzero(chosen)]
    stays = np.concatenate([np.zeros(0, int), *entries]).astype(int)
    np.testing.assert_array_equal(cut.kept.ids, whole.kept.ids[stays])
    np.testing.assert_array_equal(cut.kept.logprobs, whole.kept.logprobs[stays])
    np.testing.assert_array_equal(cut.kept.is_draw, whole.kept.is_draw[stays])
    if whole.kept.draw_logprobs is not None:
        draws = np.cumsum(whole.kept.is_draw)[stays[whole.kept.is_draw[stays]]] - 1
        assert cut.kept.draw_logprobs is not None
        np.testing.assert_array_equal(cut.kept.draw_logprobs, whole.kept.draw_logprobs[draws])


def test_the_dataset_carries_every_chat_template(
    tmp_path: Path, jsonl: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A model may have one for tools beside the default; together they choose by the row."""
    other = CHATML.replace("<|im_start|>system", "<|im_start|>tools")
    tokenizer = save_tokenizer(tmp_path / "t", chat_template=CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": other}
    tokenizer.save_pretrained(tmp_path / "t")
    dataset = capture_chats(tmp_path / "d", jsonl(chat_rows("two", "call")), tmp_path / "t")
    assert [row["text"].startswith("<|im_start|>tools") for row in dataset.index().to_pylist()] == [False, True]
    assert load_tokenizer(dataset.tokenizer_dir).chat_template == {"default": CHATML, "tool_use": other}


def test_a_recipe_takes_the_settings_of_chats(tmp_path: Path) -> None:
    from kdata.pipelines.recipe import load_recipe

    recipe = load_recipe(
        Path("quickstart"),
        [
            "corpus.path=x",
            "corpus.messages_column=messages",
            "capture.tool_call_targets=false",
            "capture.long_text=null",
        ],
    )
    config = recipe.capture_config(recipe.corpus, "capture")
    assert (config.counted, config.when_long, config.tool_call_targets) == ("assistant", "reject", False)
    assert recipe.generate is not None and recipe.generate.prompts.text_column == "prompt"
    with pytest.raises(ConfigError, match="name a messages_column"):
        recipe.capture_config(recipe.heldout, "heldout")
