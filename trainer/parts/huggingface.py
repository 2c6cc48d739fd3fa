"""Hugging Face's Trainer with the sparse loss: the data is a `PackedRows` or `Documents`, all else is Trainer's.

    data = PackedRows("DATASET", context_tokens=2048, epochs=1)
    trainer = DistillTrainer(model=model, args=args, train_dataset=data)
    trainer.train()

Differences to Trainer: items come in the order of the dataset, which the seed has shuffled; the loss is divided by the
counted tokens of the whole step (by the sum of their weights, where the plan has weights), over micro-batches and ranks; each
objective is logged by its name, and `cross_entropy_elsewhere` where the objective has it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer

from kdata.calls import validated
from kdata.errors import ConfigError, settings_difference
from kdata.store.vocabulary import Vocabulary, refuse_other_ids
from kdata.trainer.parts.collator import Collator, Layout
from kdata.trainer.parts.data import Documents, PackedRows, Source
from kdata.trainer.parts.student import DistillOutput, Over, attach_loss, causal_lm_of, loss_of
from kdata.trainer.student import check_positions


class DistillMixin:
    """The sparse loss for Trainer and its subclasses: `class MyTrainer(DistillMixin, Trainer)`.

    Keyword arguments beside Trainer's:
        over: hidden (fused, never [tokens, V] logits) or logits; see `attach_loss`.
        layout: of the batches; auto: flat with flash attention, padded for `Documents`, else rows.
    Raises (from the constructor, before the first step):
        ConfigError: the dataset is not from `kdata.trainer.parts`, `eval_dataset` is measured by another loss, settings of
            Trainer would change the loss or do nothing, or see `attach_loss`.
        MismatchError, DataError: see `attach_loss`.
    """

    @validated
    def __init__(
        self, *args: Any, over: Over = "hidden", layout: Layout | Literal["auto"] = "auto", **kwargs: Any
    ) -> None:
        data: Any = kwargs.get("train_dataset")
        for name in ("train_dataset", "eval_dataset"):
            _refuse_other_data(name, kwargs.get(name))
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func would replace the loss; set the objective of the dataset instead")
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ConfigError(
                    f"{name} needs logits, which the sparse loss never has; leave it out: eval_dataset gives the loss and "
                    "each objective, and `kdata evaluate` measures the saved model"
                )
        if kwargs.get("eval_dataset") is not None:
            _refuse_other_measure(data, kwargs["eval_dataset"])
        collator = kwargs.get("data_collator")
        if not isinstance(collator, Collator | None):
            raise ConfigError(
                f"data_collator is {type(collator).__name__}, which drops the teacher's targets; leave it out, or give "
                "a kdata.trainer.parts.Collator"
            )
        super().__init__(*args, **{**kwargs, **self._stand_ins(kwargs)})
        trainer: Any = self
        _refuse_settings(trainer)
        trainer.train_dataset, trainer.eval_dataset = data, kwargs.get("eval_dataset")
        layout = collator.layout if collator is not None else _layout(layout, trainer.model, data)
        trainer.data_collator = collator or Collator(layout)
        if kwargs.get("eval_dataset") is not None:
            check_positions(causal_lm_of(trainer.model), kwargs["eval_dataset"].longest_tokens)
        attach_loss(trainer.model, data, over=over, layout=layout, tokenizer=_tokenizer_of(trainer.processing_class))
        trainer.model_accepts_loss_kwargs = True  # have Trainer count the labels of the whole step
        trainer._loss_shifts_labels = True
        trainer.loss_is_scaled_for_ga = True
        self._sums: dict[bool, list[Tensor]] = {True: [], False: []}

    def _stand_ins(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments that the base class's constructor gets instead of the real ones."""
        return {}

    def get_train_dataloader(self) -> Any:
        """As Trainer's, over items that every rank has equally many of; the last ones may be empty."""
        trainer: Any = self
        data = trainer.train_dataset
        trainer.train_dataset = data.filled_to(trainer.args.train_batch_size * trainer.args.world_size)
        return super().get_train_dataloader()  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[attr-defined]

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "position_ids", "segment_ids", "targets"]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's part of the step's loss, times the number of ranks, because they average gradients."""
        trainer: Any = self
        if "targets" not in inputs:
            raise ConfigError(
                f"the batch holds {sorted(inputs)} and no targets: a collator dropped them; leave data_collator out, or give "
                "a kdata.trainer.parts.Collator"
            )
        if model.training:
            loss_of(trainer.accelerator.unwrap_model(model, keep_torch_compile=False)).set_step(
                trainer.state.global_step, trainer.state.max_steps
            )
        output: DistillOutput = model(**inputs, counted_tokens=num_items_in_batch)
        assert output.loss is not None and output.sums_O is not None and output.elsewhere is not None
        targets = inputs["targets"].targets
        counts = [targets.chosen_weight, targets.num_elsewhere]
        sums = [
            torch.tensor(counts, dtype=torch.float64, device=output.loss.device),
            output.elsewhere[None].double(),
            output.sums_O.double(),
        ]
        self._sums[model.training].append(torch.cat(sums))
        loss = output.loss * trainer.args.world_size
        return (loss, output) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What the loss of a step is divided by: its counted tokens as Trainer counts them, or the sum of their weights."""
        trainer: Any = self
        targets = [batch["targets"].targets for batch in batch_samples if "targets" in batch]
        if not any(part.weights_C is not None for part in targets):
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        total = torch.tensor(sum(part.total_weight for part in targets), dtype=torch.float64, device=device)
        # As Trainer does: ranks that share a batch count its tokens once.
        return trainer.accelerator.reduce(total, "sum") / (
            trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: the sparse loss has no logits to give."""
        trainer: Any = self
        inputs = trainer._prepare_inputs(inputs)
        count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, inputs, num_items_in_batch=count)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with each objective since the last line, in nats per counted token, over all ranks.

        The cross-entropy of the targets that a plan does not choose is `cross_entropy_elsewhere`, where the objective has it.
        """
        trainer: Any = self
        training = "loss" in logs
        if (training or "eval_loss" in logs) and self._sums[training]:
            sums = trainer.accelerator.reduce(torch.stack(self._sums[training]).sum(0), "sum").tolist()
            chosen, others, elsewhere, *values = sums
            objective = trainer.train_dataset.objective
            prefix = "" if training else "eval_"
            logs |= {prefix + n: value / (chosen or 1) for n, value in zip(objective.weights, values, strict=True)}
            if objective.cross_entropy_elsewhere is not None:
                logs[f"{prefix}cross_entropy_elsewhere"] = elsewhere / (others or 1)
            self._sums[training] = []
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class DistillTrainer(DistillMixin, Trainer):  # type: ignore[misc]  # a mixin overrides methods of its sibling
    """`transformers.Trainer` with the sparse loss; see `DistillMixin`."""


def _refuse_other_data(name: str, data: Any) -> None:
    if name == "eval_dataset" and data is None:
        return
    if not isinstance(data, PackedRows | Documents):
        raise ConfigError(
            f"{name} is {type(data).__name__}; it must be a kdata.trainer.parts.PackedRows or Documents, which hold the "
            "teacher's targets and the objective (a RowStream is for loops of your own: Trainer would divide it once more)"
        )


def _refuse_other_measure(data: Source, held: Source) -> None:
    """Raise unless the loss of the training data, which the model has, is that of the data to evaluate on."""
    if held.objective != data.objective or held.tail != data.tail:
        difference = settings_difference(
            {**data.objective.model_dump(), "tail": data.tail}, {**held.objective.model_dump(), "tail": held.tail}
        )
        raise ConfigError(
            "a model has one loss, that of train_dataset, and eval_dataset has another one; give it the same objective "
            f"(objective=train_dataset.objective), and data of the same kind. They differ in:\n{difference}"
        )
    ours, theirs = Vocabulary.of_dataset(data.dataset), Vocabulary.of_dataset(held.dataset)
    if ours.hash != theirs.hash:
        refuse_other_ids(ours, theirs, "evaluate on data of the same tokenizer")


def _refuse_settings(trainer: Any) -> None:
    """Raise ConfigError where a setting of Trainer would silently change the loss."""
    args = trainer.args
    if args.n_gpu > 1:
        raise ConfigError(
            "several GPUs in one process (nn.DataParallel) would cut the targets; start one process per GPU with torchrun "
            "or accelerate launch"
        )
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for the sparse loss; set 0"
        )
    if not args.average_tokens_across_devices and args.world_size > 1:
        raise ConfigError(
            "average_tokens_across_devices=False would weight ranks equally, however many tokens count on them; leave it True"
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise ConfigError(
            "use_liger_kernel replaces the model's forward pass, and with it the sparse loss; set liger_kernel_config="
            "{'fused_linear_cross_entropy': False, 'cross_entropy': False}"
        )


def _layout(layout: Layout | Literal["auto"], model: Any, data: Any) -> Layout:
    if layout != "auto":
        return layout
    if "flash" in str(model.config._attn_implementation):
        return "flat"
    return "padded" if isinstance(data, Documents) else "rows"


def _tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processing class, None where there is none."""
    return getattr(processor, "tokenizer", processor)
