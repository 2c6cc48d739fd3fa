"""Train a student from a dataset, without the teacher, and measure it.

    python examples/train_a_student.py [DATASET [PLAN]]

Without arguments it takes what capture_your_text.py and query_and_choose.py wrote: the dataset, and the plan `half`.
"""

import sys
from pathlib import Path

import kdata
from kdata.trainer.config import TrainConfig
from kdata.trainer.evaluate import evaluate
from kdata.trainer.train import train

dataset = sys.argv[1] if len(sys.argv) > 1 else "runs/examples/dataset"
plan = sys.argv[2] if len(sys.argv) > 2 else "half"
out = Path("runs/examples/student")

# 1. What the student is and what it learns from. Unknown keys are errors, so a typo does not pass unseen.
settings = {
    "steps": 60,  # optimizer steps
    "batch_tokens": 2048,  # tokens of a step
    "context_tokens": 256,  # tokens of a row; whole documents are packed into rows
    "warmup_steps": 10,
    "student": {"kind": "scratch", "hidden_size": 64, "num_layers": 2, "num_heads": 2},
    # 90 % of the loss is forward KL to the teacher's distributions, 10 % cross-entropy on the text itself.
    "objective": {"weights": {"forward_kl": 0.9, "cross_entropy": 0.1}},
}

# 2. Train. If it is interrupted, run it again: it continues at the last checkpoint.
result = train(TrainConfig.model_validate(settings), dataset, f"{dataset}/plans/{plan}.parquet", out)
losses = ", ".join(f"{name} {value:.3f}" for name, value in result.losses.items())
print(f"{result.params:,} parameters, {result.tokens:,} tokens, last losses in nats per token: {losses}")

# 3. Measure the student, here on the data that it learnt from; take a held-out dataset for figures that you report.
measured = evaluate(out / "model", dataset)
for name, figures in {**measured["domains"], "all": measured["overall"]}.items():
    print(f"{name}: NLL {figures['nll']:.3f} (teacher {figures['teacher_nll']:.3f}), KL to the teacher "
          f"{figures['kl']:.3f}, same first choice at {figures['top1']:.0%} of the positions")  # fmt: skip

# 4. The model is an ordinary Hugging Face folder: AutoModelForCausalLM.from_pretrained(folder).
print(f"student in {out / 'model'}; learnt from {kdata.open(dataset).num_tokens:,} stored tokens")
