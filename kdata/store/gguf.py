"""A language model in a GGUF file, as a folder in Hugging Face format.

The file is converted once, into the cache: float32 weights in safetensors, config and tokenizer. The folder's name is the
SHA-256 of the file, so the same bytes are never converted again, wherever the file is. `transformers` does the conversion.
It drops what it does not know, so settings that change numbers are put into the config here, or the file is refused; and
its tensors are compared with the model.

A GGUF file holds data only, and its header is checked against the file's size before a library reads it.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kdata.errors import ConfigError, CorruptError, DependencyError, KdataError, MissingError
from kdata.format.files import committed_folder, file_info, rust_errors, storage_errors, temporary_folder
from kdata.format.plain import open_plain
from kdata.store.pretrained import without_warnings
from kdata.store.url import cache_dir

logger = logging.getLogger(__name__)

MAX_ENTRIES = 1 << 20  # of metadata and of tensors: a count beyond it is damage
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by GGUF type
STRING, ARRAY = 8, 9
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of 3.1 to 3.3
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # kinds of tokens, and the file's names
# What transformers raises for a file that it does not understand; CorruptError and the like are ours.
REFUSALS = (ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError, OSError, struct.error)


def is_gguf(model: str | Path) -> bool:
    """True for the name of a GGUF file, whether it exists or not."""
    return Path(model).suffix.lower() == ".gguf"


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: `values` are the metadata's scalars and strings (of an array its length), `tensors`
    the dimensions of each tensor by its name, `places` the byte where each begins."""

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    places: dict[str, int]

    @property
    def architecture(self) -> str:
        """Name of the architecture, for instance llama."""
        return str(self.values.get("general.architecture"))

    def own(self, key: str) -> Any:
        """A value that belongs to the architecture, or None."""
        return self.values.get(f"{self.architecture}.{key}")


