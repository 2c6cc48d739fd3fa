"""What kdata brings so that a run needs no download: a teacher, a reference and a corpus.

The teacher (1.6 M parameters) and the smaller reference, which difference sampling compares it with, are trained
already and ship in `models/`; `train.py` is how. The corpus is built on the spot from this Python's own text.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq

from kdata.calls import validated
from kdata.errors import CorruptError
from kdata.format.files import committed_folder, storage_errors
from kdata.observe.progress import Task
from kdata.pipelines.builtin.corpus import CorpusFiles, build_corpus, stdlib_listing

MODELS = Path(__file__).parent / "models"
DIGESTS = "SHA256SUMS"
TEACHER, REFERENCE = "kdata-builtin-teacher", "kdata-builtin-reference"


def builtin_teacher() -> Path:
    """Folder of the teacher in Hugging Face format. Raises CorruptError where a file is not the one that shipped."""
    return checked_model(MODELS, TEACHER)


def builtin_reference() -> Path:
    """Folder of the reference, with the teacher's tokenizer. Raises CorruptError as `builtin_teacher` does."""
    return checked_model(MODELS, REFERENCE)


def checked_model(models: Path, name: str) -> Path:
    """The folder `models`/`name`, after a check of every file in it against the SHA-256 digests in `models`.

    Raises:
        CorruptError: a file is missing, changed, or not listed.
    """
    remedy = "install kdata again, or name a model of your own with teacher.model and reference.model"
    digests: dict[str, str] = {}
    if (models / DIGESTS).is_file():
        for line in (models / DIGESTS).read_text("utf-8").splitlines():
            digest, _, path = line.partition("  ")
            digests[path] = digest
    expected = {path for path in digests if path.startswith(f"{name}/")}
    actual = {p.relative_to(models).as_posix() for p in (models / name).rglob("*") if p.is_file()}
    if not expected or expected != actual:
        odd = ", ".join(sorted(expected ^ actual)) or DIGESTS
        raise CorruptError(f"the built-in model {models / name} lacks files or has extra ones ({odd}); {remedy}")
    for path in sorted(expected):
        if hashlib.sha256((models / path).read_bytes()).hexdigest() != digests[path]:
            raise CorruptError(f"{models / path} is not the file that shipped: its SHA-256 differs; {remedy}")
    return models / name


@validated
def ensure_corpus(cache_dir: Path) -> CorpusFiles:
    """The corpus of this interpreter, from the cache, or built now (four seconds)."""
    key = hashlib.sha256(json.dumps([sys.version, _source_digest(), stdlib_listing()]).encode()).hexdigest()[:16]
    directory = cache_dir / f"corpus-{key}"
    if not directory.exists():
        with (
            storage_errors(directory),
            committed_folder(directory) as temporary,
            Task("built-in corpus", unit="documents") as task,
        ):
            build_corpus(temporary)
            task.advance(sum(pq.read_metadata(f).num_rows for f in temporary.glob("[ch]*.parquet")))
    return CorpusFiles.at(directory)


def _source_digest() -> str:
    """Digest of the code that builds the corpus: another version of it does not read this one's cache."""
    return hashlib.sha256(Path(__file__).with_name("corpus.py").read_bytes()).hexdigest()
