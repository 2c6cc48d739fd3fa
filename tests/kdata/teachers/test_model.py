"""What is refused before a model is loaded: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from kdata.errors import ConfigError, KdataError, MissingError
from kdata.teachers.config import ServerConfig, TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import check_model


@pytest.fixture
def model(llama_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model folder, to be damaged."""
    return Path(shutil.copytree(llama_dir, tmp_path / "model"))


def refusal(path: Path | str, *, max_k: int = 8, **settings: Any) -> str:
    """The message of a refused model; loading it imports neither vLLM nor Transformers."""
    before = set(sys.modules)
    with pytest.raises((ConfigError, MissingError)) as caught:
        load_teacher(TeacherConfig(model=str(path), **settings), max_k=max_k)
    assert isinstance(caught.value, KdataError) and "\n" not in str(caught.value)
    assert not {"vllm", "transformers"} & (set(sys.modules) - before)
    return str(caught.value)


def test_a_whole_model_passes(model: Path) -> None:
    check_model(TeacherConfig(model=str(model), context=128), max_k=299)
    check_model(TeacherConfig(model="OWNER/NAME"), max_k=8)


def test_a_path_that_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"PK")
    assert "is a file; name a model folder, a GGUF file or a Hub name" in refusal(tmp_path / "weights.bin")
    assert "does not exist; name a model folder, a GGUF file or a Hub name" in refusal(tmp_path / "nothing")
    assert "does not exist" in refusal("./models/nothing") and "does not exist" in refusal("a/b/nothing")


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [("config.json", "config.json"), ("*.safetensors", "*.safetensors"), ("tokenizer.json", "tokenizer")],
)
def test_a_folder_that_lacks_a_file(model: Path, pattern: str, missing: str) -> None:
    for file in model.glob(pattern):
        file.unlink()
    assert f"{model} is not the folder of a Hugging Face model: it has no {missing}; name" in refusal(model)


def test_an_empty_folder_and_a_server_without_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no config.json and no *.safetensors and no tokenizer" in refusal(tmp_path / "empty")
    for file in model.glob("*.safetensors"):
        file.unlink()
    server = ServerConfig(endpoints=["http://127.0.0.1:9"])
    check_model(TeacherConfig(model=str(model), backend="vllm-server", server=server), max_k=8)


@pytest.mark.parametrize("content", ["{", "[]", '{"text_config": 3}'])
def test_a_damaged_config(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    assert "config.json is damaged (" in refusal(model) and "copy the model's folder again" in refusal(model)


def test_a_context_that_the_model_does_not_have(model: Path) -> None:
    message = refusal(model, context=129)
    assert (
        message.startswith("context=129 exceeds what")
        and "128 tokens" in message
        and "lower teacher.context" in message
    )
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0}
    (model / "config.json").write_text(json.dumps(config))
    check_model(TeacherConfig(model=str(model), context=512), max_k=8)  # the engine knows what a scaled model reads


def test_a_k_that_the_vocabulary_does_not_have(model: Path) -> None:
    assert refusal(model, max_k=300).startswith("k=300 must be below the vocabulary size of")
