"""Capture: a teacher reads your text, and what it believed at every token is kept on disk.

    python examples/capture_your_text.py [TEACHER]

TEACHER is a model folder or a name on the Hub. Without one a tiny teacher is trained first, in seconds.
"""

import pydoc
import pydoc_data.topics
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tiny_teacher import make_teacher

import kdata

OUT = Path("runs/examples")
OUT.mkdir(parents=True, exist_ok=True)

# 1. Your text: rows with an id, a domain and the text itself. Here: documentation and code that Python brings along.
prose = {f"topic-{name}": text for name, text in sorted(pydoc_data.topics.topics.items())[:40]}
code = {path.stem: path.read_text("utf-8") for path in sorted(Path(pydoc.__file__).parent.glob("*.py"))[:12]}
rows = [{"id": name, "domain": "prose", "text": text[:4000]} for name, text in prose.items()]
rows += [{"id": f"code-{name}", "domain": "code", "text": text[:4000]} for name, text in code.items()]
pq.write_table(pa.Table.from_pylist(rows), OUT / "texts.parquet")

# 2. The teacher. On a GPU, or for a large model, take backend="vllm".
model = sys.argv[1] if len(sys.argv) > 1 else make_teacher(OUT / "teacher", [row["text"] for row in rows])
teacher = kdata.TeacherConfig(model=str(model), backend="transformers")

# 3. The capture. Of every distribution it keeps the 8 likeliest tokens exactly and 28 random draws from the rest.
# If it is interrupted, run it again: it continues after the last shard that it finished.
settings = kdata.CaptureConfig(corpus=kdata.CorpusConfig(path=str(OUT / "texts.parquet")))
data = kdata.capture(OUT / "dataset", settings, teacher)

# 4. What is there: one row per sequence. Long texts were split into pieces that fit the teacher.
print(f"{data.num_rows} sequences, {data.num_tokens:,} tokens in {OUT / 'dataset'}")
row = kdata.open(OUT / "dataset")[0]
for t in range(1, 6):
    kept = row.kept(t)  # what the teacher thought likely at position t: the exact entries first, by falling probability
    print(f"{row.tokens[t]!r}: log-probability {row.logprob[t]:.2f}, rank {row.rank[t]}; "
          f"the teacher's first choice was {kept.tokens[0]!r}")  # fmt: skip
