"""The data of the evidence: a corpus split by id, the teacher's states on it, and a logit dataset for each kind of keeping.

The teacher reads the text once, and its last hidden states stay on disk in float32. kdata's own capture job, head and
reduction turn them into every dataset: shards, codec and index are those of `kdata capture`, and students are trained on what
is read back from them. Online distillation computes the whole distribution from the same states and the same head.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import torch
from filelock import FileLock
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import kdata
from kdata.config import Strict
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import DataError, MissingError
from kdata.format.keep import KeepConfig
from kdata.format.schema import content_hash
from kdata.jobs.bos import check_bos
from kdata.jobs.job import LocalEngine, run_job
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.store.checkpoint_kind import refuse_kernels_of, use_exact_attention
from kdata.store.gguf import model_folder
from kdata.store.pretrained import without_bars
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.head import Head, load_head
from kdata.teachers.model import load_tokenizer
from kdata.teachers.reduce import draws_of, readout_of, reduce_chunks
from kdata.teachers.transformers import TransformersTeacher

HELDOUT_SHARE = 0.1  # of documents, by a hash of their id
TEACHER_FILE = "teacher.json"  # in the folder of the data: the teacher's name and sizes
SIZES = ("k", "draws", "mass", "threshold", "draw_method")  # settings that name a dataset's folder
# Kept of the held-out text: with this many entries the KL is an unbiased estimate with a small variance. The draw
# method is the one of the first published figures, so that later figures can be compared with them.
HELDOUT_KEEP = KeepConfig(kind="hybrid", k=64, num_draws=64, draw_method="independent")


class DataConfig(Strict):
    """The text and the teacher."""

    teacher: str = Field(description="Folder of a model in Hugging Face format, or a GGUF file.")
    bos: Literal["add", "omit"] | None = Field(
        None, exclude_if=lambda bos: bos is None, description="Beginning-of-sequence token, as teacher.bos."
    )
    corpus: str = Field(description="Parquet file with id, domain and text.")
    train_tokens: int = Field(
        400_000,
        ge=1,
        description="Tokens to train on, the same number of each domain. Documents are used whole, so the last one of a "
        "domain can add some.",
    )
    heldout_tokens: int = Field(24_000, ge=1, description="Tokens to measure on, chosen in the same way.")
    context_tokens: int = Field(256, ge=2, description="Longest sequence; longer texts are split into several.")


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on an id alone. It decides the part that a document belongs to, and its place there."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Part:
    """A part of a corpus: the first documents with a `unit_hash` in [low, high), until they hold `tokens` tokens.

    balanced: the same number of tokens of every domain; otherwise the domains keep their shares.
    """

    low: float
    high: float
    tokens: int
    balanced: bool = True


def split(corpus: str, teacher: str, parts: Mapping[str, Part], folder: Path) -> None:
    """Write folder/NAME.parquet for each part; documents in the order of their hash, domains mixed.

    Args:
        corpus: Parquet file with id, domain and text.
        teacher: the model whose tokenizer counts tokens.
    Raises:
        MissingError: the corpus does not exist.
        DataError: the corpus has too little text of a domain.
    """
    if not Path(corpus).is_file():
        raise MissingError(f"corpus {corpus!r} is not a file; name a Parquet file with id, domain and text")
    frame = pl.read_parquet(corpus, columns=["id", "domain", "text"])
    place = [unit_hash(name) for name in frame["id"]]
    frame = frame.with_columns(pl.Series("place", place)).sort("place")
    tokenizer = load_tokenizer(teacher)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        inside = frame.filter(pl.col("place").is_between(part.low, part.high, closed="left"))
        if part.balanced:
            domains = sorted(frame["domain"].unique())
            of_each = [inside.filter(pl.col("domain") == domain) for domain in domains]
            share = part.tokens / len(domains)
            chosen = [_first_tokens(f, share, tokenizer, d) for d, f in zip(domains, of_each, strict=True)]
            inside = pl.concat(chosen).sort("place")
        else:
            inside = _first_tokens(inside, part.tokens, tokenizer, name)
        inside.drop("place").write_parquet(folder / f"{name}.parquet")


def _first_tokens(frame: pl.DataFrame, tokens: float, tokenizer: PreTrainedTokenizerBase, name: str) -> pl.DataFrame:
    """The first documents that together have at least `tokens` tokens."""
    total = 0
    for number, text in enumerate(frame["text"]):
        total += len(tokenizer(text)["input_ids"])
        if total >= tokens:
            return frame.head(number + 1)
    raise DataError(f"{name!r} has {total} tokens of text and {tokens:.0f} are needed; set a smaller number of tokens")


class States:
    """A teacher's last hidden states, after the final norm, on one part of the corpus.

    Args:
        folder: holds states.npy, float32 [T, D], and sequences.json: content hash of each sequence -> its first row.
        config: of the data; the head is read from the teacher's files.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.states_TD = np.load(folder / "states.npy", mmap_mode="r")
        self._starts: dict[str, int] = json.loads((folder / "sequences.json").read_text(encoding="utf-8"))
        teacher = Path(model_folder(config.teacher))
        model = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
        self.head: Head = load_head(teacher, model["vocab_size"], torch.float32, "cpu")
        self.vocab_size: int = model["vocab_size"]

    def __contains__(self, token_ids: np.ndarray) -> bool:
        """Whether the teacher read this sequence."""
        return content_hash(token_ids) in self._starts

    def of(self, token_ids: np.ndarray) -> torch.Tensor:
        """States float32 [len(token_ids), D] of a sequence that the teacher read."""
        start = self._starts[content_hash(token_ids)]
        return torch.from_numpy(np.array(self.states_TD[start : start + len(token_ids)]))

    def starts(self, dataset: kdata.Dataset) -> np.ndarray:
        """First row of each sequence of a dataset, int64 [rows]."""
        hashes = dataset.index(["content_hash"])["content_hash"].to_pylist()
        return np.array([self._starts[digest] for digest in hashes], np.int64)


