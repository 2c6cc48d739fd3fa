"""A model that takes a batch and returns the sparse loss, wherever it is wrapped.

    model = attach_loss(model, data)                       checked, and changed in place
    output = model(**batch, counted_tokens=count)          output.loss, or logits as ever where a call has no targets

`counted_tokens` is what the loss is divided by, where a step has several batches; None: the batch's own. Hugging Face's
Trainer gives it as `num_items_in_batch`, its name for the same number.

The loss is computed inside the model's own forward pass, and the head's part of it inside the head's. DDP, FSDP and DeepSpeed
act on the calls of modules: they gather a module's weights before its call and divide its gradients after it. So a head that
is divided among ranks is whole when the loss reads it, and is never copied. Accelerate, torch.compile and PEFT wrap such a
model as they wrap any other. Saving is as before: no module and no parameter is added.

Shapes: B rows, L context, D hidden, V vocabulary, M counted positions, O objectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from kdata.calls import validated
from kdata.errors import ConfigError
from kdata.store.checkpoint_kind import use_exact_attention
from kdata.trainer.fused import Loss
from kdata.trainer.parts.collator import Collator, Item, Layout, SparseTargets, refuse_other_labels
from kdata.trainer.parts.data import Source
from kdata.trainer.parts.losses import DistillationLoss, LogitsLoss
from kdata.trainer.student import ROWS, check_positions, fit_vocabulary, fitting_targets, refuse_other_tokenizer

Model = TypeVar("Model", bound=nn.Module)
Over = Literal["hidden", "logits"]
SETTINGS = "kdata_loss"  # attribute of a model whose forward pass returns the loss: _Attached


@dataclass
class DistillOutput(ModelOutput):
    """What a model with an attached loss returns for a batch with targets.

    loss: scalar, nats per counted token, differentiable. sums_O: float [O], each objective summed over the batch's chosen
    tokens by their weights (`Targets.sums`), detached, in the order of the objective's weights. elsewhere: scalar, the
    cross-entropy summed over the other targets, detached; 0 where the plan chooses every target, or they do not count.
    """

    loss: Tensor | None = None
    sums_O: Tensor | None = None
    elsewhere: Tensor | None = None


@dataclass
class _Attached:
    """The loss of a model. loss: what computes it. head: the output embedding, None where the loss is over logits."""

    loss: DistillationLoss | LogitsLoss
    head: nn.Module | None


@validated
def attach_loss(
    model: Model,
    data: Source,
    *,
    over: Over = "hidden",
    layout: Layout = "rows",
    tokenizer: Any = None,
) -> Model:
    """Check a model against the data, and have its forward pass return the loss for batches with targets.

    Args:
        model: a causal language model of transformers, or a PEFT model of one, before it is wrapped for several ranks or
            compiled. It is changed in place.
        data: what it will read; its objective is the loss.
        over: hidden never holds [tokens, V] logits. logits is for models that change logits after the head.
        layout: of the batches, see `Collator`; with flash attention it must be flat or padded.
        tokenizer: the model's, if it is at hand; it must be the dataset's.
    Returns:
        The same model.
    Raises:
        ConfigError: the model's logits are not head @ hidden, its head has an adapter, documents packed in this layout see
            each other, or it is wrapped already.
        MismatchError: vocabulary or tokenizer are not the dataset's.
        DataError: a document is longer than the model's positions.
    """
    student = causal_lm_of(model)
    if tokenizer is not None:
        refuse_other_tokenizer("the model", tokenizer, data.dataset)
    check_positions(student, data.longest_tokens)
    use_exact_attention(student)
    with _whole(student):
        fit_vocabulary(student, [data.dataset])
        if over == "hidden":
            head = head_module_of(student)
            probe_head(student)
        if layout != "padded":
            probe_layout(student, layout)
    former = getattr(student, SETTINGS, None)
    if former is not None:
        raise ConfigError(f"this {type(student).__name__} has a loss already; attach one loss to a model")
    if over == "hidden":
        setattr(student, SETTINGS, _Attached(DistillationLoss.of(data), head))
        _replace_head_forward(head, student)
    else:
        setattr(student, SETTINGS, _Attached(LogitsLoss.of(data), None))
    _replace_forward(student)
    return model


def loss_of(model: nn.Module) -> DistillationLoss | LogitsLoss:
    """The attached loss of a bare model, for instance to set the step of weights that change."""
    attached: _Attached = getattr(causal_lm_of(model), SETTINGS)
    return attached.loss


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model, or the model itself. Raises ConfigError for other wrappers."""
    unwrapped: Any = model
    inner = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(model).__name__} is no causal language model of transformers; attach the loss to the model, before "
            "it is compiled or wrapped (DDP, FSDP, accelerator.prepare)"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{type(inner).__name__} is an encoder-decoder, and the batches for other trainers hold no prompts of their own; "
            "train it with `kdata train`"
        )
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ConfigError(
            "prompt learning puts tokens of its own before each row, which the targets do not know; use LoRA"
        )
    return inner


