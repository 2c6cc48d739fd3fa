"""Every reader of a file that somebody else may have written, with files that are damaged or hostile.

    python -m tests.campaigns.fuzz --seed 0 --count 20000

A case takes one file of a good example, changes it by rule or by chance (`tests.campaigns.mutations`), and has one reader
read it, in a child with limits of memory and time. Digests of a dataset fit the changed file in most cases, as a stranger
would fit them. The reader may succeed, or refuse with a KdataError. A traceback of anything else is a failure, and so are a
crash, a hang, and a file outside of the case's folder.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import yaml

import kdata
from kdata.errors import KdataError
from kdata.format.manifest import digest_of, json_bytes
from kdata.format.schema import canonical_json
from tests.campaigns import layouts, mutations
from tests.campaigns.campaign import Campaign, Outcome, main
from tests.fakes import CHATML, rows_of_text, run_capture, save_llama, save_tokenizer, write_jsonl
from tests.gguf_files import write_gguf

ANSWER = {"role": "assistant", "content": "yes"}
CHATS = [
    {"id": f"c{n}", "domain": "chat", "messages": [{"role": "user", "content": "hi " * n}, ANSWER]} for n in range(1, 4)
]
VLLM = {
    "request_id": "a",
    "prompt": "t",
    "prompt_token_ids": [10, 20, 30],
    "prompt_logprobs": [None, {"20": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -1.5}}, {"30": {"logprob": -0.1}}],
}
BOMB_BYTES = 400 << 20
TEMPLATE_SEC = 0.3
NO_FILE = 0.02  # share of cases in which no file is left in the place of the file


@dataclass(frozen=True)
class Target:
    """Files of an example (patterns), how they are changed, and who reads them.

    example: folder below the examples. change: of a file, in place. read: gets the case's copy of the example.
    """

    example: str
    files: str
    change: Callable[[Path, random.Random], None]
    read: Callable[[Path], None]
    weight: int = 1


# ------------------------------------------------------------------------------------------------------------ changes


def by_bytes(file: Path, rng: random.Random) -> None:
    """Change bytes."""
    file.write_bytes(mutations.bytes_of(file.read_bytes(), rng))


def by_json(file: Path, rng: random.Random) -> None:
    """Change a value of a JSON file, or bytes of it."""
    if rng.random() < 0.25:
        return by_bytes(file, rng)
    value, raw = mutations.json_of(json.loads(file.read_bytes()), rng)
    file.write_bytes(mutations.json_text(value, raw, indent=2))


def by_digested_json(file: Path, rng: random.Random) -> None:
    """The same, with the file's own digest fitted where that is possible."""
    by_json(file, rng)
    try:
        content = json.loads(file.read_bytes())
        file.write_bytes(json_bytes({**content, "digest": digest_of(content)}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # text that only a raw file can hold


def by_lines(file: Path, rng: random.Random) -> None:
    """Change a line of JSONL, or bytes."""
    file.write_bytes(mutations.lines_of(file, rng)) if rng.random() < 0.75 else by_bytes(file, rng)


def by_manifest_line(file: Path, rng: random.Random) -> None:
    """Change a line of the manifest, and fit its digest where that is possible."""
    by_lines(file, rng)
    lines = []
    for line in file.read_bytes().splitlines():
        try:
            content = json.loads(line)
            lines.append(canonical_json({**content, "digest": digest_of(content)}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            lines.append(line)
    file.write_bytes(b"\n".join(lines) + b"\n")


def by_yaml(file: Path, rng: random.Random) -> None:
    """Change a value of a YAML file, or take a text made to harm."""
    file.write_bytes(mutations.yaml_text(yaml.safe_load(file.read_text()), rng))


def by_template(file: Path, rng: random.Random) -> None:
    """Take another chat template."""
    file.write_text(mutations.template_text(rng), "utf-8")


def by_table(file: Path, rng: random.Random) -> None:
    """Change a column of a Parquet or Arrow file, or bytes of it. A file that an earlier change broke has no columns."""
    if rng.random() < 0.4 or file.read_bytes()[-4:] not in (b"PAR1", b"ROW1"):
        return by_bytes(file, rng)
    if file.suffix == ".parquet":
        changed = mutations.table_of(pq.read_table(file), rng)
        fields = [field.with_nullable(True) for field in changed.schema]  # a column may have become null
        return pq.write_table(changed.cast(pa.schema(fields, changed.schema.metadata)), file)
    with pa.ipc.open_file(file) as reader:
        table, metadata, footer = reader.read_all(), reader.schema.metadata, dict(reader.metadata or {})
    table = mutations.table_of(table, rng).replace_schema_metadata(metadata)
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "zstd", "lz4")))
    if footer and rng.random() < 0.3:  # the common ids of a shard
        name = rng.choice(sorted(footer))
        content = bytearray(footer.pop(name))
        if content and rng.random() < 0.8:
            content[rng.randrange(len(content))] = rng.choice(b":0123456789ABCab+/=\xff")
            footer[name] = bytes(content[: rng.choice((len(content), len(content) // 2))])
    with pa.ipc.new_file(file, table.schema, options=options, metadata=footer) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 2, 1000)))
    return None


def fitted(file: Path, rng: random.Random) -> None:
    """`by_table` of a dataset's file, with its digests in the manifest or the JSON beside it fitted to it."""
    by_table(file, rng)
    if rng.random() < 0.1:
        return
    root = next(folder for folder in file.parents if (folder / "dataset.json").exists())
    relative = file.relative_to(root).as_posix()
    info = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    lines = []
    for line in (root / "manifest.jsonl").read_bytes().splitlines():
        entry = json.loads(line)
        if relative in entry["files"]:
            entry["files"][relative] = info
        lines.append(canonical_json({**entry, "digest": digest_of(entry)}) + b"\n")
    (root / "manifest.jsonl").write_bytes(b"".join(lines))
    for path in (*root.glob("scores/*.json"), *root.glob("plans/*.json")):
        content = json.loads(path.read_bytes())
        if relative in content.get("files", {}):
            content["files"][relative] = info
        elif relative == f"plans/{path.stem}.parquet":
            content["table"] = info
        content["dataset_fingerprint"] = kdata.open(root).content_digest
        path.write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def by_listed_bytes(file: Path, rng: random.Random) -> None:
    """Change bytes of a part of hidden states, with its digest in the JSON beside it fitted to it."""
    by_bytes(file, rng)
    if rng.random() < 0.1:
        return
    listing = file.parent.with_suffix(".json")
    content = json.loads(listing.read_bytes())
    info = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
    content["files"][f"hidden/{file.parent.name}/{file.name}"] = info
    listing.write_bytes(json_bytes({**content, "digest": digest_of(content)}))


def by_bytes_of_archive(file: Path, rng: random.Random) -> None:
    """Change bytes of a compressed file or of what is in it, or make a bomb of it."""
    kind = rng.randrange(8)
    if kind == 0:
        shutil.copyfile(file.parent.parent / "bomb.gz", file)
    elif kind < 4 and file.suffix == ".gz":
        inner = file.with_name("inner.jsonl")
        inner.write_bytes(gzip.decompress(file.read_bytes()))
        by_lines(inner, rng) if "jsonl" in file.name else by_bytes(inner, rng)
        file.write_bytes(gzip.compress(inner.read_bytes()))
        inner.unlink()
    else:
        by_bytes(file, rng)


# ------------------------------------------------------------------------------------------------------------- readers


def read_rows(folder: Path) -> None:
    """Everything of every row."""
    dataset = kdata.open(folder / "dataset")
    dataset.index()
    dataset.rejected()
    for row in dataset:
        _ = row.messages, row.token_ids, row.logprob, row.rank, row.text, row.kept(len(row) - 1).tokens, row.tokens
    dataset.take(np.arange(dataset.num_rows)[::-1])


def read_sql(folder: Path) -> None:
    """SQL over every view."""
    dataset = kdata.open(folder / "dataset")
    for query in (
        "select * from rows",
        "select * from rejects",
        "select * from scores.judge",
        "select * from plans.some",
    ):
        dataset.sql(query, values="text")


def read_verify(folder: Path) -> None:
    """Verify, in full."""
    from kdata.check.verify import verify

    verify(kdata.open(folder / "dataset"), deep=True)


def read_repair(folder: Path) -> None:
    """Repair."""
    from kdata.check.repair import repair

    repair(folder / "dataset")


def read_plan(folder: Path) -> None:
    """A plan and a score, as training and choosing take them."""
    from kdata.selection.plan import open_plan
    from kdata.selection.sidecar import checked_score_digest

    dataset = kdata.open(folder / "dataset")
    open_plan(dataset, "some").rows(dataset)
    checked_score_digest(dataset, "judge")


def read_batches(folder: Path) -> None:
    """Batches, as a trainer gets them."""
    from kdata.loader.batches import Batches, BatchesConfig

    dataset = kdata.open(folder / "dataset")
    batches = Batches(dataset, None, BatchesConfig(context_tokens=64, batch_rows=2, prefetch_batches=0))
    for _, _ in zip(batches, range(4), strict=False):
        pass


def read_share(folder: Path) -> None:
    """Card, copy, export, head."""
    from kdata.share.arrange import head
    from kdata.share.card import card_page
    from kdata.share.interchange.exporter import export_dataset
    from kdata.share.push import push

    dataset = kdata.open(folder / "dataset")
    card_page(dataset)
    export_dataset(dataset, folder / "out.parquet", "plain")
    head(dataset, folder / "head", 3)
    push(dataset, folder / "copy")


def read_status(folder: Path) -> None:
    """The status of a run, and of a dataset."""
    from io import StringIO

    from kdata.observe.status import render, status
    from kdata.observe.terminal import PlainConsole

    for place in (folder / "run", folder / "dataset"):
        if place.exists():
            out = StringIO()
            PlainConsole(file=out, force_terminal=True, width=100).print(render(status(place), 100))
            assert "\x1b]" not in out.getvalue() and "\x1b[2J" not in out.getvalue(), "a control sequence is printed"


def read_report(folder: Path) -> None:
    """The report of a run."""
    from kdata.pipelines.report.report import write_report

    write_report(folder / "run")


def read_corpus(folder: Path) -> None:
    """All rows of each corpus in the folder, as text or chats."""
    from kdata.corpus.corpus import Corpus, CorpusConfig

    [file] = (folder / "corpus").iterdir()
    columns: dict[str, Any] = {"messages_column": "messages"} if "chat" in file.name else {}
    corpus = Corpus(CorpusConfig(path=str(file), **columns))
    for document in corpus.documents():
        _ = document.chat.content if getattr(document, "chat", None) else document


def read_capture(folder: Path) -> None:
    """A capture of the corpus, by a stand-in teacher: what follows the reading of rows."""
    [file] = (folder / "corpus").iterdir()
    chats = "chat" in file.name
    reading = {"messages_column": "messages"} if chats else {}
    run_capture(folder / "captured", file, EXAMPLES[0] / ("chat-tokenizer" if chats else "tokenizer"), reading=reading)


def read_import(folder: Path) -> None:
    """An import of the file in the folder; its name says the format."""
    from kdata.share.interchange.importer import ImportConfig, import_dataset

    source = folder / "peer"
    format = next(f for f in FORMATS if any(f in p.name for p in source.iterdir()))
    fields: dict[str, Any] = {} if format == "distillkit" else {"vocab_size": 300}
    import_dataset(source, folder / "imported", ImportConfig(format=format, **fields))
    read_imported(folder / "imported")


def read_megatron(folder: Path) -> None:
    """An import of a cache of Megatron, whose tokens are in a file of their own."""
    from kdata.share.interchange.importer import ImportConfig, import_dataset

    samples = str(folder / "cache/samples.parquet")
    config = ImportConfig(format="megatron", samples=samples, vocab_size=300)
    import_dataset(folder / "cache", folder / "imported", config)
    read_imported(folder / "imported")


def read_hidden(folder: Path) -> None:
    """Hidden states of every row, verify, and the export that drafts train on."""
    from kdata.check.verify import verify
    from kdata.share.interchange.speculators import export_speculators
    from kdata.store.hidden import HiddenStates

    dataset = kdata.open(folder / "dataset")
    verify(dataset, deep=True)
    [name] = [path.stem for path in (dataset.path / "hidden").glob("*.json")]
    states = HiddenStates(dataset, name)
    for row in range(dataset.num_rows):
        states.row(row)
    export_speculators(dataset, name, folder / "exported")


def read_imported(root: Path) -> None:
    """What was imported must be readable."""
    for row in kdata.open(root):
        _ = row.kept(len(row) - 1)


def read_scores(folder: Path) -> None:
    """Scores from a file."""
    from kdata.selection.score_file import bring

    bring(kdata.open(folder / "dataset"), folder / "brought.parquet", "brought")


def read_recipe(folder: Path) -> None:
    """A recipe."""
    from kdata.pipelines.recipe import load_recipe

    load_recipe(folder / "recipe.yaml", []).settings()


def read_model(folder: Path) -> None:
    """A model's folder, as a teacher's is checked before anything is loaded."""
    from kdata.teachers.config import TeacherConfig
    from kdata.teachers.engine_args import lora_rank
    from kdata.teachers.model import check_model, load_tokenizer, tokenizer_info
    from kdata.teachers.sizing import model_size

    config = TeacherConfig(model=str(folder / "model"), backend="transformers")
    check_model(config, max_k=8)
    model_size(folder / "model", config)
    tokenizer_info(load_tokenizer(folder / "model"))
    lora_rank(folder / "adapter")


def read_weights(folder: Path) -> None:
    """A model's weights, by everything that opens them."""
    import torch

    from kdata.check import audit
    from kdata.teachers import head

    audit.load_head(folder / "model")
    head.load_head(folder / "model", 300, torch.float32, "cpu")


def read_student(folder: Path) -> None:
    """A model as a student."""
    from kdata.trainer.config import CheckpointStudent
    from kdata.trainer.student import build_student

    build_student(CheckpointStudent(model=str(folder / "model")), kdata.open(EXAMPLES[0] / "data/dataset"), 0)


def read_tokens(folder: Path) -> None:
    """The tokenizer of a dataset."""
    from kdata.store.vocabulary import Vocabulary

    dataset = kdata.open(folder / "dataset")
    _ = dataset[0].tokens
    _ = Vocabulary.of_dataset(dataset).tokens


def read_gguf(folder: Path) -> None:
    """The header of a GGUF file."""
    from kdata.store.gguf import read_header

    read_header(folder / "model.gguf")


def read_template(folder: Path) -> None:
    """A chat template with three chats."""
    from transformers import AutoTokenizer

    from kdata.corpus.chat_template import ChatError, chat_encoder
    from kdata.corpus.corpus import CorpusConfig
    from kdata.corpus.messages import parse_chat

    _quick_templates()
    corpus = CorpusConfig(path="unused", messages_column="messages", chat_template=str(folder / "template.jinja"))
    encoder = chat_encoder(AutoTokenizer.from_pretrained(EXAMPLES[0] / "chat-tokenizer"), corpus)
    for row in CHATS[:2]:
        try:
            encoder.whole(parse_chat(row["messages"], None, "row"), "assistant")
        except ChatError:
            continue


def read_checkpoint(folder: Path) -> None:
    """A checkpoint of a training run."""
    import torch

    from kdata.trainer.checkpoint import load_checkpoint
    from kdata.trainer.distributed import Ranks
    from kdata.trainer.metrics import forget_after
    from kdata.trainer.optimizers import Optimizer

    model = torch.nn.Linear(4, 3)
    optimizer = Optimizer(torch.optim.AdamW(model.parameters()))
    load_checkpoint(folder / "checkpoints", model, optimizer, SETTINGS, Ranks(torch.device("cpu")))
    forget_after(folder / "metrics.jsonl", 2)


SETTINGS = {"steps": 3}
FORMATS = ("distillkit", "axolotl", "plain", "vllm", "nemo")
EXAMPLES: list[Path] = [Path()]  # where the examples are, in this process

# What is changed and who reads it. Readers of one kind of file share a name in `by_kind`: the name of the example and file.
TARGETS: dict[str, Target] = {
    "dataset.json": Target("data", "dataset/dataset.json", by_digested_json, read_rows, 3),
    "dataset.json, verify": Target("data", "dataset/dataset.json", by_digested_json, read_verify),
    "dataset.json, repair": Target("data", "dataset/dataset.json", by_digested_json, read_repair),
    "dataset.json, share": Target("data", "dataset/dataset.json", by_digested_json, read_share),
    "dataset.json, status": Target("data", "dataset/dataset.json", by_digested_json, read_status),
    "manifest": Target("data", "dataset/manifest.jsonl", by_manifest_line, read_rows, 3),
    "manifest, sql": Target("data", "dataset/manifest.jsonl", by_manifest_line, read_sql),
    "manifest, verify": Target("data", "dataset/manifest.jsonl", by_manifest_line, read_verify),
    "manifest, repair": Target("data", "dataset/manifest.jsonl", by_manifest_line, read_repair),
    "manifest, share": Target("data", "dataset/manifest.jsonl", by_manifest_line, read_share),
    "payload": Target("data", "dataset/data/*.arrow", fitted, read_rows, 8),
    "payload, batches": Target("data", "dataset/data/*.arrow", fitted, read_batches, 6),
    "payload, verify": Target("data", "dataset/data/*.arrow", fitted, read_verify, 2),
    "payload, repair": Target("data", "dataset/data/*.arrow", fitted, read_repair, 2),
    "payload, share": Target("data", "dataset/data/*.arrow", fitted, read_share, 2),
    "index": Target("data", "dataset/index/*.parquet", fitted, read_rows, 4),
    "index, sql": Target("data", "dataset/index/*.parquet", fitted, read_sql, 4),
    "index, verify": Target("data", "dataset/index/*.parquet", fitted, read_verify),
    "index, repair": Target("data", "dataset/index/*.parquet", fitted, read_repair),
    "index, share": Target("data", "dataset/index/*.parquet", fitted, read_share, 2),
    "index, scores": Target("data", "dataset/index/*.parquet", fitted, read_scores),
    "rejects": Target("data", "dataset/rejects/*.parquet", fitted, read_rows),
    "rejects, sql": Target("data", "dataset/rejects/*.parquet", fitted, read_sql),
    "scores": Target("data", "dataset/scores/*/*.parquet", fitted, read_sql, 2),
    "scores, digests": Target("data", "dataset/scores/*/*.parquet", fitted, read_plan),
    "scores.json": Target("data", "dataset/scores/*.json", by_digested_json, read_plan, 2),
    "scores.json, sql": Target("data", "dataset/scores/*.json", by_digested_json, read_sql),
    "scores.json, verify": Target("data", "dataset/scores/*.json", by_digested_json, read_verify),
    "plan": Target("data", "dataset/plans/*.parquet", fitted, read_plan, 2),
    "plan, sql": Target("data", "dataset/plans/*.parquet", fitted, read_sql),
    "plan.json": Target("data", "dataset/plans/*.json", by_digested_json, read_plan, 2),
    "plan.json, verify": Target("data", "dataset/plans/*.json", by_digested_json, read_verify),
    "tokenizer of a dataset": Target("data", "dataset/tokenizer/tokenizer.json", by_json, read_tokens),
    "scores to bring": Target("data", "brought.parquet", by_table, read_scores, 2),
    "journal of a dataset": Target("data", ".dataset.progress.jsonl", by_lines, read_status, 2),
    "run.json": Target("run", "run/run.json", by_json, read_status),
    "journal of a run": Target("run", "run/progress.jsonl", by_lines, read_status, 2),
    "results.json": Target("run", "run/results.json", by_json, read_report),
    "metrics": Target("run", "run/students/plan/metrics.jsonl", by_lines, read_report),
    **{f"corpus {name}": Target(f"corpora/{name}", "corpus/*", change, read_corpus, 2) for name, change in {
        "jsonl": by_lines, "json": by_json, "parquet": by_table, "arrow": by_table, "csv": by_bytes, "stream": by_bytes,
        "chats": by_lines, "chat-parquet": by_table, "gz": by_bytes_of_archive, "zst": by_bytes_of_archive,
        "csv-gz": by_bytes_of_archive}.items()},
    **{f"capture {name}": Target(f"corpora/{name}", "corpus/*", change, read_capture, 2) for name, change in {
        "jsonl": by_lines, "parquet": by_table, "chats": by_lines, "chat-parquet": by_table}.items()},
    **{f"import {name}": Target(f"peers/{name}", "peer/*", change, read_import, 2) for name, change in {
        "plain": by_table, "axolotl": by_table, "distillkit": by_table, "plain-jsonl": by_lines, "vllm": by_lines,
        "nemo": by_lines}.items()},
    "import megatron": Target("megatron", "cache/*.tar", layouts.by_member(by_bytes), read_megatron, 3),
    "import megatron, tokens": Target("megatron", "cache/samples.parquet", by_table, read_megatron),
    "hidden states": Target("hidden", "dataset/hidden/*/*.safetensors", by_listed_bytes, read_hidden, 2),
    "hidden states, json": Target("hidden", "dataset/hidden/*.json", by_digested_json, read_hidden, 2),
    "import yaml": Target("peers/distillkit", "peer/*.yaml", by_yaml, read_import, 2),
    "recipe": Target("settings", "recipe.yaml", by_yaml, read_recipe, 3),
    "recipe with rounds": Target("rounds", "recipe.yaml", by_yaml, read_recipe, 3),
    "config.json": Target("models", "model/config.json", by_json, read_model, 2),
    "tokenizer.json": Target("models", "model/tokenizer.json", by_json, read_model, 2),
    "tokenizer_config.json": Target("models", "model/tokenizer_config.json", by_json, read_model),
    "adapter_config.json": Target("models", "adapter/adapter_config.json", by_json, read_model),
    "weights, sizes": Target("models", "model/model.safetensors", by_bytes, read_model),
    "weights": Target("models", "model/model.safetensors", by_bytes, read_weights, 2),
    "weights, student": Target("models", "model/model.safetensors", by_bytes, read_student),
    "config.json, student": Target("models", "model/config.json", by_json, read_student, 2),
    "tokenizer.json, student": Target("models", "model/tokenizer.json", by_json, read_student),
    "gguf": Target("ggufs", "model.gguf", by_bytes, read_gguf, 2),
    "template": Target("templates", "template.jinja", by_template, read_template, 2),
    "checkpoint": Target("checkpoints", "checkpoints/*/tensors.safetensors", by_bytes, read_checkpoint, 2),
    "checkpoint state": Target("checkpoints", "checkpoints/*/state.json", by_json, read_checkpoint, 2),
    "checkpoint metrics": Target("checkpoints", "metrics.jsonl", by_lines, read_checkpoint),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- examples


def make_examples(folder: Path) -> None:
    """A good example of everything that is read."""
    save_tokenizer(folder / "tokenizer")
    save_tokenizer(folder / "chat-tokenizer", chat_template=CHATML)
    _data(folder / "data", folder / "tokenizer")
    _run(folder / "run/run", folder / "data")
    _corpora(folder / "corpora")
    with gzip.open(folder / "corpora/bomb.gz", "wb", 1) as bomb:
        for _ in range(BOMB_BYTES >> 20):
            bomb.write(b'{"id": "x"} ' + b" " * (1 << 20))
    for name in ("gz", "zst", "csv-gz"):  # beside the folder of the case
        shutil.copyfile(folder / "corpora/bomb.gz", folder / f"corpora/{name}/bomb.gz")
    (folder / "corpora/bomb.gz").unlink()
    _peers(folder / "peers", folder / "data/dataset")
    (folder / "settings").mkdir()
    shutil.copyfile(Path(kdata.__file__).parent.parent / "pipelines/quickstart.yaml", folder / "settings/recipe.yaml")
    (folder / "rounds").mkdir()
    layouts.with_rounds(folder / "settings/recipe.yaml", folder / "rounds/recipe.yaml")
    save_llama(folder / "models/model")
    (folder / "megatron").mkdir()
    layouts.megatron(folder / "megatron", folder / "data/dataset")
    (folder / "hidden").mkdir()
    layouts.hidden(folder / "hidden", folder / "models/model")
    (folder / "models/adapter").mkdir()
    (folder / "models/adapter/adapter_config.json").write_text(
        '{"r": 8, "rank_pattern": {"a": 4}, "peft_type": "LORA"}'
    )
    shutil.copyfile(folder / "models/model/model.safetensors", folder / "models/adapter/adapter_model.safetensors")
    (folder / "ggufs").mkdir()
    write_gguf(folder / "models/model", folder / "ggufs/model.gguf")
    (folder / "templates").mkdir()
    (folder / "templates/template.jinja").write_text(CHATML)
    _checkpoint(folder / "checkpoints")


def _data(folder: Path, tokenizer: Path) -> None:
    from kdata.selection.score_file import bring

    folder.mkdir()
    rows = [*rows_of_text(12), {"id": "empty", "domain": "code", "text": ""}]
    dataset = run_capture(folder / "dataset", write_jsonl(folder / "rows.jsonl", rows), tokenizer)
    ids = dataset.index(["id"])["id"].to_pylist()
    pq.write_table(pa.table({"id": ids, "mark": [float(n) for n in range(len(ids))]}), folder / "brought.parquet")
    bring(dataset, folder / "brought.parquet", "judge")
    plan = kdata.make_plan(dataset, "some", ids[:5], method="sql", parameters={}, sql="select id from rows")
    plan.save(dataset.path / "plans")
    (folder / "rows.jsonl").unlink()


def _run(folder: Path, data: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(data / "dataset", folder / "dataset")
    shutil.copyfile(data / ".dataset.progress.jsonl", folder / "progress.jsonl")
    stages = {"prepare": 1.0, "capture": 2.5}
    (folder / "run.json").write_text(json.dumps({"settings": {"name": "x"}, "seconds": stages, "stages": list(stages)}))
    student = {
        "label": "plan", "steps": 4, "params": 1000, "metrics": "students/plan/metrics.jsonl",
        "overall": {"nll": 3.0, "kl": 0.5},
        "domains": {"code": {"nll": 3.0, "kl": 0.5, "tokens": 9, "teacher_nll": 2.5}},
        "samples": [{"domain": "code", "prompt": "a", "text": "b"}],
    }  # fmt: skip
    results = {
        "format": 1, "name": "x", "students": {"plan": student, "text": {**student, "label": "text"}},
        "settings": {"name": "x"}, "machine": {"cpu": "x"}, "stages": [{"name": "capture", "tokens": 5, "seconds": 2.0}],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "students/plan").mkdir(parents=True)
    write_jsonl(
        folder / "students/plan/metrics.jsonl", [{"step": n, "loss": 3.0 / n, "tokens": n} for n in range(1, 9)]
    )


def _corpora(folder: Path) -> None:
    rows = rows_of_text(6)
    table = pa.Table.from_pylist(rows)

    def place(name: str, file: str) -> Path:
        (folder / name / "corpus").mkdir(parents=True)
        return folder / name / "corpus" / file

    write_jsonl(place("jsonl", "rows.jsonl"), rows)
    place("json", "rows.json").write_text(json.dumps(rows, indent=1))
    pq.write_table(table, place("parquet", "rows.parquet"))
    with pa.ipc.new_file(place("arrow", "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pa.ipc.new_stream(place("stream", "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    pacsv.write_csv(table, place("csv", "rows.csv"))
    write_jsonl(place("chats", "chats.jsonl"), CHATS)
    pq.write_table(pa.Table.from_pylist(CHATS), place("chat-parquet", "chats.parquet"))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    place("gz", "rows.jsonl.gz").write_bytes(gzip.compress(content))
    with pa.output_stream(str(place("zst", "rows.jsonl.zst")), compression="zstd") as out:
        out.write(content)
    place("csv-gz", "rows.csv.gz").write_bytes(gzip.compress((folder / "csv/corpus/rows.csv").read_bytes()))


def _peers(folder: Path, dataset: Path) -> None:
    from kdata.share.interchange.exporter import export_dataset

    for name in ("plain", "axolotl", "distillkit", "plain-jsonl", "vllm", "nemo"):
        (folder / name / "peer").mkdir(parents=True)
    layouts.nemo(folder / "nemo/peer")
    for name in ("plain", "axolotl"):
        export_dataset(kdata.open(dataset), folder / name / f"peer/{name}.parquet", name)  # type: ignore[arg-type]
    write_jsonl(
        folder / "plain-jsonl/peer/plain.jsonl",
        pq.read_table(folder / "plain/peer/plain.parquet").slice(0, 3).to_pylist(),
    )
    write_jsonl(folder / "vllm/peer/vllm.jsonl", [VLLM, {**VLLM, "request_id": "b"}])
    settings = {"d": 300, "k": 2, "exact_k": 2, "residual_bins": [], "delta_encoding": False}
    (folder / "distillkit/peer/compression_config.yaml").write_text(yaml.safe_dump(settings))
    logprobs = np.log(np.array([[0.5, 0.25]] * 3, np.float32)).view(np.uint8).reshape(3, -1)
    ids = [[0, 128, 128], [0, 0, 64], [1, 0, 192]]  # two ids of 9 bits each, the high bits first: 1 2, 0 1, 2 3
    table = {"input_ids": [[2, 3, 4, 5]], "compressed_logprobs": [logprobs.tolist()], "bytepacked_indices": [ids]}
    pq.write_table(pa.table(table), folder / "distillkit/peer/distillkit.parquet")


def _checkpoint(folder: Path) -> None:
    import torch

    from kdata.trainer.checkpoint import CheckpointState, Progress, save_checkpoint
    from kdata.trainer.distributed import Ranks
    from kdata.trainer.optimizers import Optimizer

    model = torch.nn.Linear(4, 3)
    optimizer = Optimizer(torch.optim.AdamW(model.parameters()))
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    folder.mkdir()
    data = {"epoch": 0, "place": 3}
    state = CheckpointState(step=2, progress=Progress(step=2, tokens=12), data=data, settings=SETTINGS)
    save_checkpoint(folder / "checkpoints", model, optimizer, state, Ranks(torch.device("cpu")))
    write_jsonl(folder / "metrics.jsonl", [{"step": n, "loss": 1.0} for n in range(1, 4)])


# ------------------------------------------------------------------------------------------------------------- the case


def read(name: str, case: str, examples: str) -> int:
    """The child: read a changed example. What is not a KdataError ends as a traceback."""
    EXAMPLES[0] = Path(examples)
    try:
        TARGETS[name].read(Path(case))
    except KdataError as error:
        print(f"refused: {type(error).__name__}: {error}")
        if not str(error).strip():
            raise AssertionError("the error has no message") from error
        return 0
    print("read")
    return 0


def begin(examples: str) -> None:
    """In a child that cases share, before the first: what many of them start, so that none seems to leave it behind."""
    read_rows(Path(examples) / "data")
    read_sql(Path(examples) / "data")
    read_report(Path(examples) / "run")  # opens the fonts of matplotlib
    if importlib.util.find_spec("cv2"):  # sets LD_LIBRARY_PATH; transformers imports it where it is installed
        importlib.import_module("cv2")
    _quick_templates()


def _quick_templates() -> None:
    """A process for chat templates that ends soon where one takes long: starting it again takes long enough."""
    from kdata.corpus import chat_template
    from kdata.corpus.template_process import TemplateProcess
    from kdata.pipelines import rounds

    if not (isinstance(chat_template.RENDERER, TemplateProcess) and chat_template.RENDERER._cpu_sec == TEMPLATE_SEC):
        chat_template.RENDERER = rounds.RENDERER = TemplateProcess(cpu_sec=TEMPLATE_SEC)
        chat_template.RENDERER.check("{{ messages }}")


class Fuzz(Campaign):
    """Readers of files that somebody else may have written, with hostile and damaged files."""

    name = "fuzz"
    shares = True
    read = staticmethod(read)  # what a child does with a changed example

    def __init__(self, only: str = "") -> None:
        super().__init__()
        self._names = [name for name, target in TARGETS.items() for _ in range(target.weight) if only in name]

    def prepare(self, folder: Path, seed: int) -> None:
        """See `Campaign.prepare`."""
        self._examples = folder / "examples"
        make_examples(self._examples)
        self.first = functools.partial(begin, str(self._examples))

    def run(self, number: int, rng: random.Random, folder: Path) -> Outcome:
        """See `Campaign.run`."""
        name = rng.choice(self._names)
        target = TARGETS[name]
        case = folder / "case"
        shutil.copytree(self._examples / target.example, case)
        file = rng.choice(sorted(case.glob(target.files)))
        target.change(file, rng)
        if rng.random() < NO_FILE:
            mutations.no_file(file, rng)
        before = {path.name for path in folder.iterdir()}
        ended = self.child(self.read, name, str(case), str(self._examples))
        problem = ended.complaint()
        stray = sorted({path.name for path in folder.iterdir()} - before)
        if problem is None and stray:
            problem = f"it left files beside the case: {stray}"
        return Outcome(name, problem and f"{file.relative_to(case)}: {problem}")


if __name__ == "__main__":
    sys.exit(main(Fuzz))
