"""A tiny random model of each class that people use, read by kdata and by plain transformers in float32: the same numbers.

Differences are rounding: 1e-4 nats of a log-probability where both compute the same products in another order (batches are
padded here, and the head is applied by oneDNN), 1e-3 for vLLM, whose attention sums in another order. A class that cannot be
read is refused with its reason.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from kdata.errors import ConfigError, KdataError, TeacherError
from kdata.format.keep import KeepConfig
from kdata.teachers.base import Readout
from kdata.teachers.config import TeacherConfig
from kdata.teachers.head import is_known, load_head
from kdata.teachers.load import load_teacher
from tests.fakes import VOCAB, save_tokenizer

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A class of models: its name in transformers (NAME + Config, NAME + `ending`), and what differs from SIZES.

    context: set where the configuration knows none. rows: of the head. head: whether the hidden-state path knows it.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    ending: str = "ForCausalLM"
    context: int | None = None
    head: bool = True
    vllm: bool = True
    sizes: dict[str, Any] = field(default_factory=lambda: SIZES)

    @property
    def rows(self) -> int:
        return int(self.changes.get("vocab_size", VOCAB))


def multimodal() -> dict[str, Any]:
    text = {**SIZES, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    return {"text_config": text, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 299,
            "boi_token_index": 298, "eoi_token_index": 297}  # fmt: skip


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
CASES = {
    "llama": Case("Llama", {"tie_word_embeddings": False}),
    "llama, tied": Case("Llama", {"tie_word_embeddings": True}),
    "llama, padded vocabulary": Case("Llama", {"vocab_size": 320}),
    "qwen3": Case("Qwen3", {"tie_word_embeddings": True}),
    "gemma 2, soft-cap": Case("Gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
                                         "query_pre_attn_scalar": 32, "sliding_window": 16}),
    "gemma 3": Case("Gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}),
    "gemma 3, multimodal": Case("Gemma3", multimodal(), "ForConditionalGeneration", sizes={}, vllm=False),
    "mistral": Case("Mistral", {"sliding_window": 16}),
    "phi": Case("Phi", {"partial_rotary_factor": 0.5}),
    "phi 3": Case("Phi3", {"pad_token_id": 2}),
    "gpt-neox": Case("GPTNeoX", {"rotary_pct": 0.5, "tie_word_embeddings": False}),
    "mixtral": Case("Mixtral", MOE, vllm=False),
    "cohere, logit scale": Case("Cohere", {"logit_scale": 0.25}),
    "granite, logits scaling": Case("Granite", {"logits_scaling": 4.0}),
    "gpt-2": Case("GPT2", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128,
                           "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}, "LMHeadModel", sizes={}),
    "mamba": Case("Mamba", MAMBA, context=128, sizes={}, vllm=False),
    "bloom": Case("Bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2,
                            "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}, context=128, sizes={}, vllm=False),
    "mpt": Case("Mpt", {"vocab_size": VOCAB, "d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 128,
                        "initializer_range": 0.2}, sizes={}, head=False, vllm=False),
}  # fmt: skip


def save(folder: Path, case: Case) -> PreTrainedModel:
    """Save a tiny random model of a class, with a tokenizer, and return it for plain use."""
    config = getattr(transformers, f"{case.name}TextConfig", None) if case.name == "Gemma3" and case.sizes else None
    config = config or getattr(transformers, f"{case.name}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = (
            getattr(transformers, f"{case.name}{case.ending}")(config(**{**case.sizes, **case.changes})).float().eval()
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)  # a bias of 0 would be left out unseen
    model.save_pretrained(folder)
    save_tokenizer(folder)
    if case.changes.get("attn_logit_softcapping"):
        model.set_attn_implementation("eager")  # the default leaves the cap out
    return model


SEQUENCES = [
    np.random.default_rng(n).integers(3, VOCAB - 4, size, dtype=np.int32) for n, size in enumerate((24, 7, 40, 2))
]
KEEP = KeepConfig(kind="topk", k=8)


@torch.no_grad()
def plain(model: PreTrainedModel, ids: np.ndarray) -> torch.Tensor:
    """Log-softmax [T - 1, V] of one sequence alone, by transformers."""
    return torch.log_softmax(model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1].float(), -1)


def compare(readouts: list[Readout], plain_logprobs: list[torch.Tensor], tolerance: float) -> None:
    """The same actual log-probabilities, first eight ids, and tails."""
    for ids, readout, expected in zip(SEQUENCES, readouts, plain_logprobs, strict=True):
        own = expected.gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0].numpy()
        np.testing.assert_allclose(readout.logprob[1:], own, atol=tolerance)
        top = expected.topk(KEEP.k)
        np.testing.assert_allclose(readout.kept.logprobs, top.values.reshape(-1).numpy(), atol=tolerance)
        gaps = expected.sort(descending=True).values.diff().abs()[:, : KEEP.k]
        before = torch.cat([torch.full_like(gaps[:, :1], torch.inf), gaps[:, :-1]], dim=1)
        clear = (torch.minimum(gaps, before) > 3 * tolerance).numpy()  # an entry whose neighbours rounding cannot reach
        kept_ids = readout.kept.ids.reshape(-1, KEEP.k)
        np.testing.assert_array_equal(kept_ids[clear], top.indices.numpy()[clear])
        assert clear.any()
        tail = torch.log1p(-top.values.exp().sum(-1)).numpy()
        np.testing.assert_allclose(readout.log_tail[1:], tail, atol=10 * tolerance)


@pytest.fixture(params=CASES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(case.name)
    return folder, save(folder, case)


def test_transformers_backend(case: Case, model: tuple[Path, PreTrainedModel]) -> None:
    folder, reference = model
    teacher = load_teacher(TeacherConfig(model=str(folder), backend="transformers", context=case.context), max_k=8)
    try:
        assert teacher.vocab_size == case.rows and teacher.context == 128
        compare(teacher.read(SEQUENCES, KEEP), [plain(reference, ids) for ids in SEQUENCES], 1e-4)
    finally:
        teacher.close()


def test_the_head_gives_the_model_s_logits_from_its_hidden_states(
    case: Case, model: tuple[Path, PreTrainedModel]
) -> None:
    """The path over hidden states, without an engine: what vLLM returns are the states after the final norm."""
    folder, reference = model
    assert is_known(folder) == case.head
    if not case.head:
        with pytest.raises(
            TeacherError, match=r"does not know the head of \w+; use path=logprobs, or backend transformers"
        ):
            load_head(folder, case.rows, torch.float32, "cpu")
        return
    head = load_head(folder, case.rows, torch.float32, "cpu")
    ids_BL = torch.from_numpy(SEQUENCES[0].astype(np.int64))[None]
    with torch.no_grad():
        output = reference(ids_BL, output_hidden_states=True)
        hidden_LD = output.hidden_states[-1][0]
    torch.testing.assert_close(head.logits(hidden_LD), output.logits[0].float(), rtol=1e-4, atol=1e-4)


VLLM_CASES = [name for name, case in CASES.items() if case.vllm]


def save_all(root: Path) -> dict[str, list[np.ndarray]]:
    """Save the models that vLLM reads; what plain transformers believes of each sequence."""
    return {name: [plain(save(root / name, CASES[name]), ids).numpy() for ids in SEQUENCES] for name in VLLM_CASES}


def read_all(root: Path) -> dict[tuple[str, str], list[Readout] | KdataError]:
    """What vLLM says of them, by path and name."""
    answers: dict[tuple[str, str], list[Readout] | KdataError] = {}
    for path in ("logprobs", "hidden"):
        for name in VLLM_CASES:
            settings = {"model": str(root / name), "path": path}
            try:
                teacher = load_teacher(TeacherConfig.model_validate(settings), max_k=8)
                answers[path, name] = teacher.read(SEQUENCES, KEEP)
                teacher.close()
            except KdataError as error:
                answers[path, name] = error
    return answers


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, list[np.ndarray]], dict[Any, Any]]:
    """Both, each from a process of its own: vLLM changes classes of transformers where it is loaded (Phi, GPT-NeoX)."""
    root, answers = tmp_path_factory.mktemp("classes"), []
    for work in (save_all, read_all):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            answers.append(pool.submit(work, root).result(timeout=900))
    return answers[0], answers[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", VLLM_CASES)
@pytest.mark.parametrize("path", ["logprobs", "hidden"])
def test_vllm(name: str, path: str, of_vllm: tuple[dict[str, list[np.ndarray]], dict[Any, Any]]) -> None:
    expected, answers = of_vllm
    if isinstance(answers[path, name], KdataError):
        raise answers[path, name]
    compare(answers[path, name], [torch.from_numpy(logprobs) for logprobs in expected[name]], 1e-3)


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_context_that_is_not_known_is_asked_for(name: str, tmp_path: Path) -> None:
    save(tmp_path, CASES[name])
    with pytest.raises(
        ConfigError, match=r"does not say how many tokens it reads at once; set it: --set teacher\.context="
    ):
        load_teacher(TeacherConfig(model=str(tmp_path), backend="transformers"), max_k=8)


def bert(folder: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    transformers.BertLMHeadModel(transformers.BertConfig(**sizes, is_decoder=False)).save_pretrained(folder)


def t5(folder: Path) -> None:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)


def masked(folder: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    transformers.BertForMaskedLM(transformers.BertConfig(**sizes)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("build", "message"),
    [(bert, "BertLMHeadModel lets a token see the ones after it"), (t5, "an encoder-decoder"),
     (masked, "BertForMaskedLM, which does not predict the next token")],
)  # fmt: skip
def test_a_class_that_does_not_predict_the_next_token_is_refused(
    build: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    build(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(KdataError, match=message):
        load_teacher(TeacherConfig(model=str(tmp_path), backend="transformers"), max_k=8)
