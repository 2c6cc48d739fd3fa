"""What push looks at before it publishes: it stops, flags or skips, and what is shared says so. Croissant metadata."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kdata
from kdata.check.verify import verify
from kdata.errors import ConfigError, DataError
from kdata.format.schema import index_schema
from kdata.pipelines.cli.main import app
from kdata.share import fitness as module
from kdata.share.card import HUB_LICENSES
from kdata.share.croissant import CONTEXT, MOST_FILES
from kdata.share.fitness import CHECKS, About, Finding, fitness, terms
from kdata.share.publication import publication
from kdata.share.push import push
from tests.fakes import run_capture
from tests.kdata.share.test_card import make_dataset


def write_corpus(path: Path, texts: list[str], **fields: str) -> Path:
    rows = [{"id": f"r{n}", "domain": "web", "text": text, **fields} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def of(dataset: kdata.Dataset, check: str, **about: Any) -> list[Finding]:
    return [finding for finding in fitness(dataset, About(**about)).findings if finding.check == check]


def test_every_line_of_the_table_has_a_verdict_a_reason_and_a_source() -> None:
    for kind, lines in terms().items():
        ids = [one for line in lines for one in line["ids"]]
        assert len(ids) == len(set(ids)), f"{kind}: an id stands in two lines"
        for line in lines:
            assert line["verdict"] in ("free", "keep", "ask", "stop") and line["why"]
            assert re.fullmatch(r"https://[\w.-]+/\S*", line["source"])
            assert line["seen"] in ("text", "quoted", "general")
            re.compile(line.get("names", ""))
    texts = {one for line in terms()["text"] for one in line["ids"]}
    models = {"llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "gemma", "openrail", "cc", "unknown"}
    assert HUB_LICENSES - texts <= models, "each license of the Hub that a text may have is in the table"


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("meta-llama/Llama-2-7b-hf", "stop"),
        ("meta-llama/Meta-Llama-3-8B", "stop"),
        ("meta-llama/Llama-3.1-8B-Instruct", "keep"),
        ("meta-llama/Llama-3.2-1B", "keep"),
        ("google/gemma-3-270m", "ask"),
        ("gemma3-270m-q4_k_m.gguf", "ask"),
        ("Qwen/Qwen2.5-72B-Instruct", "keep"),
        ("Qwen/Qwen2.5-3B", "ask"),
        ("Qwen/Qwen2-72B-Instruct", "stop"),
        ("Qwen/Qwen1.5-7B", "stop"),
        ("Qwen/Qwen-7B-Chat", "stop"),
        ("Qwen/Qwen2-7B", "ask"),
        ("openai/gpt-4o", "stop"),
        ("gpt-3.5-turbo-instruct", "stop"),
        ("claude-3-opus", "stop"),
        ("openai-community/gpt2", "ask"),
        ("EleutherAI/gpt-j-6b", "ask"),
        ("openai/gpt-oss-20b", "ask"),
        ("Qwen/Qwen3-8B", "ask"),
        ("mine", "ask"),
    ],
)
def test_a_teacher_is_known_by_its_name_where_nobody_states_its_license(
    tmp_path: Path, name: str, verdict: str
) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, per_domain=1, generate=False, model=name)
    *_, finding = of(dataset, "licenses")
    assert finding.level == verdict and name in finding.what
    assert finding.source is not None or "not stated" in finding.what
    *_, stated = of(dataset, "licenses", teacher_license="Apache-2.0")
    assert stated.level == "free", "what is stated counts"
    *_, unknown = of(dataset, "licenses", teacher_license="my own")
    assert unknown.level == "ask" and "my own is not in the table" in unknown.what


@pytest.mark.parametrize(
    ("license", "level"),
    [("CC0-1.0", "free"), ("MIT", "keep"), ("cc-by-nc-4.0", "ask"), ("CC-BY-ND-4.0", "ask"), (None, "ask"), ("x y", "ask"),
     ("GPL-3.0", "keep"), ("All rights reserved", "stop")],
)  # fmt: skip
def test_the_licenses_of_the_texts(tmp_path: Path, license: str | None, level: str) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, per_domain=3, generate=False, license=license)
    first, _ = of(dataset, "licenses")
    assert first.level == level and first.what.startswith("3 rows")


def test_what_is_against_sharing_stops_and_can_be_skipped_by_its_name(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, license="proprietary", model="meta-llama/Llama-2-7b-hf")
    with pytest.raises(DataError, match=r"was not shared:\n  licenses: 24 rows(.|\n)*Llama-2(.|\n)*--skip licenses"):
        push(dataset, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()
    arguments = ["push", str(dataset.path), str(tmp_path / "shared"), "--skip", "licenses", "--language", "en"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    record = json.loads((tmp_path / "shared/audit.json").read_text())
    assert record["about"]["skip"] == ["licenses"] and record["dataset"] == dataset.content_digest
    card = (tmp_path / "shared/README.md").read_text()
    assert "| licenses | skipped | not looked at: whoever shared this skipped it |" in card
    assert "language:\n- en\n" in card
    assert verify(kdata.open(tmp_path / "shared")) == []


def test_bad_settings_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"no check 'license'.*did you mean 'licenses'"):
        About(skip=("license",))
    with pytest.raises(ConfigError, match=r"language 'English' is no ISO 639 code"):
        About(languages=("English",))
    with pytest.raises(ConfigError, match="license is empty"):
        About(teacher_license=" ")


def test_all_checks_can_be_skipped(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, license="proprietary")
    findings = fitness(dataset, About(skip=CHECKS, closed_teacher=True)).findings
    assert [(one.check, one.level) for one in findings] == [(check, "skipped") for check in CHECKS]


def test_personal_data_is_flagged_in_a_sample_of_the_texts(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("re2")
    texts = [f"the cat {n}" for n in range(6)] + ["mail jane.doe@gmail.com"] * 2
    dataset = run_capture(tmp_path / "d", write_corpus(tmp_path / "c.jsonl", texts), tokenizer_dir)
    [found] = of(dataset, "personal")
    assert found.level == "ask" and found.what.startswith("2 rows hold some (email in 2), of 8 of 8 rows")
    monkeypatch.setattr(module, "PERSONAL_ROWS", 3)
    [few] = of(dataset, "personal")
    assert "3 of 8 rows" in few.what and of(dataset, "personal") == [few], "the same rows each time"
    clean = make_dataset(tmp_path / "clean", {"code": 2.0})
    assert [one.level for one in of(clean, "personal")] == ["free"]


def test_personal_data_without_the_packages_is_said_not_to_be_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdata.errors import DependencyError

    def missing(text: str) -> list[Any]:
        raise DependencyError("needs google-re2")

    monkeypatch.setattr(module, "personal_of", missing)
    [found] = of(make_dataset(tmp_path / "d", {"code": 2.0}), "personal")
    assert found.level == "unknown" and "google-re2" in found.what


def test_a_closed_teacher_needs_draws_by_context(tmp_path: Path, tokenizer_dir: Path) -> None:
    corpus = write_corpus(tmp_path / "c.jsonl", [f"You are a helper. {n}" for n in range(8)])
    by_text = run_capture(tmp_path / "a", corpus, tokenizer_dir, kind="threshold", threshold=0.1)
    by_context = run_capture(tmp_path / "b", corpus, tokenizer_dir, kind="threshold", threshold=0.1, draws_by="context")
    top = run_capture(tmp_path / "c", corpus, tokenizer_dir, kind="topk", k=4)
    assert [one.level for one in of(by_text, "leakage")] == ["skipped"], "nobody said that it is closed"
    first, second = of(by_text, "leakage", closed_teacher=True)
    assert first.level == "stop" and "draws_by=context" in first.what and "output projection" in second.what
    for dataset in (by_context, top):
        [only] = of(dataset, "leakage", closed_teacher=True)
        assert "output projection, all rows" in only.what
    with pytest.raises(DataError, match="--skip leakage"):
        push(by_text, tmp_path / "shared", about=About(closed_teacher=True))


def test_the_audit_of_a_closed_teacher_reads_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0}, per_domain=40)
    monkeypatch.setattr(module, "AUDIT_TOKENS", dataset.num_tokens // 4)
    [found] = of(dataset, "leakage", closed_teacher=True)
    assert "20 of 80 rows" in found.what


# ---------------------------------------------------------------------------------------------------- croissant


def page_of(dataset: kdata.Dataset, **about: Any) -> dict[str, Any]:
    page: dict[str, Any] = json.loads(publication(dataset, About(**about))["croissant.json"])
    return page


def test_croissant_describes_the_files_and_every_column(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", {"code": 2.0, "prose": 3.0}, license="MIT")
    page = page_of(dataset, languages=("en",), url="https://example.org/d")
    assert page["@context"] == CONTEXT and page["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    assert (page["license"], page["url"], page["inLanguage"]) == ("mit", "https://example.org/d", ["en"])
    files = {one["contentUrl"]: one for one in page["distribution"] if one["@type"] == "cr:FileObject"}
    committed = {path: about for entry in dataset.manifest for path, about in entry.files.items()}
    assert {path: one["sha256"] for path, one in files.items()} == {p: about.sha256 for p, about in committed.items()}
    sets = {one["@id"]: one["includes"] for one in page["distribution"] if one["@type"] == "cr:FileSet"}
    assert {
        path.relative_to(dataset.path).as_posix() for glob in sets.values() for path in dataset.path.glob(glob)
    } == set(files)
    [records] = page["recordSet"]
    assert [one["source"]["extract"]["column"] for one in records["field"]] == index_schema().names
    assert {one["source"]["fileSet"]["@id"] for one in records["field"]} == {"index-files"} <= set(sets)
    identifiers = [one["@id"] for one in [*page["distribution"], records, *records["field"]]]
    assert len(identifiers) == len(set(identifiers)) and records["key"]["@id"] in identifiers
    assert page_of(dataset, languages=("en",), url="https://example.org/d") == page
    assert len(files) < MOST_FILES


def test_many_files_are_patterns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdata.share.croissant.MOST_FILES", 1)
    page = page_of(make_dataset(tmp_path / "d", {"code": 2.0}))
    assert {one["@type"] for one in page["distribution"]} == {"cr:FileSet"} and "url" not in page


def test_the_reader_of_croissant_reads_the_index(tmp_path: Path) -> None:
    """mlcroissant (Apache-2.0), where it is installed: no errors, and the rows."""
    mlcroissant = pytest.importorskip("mlcroissant")
    dataset = make_dataset(tmp_path / "d", {"code": 2.0})
    push(dataset, tmp_path / "shared", about=About(url="https://example.org/d"))
    read = mlcroissant.Dataset(jsonld=str(tmp_path / "shared/croissant.json"))
    assert not read.metadata.issues.errors
    assert sorted(row["index/id"].decode() for row in read.records("index")) == sorted(row.id for row in dataset)
