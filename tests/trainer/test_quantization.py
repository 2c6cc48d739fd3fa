"""Quantized students: rounding by its formula, what is written computes what was trained, a resumed run is exact."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TorchAoConfig

import kdata
from kdata.errors import ConfigError, DependencyError, MismatchError
from kdata.pipelines.recipe import StudentStage
from kdata.trainer.config import CheckpointStudent, QuantizeConfig, ScratchStudent, TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.quantization import is_quantized
from kdata.trainer.student import build_student, hidden_states
from kdata.trainer.train import train
from tests.trainer.datasets import VOCAB, save_tokenizer
from tests.trainer.runs import lines, save_base, six_steps
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(60)]
INT4 = {"weights": "int4", "group_size": 16}


@pytest.fixture(scope="module")
def base(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", dataset, init_std=0.2)


def config(base: Path, quantize: dict[str, Any] | None = None, **changes: object) -> TrainConfig:
    return six_steps(base, {"quantize": INT4 | (quantize or {})}, **changes)


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchao")
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(base), dataset.path, None, out)
    return out


def losses(out: Path) -> list[tuple[float, ...]]:
    return [(r["loss"], r["grad_norm"]) for r in lines(out)]


def rounded(weight_OI: torch.Tensor, group: int, low: int, high: int) -> torch.Tensor:
    """Whole numbers of each group of neighbors, whose largest absolute value is half the range; torchao's, written anew.

    In float32 and by the inverse of the scale: the largest of a group lies between two whole numbers.
    """
    groups = weight_OI.unflatten(1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    return ((groups * (1 / scale)).round().clamp(low, high) * scale).flatten(1)


@pytest.mark.parametrize(("weights", "low", "high"), [("int2", -2, 1), ("int4", -8, 7), ("int8", -128, 127)])
def test_a_student_computes_with_rounded_weights_and_the_gradient_passes(
    weights: str, low: int, high: int, dataset: kdata.Dataset, base: Path
) -> None:
    pytest.importorskip("torchao")
    settings = QuantizeConfig.model_validate({"weights": weights, "group_size": 16, "inputs": None})
    student = build_student(CheckpointStudent(model=str(base), quantize=settings), dataset, 0)
    plain = build_student(CheckpointStudent(model=str(base)), dataset, 0)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    mine = hidden_states(student, ids, positions)
    assert not torch.allclose(mine, hidden_states(plain, ids, positions), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.copy_(rounded(layer.weight, 16, low, high))
    theirs = hidden_states(plain, ids, positions)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    straight, own = (m.get_submodule("model.layers.1.mlp.down_proj").weight.grad for m in (student, plain))
    assert straight is not None and own is not None
    inside = straight != 0  # the gradient stops where a value is cut off
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(straight[inside], own[inside], rtol=1e-2, atol=1e-3)


def test_what_is_written_computes_what_was_trained(
    whole: Path, dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    """torchao's form has the hidden states of the student; the ordinary one those of rounded weights alone."""
    ids, positions = torch.arange(14)[None], torch.arange(14)[None]
    (checkpoint,) = (whole / "checkpoints").iterdir()
    student = build_student(CheckpointStudent(model=str(base), quantize=QuantizeConfig(**INT4)), dataset, 0).eval()
    trained = load_file(checkpoint / "tensors.safetensors")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(trained[f"model.{name}"])
    opened = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    assert is_quantized(opened)
    torch.testing.assert_close(hidden_states(opened, ids, positions), hidden_states(student, ids, positions))
    plain = AutoModelForCausalLM.from_pretrained(whole / "dequantized", dtype=torch.float32)
    assert not is_quantized(plain) and (whole / "dequantized" / "tokenizer.json").exists()
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            torch.testing.assert_close(layer.weight, opened.get_submodule(name).weight.dequantize())
            groups = layer.weight.unflatten(1, (-1, 16))
            assert all(len(group.unique()) <= 16 for group in groups.flatten(0, 1)), "16 numbers of 4 bits"
    assert not (whole / "model").joinpath("adapter_config.json").exists()


def test_a_resumed_run_is_exact(whole: Path, dataset: kdata.Dataset, base: Path, tmp_path: Path) -> None:
    stop_before(4, config(base), dataset, tmp_path)
    torch.manual_seed(99)
    train(config(base), dataset.path, None, tmp_path)
    assert losses(tmp_path) == losses(whole)
    weights = "dequantized/model.safetensors"
    assert (tmp_path / weights).read_bytes() == (whole / weights).read_bytes()
    mine, theirs = (
        load_file(out / "model" / "model.safetensors") for out in (tmp_path, whole)
    )  # the header has no order
    assert mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    with pytest.raises(MismatchError, match="quantize"):
        train(config(base, {"weights": "int8"}), dataset.path, None, tmp_path)


