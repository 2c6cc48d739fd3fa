"""Axolotl: an export that its own distillation plug-in reads, and the settings for it.

    python examples/use_axolotl.py STUDENT [DATASET]

Axolotl renormalizes the kept entries, so the loss is not kdata's. What the file cannot hold is printed. In these settings,
`messages` is a column of chats that you add: axolotl tokenizes them itself, and the tokens must be the file's `input_ids`.
"""

import sys
from pathlib import Path

import yaml

import kdata
from kdata.share.interchange.exporter import export_dataset

out = Path("runs/examples/axolotl")
out.mkdir(parents=True, exist_ok=True)
data = kdata.open(sys.argv[2] if len(sys.argv) > 2 else "runs/examples/dataset")
for line in export_dataset(data, out / "rows.parquet", "axolotl", version=2):
    print("lost:", line)
settings = {
    "base_model": sys.argv[1],
    "plugins": ["axolotl.integrations.kd.KDPlugin"],
    "kd_trainer": True,
    "kd_alpha": 0.9,
    "kd_ce_alpha": 0.1,
    "kd_temperature": 1.0,
    "datasets": [{
        "path": str(out / "rows.parquet"), "ds_type": "parquet", "type": "axolotl.integrations.kd.chat_template",
        "field_messages": "messages", "logprobs_field": "logprobs",
    }],
    "output_dir": str(out / "student"),
}  # fmt: skip
(out / "axolotl.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
