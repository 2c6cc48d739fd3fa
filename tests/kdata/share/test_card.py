"""The card: its numbers are right, hostile strings are shown as text, notes stay, and the Hub's reader opens the dataset."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

import kdata
from kdata.errors import ConfigError
from kdata.format.files import journal_of
from kdata.format.kept import Kept
from kdata.format.manifest import new_info
from kdata.format.records import Record, Reject, UnitResult
from kdata.format.schema import CodecInfo, SourceInfo, TeacherInfo, TokenizerInfo
from kdata.jobs.reading import CaptureConfig
from kdata.observe.energy import Devices
from kdata.observe.journal import append, last_lines, read_journal
from kdata.observe.progress import Task
from kdata.observe.text import human_bytes, number
from kdata.pipelines.cli.main import app
from kdata.selection.plan import make_plan
from kdata.share.card import (
    SOURCE_WORDS,
    Said,
    card_page,
    codec_error,
    command_of,
    escape_markdown,
    facts,
    write_card,
)
from kdata.share.card import (
    Record as Looks,
)
from kdata.store.writer import Writer
from tests.fakes import run_capture

HOSTILE = "<script>alert(1)</script>|`rm`\n# **x** [a](http://evil.example) $&amp;"
BEGIN, END = "<!-- notes: begin -->", "<!-- notes: end -->"


def record(name: str, domain: str, nll: float, rng: np.random.Generator, **fields: str | None) -> Record:
    """Twenty tokens at this NLL, give or take; four kept entries that hold about 0.9."""
    tokens = 20
    recorded = np.arange(tokens) > 0
    top = np.sort(rng.dirichlet(np.full(4, 0.8), tokens), axis=1)[:, ::-1] * rng.uniform(0.8, 0.99)
    ids = np.argsort(rng.random((tokens, 50)), axis=1)[:, :4].astype(np.int32)
    kept = Kept.top(ids, np.log(top + 1e-9).astype(np.float32), recorded)
    logprob = np.where(recorded, -nll - rng.normal(0, 0.1, tokens), np.nan).astype(np.float32)
    tail = np.where(recorded, np.log(1 - top.sum(1)), np.nan).astype(np.float32)
    return Record(
        id=name,
        domain=domain,
        token_ids=rng.integers(0, 50, tokens).astype(np.int32),
        target_mask=recorded,
        logprob=logprob,
        rank=recorded.astype(np.int32),
        log_tail=tail,
        entropy=np.full(tokens, np.nan, np.float32),
        kept=kept,
        text=f"text of {name}",
        **fields,  # type: ignore[arg-type]
    )


def make_dataset(
    root: Path,
    domains: dict[str, float],
    *,
    per_domain: int = 12,
    model: str = "tiny-teacher",
    license: str | None = "Apache-2.0",
    generate: bool = True,
    rejects: tuple[Reject, ...] = (),
    finish: bool = True,
) -> kdata.Dataset:
    """A dataset with sources capture and (optionally) generate; `domains`: the teacher's mean NLL of each."""
    rng = np.random.default_rng(0)
    info = new_info(
        format_version="1.0",
        vocab_size=50,
        teacher=TeacherInfo(
            model=model,
            revision=None,
            weights_hash="a" * 64,
            backend="fake",
            backend_version="1",
            dtype="float32",
            logprobs="raw log-softmax at temperature 1",
            deterministic=True,
        ),
        tokenizer=TokenizerInfo(hash="b" * 64, chat_template_hash=None, bos_id=0, eos_id=1),
        codec=CodecInfo(id="plain", version=1, kind="topk", parameters={"k": 4}),
        tail="ghost",
    )
    works = [("capture", 0.0)] + ([("generate", -0.6)] if generate else [])
    for kind, shift in works:
        source = SourceInfo(kind=kind, settings={"k": 4, "corpus": {"name": HOSTILE}}, num_units=None)
        with Writer(root, info, kind, source) as writer:
            for unit, (domain, nll) in enumerate(domains.items()):
                records = [
                    record(
                        f"{kind}-{unit}-{i}",
                        domain,
                        nll + shift + rng.normal(0, 0.4),
                        rng,
                        license=license,
                        origin=f"o{i % 3}",
                    )
                    for i in range(per_domain)
                ]
                refused = list(rejects) if kind == "capture" and unit == 0 else []
                writer.commit(UnitResult(unit, records, refused))
            if finish:
                writer.finish(len(domains))
    return kdata.open(root)


def header_of(card: str) -> dict:
    """The YAML between the first two lines of dashes."""
    return yaml.safe_load(card.split("---\n")[1])


