"""Which model a teacher is: its identity, revision and tokenizer."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, DependencyError, MissingError
from kdata.format.schema import TokenizerInfo
from kdata.store.hub import hub_errors
from kdata.teachers.config import TeacherConfig


def model_identity(config: TeacherConfig) -> tuple[str, str | None, str | None]:
    """Name, Hub commit and weights hash of a model: a local one is known by its bytes, a Hub one by its commit."""
    path = Path(config.model)
    if not path.is_dir():
        if path.is_absolute() or config.model.count("/") > 1:
            raise MissingError(f"teacher model {config.model!r} does not exist; name a model folder or a Hub name")
        return config.model, _hub_commit(config), None
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.name == "config.json" or p.suffix == ".safetensors")
    if len(files) < 2:
        raise MissingError(f"{path} is no Hugging Face model: it needs config.json and *.safetensors")
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return path.resolve().name, None, digest.hexdigest()


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


def load_tokenizer(model: str | Path, revision: str | None = None) -> Any:
    """Load a fast tokenizer. Raises MissingError when there is none."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise DependencyError("reading text needs transformers: pip install 'kdata[train]'") from error
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).count("/") > 1):
        raise MissingError(f"model {str(model)!r} does not exist; name a model folder or a Hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingError(f"no tokenizer at {str(model)!r}: {str(error).splitlines()[0]}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"the tokenizer of {model} has no tokenizer.json; kdata needs a fast tokenizer")
    return tokenizer


def tokenizer_info(tokenizer: Any) -> TokenizerInfo:
    """Identity of a fast tokenizer: SHA-256 of its canonical JSON, without truncation and padding settings."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    template = getattr(tokenizer, "chat_template", None)
    text = json.dumps(state, sort_keys=True, separators=(",", ":")).encode()
    return TokenizerInfo(
        hash=hashlib.sha256(text).hexdigest(),
        chat_template_hash=hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
    )


@contextmanager
def tokenizer_files(tokenizer: Any) -> Iterator[Path]:
    """A temporary folder with a tokenizer's files, for the dataset's own copy."""
    with tempfile.TemporaryDirectory(prefix="kdata-tokenizer-") as folder:
        # Chat templates in tokenizer_config.json: several of them as files would make a folder inside this one.
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        yield Path(folder)
