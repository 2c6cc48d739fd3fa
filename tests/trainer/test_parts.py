"""The parts for other trainers: data in our order with exact resume, layouts, losses as modules, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig

import kdata
from kdata.errors import ConfigError, DataError, MismatchError, OutOfRangeError
from kdata.loader.batches import BatchesConfig
from kdata.selection.ranked import Random
from kdata.trainer import parts
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.objectives import OBJECTIVES, Targets
from kdata.trainer.parts import (
    Collator,
    DistillationLoss,
    DistillSFTTrainer,
    DistillTrainer,
    Documents,
    LogitsLoss,
    PackedRows,
    RowStream,
    attach_loss,
)
from kdata.trainer.parts.student import loss_of
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer
from tests.trainer.oracle import AT_1

LENGTHS = [1 + (i * 7) % 44 for i in range(100)]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", LENGTHS, mask_every=4)


@pytest.fixture(scope="module")
def rows(dataset: kdata.Dataset) -> PackedRows:
    return PackedRows(dataset, context_tokens=64, items=12)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "initializer_range": 0.2, **changes}))


def batch_of(data: Any, count: int, layout: Any = "rows") -> dict[str, Any]:
    return Collator(layout)([data[number] for number in range(count)])


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    one, other = left["targets"].targets, right["targets"].targets
    widths = min(one.ids_CK.shape[1], other.ids_CK.shape[1])
    return (
        all(torch.equal(left[key], right[key]) for key in ("input_ids", "position_ids", "labels"))
        and torch.equal(left["targets"].predictor_M, right["targets"].predictor_M)
        and torch.equal(one.ids_CK[:, :widths], other.ids_CK[:, :widths])
        and torch.equal(one.logprobs_CK[:, :widths], other.logprobs_CK[:, :widths])
        and torch.equal(one.log_tail_C, other.log_tail_C)
    )


def test_every_public_name_is_there() -> None:
    for name in parts.__all__:
        assert getattr(parts, name).__name__ == name or name == "Layout"
    assert dir(parts) == sorted(parts.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = parts.nothing


def test_items_are_the_rows_of_our_stream(dataset: kdata.Dataset) -> None:
    """Over several windows and epochs, in any order of access, and with a plan."""
    plan = kdata.select(dataset, Random(name="half", share=0.5))
    for rows_of_plan, chosen in ((None, None), (plan.rows(dataset), plan)):
        config = BatchesConfig(context_tokens=64, batch_rows=1, window_documents=16, seed=3)
        data = PackedRows(dataset, chosen, context_tokens=64, seed=3, items=90, window_documents=16)
        stream = list(islice(Loader(dataset, rows_of_plan, config), 90))
        assert len({batch.place.epoch for batch in stream}) > 1
        order = [*range(90), *np.random.default_rng(0).permutation(90).tolist(), 5, 5]
        for number in order:
            item, batch = data[number], stream[number]
            assert torch.equal(item["input_ids"], batch.input_ids[0])
            assert torch.equal(item["segment_ids"], batch.segment_ids[0])
            assert torch.equal(item["targets"].predictor_M, batch.predictor_M)
            assert torch.equal(item["targets"].targets.logprobs_CK, batch.targets.logprobs_CK)
            assert data.documents(number).tolist() == batch.rows.tolist()


def test_epochs_hold_every_document_as_often(dataset: kdata.Dataset) -> None:
    for kind in (PackedRows, Documents):
        data = kind(dataset, context_tokens=64, epochs=2)
        read = np.concatenate([data.documents(number) for number in range(len(data))])
        assert np.bincount(read).tolist() == [2] * dataset.num_rows


def test_documents_have_the_order_of_the_packed_rows(dataset: kdata.Dataset) -> None:
    packed, single = (kind(dataset, context_tokens=64, epochs=1) for kind in (PackedRows, Documents))
    order = np.concatenate([packed.documents(number) for number in range(len(packed))])
    assert len(single) == len(order)
    for number, row in enumerate(order[:30].tolist()):
        assert single.documents(number).tolist() == [row]
        assert single[number]["input_ids"].tolist() == dataset[row].token_ids.tolist()


def test_sequential_reading_decompresses_a_record_batch_once_a_window(dataset, monkeypatch) -> None:
    read: list[tuple[int, int]] = []
    real = kdata.Dataset.record_batch
    monkeypatch.setattr(kdata.Dataset, "record_batch", lambda self, *key: (read.append(key), real(self, *key))[1])
    data = PackedRows(dataset, context_tokens=64, epochs=1)
    for _ in DataLoader(data, 4, collate_fn=Collator()):
        pass
    assert len(read) == len(set(read)) > 1


def test_a_data_loader_with_workers_reads_the_same(rows: PackedRows) -> None:
    alone, workers = (list(DataLoader(rows, 3, collate_fn=Collator(), num_workers=n)) for n in (0, 2))
    assert len(alone) == len(workers) == 4
    assert all(same(left, right) for left, right in zip(alone, workers, strict=True))


def test_items_outside_are_errors(rows: PackedRows) -> None:
    assert torch.equal(rows[-1]["input_ids"], rows[11]["input_ids"])
    for index in (12, -13):
        with pytest.raises(OutOfRangeError, match="12"):
            rows[index]


@pytest.mark.parametrize("name", ["forward_kl", "deviation_kl"])  # one that reads the entropy, too
def test_empty_items_fill_up_and_count_nothing(dataset: kdata.Dataset, name: str) -> None:
    rows = PackedRows(dataset, context_tokens=64, items=12, objective={"weights": {"cross_entropy": 0.1, name: 0.9}})
    filled = rows.filled_to(5)
    assert (len(rows), len(filled)) == (12, 15)
    assert len(filled[14]["targets"]) == 0 and filled.documents(14).tolist() == []
    loss = attach_loss(llama(), rows)
    whole = batch_of(rows, 12)
    more = Collator()([filled[number] for number in range(15)])
    assert more["input_ids"].shape == (15, 64) and len(more["targets"]) == len(whole["targets"])
    assert loss(**more).loss.item() == pytest.approx(loss(**whole).loss.item(), rel=1e-6)
    nothing = loss(**Collator()([filled[14]]), counted_tokens=7)
    nothing.loss.backward()
    assert float(nothing.loss) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_exactly(dataset: kdata.Dataset, workers: int) -> None:
    config = BatchesConfig(context_tokens=64, batch_rows=4, window_documents=16)

    def stream() -> RowStream:
        return RowStream(dataset, config=config, epochs=2)

    whole = list(DataLoader(stream(), batch_size=None, num_workers=workers))
    consumed = stream()
    batch = list(islice(DataLoader(consumed, batch_size=None, num_workers=workers), 5))[-1]
    resumed = stream()
    resumed.load_state_dict(consumed.state_dict(batch))
    rest = list(DataLoader(resumed, batch_size=None, num_workers=workers))
    assert len(rest) == len(whole) - 5
    assert all(same(left, right) for left, right in zip(rest, whole[5:], strict=True))
    with pytest.raises(MismatchError, match="seed"):
        RowStream(dataset, config=config.model_copy(update={"seed": 9})).load_state_dict(resumed.state_dict())


def test_ranks_of_a_stream_share_its_batches(dataset: kdata.Dataset) -> None:
    config = BatchesConfig(context_tokens=64, batch_rows=4)
    whole = next(iter(RowStream(dataset, config=config)))
    halves = [next(iter(RowStream(dataset, config=config, rank=rank, world_size=2))) for rank in (0, 1)]
    assert torch.equal(torch.cat([half["input_ids"] for half in halves]), whole["input_ids"])
    states = [RowStream(dataset, config=config, rank=r, world_size=2).state_dict(h) for r, h in enumerate(halves)]
    assert states[0] == states[1]


@pytest.mark.parametrize("layout", ["rows", "flat", "padded"])
def test_labels_are_the_counted_tokens_in_the_shift_of_hugging_face(rows: PackedRows, layout: Any) -> None:
    batch = batch_of(rows, 3, layout)
    flat, targets = batch["labels"].flatten(), batch["targets"]
    assert torch.equal(flat[targets.predictor_M + 1], targets.targets.token_ids_C)
    assert int((batch["labels"][:, 1:] != -100).sum()) == len(targets)
    assert torch.equal(flat[flat != -100], batch["input_ids"].flatten()[flat != -100])


def test_a_flat_batch_names_its_documents(rows: PackedRows) -> None:
    batch = batch_of(rows, 3, "flat")
    lengths = torch.diff(batch["cu_seq_lens_q"]).tolist()
    documents = [int(row) for number in range(3) for row in rows.documents(number)]
    assert lengths == [len(rows.dataset[row].token_ids) for row in documents]
    assert batch["max_length_q"] == batch["max_length_k"] == max(lengths)
    assert batch["input_ids"].shape == (1, sum(lengths)) and batch["cu_seq_lens_k"].dtype == torch.int32


def test_a_padded_batch_has_a_row_for_each_document(rows: PackedRows) -> None:
    batch = Collator("padded", pad_token_id=1, pad_to_multiple_of=8)([rows[0], rows[1]])
    documents = [int(row) for number in range(2) for row in rows.documents(number)]
    assert batch["input_ids"].shape[1] % 8 == 0
    for number, row in enumerate(documents):
        ids = rows.dataset[row].token_ids.tolist()
        assert batch["input_ids"][number].tolist() == ids + [1] * (batch["input_ids"].shape[1] - len(ids))
        assert int(batch["attention_mask"][number].sum()) == len(ids)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_layout_has_the_same_loss_and_gradients(rows: PackedRows) -> None:
    results = {}
    for layout in ("rows", "flat", "padded"):
        model = attach_loss(llama(), rows, layout=layout)
        output = model(**batch_of(rows, 4, layout))
        output.loss.backward()
        results[layout] = (output, gradients(model))
    for layout in ("flat", "padded"):
        torch.testing.assert_close(results[layout][0].loss, results["rows"][0].loss)
        torch.testing.assert_close(results[layout][1], results["rows"][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "temperature"), [(n, x) for n in OBJECTIVES for x in (1.0, 2.0) if n not in AT_1 or x == 1.0]
)
def test_logits_give_the_loss_and_gradient_of_hidden_states_and_head(name: str, temperature: float) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 5, dtype=torch.float64), torch.randn(13, 5, dtype=torch.float64)
    logprobs = torch.log_softmax(torch.randn(9, 13, dtype=torch.float64), -1)
    kept, ids = logprobs.topk(4)
    tail = torch.log1p(-kept.exp().sum(-1))
    entropy = torch.special.entr(logprobs.exp()).sum(-1)
    targets = Targets(
        torch.randint(13, (9,)), ids, kept, tail, temperature, entropy_C=entropy, actual_logprobs_C=logprobs[:, 0],
        document_C=torch.arange(9) // 5, position_C=torch.arange(9) % 5 + 1,
    )  # fmt: skip
    config = ObjectiveConfig(weights={name: 1.0}, temperature=temperature, taid_t=0.7, compared_tokens=3)
    results = []
    for over in ("hidden", "logits"):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if over == "hidden":
            loss = DistillationLoss(config, "ghost")(h, w, targets)
        else:
            loss = LogitsLoss(config, "ghost", chunk_positions=4)(h @ w.T, targets)
        (3 * loss.total).backward()
        results.append((loss.total.detach(), loss.values_MO, h.grad, w.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_mix_may_change_with_the_step(dataset: kdata.Dataset) -> None:
    ramp = {"start": 1.0, "end": 0.0}
    data = PackedRows(
        dataset, context_tokens=64, items=4, objective={"weights": {"cross_entropy": ramp, "forward_kl": 1.0}}
    )
    model = attach_loss(llama(), data)
    batch = batch_of(data, 4)
    with pytest.raises(ConfigError, match="change with the step"):
        model(**batch)
    totals = []
    for step in (0, 10):
        loss_of(model).set_step(step, 11)
        output = model(**batch)
        ce, kl = (output.sums_O / len(batch["targets"])).tolist()
        totals.append((float(output.loss), ce, kl))
    assert totals[0][0] == pytest.approx(totals[0][1] + totals[0][2], rel=1e-5)
    assert totals[1][0] == pytest.approx(totals[1][2], rel=1e-5)


def test_calls_without_targets_are_as_before(rows: PackedRows, tmp_path: Path) -> None:
    """Logits, the model's own loss, generation and saving."""
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = llama()(input_ids=ids, labels=ids)
        model = attach_loss(llama(), rows)
        got = model(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 11)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), llama().parameters(), strict=True))