def test_facts_are_the_numbers_of_the_rows(tmp_path: Path) -> None:
    refused = (
        Reject("r0", "code", "empty", "the text is empty"),
        Reject("r1", None, "empty", "the text is empty"),
    )
    dataset = make_dataset(tmp_path / "d", {"code": 2.0, "prose": 4.0}, rejects=refused)
    numbers = facts(dataset)
    index = dataset.index().to_pylist()
    assert (numbers.rows, numbers.tokens, numbers.target_tokens, numbers.shards) == (48, 48 * 20, 48 * 19, 4)
    by_name = {d["name"]: d for d in numbers.domains}
    for domain in ("code", "prose"):
        expected = np.mean([r["nll"] for r in index if r["domain"] == domain])
        assert by_name[domain]["nll"] == pytest.approx(expected)
        assert by_name[domain]["num_rows"] == 24
    assert by_name["code"]["entropy"] is None
    assert [(r["reason"], r["num_rows"]) for r in numbers.rejects] == [("empty", 2)]
    assert numbers.payload_bytes == sum(p.stat().st_size for p in (tmp_path / "d" / "data").iterdir())


def test_codec_error_is_weighted_and_bounded(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, generate=False)
    [entry] = dataset.manifest
    assert entry.codec_error is not None
    error = codec_error(dataset)
    assert error is not None
    assert error.model_dump() == pytest.approx(entry.codec_error.model_dump())
    assert error.max_sum <= 1


def test_header_names_only_the_parquet_index(tmp_path: Path) -> None:
    card = write_card(make_dataset(tmp_path / "d", {"code": 2.0})).read_text()
    header = header_of(card)
    assert header["license"] == "apache-2.0"
    assert header["tags"] == ["logits", "distillation", "kdata"]
    assert header["size_categories"] == ["n<1K"]
    assert header["configs"] == [
        {"config_name": "index", "default": True, "data_files": [{"split": "train", "path": "index/*.parquet"}]}
    ]
    assert header["task_categories"] == ["text-generation"]
    assert "language" not in header


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        (None, {"license": "unknown"}),
        ("PSF-2.0", {"license": "other", "license_name": "psf-2.0"}),
        ("x\n---\nevil: 1", {"license": "other", "license_name": "x-evil-1"}),
    ],
)
def test_the_license_in_the_header(tmp_path: Path, license: str | None, expected: dict) -> None:
    header = header_of(write_card(make_dataset(tmp_path / "d", {"code": 2.0}, license=license)).read_text())
    assert {k: v for k, v in header.items() if k.startswith("license")} == expected
    assert "evil" not in header


def test_the_card_needs_no_client_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    with_client = write_card(dataset).read_bytes()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    assert write_card(dataset).read_bytes() == with_client


