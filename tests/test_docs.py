"""The documentation is true: its links lead somewhere, its commands parse, its programs run, and the site builds."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from kdata.pipelines.cli.main import app
from kdata.pipelines.recipe import Recipe
from kdata.selection.ranked import All
from kdata.selection.select import select
from kdata.store.open import open_dataset
from kdata.trainer.config import ScratchStudent, TrainConfig
from kdata.trainer.student import build_student

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kdata/README.md", "schemas/README.md", "trainer/README.md",
    "pipelines/README.md", "examples/README.md", "SECURITY.md", "trainer/parts/README.md", "kdata/store/README.md",
    "examples/curate.md",
]  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS: Any = typer.main.get_command(app)


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, *languages: str) -> list[str]:
    """Fenced blocks of a page in one of these languages ('' is none)."""
    return [body for language, body in FENCE.findall(text_of(page)) if language in languages]


def prose(page: str) -> str:
    return FENCE.sub("", text_of(page))


# Links and paths.


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as sites make them: lower case, no punctuation, '-' for spaces."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    for link, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", prose(page)):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(page: str) -> None:
    """From the top, or from the page's folder; a name without a folder may be that of a test, or of a file below the page."""
    places = [ROOT, (ROOT / page).parent]
    below = [] if "/" not in page else (ROOT / page).parent.rglob("*.*")
    known = {path.name for path in (*(ROOT / "tests").rglob("*.py"), *below)}
    for name in re.findall(r"`([\w/.-]+\.(?:py|j2|yaml|toml|yml))`", prose(page)):
        exists = any((place / name).exists() for place in places) or name in known
        assert exists or name in ("run.yaml", "trainer.py", "pipelines.py"), f"{page} names {name}"


# Commands.


def commands(page: str) -> Iterator[list[str]]:
    """Calls of `kdata` in the fenced blocks of a page, without the program's own name."""
    for body in blocks(page, "", "sh", "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if not re.match(r"(\S*/)?kdata ", line):
                continue
            words = shlex.split(line, comments=True)
            calls: list[list[str]] = [[]]
            for word in words:
                calls = [*calls, []] if word == "&&" else [*calls[:-1], [*calls[-1], word]]
            for call in calls:
                if call and call[0].rpartition("/")[2] == "kdata":
                    yield call[1:]


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that some words call, and the words that are left for it."""
    command, left = COMMANDS, list(words)
    while hasattr(command, "commands"):
        assert left and left[0] in command.commands, f"kdata {' '.join(words)}: there is no such command"
        command = command.commands[left.pop(0)]
    return command, left


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_blocks_parse(page: str) -> None:
    """Every option exists, values are of its type, nothing that is needed is missing."""
    for words in commands(page):
        if words == ["--help"]:
            continue
        command, left = command_of(words)
        try:
            command.make_context(command.name, left)
        except Exception as error:
            pytest.fail(f"{page}: kdata {' '.join(words)}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("page", PAGES)
def test_options_in_sentences_exist(page: str) -> None:
    for words in (shlex.split(code)[1:] for code in re.findall(r"`(kdata [^`]*)`", prose(page))):
        if not words[:1] or words[0].isupper() or words[0] == "--help" or not words[0].islower():
            continue
        command, left = command_of(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in left:
            assert not word.startswith("--") or word in known, f"{page}: `kdata {' '.join(words)}`: no {word}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_programs_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    lines = "\n".join([*blocks(page, "", "sh", "bash"), *re.findall(r"`([^`\n]*)`", prose(page))])
    for target in re.findall(r"^make ([a-z-]+)", lines, re.MULTILINE):
        assert target in targets, f"{page}: make {target}"
    for path in re.findall(r"python (?!-)(\S+\.py)", lines):
        assert (ROOT / path).exists(), f"{page}: python {path}"
    for module in re.findall(r"python -m ((?:kdata|tests)[\w.]+)", lines):
        parts = module.split(".")
        beside = parts[1:] if parts[0] == "kdata" and len(parts) > 1 and (ROOT / parts[1]).is_dir() else parts
        path = ROOT.joinpath(*beside)
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page}: python -m {module}"


def test_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE)
    assert {*targets} - {"typing"} <= {*shown.split()}


# Settings and programs.


@pytest.mark.parametrize("page", PAGES)
def test_yaml_in_blocks_holds_settings_that_exist(page: str) -> None:
    for body in blocks(page, "yaml"):
        values = yaml.safe_load(body)
        if "teacher" in values:
            for key, value in values.items():
                assert key in Recipe.model_fields, f"{page}: {key} is no key of a recipe"
                field: Any = Recipe.model_fields[key].annotation
                for inner in value if hasattr(field, "model_fields") else ():
                    assert inner in field.model_fields, f"{page}: {key}.{inner} does not exist"
        else:
            TrainConfig.model_validate(values)


PROGRAMS = [
    pytest.param(page, body, id=f"{page}-{number}")
    for page in PAGES
    for number, body in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize(("page", "body"), PROGRAMS)
def test_what_programs_import_exists(page: str, body: str) -> None:
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "kdata":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: from {node.module} import {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


# What makes a program of the documentation short enough for a test, and its end.
SHORTER = {
    "steps=300, ": "steps=2, warmup_steps=1, student={'kind': 'scratch', 'hidden_size': 32, 'num_heads': 2}, ",
    "for batch in batches:": "for batch in batches.epoch():",
    'AutoModelForCausalLM.from_pretrained("STUDENT")': "build_student(ScratchStudent(), open_dataset('D'), 0)",
    'TrainingArguments("OUT")': 'TrainingArguments("OUT", use_cpu=True, max_steps=1, report_to=[])',
}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "body"), PROGRAMS)
def test_programs_run(page: str, body: str, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder where the names that they use (D, DATASET, ...) are a small dataset with a score and a plan."""
    data = open_dataset(copied)
    _score(copied)
    select(data, All(name="difference"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    for name in ("D", "DATASET", "HELDOUT", "runs/quickstart/dataset"):
        (tmp_path / name).symlink_to(copied)
    for long, short in SHORTER.items():
        body = body.replace(long, short)
    names = {"build_student": build_student, "ScratchStudent": ScratchStudent, "open_dataset": open_dataset}
    exec(compile(body, page, "exec"), {"root": copied, "name": "capture-00000", "__name__": "__main__", **names})


def _score(dataset: Path) -> None:
    """Give a dataset the sidecar `ref`, as `kdata score --from` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from kdata.selection.score_file import bring

    ids = open_dataset(dataset).sql("select id from rows")["id"]
    numbers = dataset.parent / "numbers.parquet"
    pq.write_table(pa.table({"id": ids, "nll": pa.array([9.0] * len(ids))}), numbers)
    bring(open_dataset(dataset), numbers, name="ref", unit="nats")


# The site.


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """A link to a page or a heading that does not exist is a warning, and with --strict an error."""
    pytest.importorskip("mkdocs", reason="extra docs")
    links = ROOT / ".venv/typing/kdata"
    links.mkdir(parents=True, exist_ok=True)
    for path in (*(ROOT / "kdata").iterdir(), ROOT / "pipelines", ROOT / "schemas", ROOT / "trainer"):
        if not (links / path.name).exists():
            (links / path.name).symlink_to(path)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "site/format.html").is_file() and (tmp_path / "site/reference/kdata.store.html").is_file()
