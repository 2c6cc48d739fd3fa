"""Train the built-in teacher and reference again: `python -m kdata.pipelines.builtin.train OUT`.

The result ships with kdata in `models/`: two Llamas of `transformers` with one byte-level BPE, weights in float16.
Both read the training part of the built-in corpus (see `corpus.py`), packed as bos, text, eos into windows. No
logit dataset exists yet, so `kdata.trainer` cannot train them; this is a plain loop: Muon for the inner matrices,
AdamW for the embedding. Two runs on one machine with the same number of threads give the same weights; other
machines round differently.

Why Muon: mean held-out nats per byte after 120 steps of 4,096 tokens, one seed, a network of 4.5 M parameters, were
1.72 with AdamW alone and 1.43 with Muon and AdamW.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdata.errors import ConfigError, DataError, TrainingError
from kdata.observe.progress import Task
from kdata.pipelines.builtin.builtin import DIGESTS, REFERENCE, TEACHER
from kdata.pipelines.builtin.corpus import split_documents
from kdata.teachers.environment import set_environment

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Shape suffixes: B windows, T tokens of a window.

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
VOCAB_SIZE = 2048
CONTEXT = 512


@dataclass(frozen=True)
class ModelRecipe:
    """Size and training of one model. vLLM on CPUs takes heads of 32 or 64: hidden_size / num_heads."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    steps: int
    short_steps: int  # first steps, on windows of half the context: 20 % faster
    slow_steps: int  # after a rise, the learning rates fall slowly: they would reach zero here ...
    decay_steps: int  # ... but over the last steps they fall fast, to a twentieth of the peak
    warmup_steps: int = 28
    batch_tokens: int = 4096
    muon_lr: float = 0.015
    adam_lr: float = 0.01

    def rate(self, step: int) -> float:
        """Learning rate of a step, relative to its peak."""

        def slow(step: int) -> float:
            return (self.slow_steps - step) / (self.slow_steps - self.warmup_steps + 1)

        fast = slow(self.steps - self.decay_steps) * (self.steps - step) / self.decay_steps
        return min((step + 1) / self.warmup_steps, max(0.05, min(slow(step), fast)))


RECIPES = {
    TEACHER: ModelRecipe(
        hidden_size=160,
        num_layers=4,
        num_heads=5,
        ffn_size=448,
        steps=600,
        short_steps=530,
        slow_steps=950,
        decay_steps=100,
    ),
    REFERENCE: ModelRecipe(
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        ffn_size=192,
        steps=150,
        short_steps=110,
        slow_steps=300,
        decay_steps=50,
    ),
}


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any string round-trips, and encoding gives bos + text (no eos).

    Args:
        vocab_size: entries, with <|bos|> 0, <|eos|> 1, <|pad|> 2 and the 256 bytes among them.
    Raises:
        ConfigError: the texts are too few for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ConfigError(
            f"the texts support {tokenizer.get_vocab_size()} vocabulary entries, fewer than vocab_size={vocab_size}; "
            "lower vocab_size or add text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts as one int64 array: bos, text, eos, bos, text, eos, ..."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts))  # the post-processor puts bos first
    return np.concatenate([np.asarray([*e.ids, EOS_ID], dtype=np.int64) for e in encodings])


def windows(stream: np.ndarray, recipe: ModelRecipe, context: int = CONTEXT, seed: int = 0) -> Iterator[np.ndarray]:
    """`steps` batches int64 [B, T + 1] of inputs and successors; T is half the context first, then all of it.

    Each pass over the stream begins at another offset and takes every window once, in another order.

    Raises:
        DataError: the stream is shorter than two windows.
    """
    if len(stream) < 2 * context + 1:
        raise DataError(f"the texts have {len(stream)} tokens; training needs at least {2 * context + 1}: add text")
    rng = np.random.default_rng(seed)
    starts, previous = np.empty(0, dtype=np.int64), 0
    for step in range(recipe.steps):
        length = context // 2 if step < recipe.short_steps else context
        if length != previous:
            starts, previous = np.empty(0, dtype=np.int64), length
        count = recipe.batch_tokens // length
        while len(starts) < count:
            one_pass = np.arange(rng.integers(length), len(stream) - length, length)
            starts = np.concatenate([starts, rng.permutation(one_pass)])
        batch, starts = starts[:count], starts[count:]
        yield stream[batch[:, None] + np.arange(length + 1)]


