"""Students: checked against the dataset, packed documents apart, logits that are head @ hidden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import kdata
from kdata.errors import ConfigError, MismatchError, MissingError
from kdata.loader.batches import BatchesConfig
from kdata.trainer.config import CheckpointStudent, ScratchStudent
from kdata.trainer.fused import distillation_loss
from kdata.trainer.loader import Loader
from kdata.trainer.objective_config import ObjectiveConfig
from kdata.trainer.pruning import prune_layers
from kdata.trainer.student import (
    build_student,
    head_of,
    hidden_states,
    num_parameters,
    probe_head,
    probe_isolation,
)
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer

TINY = ScratchStudent(hidden_size=16, num_layers=2, num_heads=2, max_positions=64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> kdata.Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set", [9, 20, 13, 1, 2, 30, 7, 16])


def test_a_student_from_scratch_is_reproducible_and_has_the_datasets_vocabulary(
    dataset: kdata.Dataset,
) -> None:
    first, again, other = (build_student(TINY, dataset, seed) for seed in (3, 3, 4))
    assert head_of(first).shape == (VOCAB, 16)
    assert head_of(first) is first.get_input_embeddings().weight
    assert torch.equal(head_of(first), head_of(again)) and not torch.equal(head_of(first), head_of(other))
    assert num_parameters(first) == sum(p.numel() for p in first.parameters())


def test_packed_documents_have_the_logits_of_the_document_alone(dataset: kdata.Dataset) -> None:
    model = build_student(TINY, dataset, 0).eval()
    loader = Loader(dataset, None, BatchesConfig(context_tokens=40, batch_rows=3))
    seen = 0
    for batch in loader.epoch():
        packed = hidden_states(model, batch.input_ids, batch.position_ids) @ head_of(model).T
        for row, segments in enumerate(batch.segment_ids):
            for segment in range(int(segments.max()) + 1):
                ids = batch.input_ids[row][segments == segment]
                alone = model(input_ids=ids[None], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row][segments == segment], alone, rtol=1e-4, atol=1e-5)
                seen += 1
    assert seen == 8


def test_packed_loss_and_gradients_equal_unpacked(dataset: kdata.Dataset) -> None:
    model = build_student(TINY, dataset, 0)

    def run(context: int, rows: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        loader = Loader(dataset, None, BatchesConfig(context_tokens=context, batch_rows=rows))
        batches = list(loader.epoch())
        counted = sum(len(b.targets) for b in batches)
        total = 0.0
        for b in batches:
            hidden = hidden_states(model, b.input_ids, b.position_ids).flatten(0, 1)[b.predictor_M]
            loss = distillation_loss(
                hidden, head_of(model), b.targets, ObjectiveConfig(), "ghost", counted_tokens=counted
            )
            loss.total.backward()
            total += float(loss.total.detach())
        return total, [p.grad.clone() for p in model.parameters()]

    packed, packed_grads = run(60, 8)
    alone, alone_grads = run(30, 1)  # other rows, other neighbours, and accumulated over many batches
    assert packed == pytest.approx(alone, rel=1e-5)
    for got, want in zip(packed_grads, alone_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def test_a_student_that_leaks_across_documents_is_refused() -> None:
    torch.manual_seed(0)
    leaky = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in leaky.parameters():
            parameter.mul_(3.0)
    original = leaky.model.forward
    leaky.model.forward = lambda position_ids=None, **kw: original(**kw)
    with pytest.raises(ConfigError, match="see each other"):
        probe_isolation(leaky)


def test_a_student_with_scaled_logits_is_refused() -> None:
    torch.manual_seed(0)
    scaled = Cohere2ForCausalLM(
        Cohere2Config(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            logit_scale=0.25,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        head_of(scaled).mul_(20)
    with pytest.raises(ConfigError, match="not head @ hidden"):
        probe_head(scaled)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 18, "num_heads": 4}, "even head width"),
        ({"hidden_size": 12, "num_heads": 4}, "even head width"),
        ({"hidden_size": 16, "num_heads": 4, "num_kv_heads": 3}, "does not divide"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(dataset: kdata.Dataset, config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_student(ScratchStudent(**config), dataset, 0)


def test_a_checkpoint_is_loaded_in_float32_and_checked(dataset: kdata.Dataset, tmp_path: Path) -> None:
    model = build_student(TINY, dataset, 0)
    good = tmp_path / "good"
    model.half().save_pretrained(good)
    save_tokenizer(good)
    loaded = build_student(CheckpointStudent(model=str(good)), dataset, 1)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(head_of(loaded), head_of(model).float())

    save_tokenizer(good, VOCAB - 1)
    (good / "model.safetensors").write_bytes(b"")  # weights are not read for a tokenizer that does not fit
    with pytest.raises(MismatchError, match="tokenizer"):
        build_student(CheckpointStudent(model=str(good)), dataset, 1)
    save_tokenizer(good)
    model.resize_token_embeddings(VOCAB + 3)
    model.save_pretrained(good)
    assert head_of(build_student(CheckpointStudent(model=str(good)), dataset, 1)).shape[0] == VOCAB
    model.resize_token_embeddings(VOCAB - 3)
    model.save_pretrained(good)
    with pytest.raises(MismatchError, match=rf"head has {VOCAB - 3} rows.*{VOCAB} ids"):
        build_student(CheckpointStudent(model=str(good)), dataset, 1)
    with pytest.raises(MissingError, match="cannot be loaded"):
        build_student(CheckpointStudent(model=str(tmp_path / "nowhere")), dataset, 1)


def test_a_student_of_some_layers_of_a_checkpoint(llama_dir: Path) -> None:
    """Layer 1 of 2, in place 0, and all that is no layer."""
    whole = AutoModelForCausalLM.from_pretrained(llama_dir)
    part = prune_layers(whole, [1])
    assert part.config.num_hidden_layers == 1 and whole.config.num_hidden_layers == 2
    theirs, ours = whole.state_dict(), part.state_dict()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name.replace("layers.0.", "layers.1.")], rtol=0, atol=0)
    ids_BL = torch.arange(6)[None]
    hidden = whole.model.embed_tokens(ids_BL)
    rotary = whole.model.rotary_emb(hidden, position_ids=ids_BL)
    mask = torch.full((6, 6), -torch.inf).triu(1)[None, None]
    by_hand = whole.model.layers[1](hidden, attention_mask=mask, position_embeddings=rotary)
    expected = whole.lm_head(whole.model.norm(by_hand))
    torch.testing.assert_close(part(ids_BL).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_keep_their_own_kind_of_attention() -> None:
    """Gemma 3: every sixth layer sees everything, the others a window."""
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    whole = Gemma3ForCausalLM(config)
    part = prune_layers(whole, 6)
    assert part.config.layer_types == [whole.config.layer_types[n] for n in (0, 2, 4, 7, 9, 11)]
    assert part.lm_head.weight is part.model.embed_tokens.weight, "still one matrix"
    assert torch.equal(
        part.state_dict()["model.layers.5.mlp.up_proj.weight"], whole.model.layers[11].mlp.up_proj.weight
    )


def test_a_list_of_a_config_that_is_as_long_as_it_has_layers_stays_where_it_is_not_of_layers() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, num_hidden_layers=3, eos_token_id=[1, 2, 3])
    part = prune_layers(Qwen3ForCausalLM(config), 2)
    assert part.config.eos_token_id == [1, 2, 3]
    assert part.config.layer_types == ["full_attention"] * 2
    experts = Qwen3MoeConfig(**sizes, num_hidden_layers=3, moe_intermediate_size=8, num_experts=2, mlp_only_layers=[1])
    with pytest.raises(
        ConfigError, match=r"mlp_only_layers of the model's config names layers by their numbers \(\[1\]\)"
    ):
        prune_layers(Qwen3MoeForCausalLM(experts), 2)


@pytest.mark.parametrize("keep", [0, 3, [], [1, 0], [0, 0], [0, 2], [-1]])
def test_layers_that_the_checkpoint_does_not_have(llama_dir: Path, keep: int | list[int]) -> None:
    with pytest.raises(ConfigError, match=r"keep_layers=.* does not fit a model of 2 layers"):
        prune_layers(AutoModelForCausalLM.from_pretrained(llama_dir), keep)
