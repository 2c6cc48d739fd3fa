"""A student as a draft model, against a loop of speculative decoding that computes every distribution anew, in float64."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError, MismatchError, MissingError
from kdata.pipelines.cli.main import app
from kdata.trainer.config import EvaluateConfig
from kdata.trainer.drafts import Written, expected_length, figures_of, write_with_drafts
from kdata.trainer.evaluate import evaluate
from tests.trainer.datasets import VOCAB, make_dataset, save_tokenizer

PROMPT = [0, 5, 9]


def llama(seed: int, *, near: PreTrainedModel | None = None, share: float = 0.5) -> PreTrainedModel:
    """A random model without an end token; with `near` a mixture of its weights and random ones."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    if near is not None:
        with torch.no_grad():
            for own, other in zip(model.parameters(), near.parameters(), strict=True):
                own.lerp_(other, share)
    return model


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return llama(0)


@pytest.fixture(scope="module")
def student(teacher: PreTrainedModel) -> PreTrainedModel:
    return llama(1, near=teacher, share=0.7)


def dense(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    """The model's next-token distribution after a prefix, float64 [V], computed anew each time."""
    wide = copy.deepcopy(model).double()
    return lambda ids: torch.softmax(wide(torch.tensor([ids]), use_cache=False).logits[0, -1].detach(), -1)


def brute_force(
    teacher: PreTrainedModel, student: PreTrainedModel, max_tokens: int, draft_tokens: int, rng: torch.Generator | None
) -> Written:
    """Speculative decoding by algorithm 1 of arXiv 2211.17192, token by token; without a generator, greedy."""
    p_after, q_after = dense(teacher), dense(student)
    ids, steps = list(PROMPT), []
    while len(ids) < len(PROMPT) + max_tokens:
        room = min(draft_tokens, len(PROMPT) + max_tokens - len(ids) - 1)
        drafts: list[int] = []
        while len(drafts) < room:
            drafts.append(pick(q_after(ids + drafts), rng))
        steps.append(drafts)
        for number, token in enumerate(drafts):
            p, q = p_after(ids), q_after(ids)
            if rng is None:
                accepted = token == int(p.argmax())
            else:
                accepted = float(torch.rand((), generator=rng, dtype=torch.float64)) <= float(p[token] / q[token])
            if not accepted:
                ids.append(pick(p if rng is None else (p - q).clamp_min(0), rng))
                break
            ids.append(token)
            assert number < room
        else:
            ids.append(pick(p_after(ids), rng))
    return Written(ids, len(PROMPT), steps)


def pick(weights: Tensor, rng: torch.Generator | None) -> int:
    return int(weights.argmax()) if rng is None else int(torch.multinomial(weights, 1, generator=rng))


def expected(written: Written, teacher: PreTrainedModel, student: PreTrainedModel) -> np.ndarray:
    """1 - total variation at every context whose draft was judged."""
    p_after, q_after = dense(teacher), dense(student)
    contexts = [written.token_ids[:position] for position, _ in written.judged()]
    return np.array([1 - 0.5 * float((p_after(ids) - q_after(ids)).abs().sum()) for ids in contexts])


@given(st.floats(0, 0.999), st.integers(1, 12))
def test_expected_length_is_the_sum_of_the_papers_formula(acceptance: float, drafts: int) -> None:
    formula = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert expected_length(acceptance, drafts) == pytest.approx(formula, rel=1e-9)
    assert expected_length(1.0, drafts) == drafts + 1 and expected_length(0.0, drafts) == 1


def test_what_was_judged_is_read_from_drafts_and_text() -> None:
    # accepted 7, rejected 8 for a 9; both accepted, then the teacher's 3; the end comes with an accepted draft
    written = Written([0, 7, 9, 4, 5, 3, 1], 1, [[7, 8, 8], [4, 5], [1, 6]])
    assert list(written.judged()) == [(1, True), (2, False), (3, True), (4, True), (6, True)]
    figures = figures_of([written, Written([0, 2], 1, [[]])])
    assert figures == {"acceptance": 4 / 5, "accepted_length": 7 / 4, "tokens": 7, "passes": 4}
    assert figures_of([Written([0, 2], 1, [[]])])["acceptance"] is None


def test_greedy_drafts_are_those_of_the_loop_and_the_text_is_the_teachers(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    settings = {"max_tokens": 30, "draft_tokens": 3, "sample": False, "seed": 0}
    written = write_with_drafts(teacher, student, PROMPT, **settings)
    assert written == brute_force(teacher, student, 30, 3, None)
    assert 0 < figures_of([written])["acceptance"] < 1
    alone = teacher.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)
    assert written.token_ids == alone[0].tolist()


def test_sampled_drafts_are_accepted_as_often_as_total_variation_says(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    """Each judged draft is accepted with probability 1 - TV of its context, whatever came before: 4 standard deviations."""
    texts = [
        write_with_drafts(teacher, student, PROMPT, max_tokens=60, draft_tokens=4, sample=True, seed=seed)
        for seed in range(6)
    ]
    rng = torch.Generator().manual_seed(0)
    loops = [brute_force(teacher, student, 60, 4, rng) for _ in range(6)]
    rates = []
    for written in (texts, loops):
        share = np.concatenate([expected(text, teacher, student) for text in written])
        assert len(share) > 200 and 0.1 < share.mean() < 0.9
        deviation = np.sqrt((share * (1 - share)).sum()) / len(share)
        rates.append(figures_of(written)["acceptance"])
        assert abs(rates[-1] - share.mean()) < 4 * deviation
    assert abs(rates[0] - rates[1]) < 0.2


@pytest.mark.parametrize("sample", [False, True])
def test_drafts_of_the_teacher_itself_are_all_accepted(teacher: PreTrainedModel, sample: bool) -> None:
    twin, before = copy.deepcopy(teacher), teacher.generation_config
    written = write_with_drafts(teacher, twin, PROMPT, max_tokens=25, draft_tokens=4, sample=sample, seed=1)
    figures = figures_of([written])
    assert figures["acceptance"] == 1.0 and figures["accepted_length"] == 5.0 and figures["tokens"] == 25
    assert teacher.generation_config is before


def test_settings_of_generation_in_the_folders_change_nothing(
    teacher: PreTrainedModel, student: PreTrainedModel
) -> None:
    settings = {"max_tokens": 20, "draft_tokens": 3, "sample": True, "seed": 4}
    plain = write_with_drafts(teacher, student, PROMPT, **settings)
    odd, odder = copy.deepcopy(teacher), copy.deepcopy(student)
    odd.generation_config.update(top_k=2, repetition_penalty=3.0)
    odder.generation_config.update(num_assistant_tokens=9, assistant_confidence_threshold=0.9, repetition_penalty=3.0)
    assert write_with_drafts(odd, odder, PROMPT, **settings) == plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher: PreTrainedModel, student: PreTrainedModel) -> Path:
    root = tmp_path_factory.mktemp("drafts")
    make_dataset(root / "heldout", [6, 20, 9, 15])
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(root / name)
        save_tokenizer(root / name)
    return root


def test_the_figures_of_evaluate(folder: Path) -> None:
    config = EvaluateConfig(
        draft_for=str(folder / "teacher"), draft_prompts=1, draft_prompt_tokens=4, sample_tokens=16, draft_tokens=2
    )
    result = evaluate(folder / "student", folder / "heldout", config=config)
    for figures in (*result["domains"].values(), result["overall"]):
        assert figures["acceptance"] == pytest.approx(1 - figures["tv"])
        a = figures["acceptance"]
        assert figures["accepted_length"] == pytest.approx(1 + a + a**2)
    assert result["acceptance_is"].startswith("an upper bound: exact entries")
    drafts = result["drafts"]
    assert (drafts["draft_for"], drafts["draft_tokens"], set(drafts["domains"])) == ("teacher", 2, {"code", "prose"})
    models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("teacher", "student")]
    dataset = kdata.open(folder / "heldout")
    texts = [
        write_with_drafts(
            *models, dataset[row].token_ids[:4].tolist(), max_tokens=16, draft_tokens=2, sample=True, seed=row
        )
        for row in range(2)
    ]
    assert drafts["overall"]["sampling"] == figures_of(texts)
    assert drafts["domains"]["prose"]["sampling"] == figures_of(texts[1:])