def head_module_of(model: PreTrainedModel) -> nn.Module:
    """The module that holds the output embedding [V, D].

    Raises:
        ConfigError: the head has an adapter or is quantized, so its weight alone does not give the logits.
    """
    head: Any = model.get_output_embeddings()
    saved = getattr(head, "modules_to_save", None)  # PEFT trains a whole copy of the head
    if saved is not None:
        head = saved[head.active_adapters[0]]
    if hasattr(head, "base_layer"):
        raise ConfigError(
            "the head has a PEFT adapter, and the loss reads its own weight alone; leave lm_head out of target_modules "
            "(modules_to_save=['lm_head'] trains it whole), or attach the loss with over='logits'"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or type(weight.data) is not Tensor:
        raise ConfigError(
            f"the head's weight is {type(getattr(weight, 'data', weight)).__name__}, not plain floating-point numbers; leave "
            "lm_head out of the quantization, or attach the loss with over='logits'"
        )
    module: nn.Module = head
    return module


def hidden_states_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Last hidden states after the final norm, [B, L, D], of whatever inputs the model takes."""
    backbone = getattr(model, model.base_model_prefix)
    hidden_BLD: Tensor = backbone(**inputs, use_cache=False).last_hidden_state
    return hidden_BLD


def _replace_forward(student: PreTrainedModel) -> None:
    former = student.forward

    def forward(
        self: PreTrainedModel,
        *args: Any,
        targets: SparseTargets | None = None,
        counted_tokens: Tensor | float | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> Any:
        if num_items_in_batch is not None and targets is None:
            inputs["num_items_in_batch"] = num_items_in_batch
        if targets is None:
            return former(*args, **inputs)
        if counted_tokens is None and num_items_in_batch is not None:
            if targets.targets.weights_C is not None:
                raise ConfigError(
                    "num_items_in_batch is a number of tokens, and a plan with weights divides by their sum; use "
                    "DistillTrainer in place of Trainer, or give counted_tokens, the total_weight of the step's targets"
                )
            counted_tokens = num_items_in_batch
        attached: _Attached = getattr(self, SETTINGS)
        _refuse_other_labels({**inputs, "targets": targets})
        inputs.pop("labels", None)
        device = inputs["input_ids"].device
        predictor_M = targets.predictor_M.to(device)
        fitting = fitting_targets(self, targets.targets)
        if attached.head is None:
            logits_MV = former(**inputs, use_cache=False).logits.flatten(0, 1).index_select(0, predictor_M)
            loss = attached.loss(logits_MV[:, : getattr(self, ROWS, None)], fitting, counted_tokens)
        else:
            hidden_MD = hidden_states_of(self, inputs).flatten(0, 1).index_select(0, predictor_M)
            loss = attached.head(hidden_MD, fitting, counted_tokens)
        return DistillOutput(loss=loss.total, sums_O=fitting.sums(loss.values_MO), elsewhere=loss.elsewhere)

    student.forward = MethodType(forward, student)
    # Some models say no, which makes Trainer average the batches of a step.
    student.accepts_loss_kwargs = True  # type: ignore[assignment]


def _replace_head_forward(head: nn.Module, student: PreTrainedModel) -> None:
    former = head.forward
    loss, rows = loss_of(student), getattr(student, ROWS, None)

    def forward(
        self: nn.Module, hidden: Tensor, targets: Any = None, counted_tokens: Tensor | float | None = None
    ) -> Tensor | Loss:
        if targets is None:
            logits: Tensor = former(hidden)
            return logits
        weight = self.weight
        assert isinstance(weight, Tensor)
        result: Loss = loss(hidden, weight if rows is None else weight[:rows], targets, counted_tokens)
        return result

    head.forward = MethodType(forward, head)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_other_labels(batch: Mapping[str, Any]) -> None:
    refuse_other_labels(batch)


@torch.no_grad()
def probe_head(model: PreTrainedModel) -> None:
    """Raise ConfigError unless the model's logits are head @ hidden (no bias, scaling or soft-capping)."""
    with _evaluating(model):
        ids_BL = _tokens(model, 6)[None]
        hidden_BLD = hidden_states_of(model, {"input_ids": ids_BL})
        weight = head_module_of(model).weight
        assert isinstance(weight, Tensor)
        ours_BLV = hidden_BLD @ weight.to(hidden_BLD.dtype).T
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
    if not _close(logits_BLV, ours_BLV):
        raise ConfigError(
            f"{type(model).__name__}'s logits are not head @ hidden (off by "
            f"{float((logits_BLV.float() - ours_BLV.float()).abs().max()):.2g}): it has a bias, logit scaling or "
            "soft-capping; attach the loss with over='logits' (it holds all logits of a batch), or choose another model"
        )


@torch.no_grad()
def probe_layout(model: PreTrainedModel, layout: Layout) -> None:
    """Raise ConfigError unless documents packed in a layout have the hidden states that they have alone."""
    ids, lengths = _tokens(model, 24), (5, 7, 4, 8)
    documents = list(ids.cpu().split(lengths))
    rows = [documents[:2], documents[2:]]
    items: list[Item] = [
        {
            "input_ids": torch.cat(row),
            "position_ids": torch.cat([torch.arange(len(document)) for document in row]),
            "segment_ids": torch.cat([torch.full((len(document),), number) for number, document in enumerate(row)]),
            "targets": SparseTargets.empty(),
        }
        for row in rows
    ]
    batch = Collator(layout)(items)
    for key in ("labels", "targets"):
        del batch[key]
    device = ids.device
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with _evaluating(model):
        packed = hidden_states_of(model, inputs).flatten(0, 1).split(lengths)
        alone = [hidden_states_of(model, {"input_ids": document[None].to(device)})[0] for document in documents]
    for mine, own in zip(packed, alone, strict=True):
        if not _close(mine, own):
            raise ConfigError(
                f"{type(model).__name__} with attention {model.config._attn_implementation!r} lets packed documents see each "
                f"other in the layout {layout!r} (hidden states differ by {float((mine - own).abs().max()):.2g}). Use "
                "Collator('flat') with flash attention, Collator('rows') with sdpa or eager, or Collator('padded')"
            )


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    rows = getattr(model, ROWS, None) or table.shape[0]
    return torch.arange(count, device=table.device) * 7 % rows


def _close(left: Tensor, right: Tensor) -> bool:
    """Whether two results of the same computation agree up to rounding in their dtype."""
    coarse = left.dtype in (torch.bfloat16, torch.float16) or right.dtype in (torch.bfloat16, torch.float16)
    scale = float(right.float().abs().max()) + 1e-6
    return bool((left.float() - right.float()).abs().max() <= (4e-2 if coarse else 1e-3) * scale)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and back to the modes that the modules were in.

    The 4-bit layers of bitsandbytes stay in training mode: on a processor with AVX512-BF16 their first product in evaluation
    mode packs their weights anew, and no gradient passes through them ever after.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if type(module).__module__.startswith("bitsandbytes."):
            module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _whole(model: nn.Module) -> AbstractContextManager[Any]:
    """Where DeepSpeed divided the weights when the model was built, have them whole for the checks."""
    divided = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    deepspeed = import_module("deepspeed")  # it divided the weights, so it is there
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(divided)
    return context
