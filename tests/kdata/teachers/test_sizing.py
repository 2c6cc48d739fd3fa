"""Memory is computed from small files: what fits, how the engine is sized, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdata.config import apply_settings, parse_config
from kdata.errors import ConfigError, MissingError
from kdata.teachers import sizing
from kdata.teachers.config import TeacherConfig
from kdata.teachers.engine_args import check_known, known_engine_args, lora_hash, lora_rank, of_identity, of_speed
from kdata.teachers.load import load_teacher
from kdata.teachers.sizing import GIB, ModelSize, Work, free_memory, model_size, plan_memory

GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": 262_144, "hidden_size": 640,
    "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    "max_position_embeddings": 32_768, "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 3,
}  # fmt: skip


def write_model(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, list[int], int]]) -> Path:
    """A model folder whose weights are a header and a hole of the right size."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header, end = {}, 0
    for name, (kind, shape, size) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """The small files of a model as large as Gemma 3 270M."""
    embedding = ("BF16", [262_144, 640], 262_144 * 640 * 2)
    rest = ("BF16", [100_000, 1000], 100_000 * 1000 * 2)
    return write_model(tmp_path / "gemma", GEMMA, {"model.embed_tokens.weight": embedding, "rest": rest})


@pytest.fixture
def with_memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says how much memory this machine has, in GiB, and that it has no GPU."""
    monkeypatch.setattr(sizing, "gpu_memory", lambda count: None)
    return lambda gib: monkeypatch.setattr(sizing, "free_memory", lambda: (int(gib * GIB), int(gib * GIB)))


def size_of(folder: Path, **settings: Any) -> ModelSize:
    size = model_size(folder, TeacherConfig(model=str(folder), **settings))
    assert size is not None
    return size


def test_the_bytes_of_a_model(gemma: Path) -> None:
    size, half = size_of(gemma), size_of(gemma, dtype="bfloat16")
    assert size.weights == 4 * (262_144 * 640 + 100_000_000) == 2 * half.weights
    assert size.head == 4 * 262_144 * 640 and size.is_tied and size.longest == 32_768
    assert (size.kv_full, size.kv_sliding, size.window) == (3 * 2 * 256 * 4, 15 * 2 * 256 * 4, 512)
    assert size.kv_bytes(32_768, 32_768) == 32_768 * (size.kv_full + size.kv_sliding) + 128 * size.kv_sliding
    assert size_of(gemma, dtype="auto").weights == half.weights
    assert size_of(gemma, dtype="bfloat16", engine_args={"quantization": "fp8"}).weights == half.weights // 2
    assert size_of(gemma, engine_args={"kv_cache_dtype": "fp8"}).kv_full * 4 == size.kv_full


@pytest.mark.parametrize(
    ("changes", "kv_full", "kv_sliding"),
    [
        ({"layer_types": None, "sliding_window": None}, 18 * 2048, 0),
        ({"layer_types": None}, 0, 18 * 2048),
        ({"layer_types": None, "use_sliding_window": False}, 18 * 2048, 0),
        ({"layer_types": ["linear_attention", "full_attention"] * 9}, 9 * 2048, 0),
        ({"layer_types": None, "model_type": "mamba"}, 0, 0),
        ({"layer_types": None, "sliding_window": None, "kv_lora_rank": 100, "qk_rope_head_dim": 28}, 18 * 512, 0),
        ({"layer_types": None, "sliding_window": None, "num_key_value_heads": None}, 4 * 18 * 2048, 0),
    ],
)
def test_the_cache_of_each_kind_of_model(gemma: Path, changes: dict[str, Any], kv_full: int, kv_sliding: int) -> None:
    (gemma / "config.json").write_text(json.dumps({**GEMMA, **changes}))
    size = size_of(gemma)
    assert (size.kv_full, size.kv_sliding) == (kv_full, kv_sliding)


def test_a_config_inside_another_and_one_without_the_usual_names(gemma: Path) -> None:
    plain = size_of(gemma)
    (gemma / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": GEMMA}))
    assert size_of(gemma) == plain
    (gemma / "config.json").write_text(json.dumps({"vocab_size": 300}))
    assert model_size(gemma, TeacherConfig(model=str(gemma))) is None


def test_weights_that_are_cut_off(gemma: Path) -> None:
    file = gemma / "model.safetensors"
    with file.open("rb+") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged: it has .* bytes, its header says"):
        load_teacher(TeacherConfig(model=str(gemma)), max_k=8)


def test_the_engine_is_as_long_as_its_work(gemma: Path, with_memory: Any) -> None:
    with_memory(16)
    config, size = TeacherConfig(model=str(gemma)), size_of(gemma)

    def length(work: Work, **settings: Any) -> int:
        return plan_memory(config.model_copy(update=settings), size, work).length

    assert length(Work(1000)) == 1001 and length(Work(40_000)) == 32_768 and length(Work(10)) == 256
    assert length(Work(None)) == sizing.UNKNOWN_LENGTH and length(Work(1000), context=600) == 600
    (gemma / "config.json").write_text(
        json.dumps({**GEMMA, "rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}})
    )
    stretched = size_of(gemma)
    assert plan_memory(config, stretched, Work(1000)).length == 32_768, "its positions depend on the engine's length"


def test_the_cache_holds_what_is_worked_on(gemma: Path, with_memory: Any) -> None:
    with_memory(16)
    config, size = TeacherConfig(model=str(gemma)), size_of(gemma)
    per_token = size.kv_full + size.kv_sliding
    reads, writes = (plan_memory(config, size, Work(1000, writes=w)).kv_cache for w in (False, True))
    assert reads == per_token * 8192, "two steps of what is read"
    assert writes == GIB
    assert plan_memory(config, size, Work(40_000, writes=False)).kv_cache > size.kv_bytes(32_768, 32_768) > GIB
    assert plan_memory(config.model_copy(update={"kv_cache_gib": 0.5}), size, Work(1000)).kv_cache == GIB // 2
    with pytest.raises(ConfigError, match=r"kv_cache_gib=0.5 holds no sequence of 32,768 tokens, which takes 1.13 GiB"):
        plan_memory(config.model_copy(update={"kv_cache_gib": 0.5}), size, Work(40_000))
    with_memory(3.3)
    assert plan_memory(config, size, Work(1000)).kv_cache < GIB, "less where memory is short"


@pytest.mark.parametrize(
    ("gib", "work", "settings", "remedy"),
    [
        (2.5, Work(1000), {}, "set teacher.dtype=bfloat16, which halves the weights"),
        (1.5, Work(1000), {}, "take a smaller or a quantized model, or a larger machine"),
        (1.2, Work(1000), {"dtype": "bfloat16"}, "take a smaller or a quantized model, or a larger machine"),
        (3.5, Work(32_000), {}, "lower max_tokens or teacher.context (about "),
        (2.5, Work(600), {"path": "logprobs", "logits_gib": 8.0}, "lower teacher.logits_gib"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    gemma: Path, with_memory: Any, gib: float, work: Work, settings: dict[str, Any], remedy: str
) -> None:
    with_memory(gib)
    with pytest.raises(ConfigError) as caught:
        load_teacher(TeacherConfig(model=str(gemma), **settings), max_k=8, work=work)
    message = str(caught.value)
    assert message.startswith(f"{gemma} does not fit: weights ") and "\n" not in message
    for part in (
        "GiB",
        "logits of a step",
        "KV cache of one sequence of",
        "at a time",
        f"has {gib:g} GiB free",
        remedy,
    ):
        assert part in message, message


def test_a_refusal_loads_neither_torch_nor_vllm(gemma: Path) -> None:
    code = (
        "import sys\nfrom kdata.teachers import sizing\nfrom kdata.teachers.load import load_teacher\n"
        "from kdata.teachers.config import TeacherConfig\nfrom kdata.errors import ConfigError\n"
        "sizing.free_memory = lambda: (1 << 30, 1 << 30)\nsizing.gpu_memory = lambda count: None\n"
        f"try:\n    load_teacher(TeacherConfig(model={str(gemma)!r}), max_k=8)\nexcept ConfigError as error:\n"
        "    print(error)\nassert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not fit: weights" in done.stdout


def test_a_gpu_is_measured_by_what_is_free_and_by_its_share(gemma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML stands in: there is no GPU here."""
    monkeypatch.setattr(sizing, "gpu_memory", lambda count: (3 * GIB, 4 * GIB))
    config, size = TeacherConfig(model=str(gemma), memory_fraction=0.5), size_of(gemma)
    plan = plan_memory(config, size, Work(1000))
    assert plan.free == 2 * GIB and plan.kv_cache is None and "the program" not in plan.parts
    monkeypatch.setattr(sizing, "gpu_memory", lambda count: (GIB, 4 * GIB))
    with pytest.raises(ConfigError, match="this GPU has 1 GiB free"):
        plan_memory(config, size, Work(1000))
    monkeypatch.setattr(sizing, "gpu_memory", lambda count: (2 * GIB, 4 * GIB))
    over_two = TeacherConfig(model=str(gemma), tensor_parallel=2, dtype="bfloat16")
    half = plan_memory(over_two, size_of(gemma, dtype="bfloat16"), Work(1000))
    assert half.parts["weights"] == size.weights // 4


