"""TRL's SFTTrainer with LoRA, with the teacher's beliefs instead of the text alone.

    python examples/use_sft_trainer.py STUDENT [DATASET]

STUDENT is a model with the teacher's tokenizer. Without DATASET it takes the one that capture_your_text.py wrote.
"""

import sys

from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from kdata.trainer.parts import DistillSFTTrainer, PackedRows

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
data = PackedRows(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/dataset", context_tokens=256, epochs=1)
args = SFTConfig(
    "runs/examples/sft", max_steps=5, per_device_train_batch_size=2, logging_steps=1, learning_rate=1e-3, bf16=False,
    report_to=[], save_strategy="no",
)  # fmt: skip
trainer = DistillSFTTrainer(
    model=model,
    args=args,
    train_dataset=data,
    processing_class=AutoTokenizer.from_pretrained(sys.argv[1]),
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
trainer.train()
trainer.save_model("runs/examples/sft")
