"""What students learn from: a corpus split by id, the teacher's states of it, and a logit dataset for each way of keeping.

The teacher reads the text once. Its last hidden states stay on disk in float32, and every dataset is made from them by
kdata's own capture job, head and reduction: shards, codec and index are those of `kdata capture`, and students are trained on
what was read back. Online distillation computes the whole distribution from the same states and the same head.

Shapes: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from filelock import FileLock
from pydantic import Field
from transformers import AutoModelForCausalLM

import kdata
from kdata.config import Strict
from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.errors import DataError, MissingError
from kdata.format.keep import KeepConfig
from kdata.format.schema import content_hash
from kdata.jobs.job import LocalEngine, run_job
from kdata.jobs.reading import CaptureConfig, CaptureJob
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig
from kdata.teachers.head import Head, load_head
from kdata.teachers.model import load_tokenizer
from kdata.teachers.reduce import draw_seed, readout_of, reduce_chunks
from kdata.teachers.transformers import TransformersTeacher

HELDOUT_SHARE = 0.1  # of documents, by a hash of their id
SIZES = ("k", "draws", "mass", "draw_method")  # settings that name a dataset's folder
# What students are measured on: with this many entries the KL is an unbiased estimate of small variance. The method is that
# of the first figures that were published, so that later ones can stand beside them.
HELDOUT_KEEP = KeepConfig(kind="hybrid", k=64, num_draws=64, draw_method="independent")


class DataConfig(Strict):
    """The text, the teacher, and how much of it."""

    teacher: str = Field(description="Folder of a Hugging Face model.")
    corpus: str = Field(description="Parquet file with id, domain and text.")
    train_tokens: int = Field(
        400_000,
        ge=1,
        description="Tokens to train on: documents of each domain until they hold its equal share. They are taken whole, "
        "so a long last one adds to it.",
    )
    heldout_tokens: int = Field(24_000, ge=1, description="Tokens to measure on, in the same way.")
    context_tokens: int = Field(256, ge=2, description="Longest sequence; longer texts are split into several.")


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on an id alone: where a document belongs, and its place in the order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


@dataclass(frozen=True)
class Part:
    """A part of a corpus: documents whose `unit_hash` is in [low, high), the first of them that hold `tokens`.

    balanced: as many tokens of every domain; otherwise the domains keep the shares that they have.
    """

    low: float
    high: float
    tokens: int
    balanced: bool = True


def split(corpus: str, teacher: str, parts: Mapping[str, Part], folder: Path) -> None:
    """Write folder/NAME.parquet for each part; documents in the order of their hash, domains mixed.

    Args:
        corpus: Parquet file with id, domain and text.
        teacher: model whose tokenizer counts.
    Raises:
        MissingError: there is no such corpus.
        DataError: it has not enough text of a domain.
    """
    if not Path(corpus).is_file():
        raise MissingError(f"corpus {corpus!r} is no file; name a Parquet file with id, domain and text")
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
            taken = [_first_tokens(f, share, tokenizer, d) for d, f in zip(domains, of_each, strict=True)]
            inside = pl.concat(taken).sort("place")
        else:
            inside = _first_tokens(inside, part.tokens, tokenizer, name)
        inside.drop("place").write_parquet(folder / f"{name}.parquet")


def _first_tokens(frame: pl.DataFrame, tokens: float, tokenizer, what: str) -> pl.DataFrame:
    """The first documents that have so many tokens."""
    have = 0
    for number, text in enumerate(frame["text"]):
        have += len(tokenizer(text)["input_ids"])
        if have >= tokens:
            return frame.head(number + 1)
    raise DataError(f"{what!r} has {have} tokens of text, {tokens:.0f} are asked for; ask for fewer")


class States:
    """A teacher's last hidden states, behind the final norm, of one part of the corpus.

    Args:
        folder: holds states.npy float32 [T, D], and sequences.json: content hash of each sequence -> its first row.
        config: of the data; the head is read from the teacher's files.
    """

    def __init__(self, folder: Path, config: DataConfig) -> None:
        self.states_TD = np.load(folder / "states.npy", mmap_mode="r")
        self._starts: dict[str, int] = json.loads((folder / "sequences.json").read_text(encoding="utf-8"))
        model = json.loads((Path(config.teacher) / "config.json").read_text(encoding="utf-8"))
        self.head: Head = load_head(Path(config.teacher), model["vocab_size"], torch.float32, "cpu")
        self.vocab_size: int = model["vocab_size"]

    def of(self, token_ids: np.ndarray) -> torch.Tensor:
        """States float32 [len(token_ids), D] of a sequence that was read."""
        start = self._starts[content_hash(token_ids)]
        return torch.from_numpy(np.array(self.states_TD[start : start + len(token_ids)]))

    def starts(self, dataset: kdata.Dataset) -> np.ndarray:
        """First row of each sequence of a dataset, int64 [rows]."""
        hashes = dataset.index(["content_hash"])["content_hash"].to_pylist()
        return np.array([self._starts[digest] for digest in hashes], np.int64)


class _StatesTeacher:
    """A teacher whose forward pass is done: head and reduction of stored states. See `kdata.teachers.base.Teacher`."""

    def __init__(self, original: TransformersTeacher, states: States) -> None:
        self.info, self.context, self.vocab_size = original.info, original.context, original.vocab_size
        self._states = states

    @torch.inference_mode()
    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """Read sequences, each of which must have been read before; too fast for `on_tokens`."""
        return [self._read_one(np.asarray(ids, np.int32), keep) for ids in sequences]

    def _read_one(self, ids: np.ndarray, keep: KeepConfig) -> Readout:
        hidden_MD = self._states.of(ids)[:-1]
        actual_M = torch.from_numpy(ids[1:].astype(np.int64))
        reduced = reduce_chunks(
            lambda a, b: self._states.head.logits(hidden_MD[a:b]),
            self.vocab_size,
            actual_M,
            keep,
            [(len(actual_M), draw_seed(ids, keep))],
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
        """It has no forward pass left."""
        raise NotImplementedError("stored states cannot write")

    def close(self) -> None:
        """Nothing to free."""


class EvidenceData:
    """Corpus, states and datasets in one folder, each made when it is first asked for; several processes may ask."""

    def __init__(self, config: DataConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    @cached_property
    def heldout(self) -> kdata.Dataset:
        """What students are measured on."""
        return self._dataset("heldout", HELDOUT_KEEP)

    def train(self, keep: KeepConfig) -> kdata.Dataset:
        """The training text with what `keep` says."""
        return self._dataset("train", keep)

    def states(self, part: str) -> States:
        """The teacher's states of "train" or "heldout"; the teacher reads it where that is not done."""
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
        return TransformersTeacher(TeacherConfig(model=self.config.teacher, backend="transformers"))

    def _job(self, part: str, keep: KeepConfig) -> CaptureJob:
        corpus = CorpusConfig(path=str(self.folder / f"{part}.parquet"))
        limit = {"max_tokens": self.config.context_tokens, "unit_tokens": 65_536}
        config = CaptureConfig(corpus=corpus, **limit, **keep.model_dump())
        return CaptureJob(config, Corpus(corpus))

    def _read(self, part: str, folder: Path) -> None:
        """Have the teacher read one part, sequence by sequence, and keep its last states."""
        folder.mkdir(exist_ok=True)
        tokenizer = load_tokenizer(self.config.teacher)
        model = AutoModelForCausalLM.from_pretrained(self.config.teacher, dtype=torch.float32).eval()
        backbone = getattr(model, model.base_model_prefix)
        found: list[np.ndarray] = []
        starts: dict[str, int] = {}
        have = 0
        with torch.inference_mode():
            for unit in self._job(part, KeepConfig()).units(self._teacher, tokenizer):
                for sequence in unit.sequences:
                    ids_1T = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
                    found.append(backbone(input_ids=ids_1T, use_cache=False).last_hidden_state[0].numpy())
                    starts[content_hash(sequence.token_ids)] = have
                    have += len(sequence.token_ids)
        np.save(folder / "states.npy", np.concatenate(found))
        (folder / "sequences.json").write_text(json.dumps(starts), encoding="utf-8")

    def _dataset(self, part: str, keep: KeepConfig) -> kdata.Dataset:
        name = "-".join([part, keep.kind, *(f"{n}{v}" for n, v in keep.settings().items() if n in SIZES)])
        root = self.folder / name
        states = self.states(part)
        with FileLock(self.folder / f"{name}.lock"):
            job = self._job(part, keep)
            tokenizer = load_tokenizer(self.config.teacher)
            return run_job(root, job, LocalEngine(_StatesTeacher(self._teacher, states), tokenizer))


def bytes_per_token(dataset: kdata.Dataset) -> float:
    """Payload on disk over its tokens: entries, ids, and every other column of the shards."""
    size = sum(dataset.shard_file(entry, "data").stat().st_size for entry in dataset.manifest)
    return size / dataset.num_tokens