@pytest.mark.slow
def test_a_compiled_student_has_the_same_loss_and_gradients(rows: PackedRows) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = attach_loss(llama(), rows)
        call = torch.compile(model, backend="aot_eager") if compiled else model
        for count in (2, 3):
            model.zero_grad()
            output = call(**batch_of(rows, count))
            output.loss.backward()
        results.append((output.loss.detach(), gradients(model)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_autocast_computes_products_in_bfloat16_and_keeps_the_targets(rows: PackedRows) -> None:
    model, batch = attach_loss(llama(), rows), batch_of(rows, 4)
    want = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert 0 < abs(float(output.loss - want)) < 2e-2 * float(want)
    assert all(grad.dtype == torch.float32 for grad in gradients(model).values())


@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_adapters_train_on_a_quantized_base(kind: str, rows: PackedRows, tmp_path: Path) -> None:
    """QLoRA: the base in int8 or 4-bit, the head whole. The loss is that of the same weights, rounded, without adapters."""
    llama().save_pretrained(tmp_path)
    if kind == "torchao":  # not in dev: its import prints warnings wherever transformers is imported
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        settings: Any = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    else:
        from transformers import BitsAndBytesConfig

        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    base = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    attach_loss(model.train(), rows)  # trainers do so too: bitsandbytes has no gradients otherwise, see `_evaluating`
    batch, optimizer = batch_of(rows, 4), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        whole = attach_loss(llama(), rows)(**batch).loss
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(float(whole), rel=0.05)
    assert losses[-1] < losses[0]
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_peft_may_train_a_whole_head(rows: PackedRows) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    attach_loss(model, rows)
    model(**batch_of(rows, 2)).loss.backward()
    assert any("lm_head" in name and float(grad.abs().max()) > 0 for name, grad in gradients(model).items())


# What is refused, before the first step.


def soft_capped() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    sizes = {**SIZES, "head_dim": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": None}
    return Gemma2ForCausalLM(Gemma2Config(**sizes, initializer_range=0.5))


def test_a_head_that_is_not_the_product_is_refused_and_logits_serve_it(rows: PackedRows) -> None:
    with pytest.raises(ConfigError, match=r"not head @ hidden.*over='logits'"):
        attach_loss(soft_capped(), rows)
    model, batch = attach_loss(soft_capped(), rows, over="logits"), batch_of(rows, 3)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    targets = batch["targets"]
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)[targets.predictor_M]
    want = LogitsLoss.of(rows)(logits, targets.targets).total
    got = model(**batch).loss
    torch.testing.assert_close(got, want)
    got.backward()
    assert gradients(model)


def test_another_vocabulary_or_tokenizer_is_refused(rows: PackedRows, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="head has 40 rows"):
        attach_loss(llama(vocab_size=40), rows)
    other = save_tokenizer(tmp_path, VOCAB + 3)
    with pytest.raises(MismatchError, match="the model"):
        attach_loss(llama(), rows, tokenizer=other)


def without_positions(_: Any, __: Any, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return (), {**inputs, "position_ids": None}


def test_attention_that_leaks_is_refused_in_packed_layouts(rows: PackedRows) -> None:
    class Leaking(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.model.register_forward_pre_hook(without_positions, with_kwargs=True)

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.2)
    for layout in ("rows", "flat"):
        with pytest.raises(ConfigError, match=f"see each other in the layout '{layout}'"):
            attach_loss(Leaking(config), rows, layout=layout)
    attach_loss(Leaking(config), rows, layout="padded")


def test_adapters_and_wrappers_that_hide_the_head_are_refused(rows: PackedRows) -> None:
    with pytest.raises(ConfigError, match="head has a PEFT adapter"):
        attach_loss(get_peft_model(llama(), LoraConfig(target_modules=["lm_head"])), rows)
    prefix = get_peft_model(llama(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="prompt learning"):
        attach_loss(prefix, rows)
    with pytest.raises(ConfigError, match="before it is compiled or wrapped"):
        attach_loss(torch.nn.DataParallel(llama()), rows)
    with pytest.raises(ConfigError, match="has a loss already"):
        attach_loss(attach_loss(llama(), rows), rows)


def test_documents_that_are_too_long_are_refused(dataset: kdata.Dataset) -> None:
    with pytest.raises(DataError, match="more than context_tokens=32"):
        PackedRows(dataset, context_tokens=32, items=4)
    with pytest.raises(DataError, match="the student has 16 positions"):
        attach_loss(llama(max_position_embeddings=16), PackedRows(dataset, context_tokens=64, items=4))


def test_objectives_that_the_data_cannot_serve_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="log-sum-exp only at"):
        PackedRows(dataset, items=4, objective={"temperature": 2.0})
    draws = make_dataset(tmp_path / "draws", [10] * 8, tail="draws")
    with pytest.raises(ConfigError, match="reverse_kl is not linear"):
        PackedRows(draws, items=4, objective={"weights": {"reverse_kl": 1.0}})
    with pytest.raises(ConfigError, match="alm is of chunks"):
        PackedRows(dataset, items=4, objective={"weights": {"alm": 1.0}})
    for weight in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"finite number .got {weight}"):
            PackedRows(dataset, objective={"weights": {"forward_kl": weight}}, epochs=1)
    with pytest.raises(ConfigError, match="did you mean 'weights'"):
        PackedRows(dataset, objective={"weigths": {"forward_kl": 1.0}}, epochs=1)
    with pytest.raises(ConfigError, match=r"context_tokens: .* greater than or equal to 2 .got -1"):
        PackedRows(dataset, context_tokens=-1, epochs=1)
    with pytest.raises(ConfigError, match="forwardkl"):
        PackedRows(dataset, items=4, objective={"weights": {"forwardkl": 1.0}})
    for ends in ({}, {"items": 4, "epochs": 1}, {"items": 0}, {"epochs": 0}):
        with pytest.raises(ConfigError, match="set one of the two"):
            PackedRows(dataset, **ends)


@pytest.mark.parametrize("change", ["more", "fewer", "moved"])
def test_labels_that_disagree_with_the_mask_are_refused(rows: PackedRows, change: str) -> None:
    model, batch = attach_loss(llama(), rows), batch_of(rows, 2)
    labels = batch["labels"]
    counted = torch.nonzero(labels.flatten() != -100).flatten()
    if change == "more":
        labels[:] = batch["input_ids"]
    elif change == "fewer":
        labels.view(-1)[counted[0]] = -100
    else:
        labels.view(-1)[counted[0]] = (labels.view(-1)[counted[0]] + 1) % VOCAB
    with pytest.raises(ConfigError, match="labels count"):
        model(**batch)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", **changes)


def test_a_trainer_that_drops_the_targets_is_refused(rows: PackedRows, tmp_path: Path) -> None:
    """Hugging Face's Trainer removes what the model's forward pass does not name, before the collator runs."""
    trainer = Trainer(llama(), arguments(tmp_path), data_collator=Collator(), train_dataset=rows)
    with pytest.raises(ConfigError, match="remove_unused_columns=False"):
        trainer.train()
    for collator in (lambda items: {}, object()):
        with pytest.raises(ConfigError, match="data_collator is"):
            DistillTrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows, data_collator=collator)
    trainer = DistillTrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows)
    trainer.data_collator = lambda items: {"input_ids": torch.stack([item["input_ids"] for item in items])}
    with pytest.raises(ConfigError, match="a collator dropped them"):
        trainer.train()


