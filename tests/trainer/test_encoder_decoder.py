"""Encoder-decoder students: each hidden state predicts the token that the teacher predicted, against a dense oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaForConditionalGeneration,
)

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError, DataError
from kdata.format.positions import ChosenPositions
from kdata.loader.batches import BatchesConfig
from kdata.selection.plan import make_plan
from kdata.trainer.config import CheckpointStudent, EvaluateConfig, ScratchStudent, TrainConfig
from kdata.trainer.documents import refuse_unfit
from kdata.trainer.drafts import refuse_other_sizes
from kdata.trainer.encoder_decoder import PROMPT_SHARE, probe, start_token, with_prompts
from kdata.trainer.evaluate import evaluate
from kdata.trainer.forward import predicting_states
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.parts.student import causal_lm_of
from kdata.trainer.student import attend_by_documents, build_student
from kdata.trainer.train import train
from tests.fakes import rows_of_text, run_capture, write_jsonl
from tests.trainer.datasets import VOCAB, chain_of, make_dataset, save_tokenizer
from tests.trainer.runs import lines
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(40)]
KEPT = 8
SIZES: dict[str, Any] = {
    "architecture": "t5gemma",
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "max_positions": 64,
}
IDS: dict[str, int] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}
BART = BartConfig(
    vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, dropout=0.0, forced_eos_token_id=None, **IDS,
)  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0, **IDS,
}  # fmt: skip


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kdata.Dataset]:
    """Documents without a prompt, with one of 4 tokens, and with one and gaps behind it."""
    root = tmp_path_factory.mktemp("data")
    kinds: dict[str, dict[str, int]] = {"plain": {}, "prompts": {"prompt": 4}, "gaps": {"prompt": 4, "mask_every": 5}}
    return {name: make_dataset(root / name, LENGTHS, kept=KEPT, **own) for name, own in kinds.items()}


def model_of(kind: str, dataset: kdata.Dataset) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bart":
            return BartForConditionalGeneration(BART)
        if kind == "t5":
            return T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=False))
    return build_student(ScratchStudent(**SIZES, init_std=0.2), dataset, 0)


def config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": {"kind": "scratch", **SIZES}, "steps": 6, "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0,
        "learning_rate": 1e-2, "log_every_steps": 1, "checkpoint_every_steps": 2,
    }  # fmt: skip
    return parse_config(TrainConfig, {**values, **changes}, "test")


def oracle(model: PreTrainedModel, ids: list[int], prompt: int, targets: list[int]) -> Tensor:
    """Cross-entropy and KL of the kept entries and one bucket at some positions of one document, [M, 2], by plain softmax.

    The teacher is the chain itself, and the model is called as anybody calls it.
    """
    decoder = torch.tensor([[0, *ids[prompt:-1]]])
    logits = model(
        input_ids=torch.tensor([ids[:prompt]]), attention_mask=torch.ones(1, prompt, dtype=torch.long),
        decoder_input_ids=decoder, decoder_attention_mask=torch.ones_like(decoder),
    ).logits[0]  # fmt: skip
    log_q, chain = logits.log_softmax(-1), torch.from_numpy(chain_of())
    values = []
    for target in targets:
        own, p = log_q[target - prompt], chain[ids[target - 1]]
        top = p.topk(KEPT).indices
        rest, rest_q = 1 - p[top].sum(), 1 - own[top].exp().sum()
        kl = (p[top] * (p[top].log() - own[top])).sum() + rest * (rest.log() - rest_q.log())
        values.append(torch.stack([-own[ids[target]], kl]))
    return torch.stack(values)


def targets_of(name: str, length: int) -> tuple[int, list[int]]:
    """Tokens of the prompt and the positions that count behind it, worked out from how the data was made."""
    if name == "plain":
        prompt = -(-length // 2)
        return prompt, list(range(prompt, length))
    counted = [t for t in range(1, length) if t >= min(4, length - 1) and (name == "prompts" or t % 5)]
    return (counted[0] if counted else length), counted


@pytest.mark.parametrize("name", ["plain", "prompts", "gaps"])
@pytest.mark.parametrize("kind", ["t5gemma", "bart", "t5"])
def test_value_and_gradient_are_those_of_a_dense_softmax_of_each_document_alone(
    kind: str, name: str, datasets: dict[str, kdata.Dataset]
) -> None:
    dataset = datasets[name]
    model = model_of(kind, dataset).double().train()
    setattr(model.config, PROMPT_SHARE, 0.5)
    mix = ObjectiveConfig(weights={"cross_entropy": 0.4, "forward_kl": 0.6})
    packed = next(Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=6)).epoch())
    batch = with_prompts(model, packed)
    assert with_prompts(model, batch).predictor_M.equal(batch.predictor_M)
    total, values_MO = Learner(model)(batch, mix, "ghost", len(batch.targets))
    total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    expected, texts = [], dataset.index(["text"])["text"].to_pylist()
    for row in batch.rows.tolist():
        ids = [int(word[1:]) for word in texts[row].split()]
        prompt, targets = targets_of(name, len(ids))
        if targets:
            expected.append(oracle(model, ids, prompt, targets))
    dense_MO = torch.cat(expected)
    assert len(dense_MO) == len(batch.targets) > 50 and len(batch.rows) > 8
    torch.testing.assert_close(values_MO[:, 0].double(), dense_MO[:, 0].detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values_MO[:, 1].double(), dense_MO[:, 1].detach(), rtol=5e-3, atol=2e-2)  # as stored
    (dense_MO @ torch.tensor([0.4, 0.6], dtype=torch.float64) / len(dense_MO)).sum().backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert own.keys() == gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in own.values())
    for parameter, gradient in own.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-2, atol=1e-3 * largest)


def test_a_student_learns_is_measured_and_writes(datasets: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    dataset = datasets["prompts"]
    settings = config(student={"kind": "scratch", **SIZES, "hidden_size": 32}, steps=250, checkpoint_every_steps=0)
    result = train(settings, dataset.path, None, tmp_path / "run")
    assert (
        result.losses["forward_kl"] < 0.3 < 1.5 < lines(tmp_path / "run")[0]["forward_kl"]
    )  # a position off: impossible
    prompts = [{"domain": "prose", "prompt": "w3 w4 w5"}]
    measured = evaluate(
        tmp_path / "run" / "model", dataset.path, prompts=prompts, config=EvaluateConfig(sample_tokens=8)
    )
    assert measured["overall"]["kl"] == pytest.approx(result.losses["forward_kl"], abs=0.1)
    assert measured["overall"]["tokens"] == sum(len(targets_of("prompts", length)[1]) for length in LENGTHS)
    assert measured["samples"][0]["text"] and measured["diversity"]["tokens"] <= 8
    again = build_student(CheckpointStudent(model=str(tmp_path / "run" / "model")), dataset, 0)
    assert isinstance(again, T5GemmaForConditionalGeneration) and getattr(again.config, PROMPT_SHARE) == 0.5
    assert start_token(again) == 0 == again.generation_config.decoder_start_token_id


def test_the_share_of_plain_text_stands_in_the_model_and_evaluation_follows_it(
    datasets: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    dataset = datasets["plain"]
    train(config(prompt_share=0.25, steps=2), dataset.path, None, tmp_path / "run")
    expected = sum(length - -(-length // 4) for length in LENGTHS)
    assert evaluate(tmp_path / "run" / "model", dataset.path)["overall"]["tokens"] == expected


def test_a_resumed_run_is_exact(datasets: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    dataset = datasets["gaps"]
    train(config(), dataset.path, None, tmp_path / "whole")
    stop_before(4, config(), dataset, tmp_path / "run")
    torch.manual_seed(99)
    train(config(gradient_checkpointing=True), dataset.path, None, tmp_path / "run")
    figures = [[(r["loss"], r["grad_norm"]) for r in lines(tmp_path / name)] for name in ("run", "whole")]
    assert figures[0] == figures[1]
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_micro_batches_change_nothing_but_the_order_of_sums(datasets: dict[str, kdata.Dataset], tmp_path: Path) -> None:
    for name, micro in (("one", 256), ("four", 64)):
        train(config(micro_batch_tokens=micro), datasets["plain"].path, None, tmp_path / name)
    one, four = (lines(tmp_path / name) for name in ("one", "four"))
    assert [r["target_tokens"] for r in one] == [r["target_tokens"] for r in four]
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in four], rel=1e-4)


def test_a_batch_without_a_counted_token_still_reaches_every_parameter(datasets: dict[str, kdata.Dataset]) -> None:
    dataset = datasets["prompts"]
    model = model_of("t5gemma", dataset)
    batch = next(Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=1)).epoch())
    setattr(model.config, PROMPT_SHARE, 0.5)
    emptied = with_prompts(model, batch)
    none = torch.zeros(len(emptied.targets), dtype=torch.bool)
    emptied = type(batch)(
        **{
            **vars(emptied),
            "predictor_M": emptied.predictor_M[none],
            "targets": emptied.targets.each(lambda t: t[none]),
        }
    )
    states = predicting_states(model, emptied)
    assert states.shape == (0, 16)
    states.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters())


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> kdata.Dataset:
    """A dataset that keeps distributions at a third of its positions."""
    root = tmp_path_factory.mktemp("some")
    corpus = write_jsonl(root / "corpus.jsonl", rows_of_text(30))
    return run_capture(root / "d", corpus, tokenizer_dir, positions={"rule": "random", "share": 0.3})


@pytest.mark.parametrize("by_plan", [False, True])
def test_the_encoder_reads_the_same_whatever_counts(
    by_plan: bool, some: kdata.Dataset, datasets: dict[str, kdata.Dataset]
) -> None:
    dataset = datasets["gaps"] if by_plan else some
    model = model_of("t5gemma", dataset).eval()
    setattr(model.config, PROMPT_SHARE, 0.5)
    chosen, rows = None, None
    if by_plan:
        rng = np.random.default_rng(0)
        targets = [np.flatnonzero(row.target_mask) for row in dataset]
        own = [t[t > 0][rng.random((t > 0).sum()) < 0.3] for t in targets]
        rows = np.flatnonzero([len(one) for one in own])
        offsets = np.cumsum([0, *(len(own[row]) for row in rows)])
        chosen = ChosenPositions(rows, offsets, np.concatenate([own[row] for row in rows]).astype(np.int32))
    sizes = BatchesConfig(context_tokens=64, batch_rows=4)
    states: list[dict[tuple[int, int], Tensor]] = []
    for elsewhere in (False, True):
        states.append({})
        for batch in Loader(dataset, rows, sizes, positions=chosen, elsewhere=elsewhere).epoch():
            counted = with_prompts(model, batch)
            with torch.no_grad():
                hidden_MD = predicting_states(model, counted)
            places = counted.position_ids.flatten()[counted.predictor_M].tolist()
            keys = zip(counted.rows[counted.document_M].tolist(), places, strict=True)
            states[-1] |= dict(zip(keys, hidden_MD, strict=True))
    assert 20 < len(states[0]) < 0.5 * len(states[1])
    for place, hidden_D in states[0].items():
        torch.testing.assert_close(hidden_D, states[1][place], rtol=1e-4, atol=1e-4)


def test_positions_that_the_encoder_reads_are_no_training_data(
    datasets: dict[str, kdata.Dataset], tmp_path: Path, tokenizer_dir: Path
) -> None:
    plain = datasets["plain"]
    nothing = "no token that counts is left behind the prompts"
    ids = plain.index(["id"])["id"].to_pylist()
    early = make_plan(plain, "early", ids, method="mine", parameters={}, positions=[np.array([1, 2])] * len(ids))
    early.save(tmp_path / "plans")
    with pytest.raises(DataError, match=nothing):
        train(config(), plain.path, tmp_path / "plans" / "early.parquet", tmp_path / "run")
    texts = {"late": "on the mat and the dog on the mat and the cat sat.", "early": "the cat sat. " + "on the mat " * 6}
    rows = {
        name: [{"id": f"{name}{i}", "domain": name, "text": text, "source": "s", "license": "c"} for i in range(8)]
        for name, text in texts.items()
    }
    spans = {"rule": "span", "begin": "cat ", "end": r"\."}
    first, both, whole = (
        run_capture(tmp_path / name, write_jsonl(tmp_path / f"{name}.jsonl", own), tokenizer_dir, **settings)
        for name, own, settings in (
            ("first", rows["early"], {"positions": spans}),
            ("both", rows["early"] + rows["late"], {"positions": spans}),
            ("whole", rows["early"] + rows["late"], {}),
        )
    )
    with pytest.raises(DataError, match=nothing):
        train(config(), first.path, None, tmp_path / "run")
    mixture = {"kind": "fixed", "every_steps": 2, "weights": {"early": 1.0, "late": 0.0}}
    with pytest.raises(DataError, match=nothing):
        train(config(mixture=mixture), both.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()

    assert train(config(steps=2), both.path, None, tmp_path / "late").target_tokens
    train(config(steps=2), whole.path, None, tmp_path / "run")
    with pytest.raises(DataError, match=nothing):
        evaluate(tmp_path / "run" / "model", first.path)
    with pytest.raises(DataError, match="no distribution is kept at any target behind the prompts of domain 'early'"):
        evaluate(tmp_path / "run" / "model", both.path)


def test_a_run_in_which_no_token_counted_is_an_error(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "short", [2] * 400 + [40])
    settings = config(prompt_share=0.9, steps=1, batch_tokens=64, data_order="seed")
    with pytest.raises(DataError, match="no token of 1 steps counted"):
        train(settings, dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()


def test_bad_data_and_settings_are_refused_by_name_before_training(
    datasets: dict[str, kdata.Dataset], tmp_path: Path
) -> None:
    plain = datasets["plain"]
    with pytest.raises(ConfigError, match=r"row 'doc-0' of .* has no prompt for the encoder"):
        train(config(prompt_share=None), plain.path, None, tmp_path / "run")
    short = make_dataset(tmp_path / "short", [2] * 8)
    with pytest.raises(DataError, match=r"no token that counts is left behind the prompts \(prompt_share=0.9\)"):
        train(config(prompt_share=0.9), short.path, None, tmp_path / "run")
    with pytest.raises(DataError, match="a document has 44 tokens, the student has 32 positions"):
        small = build_student(ScratchStudent(**SIZES | {"max_positions": 32}), plain, 0)
        small.save_pretrained(tmp_path / "small")
        save_tokenizer(tmp_path / "small")
        student = {"kind": "checkpoint", "model": str(tmp_path / "small")}
        train(config(student=student), plain.path, None, tmp_path / "run")
    with pytest.raises(ConfigError, match="objective alm does not go with T5Gemma"):
        train(config(objective={"weights": {"alm": 1.0}}), plain.path, None, tmp_path / "run")
    with pytest.raises(ConfigError, match="mixture ddk does not go with T5Gemma"):
        train(config(mixture={"kind": "ddk", "every_steps": 2}), plain.path, None, tmp_path / "run")
    for change in ({"lora": {"rank": 2}}, {"keep_layers": 1}):
        student = {"kind": "checkpoint", "model": str(tmp_path / "small"), **change}
        with pytest.raises(ConfigError, match=f"student.{next(iter(change))} does not go with T5Gemma"):
            train(config(student=student), plain.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_that_do_not_fit_are_refused(datasets: dict[str, kdata.Dataset]) -> None:
    plain = datasets["plain"]
    student = model_of("t5gemma", plain)
    llama = build_student(ScratchStudent(hidden_size=16, num_layers=1, num_heads=2), plain, 0)
    with pytest.raises(ConfigError, match="logit scaling"):
        probe(T5ForConditionalGeneration(T5Config(**T5)).eval())
    with pytest.raises(ConfigError, match="draft_for: the student is a T5Gemma"):
        refuse_other_sizes(llama, student, 8)
    with pytest.raises(ConfigError, match="attention=varlen does not fit T5Gemma"):
        attend_by_documents(student)
    with pytest.raises(ConfigError, match="parallel=fsdp on 2 ranks does not go with T5Gemma"):
        refuse_unfit(student, config(parallel="fsdp"), 2)
    with pytest.raises(ConfigError, match="is an encoder-decoder, and the batches for other trainers"):
        causal_lm_of(student)
    bart = model_of("bart", plain).eval()
    encoder = bart.get_encoder()
    forward = encoder.forward
    encoder.forward = lambda attention_mask=None, **inputs: forward(**inputs)
    probe(model_of("bart", plain).eval())
    with torch.no_grad():
        for parameter in bart.parameters():
            parameter.mul_(4.0)
    with pytest.raises(ConfigError, match="see each other or their padding"):
        probe(bart)