NAMES = {2: ("memory.max", "memory.current", "inactive_file"),
         1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip


def write_cgroup(folder: Path, version: int, limit: str, usage: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name, cached_name = NAMES[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cached_name} {cached}\n")


@pytest.mark.parametrize(
    ("version", "line"),
    [
        (2, "0::/outer/inner\n"),
        (1, "4:cpu,cpuacct:/other\n9:memory:/outer/inner\n"),
        (1, "3:hugetlb,memory:/outer/inner\n"),
    ],
)
def test_the_memory_of_the_cgroups_above_this_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, line: str
) -> None:
    total = free_memory()[1]
    (tmp_path / "cgroup").write_text(line)
    monkeypatch.setattr(sizing, "PROC_FILE", tmp_path / "cgroup")
    monkeypatch.setattr(sizing, "CGROUP_FOLDER", tmp_path)
    root = tmp_path / "memory" if version == 1 else tmp_path
    write_cgroup(root / "outer/inner", version, "max" if version == 2 else str(1 << 62), 100_000, 0)
    assert free_memory()[1] == total, "no limit at all"
    write_cgroup(root / "outer", version, "1000000", 400_000, 150_000)
    assert free_memory() == (750_000, 1_000_000), "of a group above; what files cache is given back"
    write_cgroup(root / "outer/inner", version, "900000", 850_000, 0)
    assert free_memory() == (50_000, 900_000), "the least of both"
    write_cgroup(root / "outer/inner", version, "900000", 950_000, 0)
    assert free_memory()[0] == 0, "never less than nothing"
    (tmp_path / "cgroup").unlink()
    assert free_memory()[1] == total, "no such file, as on other systems"


# ------------------------------------------------------------------------------------------------------ engine arguments


def config_of(*settings: str) -> TeacherConfig:
    values = apply_settings({}, [f"engine_args.{setting}" for setting in settings])
    return parse_config(TeacherConfig, {"model": "m", **values}, "teacher settings")


def test_arguments_are_those_that_change_numbers_and_the_others() -> None:
    args = config_of(
        "quantization=fp8", "pipeline_parallel_size=2", "kv_cache_dtype=fp8", "enable_expert_parallel=true"
    )
    assert of_identity(args.engine_args) == {"kv_cache_dtype": "fp8", "quantization": "fp8"}
    assert of_speed(args.engine_args) == {"enable_expert_parallel": True, "pipeline_parallel_size": 2}
    assert of_identity({}) is None and of_speed({}) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "trust_remote_code=true",
            "engine_args.trust_remote_code would run code that is not vLLM's own; leave it away",
        ),
        ("worker_cls=a.B", "engine_args.worker_cls would run code"),
        ("kv_transfer_config={kv_connector: X}", "engine_args.kv_transfer_config would run code"),
        ("compilation_config={backend: a.b}", "engine_args.compilation_config.backend would run code"),
        ("distributed_executor_backend=a.B", "distributed_executor_backend='a.B': take one of mp, ray"),
        ("load_format=dummy", "load_format='dummy': take one of auto, safetensors"),
        ("max_model_len=5", "engine_args.max_model_len is decided elsewhere: set teacher.context"),
        ("data_parallel_size=2", "run several teachers with --engine ray"),
        ("speculative_config={method: ngram}", "engine_args.speculative_config is decided elsewhere"),
    ],
)
def test_arguments_that_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(setting)
    assert message in str(caught.value)


