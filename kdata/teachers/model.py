"""Which model a teacher is: what its folder must hold, its identity, revision and tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, DependencyError, MissingError, first_line
from kdata.format.files import rust_errors, storage_errors, temporary_folder
from kdata.format.json_text import read_json
from kdata.format.schema import TokenizerInfo
from kdata.store.checkpoint_kind import refuse_other_kind
from kdata.store.gguf import begin_with_bos, gguf_identity, is_gguf, model_folder
from kdata.store.hub import hub_errors
from kdata.store.pretrained import model_files, weights_digest
from kdata.store.tokens import refuse_far_ids, refuse_far_ids_of, tokenizer_hash
from kdata.teachers.config import TeacherConfig

# One of these is in the folder of every model that has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Names of the output head in a file of weights; without any, the head is the embedding.
HEADS = ("lm_head.weight", "embed_out.weight", "language_model.lm_head.weight")
# Where configurations say how many tokens a model reads: most of them, MPT, RWKV, GPT-2, Bloom.
LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "context_length", "n_positions", "seq_length")


def sizes_of(model: Any, config: TeacherConfig) -> tuple[int, int]:
    """Rows of the head and the longest sequence, by a configuration of transformers; of a multimodal model its text part's.

    Raises ConfigError where neither the configuration (of Bloom or Mamba) nor `context` says how long a sequence may be.
    """
    text = model.get_text_config()
    known = [length for key in LENGTH_KEYS if isinstance(length := getattr(text, key, None), int) and length > 0]
    longest = config.context or next(iter(known), None)
    if longest is None:
        raise ConfigError(
            f"the configuration of {config.model} ({text.model_type}) does not say how many tokens it reads at once; set it: "
            "--set teacher.context=2048, or as many as it was trained on"
        )
    return int(text.vocab_size), int(longest)


def model_shape(config: TeacherConfig) -> tuple[int, int]:
    """Layers of a model and numbers of a hidden state, by its config.json; nothing is loaded.

    Raises DependencyError where transformers is not installed, CorruptError where config.json is damaged.
    """
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise DependencyError("hidden states need transformers: pip install 'kdata[train]'") from error
    check_model(config, max_k=1)
    place = as_folder(config).model
    with model_files(place, "the configuration"):
        text: Any = AutoConfig.from_pretrained(place, revision=config.revision).get_text_config()
        return int(text.num_hidden_layers), int(text.hidden_size)


def check_model(config: TeacherConfig, *, max_k: int) -> None:
    """Refuse a model folder that cannot be this teacher, by its small files, before anything is loaded.

    A Hub name passes: its files are not here yet. A GGUF file is converted (`kdata/store/gguf.py`).

    Args:
        config: which model, and how it is read.
        max_k: largest k that will be asked for.
    Raises:
        MissingError: there is no such folder, or a file of it is missing.
        ConfigError: the folder holds something else than a language model (`kdata.store.checkpoint_kind`); config.json is
            damaged; `context` or k is too large for the model.
    """
    path, remedy = Path(model_folder(config.model)), "name a model folder, a GGUF file or a Hub name (teacher.model)"
    if _exists(path) and not path.is_dir():
        raise MissingError(f"teacher model {config.model!r} is a file; {remedy}")
    if not path.is_dir():
        if path.is_absolute() or config.model.startswith(".") or config.model.count("/") > 1:
            raise MissingError(f"teacher model {config.model!r} does not exist; {remedy}")
        return
    refuse_other_kind(path, needs_weights=config.backend != "vllm-server")
    needed = {"config.json": (path / "config.json").is_file()}
    if config.backend != "vllm-server":
        needed["*.safetensors"] = any(path.glob("*.safetensors"))
    needed["tokenizer"] = any((path / name).is_file() for name in TOKENIZER_FILES)
    missing = " and no ".join(name for name, there in needed.items() if not there)
    if missing:
        files = sorted(path.glob("*.gguf"))
        remedy = f"name the file {files[0]}" if files else remedy
        raise MissingError(f"{path} is not the folder of a Hugging Face model: it has no {missing}; {remedy}")
    try:
        model = read_json(path / "config.json", finite=False)
        text = model.get("text_config") or model
        vocab_size, longest = text.get("vocab_size"), next((text[key] for key in LENGTH_KEYS if key in text), None)
        rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
        is_scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path / 'config.json'} is damaged ({error}); copy the model's folder again, or name another one"
        ) from error
    if config.context is not None and isinstance(longest, int) and not is_scaled and config.context > longest:
        raise ConfigError(
            f"context={config.context} exceeds what {config.model} can read, {longest} tokens (by its "
            "config.json); lower teacher.context, or leave it at null"
        )
    if isinstance(vocab_size, int) and max_k >= vocab_size:
        raise ConfigError(f"k={max_k} must be below the vocabulary size of {config.model}, {vocab_size}; lower k")


def as_folder(config: TeacherConfig) -> TeacherConfig:
    """The settings with a model folder in place of a GGUF file; see `model_folder` for errors."""
    return config.model_copy(update={"model": model_folder(config.model)})


def weights_folder(model: str, commit: str | None) -> Path:
    """A model folder itself, or for a Hub name its copy at this commit: config.json and *.safetensors."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=commit, allow_patterns=["config.json", "*.safetensors"]))


