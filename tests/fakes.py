"""Stand-ins for tests: a teacher that is a hash function, and a tokenizer trained on a few lines.

`StandInTeacher` implements the Teacher protocol. Its distribution after a prefix is drawn from a generator
seeded by a hash of the prefix, so every number can be recomputed densely (`dense`), there is nothing to load,
and two processes agree to the last bit.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from kdata.corpus.corpus import Corpus, CorpusConfig
from kdata.format.keep import KeepConfig
from kdata.format.schema import TeacherInfo
from kdata.jobs.reading import CaptureConfig, capture_with
from kdata.jobs.writing import GenerateConfig, generate_with
from kdata.store.dataset import Dataset
from kdata.teachers.base import Completion, OnTokens, Readout, ignore_tokens
from kdata.teachers.config import SamplingConfig, TeacherConfig, refuse_structure

VOCAB = 300
BOS, EOS = 0, 1
LINES = [
    "the cat sat on the mat and the dog sat on the log",
    "def add(a, b): return a + b",
    "naïve café, Übergröße, 日本語 and 🙂🙃 emoji",
    "for item in items: print(item)",
]


class StandInTeacher:
    """A stand-in for a language model: the distribution after a prefix follows from a hash of the prefix.

    Args:
        salt: another salt is another teacher.
        context: longest sequence.
        before_call: called with the number of the call (from 0) before each read or write: sleep, or raise.
    """

    def __init__(
        self,
        salt: str = "",
        *,
        context: int = 64,
        vocab_size: int = VOCAB,
        before_call: Callable[[int], None] | None = None,
    ) -> None:
        self.vocab_size, self.context, self.calls = vocab_size, context, 0
        self._salt, self._before_call = salt.encode(), before_call
        self.info = TeacherInfo(
            model="stand-in",
            revision=None,
            weights_hash=hashlib.sha256(self._salt).hexdigest(),
            backend="stand-in",
            backend_version="1",
            dtype="float64",
            logprobs="raw log-softmax at temperature 1",
            deterministic=True,
        )

    def after(self, prefix: Sequence[int]) -> np.ndarray:
        """Log-probabilities float64 [V] of the token after `prefix`."""
        text = np.asarray(prefix, "<i4").tobytes()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._salt[:32]).digest(), "little")
        logits = 3.0 * np.random.default_rng(seed).standard_normal(self.vocab_size)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    def dense(self, ids: np.ndarray) -> np.ndarray:
        """The oracle: float64 [T, V], row t is the distribution of ids[t] given ids[:t]; row 0 is NaN."""
        return np.array([np.full(self.vocab_size, np.nan), *(self.after(ids[:t]) for t in range(1, len(ids)))])

    def readout(self, ids: np.ndarray, keep: KeepConfig, start: int = 1) -> Readout:
        """What `read` returns for one sequence, recorded from `start` on."""
        import torch

        from kdata.teachers.reduce import draws_of, readout_of, reduce_logits

        ids = np.asarray(ids, np.int32)
        logits_MV = torch.from_numpy(self.dense(ids)[start:].astype(np.float32))
        actual_M = torch.from_numpy(ids[start:].astype(np.int64))
        return readout_of(ids, start, reduce_logits(logits_MV, actual_M, keep, draws_of(ids, start, keep)))

    def _count(self) -> None:
        if self._before_call is not None:
            self._before_call(self.calls)
        self.calls += 1

    def read(
        self, sequences: Sequence[np.ndarray], keep: KeepConfig, on_tokens: OnTokens = ignore_tokens
    ) -> list[Readout]:
        """See `Teacher.read`."""
        self._count()
        readouts = []
        for ids in sequences:
            readouts.append(self.readout(ids, keep))
            on_tokens(len(ids))
        return readouts

    def write(
        self,
        prompts: Sequence[np.ndarray],
        keep: KeepConfig,
        sampling: SamplingConfig,
        seeds: Sequence[int],
        on_tokens: OnTokens = ignore_tokens,
    ) -> list[Completion]:
        """See `Teacher.write`."""
        refuse_structure(sampling, "stand-in")
        self._count()
        completions = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            completions.append(self._continue(prompt, keep, sampling, seed))
            on_tokens(len(completions[-1].readout.token_ids) - len(prompt))
        return completions

    def _continue(self, prompt: np.ndarray, keep: KeepConfig, sampling: SamplingConfig, seed: int) -> Completion:
        rng, ids = np.random.default_rng(seed), prompt.tolist()
        for number in range(min(sampling.max_tokens, self.context - len(prompt))):
            logprobs_V = self.after(ids)
            if number < sampling.min_tokens:
                logprobs_V[EOS] = -np.inf
            ids.append(_draw(logprobs_V, sampling, rng))
            if ids[-1] == EOS:
                return Completion(self.readout(np.array(ids), keep, len(prompt)), len(prompt), "stop")
        return Completion(self.readout(np.array(ids), keep, len(prompt)), len(prompt), "length")

    def close(self) -> None:
        """Nothing to free."""


def _draw(logprobs_V: np.ndarray, sampling: SamplingConfig, rng: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(logprobs_V.argmax())
    weights = np.exp((logprobs_V - logprobs_V.max()) / sampling.temperature)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


TURN, TURN_END = "<|im_start|>", "<|im_end|>"
# Chat templates: ChatML with tools, the same with its assistant's turns marked, and one without special tokens.
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<call>' }}{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ '\n<call>' }}{{ c.function | tojson }}</call>{% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_CHAT = (
    "{% for m in messages %}{{ {'user': 'User:', 'assistant': 'Assistant:'}[m.role] }} {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def save_tokenizer(
    folder: Path, *, lines: Sequence[str] = LINES, bos: bool = True, chat_template: str | None = None
) -> Any:
    """Train a byte-level BPE of 300 ids on a few lines and save it; <s> goes before every text when `bos`.

    With a chat template there are TURN and TURN_END too, ids 2 and 3.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", *([TURN, TURN_END] if chat_template else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_llama(folder: Path, *, seed: int = 0, context: int = 128) -> Path:
    """Save a tiny random Llama with the tokenizer beside it: hidden 64, 2 layers, heads of 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def rows_of_text(count: int, *, words: int = 12) -> list[dict[str, Any]]:
    """Rows of a corpus: two domains, texts of differing length out of the tokenizer's own lines."""
    rng = np.random.default_rng(7)
    bag = " ".join(LINES).split(" ")
    return [
        {
            "id": f"doc-{n:03}",
            "domain": ("prose", "code")[n % 2],
            "text": " ".join(rng.choice(bag, size=int(rng.integers(2, words)))),
            "source": f"book {n}",
            "license": "CC0-1.0",
        }
        for n in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def run_capture(
    root: Path, corpus: Path, tokenizer: Path, *, teacher: Any = None, resume: str = "auto", **settings: Any
) -> Dataset:
    """Capture a corpus with the stand-in teacher; hybrid, k = 8 and units of 120 tokens unless said otherwise."""
    fields = {"kind": "hybrid", "k": 8, "unit_tokens": 120, **settings}
    columns = fields.pop("reading", {})
    config = CaptureConfig(corpus=CorpusConfig(path=str(corpus), **columns), **fields)
    who = TeacherConfig(model=str(tokenizer), backend="transformers")
    return capture_with(root, teacher or StandInTeacher(), who, Corpus(config.corpus), config, resume=resume)


@contextmanager
def codec_version(number: int) -> Iterator[None]:
    """New datasets have this version of the codec packed, as an older kdata wrote them."""
    with (
        patch("kdata.format.keep.packed_version", lambda *_: number),
        patch("kdata.jobs.combine.packed_version", lambda *_: number),
    ):
        yield


def run_generate(
    root: Path, prompts: Path, tokenizer: Path, *, teacher: Any = None, resume: str = "auto", **settings: Any
) -> Dataset:
    """Generate with the stand-in teacher; hybrid, k = 8, 12 tokens, units of 4 prompts unless said otherwise."""
    fields = {"kind": "hybrid", "k": 8, "unit_prompts": 4, "sampling": SamplingConfig(max_tokens=12), **settings}
    columns = fields.pop("reading", {})
    config = GenerateConfig(prompts=CorpusConfig(path=str(prompts), **columns), **fields)
    who = TeacherConfig(model=str(tokenizer), backend="transformers")
    return generate_with(root, teacher or StandInTeacher(), who, Corpus(config.prompts), config, resume=resume)


def generate_and_capture(root: Path, corpus: Path, tokenizer: Path, sleep_sec: float = 0.0) -> None:
    """The job that is killed in the crash tests: both ways of making rows, into one dataset."""
    teacher = StandInTeacher(before_call=lambda _: time.sleep(sleep_sec))
    run_generate(root, corpus, tokenizer, teacher=teacher)
    run_capture(root, corpus, tokenizer, teacher=teacher)


@contextmanager
def held_by_another_process(root: str, corpus: Path, tokenizer: Path) -> Iterator[int]:
    """A process that has begun to write a dataset, and stays in its first call of the teacher until it is killed; its id."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.fakes import StandInTeacher, run_capture\n"
        "def stay(call):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(120)\n"
        "run_capture(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), teacher=StandInTeacher(before_call=stay))\n"
    )
    arguments = [sys.executable, "-c", code, root, str(corpus), str(tokenizer)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            yield process.pid
        finally:
            process.kill()


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by relative path."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file())
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
