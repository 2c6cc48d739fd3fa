"""A loop of your own with Accelerate: `accelerate launch` starts it on as many processes as you like.

    python examples/use_accelerate.py STUDENT [DATASET]

STUDENT is a model with the teacher's tokenizer. Without DATASET it takes the one that capture_your_text.py wrote.
"""

import sys

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from kdata.trainer.parts import Collator, PackedRows, attach_loss

accelerator, rows = Accelerator(), 4
data = PackedRows(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/dataset", context_tokens=256, items=20)
model = attach_loss(AutoModelForCausalLM.from_pretrained(sys.argv[1]), data)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
# Every process gets equally many items: the last ones may be empty, instead of the first ones once more.
loader = DataLoader(data.filled_to(rows * accelerator.num_processes), rows, collate_fn=Collator())
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for step, batch in enumerate(loader, 1):
    # A step's loss is divided by the weight of the counted tokens of all processes, because they differ.
    counted = accelerator.reduce(torch.tensor(batch["targets"].total_weight, device=accelerator.device))
    loss = model(**batch, counted_tokens=counted).loss * accelerator.num_processes  # gradients are averaged
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    mean = accelerator.reduce(loss.detach(), "mean").item()
    accelerator.print(f"step {step}: loss {mean:.3f} nats per token")
accelerator.unwrap_model(model).save_pretrained("runs/examples/accelerate")
