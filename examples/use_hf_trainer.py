"""Hugging Face's Trainer, with the teacher's beliefs instead of the text alone.

    python examples/use_hf_trainer.py STUDENT [DATASET]

STUDENT is a model with the teacher's tokenizer. Without DATASET it takes the one that capture_your_text.py wrote.
"""

import sys

from transformers import AutoModelForCausalLM, TrainingArguments

from kdata.trainer.parts import DistillTrainer, PackedRows

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
data = PackedRows(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/dataset", context_tokens=256, epochs=1)
args = TrainingArguments(
    "runs/examples/hf", max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
    learning_rate=1e-3, report_to=[], save_strategy="no",
)  # fmt: skip
trainer = DistillTrainer(model=model, args=args, train_dataset=data)
trainer.train()
model.save_pretrained("runs/examples/hf")