@pytest.mark.parametrize("backend", ["transformers", "vllm-server"])
def test_another_backend_takes_none(backend: str) -> None:
    values = {"model": "m", "backend": backend, "engine_args": {"quantization": "fp8"}}
    if backend == "vllm-server":
        values["server"] = {"endpoints": ["http://h:1"]}
    with pytest.raises(ConfigError, match=f"engine_args would be ignored by backend {backend}"):
        parse_config(TeacherConfig, values, "teacher settings")


def test_a_name_that_vllm_does_not_know(gemma: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=r"engine_args.quantisation: .* \(did you mean 'quantization'\?\)"):
        load_teacher(TeacherConfig(model=str(gemma), engine_args={"quantisation": "fp8"}), max_k=8)
    check_known({"quantization": "fp8"})


def test_every_name_in_the_lists_is_vllm_s() -> None:
    """Names are read from vLLM's source; they are those of the class."""
    pytest.importorskip("vllm")
    from dataclasses import fields
    from typing import get_args

    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import LoadFormats

    from kdata.teachers import engine_args

    known = {field.name for field in fields(EngineArgs) if not field.name.startswith("_")}
    assert known_engine_args() == known
    listed = {*engine_args.DECIDED, *engine_args.RUNS_CODE, *engine_args.RUNS_CODE_INSIDE, *engine_args.CHOICES}
    assert not (listed | engine_args.SPEED) - known
    assert not engine_args.SPEED & (set(engine_args.DECIDED) | engine_args.RUNS_CODE)
    assert set(engine_args.CHOICES["load_format"]) <= set(get_args(LoadFormats))


