"""Small logit datasets with a known teacher, written by kdata's own writer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kdata
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TeacherInfo
from kdata.store.writer import Writer
from kdata.teachers.model import tokenizer_info

VOCAB = 61


def save_tokenizer(folder: Path, vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A word-level tokenizer w0 w1 ...; token 0 begins, token 1 ends."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w0", eos_token="w1", unk_token="w2")
    tokenizer.save_pretrained(folder)
    return tokenizer


def chain_of(vocab: int = VOCAB) -> np.ndarray:
    """The teacher: probabilities of the next token behind each, float64 [V, V]."""
    logits = 2.5 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.softmax(logits, -1).numpy()


def make_dataset(
    root: Path,
    lengths: list[int],
    *,
    kept: int = 8,
    tail: str = "ghost",
    vocab: int = VOCAB,
    seed: int = 0,
    mask_every: int = 0,
    prompt: int = 0,
    exact: int = 0,
    vocab_size: int | None = None,
    teacher: dict[str, str] | None = None,
) -> kdata.Dataset:
    """Documents of a Markov chain over `vocab` tokens; the teacher is the chain itself, so it can be learnt.

    `mask_every` n > 0 takes every n-th token out of the target mask, `prompt` the first n, but for the last token. `exact`
    n > 0 makes a hybrid of draws: the n likeliest entries exact, the others draws whose weights are their probabilities.
    `vocab_size`: rows of the teacher's head; None: `vocab`. `teacher`: what its TeacherInfo says otherwise.
    """
    kind = "topk" if tail == "ghost" else "hybrid" if exact else "sampled"
    rng = np.random.default_rng(seed)
    tokenizer = save_tokenizer(root.parent / f"{root.name}-tokenizer", vocab)
    chain = chain_of(vocab)
    info = new_info(
        format_version="1.0",
        vocab_size=vocab_size or vocab,
        teacher=TeacherInfo(
            model="chain",
            revision=None,
            weights_hash="0" * 64,
            backend="fake",
            backend_version="1",
            dtype="float64",
            logprobs="raw log-softmax at temperature 1",
            deterministic=True,
        ).model_copy(update=teacher or {}),
        tokenizer=tokenizer_info(tokenizer),
        codec=CodecInfo(id="plain", version=1, kind=kind, parameters={"k": kept}),
        tail=tail,
    )
    records = [_record(f"doc-{i}", n, chain, rng, kept, tail, mask_every, prompt, exact) for i, n in enumerate(lengths)]
    source = SourceInfo(kind="capture", settings={}, num_units=None)
    with Writer(root, info, "capture", source, tokenizer_dir=root.parent / f"{root.name}-tokenizer") as writer:
        half = len(records) // 2
        for number, part in enumerate((records[:half], records[half:])):
            writer.commit(UnitResult(number, part))
    return kdata.open(root)


def _record(
    name: str,
    length: int,
    chain: np.ndarray,
    rng: np.random.Generator,
    kept: int,
    tail: str,
    mask_every: int,
    prompt: int,
    exact: int,
) -> Record:
    ids = [int(rng.integers(len(chain)))]
    for _ in range(length - 1):
        ids.append(int(rng.choice(len(chain), p=chain[ids[-1]])))
    ids = ids[:length]
    predicted = chain[ids[:-1]]  # row i predicts token i + 1
    own = predicted[np.arange(max(length - 1, 0)), ids[1:]]
    order = np.argsort(-predicted, axis=-1)[:, :kept]
    top = np.take_along_axis(predicted, order, -1)
    if tail == "draws":
        top = top / top.sum(-1, keepdims=True) * (1 - 1e-6)
    counts = np.array([0] + [kept] * (length - 1), np.int32)[:length]
    mask = np.arange(length) > 0
    if mask_every:
        mask &= np.arange(length) % mask_every != 0
    mask[: min(prompt, length - 1)] = False
    with np.errstate(divide="ignore"):
        rest = np.log(np.clip(1 - top[:, : exact or None].sum(-1), 0, 1))
        entropy = -(predicted * np.log(predicted)).sum(-1)

    def beside(values: np.ndarray, fill: float) -> np.ndarray:
        return np.concatenate([np.full(min(length, 1), fill), values]).astype(np.float32)

    return Record(
        id=name,
        domain=("code", "prose")[int(name.split("-")[1]) % 2],
        token_ids=np.array(ids, np.int32),
        target_mask=mask,
        logprob=beside(np.log(own), np.nan),
        rank=np.concatenate([np.zeros(min(length, 1)), (predicted > own[:, None]).sum(-1) + 1]).astype(np.int32),
        log_tail=beside(rest, np.nan),
        kept=_kept(counts, order, top, tail, exact),
        text=" ".join(f"w{i}" for i in ids),
        entropy=beside(entropy, np.nan),
    )


def _kept(counts: np.ndarray, ids: np.ndarray, weights: np.ndarray, tail: str, exact: int) -> Kept:
    """Exact entries by falling probability, then, where draws are asked for, the others by rising id."""
    num_exact = np.minimum(counts, exact) if tail == "draws" else counts
    if tail == "draws":
        order = np.argsort(np.where(np.arange(ids.shape[1]) < exact, -1, ids), -1, kind="stable")
        ids, weights = np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)
    flat_ids, flat = ids.reshape(-1).astype(np.int32), np.log(weights).reshape(-1).astype(np.float32)
    return Kept(num_exact, counts - num_exact, flat_ids, flat)