def test_empty_texts_begin_no_draft_and_take_no_place(tmp_path: Path) -> None:
    """Domains alternate, and the first text of each is empty."""
    dataset = make_dataset(tmp_path / "set", [0, 0, 9, 9, 9, 9])
    for name, seed in (("teacher", 0), ("student", 1)):
        llama(seed).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    config = EvaluateConfig(draft_for=str(tmp_path / "teacher"), draft_prompts=1, sample_tokens=4, device="cpu")
    drafts = evaluate(tmp_path / "student", dataset.path, config=config)["drafts"]
    assert set(drafts["domains"]) == set(dataset.index(["domain"])["domain"].to_pylist())


def test_the_command_prints_what_was_measured(folder: Path, tmp_path: Path) -> None:
    settings = [f"draft_for={folder / 'teacher'}", "draft_prompts=1", "sample_tokens=8"]
    arguments = [a for setting in settings for a in ("--set", setting)]
    save = tmp_path / "e.json"
    done = CliRunner().invoke(
        app, ["evaluate", str(folder / "student"), str(folder / "heldout"), "--save", str(save), *arguments]
    )
    assert done.exit_code == 0, done.exception
    measured = json.loads(save.read_text())
    greedy = measured["drafts"]["overall"]["greedy"]
    line = f"greedy: {greedy['acceptance']:.1%} accepted, {greedy['accepted_length']:.2f} tokens per step"
    assert line in done.output and f"{measured['overall']['acceptance']:.1%}" in done.output


def test_acceptance_is_not_there_where_total_variation_is_not(folder: Path) -> None:
    draws = make_dataset(folder / "draws", [8, 9], tail="draws")
    result = evaluate(folder / "student", draws.path)
    assert result["overall"]["acceptance"] is None and result["overall"]["accepted_length"] is None
    assert result["acceptance_is"] is None and result["drafts"] is None


def test_a_teacher_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "foreign")
    save_tokenizer(tmp_path / "foreign", VOCAB - 1)
    wide = llama(3)
    wide.resize_token_embeddings(VOCAB + 3)
    wide.save_pretrained(tmp_path / "wide")
    for teacher, tokens, error, message in (
        (folder / "nowhere", 8, MissingError, "nowhere is not a folder"),
        (tmp_path / "foreign", 8, MismatchError, r"tokenizers of .* and draft_for .*foreign .* are not the same"),
        (tmp_path / "wide", 8, MismatchError, f"the teacher's head has {VOCAB + 3} rows, the student's {VOCAB}"),
        (folder / "teacher", 120, ConfigError, "prompt and text take 152 tokens, the teacher has 128 positions"),
    ):
        config = EvaluateConfig(draft_for=str(teacher), sample_tokens=tokens)
        with pytest.raises(error, match=message) as caught:
            evaluate(folder / "student", folder / "heldout", config=config)
        assert len(str(caught.value).splitlines()) == 1
