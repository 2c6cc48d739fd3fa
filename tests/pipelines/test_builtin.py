"""The built-in corpus, the models that ship, and the way they are made again."""

import ast
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache as memoize
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdata.errors import ConfigError, CorruptError, DataError
from kdata.pipelines.builtin import builtin, train
from kdata.pipelines.builtin import corpus as corpus_module
from kdata.pipelines.builtin.builtin import (
    DIGESTS,
    MODELS,
    REFERENCE,
    TEACHER,
    builtin_reference,
    builtin_teacher,
    checked_model,
    ensure_corpus,
)
from kdata.pipelines.builtin.corpus import DOMAINS, HELD_OUT, CorpusFiles, build_corpus, split_documents
from kdata.pipelines.builtin.train import BOS_ID, EOS_ID, ModelRecipe

ROOT = Path(__file__).resolve().parents[2]
TINY = ModelRecipe(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    ffn_size=128,
    steps=12,
    short_steps=8,
    slow_steps=24,
    decay_steps=4,
    warmup_steps=2,
    batch_tokens=1024,
    muon_lr=0.02,
)


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Read the standard library once (3.5 s of CPU), and use one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "gather", memoize(corpus_module.gather))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> CorpusFiles:
    return ensure_corpus(cache)


@pytest.fixture(scope="module")
def texts(corpus: CorpusFiles) -> list[str]:
    return [row["text"] for row in rows(corpus.corpus)]


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


# ---- the corpus


def test_corpus_columns_domains_and_ids(corpus: CorpusFiles) -> None:
    for path in (corpus.corpus, corpus.heldout):
        table = rows(path)
        assert list(table[0]) == ["id", "domain", "text", "source", "license"]
        assert {row["domain"] for row in table} == set(DOMAINS)
        assert len({row["id"] for row in table}) == len({row["text"] for row in table}) == len(table)
        assert max(len(row["text"]) for row in table) <= corpus_module.MAX_CHARS
        assert all(row["id"].split("/")[0] == row["domain"] for row in table)


def test_split_is_the_fixed_list_of_modules_and_topics(corpus: CorpusFiles) -> None:
    training, heldout = split_documents()
    assert {d.group for d in heldout} <= HELD_OUT and not {d.group for d in training} & HELD_OUT
    assert [d.id for d in training] == [row["id"] for row in rows(corpus.corpus)]
    assert [d.id for d in heldout] == [row["id"] for row in rows(corpus.heldout)]
    missing = HELD_OUT - {d.group for d in heldout}
    assert len(missing) <= 5, f"this Python lacks held-out modules or topics: {sorted(missing)}"
    for domain in DOMAINS:
        assert sum(d.domain == domain for d in heldout) >= 60


def test_no_heldout_text_is_in_the_training_part(corpus: CorpusFiles) -> None:
    def plain(path: Path) -> set[str]:
        return {" ".join(row["text"].split()).lower() for row in rows(path)}

    assert not plain(corpus.corpus) & plain(corpus.heldout)


def test_corpus_is_deterministic(corpus: CorpusFiles, tmp_path: Path) -> None:
    again = build_corpus(tmp_path / "again")
    assert again.digest == corpus.digest
    for name in ("corpus", "heldout", "prompts"):
        assert rows(getattr(again, name)) == rows(getattr(corpus, name))


def test_gathering_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = list(islice(corpus_module._modules(), 40))
    monkeypatch.setattr(corpus_module, "_modules", lambda: iter(modules))
    gather = corpus_module.gather.__wrapped__
    assert gather() == gather()


def test_prompts_begin_training_documents(corpus: CorpusFiles) -> None:
    prompts = rows(corpus.prompts)
    assert list(prompts[0]) == ["id", "domain", "prompt"]
    assert [sum(p["domain"] == d for p in prompts) for d in DOMAINS] == [120, 120, 120]
    text_of = {row["id"]: row["text"] for row in rows(corpus.corpus)}
    assert all(text_of[p["id"]].startswith(p["prompt"]) for p in prompts)