@pytest.mark.parametrize(("accumulated", "accepts"), [(1, None), (3, None), (3, False)])
def test_huggingfaces_own_trainer_has_the_loss_of_the_whole_step(
    accumulated: int, accepts: bool | None, dataset: kdata.Dataset, tmp_path: Path
) -> None:
    """It gives the model the step's counted tokens, and divides by nothing else; whatever the model's class says it takes."""
    rows = PackedRows(dataset, context_tokens=64, items=9)

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(rows)

    losses = []
    for trainer, attach in ((DistillTrainer, False), (InOrder, True)):
        model = llama()
        if accepts is not None:
            model.accepts_loss_kwargs = accepts
        if attach:
            model = attach_loss(model, rows)
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=3, save_strategy="no", logging_steps=1, learning_rate=1e-2,
            per_device_train_batch_size=3 // accumulated, gradient_accumulation_steps=accumulated,
            remove_unused_columns=False,
        )  # fmt: skip
        run = trainer(model=model, args=args, train_dataset=rows, data_collator=Collator())
        run.train()
        losses.append([(line["loss"], line["grad_norm"]) for line in run.state.log_history if "loss" in line])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) == 3
    whole = attach_loss(llama(), rows)(**batch_of(rows, 3)).loss.detach()
    assert losses[1][0][0] == pytest.approx(float(whole), rel=1e-4)


