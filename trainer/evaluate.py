"""How good a student is, measured offline against what the teacher predicted on held-out text.

The held-out set is a logit dataset, captured like any other; no teacher runs here. Every figure is an average over counted
tokens. NLL and perplexity are exact; the teacher's NLL is, to the rounding of what is stored (`schemas/README.md`), which
averages out. These are not:

- `kl`, `reverse_kl` and `tv` on a dataset of exact entries and tail (ghost) compare the kept entries and one bucket for the
  rest. By the log-sum inequality they are lower bounds of the full divergences.
- `kl` on a dataset of draws is unbiased if the teacher's entropy was stored (cross-entropy from the draws minus that
  entropy), otherwise too high; `kl_is` says which.
- `reverse_kl` and `tv` on a dataset of exact entries and draws (hybrid) compare the exact entries and one bucket for the
  rest: lower bounds again, as `bounds_are` says. On draws alone they are null, and so is `teacher_ece`.
- `acceptance` of speculative decoding, 1 - tv, and `accepted_length`, which rises with it, are upper bounds where `tv` is a
  lower one, as `acceptance_is` says, and null where `tv` is. `drafts` has what a teacher really accepts. The same holds for
  `loyalty`: merging outcomes never increases the Jensen-Shannon divergence.

Shapes: M counted positions, K kept entries, N most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedModel

import kdata
from kdata.calls import validated
from kdata.config import first_problem
from kdata.errors import ConfigError, CorruptError, DataError, MissingError, first_line
from kdata.format.json_text import read_json
from kdata.format.keep_rules import refuse_sorted
from kdata.loader.batches import BatchesConfig, keeps_something
from kdata.observe.progress import Task
from kdata.store.checkpoint_kind import refuse_other_kind, use_exact_attention
from kdata.store.gguf import is_gguf, model_folder
from kdata.store.pretrained import model_files, without_bars
from kdata.store.token_bytes import TokenBytes
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.trainer.adapters import is_adapter, open_adapter
from kdata.trainer.config import EvaluateConfig, TrainResult
from kdata.trainer.distributed import device_name
from kdata.trainer.drafts import expected_length, measure_drafts, refuse_other_sizes
from kdata.trainer.encoder_decoder import auto_class, check_prompts, is_encoder_decoder, with_prompts
from kdata.trainer.forward import predicting_states
from kdata.trainer.fused import Measured, measure
from kdata.trainer.heldout import first_of_each
from kdata.trainer.loader import Batch, Loader
from kdata.trainer.quantization import check_folder
from kdata.trainer.samples import diversity_of, write_samples
from kdata.trainer.student import (
    check_positions,
    fit_vocabulary,
    fitting_targets,
    head_of,
    probe,
    refuse_other_tokenizer,
)
from kdata.trainer.tasks import Tasks

__all__ = ["EvaluateConfig", "evaluate"]

ECE_BINS = 15
OF_ALL_TARGETS = ("nll", "teacher_nll")  # figures that need no distribution of the teacher
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@validated
def evaluate(
    model_dir: Path,
    heldout: Path | str,
    *,
    prompts: Iterable[Mapping[str, str]] = (),
    label: str | None = None,
    config: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Measure one student on a held-out logit dataset, and let it continue prompts.

    Args:
        model_dir: folder of a model or of a LoRA adapter in Hugging Face format, or a GGUF file; facts about its training
            come from a `train.json` beside it.
        heldout: a folder, a URL or hf://OWNER/NAME, as for `kdata.open`.
        prompts: {"domain", "prompt"} each; the student continues them.
        label: name in the result; None: the label in train.json, or the folder's name.
    Returns:
        {"label", "params", "steps", "tokens", "target_tokens", "train_seconds" (null without train.json),
        "domains": {name: figures}, "overall": figures,
        "calibration": {"student", "teacher"}: bins of the most likely token's probability, {"tokens", "confidence" (mean),
        "accuracy"} each; the teacher's is null if its first choice is not known,
        "kl_is", "bounds_are" (null if reverse_kl and tv are null), "acceptance_is" (the same of acceptance, loyalty),
        "drafts": null without `draft_for`, else {"draft_for", "draft_tokens", "domains": {name: drafted}, "overall"},
        drafted: {"greedy", "sampling"}, each with acceptance (accepted drafts per judged draft), accepted_length (tokens per
        pass of the teacher), tokens, passes,
        "samples": [{"domain", "prompt", "text"}], "diversity": of their tokens without special ones, null without samples:
        {"distinct1", "distinct2" (share of different ones among all single tokens and pairs of neighbors), "tokens"},
        "tasks": {name: {metric: value}} of the lm-evaluation-harness,
        "metrics": metrics.jsonl relative to the run's parent folder, null without one}.
        figures: nll, teacher_nll, kl, reverse_kl (nats per token), ppl, tv, acceptance (expected share of drafts that the
        teacher accepts), accepted_length (expected tokens per pass of the teacher), loyalty (probability loyalty, the mean of
        1 - sqrt(JSD) in base 2; Xu et al., EMNLP 2021), top1 (label loyalty), top5 (share of positions where the
        teacher's first choice is the student's first, or among its first five), ece, teacher_ece (calibration error of the
        most likely token), tokens (counted positions), bits_per_byte (of the text that they stand for; None where the
        dataset does not hold their bytes). Of a dataset that keeps distributions at some positions only, nll,
        ppl, bits_per_byte, ece and teacher_nll are of all targets; all else is of those with a distribution, whose number is
        kept_tokens.
    Raises:
        MissingError: the dataset or the model does not exist, or prompts or tasks are given and there is no tokenizer.
        MismatchError: the model's vocabulary or tokenizer is not the dataset's, or that of `draft_for` is not.
        ConfigError: the dataset lacks what would be measured (it was imported), the loss would measure this model wrongly, or
            the harness has no such task, or prompts and texts of drafts are longer than a model's positions.
        DataError: a document is longer than the student's positions, no token counts, or a domain has targets and not one
            with a distribution.
        CorruptError: train.json beside the model is not a training result.
        DependencyError: tasks are given and the harness is not installed, or an adapter and PEFT is not, or weights in
            torchao's form and torchao is not.
    """
    config = config or EvaluateConfig()
    prompts = list(prompts)
    dataset = kdata.open(heldout)
    if dataset.info.tail == "absent":
        raise ConfigError(
            f"{heldout} was imported from a format without the tail and without the actual tokens' log-probabilities, so a "
            "KL on it would be wrong; evaluate on a dataset of `kdata capture`"
        )
    refuse_sorted(dataset.info.codec, str(heldout), "an evaluation")
    label, model_dir = label or (model_dir.name if is_gguf(model_dir) else None), Path(model_folder(model_dir))
    _check_folder(model_dir)
    _check_tokenizer(model_dir, dataset)
    model = _load(model_dir)
    use_exact_attention(model)
    probe(model)
    teacher = None if config.draft_for is None else _open_teacher(config, model, dataset)
    tasks = None if not config.tasks else Tasks(config.tasks, config.tasks_folder)
    tokenizer = _tokenizer(model_dir) if prompts or tasks is not None else None
    model.to(device_name(config.device)).eval()  # type: ignore[arg-type]  # transformers wraps Module.to
    fit_vocabulary(model, [dataset])
    run = run_beside(model_dir)
    domains, sums = _measure_dataset(model, dataset, config)
    samples, sampled_ids = write_samples(model, tokenizer, prompts, config)
    return {
        "label": label or (run.label if run else model_dir.name),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "steps": run.steps if run else None,
        "tokens": run.tokens if run else None,
        "target_tokens": run.target_tokens if run else None,
        "train_seconds": run.train_seconds if run else None,
        "domains": {
            name: sums.figures(number, config.draft_tokens)
            for number, name in enumerate(domains)
            if sums.tokens[number]
        },
        "overall": sums.figures(None, config.draft_tokens),
        "calibration": {"student": sums.student.bins(), "teacher": sums.teacher.bins() if sums.knows_top else None},
        "kl_is": sums.kl_is,
        "bounds_are": sums.bounds_are,
        "acceptance_is": sums.acceptance_is,
        "drafts": None if teacher is None else measure_drafts(teacher, model, dataset, config),
        "tasks": {} if tasks is None else tasks.score(model, tokenizer, limit=config.task_documents),
        "samples": samples,
        "diversity": diversity_of(sampled_ids) if samples else None,
        "metrics": f"{model_dir.resolve().parent.name}/{run.metrics}" if run else None,
    }