def test_training_for_the_rounding_recovers_what_rounding_loses(
    dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    """Quantized without training, and after steps of forward KL, by the offline measure; the models open as they are."""
    pytest.importorskip("torchao")
    good = tmp_path / "good"
    plain = {"kind": "checkpoint", "model": str(base)}
    train(config(base, student=plain, steps=150, checkpoint_every_steps=0), dataset.path, None, good)
    two_bits = {"weights": "int2"}
    figures = {}
    for name, rate, steps in (("before", 1e-12, 1), ("after", 5e-3, 60)):
        settings = config(good / "model", two_bits, learning_rate=rate, steps=steps, weight_decay=0.0)
        result = train(settings, dataset.path, None, tmp_path / name)
        figures[name] = evaluate(tmp_path / name / "model", dataset.path)
        assert figures[name]["params"] == result.params
    whole = evaluate(good / "model", dataset.path)["overall"]
    lost, left = (figures[name]["overall"]["kl"] - whole["kl"] for name in ("before", "after"))
    assert lost > 0.2 and left < 0.5 * lost
    assert figures["before"]["overall"]["top1"] < figures["after"]["overall"]["top1"]


def test_a_folder_that_transformers_quantized_is_measured(dataset: kdata.Dataset, base: Path, tmp_path: Path) -> None:
    """As a person quantizes a model without kdata; the distance to the stored beliefs is that of its rounded weights."""
    quantization = pytest.importorskip("torchao.quantization")
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(tmp_path / "int8")
    save_tokenizer(tmp_path / "int8")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for name, layer in plain.named_modules():
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                layer.weight.copy_(model.get_submodule(name).weight.dequantize())
    plain.save_pretrained(tmp_path / "rounded")
    theirs, ours = (evaluate(tmp_path / name, dataset.path)["overall"] for name in ("int8", "rounded"))
    assert {name: theirs[name] for name in ("nll", "kl", "top1")} == pytest.approx(
        {name: ours[name] for name in ("nll", "kl", "top1")}, rel=1e-3
    )
    assert theirs["nll"] != pytest.approx(evaluate(base, dataset.path)["overall"]["nll"], rel=1e-7)


def test_bad_settings_are_refused_before_training(
    whole: Path, dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"group_size=24 does not divide the 32 inputs of model\.layers\.0\.self_attn"
    ):
        train(config(base, {"group_size": 24}), dataset.path, None, tmp_path / "run")
    for own in (None, INT4):
        student = {"kind": "checkpoint", "model": str(whole / "model"), "quantize": own}
        with pytest.raises(
            ConfigError, match=r"the weights of .* are quantized, and rounded numbers cannot be trained"
        ):
            train(config(base, student=student), dataset.path, None, tmp_path / "run")
    student = {"kind": "checkpoint", "model": str(whole / "dequantized"), "quantize": INT4}
    train(config(base, student=student, steps=1), dataset.path, None, tmp_path / "goes on")
    with pytest.raises(ValidationError, match="lora does not go with quantize"):
        CheckpointStudent.model_validate({"model": "M", "lora": {}, "quantize": {}})
    assert not (tmp_path / "run").exists()


def test_a_model_that_reads_its_weights_in_its_own_way_is_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    """Mamba multiplies by a weight without calling the layer, so that rounding would be missing in training."""
    pytest.importorskip("torchao")
    sizes = ScratchStudent(architecture="mamba", hidden_size=32, num_layers=1)
    build_student(sizes, dataset, 0).save_pretrained(tmp_path / "mamba")
    save_tokenizer(tmp_path / "mamba")
    quantize = {"weights": "int2", "group_size": None, "inputs": None}
    student = {"kind": "checkpoint", "model": str(tmp_path / "mamba"), "quantize": quantize}
    with pytest.raises(ConfigError, match="reads weights of its linear layers in a way of its own"):
        train(config(tmp_path, student=student), dataset.path, None, tmp_path / "run")


def test_a_model_with_weights_outside_of_linear_layers_is_refused_by_name(
    dataset: kdata.Dataset, tmp_path: Path
) -> None:
    """The experts of transformers 5 are parameters of three dimensions, and torchao rounds linear layers."""
    pytest.importorskip("torchao")
    sizes = MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(sizes).save_pretrained(tmp_path / "experts")
    save_tokenizer(tmp_path / "experts")
    with pytest.raises(
        ConfigError,
        match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj \[4, 128, 32\] of MixtralForCausalLM is in no linear layer",
    ):
        train(config(tmp_path / "experts"), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_torchao_the_error_names_the_extra(
    dataset: kdata.Dataset, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "quantized")
    described = json.loads((base / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(described))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"] + ["torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    remedy = r"pip install 'kdata\[torchao\]'"
    with pytest.raises(DependencyError, match=remedy):
        train(config(base), dataset.path, None, tmp_path / "run")
    with pytest.raises(DependencyError, match=remedy):
        evaluate(tmp_path / "quantized", dataset.path)
    assert not (tmp_path / "run").exists()


def test_a_recipe_takes_a_quantized_student() -> None:
    stage = StudentStage.model_validate({"model": "teacher", "quantize": INT4})
    student = stage.resolve()
    assert isinstance(student, CheckpointStudent) and student.quantize == QuantizeConfig(**INT4)
    assert StudentStage.model_validate({"scratch": {"architecture": "mamba"}}).resolve() == ScratchStudent(
        architecture="mamba"
    )
    with pytest.raises(ValidationError, match="quantize rounds the weights of a checkpoint"):
        StudentStage.model_validate({"quantize": INT4})
    with pytest.raises(ValidationError, match="prune does not go with lora, keep_layers or quantize"):
        StudentStage.model_validate({"model": "M", "quantize": INT4, "prune": {"num_layers": 1}})
