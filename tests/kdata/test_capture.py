"""Capture, proved against the dense oracle: every stored number is the one of the token it stands beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kdata
from kdata.errors import ConfigError, DataError, TooLongError
from kdata.keep import KeepConfig
from kdata.schema import TeacherInfo
from kdata.teachers import TeacherConfig, load_tokenizer
from tests.fakes import EOS, VOCAB, StandInTeacher, rows_of_text, run_capture

LONG = "the cat sat on the mat 🙂🙃 naïve café 日本語 " * 8


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tokenizer_dir: Path) -> dict[str, kdata.Dataset]:
    """One dataset of each kind."""
    settings = {
        "topk": {},
        "adaptive": {"mass": 0.8, "min_k": 2, "k": 20},
        "sampled": {"draws": 50},
        "hybrid": {"draws": 12, "temperatures": [2.0]},
    }
    root = tmp_path_factory.mktemp("kinds")
    short = {"limit": 8}
    return {
        kind: run_capture(root / kind, corpus_file, tokenizer_dir, kind=kind, reading=short, **fields)
        for kind, fields in settings.items()
    }


@pytest.mark.parametrize("kind", ["topk", "adaptive", "sampled", "hybrid"])
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
            assert sequence.logprob[t] == pytest.approx(dense_TV[t, token], rel=2**-10)
            assert sequence.rank[t] == 1 + (dense_TV[t] > dense_TV[t, token]).sum()
            assert sequence.entropy[t] == pytest.approx(-(p_V * dense_TV[t]).sum(), rel=2**-10)
            span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
            ids, weights = sequence.entry_ids[span], np.exp(sequence.entry_logprobs[span].astype(np.float64))
            exact = sequence.num_exact[t]
            assert ids[:exact].tolist() == np.argsort(-p_V, kind="stable")[:exact].tolist()
            np.testing.assert_allclose(np.log(weights[:exact]), dense_TV[t, ids[:exact]], atol=0.07)
            # The tail is exact: what was not kept, not 1 minus a rounded sum.
            tail = 1 - p_V[ids[:exact]].sum()
            assert np.exp(sequence.log_tail[t]) == pytest.approx(tail, rel=1e-4, abs=1e-6)
            assert weights.sum() <= 1.0
            if dataset.info.tail == "draws":
                assert not set(ids[:exact]) & set(ids[exact:])
                assert weights[exact:].sum() == pytest.approx(tail, rel=1e-4, abs=1e-6)


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
    assert [kinds[k].info.tail for k in ("topk", "adaptive", "sampled", "hybrid")] == [
        "ghost",
        "ghost",
        "draws",
        "draws",
    ]


def test_draws_are_unbiased() -> None:
    """Averaged over many seeds, the weights are the dense distribution."""
    teacher, ids, rounds = StandInTeacher(), np.array([0, 40, 50], np.int32), 200
    mean_V = np.zeros(VOCAB)
    for seed in range(rounds):
        kept = teacher.readout(ids, KeepConfig(kind="hybrid", k=4, draws=64, draw_seed=seed), start=2).kept
        np.add.at(mean_V, kept.ids, np.exp(kept.logprobs.astype(np.float64)) / rounds)
    dense_V = np.exp(teacher.dense(ids)[2])
    assert (np.abs(mean_V - dense_V) < 5 * np.sqrt(dense_V / (64 * rounds)) + 1e-4).all()


def test_the_index_says_what_the_payload_holds(captured: Path) -> None:
    dataset = kdata.open(captured)
    for row, sequence in zip(dataset.index().to_pylist(), dataset, strict=True):
        target = sequence.target_mask
        assert row["num_tokens"] == len(sequence.token_ids) and row["num_target_tokens"] == target.sum()
        assert row["nll"] == pytest.approx(-sequence.logprob[target].mean(), rel=1e-3)
        assert row["mean_entropy"] == pytest.approx(sequence.entropy[target].mean(), rel=1e-3)
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


def test_settings_that_cannot_be_are_refused(tmp_path: Path, corpus_file: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError, match="k=300 must be below the vocabulary size 300"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, k=300)
    with pytest.raises(ConfigError, match="max_tokens=2 leaves no room"):
        run_capture(tmp_path / "d", corpus_file, tokenizer_dir, max_tokens=2)
    with pytest.raises(DataError, match="the teacher's head only 200"):
        run_capture(tmp_path / "e", corpus_file, tokenizer_dir, teacher=StandInTeacher(vocab_size=200))


def test_transformers_teacher_is_the_plain_forward_pass(
    tmp_path: Path, llama_dir: Path, jsonl: Callable[..., Path]
) -> None:
    """The real Llama against logits that are computed here, dense and in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from kdata.capture import CaptureConfig, capture
    from kdata.corpus import CorpusConfig

    corpus = jsonl(rows_of_text(5))
    who = TeacherConfig(model=str(llama_dir), backend="transformers", batch_tokens=64)
    dataset = capture(tmp_path / "d", who, CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="topk", k=8))
    assert isinstance(dataset.info.teacher, TeacherInfo) and dataset.info.teacher.weights_hash
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float64)
    for sequence in dataset:
        with torch.inference_mode():
            logits = model(torch.tensor([sequence.token_ids.tolist()])).logits[0]
        dense_TV = torch.log_softmax(logits, -1).numpy()
        for t in range(1, len(sequence.token_ids)):
            assert sequence.logprob[t] == pytest.approx(dense_TV[t - 1, sequence.token_ids[t]], rel=1e-3)
            span = slice(sequence.entry_offsets[t], sequence.entry_offsets[t + 1])
            np.testing.assert_allclose(
                sequence.entry_logprobs[span], dense_TV[t - 1, sequence.entry_ids[span]], atol=0.07
            )
            kept = np.exp(dense_TV[t - 1, sequence.entry_ids[span]]).sum()
            assert np.exp(sequence.log_tail[t]) == pytest.approx(1 - kept, rel=1e-4)
