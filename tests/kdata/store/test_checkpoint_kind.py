"""A folder that is not a language model with its weights is refused: one line that says what it is and what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kdata
from kdata.errors import ConfigError, CorruptError, KdataError, MissingError
from kdata.store.checkpoint_kind import refuse_kernels_of, refuse_other_kind
from kdata.teachers.config import ServerConfig, TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import check_model, load_tokenizer
from kdata.trainer.config import CheckpointStudent
from kdata.trainer.encoder_decoder import auto_class
from kdata.trainer.evaluate import evaluate
from kdata.trainer.student import build_student


@pytest.fixture
def model(llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_dir, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def without_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


def pickles(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")


def sharded_pickles(folder: Path) -> None:
    without_weights(folder)
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    (folder / "pytorch_model.bin.index.json").write_text("{}")


def flax(folder: Path) -> None:
    without_weights(folder)
    (folder / "flax_model.msgpack").write_bytes(b"")


def adapter(folder: Path) -> None:
    without_weights(folder)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "OWNER/BASE"}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def adapter_with_config(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").write_text("{}")


def remote_code(folder: Path) -> None:
    configure(folder, model_type="mymodel", architectures=["MyForCausalLM"],
              auto_map={"AutoModelForCausalLM": "modeling.MyForCausalLM"})  # fmt: skip
    (folder / "modeling.py").write_text("raise SystemExit('this code was run')")


def diffusers(folder: Path) -> None:
    shutil.rmtree(folder)
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def sentences(folder: Path) -> None:
    (folder / "modules.json").write_text("[]")
    (folder / "config_sentence_transformers.json").write_text("{}")


def gguf(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def lfs_pointer(folder: Path) -> None:
    next(folder.glob("*.safetensors")).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
    )


def kernel(folder: Path) -> None:
    configure(folder, _attn_implementation="kernels-community/flash-attn")


def kernel_of_a_part(folder: Path) -> None:
    configure(folder, text_config={"attn_implementation": {"": "OWNER/NAME@main:forward"}})


KINDS: list[tuple[Callable[[Path], None], type[Exception], str]] = [
    (pickles, ConfigError, r"weights in pytorch_model\.bin, a pickle file: .*Convert it once.*save_pretrained\(NEW\)"),
    (sharded_pickles, ConfigError, r"weights in pytorch_model-00001-of-00002\.bin, a pickle file"),
    (flax, ConfigError, r"flax_model\.msgpack, which only TensorFlow or Flax read; take a version"),
    (adapter, ConfigError, r"is a LoRA adapter of OWNER/BASE, not a model: merge it into that model first"),
    (adapter_with_config, ConfigError, r"is a LoRA adapter of OWNER/BASE"),
    (remote_code, ConfigError, r"MyForCausalLM, which needs Python code of its own \(auto_map .* never runs .*convert"),
    (
        diffusers,
        ConfigError,
        r"is a diffusers pipeline \(StableDiffusionPipeline\).*name the folder of a language model",
    ),
    (sentences, ConfigError, r"is a model of sentence embeddings"),
    (gguf, MissingError, r"holds GGUF files; name the file itself, for instance .*model-Q4_K_M\.gguf"),
    (
        kernel,
        ConfigError,
        r"_attn_implementation 'kernels-community/flash-attn', code that transformers would download",
    ),
    (kernel_of_a_part, ConfigError, r"attn_implementation 'OWNER/NAME@main:forward', code that .* never runs code"),
    (lfs_pointer, MissingError, r"is a pointer of Git LFS.*`git lfs pull`"),
    (lost_shard, MissingError, r"lacks 1 of the 2 weight files .* for instance model-2\.safetensors; download"),
]


@pytest.mark.parametrize(("change", "error", "message"), KINDS, ids=[kind[0].__name__ for kind in KINDS])
def test_what_it_is_and_what_to_do(
    model: Path, captured: Path, change: Callable[[Path], None], error: type[Exception], message: str
) -> None:
    """The same for a teacher of either backend, a student and an evaluation; the last two open adapters."""
    change(model)
    dataset = kdata.open(captured)
    teachers = (
        lambda: load_teacher(TeacherConfig(model=str(model)), max_k=8),
        lambda: load_teacher(TeacherConfig(model=str(model), backend="transformers"), max_k=8),
    )
    students = (
        lambda: build_student(CheckpointStudent(model=str(model)), dataset, 0),
        lambda: evaluate(model, captured),
    )
    for call in teachers if change in (adapter, adapter_with_config) else (*teachers, *students):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).startswith(str(model))


def test_whole_models_pass(model: Path) -> None:
    refuse_other_kind(model)
    configure(model, auto_map={"AutoModelForCausalLM": "modeling.X"})  # transformers knows a Llama without it
    configure(model, attn_implementation="sdpa", text_config={"_attn_implementation": None})
    (model / "training_args.bin").write_bytes(b"")
    (model / "adapter_config.json").write_text("{}")  # beside merged weights
    refuse_other_kind(model)
    check_model(TeacherConfig(model=str(model)), max_k=8)


def test_a_model_of_the_hub_names_no_kernel_either(model: Path) -> None:
    """Of such a name no folder is looked at before transformers loads it."""
    for own in (None, "sdpa", "flash_attention_2", "paged|sdpa"):
        configure(model, _attn_implementation=own)
        refuse_kernels_of(model)
    kernel(model)
    with pytest.raises(ConfigError, match="never runs code from a model"):
        refuse_kernels_of(model)
    with pytest.raises(ConfigError, match="never runs code from a model"):
        auto_class(str(model))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model.safetensors", "generation_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("change", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_of_a_model_are_not_read(model: Path, name: str, change: Callable[[Path], None]) -> None:
    (model / name).unlink(missing_ok=True)
    change(model / name)
    with pytest.raises(KdataError):
        check_model(TeacherConfig(model=str(model), backend="transformers"), max_k=8)
        load_tokenizer(model)


def test_a_text_of_a_model_that_fills_the_memory_is_not_read(model: Path) -> None:
    os.truncate(model / "tokenizer.json", 20 << 30)
    with pytest.raises(CorruptError, match=r"tokenizer\.json has more than 536,870,912 bytes"):
        load_tokenizer(model)


def test_a_served_model_needs_no_weights_here(model: Path) -> None:
    pickles(model)
    server = ServerConfig(endpoints=["http://127.0.0.1:9"])
    check_model(TeacherConfig(model=str(model), backend="vllm-server", server=server), max_k=8)
