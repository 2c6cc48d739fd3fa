"""Students cut out of a model: dead parts are the ones that go and change nothing, and scores are those of plain numpy."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import kdata
import kdata.trainer.importance as importance_module
import kdata.trainer.train as module
from kdata.config import parse_config
from kdata.errors import ConfigError, CorruptError, DataError, MismatchError
from kdata.pipelines.recipe import Recipe
from kdata.pipelines.run import Run
from kdata.trainer.config import PrunedSizes, PrunedStudent, TrainConfig
from kdata.trainer.importance import IMPORTANCE_FILE, METADATA, _digest, calibration_of, measure_importance
from kdata.trainer.pruning import Scores, Sizes, largest_parts, num_weights, prune, refuse_unfit
from kdata.trainer.student import build_student, importance_in
from kdata.trainer.train import train
from tests.fakes import rows_of_text, run_capture, write_jsonl
from tests.trainer.datasets import VOCAB, save_tokenizer
from tests.trainer.test_distributed import run_ranks

LENGTHS = [5 + (i * 7) % 40 for i in range(40)]
NUM_LAYERS, HIDDEN, CHANNELS, HEADS, HEAD = 4, 32, 24, 4, 6  # HEAD times HEADS is not HIDDEN
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": CHANNELS, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": HEADS, "head_dim": HEAD, "max_position_embeddings": 64, "initializer_range": 0.3,
    "rms_norm_eps": 1e-12, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama, tied": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama, biases": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, **BIASES}),
    "llama, a key-value head each": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": HEADS, **BIASES}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2}),
    "gemma3": (
        Gemma3ForCausalLM, Gemma3TextConfig, {"num_key_value_heads": 1, "query_pre_attn_scalar": 6, "sliding_window": 8},
    ),
    "gemma3, untied": (Gemma3ForCausalLM, Gemma3TextConfig, {"num_key_value_heads": 2, "tie_word_embeddings": False}),
}  # fmt: skip
TO = {"hidden_size": 20, "intermediate_size": 10, "num_heads": 2, "num_layers": 3}


def random_model(kind: str = "llama, biases", seed: int = 0) -> PreTrainedModel:
    """Small, with weights of every kind that are not those of the start: biases and norms too."""
    of, config, own = MODELS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = of(config(**COMMON, **own)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    place = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(place)
    save_tokenizer(place)
    return place


def layers_of(model: PreTrainedModel) -> Any:
    return model.model.layers  # type: ignore[union-attr]


@torch.no_grad()
def kill(model: PreTrainedModel, dataset: kdata.Dataset) -> dict[str, Any]:
    """Zero some parts of a model, so that it computes nothing with them; which are alive, in the order of the axes."""
    rng, config = np.random.default_rng(3), model.config
    alive = {
        "hidden_D": np.sort(rng.permutation(HIDDEN)[: TO["hidden_size"]]),
        "channels_NI": np.sort([rng.permutation(CHANNELS)[: TO["intermediate_size"]] for _ in range(NUM_LAYERS)]),
        "layers_N": np.array([0, 1, 3]),
    }
    dead_D = torch.from_numpy(np.setdiff1d(np.arange(HIDDEN), alive["hidden_D"]))
    model.get_input_embeddings().weight[:, dead_D] = 0
    for number, layer in enumerate(layers_of(model)):
        dead_I = torch.from_numpy(np.setdiff1d(np.arange(CHANNELS), alive["channels_NI"][number]))
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            zero(part, dead_I)
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            zero(part, dead_D if number in alive["layers_N"] else torch.arange(HIDDEN))
    heads = []
    for number, layer in enumerate(layers_of(model)):
        # The head of lowest score goes, and nothing reads it. Its score does not change by that, those of later layers do.
        kv_heads = config.num_key_value_heads
        groups = 1 if kv_heads == HEADS else kv_heads
        scores = measure_importance(model, calibration_of(dataset, None, 512, 0)).heads_NH[number].reshape(groups, -1)
        order = np.argsort(-scores, axis=1) + np.arange(groups)[:, None] * (HEADS // groups)
        heads.append(np.sort(order[:, : TO["num_heads"] // groups].ravel()))
        for head in set(range(HEADS)) - set(heads[-1].tolist()):
            layer.self_attn.o_proj.weight[:, head * HEAD : (head + 1) * HEAD] = 0
    return {**alive, "heads_NH": np.array(heads)}


def zero(linear: Any, rows: Tensor) -> None:
    linear.weight[rows] = 0
    if linear.bias is not None:
        linear.bias[rows] = 0


@pytest.mark.parametrize("kind", MODELS)
def test_dead_parts_are_pruned_and_the_logits_stay(dataset: kdata.Dataset, tmp_path: Path, kind: str) -> None:
    """In float64, but for the angles and Gemma's sqrt(D), which transformers has in float32. On disk as in memory."""
    model = random_model(kind)
    alive = kill(model, dataset)
    scores = measure_importance(model, calibration_of(dataset, None, 512, 0))
    kept = largest_parts(model.config, scores, Sizes(**TO))
    for name, expected in alive.items():
        np.testing.assert_array_equal(getattr(kept, name), expected, name)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    pruned = prune(model, kept)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert Sizes.of(pruned.config) == Sizes(**TO) and pruned.config.head_dim == HEAD
    tied = pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings and pruned.config.vocab_size == VOCAB
    assert sum(p.numel() for p in pruned.parameters()) == num_weights(model.config, Sizes(**TO))
    ids_BL = torch.arange(30).view(2, 15)
    with torch.no_grad():
        pruned.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(ids_BL).logits, pruned(ids_BL).logits)
        expected_BLV, ours_BLV = (in_float64(one)(ids_BL).logits for one in (model, prune(model.double(), kept)))
        torch.testing.assert_close(ours_BLV, expected_BLV, rtol=1e-6, atol=1e-6)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its norms computed in float64 too, by their definition."""
    is_gemma = model.config.model_type == "gemma3_text"

    def norm(module: Any, x: Tensor) -> Tensor:
        assert x.dtype == torch.float64
        return x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt() * (is_gemma + module.weight)

    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(norm, part)  # type: ignore[method-assign]
    return model


def test_a_head_is_kept_whole(dataset: kdata.Dataset) -> None:
    """Pairs of dimensions that rotary positions turn stay together, and each head keeps its key-value head."""
    model = random_model("qwen3")
    scores = measure_importance(model, calibration_of(dataset, None, 512, 0))
    kept = largest_parts(model.config, scores, Sizes(**TO))
    ours, theirs = (layers_of(one)[1].self_attn for one in (prune(model, kept), model))
    hidden_D = torch.from_numpy(kept.hidden_D)
    for place, head in enumerate(kept.heads_NH[1].tolist()):
        rows_E, from_E = (slice(number * HEAD, (number + 1) * HEAD) for number in (place, head))
        assert torch.equal(ours.q_proj.weight[rows_E], theirs.q_proj.weight[from_E][:, hidden_D])
        assert torch.equal(ours.o_proj.weight[:, rows_E], theirs.o_proj.weight[hidden_D][:, from_E])
        assert place // ours.num_key_value_groups == head // theirs.num_key_value_groups
    assert torch.equal(ours.k_proj.weight, theirs.k_proj.weight[:, hidden_D])
    assert torch.equal(ours.k_norm.weight, theirs.k_norm.weight) and torch.equal(
        ours.q_norm.weight, theirs.q_norm.weight
    )


@torch.no_grad()
def brute_force(model: PreTrainedModel, dataset: kdata.Dataset, rows: list[int]) -> dict[str, np.ndarray]:
    """Scores from what the hooks of torch see of each document alone, in numpy and float64."""
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str) -> Any:
        return lambda _, inputs, output: seen.setdefault(name, []).append(
            np.stack([part[0].double().numpy() for part in (inputs[0], output)], -1)
            if inputs[0].shape == output.shape
            else inputs[0][0].double().numpy()
        )

    for number, layer in enumerate(layers_of(model)):
        layer.register_forward_hook(keep(f"layer {number}"))
        layer.input_layernorm.register_forward_hook(keep(f"norm {number} a"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"norm {number} b"))
        layer.mlp.down_proj.register_forward_hook(keep(f"channel {number}"))
        layer.self_attn.o_proj.register_forward_hook(keep(f"head {number}"))
    for row in rows:
        model(torch.from_numpy(np.asarray(dataset[row].token_ids, np.int64))[None])

    def norm(name: str) -> np.ndarray:
        samples = [np.abs(one[..., 1] if one.ndim == 3 else one).mean(0) for one in seen[name]]
        return np.sqrt((np.stack(samples) ** 2).sum(0))

    def distance(one: np.ndarray) -> float:
        inner, outer = one[..., 0], one[..., 1]
        lengths = np.linalg.norm(inner, axis=1) * np.linalg.norm(outer, axis=1)
        return float((1 - (inner * outer).sum(1) / np.maximum(lengths, 1e-8)).mean())  # of the token that pads: 0

    numbers = range(NUM_LAYERS)
    return {
        "hidden_D": sum(norm(f"norm {number} {part}") for number in numbers for part in "ab"),
        "channels_NI": np.stack([norm(f"channel {number}") for number in numbers]),
        "heads_NH": np.stack([np.linalg.norm(norm(f"head {n}").reshape(HEADS, HEAD), axis=1) for n in numbers]),
        "layers_N": np.array([np.mean([distance(one) for one in seen[f"layer {n}"]]) for n in numbers]),
    }


def test_scores_are_those_of_plain_numpy(dataset: kdata.Dataset) -> None:
    """Documents are packed here and alone there; one of a single token, and rows drawn by the seed."""
    calibration = calibration_of(dataset, np.array([30, 3, 3, 17, 9, 22, 5]), 5, 1)
    assert len(calibration.rows) == 5 and set(calibration.rows) < {30, 3, 17, 9, 22, 5}
    model = random_model()
    scores = measure_importance(model, calibration)
    for name, expected in brute_force(model, dataset, calibration.rows.tolist()).items():
        np.testing.assert_allclose(getattr(scores, name), expected, rtol=2e-5, err_msg=name)


@given(st.data())
def test_the_largest_parts_are_taken_in_every_group(data: st.DataObject) -> None:
    config = MODELS["llama, biases"][1](
        **{**COMMON, "num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48}
    )
    scores = [
        np.array(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)), float).reshape(shape)
        for size, shape in ((48, 48), (8, (4, 2)), (48, (4, 12)), (4, 4))
    ]
    each, layers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    kept = largest_parts(config, Scores(*scores), Sizes(data.draw(st.integers(1, 48)), 1, 3 * each, layers))
    for score_H, heads_H in zip(scores[2], kept.heads_NH, strict=True):
        for group in range(3):
            own = {head for head in heads_H.tolist() if head // 4 == group}
            others = set(range(4 * group, 4 * group + 4)) - own
            assert len(own) == each and all(score_H[head] <= min(score_H[list(own)]) for head in others)
    for score_X, kept_X in ((scores[0], kept.hidden_D), (scores[3], kept.layers_N)):
        assert (np.diff(kept_X) > 0).all()
        assert sorted(score_X[kept_X]) == sorted(score_X)[len(score_X) - len(kept_X) :]


def config(model: Path | str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "student": {"kind": "pruned", "model": str(model), **TO}, "steps": 6, "batch_tokens": 256, "context_tokens": 64,
        "warmup_steps": 1, "checkpoint_every_steps": 2, "log_every_steps": 1, "device": "cpu",
    }  # fmt: skip
    return TrainConfig.model_validate({**values, **changes})


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_student_is_pruned_trained_and_resumed(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores stand beside the student and are not computed again; what follows is bit-equal, with the file and without."""
    settings = config(folder)
    train(settings, dataset.path, None, tmp_path / "whole")
    file = tmp_path / "whole" / IMPORTANCE_FILE
    table = pq.read_table(file).to_pandas()
    assert table[table.kept].groupby("axis").size().to_dict() == {
        "hidden": TO["hidden_size"], "channel": NUM_LAYERS * TO["intermediate_size"],
        "head": NUM_LAYERS * TO["num_heads"], "layer": TO["num_layers"],
    }  # fmt: skip
    about = json.loads(pq.read_schema(file).metadata[b"kdata.importance"])["source"]
    assert about["rows"] == len(LENGTHS) and about["dataset_digest"] == dataset.content_digest
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert Sizes.of(student.config) == Sizes(**TO)

    real, computed = module._gradients, []
    monkeypatch.setattr(
        importance_module, "measure_importance", lambda *args: computed.append(1) or measure_importance(*args)
    )
    for name, keep_file in (("with", True), ("without", False)):
        out = tmp_path / name
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                module,
                "_gradients",
                lambda *args: (_ for _ in ()).throw(KeyboardInterrupt) if args[-1] == 4 else real(*args),
            )
            train(settings, dataset.path, None, out)
        if not keep_file:
            (out / IMPORTANCE_FILE).unlink()
        computed.clear()
        train(settings, dataset.path, None, out)
        assert len(computed) == (not keep_file)
        assert losses(out) == losses(tmp_path / "whole")
        assert (out / IMPORTANCE_FILE).read_bytes() == file.read_bytes()


