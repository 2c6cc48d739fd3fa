"""One boundary around the libraries that read a model's files: whatever they raise becomes an error that names the files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdata.errors import ConfigError, CorruptError, KdataError
from kdata.format.json_text import MAX_DOCUMENT_BYTES, parse_object


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


def safetensors_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file. Raises ConfigError where the file is not as long as its header says."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
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
