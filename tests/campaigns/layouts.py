"""Examples for `fuzz` of what other tools write beside tables, of hidden states, and of recipes with rounds."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import torch
import yaml

import kdata
from kdata.corpus.corpus import CorpusConfig
from kdata.jobs.hidden import HiddenConfig, store_hidden
from kdata.jobs.reading import CaptureConfig
from kdata.share.interchange.megatron import export_megatron
from kdata.teachers.config import TeacherConfig
from tests.fakes import rows_of_text, write_jsonl

LISTS = [[0.5, -1.0], [0.0, -2.0], [1.0, 0.5]]
NEMO = {
    "tokens": [5, 6, 7], "labels": [6, 7, 8], "loss_mask": [0, 1, 1], "topk_logits": LISTS,
    "topk_token_ids": [[6, 1], [7, 2], [8, 3]], "log_sum_exp_logits": [1.0, 0.5, 1.5], "index": 3,
}  # fmt: skip
ROUNDS = {
    "count": 2, "student": "plan", "validation": {"path": "validation.jsonl"},
    "stages": [
        {"stage": "score"}, {"stage": "judge", "prompt": "{{ question }} {{ answer }}", "pattern": r"(\d)"},
        {"stage": "select", "method": "curriculum", "score": "marks_{round}", "hard_share": {"by_round": [0.3, 0.5]}},
        {"stage": "request", "prompt": "{{ label }} {% for one in hard %}{{ one.text }}{% endfor %}"},
    ],
}  # fmt: skip


def nemo(folder: Path) -> None:
    """JSON lines of NeMo-Aligner."""
    write_jsonl(folder / "nemo.jsonl", [NEMO, {**NEMO, "index": 4}])


def megatron(folder: Path, dataset: Path) -> None:
    """A cache of Megatron-LM, and the tokens of its samples, which its importer reads beside it."""
    export_megatron(kdata.open(dataset), folder / "cache", 16)


def with_rounds(recipe: Path, target: Path) -> None:
    """A recipe that has rounds."""
    content = yaml.safe_load(recipe.read_text("utf-8"))
    target.write_text(yaml.safe_dump({**content, "rounds": ROUNDS}), "utf-8")


def hidden(folder: Path, model: Path) -> None:
    """A dataset that a model read, with its hidden states."""
    teacher = TeacherConfig(model=str(model), backend="transformers")
    corpus = write_jsonl(folder / "rows.jsonl", rows_of_text(6))
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus)), kind="topk", k=4, unit_tokens=60)
    dataset = kdata.capture(folder / "dataset", config, teacher)
    store_hidden(dataset, HiddenConfig(model=teacher, layers=[1, 2, "head"]))
    corpus.unlink()


def by_member(by_bytes: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """A change of a tar archive of packed torch files: of a member's bytes, tensors or name, or of the archive's bytes."""

    def change(file: Path, rng: random.Random) -> None:
        if file.suffix != ".tar" or rng.random() < 0.25:
            return by_bytes(file, rng)
        with tarfile.open(file) as archive:
            members = [(one.name, archive.extractfile(one).read()) for one in archive if one.isreg()]  # type: ignore[union-attr]
        place = rng.randrange(len(members))
        name, content = members[place]
        inner = file.with_suffix(".inner")
        if name.endswith(".zst"):
            with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
                content = stream.read()
        inner.write_bytes(content)
        if name.endswith(".zst") and rng.random() < 0.5:
            inner.write_bytes(_other_tensors(content, rng))
        else:
            by_bytes(inner, rng)
        content = inner.read_bytes()
        inner.unlink()
        if name.endswith(".zst"):
            content = pa.Codec("zstd").compress(content, asbytes=True)
        if rng.random() < 0.2:
            name = rng.choice(
                ("../../out.pt.zst", "/out.pt.zst", "0.pt.zst", "99999999999.pt.zst", "_meta.json", "x" * 300)
            )
        members[place] = name, content
        with tarfile.open(file, "w") as archive:
            for own, data in members:
                about = tarfile.TarInfo(own)
                about.size = len(data)
                archive.addfile(about, io.BytesIO(data))
        return None

    return change


class _Stranger:
    """What unpickling must not run."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (open, ("/nonexistent/stranger",))


def _other_tensors(content: bytes, rng: random.Random) -> bytes:
    """A file of torch with other tensors, with none, or with an object that runs code when it is unpickled."""
    tensors = torch.load(io.BytesIO(content), weights_only=True)
    name = rng.choice([one for one in tensors if torch.is_tensor(tensors[one])])
    tensor = tensors[name]
    tensors[name] = rng.choice([
        tensor[:0], tensor[:-1], tensor[..., :1], tensor.flatten(), tensor.float() * float("nan"), tensor.double() + 1e300,
        torch.full_like(tensor, 65535 if tensor.dtype == torch.uint16 else 1), tensor.float().to_sparse(), tensor[..., None],
        torch.zeros(()), None, "text", [tensor], _Stranger(), tensor.expand(1, *tensor.shape), torch.empty((1 << 20, 0, 1)),
    ])  # fmt: skip
    if rng.random() < 0.2:
        tensors.pop(rng.choice(sorted(tensors)))
    packed = io.BytesIO()
    torch.save(tensors, packed)
    return packed.getvalue()
