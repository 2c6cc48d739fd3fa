"""A model's files: their digest, and one boundary around the libraries that read them, whose errors then name the files."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, CorruptError, KdataError, first_line
from kdata.format.json_text import MAX_DOCUMENT_BYTES, MAX_TOKENIZER_BYTES, parse_object
from kdata.format.plain import open_plain, refuse_special

TEXTS = (".json", ".jinja", ".txt", ".model")  # of a tokenizer or a configuration
OPENED = (*TEXTS, ".safetensors", ".gguf")


def weights_digest(folder: Path) -> str:
    """SHA-256 over the config and the weights of a model folder: the same wherever the folder is."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors"):
        digest.update(file.name.encode() + b"\0")
        with open_plain(file) as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def model_files(place: str | Path, what: str) -> Iterator[None]:
    """Turn what transformers, tokenizers, safetensors and torch raise over files that they cannot use into a CorruptError.

    Their parsers raise errors of every kind: KeyError and TypeError where a value of config.json has another type,
    RuntimeError where a shape does not fit, plain Exception, and panics of compiled code. A package that is not installed
    stays what it is.

    Args:
        place: the model's folder or name. what: what is read, for the message ("the tokenizer").
    """
    try:
        refuse_special(Path(place))
        if Path(place).is_dir():
            _refuse_endless(Path(place))
        yield
    except (KdataError, ImportError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":  # Ctrl-C goes on
            raise
        raise CorruptError(
            f"{what} of {str(place)!r} cannot be read ({type(error).__name__}: {first_line(error)}); copy the model again, "
            "or name another one"
        ) from error


def _refuse_endless(folder: Path) -> None:
    """Raise CorruptError where the libraries would read a pipe, a device, or a text of a model that fills the memory."""
    for file in folder.iterdir():
        if file.suffix not in OPENED or (file.suffix == ".txt" and not file.stem.startswith(("vocab", "merges"))):
            continue
        refuse_special(file)
        if file.suffix in TEXTS and file.is_file() and file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CorruptError(
                f"{file} has more than {MAX_TOKENIZER_BYTES:,} bytes; copy the model again, or name another one"
            )


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without the warnings that transformers logs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' own progress bars, of weights that are read and written: our tasks say what is done.

    Those of downloads stay. `kdata` turns them all off, by HF_HUB_DISABLE_PROGRESS_BARS.
    """
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda factory, arguments, options: logging.EmptyTqdm(*arguments, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises ConfigError where the file is not as long as its header says."""
    size = file.stat().st_size
    try:
        with open_plain(file) as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = parse_object(handle.read(min(length, size, MAX_DOCUMENT_BYTES + 1)))
        end = max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not a safetensors file ({error}); copy the model's folder again") from error
    if size != 8 + length + end:
        raise ConfigError(
            f"{file} is damaged: it has {size:,} bytes, its header says {8 + length + end:,}; copy the model's folder again"
        )
    return header