def _exists(path: Path) -> bool:
    """As `Path.exists`; False too for a name that the file system does not allow."""
    try:
        return path.exists()
    except OSError:
        return False


def model_identity(config: TeacherConfig) -> tuple[str, str | None, str | None]:
    """Name, Hub commit and weights hash of a model: its bytes identify a local model, its commit one on the Hub."""
    path = Path(config.model)
    if is_gguf(path):
        name, file_digest = gguf_identity(path)
        return name, None, file_digest
    if not path.is_dir():
        return config.model, _hub_commit(config), None
    return path.resolve().name, None, weights_digest(path)


def _hub_commit(config: TeacherConfig) -> str:
    """Resolve a Hub name to the commit that will be loaded."""
    from huggingface_hub import model_info

    try:
        return str(model_info(config.model, revision=config.revision).sha)
    except hub_errors() as error:
        raise MissingError(
            f"teacher model {config.model!r} is neither a local folder nor reachable on the Hub ({type(error).__name__}: "
            f"{error}); check the name, the network and HF_TOKEN"
        ) from error


def load_tokenizer(model: str | Path, revision: str | None = None, *, bos: str | None = None) -> Any:
    """Load a fast tokenizer.

    Args:
        model: model folder, GGUF file or Hub name.
        bos: as `TeacherConfig.bos`.
    Raises:
        MissingError: there is none.
        ConfigError: it is no fast tokenizer, or has no token that begins a sequence and `bos` is add.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise DependencyError("reading text needs transformers: pip install 'kdata[train]'") from error
    model = model_folder(model)
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).count("/") > 1):
        raise MissingError(f"model {str(model)!r} does not exist; name a model folder or a Hub name")
    refuse_far_ids_of(Path(model) / "tokenizer.json")
    with model_files(model, "the tokenizer"):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model), revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise MissingError(f"no tokenizer at {str(model)!r}: {reason}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer of {model} has no tokenizer.json; kdata needs a fast tokenizer")
    refuse_far_ids(tokenizer.backend_tokenizer, model)
    if bos == "add":
        begin_with_bos(tokenizer)
    return tokenizer


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """Identity of a fast tokenizer: SHA-256 of its canonical JSON, without truncation and padding settings."""
    template = getattr(tokenizer, "chat_template", None)
    return TokenizerInfo(
        hash=tokenizer_hash(tokenizer.backend_tokenizer),
        chat_template_hash=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


@contextmanager
def tokenizer_files(tokenizer: Any) -> Iterator[Path]:
    """A temporary folder with a tokenizer's files, for the dataset's own copy."""
    with temporary_folder("tokenizer") as folder:
        with storage_errors(folder), rust_errors():
            # Chat templates in tokenizer_config.json: several of them as files would make a folder inside this one.
            tokenizer.save_pretrained(folder, save_jinja_files=False)
        yield folder
