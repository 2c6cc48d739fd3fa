"""The built-in corpus, tokenizer and models: deterministic, disjoint, loadable, the gradient right."""

import ast
from collections.abc import Iterator
from functools import cache as memoize
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdata.errors import ConfigError, DataError
from kdata.pipelines.builtin import builtin
from kdata.pipelines.builtin import corpus as builtin_corpus
from kdata.pipelines.builtin.builtin import BuiltinConfig, NetworkConfig, ensure_reference, ensure_teacher
from kdata.pipelines.builtin.corpus import DOMAINS, CorpusFiles, build_corpus

TINY = NetworkConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    ffn_size=128,
    steps=12,
    batch_tokens=1024,
    muon_lr=0.02,
    adam_lr=0.01,
)
CONFIG = BuiltinConfig(
    vocab_size=512, context=128, max_domain_chars=60_000, num_prompts=30, teacher=TINY, reference=TINY
)


@pytest.fixture(scope="module", autouse=True)
def _light() -> Iterator[None]:
    """Read the standard library once (3.5 s of CPU), and leave the other cores alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtin_corpus, "gather", memoize(builtin_corpus.gather))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("builtin")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> CorpusFiles:
    return builtin.ensure_corpus(cache, CONFIG)


@pytest.fixture(scope="module")
def texts(corpus: CorpusFiles) -> list[str]:
    return pl.read_parquet(corpus.corpus)["text"].to_list()


def test_corpus_columns_domains_and_ids(corpus: CorpusFiles) -> None:
    for path in (corpus.corpus, corpus.heldout):
        frame = pl.read_parquet(path)
        assert frame.columns == ["id", "domain", "text", "source", "license"]
        assert set(frame["domain"]) == set(DOMAINS)
        assert frame["id"].is_unique().all() and frame["text"].is_unique().all()
        assert frame["text"].str.len_chars().max() <= CONFIG.max_doc_chars
        assert (frame["id"].str.split("/").list.first() == frame["domain"]).all()


def test_corpus_splits_by_module_and_topic(corpus: CorpusFiles) -> None:
    def sources(path: Path) -> set[str]:
        ids = pl.read_parquet(path)["id"].str.split("/").to_list()
        return {f"topic {i[2].split('#')[0]}" if i[1] == "topics" else i[1].split(".")[0] for i in ids}

    assert not sources(corpus.corpus) & sources(corpus.heldout)


def test_corpus_is_deterministic_and_follows_the_seed(corpus: CorpusFiles, tmp_path: Path) -> None:
    again = build_corpus(tmp_path / "again", max_domain_chars=60_000, num_prompts=30)
    assert again.fingerprint == corpus.fingerprint
    for name in ("corpus", "heldout", "prompts"):
        assert pl.read_parquet(getattr(again, name)).equals(pl.read_parquet(getattr(corpus, name)))
    other = build_corpus(tmp_path / "other", seed=1, max_domain_chars=60_000, num_prompts=30)
    assert other.fingerprint != corpus.fingerprint


def test_gathering_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = list(islice(builtin_corpus._modules(), 40))
    monkeypatch.setattr(builtin_corpus, "_modules", lambda: iter(modules))
    gather = builtin_corpus.gather.__wrapped__
    assert gather(1600) == gather(1600)


def test_prompts_begin_training_documents(corpus: CorpusFiles) -> None:
    prompts = pl.read_parquet(corpus.prompts)
    assert prompts.columns == ["id", "domain", "prompt"] and len(prompts) == 30
    assert set(prompts["domain"].value_counts()["count"]) == {10}
    joined = prompts.join(pl.read_parquet(corpus.corpus).select("id", "text"), on="id")
    assert len(joined) == 30
    assert all(text.startswith(prompt) for text, prompt in joined.select("text", "prompt").rows())


def test_code_loses_its_docstrings_and_stays_python(corpus: CorpusFiles) -> None:
    for text in pl.read_parquet(corpus.corpus).filter(pl.col("domain") == "code")["text"].head(100):
        node = ast.parse(text).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert ast.get_docstring(node) is None


def test_heldout_share_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"heldout_share is 0\.9"):
        build_corpus(tmp_path, heldout_share=0.9)


def test_tokenizer_round_trips_and_prepends_bos(texts: list[str]) -> None:
    tokenizer = builtin.train_tokenizer(texts, 512, context=128)
    for text in [*texts[:20], "tab\t, naïve ∑, 한국어, \x00\r\n  trailing  "]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == builtin.BOS_ID and builtin.EOS_ID not in ids
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer("x", add_special_tokens=False)["input_ids"][0] != builtin.BOS_ID
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 128 and len(tokenizer) == 512


def test_tokenizer_refuses_more_entries_than_the_text_supports() -> None:
    with pytest.raises(ConfigError, match="vocab_size=4096"):
        builtin.train_tokenizer(["a b c"], 4096)


@pytest.mark.parametrize("length", [16, 300])  # below and above one block of queries
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.04), (torch.float32, 1e-4)])
def test_lean_forward_and_its_gradients_are_those_of_transformers(
    length: int, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "_arithmetic", lambda: dtype)
    torch.manual_seed(0)
    network = TINY.model_copy(update={"num_heads": 1})
    model = builtin._new_model(512, 512, network)
    window = torch.randint(3, 512, (2, length + 1))
    loss = builtin._backward(model, window)
    lean = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(window[:, :-1]).logits
    oracle = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
    oracle.backward()
    assert loss == pytest.approx(oracle.item(), abs=2e-3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (lean[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error < limit, name  # bf16 keeps eight bits; a missing term would show as 0.1 or more


def test_muon_in_float32_is_torchs() -> None:
    """Three steps on a wide and a tall matrix; torch computes the direction in bf16, so to eight bits."""
    found = []
    for muon in (torch.optim.Muon, builtin._wide_muon()):
        torch.manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(24, 40)), torch.nn.Parameter(torch.randn(40, 24))]
        before = [p.detach().clone() for p in matrices]
        optimizer = muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for p in matrices:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        found.append([p.detach() - b for p, b in zip(matrices, before, strict=True)])
    for torchs, ours in zip(*found, strict=True):
        assert (torchs - ours).norm() < 0.03 * torchs.norm()


def test_head_loss_is_exact_in_double_precision() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(70, 16, dtype=torch.float64, requires_grad=True)
    head = torch.randn(40, 16, dtype=torch.float64, requires_grad=True)
    target = torch.randint(40, (70,))
    oracle = torch.nn.functional.cross_entropy(hidden @ head.T, target)
    expected = torch.autograd.grad(oracle, (hidden, head))
    loss, grad = builtin._head_loss(hidden.detach(), head, target, chunk=32)
    assert loss == pytest.approx(oracle.item(), abs=1e-5)  # the softmax itself is float32
    torch.testing.assert_close(grad, expected[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(head.grad, expected[1], atol=1e-6, rtol=1e-4)


def test_windows_cover_the_stream_once_a_pass() -> None:
    network = TINY.model_copy(update={"steps": 3, "batch_tokens": 256, "short_share": 0.0})
    stream = np.arange(128 * 7 + 1)
    batches = list(builtin._windows(stream, network, context=128, seed=0))
    assert [b.shape for b in batches] == [(2, 129)] * 3
    starts = np.concatenate([b[:, 0] for b in batches])
    assert len(set(starts)) == 6 and (np.diff(np.sort(starts)) == 128).all()


def test_teacher_is_cached_loadable_and_reproducible(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = ensure_teacher(cache, CONFIG)
    names = {p.name for p in teacher.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    assert model.dtype == torch.float32 and model.config.vocab_size == len(tokenizer) == 512
    ids = tokenizer("def read(self):", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id and model.generation_config.eos_token_id == builtin.EOS_ID
    assert model(ids, labels=ids).loss < 5.7  # log 512 = 6.2 before training

    again = ensure_teacher(tmp_path, CONFIG)
    assert again.name == teacher.name
    assert (again / "model.safetensors").read_bytes() == (teacher / "model.safetensors").read_bytes()

    monkeypatch.setattr(builtin, "train_language_model", lambda *a, **k: pytest.fail("trained again"))
    assert ensure_teacher(cache, CONFIG) == teacher


def test_reference_shares_the_tokenizer(cache: Path) -> None:
    teacher, reference = ensure_teacher(cache, CONFIG), ensure_reference(cache, CONFIG)
    assert teacher != reference
    assert (teacher / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()


def test_killed_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: CorpusFiles) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin, "ensure_corpus", lambda *_: corpus)
    monkeypatch.setattr(builtin, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        ensure_teacher(tmp_path, CONFIG)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": TINY.model_dump() | {"num_heads": 4}}, "must be 32 or 64"),
        ({"context": 384}, "must be a multiple of context 384"),
        ({"vocab": 4096}, "Extra inputs"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BuiltinConfig(**settings)


def test_every_setting_is_described() -> None:
    for model in (BuiltinConfig, NetworkConfig):
        assert all(field.description for field in model.model_fields.values())
    BuiltinConfig.model_validate(BuiltinConfig.small().model_dump())
