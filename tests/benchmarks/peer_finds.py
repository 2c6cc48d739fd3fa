"""What datatrove finds in the documents of `tests.benchmarks.hygiene`, for its interpreter: no kdata here.

    python -m tests.benchmarks.peer_finds TEXTS.jsonl --exam ITEMS.jsonl --language-model FILE

TEXTS has id and text; the answer is one JSON line, a `Finds`. MinHash are its four steps, from signatures to clusters. An
evaluation set has id, question and answer.

Its indexer of evaluation sets (0.10.1) takes documents of a set of one's own, but is not made without the package lighteval,
and reads lighteval's tasks at the end all the same. So `contaminated` takes its hashes of question and answer, and writes the
file that its filter reads.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from pathlib import Path
from typing import Any

SAME, DEFAULT = (20, 6), (14, 8)  # bands of MinHash and hashes in each: as in kdata, and datatrove's own


def found(texts: dict[str, str], exam: list[dict[str, str]] | None, language_model: str | None) -> dict[str, Any]:
    """What its filters say of each text.

    Returns:
        near: by number of bands, the cluster of each id that is in one of several documents.
        lines: ids that Gopher's rules for repeated lines and paragraphs leave out; repetition: that any of Gopher's rules
        for repetition does. personal: kind and characters of each address that is replaced, by id. overlap: by what of an
        item is searched for, ids that decontamination leaves out; absent without an evaluation set. language: code of each
        id; absent without a model.
    """
    from datatrove.pipeline.filters import GopherRepetitionFilter

    lines = GopherRepetitionFilter(top_n_grams=(), dup_n_grams=())
    result: dict[str, Any] = {
        "near": {f"{bands} x {hashes}": clusters(texts, bands, hashes) for bands, hashes in (SAME, DEFAULT)},
        "lines": failing(texts, lines),
        "repetition": failing(texts, GopherRepetitionFilter()),
        "personal": {name: addresses(text) for name, text in texts.items()},
    }
    if exam is not None:
        result["overlap"] = {
            "answers (its default)": contaminated(texts, exam, query=False),
            "questions too": contaminated(texts, exam, query=True),
        }
    if language_model is not None:
        result["language"] = languages(texts, language_model)
    return result


def documents(texts: dict[str, str]) -> list[Any]:
    """The texts as documents of datatrove."""
    from datatrove.data import Document

    return [Document(text=text, id=name) for name, text in texts.items()]


def failing(texts: dict[str, str], step: Any) -> list[str]:
    """Ids of documents that a filter leaves out."""
    return [one.id for one in documents(texts) if step.filter(one) is not True]


def languages(texts: dict[str, str], model: str) -> dict[str, str]:
    """Code of the most likely language of each text, by fastText's lid.176 from a file."""
    from datatrove.pipeline.filters import LanguageFilter
    from datatrove.utils.lid import FT176LID

    FT176LID.MODEL_URL = model  # in place of the download
    step = LanguageFilter(label_only=True)
    every = documents(texts)
    for one in every:
        step.filter(one)
    return {one.id: one.metadata["language"] for one in every}


def addresses(text: str) -> list[tuple[str, str]]:
    """Kind and characters of what PIIFormatter replaces: email addresses, then public IP addresses."""
    from datatrove.pipeline.formatters import PIIFormatter

    step, spans = PIIFormatter(), list[tuple[str, str]]()
    for kind, replacer in (("email", step.emails_replacer), ("ip", step.ip_replacer)):
        matches = (match.group() for match in replacer.regex.finditer(text))
        spans += [(kind, own) for own in matches if replacer.validator is None or replacer.validator(own)]
        text = replacer.replace(text)
    return spans


def contaminated(texts: dict[str, str], exam: list[dict[str, str]], *, query: bool) -> list[str]:
    """Ids of documents that share a run of 12 words with an evaluation set.

    Args:
        query: also with a question; otherwise with an answer, or with where a question goes over into its answer.
    """
    from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer
    from datatrove.utils.hashing import HashConfig

    NGramsDecontIndexer._requires_dependencies = []  # lighteval, see the module
    config = NGramsDecontConfig(find_query_ngrams=query, hash_config=HashConfig(hash_fc="sha1"))
    with tempfile.TemporaryDirectory() as temporary:
        indexer = NGramsDecontIndexer(temporary, config=config)
        hashes = {own for item in exam for own in indexer.compute_hashes(item["answer"], item["question"])}
        content = b"".join(struct.pack("<Q", own) for own in sorted(hashes))
        (Path(temporary) / "exam.index.hashes").write_bytes(content)
        return failing(texts, NGramsDecontFilter(temporary, config=config))


def clusters(texts: dict[str, str], bands: int, hashes: int) -> dict[str, int]:
    """Cluster of each document that is in one of several, by MinHash of runs of 5 words."""
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.utils.hashing import HashConfig

    hash_config = HashConfig(hash_fc="sha1")  # its xxhash does not run with version 4 of that package
    config = MinhashConfig(n_grams=5, num_buckets=bands, hashes_per_bucket=hashes, hash_config=hash_config)
    every = documents(texts)
    with tempfile.TemporaryDirectory() as temporary:
        signatures, buckets, removed = (str(Path(temporary) / name) for name in ("signatures", "buckets", "removed"))
        MinhashDedupSignature(signatures, config).run(iter(every), 0, 1)
        for bucket in range(bands):
            MinhashDedupBuckets(signatures, buckets, config=config).run(None, bucket, bands)
        MinhashDedupCluster(buckets, removed, config, save_cluster_id=True, save_cluster_size=True).run(None, 0, 1)
        for _ in MinhashDedupFilter(removed, load_cluster_ids=True, load_cluster_sizes=True).run(iter(every), 0, 1):
            pass
    return {
        one.id: one.metadata["minhash_cluster_id"] for one in every if one.metadata.get("minhash_cluster_size", 1) > 1
    }


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--exam", type=Path, help="an evaluation set, one JSON object with question and answer a line")
    parser.add_argument("--language-model", help="file of fastText's lid.176, such as lid.176.ftz")
    own = parser.parse_args()
    texts = {row["id"]: row["text"] for row in read(own.texts)}
    print(json.dumps(found(texts, None if own.exam is None else read(own.exam), own.language_model)))


def read(path: Path) -> list[dict[str, str]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