def test_scores_of_another_model_are_not_used(dataset: kdata.Dataset, folder: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    random_model(seed=1).save_pretrained(other)
    save_tokenizer(other)
    train(config(folder), dataset.path, None, out)
    before = (out / IMPORTANCE_FILE).read_bytes()
    chosen = importance_in(build_student(config(other).student, dataset, 0, importance=out / IMPORTANCE_FILE))
    afresh = importance_in(build_student(config(other).student, dataset, 0))
    assert chosen is not None and afresh is not None and chosen.to_bytes() == afresh.to_bytes() != before
    for path in folder.iterdir():
        (other / "former").mkdir(exist_ok=True)
        (other / "former" / path.name).write_bytes(path.read_bytes())
    moved = tmp_path / "moved"
    train(config(other / "former"), dataset.path, None, moved)
    for path in other.glob("*.safetensors"):
        (other / "former" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(MismatchError, match=r"begun with other settings.*\n.*kept_digest"):
        train(config(other / "former"), dataset.path, None, moved)


def test_a_damaged_file_of_scores_is_refused(dataset: kdata.Dataset, folder: Path, tmp_path: Path) -> None:
    student, file = config(folder).student, tmp_path / IMPORTANCE_FILE
    chosen = importance_in(build_student(student, dataset, 0))
    assert chosen is not None
    whole = chosen.to_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(CorruptError, match=r"importance\.parquet is damaged .*; remove it"):
        build_student(student, dataset, 0, importance=file)
    file.write_bytes(whole)
    table = pq.read_table(file)
    scores = table["score"].to_numpy().copy()
    scores[7] += 1
    pq.write_table(table.set_column(3, "score", [scores]), file)
    with pytest.raises(CorruptError, match="does not match its own digest; remove it"):
        build_student(student, dataset, 0, importance=file)
    for other in (pa.array([b"x"] * len(scores)), pa.array(scores, pa.float32()), pa.array(scores).cast(pa.string())):
        pq.write_table(table.set_column(3, "score", other), file)
        with pytest.raises(CorruptError, match=r"importance\.parquet is damaged .*; remove it"):
            build_student(student, dataset, 0, importance=file)
    about = json.loads(table.schema.metadata[METADATA])
    for rows, losses in ((len(table) - 1, about["losses"]), (len(table), [*about["losses"], 1.0])):  # digests that fit
        flat = table["score"].to_numpy()[:rows]
        told = json.dumps({**about, "losses": losses, "digest": _digest(flat, losses)})
        pq.write_table(table.slice(0, rows).replace_schema_metadata({METADATA: told}), file)
        with pytest.raises(CorruptError, match=r"importance\.parquet is damaged .*; remove it"):
            build_student(student, dataset, 0, importance=file)


def test_a_start_that_is_refused_leaves_the_scores_of_the_run(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path
) -> None:
    train(config(folder), dataset.path, None, tmp_path)
    before = (tmp_path / IMPORTANCE_FILE).read_bytes()
    other = config(folder)
    changed = other.model_copy(update={"student": other.student.model_copy(update={"importance_rows": 5})})
    with pytest.raises(MismatchError, match="importance_rows"):
        train(changed, dataset.path, None, tmp_path)
    assert (tmp_path / IMPORTANCE_FILE).read_bytes() == before


QUANTIZED = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


@pytest.mark.parametrize(
    ("sizes", "own", "message"),
    [
        ({"hidden_size": 33}, {}, r"student\.hidden_size=33 is more than the 32 of MODEL; give at most 32"),
        ({"intermediate_size": 25}, {}, r"student\.intermediate_size=25 is more than the 24 of MODEL"),
        ({"num_heads": 5}, {}, r"student\.num_heads=5 is more than the 4 of MODEL"),
        ({"num_layers": 5}, {}, r"student\.num_layers=5 is more than the 4 of MODEL"),
        ({"num_heads": 3}, {}, r"num_heads=3 is no multiple of the 2 key-value heads of MODEL.*; give a multiple of 2"),
        ({"hidden_size": 18}, {}, r"hidden_size=18 is no multiple of num_heads=4, and transformers opens no model"),
        ({"num_layers": 2}, QUANTIZED, r"the weights of MODEL are quantized.*; name the model before it was quantized"),
        (
            {"num_layers": 2},
            {"model_type": "phi3"},
            r"MODEL is of the type 'phi3', and the parts of gemma3_text, llama,",
        ),
        (
            {"candidates": [{"num_layers": 2}, {"num_layers": 4}]},
            {},
            r"candidates have 13,600 to 23,264 parameters, and the largest",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_the_weights_are_read(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path, sizes: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    place = copy_of(folder, tmp_path / "model", own)
    student = PrunedStudent.model_validate({"model": str(place), **sizes})
    with pytest.raises(ConfigError, match=message.replace("MODEL", str(place))) as caught:
        train(config(place, student=student), dataset.path, None, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def copy_of(folder: Path, place: Path, own: dict[str, Any]) -> Path:
    """A model's folder with other settings and no readable weights."""
    shutil.copytree(folder, place)
    settings = json.loads((folder / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(settings | own))
    (place / "model.safetensors").write_bytes(b"0" * 100_000)
    return place


def test_a_model_with_another_tokenizer_is_refused_before_the_weights_are_read(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path
) -> None:
    place = copy_of(folder, tmp_path / "model", {})
    save_tokenizer(place, VOCAB - 1)
    with pytest.raises(MismatchError, match=r"tokenizers of .* are not the same"):
        build_student(PrunedStudent(model=str(place), num_layers=1), dataset, 0)


def test_rows_beyond_the_model_s_positions_are_refused(dataset: kdata.Dataset, tmp_path: Path) -> None:
    model = random_model()
    model.config.max_position_embeddings = 20
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"a document has 44 tokens, the student has 20 positions"):
        build_student(PrunedStudent(model=str(tmp_path), num_layers=1), dataset, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing is pruned without a size: set hidden_size"),
        (
            {"hidden_size": 0},
            "student.pruned.hidden_size|student.hidden_size: Input should be greater than or equal to 1",
        ),
        (
            {"num_heads": 2, "candidates": [{"num_layers": 2}]},
            "num_heads would be ignored, because candidates have sizes",
        ),
        ({"candidates": [{}]}, "nothing is pruned without a size"),
        ({"num_layers": 2, "lora": {}}, "unknown key 'student.lora'"),
    ],
)
def test_settings_that_prune_nothing_or_twice_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(TrainConfig, {"student": {"kind": "pruned", "model": "M", **values}}, "train settings")


def test_the_best_candidate_is_taken(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By its forward KL on the stored entries, as plain torch computes it; a table shows all, and the file keeps them."""
    candidates = [
        PrunedSizes(hidden_size=28, num_heads=2),
        PrunedSizes(intermediate_size=12),
        PrunedSizes(num_layers=3),
    ]
    student = PrunedStudent(model=str(folder), candidates=candidates, candidate_tokens=60)
    out = tmp_path / "out"
    train(config(folder, student=student), dataset.path, None, out)
    about = json.loads(pq.read_schema(out / IMPORTANCE_FILE).metadata[b"kdata.importance"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    calibration = calibration_of(dataset, None, 512, 0)
    scores, expected = measure_importance(model, calibration), []
    for sizes in refuse_unfit("M", model.config, student):
        candidate = prune(model, largest_parts(model.config, scores, sizes)).double()
        total, count = 0.0, 0
        for batch in calibration.batches(batch_rows=1):
            with torch.no_grad():
                ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
                logits_MV = candidate(**ids).logits[0][batch.predictor_M]
            q_MK = logits_MV.log_softmax(-1).gather(1, batch.targets.ids_CK)
            p_MK, tail_M = batch.targets.logprobs_CK.double(), batch.targets.log_tail_C.double()
            rest_M = torch.log1p(-q_MK.exp().sum(1))
            total += float((p_MK.exp() * (p_MK - q_MK)).sum() + (tail_M.exp() * (tail_M - rest_M)).sum())
            count += len(batch.targets)
            if count >= 60:
                break
        expected.append(total / count)
    np.testing.assert_allclose(about["losses"], expected, rtol=1e-4)
    best = int(np.argmin(expected))
    trained = AutoModelForCausalLM.from_pretrained(out / "model").config
    assert Sizes.of(trained) == refuse_unfit("M", model.config, student)[best]
    shown = [line for line in capfd.readouterr().err.splitlines() if line.startswith("candidate ")]
    assert len(shown) == 3 and [number for number, line in enumerate(shown) if "<- the student" in line] == [best]
    train(config(folder, student=student), dataset.path, None, out)  # it is finished, and reads what it compared
    assert json.loads(pq.read_schema(out / IMPORTANCE_FILE).metadata[b"kdata.importance"]) == about


def test_candidates_are_compared_where_a_distribution_is_kept(
    llama_dir: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """All rows count for the scores, those without a distribution too; a dataset that keeps none cannot compare."""
    corpus = write_jsonl(tmp_path / "corpus.jsonl", rows_of_text(30))
    some, none, whole = (
        run_capture(tmp_path / name, corpus, tokenizer_dir, kind="threshold", threshold=0.05, **own)
        for name, own in (
            ("some", {"positions": {"rule": "entropy", "threshold": 3.3}}),
            ("none", {"positions": {"rule": "entropy", "threshold": 5.69}}),
            ("whole", {}),
        )
    )
    both = [PrunedSizes(intermediate_size=48, hidden_size=56), PrunedSizes(hidden_size=48)]
    student = PrunedStudent(model=str(llama_dir), candidates=both)
    chosen, as_whole = (importance_in(build_student(student, one, 0)) for one in (some, whole))
    assert chosen is not None and as_whole is not None and np.isfinite(chosen.losses).all()
    assert chosen.losses != as_whole.losses and chosen.source["rows"] == 30
    np.testing.assert_allclose(chosen.scores.hidden_D, as_whole.scores.hidden_D, rtol=1e-5)
    with pytest.raises(DataError, match="keeps no distribution in the 30 rows"):
        build_student(student, none, 0)


def test_a_recipe_s_students_start_from_the_teacher_s_parts(folder: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "name": "pruned",
        "teacher": {"model": str(folder), "backend": "transformers"},
        "student": {"model": "teacher", "prune": {"hidden_size": 16, "importance_rows": 8}},
        "students": {"plain": {"label": "plain", "objective": {"weights": {"forward_kl": 1.0}}}},
    }
    recipe = Recipe.model_validate(values)
    student = Run(recipe, tmp_path, {}).train_config(recipe.students["plain"]).student
    assert student == PrunedStudent(model=str(folder), hidden_size=16, importance_rows=8)
    for other in ({"keep_layers": 2}, {"lora": {}}, {"model": None}):
        with pytest.raises(ValueError, match=r"prune (does not go with|chooses parts of a checkpoint)"):
            Recipe.model_validate({**values, "student": {**values["student"], **other}})
    assert "prune" not in Recipe.model_validate({**values, "student": {"model": "teacher"}}).settings()["student"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_the_student_of_one(
    dataset: kdata.Dataset, folder: Path, tmp_path: Path, parallel: str
) -> None:
    settings = config(folder)
    train(settings, dataset.path, None, tmp_path / "one")
    own = {**settings.model_dump(mode="json"), "parallel": parallel}
    run_ranks([{"config": own, "dataset": str(dataset.path), "out": str(tmp_path / "two")}], tmp_path)
    one, two = ((tmp_path / name / IMPORTANCE_FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)
