"""A loop of torch alone.

    python examples/use_plain_torch.py STUDENT [DATASET]

STUDENT is a model with the teacher's tokenizer. Without DATASET it takes the one that capture_your_text.py wrote.
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from kdata.trainer.parts import Collator, PackedRows, attach_loss

data = PackedRows(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/dataset", context_tokens=256, items=20)
model = attach_loss(AutoModelForCausalLM.from_pretrained(sys.argv[1]), data).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step, batch in enumerate(DataLoader(data, 4, collate_fn=Collator()), 1):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f} nats per token")
model.save_pretrained("runs/examples/plain")