class _StatesTeacher:
    """A `kdata.teachers.base.Teacher` whose forward pass is done: it applies head and reduction to stored states."""

    def __init__(self, original: TransformersTeacher, states: States) -> None:
        self.info, self.context, self.vocab_size = original.info, original.context, original.vocab_size
        self._original, self._states = original, states

    @torch.inference_mode()
    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read sequences, too fast to report to `on_tokens`. Those without states, of `check_bos`, the model reads."""
        return [self._read_one(np.asarray(ids, np.int32), keep) for ids in sequences]

    def _read_one(self, ids: np.ndarray, keep: KeepConfig) -> Readout:
        if ids not in self._states:
            return self._original.read([ids], keep)[0]
        hidden_MD = self._states.of(ids)[:-1]
        actual_M = torch.from_numpy(ids[1:].astype(np.int64))
        reduced = reduce_chunks(
            lambda a, b: self._states.head.logits(hidden_MD[a:b]),
            self.vocab_size,
            actual_M,
            keep,
            [(len(actual_M), draws_of(ids, 1, keep))],
        )
        return readout_of(ids, 1, reduced)

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """Not possible: stored states have no forward pass."""
        raise NotImplementedError("stored states cannot write")

    def close(self) -> None:
        """Nothing to free."""


class EvidenceData:
    """Corpus, states and datasets in one folder, each built when it is first used; several processes may use one folder."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    @cached_property
    def heldout(self) -> kdata.Dataset:
        """The held-out text that students are measured on."""
        return self._dataset("heldout", HELDOUT_KEEP)

    def train(self, keep: KeepConfig) -> kdata.Dataset:
        """The training text, with the entries that `keep` says."""
        return self._dataset("train", keep)

    def states(self, part: str) -> States:
        """The teacher's states on "train" or "heldout"; the teacher reads the text if that is not done yet."""
        folder = self.folder / f"states-{part}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "states.lock"):
            if not (self.folder / "heldout.parquet").exists() or not (self.folder / "train.parquet").exists():
                split(self.config.corpus, self.config.teacher, self._parts(), self.folder)
            if not (folder / "sequences.json").exists():
                self._read(part, folder)
        return States(folder, self.config)

    def _parts(self) -> dict[str, Part]:
        return {
            "heldout": Part(0.0, HELDOUT_SHARE, self.config.heldout_tokens),
            "train": Part(HELDOUT_SHARE, 1.0, self.config.train_tokens),
        }

    @cached_property
    def _teacher(self) -> TransformersTeacher:
        return TransformersTeacher(
            TeacherConfig(model=self.config.teacher, backend="transformers", bos=self.config.bos)
        )

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.config.teacher, bos=self.config.bos)
        return tokenizer

    def _job(self, part: str, keep: KeepConfig) -> CaptureJob:
        corpus = CorpusConfig(path=str(self.folder / f"{part}.parquet"))
        limit = {"max_tokens": self.config.context_tokens, "unit_tokens": 65_536}
        config = CaptureConfig(corpus=corpus, **limit, **keep.model_dump())
        return CaptureJob(config, Corpus(corpus))

    def _read(self, part: str, folder: Path) -> None:
        """Let the teacher read one part, sequence by sequence, and store its last hidden states."""
        folder.mkdir(exist_ok=True)
        units = list(self._job(part, KeepConfig()).units(self._teacher, self._tokenizer))
        check_bos(self._teacher, self._tokenizer, [s.token_ids for s in units[0].sequences], KeepConfig())
        folder_of_model = model_folder(self.config.teacher)
        with without_bars():
            refuse_kernels_of(folder_of_model)
            model = AutoModelForCausalLM.from_pretrained(folder_of_model, dtype=torch.float32).eval()
        use_exact_attention(model)
        about = {
            "teacher": Path(self.config.teacher).name,
            "teacher_params": model.num_parameters(),
            "vocab_size": model.config.vocab_size,
        }
        (self.folder / TEACHER_FILE).write_text(json.dumps(about), encoding="utf-8")
        backbone = getattr(model, model.base_model_prefix)
        states: list[np.ndarray] = []
        starts: dict[str, int] = {}
        num_tokens = 0
        with torch.inference_mode():
            for unit in units:
                for sequence in unit.sequences:
                    ids_1T = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
                    states.append(backbone(input_ids=ids_1T, use_cache=False).last_hidden_state[0].numpy())
                    starts[content_hash(sequence.token_ids)] = num_tokens
                    num_tokens += len(sequence.token_ids)
        np.save(folder / "states.npy", np.concatenate(states))
        (folder / "sequences.json").write_text(json.dumps(starts), encoding="utf-8")

    def _dataset(self, part: str, keep: KeepConfig) -> kdata.Dataset:
        rule = {} if keep.positions is None else keep.positions.model_dump()
        sizes = {**{n: v for n, v in keep.settings().items() if n in SIZES}, **rule}
        name = "-".join([part, keep.kind, *(f"{n}{v}" for n, v in sizes.items() if v not in (None, []))])
        root = self.folder / name
        states = self.states(part)
        with FileLock(self.folder / f"{name}.lock"):
            job = self._job(part, keep)
            return run_job(root, job, LocalEngine(_StatesTeacher(self._teacher, states), self._tokenizer))


def bytes_per_token(dataset: kdata.Dataset) -> float:
    """Bytes of payload on disk per token: entries, ids, and every other column of the shards."""
    size = sum(dataset.shard_file(entry, "data").stat().st_size for entry in dataset.manifest)
    return size / dataset.num_tokens
