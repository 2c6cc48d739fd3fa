"""A student as the draft model of speculative decoding: what a teacher accepts of its drafts, expected and measured.

The student drafts some tokens, one pass of the teacher judges them, and the teacher replaces the first that it rejects.
Expected acceptance is 1 - E[total variation] (DistillSpec, arXiv 2310.08461), over the contexts of held-out text. It is
measured with the assisted generation of transformers, over the contexts that the teacher writes.

transformers does not report what was accepted. A hook reads the drafts from the teacher's inputs, one forward pass a step;
the text that came out says which of them stayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

import kdata
from kdata.errors import ConfigError, MismatchError
from kdata.observe.progress import Task
from kdata.store.pretrained import without_warnings
from kdata.trainer.config import EvaluateConfig
from kdata.trainer.documents import carries_state
from kdata.trainer.encoder_decoder import is_encoder_decoder
from kdata.trainer.heldout import first_of_each
from kdata.trainer.student import positions_of


def expected_length(acceptance: float, draft_tokens: int) -> float:
    """Tokens of one step with `draft_tokens` drafts: 1 + a + ... + a^drafts = (1 - a^(drafts + 1)) / (1 - a).

    The teacher's own token is the 1. It takes acceptance as the same in every context (arXiv 2211.17192, equation 1).
    """
    return math.fsum(acceptance**n for n in range(draft_tokens + 1))


@dataclass(frozen=True)
class Written:
    """What a teacher wrote with drafts: ids of prompt and text, and the drafts of each step (one pass of the teacher)."""

    token_ids: list[int]
    num_prompt: int
    drafts: list[list[int]]

    def judged(self) -> Iterator[tuple[int, bool]]:
        """(position of the token, whether it was accepted) of each draft that was judged: up to a step's first rejection."""
        position = self.num_prompt
        for drafts in self.drafts:
            for token in drafts:
                accepted = token == self.token_ids[position]
                yield position, accepted
                position += 1
                if not accepted or position == len(self.token_ids):
                    break
            else:
                position += 1  # all accepted: the last one is the teacher's
        assert position >= len(self.token_ids), "every token of the text is of some step"


def figures_of(texts: Sequence[Written]) -> dict[str, Any]:
    """Acceptance (accepted drafts per judged draft), accepted_length (tokens per pass of the teacher), tokens and passes.

    Acceptance is null where nothing was drafted.
    """
    accepted = [is_accepted for text in texts for _, is_accepted in text.judged()]
    tokens, passes = sum(len(t.token_ids) - t.num_prompt for t in texts), sum(len(t.drafts) for t in texts)
    return {
        "acceptance": sum(accepted) / len(accepted) if accepted else None,
        "accepted_length": tokens / passes,
        "tokens": tokens,
        "passes": passes,
    }


def refuse_other_sizes(teacher: PreTrainedModel, student: PreTrainedModel, tokens: int) -> None:
    """Raise MismatchError unless both heads have as many rows.

    Raises ConfigError if `tokens` exceed the positions of one, or one carries a state or has an encoder.
    """
    for owner, model in (("teacher", teacher), ("student", student)):
        if carries_state(model) or is_encoder_decoder(model):
            why = "an encoder-decoder, which reads other tokens than a decoder"
            if carries_state(model):
                why = "whose state transformers cannot set back before a draft that was rejected"
            raise ConfigError(
                f"draft_for: the {owner} is a {type(model).__name__}, {why}; leave draft_for out (acceptance is expected "
                "from the dataset all the same)"
            )
    rows, drafted = (model.get_output_embeddings().weight.shape[0] for model in (teacher, student))
    if rows != drafted:
        raise MismatchError(
            f"draft_for: the teacher's head has {rows:,} rows, the student's {drafted:,}, and drafts are judged id by id; "
            f"resize the student's with model.resize_token_embeddings({rows}), or leave draft_for out"
        )
    for owner, model in (("teacher", teacher), ("student", student)):
        if (known := positions_of(model)) is not None and tokens > known:
            raise ConfigError(
                f"draft_for: prompt and text take {tokens} tokens, the {owner} has {known} positions; lower sample_tokens or "
                "draft_prompt_tokens"
            )