def test_code_has_no_docstrings_and_stays_python(corpus: CorpusFiles) -> None:
    for row in [row for row in rows(corpus.corpus) if row["domain"] == "code"][:100]:
        node = ast.parse(row["text"]).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert ast.get_docstring(node) is None


def test_a_stripped_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only_prose = [d for d in corpus_module.gather() if d.domain == "prose"]
    monkeypatch.setattr(corpus_module, "gather", lambda: only_prose)
    with pytest.raises(DataError, match=r"only; its sources seem to be stripped\. Use a Python with \.py files"):
        split_documents()


def test_corpus_is_built_once(cache: Path, corpus: CorpusFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "build_corpus", lambda *_: pytest.fail("built again"))
    assert ensure_corpus(cache) == corpus


def test_a_killed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path) -> None:
        (folder / "corpus.parquet").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "build_corpus", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure_corpus(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the models that ship


@pytest.mark.parametrize("folder", [builtin_teacher, builtin_reference])
def test_shipped_model_loads_in_float32_with_its_tokenizer(folder: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    assert model.config.vocab_size == len(tokenizer) == train.VOCAB_SIZE
    assert model.config.hidden_size // model.config.num_attention_heads in (32, 64), "vLLM's head sizes on CPUs"
    assert model.config.max_position_embeddings == tokenizer.model_max_length == train.CONTEXT
    assert model.generation_config.eos_token_id == EOS_ID
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == BOS_ID


def test_shipped_models_share_one_tokenizer() -> None:
    assert (builtin_teacher() / "tokenizer.json").read_bytes() == (builtin_reference() / "tokenizer.json").read_bytes()


def test_shipped_models_take_at_most_6_mb() -> None:
    assert sum(p.stat().st_size for p in MODELS.rglob("*") if p.is_file()) <= 6_000_000


def test_teacher_knows_heldout_text_better_than_the_reference(corpus: CorpusFiles) -> None:
    """The figures of pipelines/README.md: nats per byte on the whole held-out part, 1.20 and 1.54."""
    tokenizer = AutoTokenizer.from_pretrained(builtin_teacher())
    sample = [row["text"] for row in rows(corpus.heldout)][:40]
    num_bytes = sum(len(text.encode()) for text in sample)

    def nats_per_byte(folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        total = 0.0
        with torch.inference_mode():
            for text in sample:
                ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : train.CONTEXT]
                total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        return total / num_bytes

    teacher, reference = nats_per_byte(builtin_teacher()), nats_per_byte(builtin_reference())
    assert teacher < 1.4 and teacher < reference - 0.2


def test_shipped_recipe_is_the_one_in_the_code() -> None:
    for name in (TEACHER, REFERENCE):
        facts = json.loads((MODELS / name / "training.json").read_text())
        assert facts["recipe"] == dataclasses.asdict(train.RECIPES[name])


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return shutil.copytree(MODELS, tmp_path / "models")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_refused(models: Path, file: str) -> None:
    assert checked_model(models, TEACHER) == models / TEACHER
    path = models / TEACHER / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=f"{file} is not the file that shipped.*install kdata again"):
        checked_model(models, TEACHER)
    assert checked_model(models, REFERENCE) == models / REFERENCE


def test_a_missing_or_extra_file_is_refused(models: Path) -> None:
    (models / TEACHER / "extra.py").write_text("")
    with pytest.raises(CorruptError, match=r"extra\.py.*install kdata again"):
        checked_model(models, TEACHER)
    (models / TEACHER / "extra.py").unlink()
    (models / TEACHER / "config.json").unlink()
    with pytest.raises(CorruptError, match=r"config\.json"):
        checked_model(models, TEACHER)
    (models / DIGESTS).unlink()
    with pytest.raises(CorruptError, match="lacks files"):
        checked_model(models, REFERENCE)


@pytest.mark.slow
def test_the_wheel_holds_the_models(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(source)], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for line in (MODELS / DIGESTS).read_text().splitlines():
            digest, path = line.split("  ")
            content = archive.read(f"kdata/pipelines/builtin/models/{path}")
            assert hashlib.sha256(content).hexdigest() == digest


# ---- how they are made


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> Any:
    return train.train_tokenizer(texts[:400], 512)


def test_tokenizer_round_trips_and_puts_bos_first(texts: list[str], tokenizer: Any) -> None:
    for text in [*texts[:20], "tab\t, naïve ∑, 한국어, \x00\r\n  trailing  "]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == BOS_ID and EOS_ID not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("x", add_special_tokens=False)["input_ids"][0] != BOS_ID
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)