@dataclass
class _Calibration:
    """Expected calibration error in `ECE_BINS` bins of equal width, per domain."""

    num_domains: int
    counts: np.ndarray = field(init=False)
    confidence: np.ndarray = field(init=False)
    correct: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.confidence, self.correct = (np.zeros((self.num_domains, ECE_BINS)) for _ in range(3))

    def add(self, domain_M: np.ndarray, confidence_M: np.ndarray, correct_M: np.ndarray) -> None:
        bin_M = np.minimum((confidence_M * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        for total, value_M in (
            (self.counts, None),
            (self.confidence, confidence_M),
            (self.correct, correct_M),
        ):
            flat = np.bincount(domain_M * ECE_BINS + bin_M, value_M, minlength=total.size)
            total += flat.reshape(total.shape)

    def bins(self) -> list[dict[str, float | int]]:
        """Bins that are not empty, over all domains: tokens, mean confidence, share of right predictions."""
        sums = zip(self.counts.sum(0), self.confidence.sum(0), self.correct.sum(0), strict=True)
        return [
            {"tokens": int(n), "confidence": float(c / n), "accuracy": float(right / n)} for n, c, right in sums if n
        ]

    def error(self, domains: slice) -> float:
        gap = np.abs(self.confidence[domains].sum(0) - self.correct[domains].sum(0))
        return float(gap.sum() / self.counts[domains].sum())


class _Sums:
    """Running sums over counted positions, one row per domain."""

    def __init__(self, num_domains: int, tail: str, *, kind: str = "topk") -> None:
        self.tail, self.combined = tail, kind == "combined"
        self.knows_exact = tail == "ghost" or kind in ("hybrid", "threshold", "combined")
        self.exact = np.zeros(num_domains, np.int64)  # positions that have exact entries
        self.tokens = np.zeros(num_domains, np.int64)
        self.kept = np.zeros(num_domains, np.int64)  # of these, positions that have a distribution
        self.values: dict[str, np.ndarray] = {}
        self.student = _Calibration(num_domains)
        self.teacher = _Calibration(num_domains)
        self.entropy_known = True
        self.bytes: np.ndarray | None = np.zeros(
            num_domains, np.int64
        )  # of text; None where it is not known of a token
        self.knows_top = tail == "ghost" or kind in (
            "hybrid",
            "threshold",
        )  # the teacher's first choice is an exact entry

    @property
    def names(self) -> tuple[str, ...]:
        """Objectives that the stored entries can measure."""
        return ("cross_entropy", "forward_kl", *(("reverse_kl", "total_variation", "jsd") if self.knows_exact else ()))

    @property
    def kl_is(self) -> str:
        if self.tail == "ghost" and self.combined:
            return (
                "approximate: one bucket for the rest, and in it what teachers predict for ids that they did not keep"
            )
        if self.tail == "ghost":
            return "a lower bound: kept entries and one bucket for the rest"
        if self.entropy_known:
            return "an unbiased estimate: cross-entropy from the draws minus the stored entropy"
        return "an estimate from draws, biased upwards"

    @property
    def bounds_are(self) -> str | None:
        """What kind of bound reverse_kl and tv are; None if they are not measured."""
        if self.tail == "ghost":
            return self.kl_is
        return "lower bounds: exact entries and one bucket for the rest" if self.exact.any() else None

    @property
    def acceptance_is(self) -> str | None:
        """What kind of bound acceptance, accepted_length and loyalty are; None if they are not measured."""
        if self.bounds_are is None or (self.tail == "ghost" and self.combined):
            return self.bounds_are
        return "an upper bound: exact entries and one bucket for the rest"

    def add_bytes(self, known: TokenBytes, batch: Batch, domain_M: np.ndarray) -> None:
        """The bytes of text that the counted tokens of a batch stand for."""
        assert batch.targets.position_C is not None  # the loader sets it
        bytes_M = known.at(batch.rows[batch.document_M], batch.targets.position_C.numpy())
        if self.bytes is None or bytes_M is None:
            self.bytes = None
            return
        self.bytes += np.bincount(domain_M, bytes_M, minlength=len(self.bytes)).astype(np.int64)

    def add(self, batch: Batch, measured: Measured, domain_M: np.ndarray) -> None:
        chosen_C = batch.targets.chosen_C
        kept_M = np.ones(len(domain_M), bool) if chosen_C is None else chosen_C.numpy()
        columns = measured.values_MO.double().cpu().numpy().T
        objectives = dict(zip(self.names, columns, strict=True))
        targets, top_MN = batch.targets, measured.top_ids_MN.cpu().numpy()
        first_M, first_p_M = _first_choice(batch, self.combined)
        values = {
            "nll": objectives["cross_entropy"],
            "kl": objectives["forward_kl"],
            "teacher_nll": -batch.logprob_M.astype(np.float64),
            "top1": (top_MN[:, 0] == first_M).astype(np.float64),
            "top5": (top_MN == first_M[:, None]).any(-1).astype(np.float64),
        }
        confidence_M = measured.confidence_M.double().cpu().numpy()
        self.student.add(domain_M, confidence_M, top_MN[:, 0] == targets.token_ids_C.numpy())
        if "reverse_kl" in objectives:
            jsd_M = objectives["jsd"].clip(0.0, math.log(2.0)) / math.log(2.0)
            values |= {
                "reverse_kl": objectives["reverse_kl"],
                "tv": objectives["total_variation"],
                "loyalty": 1.0 - np.sqrt(jsd_M),
            }
        if self.tail == "ghost":
            top_p_M = np.exp(targets.logprobs_CK.double().numpy()).max(-1, initial=0.0)
            self.teacher.add(domain_M[kept_M], top_p_M[kept_M], (first_M == targets.token_ids_C.numpy())[kept_M])
        else:
            if self.knows_top:
                is_right_M = first_M == targets.token_ids_C.numpy()
                self.teacher.add(domain_M[kept_M], first_p_M[kept_M], is_right_M[kept_M])
            values["kl_from_entropy"] = values["kl"] + _entropy_of_weights(batch) - batch.entropy_M
            self.entropy_known &= bool(np.isfinite(batch.entropy_M[kept_M]).all())
        self.tokens += np.bincount(domain_M, minlength=len(self.tokens))
        self.kept += np.bincount(domain_M[kept_M], minlength=len(self.kept))
        self.exact += np.bincount(domain_M[_num_exact(batch) > 0], minlength=len(self.exact))
        for name, value_M in values.items():
            total = self.values.setdefault(name, np.zeros(len(self.tokens)))
            own_M = np.ones_like(kept_M) if name in OF_ALL_TARGETS else kept_M
            total += np.bincount(domain_M[own_M], value_M[own_M], minlength=len(total))

    def figures(self, domain: int | None, draft_tokens: int) -> dict[str, Any]:
        """Averages of one domain, or of all."""
        part = slice(None) if domain is None else slice(domain, domain + 1)
        tokens, kept = int(self.tokens[part].sum()), int(self.kept[part].sum())
        assert tokens and kept, "domains without a counted token are left out, and data without one is refused"
        mean: dict[str, Any] = {
            name: float(total[part].sum() / (tokens if name in OF_ALL_TARGETS else kept))
            for name, total in self.values.items()
        }
        if self.tail == "draws" and not self.exact[part].any():
            mean |= {
                "reverse_kl": None,
                "tv": None,
                "loyalty": None,
            }  # without an exact entry the bound is 0, which says nothing
        from_entropy = mean.pop("kl_from_entropy", None)
        if from_entropy is not None and self.entropy_known:
            mean["kl"] = from_entropy
        num_bytes = 0 if self.bytes is None else int(self.bytes[part].sum())
        tv = mean.get("tv")
        acceptance = None if tv is None else max(0.0, 1.0 - tv)
        return {
            "nll": mean["nll"],
            "ppl": math.exp(min(mean["nll"], 700.0)),  # e^710 overflows a float
            "bits_per_byte": mean["nll"] * tokens / num_bytes / math.log(2.0) if num_bytes else None,
            "kl": mean["kl"],
            "reverse_kl": mean.get("reverse_kl"),
            "tv": tv,
            "acceptance": acceptance,
            "accepted_length": None if acceptance is None else expected_length(acceptance, draft_tokens),
            "loyalty": mean.get("loyalty"),
            "top1": mean["top1"],
            "top5": mean["top5"],
            "ece": self.student.error(part),
            "teacher_nll": mean["teacher_nll"],
            "teacher_ece": self.teacher.error(part) if self.knows_top else None,
            "tokens": tokens,
            **({} if kept == tokens else {"kept_tokens": kept}),
        }


@torch.no_grad()
def _measure_dataset(model: PreTrainedModel, dataset: kdata.Dataset, config: EvaluateConfig) -> tuple[list[str], _Sums]:
    """Domain names, and sums over all counted positions."""
    index = dataset.index(["domain", "num_tokens"])
    domains, domain_R = np.unique(np.array(index["domain"].to_pylist(), dtype=str), return_inverse=True)
    rows = first_of_each(domain_R, config.max_documents)
    context = max(int(index["num_tokens"].to_numpy()[rows].max(initial=2)), 2)
    check_positions(model, context)
    batches = BatchesConfig(context_tokens=context, batch_rows=max(1, config.batch_tokens // context))
    behind_R = check_prompts(model, dataset, rows)
    loader = Loader(dataset, rows, batches, elsewhere=True)
    kept_R = keeps_something(dataset) & behind_R
    bare = [domain for number, domain in enumerate(domains) if not kept_R[rows][domain_R[rows] == number].any()]
    if bare and dataset.info.codec.keeps_some_positions:
        where = " behind the prompts" if is_encoder_decoder(model) else ""
        raise DataError(
            f"{dataset.place}: no distribution is kept at any target{where} of domain {str(bare[0])!r}, so the "
            "distance to the teacher cannot be measured there; evaluate on a dataset that keeps every position (captured "
            "without `positions`)"
        )
    tail = dataset.info.tail
    assert tail != "absent"  # refused by the caller
    sums, known = _Sums(len(domains), tail, kind=dataset.info.codec.kind), dataset.bytes_of(rows)
    with Task("evaluate", int(loader.lengths.sum()), unit="tokens") as task:
        for batch in loader.epoch():
            device = head_of(model).device
            batch = with_prompts(model, batch)
            hidden_MD = predicting_states(model, batch)
            batch = replace(batch, targets=fitting_targets(model, batch.targets))
            measured = measure(hidden_MD, head_of(model), batch.targets.to(device), sums.names, tail)
            domain_M = domain_R[batch.rows[batch.document_M]]
            sums.add(batch, measured, domain_M)
            sums.add_bytes(known, batch, domain_M)
            task.advance(batch.num_tokens)
    if not sums.tokens.sum():
        raise DataError(
            f"{dataset.place}: none of its tokens is a target (all target masks are empty), so there is nothing to measure; "
            "evaluate on another dataset"
        )
    return domains.tolist(), sums


def _first_choice(batch: Batch, combined: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's most likely kept id at each position, int64 [M], and its weight, float64 [M].

    It is the first exact entry, else the heaviest draw.

    A draw can outweigh exact entries (its weight is tail probability / draws), so the largest weight alone is not enough.
    With several teachers (`combined`), an entry that only one of them knows exactly counts as a draw, so there the largest
    weight is used. Id -1 and weight 0 if nothing is kept.
    """
    ids_MK, logprobs_MK = batch.targets.ids_CK.numpy(), batch.targets.logprobs_CK.numpy()
    if not ids_MK.shape[1]:
        return np.full(len(ids_MK), -1, np.int64), np.zeros(len(ids_MK))
    exact_MK = np.arange(ids_MK.shape[1]) < _num_exact(batch)[:, None]
    exact_MK &= (ids_MK >= 0) & (not combined)  # an entry of an id that no token has is padding
    column_M = np.where(exact_MK.any(-1), exact_MK.argmax(-1), logprobs_MK.argmax(-1))
    ids_M, logprobs_M = (np.take_along_axis(grid, column_M[:, None], -1)[:, 0] for grid in (ids_MK, logprobs_MK))
    return ids_M, np.exp(logprobs_M.astype(np.float64))


def _num_exact(batch: Batch) -> np.ndarray:
    """Exact entries of each position, int64 [M]."""
    assert batch.targets.num_exact_C is not None  # the loader sets it
    return batch.targets.num_exact_C.numpy()


def _entropy_of_weights(batch: Batch) -> np.ndarray:
    """-sum w log w over the kept weights of each position, float64 [M]."""
    log_w_MK = batch.targets.logprobs_CK.double().numpy()
    entropy_M: np.ndarray = -(np.exp(log_w_MK) * np.where(np.isneginf(log_w_MK), 0.0, log_w_MK)).sum(-1)
    return entropy_M


def _open_teacher(config: EvaluateConfig, student: PreTrainedModel, dataset: kdata.Dataset) -> PreTrainedModel:
    """The model that the student drafts for. Raises as `evaluate`."""
    assert config.draft_for is not None
    if not is_gguf(config.draft_for) and not Path(config.draft_for).is_dir():
        raise MissingError(f"draft_for: {config.draft_for} is not a folder; name the folder of a model, or a GGUF file")
    folder = Path(model_folder(config.draft_for))
    if not is_adapter(folder):
        refuse_other_kind(folder)
    if _has_tokenizer(folder):
        own = Vocabulary.of_model(f"draft_for {config.draft_for}", _tokenizer(folder))
        refuse_other_ids(Vocabulary.of_dataset(dataset), own, "name the dataset's teacher, or one with its tokenizer")
    teacher = _load(folder)
    use_exact_attention(teacher)
    refuse_other_sizes(teacher, student, config.draft_prompt_tokens + config.sample_tokens)
    teacher.to(device_name(config.device)).eval()  # type: ignore[arg-type]  # transformers wraps Module.to
    return teacher


def _tokenizer(model_dir: Path) -> Any:
    try:
        with model_files(model_dir, "the tokenizer"):
            return AutoTokenizer.from_pretrained(str(model_dir), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{model_dir} has no tokenizer that loads, and prompts and tasks need one; copy the teacher's tokenizer there"
        ) from error


def _has_tokenizer(model_dir: Path) -> bool:
    return any((model_dir / name).exists() for name in TOKENIZER_FILES)


def _check_tokenizer(model_dir: Path, dataset: kdata.Dataset) -> None:
    """Raise MismatchError if the tokenizer beside the model is not the dataset's. A model without one is not checked."""
    if not _has_tokenizer(model_dir):
        return
    refuse_other_tokenizer(f"the model {model_dir}", _tokenizer(model_dir), dataset)


def _check_folder(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise MissingError(
            f"{model_dir} is not a folder; name the folder of a trained student, which is OUT/model after kdata train"
        )
    if not is_adapter(model_dir):
        refuse_other_kind(model_dir, encoder_decoder=True)


def _load(model_dir: Path) -> PreTrainedModel:
    if is_adapter(model_dir):
        return open_adapter(model_dir)
    check_folder(model_dir)
    try:
        with model_files(model_dir, "a file"), without_bars():
            of = auto_class(str(model_dir))
            model: PreTrainedModel = of.from_pretrained(str(model_dir), dtype=torch.float32, trust_remote_code=False)
            return model
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{model_dir} does not hold a model that loads: {first_line(error)}; name the folder of a trained "
            "student, which is OUT/model after kdata train"
        ) from error


def run_beside(model_dir: Path) -> TrainResult | None:
    """What train.json beside a model says; None without one. Raises CorruptError where it is no training result."""
    path = model_dir.resolve().parent / "train.json"
    if not path.exists():
        return None
    try:
        return TrainResult.model_validate(read_json(path, finite=False))
    except (OSError, ValueError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else error
        raise CorruptError(
            f"{path} is not a result of `kdata train`: {reason}; move the file or the model elsewhere"
        ) from error