def test_the_header_is_what_the_hub_s_client_reads(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.DatasetCard.load(write_card(make_dataset(tmp_path / "d", {"code": 2.0}))).data
    assert (data.license, data.size_categories, data.pretty_name) == (
        "apache-2.0",
        ["n<1K"],
        "What tiny-teacher believed, token by token",
    )


def test_the_header_is_valid_for_the_hub_s_client(tmp_path: Path) -> None:
    """Each field is one that DatasetCardData has, and comes back as it was written."""
    hub = pytest.importorskip("huggingface_hub")
    record = Looks(about=Said(languages=["en", "de"]))
    header = header_of(card_page(make_dataset(tmp_path / "d", {"code": 2.0}), record=record).decode())
    assert header["language"] == ["en", "de"]
    data = hub.DatasetCardData(**header)
    assert set(header) - {"configs", "tags"} <= set(inspect.signature(hub.DatasetCardData.__init__).parameters)
    assert data.to_dict() == header


def test_every_column_of_the_format_is_described(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    card = write_card(dataset).read_text()
    for name in dataset.index().column_names:
        assert f"| `{name}` |" in card
    assert "| `nll` | `float64` |" in card
    assert "| `input_ids` | `list<int32>` |" in card


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    refused = (Reject("r", HOSTILE, HOSTILE, HOSTILE),)
    dataset = make_dataset(
        tmp_path / "d", {HOSTILE: 2.0, f"{BEGIN}x{END}": 3.0}, model=HOSTILE, license=HOSTILE, rejects=refused
    )
    card = write_card(dataset).read_text()
    body = card.split("---\n", 2)[2]
    assert "<script" not in card
    assert not re.search(r"(?<!\\)\[a(?<!\\)\]", body)
    assert "`rm`" not in body
    assert card.count(BEGIN) == card.count(END) == 1
    tables = [line for line in body.splitlines() if line.startswith("|") and "alert" in line]
    assert tables
    # A pipe from data never makes a column: lines of a table agree with its head.
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_hostile_records_stay_text(tmp_path: Path) -> None:
    """audit.json of a copy is a stranger's: what is no record is passed over, what is one is shown as text."""
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    plain = card_page(dataset)
    for content in (
        "",
        "[]",
        "{",
        '{"findings": 3}',
        '{"about": []}',
        json.dumps({"dataset": "other", "findings": []}),
    ):
        (dataset.path / "audit.json").write_text(content)
        assert card_page(dataset) == plain
    finding = {"check": HOSTILE, "level": HOSTILE, "what": HOSTILE, "source": HOSTILE}
    about = {"teacher_license": HOSTILE, "languages": [HOSTILE]}
    record = {"dataset": dataset.content_digest, "about": about, "findings": [finding] * 101}
    (dataset.path / "audit.json").write_text(json.dumps(record))
    card = card_page(dataset).decode()
    body = card.split("---\n", 2)[2]
    assert "<script" not in body and "`rm`" not in body and "1 more are in audit.json" in card
    assert header_of(card)["language"] == [HOSTILE]
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_the_command_that_makes_it_again_gives_the_same_settings(
    tmp_path: Path, corpus_file: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in the card is read by the command line itself, and names every setting of the source."""
    from kdata.pipelines.cli import make

    settings: list[CaptureConfig] = []

    class Stop(Exception):
        pass

    def stop(config: CaptureConfig, corpus: object) -> None:
        settings.append(config)
        raise Stop

    dataset = run_capture(tmp_path / "d", corpus_file, tokenizer_dir, kind="hybrid", num_draws=5, temperatures=[2.0])
    page = card_page(dataset).decode()
    block = page.split("**Make it again:**\n\n")[1].split("\n\n")[0]
    assert all(line.startswith("    ") and len(line) < 120 for line in block.splitlines())
    words = shlex.split(block.replace("\\\n", "").replace("TEXTS", str(corpus_file)))
    assert words[:3] == ["kdata", "capture", "OUT"]
    monkeypatch.setattr(make, "CaptureJob", stop)
    outcome = CliRunner().invoke(app, words[1:])
    assert isinstance(outcome.exception, Stop), outcome.output
    [config] = settings
    recorded = dataset.info.sources["capture"].settings
    assert config.settings() == {k: v for k, v in recorded.items() if k in config.settings()}
    for name in ("unit_tokens", "max_tokens", "long_text", "targets", "append_eos", "tool_call_targets"):
        assert getattr(config, name) == recorded[name]


@pytest.mark.parametrize("value", ["a`b", "a\nb", "<script>", "$(rm)", "a" * 201, "a;b", "it's"])
def test_a_command_has_plain_words_alone(tmp_path: Path, value: str) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, generate=False, model=value)
    source = SourceInfo(kind="capture", settings={value: value}, num_units=None)
    command = command_of(source, dataset.info)
    assert command == "kdata capture OUT --teacher ... --corpus TEXTS --set ...=..."


def test_plans_with_positions_say_what_counts_of_each_domain(tmp_path: Path) -> None:
    """Domains of any text stay text."""
    dataset = make_dataset(tmp_path / "d", {"a": 2.0, HOSTILE: 3.0}, per_domain=2)
    ids = dataset.index(["id"])["id"].to_pylist()
    make_plan(dataset, "plain", ids, method="mine", parameters={}).save(dataset.path / "plans")
    few = {"a": [1, 2], HOSTILE: [5]}
    positions = [few[row.domain] for row in dataset]
    make_plan(dataset, "few", ids, method="mine", parameters={}, positions=positions).save(dataset.path / "plans")
    card = write_card(dataset).read_text()
    assert "Plan few counts 12 of the 152 target positions of its rows, by the rule mine:" in card
    assert " 5.3%, a 10.5%." in card and "Plan plain" not in card and "<script" not in card


def test_escape_shows_exactly_the_text() -> None:
    assert escape_markdown("a|b`c<d>&_e_\n# [x](y) \\ 'q'") == (
        r"a&#124;b&#96;c&#60;d&#62;&#38;\_e\_ \# \[x\](y) \\ &#39;q&#39;"
    )
    assert escape_markdown("a\u202eb\x00c") == "a b c"
    assert escape_markdown(None) == "not stated"


def test_notes_are_kept_byte_for_byte(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    path = write_card(dataset)
    notes = f"\r\nMine: ünïcode \xa0, a stray {END} too\r\n\r\n\t".encode() + b"\xff\xfe not UTF-8"
    before, rest = path.read_bytes().split(BEGIN.encode())
    after = rest.split(END.encode())[1]
    path.write_bytes(before.replace(b"Rejects", b"scribbled") + BEGIN.encode() + notes + END.encode() + after)
    write_card(kdata.open(dataset.path), title="Another title")
    content = path.read_bytes()
    assert BEGIN.encode() + notes + END.encode() in content
    assert b"# Another title" in content
    assert b"scribbled" not in content


def test_a_readme_that_is_not_a_card_is_not_overwritten(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    (dataset.path / "README.md").write_text("by hand")
    with pytest.raises(ConfigError, match="notes marks"):
        write_card(dataset)
    assert (dataset.path / "README.md").read_text() == "by hand"


def test_equal_datasets_have_equal_cards_in_any_folder(tmp_path: Path) -> None:
    first = write_card(make_dataset(tmp_path / "one", {"code": 2.0, "prose": 3.0})).read_bytes()
    second = write_card(make_dataset(tmp_path / "two", {"code": 2.0, "prose": 3.0})).read_bytes()
    assert first == second
    write_card(kdata.open(tmp_path / "one"))
    assert (tmp_path / "one" / "README.md").read_bytes() == first


def test_the_card_of_an_empty_and_of_an_unfinished_dataset(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {})
    text = write_card(dataset).read_text()
    assert "0 sequences" in text
    assert "license" not in header_of(text)
    unfinished = make_dataset(tmp_path / "u", {"code": 2.0}, finish=False)
    assert "**not finished**" in write_card(unfinished).read_text()


def test_the_hub_reader_opens_index_and_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    dataset = make_dataset(tmp_path / "d", {"code": 2.0, "prose": 3.0})
    write_card(dataset)
    cache = str(tmp_path / "cache")
    place = str(dataset.path)
    index = datasets.load_dataset(place, split="train", cache_dir=cache)
    named = datasets.load_dataset(place, "index", split="train", cache_dir=cache)
    payload = datasets.load_dataset(place, data_dir="data", split="train", cache_dir=cache)
    assert len(index) == len(payload) == dataset.num_rows
    assert index["id"] == named["id"] and index["id"][:3] == payload["id"][:3]
    assert "entry_ids" in payload.column_names
    tokens = payload.select_columns(["id", "input_ids", "target_mask"])
    assert tokens[0]["input_ids"] == dataset[0].token_ids.tolist()
    for how, own in (({"name": "index"}, index), ({"data_dir": "data"}, payload)):
        stream = datasets.load_dataset(place, split="train", streaming=True, cache_dir=cache, **how)
        assert [row["id"] for row in stream] == own["id"][:]
    stream = datasets.load_dataset(place, data_dir="data", split="train", streaming=True, cache_dir=cache)
    assert next(iter(stream.select_columns(["id", "input_ids", "target_mask"]))) == tokens[0]


def test_the_costs_are_from_the_log_beside_the_dataset(tmp_path: Path) -> None:
    from kdata.share.push import push

    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    bare = write_card(dataset).read_text()
    assert "## What it took" not in bare
    log, cores = journal_of(dataset.path), Devices(kind="cpu", count=2, name="CPU core")
    for name, tokens in (("capture: reading", 1000), ("capture: reading", 234), ("other: reading", 9)):
        with Task(name, 10, "documents", log, cores, source=name.split(":")[0]) as task:
            task.advance(5, tokens=tokens)
    lines = [
        line.model_copy(update={"seconds": 90.0, "busy_seconds": 10.0, "energy_joules": 1800.0})
        for line in last_lines(read_journal(log))
    ]
    log.unlink()
    for line in lines:
        append(log, line)
    card = write_card(dataset).read_text()
    there = sum(entry.tokens for entry in dataset.manifest if entry.source == "capture")
    row = f"| capture | {there} | 62 | 3 min 00 s | 0.1000 (2 CPU cores) | 1 Wh |"
    assert row in card and "| other" not in card and "| generate | " not in card.split("## What it took")[1]
    assert re.sub(r"## What it took\n.*?(?=## )", "", card, flags=re.DOTALL) == bare
    push(dataset, str(tmp_path / "shared"))
    assert row in (tmp_path / "shared" / "README.md").read_text(), "a copy keeps what its log, which stays behind, said"
    append(log, lines[0].model_copy(update={"pid": 1, "energy_joules": None}))
    assert "| 0.1500 (2 CPU cores) | not reported by this device |" in write_card(dataset).read_text()


def test_numbers_as_text() -> None:
    assert [human_bytes(v) for v in (0, 999, 1000, 123_456, 5e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "123 kB",
        "5 GB",
    ]
    assert [number(v) for v in (1.23456, None, float("nan"), float("inf"), True, "9")] == ["1.235", *"—————"]


def test_every_kind_of_source_has_words() -> None:
    assert set(SOURCE_WORDS) == set(get_args(SourceInfo.model_fields["kind"].annotation))