def test_tokenizer_refuses_more_entries_than_the_text_supports() -> None:
    with pytest.raises(ConfigError, match="vocab_size=4096"):
        train.train_tokenizer(["a b c"], 4096)


def test_windows_cover_the_stream_once_a_pass() -> None:
    recipe = dataclasses.replace(TINY, steps=3, batch_tokens=256, short_steps=0)
    stream = np.arange(128 * 7 + 1)
    batches = list(train.windows(stream, recipe, context=128))
    assert [b.shape for b in batches] == [(2, 129)] * 3
    starts = np.concatenate([b[:, 0] for b in batches])
    assert len(set(starts)) == 6 and (np.diff(np.sort(starts)) == 128).all()


def test_windows_are_short_first_and_too_little_text_is_refused() -> None:
    recipe = dataclasses.replace(TINY, steps=4, batch_tokens=256, short_steps=2)
    assert [b.shape for b in train.windows(np.arange(1000), recipe, context=128)] == [(4, 65)] * 2 + [(2, 129)] * 2
    with pytest.raises(DataError, match="add text"):
        next(train.windows(np.arange(200), recipe, context=128))


def test_learning_rate_rises_falls_slowly_then_fast() -> None:
    rates = [train.RECIPES[TEACHER].rate(step) for step in range(601)]
    assert rates[0] == 1 / 28 and rates[27] == 1.0
    assert rates[500] == pytest.approx(450 / 923) and rates[550] == pytest.approx(rates[500] / 2)
    assert rates[600] == 0.05 and all(a >= b for a, b in pairwise(rates[27:]))


def test_training_learns_and_repeats(texts: list[str], tokenizer: Any) -> None:
    stream = train.token_stream(texts[:400], tokenizer)
    assert stream[0] == BOS_ID and (stream == EOS_ID).sum() == 400
    first, second = (train.train_model(stream, TINY, name="tiny", vocab_size=512, context=128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    ids = torch.from_numpy(stream[None, :128])
    assert first(ids, labels=ids).loss < 5.7  # log 512 = 6.2 before training


def test_saved_model_is_float16_and_its_digests_hold(texts: list[str], tokenizer: Any, tmp_path: Path) -> None:
    stream = train.token_stream(texts[:100], tokenizer)
    recipe = dataclasses.replace(TINY, steps=1)
    model = train.train_model(stream, recipe, name="tiny", vocab_size=512, context=128)
    train.save_model(model, tokenizer, tmp_path / "tiny")
    train.write_digests(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(checked_model(tmp_path, "tiny"), dtype="auto")
    assert loaded.dtype == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path / "tiny")("def f(x):\n") == tokenizer("def f(x):\n")


def test_muon_in_float32_is_torchs() -> None:
    """Three steps on a wide and a tall matrix; torch computes the direction in bf16, so to eight bits."""
    moves = []
    for muon in (torch.optim.Muon, train.float32_muon()):
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(24, 40)), torch.nn.Parameter(torch.randn(40, 24))]
        before = [p.detach().clone() for p in matrices]
        optimizer = muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for p in matrices:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        moves.append([p.detach() - b for p, b in zip(matrices, before, strict=True)])
    for torchs, ours in zip(*moves, strict=True):
        assert (torchs - ours).norm() < 0.03 * torchs.norm()


def test_train_command_refuses_an_existing_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdata.pipelines.builtin.train", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 1 and "name a new folder" in outcome.stderr and "Traceback" not in outcome.stderr