def gguf_identity(path: Path) -> tuple[str, str]:
    """Name of a GGUF file, and the SHA-256 of its content. Raises MissingError where there is no such file."""
    if not path.is_file():
        raise MissingError(f"GGUF file {str(path)!r} does not exist; name a GGUF file, a model folder or a Hub name")
    status = path.stat()
    return path.name, _digest(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, computed once for each size and time of its last change."""
    return file_info(path).sha256


def model_folder(model: str | Path) -> str:
    """The folder of a model: of a GGUF file its conversion in the cache, of everything else `model` itself.

    The first call for a file converts it, which takes minutes and four bytes of disk for each parameter.

    Raises:
        MissingError: there is no such file.
        DependencyError: a package that reads GGUF files is not installed.
        CorruptError: the file is cut short, or no GGUF file.
        ConfigError: its model is none that can be converted without a loss.
        StorageError: the cache cannot be written.
    """
    if not is_gguf(model):
        return str(model)
    path = Path(model)
    _, digest = gguf_identity(path)
    place = cache_dir() / "gguf" / digest
    folder = place / f"transformers-{_transformers_version(path)}"  # another version may convert differently
    if not folder.is_dir():
        header = read_header(path)
        with storage_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / "lock"):
                if not folder.is_dir():
                    for leftover in place.glob(".transformers-*"):  # of a process that was killed
                        shutil.rmtree(leftover, ignore_errors=True)
                    logger.warning("%s is converted once, into %s; that takes a minute or more", path, place)
                    with rust_errors(), committed_folder(folder) as temporary:
                        _convert(path, header, temporary)
    return str(folder)


def _transformers_version(path: Path) -> str:
    for package in ("gguf", "accelerate", "torch", "transformers"):
        try:
            known = version(package)
        except ModuleNotFoundError as error:
            raise DependencyError(
                f"reading {path.name} needs {package!r}, which is not installed: pip install 'kdata[gguf]'"
            ) from error
    return known


def read_header(path: Path) -> Header:
    """Metadata and tensors of a GGUF file, each length compared with what the file holds.

    Raises:
        CorruptError: the file is cut short, or no GGUF file of version 2 or 3.
        ConfigError: it is one part of several.
    """
    with open_plain(path) as file:
        try:
            header, end = _Reader(file, path.stat().st_size).header()
            parts = int(header.values.get("split.count", 1))
        except (EOFError, ValueError, TypeError, OverflowError) as error:
            raise CorruptError(
                f"{path} is damaged or cut short ({error}); download or copy the GGUF file again"
            ) from error
    if parts > 1:
        raise ConfigError(
            f"{path} is one part of a model in {header.values['split.count']} files; join them with "
            "`llama-gguf-split --merge` and name the result"
        )
    if end > path.stat().st_size:
        raise CorruptError(
            f"{path} is cut short: it has {path.stat().st_size:,} bytes, its tensors end at {end:,}; download or copy the "
            "GGUF file again"
        )
    return header


class _Reader:
    """Reads the header of a GGUF file; every length is bounded by the bytes that are left."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise EOFError("a length in its header exceeds the file")
        return bytes(self._file.read(count))

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._bytes(struct.calcsize("<" + form)))[0]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"its metadata has a value of unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            width = struct.calcsize(SCALARS[inner])
            self._skip(count * width)
        elif inner == STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise ValueError(f"its metadata has an array of unknown type {inner}")
        return count

    def _skip(self, count: int) -> None:
        if count > self._size - self._file.tell():
            raise EOFError("a length in its header exceeds the file")
        self._file.seek(count, os.SEEK_CUR)

    def header(self) -> tuple[Header, int]:
        """The header, and the byte at which the last tensor ends."""
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (number := self._number("I")) not in (2, 3):
            raise ValueError(f"it says GGUF version {number}; 2 and 3 are known")
        num_tensors, num_values = self._number("Q"), self._number("Q")
        if max(num_tensors, num_values) > MAX_ENTRIES:
            raise ValueError("its header counts more entries than a model has")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._text()
            values[key] = self._value(self._number("I"))
        tensors, offsets, ends = {}, {}, [0]
        for _ in range(num_tensors):
            name, dimensions = self._text(), self._number("I")
            if dimensions > 4:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(int(self._number("Q")) for _ in range(dimensions))
            kind, offset = self._number("I"), self._number("Q")
            tensors[name], offsets[name] = shape, offset
            ends.append(offset + _tensor_bytes(name, kind, math.prod(shape)))
        alignment = max(int(values.get("general.alignment", 32)), 1)
        start = -(-self._file.tell() // alignment) * alignment
        return Header(values, tensors, {name: start + offset for name, offset in offsets.items()}), start + max(ends)


def _tensor_bytes(name: str, kind: int, elements: int) -> int:
    """Bytes of a tensor by its GGML type. Raises DependencyError where `gguf` is not installed."""
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ModuleNotFoundError as error:
        raise DependencyError("reading a GGUF file needs 'gguf': pip install 'kdata[gguf]'") from error
    try:
        block: tuple[int, int] = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"tensor {name!r} is of unknown type {kind}") from error
    elements_of_block, bytes_of_block = block
    return -(-elements // elements_of_block) * bytes_of_block


def _convert(path: Path, header: Header, folder: Path) -> None:
    """Write the model of a GGUF file into a folder. Raises ConfigError where that would change its numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _alone(path) as (place, name):
        try:
            with _quiet_transformers():
                config = AutoConfig.from_pretrained(place, gguf_file=name)
                _complete_config(path, header, config)
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
                _refuse_other_tensors(path, header, model)
                load: Any = AutoModelForCausalLM.from_pretrained  # its annotation leaves out what a report adds
                loaded, report = load(
                    place, config=config, gguf_file=name, dtype=torch.float32, trust_remote_code=False,
                    output_loading_info=True,
                )  # fmt: skip
                tokenizer = _tokenizer(header, place, name)
        except REFUSALS as error:
            if isinstance(error, KdataError):
                raise
            raise ConfigError(
                f"transformers cannot convert {path.name} (architecture {header.architecture!r}): {_one_line(error)}; "
                "name a model folder in Hugging Face format instead"
            ) from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ConfigError(f"{path.name} lacks weights of its model, {missing[0]} the first; name another file")
    # What was loaded from a GGUF file refuses to be saved: its weights go into a model that was not.
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    with _quiet_transformers():
        model.save_pretrained(folder)
    # transformers passes over this key; llama.cpp takes it for true where a SentencePiece tokenizer lacks it.
    says = header.values.get("tokenizer.ggml.add_bos_token", header.values.get("tokenizer.ggml.model") == "llama")
    if says and tokenizer.bos_token is not None:
        begin_with_bos(tokenizer)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def _tokenizer(header: Header, place: str, name: str) -> Any:
    """The tokenizer of a file, with the tokens that the file has: classes of the library add some of their own."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    raw = PreTrainedTokenizerFast.from_pretrained(place, gguf_file=name)
    state = json.loads(raw.backend_tokenizer.to_str())
    count = header.values["tokenizer.ggml.tokens"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < count]
    backend = Tokenizer.from_str(json.dumps(state))
    numbers = {f"{kind}_token": header.values.get(f"tokenizer.ggml.{key}_token_id") for kind, key in SPECIAL.items()}
    special = {kind: backend.id_to_token(number) for kind, number in numbers.items() if number is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=raw.chat_template, **special)


@contextmanager
def _alone(path: Path) -> Iterator[tuple[str, str]]:
    """The file under a plain name in a folder of its own: what else is beside it is not looked at."""
    with temporary_folder("gguf") as folder:
        os.symlink(path.resolve(), folder / "model.gguf")
        yield str(folder), "model.gguf"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's warnings, and its bars, which ask nobody whether they are wanted."""
    with without_warnings(), redirect_stderr(io.StringIO()):
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _complete_config(path: Path, header: Header, config: Any) -> None:
    """Put into a config what the file says and transformers passes over. Raises ConfigError where that cannot be done."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    if header.own("block_count") != len(blocks):
        raise ConfigError(
            f"{path.name} says block_count={header.own('block_count')} and has tensors of {len(blocks)} layers; "
            "it is damaged, or no plain language model"
        )
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale"):
        if header.own(key):
            if not hasattr(config, key):
                raise _other_numbers(path, f"{key} ({header.own(key):g})")
            setattr(config, key, header.own(key))
    # llama.cpp knows these two by their number of layers; the file does not say it.
    if (header.architecture, len(blocks)) in (("gemma2", 46), ("gemma3", 62)):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has one for each kind of attention; the file's is this one
    if rope.get("rope_type", "default") == "default":
        rope.update(_rope_of(path, header))


def _rope_of(path: Path, header: Header) -> dict[str, Any]:
    """How a file scales its rotary positions, as transformers names it; empty: not at all."""
    kind, factor = header.own("rope.scaling.type"), header.own("rope.scaling.factor")
    tensors = {name for name in header.tensors if name.startswith("rope_")}
    if tensors == {ROPE_FACTORS}:
        factors = np.fromfile(path, "<f4", math.prod(header.tensors[ROPE_FACTORS]), offset=header.places[ROPE_FACTORS])
        base = header.own("rope.freq_base") or 10_000.0
        if np.allclose(factors, _llama3_factors(len(factors), base, float(factors.max(initial=1.0))), rtol=1e-4):
            return {**LLAMA3, "rope_type": "llama3", "factor": float(factors.max(initial=1.0))}
    if tensors:
        raise _other_numbers(path, f"{min(tensors)} (a tensor of rotary factors)")
    if kind in (None, "none") or factor == 1.0:
        return {}
    if kind != "linear" or factor is None:
        raise _other_numbers(path, f"rope.scaling.type ({kind})")
    return {"rope_type": "linear", "factor": float(factor)}


def _llama3_factors(count: int, base: float, factor: float) -> np.ndarray:
    """By what Llama 3.1 divides each rotary frequency. Source: `_compute_llama3_parameters` of transformers."""
    wavelength = 2 * math.pi * base ** (np.arange(count) / count)
    low, high, old = (LLAMA3[name] for name in LLAMA3)
    smooth = (old / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < old / high, 1.0, np.where(wavelength > old / low, factor, between))


def _other_numbers(path: Path, setting: str) -> ConfigError:
    return ConfigError(
        f"{path.name} has a setting that transformers does not take from a GGUF file, so its numbers would be wrong: "
        f"{setting}. Name the model's folder in Hugging Face format instead"
    )


def _refuse_other_tensors(path: Path, header: Header, model: Any) -> None:
    """Raise ConfigError where file and model do not have equally many numbers: one has weights that the other lacks."""
    besides = {ROPE_FACTORS, *(["output.weight"] if model.config.tie_word_embeddings else [])}
    stored = sum(math.prod(shape) for name, shape in header.tensors.items() if name not in besides)
    needed = sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())
    if stored != needed:
        raise ConfigError(
            f"{path.name} holds {stored:,} weights, {type(model).__name__} of its settings has {needed:,}: transformers "
            "would leave some out or invent some. Name the model's folder in Hugging Face format instead"
        )


def begin_with_bos(tokenizer: Any) -> None:
    """Make a fast tokenizer put its beginning-of-sequence token before every text, unless it does that already.

    Raises:
        ConfigError: it has no such token.
    """
    from tokenizers.processors import Sequence, TemplateProcessing

    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None:
        raise ConfigError("the tokenizer has no beginning-of-sequence token; leave teacher.bos at null")
    if tokenizer("a")["input_ids"][:1] == [number]:
        return
    backend = tokenizer.backend_tokenizer
    single = TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, number)]
    )  # fmt: skip
    others = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = Sequence([*others, single])
