"""State-space students: a packed document is what it is alone, a resumed run is exact, and what cannot be is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import kdata
from kdata.config import parse_config
from kdata.errors import ConfigError
from kdata.loader.batches import BatchesConfig
from kdata.trainer.acceleration import use_varlen
from kdata.trainer.config import CheckpointStudent, EvaluateConfig, ScratchStudent, TrainConfig
from kdata.trainer.distributed import Ranks
from kdata.trainer.documents import cells_of, document_bounds, groups_of, refuse_unfit
from kdata.trainer.drafts import refuse_other_sizes
from kdata.trainer.evaluate import evaluate
from kdata.trainer.fused import distillation_loss
from kdata.trainer.learner import Learner
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.optimizers import make_optimizer
from kdata.trainer.student import build_student, hidden_states, probe_isolation
from kdata.trainer.train import train
from tests.trainer.datasets import VOCAB, save_tokenizer
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(40)]
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mamba": (MambaForCausalLM, MambaConfig, {}),
    "mamba2": (Mamba2ForCausalLM, Mamba2Config, {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon mamba": (FalconMambaForCausalLM, FalconMambaConfig, {}),
}


def random_model(kind: str, **sizes: int) -> PreTrainedModel:
    of, config, own = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = of(config(**COMMON | own | sizes))
    return model


def config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "student": {"kind": "scratch", "architecture": "mamba", "hidden_size": 16, "num_layers": 2}, "steps": 6,
        "batch_tokens": 256, "context_tokens": 64, "warmup_steps": 0, "learning_rate": 1e-2, "log_every_steps": 1,
        "checkpoint_every_steps": 2,
    }  # fmt: skip
    return parse_config(TrainConfig, {**values, **changes}, "test")


def losses(out: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4))
def test_every_cell_is_read_once_behind_its_own_document(rows: list[list[int]]) -> None:
    """Also the padding at the end of a row, whose positions begin anew."""
    context = max(map(sum, rows))
    filled = [[*row, context - sum(row)] if sum(row) < context else row for row in rows]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in filled])
    bounds = document_bounds(positions)
    lengths = [length for row in filled for length in row]
    assert bounds.diff().tolist() == lengths
    read: list[list[int]] = []
    for group in groups_of(bounds.diff()):
        cells, live = cells_of(bounds[:-1][group], bounds.diff()[group])
        assert 2 * int(live.sum()) > live.numel()
        read += [own[mine].tolist() for own, mine in zip(cells, live, strict=True)]
    starts = bounds.tolist()
    assert sorted(read) == [list(range(a, b)) for a, b in pairwise(starts)]


@pytest.mark.parametrize("kind", MODELS)
def test_a_packed_document_has_the_states_and_the_gradients_that_it_has_alone(
    kind: str, dataset: kdata.Dataset
) -> None:
    """Hidden states, loss and gradients of packed rows against one document at a time, in float64 and without our code."""
    model = random_model(kind).double().train()
    loader = Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=4))
    batch = next(loader.epoch())
    assert len(batch.rows) > 8 and (batch.segment_ids < 0).any()
    backbone, head = model.base_model, model.get_output_embeddings().weight
    objective = ObjectiveConfig(weights={"cross_entropy": 0.5, "forward_kl": 0.5})

    def loss_and_gradients(hidden_BLD: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        hidden_MD = hidden_BLD.flatten(0, 1)[batch.predictor_M]
        loss = distillation_loss(hidden_MD, head, batch.targets, objective, "ghost", counted_tokens=len(batch.targets))
        model.zero_grad()
        loss.total.backward()
        return float(loss.total), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed = hidden_states(model, batch.input_ids, batch.position_ids)
    alone = torch.zeros_like(packed)
    for row, segments in enumerate(batch.segment_ids):
        for segment in segments.unique().tolist():
            own = (segments == segment).nonzero()[:, 0]
            alone[row, own] = backbone(input_ids=batch.input_ids[row, own][None]).last_hidden_state[0]
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)  # parts of these models compute in float32
    whole = backbone(input_ids=batch.input_ids).last_hidden_state
    assert not torch.allclose(whole, alone, atol=1e-3), "the state leaks where rows are read as they are"
    mine, theirs = loss_and_gradients(packed), loss_and_gradients(alone)
    assert mine[0] == pytest.approx(theirs[0], rel=1e-6)
    for own, other in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


def test_the_learner_reads_packed_rows_and_the_probe_would_see_a_leak(
    dataset: kdata.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = build_student(ScratchStudent(architecture="mamba", hidden_size=16, num_layers=1), dataset, 0)
    batch = next(Loader(dataset, None, BatchesConfig(context_tokens=64, batch_rows=2)).epoch())
    total, values = Learner(student)(batch, ObjectiveConfig(weights={"forward_kl": 1.0}), "ghost", len(batch.targets))
    assert values.shape == (len(batch.targets), 1) and float(total) > 0
    monkeypatch.setattr(type(student), "_is_stateful", False)
    with pytest.raises(ConfigError, match="lets packed documents see each other"):
        probe_isolation(student)


def test_a_state_space_student_learns_is_measured_and_writes(dataset: kdata.Dataset, tmp_path: Path) -> None:
    settings = config(steps=60, checkpoint_every_steps=0, learning_rate=3e-2)
    result = train(settings, dataset.path, None, tmp_path / "run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert result.losses["forward_kl"] < 0.5 < 1.5 < first["forward_kl"]
    prompts = [{"domain": "prose", "prompt": "w3 w4 w5"}]
    measured = evaluate(
        tmp_path / "run" / "model", dataset.path, prompts=prompts, config=EvaluateConfig(sample_tokens=8)
    )
    assert measured["overall"]["kl"] == pytest.approx(result.losses["forward_kl"], abs=0.15)
    assert measured["samples"][0]["text"]
    again = build_student(CheckpointStudent(model=str(tmp_path / "run" / "model")), dataset, 0)
    assert isinstance(again, MambaForCausalLM)


def test_a_resumed_run_is_exact_also_with_recomputed_activations(dataset: kdata.Dataset, tmp_path: Path) -> None:
    train(config(), dataset.path, None, tmp_path / "whole")
    stop_before(4, config(), dataset, tmp_path / "run")
    torch.manual_seed(99)
    train(config(gradient_checkpointing=True), dataset.path, None, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_adapters_of_a_state_space_student(dataset: kdata.Dataset, tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    lora = {
        "kind": "checkpoint",
        "model": str(tmp_path / "base"),
        "lora": {"rank": 2, "targets": ["in_proj", "x_proj"]},
    }
    train(config(student=lora), dataset.path, None, tmp_path / "run")
    plain, adapted = (
        evaluate(folder, dataset.path)["overall"] for folder in (tmp_path / "base", tmp_path / "run/model")
    )
    assert adapted["kl"] < plain["kl"]


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
def test_adapters_where_peft_has_none_are_one_error(targets: object, dataset: kdata.Dataset, tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    lora = {"kind": "checkpoint", "model": str(tmp_path / "base"), "lora": {"rank": 2, "targets": targets}}
    with pytest.raises(ConfigError, match="cannot have adapters"):
        train(config(student=lora), dataset.path, None, tmp_path / "run")


def test_fewer_layers_of_a_state_space_model_train(dataset: kdata.Dataset, tmp_path: Path) -> None:
    random_model("mamba2", num_hidden_layers=3).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    student = {"kind": "checkpoint", "model": str(tmp_path / "base"), "keep_layers": [0]}
    train(config(student=student, steps=2), dataset.path, None, tmp_path / "run")
    assert Mamba2ForCausalLM.from_pretrained(tmp_path / "run" / "model").config.num_hidden_layers == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rates_of_states_are_neither_decayed_nor_made_orthogonal(dataset: kdata.Dataset, optimizer: str) -> None:
    student = build_student(ScratchStudent(architecture="mamba", hidden_size=16, num_layers=1), dataset, 0)
    made = make_optimizer(student, config(optimizer=optimizer), Ranks(torch.device("cpu")))
    rates = {id(p) for name, p in student.named_parameters() if name.endswith("A_log")}
    groups = [(part, group) for part in made.parts for group in part.param_groups]
    (own,) = [(part, group) for part, group in groups if rates & {id(p) for p in group["params"]}]
    assert rates and own[1]["weight_decay"] == 0 and isinstance(own[0], torch.optim.AdamW)


def test_what_a_state_space_student_cannot_do_is_refused(dataset: kdata.Dataset) -> None:
    student = build_student(ScratchStudent(architecture="mamba", hidden_size=16, num_layers=1), dataset, 0)
    llama = build_student(ScratchStudent(hidden_size=16, num_layers=1, num_heads=2), dataset, 0)
    with pytest.raises(ConfigError, match="parallel=fsdp on 2 ranks does not go with MambaForCausalLM"):
        refuse_unfit(student, config(parallel="fsdp"), 2)
    with pytest.raises(ConfigError, match="compile=true does not go with MambaForCausalLM"):
        refuse_unfit(student, config(compile=True), 1)
    refuse_unfit(llama, config(parallel="fsdp", compile=True), 2)
    with pytest.raises(ConfigError, match="attention=varlen does not fit MambaForCausalLM"):
        use_varlen(student)
    for teacher, drafting in ((llama, student), (student, llama)):
        with pytest.raises(ConfigError, match=r"draft_for: the .* is a MambaForCausalLM, whose state"):
            refuse_other_sizes(teacher, drafting, 8)
    for name, value in (("num_heads", 2), ("max_positions", 64)):
        with pytest.raises(ConfigError, match=f"{name}={value} would be ignored"):
            ScratchStudent(architecture="mamba", **{name: value})


def test_a_record_of_a_run_says_the_architecture_and_older_ones_read_as_before() -> None:
    mamba = ScratchStudent(architecture="mamba")
    assert ScratchStudent.model_validate(mamba.model_dump()) == mamba
    assert "architecture" not in ScratchStudent().model_dump(mode="json")