def test_the_folder_of_an_adapter(tmp_path: Path, gemma: Path) -> None:
    with pytest.raises(MissingError, match=r"has no adapter_config\.json; name a folder with"):
        load_teacher(TeacherConfig(model=str(gemma), lora=str(tmp_path)), max_k=8)
    (tmp_path / "adapter_config.json").write_text('{"r": 9, "rank_pattern": {"q_proj": 17}}')
    with pytest.raises(MissingError, match=r"has no adapter_model.safetensors"):
        lora_rank(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    assert lora_rank(tmp_path) == 32
    before = lora_hash(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"others")
    assert lora_hash(tmp_path) != before
    (tmp_path / "adapter_config.json").write_text('{"r": 1000}')
    with pytest.raises(ConfigError, match="rank 1000 exceeds what vLLM takes, 512"):
        lora_rank(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json is damaged"):
        lora_rank(tmp_path)


def test_arguments_that_change_numbers_are_part_of_the_identity(captured: Path, tmp_path: Path) -> None:
    from kdata.errors import MismatchError
    from kdata.format.manifest import read_info
    from kdata.store.writer import Writer

    root = Path(shutil.copytree(captured, tmp_path / "dataset"))
    info = read_info(root)

    def with_args(**args: Any) -> Any:
        return info.model_copy(update={"teacher": info.teacher.model_copy(update=args)})

    assert with_args(speed_args={"max_num_seqs": 8}).identity() == info.identity()
    assert "engine_args" not in info.model_dump()["teacher"]
    [(name, source)] = info.sources.items()
    with pytest.raises(MismatchError, match="engine_args: None -> "):
        Writer(root, with_args(engine_args={"quantization": "fp8"}), name, source).__enter__()


def test_a_model_of_any_number_of_layers_is_damage(gemma: Path) -> None:
    (gemma / "config.json").write_text(json.dumps({**GEMMA, "num_hidden_layers": 10**12, "layer_types": None}))
    with pytest.raises(ConfigError, match="1000000000000 layers"):
        model_size(gemma, TeacherConfig(model=str(gemma)))
