"""The embedded default teacher: a small Llama trained on the spot from text that every Python carries.

Defaults: 4.5 M parameters, vocabulary 4096, 2.3 M tokens (two passes). Held-out nats/byte (and nats/token) of
the teacher: code 1.02 (3.51), docstrings 1.33 (4.52), prose 1.18 (4.18); of the 0.7 M reference, trained on
0.6 M tokens: 1.26, 1.59, 1.51. The teacher took 325 s of CPU time on a busy machine: about 160 s where two
cores are free (estimated, not timed).

Tried, mean held-out nats/byte after 120 steps of 4096 tokens, one seed: AdamW alone at 0.003 (not tuned
further) 1.72; Muon 0.01 with AdamW on the embedding at 0.002, 0.004, 0.008: 1.52, 1.48, 1.43; Muon 0.02 with
0.004 and 0.016: 1.47, 1.43; Muon 0.04 with 0.008: 1.51; twice as many steps of half the tokens: 1.43;
vocabulary 2048 with a sixth more steps: 1.46. Other widths and depths were timed, not trained to the end.

When other processes use the cores, set GOMP_SPINCOUNT=0 before Python starts: on two contended cores the same
training step then ran at 5,100-5,600 tokens/s instead of 800.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdata.errors import ConfigError, DataError, DependencyError, TrainingError
from kdata.observe.progress import Task
from kdata.pipelines.builtin.corpus import CorpusFiles, build_corpus, stdlib_listing

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Shape suffixes: B windows, T tokens of a window, H heads, E head size, D hidden, F feed-forward, V
# vocabulary, N = B*T positions.

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
RECIPE_VERSION = 1  # part of every cache key: raise it when the training code changes what it produces


class NetworkConfig(BaseModel):
    """Size and training length of one network. Steps, not seconds: the weights follow from the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(gt=0, description="Width of the residual stream; a multiple of num_heads.")
    num_layers: int = Field(gt=0, description="Transformer blocks.")
    num_heads: int = Field(gt=0, description="Attention heads; hidden_size / num_heads must be 32 or 64 (vLLM on CPU).")
    ffn_size: int = Field(gt=0, description="Inner width of the gated feed-forward layer.")
    steps: int = Field(gt=0, description="Optimizer steps.")
    batch_tokens: int = Field(gt=0, description="Tokens per step; a multiple of the context.")
    muon_lr: float = Field(gt=0, description="Peak step size of Muon (inner matrices), in AdamW-matched units.")
    adam_lr: float = Field(gt=0, description="Peak step size of AdamW (the tied embedding).")
    short_share: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="First share of the steps, on half-length windows (cheaper attention).",
    )
    corpus_share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="First share of the training documents that is used; 1 means all.",
    )

    @model_validator(mode="after")
    def _head_size(self) -> NetworkConfig:
        if self.hidden_size not in (32 * self.num_heads, 64 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be 32 or 64, "
                "the small head sizes that vLLM's CPU attention takes; change one of the two"
            )
        return self


