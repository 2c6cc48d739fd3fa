"""A small raw corpus, as a crawl might bring it: good text, and what nobody wants to train on. No download.

    python examples/make_raw_corpus.py FOLDER

FOLDER gets raw.parquet (id, domain, text), heldout.parquet (clean text that is not in it), and exam.jsonl (questions of a
benchmark, which are in the raw text). An id says what a row is, so that you can see what was found: no command reads it.
"""

import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdata.pipelines.builtin.corpus import split_documents

folder, draw = Path(sys.argv[1]), random.Random(0)
folder.mkdir(parents=True, exist_ok=True)
training, heldout = split_documents()  # code, docstrings and prose that every Python carries
good = [one for one in draw.sample(training, 400) if len(one.text) > 400]
words = sorted({word for one in training[:500] for word in one.text.split() if word.isalpha() and word.islower()})
exam = [{"id": f"q{n}", "question": " ".join(draw.sample(words, 20)) + "?"} for n in range(20)]
cookies = "We use cookies to improve this site. Accept all cookies or change your settings. Read our policy on privacy."
german = (
    "Die Sitzung wurde am späten Abend unterbrochen, weil die Leitung des Hauses keine Antwort auf die Fragen hatte. "
)


def changed(text: str) -> str:
    """The same text with a word replaced."""
    parts = text.split(" ")
    parts[len(parts) // 2] = "other"
    return " ".join(parts)


rows = [{"id": f"good-{n}", "domain": one.domain, "text": one.text} for n, one in enumerate(good)]
for n, one in enumerate(draw.sample(good, 60)):
    shuffled = one.text.split()
    draw.shuffle(shuffled)
    dirt = {
        "repeat": one.text,
        "near": changed(one.text),
        "exam": f"{one.text}\n{exam[n % 20]['question']}",
        "cookies": "\n".join([f"{cookies} {n}"] * 12),
        "shuffled": " ".join(shuffled),  # words in no order
        "german": german * 6 + str(n),
        "mail": f"{one.text}\nWrite to {shuffled[0].strip('.,()') or 'x'}.{n}@mail-{n}.org, +49 30 {2_000_000 + n * 7919}.",
    }
    rows += [{"id": f"{kind}-{n}", "domain": one.domain, "text": text} for kind, text in dirt.items()]
draw.shuffle(rows)
pq.write_table(pa.Table.from_pylist(rows), folder / "raw.parquet")
clean = [{"id": one.id, "domain": one.domain, "text": one.text} for one in heldout[:120]]
pq.write_table(pa.Table.from_pylist(clean), folder / "heldout.parquet")
(folder / "exam.jsonl").write_text("".join(json.dumps(one) + "\n" for one in exam), "utf-8")
print(f"{len(rows)} rows, of which {len(good)} are good, in {folder}")
