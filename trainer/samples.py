"""What a student writes after prompts, and how varied it is.

Shapes: B = 1 row, L positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from kdata.trainer.config import EvaluateConfig
from kdata.trainer.encoder_decoder import is_encoder_decoder
from kdata.trainer.student import positions_of

SAMPLE_CONTEXT = 2048  # tokens of prompt and sample of a model that knows no longest sequence


def write_samples(
    model: PreTrainedModel, tokenizer: Any, prompts: list[Mapping[str, str]], config: EvaluateConfig
) -> tuple[list[dict[str, str]], list[list[int]]]:
    """Continue each prompt: the samples, and the ids of each without special tokens."""
    samples, ids = [], []
    for number, prompt in enumerate(prompts):
        written = _continue(model, tokenizer, prompt["prompt"], config, config.seed + number)
        samples.append({**prompt, "text": str(tokenizer.decode(written, skip_special_tokens=True))})
        ids.append([token for token in written if token not in tokenizer.all_special_ids])
    return samples, ids


def diversity_of(texts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Distinct-1 and distinct-2: different n-grams among all n-grams of all texts; None where there is none.

    Source: Li et al., arXiv 1510.03055, there per token. The shares fall with the number of tokens.
    """
    figures: dict[str, Any] = {}
    for size in (1, 2):
        grams = [tuple(text[at : at + size]) for text in texts for at in range(len(text) - size + 1)]
        figures[f"distinct{size}"] = len(set(grams)) / len(grams) if grams else None
    return {**figures, "tokens": sum(map(len, texts))}


@torch.no_grad()
def _continue(model: PreTrainedModel, tokenizer: Any, prompt: str, config: EvaluateConfig, seed: int) -> list[int]:
    """Ids that the student writes after a prompt. Only the last tokens of a prompt are read if it does not fit the model."""
    room = max((positions_of(model) or SAMPLE_CONTEXT) - config.sample_tokens, 1)
    ids_BL = tokenizer(prompt, return_tensors="pt").input_ids[:, -room:].to(model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if config.sample_temperature:
        choice = {"do_sample": True, "temperature": config.sample_temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        written_BL = cast(Any, model).generate(
            ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            max_new_tokens=config.sample_tokens,
            pad_token_id=tokenizer.eos_token_id or 0,
            **choice,
        )
    first = 1 if is_encoder_decoder(model) else ids_BL.shape[1]  # a decoder begins with its start token alone
    ids: list[int] = written_BL[0, first:].tolist()
    return ids