class BuiltinConfig(BaseModel):
    """All settings of the built-in corpus, tokenizer, teacher and reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, description="Seeds the corpus order, the split, the weights and the batches.")
    vocab_size: int = Field(default=4096, ge=300, description="Entries of the byte-level BPE, 3 special ones included.")
    context: int = Field(default=512, ge=32, description="Longest sequence in tokens; even.")
    heldout_share: float = Field(default=0.08, gt=0, lt=0.5, description="Share of documents held out, by module.")
    max_doc_chars: int = Field(default=1600, ge=300, description="Longest document in characters.")
    max_domain_chars: int = Field(
        default=2_200_000,
        gt=0,
        description="Cap on a domain's training text in characters; binds for code only.",
    )
    num_prompts: int = Field(default=360, ge=3, description="Beginnings of training documents in prompts.parquet.")
    teacher: NetworkConfig = Field(
        default=NetworkConfig(
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            ffn_size=768,
            steps=560,
            batch_tokens=4096,
            muon_lr=0.015,
            adam_lr=0.01,
        ),
        description="The teacher.",
    )
    reference: NetworkConfig = Field(
        default=NetworkConfig(
            hidden_size=96,
            num_layers=3,
            num_heads=3,
            ffn_size=256,
            steps=150,
            batch_tokens=4096,
            muon_lr=0.015,
            adam_lr=0.01,
            corpus_share=0.5,
        ),
        description="The small reference model that difference sampling (MiniPLM) compares the teacher with.",
    )

    @model_validator(mode="after")
    def _batches(self) -> BuiltinConfig:
        for name in ("teacher", "reference"):
            tokens = getattr(self, name).batch_tokens
            if tokens % self.context:
                raise ValueError(f"{name}.batch_tokens {tokens} must be a multiple of context {self.context}")
        if self.context % 2:
            raise ValueError(f"context {self.context} must be even; the first steps use windows of half of it")
        return self

    @classmethod
    def small(cls) -> BuiltinConfig:
        """Settings with which teacher and reference together train in about 20 s on two cores, for CI."""
        default = cls()
        return default.model_copy(
            update={
                "teacher": default.teacher.model_copy(
                    update={"hidden_size": 192, "num_layers": 4, "num_heads": 3, "ffn_size": 512, "steps": 75}
                ),
                "reference": default.reference.model_copy(update={"steps": 40, "corpus_share": 0.3}),
            }
        )


# --------------------------------------------------------------------------------------- what callers ask for


def ensure_corpus(cache_dir: Path, config: BuiltinConfig) -> CorpusFiles:
    """The corpus for these settings and this interpreter, from the cache or built anew (four seconds)."""
    settings = config.model_dump(include={"seed", "heldout_share", "max_doc_chars", "max_domain_chars", "num_prompts"})
    directory = cache_dir / f"corpus-{_key(settings, sys.version, stdlib_listing())}"
    if not directory.exists():
        with _committed(directory) as temporary, Task("built-in corpus", unit="documents") as stage:
            build_corpus(
                temporary,
                heldout_share=config.heldout_share,
                seed=config.seed,
                max_chars=config.max_doc_chars,
                max_domain_chars=config.max_domain_chars,
                num_prompts=config.num_prompts,
            )
            stage.advance(sum(pq.read_metadata(f).num_rows for f in temporary.glob("[ch]*.parquet")))
    return CorpusFiles.at(directory)


def ensure_teacher(cache_dir: Path, config: BuiltinConfig) -> Path:
    """The directory of the teacher, in Hugging Face format; trained first where the cache has none."""
    return _ensure_model("teacher", cache_dir, config, config.teacher)


def ensure_reference(cache_dir: Path, config: BuiltinConfig) -> Path:
    """The directory of the small reference model (the teacher's tokenizer); trained first where absent."""
    return _ensure_model("reference", cache_dir, config, config.reference)


def _ensure_model(name: str, cache_dir: Path, config: BuiltinConfig, network: NetworkConfig) -> Path:
    """Train (or find) one network. Its key covers everything that shapes its weights, and nothing else."""
    corpus = ensure_corpus(cache_dir, config)
    settings = {"network": network.model_dump(), "recipe": RECIPE_VERSION} | config.model_dump(
        include={"seed", "vocab_size", "context"}
    )
    # The folder's own name goes into dataset.json as the teacher's: the key stands above it.
    directory = cache_dir / _key(settings, corpus.fingerprint, sys.version) / f"kdata-builtin-{name}"
    if directory.exists():
        return directory
    texts = pq.read_table(corpus.corpus, columns=["text"]).column("text").to_pylist()
    # The tokenizer sees all training text even where the network sees a slice: the two must share it exactly.
    tokenizer = train_tokenizer(texts, config.vocab_size, context=config.context)
    texts = texts[: max(1, round(len(texts) * network.corpus_share))]
    model = train_language_model(texts, tokenizer, network, context=config.context, seed=config.seed, name=name)
    with _committed(directory) as temporary:
        save_model(model, tokenizer, temporary)
        resolved = {**settings, "corpus": corpus.fingerprint, "python": sys.version}
        (temporary / "training.json").write_text(json.dumps(resolved, indent=1) + "\n", encoding="utf-8")
    return directory


def _key(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for the parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _committed(directory: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `directory` at the end; an error or a kill leaves no `directory`.

    Two processes may train the same thing at once: the first rename wins, the second finds an equal result
    there.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{os.getpid()}"
    temporary.mkdir()  # not mkdtemp: its mode 0700 would stay with a cache that people may share
    try:
        yield temporary
        try:
            os.rename(temporary, directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, context: int = 512) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any string round-trips, and encoding gives bos + text (no eos).

    Args:
        texts: training texts; the order does not matter.
        vocab_size: entries including <|bos|> 0, <|eos|> 1, <|pad|> 2 and the 256 bytes.
        context: becomes `model_max_length`, in tokens.
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
            f"The texts support {tokenizer.get_vocab_size()} vocabulary entries, fewer than "
            f"vocab_size={vocab_size}. Lower vocab_size or give more text."
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------------------------- training


def train_language_model(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    network: NetworkConfig,
    *,
    context: int = 512,
    seed: int = 0,
    name: str = "model",
) -> LlamaForCausalLM:
    """Train a Llama on packed windows of the texts and return it in float32, in evaluation mode.

    Documents are packed as bos + text + eos, without attention isolation: at these sizes a wasted pad costs
    more than a window that begins inside a document. Muon for the inner matrices, AdamW for the embedding,
    linear decay to a twentieth. The arithmetic is `_arithmetic` (weights are float32). Two runs on one machine with
    the same number of threads give the same weights; other machines round differently.

    Args:
        texts: training documents.
        network: size, number of steps, step sizes.
        context: longest window in tokens.
        seed: of the initial weights and the order of windows.
        name: shown in the progress line.
    Raises:
        DataError: the texts are shorter than one window.
        TrainingError: the loss is not finite.
        DependencyError: torch or transformers is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise DependencyError('Training needs torch and transformers: pip install "kdata[train]"') from error

    stream = _token_stream(texts, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(len(tokenizer), context, network)
    optimizers = _optimizers(model, network)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    windows = _windows(stream, network, context, seed)
    with Task(f"train the built-in {name}", network.steps * network.batch_tokens, "tokens") as stage:
        for step, window_BT in enumerate(windows):
            scale = _schedule(step, network.steps)
            for optimizer, lrs in zip(optimizers, peaks, strict=True):
                for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                    group["lr"] = lr * scale
            loss = _backward(model, torch.from_numpy(window_BT))
            if not math.isfinite(loss):
                raise TrainingError(f"The loss of the built-in {name} is {loss} at step {step}; lower its step sizes.")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            stage.advance(network.batch_tokens, loss=loss)
    return model.eval()


def _token_stream(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All texts as one int64 array: bos, text, eos, bos, text, eos, ..."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(texts))  # the post-processor prepends bos
    return np.concatenate([np.asarray([*e.ids, EOS_ID], dtype=np.int64) for e in encoded])


def _windows(stream: np.ndarray, network: NetworkConfig, context: int, seed: int) -> Iterator[np.ndarray]:
    """`steps` batches int64 [B, T + 1] (inputs and successors); T is half the context first, then all.

    Each pass over the stream begins at another offset and takes every window once, in another order.
    """
    if len(stream) < 2 * context + 1:
        raise DataError(f"The texts give {len(stream)} tokens; training needs at least {2 * context + 1}.")
    rng = np.random.default_rng(seed)
    starts = np.empty(0, dtype=np.int64)
    previous = 0
    for step in range(network.steps):
        length = context // 2 if step < network.short_share * network.steps else context
        count = network.batch_tokens // length
        if length != previous:
            starts, previous = np.empty(0, dtype=np.int64), length
        while len(starts) < count:
            fresh = np.arange(rng.integers(length), len(stream) - length, length)
            starts = np.concatenate([starts, rng.permutation(fresh)])
        batch, starts = starts[:count], starts[count:]
        yield stream[batch[:, None] + np.arange(length + 1)]


def _schedule(step: int, steps: int) -> float:
    """Step size relative to its peak: 3 % warmup, then linear to a twentieth."""
    warmup = max(1, round(0.03 * steps))
    return min((step + 1) / warmup, max(0.05, (steps - step) / (steps - warmup + 1)))


def _new_model(vocab_size: int, context: int, network: NetworkConfig) -> LlamaForCausalLM:
    """A Llama with tied embeddings whose norms keep a gain of one (the next matrix can express it)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=network.hidden_size,
            intermediate_size=network.ffn_size,
            num_hidden_layers=network.num_layers,
            num_attention_heads=network.num_heads,
            num_key_value_heads=network.num_heads,
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


def _optimizers(model: LlamaForCausalLM, network: NetworkConfig) -> list[torch.optim.Optimizer]:
    import torch

    embedding = model.model.embed_tokens.weight
    muon = torch.optim.Muon if _arithmetic() == torch.bfloat16 else _wide_muon()
    inner = [p for p in model.parameters() if p.requires_grad and p is not embedding]
    return [
        muon(inner, lr=network.muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([embedding], lr=network.adam_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def _wide_muon() -> type[torch.optim.Muon]:
    """torch's Muon with its products in float32: torch has them in bf16, whatever the processor, which made a training step
    of 4,096 tokens take 17 s on AVX2. Same formulas and settings (nesterov, step sizes as AdamW's)."""
    import torch

    class WideMuon(torch.optim.Muon):
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

    return WideMuon


def _backward(model: LlamaForCausalLM, window_BT: torch.Tensor) -> float:
    """Add the gradients of the mean loss over a batch [B, T + 1]; returns that loss, nats per token."""
    hidden_BTD = _hidden_states(model, window_BT[:, :-1])
    hidden_ND = hidden_BTD.flatten(0, 1)
    loss, grad_ND = _head_loss(hidden_ND.detach(), model.lm_head.weight, window_BT[:, 1:].flatten())
    hidden_ND.backward(grad_ND)
    return loss


def _head_loss(
    hidden_ND: torch.Tensor, head_VD: torch.Tensor, target_N: torch.Tensor, chunk: int = 512
) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy in nats and its gradient by the hidden states; the head's is added to
    `head_VD.grad`.

    Logits exist for `chunk` positions at a time (512 x 4096 float32 = 8 MB), and the gradient
    softmax - one_hot is written over them: no graph, no second pass.
    """
    import torch

    head = head_VD.detach().to(hidden_ND.dtype)
    grad_VD = torch.zeros_like(head_VD)
    grad_ND = torch.empty_like(hidden_ND)
    total = 0.0
    for start in range(0, len(target_N), chunk):
        rows = slice(start, start + chunk)
        target_C1 = target_N[rows, None]
        logprobs_CV = torch.log_softmax((hidden_ND[rows] @ head.T).float(), -1)
        total -= logprobs_CV.gather(1, target_C1).sum().item()
        delta_CV = logprobs_CV.exp_()
        delta_CV.scatter_add_(1, target_C1, torch.full_like(target_C1, -1.0, dtype=delta_CV.dtype))
        delta_CV = (delta_CV / len(target_N)).to(head.dtype)
        grad_ND[rows] = delta_CV @ head
        grad_VD += delta_CV.T @ hidden_ND[rows]
    head_VD.grad = grad_VD if head_VD.grad is None else head_VD.grad + grad_VD
    return total / len(target_N), grad_ND


def _arithmetic() -> torch.dtype:
    """bf16 where the processor multiplies it; elsewhere float32, which is then many times as fast (43 tokens/s in bf16 on two
    busy AVX2 cores)."""
    import torch

    from kdata.trainer.learner import resolve_precision

    return torch.bfloat16 if resolve_precision("auto", "cpu") == "bf16" else torch.float32


def _hidden_states(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> torch.Tensor:
    """The model's last hidden states [B, T, D] in `_arithmetic`: the same function of the same weights, but faster.

    12,300 tokens/s of training against 7,000 (6 M parameters, two cores): under autocast two thirds of a step
    of transformers' own forward go outside matrix products, to norms and rotary embeddings in float32 and a
    slow attention kernel. Here all but the sums is in one dtype, and q/k/v and gate/up are one product each. A
    test holds the two equal.
    """
    import torch
    import torch.nn.functional as F

    B, T = ids_BT.shape
    config, dtype = model.config, _arithmetic()
    H, E = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    cos_TE, sin_TE = (t[0].to(dtype) for t in model.model.rotary_emb(torch.empty(1), torch.arange(T)[None]))
    rotate = _rotation(cos_TE[:, : E // 2], sin_TE[:, : E // 2])
    norm = _rms_norm(config.rms_norm_eps)
    x_ND = F.embedding(ids_BT.flatten(), model.model.embed_tokens.weight).to(dtype)
    for layer in model.model.layers:
        attention, ffn = layer.self_attn, layer.mlp
        qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]).to(dtype)
        qkv_BTSHE = F.linear(norm(x_ND), qkv).view(B, T, 3, H, E)
        mixed_ND = _attention(rotate(qkv_BTSHE[:, :, :2]), qkv_BTSHE[:, :, 2])
        x_ND = x_ND + F.linear(mixed_ND, attention.o_proj.weight.to(dtype))
        gate_up = F.linear(norm(x_ND), torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]).to(dtype))
        gate_NF, up_NF = gate_up.chunk(2, -1)
        x_ND = x_ND + F.linear(F.silu(gate_NF) * up_NF, ffn.down_proj.weight.to(dtype))
    return norm(x_ND).view(B, T, -1)


def _attention(qk_BT2HE: torch.Tensor, v_BTHE: torch.Tensor, block: int = 256) -> torch.Tensor:
    """Causal softmax attention, [B*T, H*E]; plain products over blocks of queries.

    Forward and backward of 8192 tokens, 4 heads of 64: 34 ms at T=512 and 16 ms at T=256, against 80 and 46
    ms for torch's fused CPU kernel. Scores exist for `block` queries at a time.
    """
    import torch

    B, T, H, E = v_BTHE.shape
    q, k, v = (t.transpose(1, 2).reshape(B * H, T, E) for t in (qk_BT2HE[:, :, 0], qk_BT2HE[:, :, 1], v_BTHE))
    mask_TT = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        mask = mask_TT[start:end, :end].expand(B * H, -1, -1)
        scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].transpose(1, 2), alpha=E**-0.5)
        outputs.append(torch.bmm(torch.softmax(scores, -1), v[:, :end]))
    return torch.cat(outputs, 1).view(B, H, T, E).transpose(1, 2).reshape(B * T, H * E)


def _rms_norm(eps: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """x / rms(x) over the last axis, its sum in float32; keeps only its output for the backward pass."""
    import torch

    class RmsNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1]
            scale = (mean_square + eps).rsqrt().to(x.dtype)
            y = x * scale
            ctx.save_for_backward(y, scale)
            return y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            y, scale = ctx.saved_tensors
            along = (grad * y).mean(-1, keepdim=True)
            return torch.addcmul(grad, y, along, value=-1).mul_(scale)

    return RmsNorm.apply


def _rotation(cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rotary embedding of [B, T, 2, H, E] (queries and keys at once); its gradient is the opposite
    rotation."""
    import torch

    cos, sin = cos_TE[:, None, None], sin_TE[:, None, None]

    def turn(x: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        (a, b), (y_a, y_b) = x.chunk(2, -1), y.chunk(2, -1)
        torch.mul(a, cos, out=y_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=y_b).addcmul_(a, sin)
        return y

    class Rotation(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return turn(x, sin)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return turn(grad, -sin)

    return Rotation.apply


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write config.json, model.safetensors, generation_config.json, tokenizer.json and tokenizer_config.json.

    The weights stay float32: the file is small, every reader then computes with the very same numbers, and
    capture on a CPU runs in float32 anyhow (vLLM's dtype="auto" would turn them into 16 bits; ask for
    dtype="float32").
    """
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, temperature=1.0
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