def train_model(
    stream: np.ndarray, recipe: ModelRecipe, *, name: str, vocab_size: int = VOCAB_SIZE, context: int = CONTEXT
) -> LlamaForCausalLM:
    """Train a Llama on windows of the stream; return it in float32, in evaluation mode.

    The gains of the norms stay at one: the next matrix can express them.

    Raises:
        DataError: the stream is shorter than two windows.
        TrainingError: the loss is not finite.
    """
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    model = _new_model(recipe, vocab_size, context)
    optimizers = _optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate) for optimizer in optimizers]
    with Task(f"train {name}", recipe.steps * recipe.batch_tokens, "tokens") as task:
        for step, window_BT in enumerate(map(torch.from_numpy, windows(stream, recipe, context))):
            logits_BTV = model(input_ids=window_BT[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), window_BT[:, 1:].flatten())
            if not torch.isfinite(loss):
                raise TrainingError(f"the loss of {name} is {loss.item()} at step {step}; lower muon_lr and adam_lr")
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            task.advance(recipe.batch_tokens, loss=loss.item())
    model.eval()
    return model


def _optimizers(model: LlamaForCausalLM, recipe: ModelRecipe) -> list[torch.optim.Optimizer]:
    import torch

    embedding = model.model.embed_tokens.weight
    inner = [p for p in model.parameters() if p.requires_grad and p is not embedding]
    return [
        float32_muon()(inner, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([embedding], lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def float32_muon() -> type[torch.optim.Muon]:
    """torch's Muon with its matrix products in float32.

    torch computes them in bf16. Without bf16 in the processor one iteration on a 192 x 448 matrix takes 20.4 ms
    that way and 1.7 ms in float32, on one core: with bf16, three quarters of a training step went to the optimizer.
    """
    import torch

    class Float32Muon(torch.optim.Muon):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                a, b, c = group["ns_coefficients"]
                for p in (p for p in group["params"] if p.grad is not None):
                    average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    x = p.grad.lerp(average, group["momentum"])
                    x = x.T if p.shape[0] > p.shape[1] else x
                    x = x / x.norm().clamp(min=group["eps"])
                    for _ in range(group["ns_steps"]):
                        gram = x @ x.T
                        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
                    update = x.T if p.shape[0] > p.shape[1] else x
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape)))

    return Float32Muon


def _new_model(recipe: ModelRecipe, vocab_size: int, context: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.ffn_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            dtype="float32",
        )
    )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim == 2)
    return model


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in Hugging Face format, its weights rounded to float16: half the bytes.

    Every reader gets the same float16 numbers and computes in its own dtype (float32 by default).
    """
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0
    )
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type]  # transformers wraps Module.to
    tokenizer.save_pretrained(folder)
    compact = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    text = json.dumps(compact, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # transformers writes weights that only their owner can read


def write_digests(folder: Path) -> None:
    """Write the SHA-256 of every file below `folder`, in the format of `sha256sum`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != DIGESTS)
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder).as_posix()}\n" for p in files]
    (folder / DIGESTS).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Train both models into OUT, a new folder; then replace `models/` by it."""
    set_environment()
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m kdata.pipelines.builtin.train OUT   (a new folder; 18 minutes of CPU time)")
    out = Path(sys.argv[1])
    if out.exists():
        sys.exit(f"error: {out} exists already; name a new folder")
    training, _ = split_documents()
    texts = [document.text for document in training]
    tokenizer = train_tokenizer(texts)
    stream = token_stream(texts, tokenizer)
    for name, recipe in RECIPES.items():
        save_model(train_model(stream, recipe, name=name), tokenizer, out / name)
        facts = {"recipe": asdict(recipe), "corpus_tokens": len(stream), "python": sys.version.split()[0]}
        (out / name / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_digests(out)


if __name__ == "__main__":
    main()
