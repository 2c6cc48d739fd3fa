"""The command line: the library's work, and for every mistake one clear line, status 1, and no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdata.errors import DependencyError, KdataError
from kdata.pipelines.cli.main import app
from kdata.teachers.config import TeacherConfig
from kdata.teachers.load import load_teacher
from kdata.teachers.model import load_tokenizer
from tests.fakes import CHATML, rows_of_text, save_llama, save_tokenizer, write_jsonl

RUNNER = CliRunner(env={"COLUMNS": "200"})
ROOT = Path(__file__).resolve().parents[3]


def call(*arguments: object) -> str:
    """Run a command that succeeds and return what it prints."""
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, llama_dir: Path) -> Path:
    """A dataset made by the commands alone, with a real (tiny) model."""
    folder = tmp_path_factory.mktemp("cli")
    corpus = write_jsonl(folder / "c.jsonl", rows_of_text(10))
    prompts = write_jsonl(folder / "p.jsonl", [{"id": "p", "domain": "prose", "prompt": "the cat"}])
    root, teacher = folder / "d", ("--teacher", llama_dir, "--backend", "transformers", "--kind", "hybrid", "--k", 8)
    out = call("generate", root, *teacher, "--prompts", prompts, "--max-tokens", 4)
    assert "1 rows" in out
    assert "11 rows" in call("capture", root, *teacher, "--corpus", corpus, "--set", "unit_tokens=100")
    assert "covers 11 rows" in call("score", root, "--model", llama_dir)
    assert "6 rows" in call("select", root, "--method", "difference", "--share", "0.5").replace("plan difference: ", "")
    return root


def test_the_commands_make_and_read_a_dataset(dataset: Path, tmp_path: Path) -> None:
    assert "whole: " in call("verify", dataset, "--deep")
    shown = call("info", dataset)
    assert "capture: yes, generate: yes" in shown and "transformers" in shown
    rows = json.loads(
        call("sql", dataset, "select domain, count(*) as n from rows group by 1 order by 1", "--format", "json")
    )
    assert rows == [{"domain": "code", "n": 5}, {"domain": "prose", "n": 6}]
    assert "domain" in call("sql", dataset, "select domain, count(*), avg(nll) from rows group by 1")
    assert json.loads(call("sql", dataset, "select count(*) as n from plans.difference", "--format", "json")) == [
        {"n": 6}
    ]
    assert "pushed to" in call("push", dataset, tmp_path / "shared")
    assert (tmp_path / "shared/README.md").exists()


def test_a_second_capture_changes_nothing(dataset: Path, llama_dir: Path) -> None:
    from tests.fakes import digests

    before = digests(dataset)
    corpus = dataset.parent / "c.jsonl"
    call("capture", dataset, "--teacher", llama_dir, "--backend", "transformers", "--kind", "hybrid", "--k", 8,
         "--corpus", corpus,
         "--set", "unit_tokens=100", "--resume", "must")  # fmt: skip
    assert digests(dataset) == before


def test_chats_are_captured_and_continued_by_the_commands(tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "llama")
    save_tokenizer(llama, chat_template=CHATML)
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    file = write_jsonl(
        tmp_path / "chats.jsonl", [{"domain": "chat", "messages": messages, "text": "t", "chat": messages[:1]}]
    )
    common = ("--teacher", llama, "--backend", "transformers", "--kind", "hybrid", "--k", 8)
    call("capture", tmp_path / "d", *common, "--corpus", file, "--messages-column", "messages", "--targets", "last_assistant",
         "--set", "corpus.id_column=null")  # fmt: skip
    call("generate", tmp_path / "d", *common, "--prompts", file, "--messages-column", "chat", "--max-tokens", 4,
         "--set", "prompts.id_column=null")  # fmt: skip
    query = "select source, json_array_length(messages) as n from rows order by source"
    rows = json.loads(call("sql", tmp_path / "d", query, "--format", "json"))
    assert rows == [{"source": "capture", "n": 2}, {"source": "generate", "n": 2}]
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    result = RUNNER.invoke(app, [str(a) for a in ("generate", tmp_path / "e", *common, "--prompts", file, "--text-column",
        "text", "--json-schema", schema, "--set", "prompts.id_column=null")])  # fmt: skip
    assert isinstance(result.exception, KdataError) and "does not write structured output" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "{tmp}/nowhere"], "does not exist"),
        (["sql", "{dataset}", "select nope from rows"], "nope"),
        (
            ["capture", "{tmp}/x", "--teacher", "{llama}", "--corpus", "{tmp}/none.jsonl"],
            "none.jsonl does not exist",
        ),
        (["capture", "hf://a/b", "--teacher", "{llama}", "--corpus", "x"], "share it with `kdata push`"),
        (
            ["capture", "{tmp}/x", "--teacher", "{llama}", "--corpus", "x", "--set", "unit_token=3"],
            "did you mean 'unit_tokens'",
        ),
        (
            ["capture", "{tmp}/x", "--teacher", "{llama}", "--corpus", "x", "--set", "teacher=3"],
            "teacher must be a mapping",
        ),
        (
            ["capture", "{tmp}/x", "--teacher", "{llama}", "--corpus", "x", "--set", "teacher.dtyp=auto"],
            "did you mean 'dtype'",
        ),
        (["select", "{dataset}", "--method", "differenc"], "method: Input should be"),
        (["select", "{dataset}", "--method", "difference", "--score", "nobody"], "no score 'nobody'"),
        (
            ["select", "{dataset}", "--share", "0.5"],
            "share needs a method that takes it: add one of difference, random",
        ),
        (["push", "{dataset}", "{dataset}"], "not an empty folder"),
    ],
)
def test_a_mistake_is_one_kdata_error(
    dataset: Path, llama_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [a.format(tmp=tmp_path, dataset=dataset, llama=llama_dir) for a in arguments]
    result = RUNNER.invoke(app, filled)
    assert result.exit_code == 1 and isinstance(result.exception, KdataError)
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


def kdata(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a shell calls it."""
    return subprocess.run(
        [sys.executable, "-c", "from kdata.pipelines.cli.main import main; main()", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def test_an_error_leaves_with_status_one_and_no_traceback_unless_asked_for(copied: Path) -> None:
    path = copied / "data/capture-00000.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    plain = kdata("verify", str(copied))
    assert plain.returncode == 1 and plain.stdout == "" and "Traceback" not in plain.stderr
    assert "error:" in plain.stderr and "data/capture-00000.arrow: has " in plain.stderr
    asked = kdata("--debug", "verify", str(copied))
    assert asked.returncode == 1 and "Traceback" in asked.stderr and "CorruptError" in asked.stderr


@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_a_backend_that_is_not_installed_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, llama_dir: Path, backend: str
) -> None:
    for name in ("kdata.teachers.vllm", "kdata.teachers.transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "vllm" if backend == "vllm" else "transformers", None)
    with pytest.raises(DependencyError, match=rf"'kdata\[{'vllm-cpu' if backend == 'vllm' else 'train'}\]'"):
        load_teacher(TeacherConfig(model=str(llama_dir), backend=backend), max_k=8)


def test_reading_text_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch, llama_dir: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"kdata\[train\]"):
        load_tokenizer(llama_dir)
