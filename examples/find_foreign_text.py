"""Find text that does not belong: a student that saw one kind of text only is surprised by every other kind.

    python examples/find_foreign_text.py

The teacher is the one that kdata brings. It knows code and prose, so its own loss does not tell them apart. The student is
trained on prose alone, and its loss is a column of the dataset to be checked, in which some code is hidden.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import kdata
from kdata.pipelines.builtin.builtin import builtin_teacher, ensure_corpus
from kdata.trainer.config import TrainConfig
from kdata.trainer.train import train

OUT = Path("runs/examples/foreign")
OUT.mkdir(parents=True, exist_ok=True)
teacher = kdata.TeacherConfig(model=str(builtin_teacher()), backend="transformers")


def captured(name: str, rows: list[dict[str, str]]) -> kdata.Dataset:
    """A dataset of some rows, read by the teacher."""
    pq.write_table(pa.Table.from_pylist(rows), OUT / f"{name}.parquet")
    return kdata.capture(OUT / name, kdata.CaptureConfig(corpus={"path": str(OUT / f"{name}.parquet")}), teacher)


# 1. What is known to belong: prose. And what came in later: more prose, with a few pieces of code among it.
files = ensure_corpus(OUT / "corpus")
texts = pq.read_table(files.corpus, columns=["id", "domain", "text"]).to_pylist()
prose, code = ([row for row in texts if row["domain"] == domain] for domain in ("prose", "code"))
known = captured("known", prose[:200])
arrived = captured("arrived", prose[200:250] + [{**row, "domain": "prose"} for row in code[:10]])
planted = ", ".join(f"'{row['id']}'" for row in code[:10])

# 2. A student of the known text, and its loss on each row that came in: the score `student`.
sizes = {"kind": "scratch", "hidden_size": 64, "num_layers": 2, "num_heads": 2}
settings = {"steps": 60, "batch_tokens": 2048, "context_tokens": 512, "warmup_steps": 10, "student": sizes}
train(TrainConfig.model_validate(settings), known.path, None, OUT / "student")
student = kdata.TeacherConfig(model=str(OUT / "student/model"), backend="transformers")
kdata.score(arrived, kdata.ScoreConfig(model=student, name="student"))

# 3. The rows that surprise the student most. Text may also be hard for everybody, so the teacher's loss is subtracted.
ranked = """select rows.id, rows.nll as teacher, s.nll as student, s.nll - rows.nll as excess
    from rows join scores.student as s using (id)"""
for row in arrived.sql(f"{ranked} order by excess desc limit 5").to_pylist():
    print(f"{row['id']}: student {row['student']:.2f}, teacher {row['teacher']:.2f} nats per token")

# 4. How well each number finds them: the probability that a planted row has more of it than another row (AUROC).
for number in ("teacher", "student", "excess"):
    share = f"avg((a.{number} > b.{number})::int + (a.{number} = b.{number})::int / 2)"
    pairs = f"from r a, r b where a.id in ({planted}) and b.id not in ({planted})"
    auroc = arrived.sql(f"with r as ({ranked}) select {share} as auroc {pairs}")["auroc"][0].as_py()
    print(f"AUROC of {number}: {auroc:.3f}")