@pytest.mark.slow
def test_a_trainer_may_compile_the_student(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """By its own setting, in its constructor or later; the loss is found in what it wrapped."""
    losses = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=2, save_strategy="no", logging_steps=1, **changes
        )
        objective = {"weights": {"forward_kl": 1.0, "cross_entropy": {"start": 1.0, "end": 0.0}}}
        data = PackedRows(dataset, context_tokens=64, items=16, objective=objective)
        run = DistillTrainer(model=llama(), args=args, train_dataset=data)
        run.train()
        losses.append([line["loss"] for line in run.state.log_history if "loss" in line])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_a_number_of_tokens_does_not_stand_for_the_weights_of_a_plan(rows: PackedRows) -> None:
    model, batch = attach_loss(llama(), rows), batch_of(rows, 2)
    assert torch.equal(model(**batch, num_items_in_batch=40).loss, model(**batch, counted_tokens=40).loss)
    targets = batch["targets"]
    weighted = replace(targets.targets, weights_C=torch.full((len(targets),), 0.5))
    with pytest.raises(ConfigError, match="use DistillTrainer in place of Trainer"):
        model(**{**batch, "targets": replace(targets, targets=weighted)}, num_items_in_batch=40)


def test_settings_of_a_trainer_that_change_the_loss_are_refused(rows: PackedRows, dataset, tmp_path: Path) -> None:
    def trainer(**changes: Any) -> None:
        DistillTrainer(**{"model": llama(), "train_dataset": rows, "args": arguments(tmp_path), **changes})

    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        trainer(args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ConfigError, match="use_liger_kernel"):
        trainer(args=arguments(tmp_path, use_liger_kernel=True))
    with pytest.raises(ConfigError, match="compute_loss_func"):
        trainer(compute_loss_func=lambda *_, **__: None)
    for data in (datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), RowStream(dataset)):
        with pytest.raises(ConfigError, match="train_dataset is"):
            trainer(train_dataset=data)
    with pytest.raises(ConfigError, match="packing=True"):
        DistillSFTTrainer(
            model=llama(), args=SFTConfig(str(tmp_path), packing=True, bf16=False, use_cpu=True), train_dataset=rows
        )


