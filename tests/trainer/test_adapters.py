"""LoRA students: only adapters learn, PEFT reads what is written, a resumed run is exact, and bad ones are refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import kdata
from kdata.errors import ConfigError, CorruptError, DependencyError, MismatchError, MissingError
from kdata.trainer.adapters import frozen_digest, is_adapter, open_adapter
from kdata.trainer.config import CheckpointStudent, LoraConfig, TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.student import build_student, hidden_states, num_parameters
from kdata.trainer.train import train
from tests.trainer.runs import lines, save_base, six_steps
from tests.trainer.stopping import stop_before

LENGTHS = [5 + (i * 7) % 40 for i in range(60)]
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def base(dataset: kdata.Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", dataset)


def config(base: Path, lora: dict[str, Any] | None = None, **changes: object) -> TrainConfig:
    return six_steps(base, {"lora": LORA | (lora or {})}, **changes)


@pytest.fixture(scope="module")
def whole(dataset: kdata.Dataset, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config(base, {"dropout": 0.1}), dataset.path, None, out)
    return out


def losses(out: Path) -> list[tuple[float, ...]]:
    return [(r["loss"], r["grad_norm"]) for r in lines(out)]


def test_a_new_adapter_changes_nothing_and_alone_is_trained(dataset: kdata.Dataset, base: Path) -> None:
    plain = build_student(CheckpointStudent(model=str(base)), dataset, 0)
    student = build_student(CheckpointStudent(model=str(base), lora=LoraConfig(rank=4)), dataset, 0)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    assert torch.equal(hidden_states(plain, ids, positions), hidden_states(student, ids, positions))
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name for name in names)
    linear = [m for m in plain.model.modules() if isinstance(m, torch.nn.Linear)]
    assert num_parameters(student) == sum(4 * (m.in_features + m.out_features) for m in linear)


def test_peft_reads_the_adapter_and_gets_the_students_logits(whole: Path, base: Path, dataset: kdata.Dataset) -> None:
    """Against PEFT's own class on the base model, and against the formula W + alpha / rank * B A."""
    assert is_adapter(whole / "model") and (whole / "model" / "tokenizer.json").exists()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "model")
    ours = open_adapter(whole / "model")
    ids = torch.arange(14)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    factors, name = load_file(whole / "model" / "adapter_model.safetensors"), "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert float(b.abs().max()) > 0
    before = load_file(base / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(ours.state_dict()[f"{name}.weight"], before + 8.0 / 4 * b @ a)
    assert all(p.requires_grad for p in ours.parameters()), "it can be trained on as a whole"


def test_the_base_is_not_changed_and_not_written(whole: Path, base: Path) -> None:
    (checkpoint,) = (whole / "checkpoints").iterdir()
    stored = load_file(checkpoint / "tensors.safetensors")
    assert all(name.startswith("rng.") or ".lora_" in name for name in stored)
    written = json.loads((whole / "model" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base) and written["target_modules"] == sorted(
        written["target_modules"]
    )


def test_a_student_with_adapters_learns(dataset: kdata.Dataset, base: Path, tmp_path: Path) -> None:
    train(config(base, {"rank": 16, "alpha": 32.0}, steps=80, learning_rate=2e-2), dataset.path, None, tmp_path)
    assert lines(tmp_path)[-1]["forward_kl"] < 0.93 * lines(tmp_path)[0]["forward_kl"]


def test_evaluation_of_the_adapter_is_that_of_the_merged_model(
    whole: Path, dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    train(config(base, {"dropout": 0.1, "merge": True}), dataset.path, None, tmp_path)
    assert losses(tmp_path) == losses(whole)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (whole / "model" / name).read_bytes()
    assert not is_adapter(tmp_path / "model") and not (tmp_path / "model" / "adapter_config.json").exists()
    merged, adapter = evaluate(tmp_path / "model", dataset.path), evaluate(whole / "model", dataset.path)
    assert adapter["overall"] == merged["overall"] and adapter["steps"] == 6
    plain = evaluate(base, dataset.path)
    assert plain["params"] == merged["params"] == adapter["params"]
    assert adapter["overall"]["kl"] < plain["overall"]["kl"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_resumed_run_is_exact_also_with_dropout(
    whole: Path, dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    settings = config(base, {"dropout": 0.1})
    stop_before(4, settings, dataset, tmp_path)
    torch.manual_seed(99)
    train(config(base, {"dropout": 0.1, "merge": True}), dataset.path, None, tmp_path)  # merging may be asked for later
    assert losses(tmp_path) == losses(whole)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "adapter" / weights).read_bytes() == (whole / "model" / weights).read_bytes()


def test_a_base_on_the_hub_names_no_kernel_that_is_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made the adapter chose its base."""
    adapter = Path(shutil.copytree(whole / "model", tmp_path / "adapter"))
    edit(adapter, base_model_name_or_path="someone/base")
    asked = {"model_type": "llama", "_attn_implementation": "someone/kernel"}
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", lambda *_, **__: (asked, {}))
    with pytest.raises(ConfigError, match=r"'someone/kernel', code that transformers would download and run"):
        open_adapter(adapter)


def test_a_run_does_not_resume_on_a_base_that_changed(dataset: kdata.Dataset, base: Path, tmp_path: Path) -> None:
    """The checkpoint does not hold the base, so its digest must."""
    own = Path(shutil.copytree(base, tmp_path / "base"))
    stop_before(4, config(own), dataset, tmp_path / "run")
    weights = load_file(own / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"student\.frozen_digest"):
        train(config(own), dataset.path, None, tmp_path / "run")


def test_the_digest_of_frozen_weights_sees_every_bit(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    before = frozen_digest(model)
    with torch.no_grad():
        model.model.norm.weight[-1] = torch.nextafter(model.model.norm.weight[-1], torch.tensor(9.0))
    assert frozen_digest(model) != before


def test_adapters_on_named_layers_in_micro_batches_with_recomputed_activations(
    dataset: kdata.Dataset, base: Path, tmp_path: Path
) -> None:
    lora = {"targets": ["q_proj", "v_proj"]}
    train(config(base, lora), dataset.path, None, tmp_path / "plain")
    other = config(base, lora, micro_batch_tokens=64, gradient_checkpointing=True)
    train(other, dataset.path, None, tmp_path / "split")
    first, second = ([r["loss"] for r in lines(tmp_path / name)] for name in ("plain", "split"))
    assert first == pytest.approx(second, rel=1e-4)
    names = load_file(tmp_path / "plain" / "model" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}


def test_training_goes_on_from_an_adapter(whole: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    """All weights of the merged student are trained."""
    student = CheckpointStudent(model=str(whole / "model"))
    settings = config(whole, student=student.model_dump(), steps=1)
    assert train(settings, dataset.path, None, tmp_path).params == num_parameters(open_adapter(whole / "model"))
    assert not is_adapter(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"targets": ["nowhere"]}, r"targets=\['nowhere'\] cannot have adapters.*use all-linear"),
        ({"targets": ["lm_head"]}, r"puts an adapter on the (head|embeddings) of LlamaForCausalLM"),
        ({"targets": ["embed_tokens"]}, r"puts an adapter on the (head|embeddings) of LlamaForCausalLM"),
        ({"targets": ["norm"]}, r"targets=\['norm'\] cannot have adapters"),
    ],
)
def test_targets_that_cannot_have_an_adapter(
    dataset: kdata.Dataset, base: Path, tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        train(config(base, lora), dataset.path, None, tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_combinations_that_exclude_each_other(base: Path, whole: Path, dataset: kdata.Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora does not go with keep_layers"):
        config(base, student={"kind": "checkpoint", "model": str(base), "lora": LORA, "keep_layers": 1})
    with pytest.raises(ConfigError, match=r"unknown key 'student\.lora'"):
        config(base, student={"kind": "scratch", "lora": LORA})
    with pytest.raises(ConfigError, match="LoraConfig: rank: Input should be greater"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match=r"optimizer=muon does not go with student\.lora"):
        train(config(base, optimizer="muon"), dataset.path, None, tmp_path / "run")
    with pytest.raises(ConfigError, match="is an adapter itself"):
        train(config(whole / "model"), dataset.path, None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_peft_the_extra_is_named(
    base: Path, whole: Path, dataset: kdata.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: train(config(base), dataset.path, None, tmp_path / "run"),
        lambda: evaluate(whole / "model", dataset.path),
    ):
        with pytest.raises(DependencyError, match=r"pip install 'kdata\[peft\]'"):
            call()
    assert not (tmp_path / "run").exists()


def edit(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


DAMAGES: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no base": (lambda f: edit(f, base_model_name_or_path="no/such/base"), MissingError, "set base_model_name_or_path"),
    "nameless base": (lambda f: edit(f, base_model_name_or_path=None), ConfigError, "does not name the model"),
    "another kind": (lambda f: edit(f, peft_type="IA3"), ConfigError, "adapter of the kind 'IA3'"),
    "another rank": (lambda f: edit(f, r=5), CorruptError, "adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), MissingError, "has adapter_config.json and no"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"), CorruptError, "cannot be read"),
    "a tensor less": (lambda f: change_weights(f, lambda t: t.popitem()), CorruptError, "is only in the model"),
    "a tensor more": (
        lambda f: change_weights(f, lambda t: t.update({"base_model.model.x.lora_A.weight": torch.ones(1)})), CorruptError,
        "x.lora_A.weight is only in the file",
    ),
    "no settings": (lambda f: (f / "adapter_config.json").write_text("{"), CorruptError, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_adapter_is_refused(whole: Path, dataset: kdata.Dataset, tmp_path: Path, name: str) -> None:
    """PEFT itself only warns of tensors that are missing, and then uses random ones."""
    folder = Path(shutil.copytree(whole / "model", tmp_path / "model"))
    change, error, message = DAMAGES[name]
    change(folder)
    with pytest.raises(error, match=message) as caught:
        evaluate(folder, dataset.path)
    assert len(str(caught.value).splitlines()) == 1 and str(folder) in str(caught.value)
