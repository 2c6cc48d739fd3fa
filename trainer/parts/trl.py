"""TRL's SFTTrainer with the sparse loss. Its adapters (`peft_config`), checkpointing and logging are as ever.

    data = PackedRows("DATASET", context_tokens=2048, epochs=1)
    trainer = DistillSFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)

SFTTrainer takes a `datasets.Dataset` of text and tokenizes it. The text of a logit dataset is tokenized already, with the
teacher's tokens, so the constructor gets a stand-in of one row, and the real data takes its place afterwards.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kdata.errors import ConfigError
from kdata.trainer.parts.collator import Collator
from kdata.trainer.parts.huggingface import DistillMixin


class DistillSFTTrainer(DistillMixin, SFTTrainer):  # type: ignore[misc]  # a mixin overrides methods of its sibling
    """`trl.SFTTrainer` with the sparse loss; see `DistillMixin`.

    Raises:
        ConfigError: also where `args` asks SFTTrainer to pack, to mask or to change the loss, which the dataset decides.
    """

    def _stand_ins(self, arguments: dict[str, Any]) -> dict[str, Any]:
        args: Any = arguments.get("args") or SFTConfig()
        for name, neutral in (
            ("packing", False), ("padding_free", False), ("assistant_only_loss", False), ("completion_only_loss", None),
            ("loss_type", "nll"), ("chat_template_path", None),
        ):  # fmt: skip
            value = getattr(args, name, neutral)
            if value != neutral:
                raise ConfigError(
                    f"{name}={value}: the dataset decides what is packed and what counts; leave it out of SFTConfig"
                )
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        one_row = Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]})
        return {
            "args": args,
            "train_dataset": one_row,
            "eval_dataset": None if arguments.get("eval_dataset") is None else one_row,
            "data_collator": Collator(),
        }