def test_data_to_evaluate_on_that_the_loss_does_not_fit_is_refused(rows: PackedRows, tmp_path: Path) -> None:
    """A model has the loss of the data it trains on."""

    def evaluated_on(data: Any, **changes: Any) -> None:
        DistillTrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows, eval_dataset=data, **changes)

    def held(name: str, objective: dict[str, Any] | None = None, **settings: Any) -> PackedRows:
        lengths = settings.pop("lengths", [10] * 8)
        return PackedRows(
            make_dataset(tmp_path / name, lengths, **settings), context_tokens=80, items=2, objective=objective
        )

    evaluated_on(held("same"))
    with pytest.raises(ConfigError, match=r"(?s)one loss.*weights.*jsd"):
        evaluated_on(held("other", {"weights": {"jsd": 1.0}}))
    with pytest.raises(ConfigError, match=r"(?s)one loss.*tail: 'ghost' -> 'draws'"):
        evaluated_on(held("draws", tail="draws"))
    with pytest.raises(DataError, match="a document has 70 tokens, the student has 64 positions"):
        evaluated_on(held("long", lengths=[70] * 3))
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ConfigError, match=f"{name} needs logits"):
            evaluated_on(None, **{name: lambda *_: {}})


class StopAt(TrainerCallback):
    """Ends training after a step, as a kill after a checkpoint does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop |= state.global_step == self.step
        return control


def test_trainer_resumes_where_it_stopped(rows: PackedRows, tmp_path: Path) -> None:
    def losses(folder: Path, steps: int, resume: bool = False) -> list[float]:
        args = TrainingArguments(
            str(folder), use_cpu=True, report_to=[], max_steps=6, save_steps=3, logging_steps=1, disable_tqdm=True,
            per_device_train_batch_size=2, learning_rate=1e-2,
        )  # fmt: skip
        trainer = DistillTrainer(model=llama(), args=args, train_dataset=rows)
        trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=resume or None)
        return [line["forward_kl"] for line in trainer.state.log_history if "loss" in line]

    whole = losses(tmp_path / "whole", 6)
    losses(tmp_path / "halves", 3)
    assert losses(tmp_path / "halves", 6, resume=True) == pytest.approx(whole, rel=1e-6)


def test_evaluation_logs_each_objective(rows: PackedRows, tmp_path: Path) -> None:
    trainer = DistillTrainer(model=llama(), args=arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    measured = trainer.evaluate()
    model = attach_loss(llama(), rows)
    with torch.no_grad():
        sums = model(**batch_of(rows, 12)).sums_O
    line = trainer.state.log_history[-1]
    assert line["eval_forward_kl"] == pytest.approx(float(sums[1]) / len(batch_of(rows, 12)["targets"]), rel=1e-5)
    assert "eval_loss" in measured


def test_a_fitted_head_leaves_padding_rows_alone(dataset: kdata.Dataset) -> None:
    """A head with more rows than tokens: the loss is over the ids that tokens have."""
    data = PackedRows(dataset, context_tokens=64, items=4)
    padded = llama(vocab_size=VOCAB + 3)
    model = attach_loss(padded, data)
    model(**batch_of(data, 2)).loss.backward()
    assert float(padded.lm_head.weight.grad[VOCAB:].abs().max()) == 0
    assert float(padded.lm_head.weight.grad[:VOCAB].abs().max()) > 0