@torch.no_grad()
def write_with_drafts(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    draft_tokens: int,
    sample: bool,
    seed: int,
) -> Written:
    """Let a teacher continue a prompt with the student as its assistant, by the algorithm of arXiv 2211.17192.

    Args:
        prompt_ids: ids of the prompt, at least one.
        max_tokens: tokens to write; the teacher's token of the end ends the text before.
        draft_tokens: drafts of a step; the last step has fewer.
        sample: draw from the teacher's distribution at temperature 1; False: its first choice (greedy).
    """
    ids_BT, drafts = torch.tensor([list(prompt_ids)], device=teacher.device), cast("list[list[int]]", [])

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        # The first pass reads prompt and drafts, later ones the last token and drafts.
        drafts.append(inputs["input_ids"][0, len(prompt_ids) if not drafts else 1 :].tolist())

    choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    end = teacher.generation_config.eos_token_id
    # The assistant gets no mask, and would not read tokens of the prompt that are the padding, unless that is the end.
    padding = end[0] if isinstance(end, list) else end
    hook = teacher.register_forward_pre_hook(note, with_kwargs=True)
    try:
        # A threshold on the student's certainty would choose which drafts are judged.
        with (
            _generating_as(student, num_assistant_tokens=draft_tokens, assistant_confidence_threshold=0.0),
            _generating_as(teacher, eos_token_id=end, pad_token_id=padding),
            torch.random.fork_rng(devices=[]),
            without_warnings(),  # of what transformers itself passes to the assistant
        ):
            torch.manual_seed(seed)
            written_BT = cast(Any, teacher).generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                assistant_model=student,
                max_new_tokens=max_tokens,
                **choice,
            )
    finally:
        hook.remove()
    return Written(written_BT[0].tolist(), len(prompt_ids), drafts)


@contextmanager
def _generating_as(model: PreTrainedModel, **settings: Any) -> Iterator[None]:
    """Replace what the model's folder says of generation (penalties, top-k, drafts of varying number) for a while."""
    former = model.generation_config
    model.generation_config = GenerationConfig(num_assistant_tokens_schedule="constant", **settings)
    try:
        yield
    finally:
        model.generation_config = former


def measure_drafts(
    teacher: PreTrainedModel, student: PreTrainedModel, dataset: kdata.Dataset, config: EvaluateConfig
) -> dict[str, Any]:
    """What the teacher accepts of the student's drafts, on the beginnings of texts of each domain."""
    index = dataset.index(["domain", "num_tokens"])
    domains, domain_R = np.unique(np.array(index["domain"].to_pylist(), dtype=str), return_inverse=True)
    written = np.flatnonzero(index["num_tokens"].to_numpy() > 0)
    rows = written[first_of_each(domain_R[written], config.draft_prompts)]
    texts: dict[tuple[int | None, str], list[Written]] = {}
    with Task("drafts", 2 * len(rows), unit="texts") as task:
        for number, row in enumerate(rows.tolist()):
            prompt_ids = dataset[row].token_ids[: config.draft_prompt_tokens].tolist()
            for way in ("greedy", "sampling"):
                text = write_with_drafts(
                    teacher,
                    student,
                    prompt_ids,
                    max_tokens=config.sample_tokens,
                    draft_tokens=config.draft_tokens,
                    sample=way == "sampling",
                    seed=config.seed + number,
                )
                for domain in (int(domain_R[row]), None):
                    texts.setdefault((domain, way), []).append(text)
                task.advance(1)

    def drafted(domain: int | None) -> dict[str, Any]:
        return {way: figures_of(texts[domain, way]) for way in ("greedy", "sampling")}

    return {
        "draft_for": Path(str(config.draft_for)).name,
        "draft_tokens": config.draft_tokens,
        "domains": {str(domains[number]): drafted(number) for number in np.unique(domain_R[rows]).tolist()},
        "overall": drafted(None),
    }
